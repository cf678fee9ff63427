"""Blocks: events of a flow, encoded and decoded level by level by one and the same computation.

y is mapped to x by the levels of base → data, and x is encoded by the base's distributions. Both
directions evaluate the same networks on the same values in the same order, so that they have the
same logits to the last bit, as long as device, shapes, threads and libraries are the same.
"""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dflows.codec.tables import ComputedOtherwise, Decoder, Encoder, parts_of, uniform
from dflows.errors import LengthError
from dflows.flow import DiscreteFlow
from dflows.modules import device_of, evaluating
from dflows.representations import exactly, full_precision

__all__ = ["Probe", "decode_block", "encode_block", "same_numbers"]

PROBED = 2
"""Passes whose logits are checked: the first depends on no value, and the second is a network's."""


class Probe:
    """Creates the check value of a block: a CRC of the first logits that it takes.

    These are the logits of every transform's network for an event of zeros, and then those of the
    base's first two passes.

    Args:
        expected: The value that it must have when the passes are through; any, where not given.
    """

    def __init__(self, expected: int | None = None) -> None:
        self.value = 0
        self._passes = 0
        self._expected = expected

    def add(self, logits: Tensor) -> None:
        """Adds a pass.

        Raises:
            ComputedOtherwise: If the value is not the one that was expected.
        """
        if self._passes == PROBED:
            return
        self._passes += 1
        self._take(logits)
        if self._passes == PROBED:
            self.check()

    def add_transforms(self, flow: DiscreteFlow, length: int, context: Tensor | None) -> None:
        """Adds what the network of each transform says of an event of zeros."""
        context = None if context is None else context[:1]
        zeros = torch.zeros(1, length, dtype=torch.long, device=device_of(flow))
        for transform in flow.conditional_transforms:
            if len(transform.transformed(zeros)):
                self._take(transform.conditioner.level_logits(zeros, 1, context))

    def _take(self, logits: Tensor) -> None:
        for part in parts_of(full_precision(logits)):
            self.value = zlib.crc32(part.cpu().numpy().tobytes(), self.value)

    def check(self) -> None:
        """Checks the value.

        Raises:
            ComputedOtherwise: If it is not the one that was expected.
        """
        if self._expected not in (None, self.value):
            raise ComputedOtherwise


@contextmanager
def same_numbers(flow: DiscreteFlow, threads: int) -> Iterator[None]:
    """Evaluates a flow so that the same inputs give the same outputs, to the last bit.

    Args:
        flow: The flow, which is in evaluation mode meanwhile.
        threads: Threads of the CPU, on whose number sums depend.
    """
    before, cudnn = torch.get_num_threads(), torch.backends.cudnn
    chosen = cudnn.benchmark, cudnn.deterministic
    torch.set_num_threads(threads)
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        with evaluating(flow), torch.no_grad(), exactly(device_of(flow)):
            yield
    finally:
        cudnn.benchmark, cudnn.deterministic = chosen
        torch.set_num_threads(before)


def encode_block(
    flow: DiscreteFlow, groups: list[Tensor], context: Tensor | None = None
) -> tuple[bytes, int]:
    """Encodes events; call it within :func:`same_numbers`.

    Args:
        flow: The flow.
        groups: Groups of events of one length each, indices (N, d).
        context: What the events of the only group are conditioned on (N, …), encoded.

    Returns:
        The payload, and the value of the :class:`Probe`.
    """
    encoder, probe = Encoder(), Probe()
    for y in groups:
        if not takes_length(flow, y.shape[1], context):
            encoder.encode(y, uniform(len(y), y.shape[1], flow.num_classes))
            continue
        x = y
        probe.add_transforms(flow, y.shape[1], context)
        for transform in reversed(flow.transforms):
            x = transform.by_levels(x, context, inverse=True)

        def decide(dimensions: Tensor, logits: Tensor, x: Tensor = x) -> Tensor:
            probe.add(logits)
            encoder.encode(x[:, dimensions], logits)
            return x[:, dimensions]

        flow.base.decode(decide, len(x), x.shape[1], context)
    return encoder.payload(), probe.value


def decode_block(
    flow: DiscreteFlow,
    payload: bytes,
    shapes: list[tuple[int, int]],
    probe: int,
    context: Tensor | None = None,
) -> list[Tensor]:
    """Decodes events; call it within :func:`same_numbers`.

    Args:
        flow: The flow.
        payload: What :func:`encode_block` returned.
        shapes: Number and length (N, d) of the events of each group.
        probe: The value of the probe.
        context: As in :func:`encode_block`.

    Returns:
        Groups of events, indices (N, d).

    Raises:
        ComputedOtherwise: If the flow does not compute what it computed when it encoded.
    """
    decoder, checked = Decoder(payload), Probe(probe)

    def decide(_: Tensor, logits: Tensor) -> Tensor:
        checked.add(logits)
        return decoder.decode(logits)

    groups = []
    for number, length in shapes:
        if not takes_length(flow, length, context):
            y = decoder.decode(uniform(number, length, flow.num_classes)).to(device_of(flow))
        else:
            checked.add_transforms(flow, length, context)
            y = flow.base.decode(decide, number, length, context)
            for transform in flow.transforms:
                y = transform.by_levels(y, context)
        groups.append(y)
    checked.check()
    return groups


def takes_length(flow: DiscreteFlow, length: int, context: Tensor | None) -> bool:
    """Says whether a flow takes events of a length; some of its parts may have one length alone."""
    if length == flow.length:
        return True
    event = torch.zeros(1, length, dtype=torch.long, device=device_of(flow))
    context = None if context is None else context[:1]
    try:
        flow.base.log_prob(flow.inverse(event, context), context)
    except LengthError:
        return False
    return True
