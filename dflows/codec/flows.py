"""What a flow writes into an archive of itself, and asks of one that it is to read."""

import hashlib
import platform
import re
from itertools import chain

import torch
from torch import Tensor

from dflows.codec.archive import (
    MOST_THREADS,
    MOST_VALUES,
    ArchiveError,
    ArchiveReader,
    Block,
    Header,
)
from dflows.codec.blocks import decode_block, encode_block
from dflows.codec.tables import MOST_CLASSES, ComputedOtherwise
from dflows.errors import UserError
from dflows.flow import DiscreteFlow
from dflows.modules import device_of

__all__ = [
    "check_model",
    "check_size",
    "check_weights",
    "computed_otherwise",
    "dtype_of",
    "events_of",
    "fingerprint",
    "header_of",
    "read",
    "written",
]


AT_ONCE = 1 << 16
"""Values of a block, where its size is not given."""

_SIZES = re.compile(r"\b(length|columns|groups)=\d+")


def fingerprint(flow: DiscreteFlow) -> bytes:
    """Returns 16 bytes that tell a flow from others: of its weights, and of what it is made of.

    They are the same in all passes and lengths that the flow may have.
    """
    digest = hashlib.sha256()
    for module in flow.modules():
        kind = type(module)
        own = module.extra_repr() if kind.__module__.partition(".")[0] == "dflows" else ""
        digest.update(f"{kind.__qualname__} {_SIZES.sub('', own)}\n".encode())
    for name, value in flow.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        raw = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(raw.numpy().data)
    return digest.digest()[:16]


def computed_by(flow: DiscreteFlow) -> str:
    """Returns what logits depend on, beside weights and shapes."""
    device = device_of(flow)
    where = f"cpu {torch.backends.cpu.get_cpu_capability()}"
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    elif device.type != "cpu":
        where = str(device.type)
    return f"torch {torch.__version__}, {where}, {platform.machine()}"


def dtype_of(flow: DiscreteFlow) -> str:
    """Returns the floating type of a flow's parameters, or of its buffers."""
    values = chain(flow.parameters(), flow.buffers())
    found = next((value.dtype for value in values if value.is_floating_point()), torch.float32)
    return str(found).removeprefix("torch.")


def check_size(flow: DiscreteFlow, events: int | None, threads: int | None) -> tuple[int, int]:
    """Returns the events of a block, and the threads, that are taken.

    Raises:
        UserError: If one is out of range.
    """
    if flow.num_classes > MOST_CLASSES:
        raise UserError(
            f"a value has {flow.num_classes:,} classes, and frequencies of 24 bits are coarse "
            f"beyond {MOST_CLASSES:,}: train a model of fewer"
        )
    if events is None:
        events = max(1, AT_ONCE // flow.length)
    threads = torch.get_num_threads() if threads is None else threads
    most = max(1, MOST_VALUES // flow.length)
    for name, value, limit in (("batch_size", events, most), ("threads", threads, MOST_THREADS)):
        if not 1 <= value <= limit:
            raise UserError(f"{name} is {value}: give 1 to {limit:,}")
    return events, threads


def header_of(flow: DiscreteFlow, content: int, events: int, threads: int) -> Header:
    """Returns the header of an archive that a flow writes."""
    return Header(
        content,
        flow.num_classes,
        flow.length,
        events,
        flow.passes,
        threads,
        fingerprint(flow),
        dtype=dtype_of(flow),
        computed_by=computed_by(flow),
    )


def check_weights(flow: DiscreteFlow, archive: ArchiveReader) -> None:
    """Checks that a flow has the weights that have written an archive.

    Raises:
        ArchiveError: If it cannot.
    """
    header, name = archive.header, archive.name
    own = {"num_classes": flow.num_classes, "dtype": dtype_of(flow)}
    for key, value in own.items():
        if getattr(header, key) != value:
            raise ArchiveError(
                f"{name} was written by a model of {key} {getattr(header, key)}, and this one has "
                f"{value}: give the checkpoint that wrote it"
            )
    if header.fingerprint != fingerprint(flow):
        raise ArchiveError(
            f"{name} was written by a model of other weights: give the checkpoint that wrote it"
        )


def check_model(flow: DiscreteFlow, archive: ArchiveReader) -> None:
    """Checks that a flow can have written an archive.

    Raises:
        ArchiveError: If it cannot.
    """
    check_weights(flow, archive)
    header = archive.header
    fits = header.length == flow.length or (header.shape and header.length < flow.length)
    if not fits or header.passes != flow.passes:
        raise ArchiveError(
            f"{archive.name} was written in {header.passes} passes of {header.length} values, and "
            f"the model takes {flow.passes} of {flow.length}: give it as many, by flow.with_passes "
            "and flow.with_length"
        )


def events_of(values: Tensor, length: int) -> list[Tensor]:
    """Cuts values (n,) into events (N, length), and a shorter one (1, d) of what is left."""
    whole = len(values) // length * length
    groups = [values[:whole].reshape(-1, length), values[whole:].unsqueeze(0)]
    return [group for group in groups if group.numel()]


def written(
    flow: DiscreteFlow,
    groups: list[Tensor],
    crc: int,
    *,
    escapes: bytes = b"",
    context: Tensor | None = None,
) -> Block:
    """Returns the block of groups of events, and the CRC of what they stand for."""
    payload, probe = encode_block(flow, groups, context)
    return Block(sum(group.numel() for group in groups), payload, escapes, probe, crc)


def read(
    flow: DiscreteFlow, block: Block, archive: ArchiveReader, context: Tensor | None = None
) -> Tensor:
    """Returns the values (n,) of a block.

    Raises:
        ArchiveError: If the flow computes other probabilities than it did when it wrote them.
    """
    length = archive.header.length
    whole, rest = divmod(block.values, length)
    shapes = [(whole, length)] * (whole > 0) + [(1, rest)] * (rest > 0)
    try:
        groups = decode_block(flow, block.payload, shapes, block.probe, context)
    except ComputedOtherwise:
        raise computed_otherwise(flow, archive) from None
    return torch.cat(
        [torch.empty(0, dtype=torch.long), *(group.flatten().cpu() for group in groups)]
    )


def computed_otherwise(flow: DiscreteFlow, archive: ArchiveReader) -> ArchiveError:
    """Returns the error that says what differs between writing and reading."""
    there, here = archive.header.computed_by, computed_by(flow)
    where = f"both say {here}" if there == here else f"there {there}; here {here}"
    return ArchiveError(
        f"{archive.name} cannot be decoded here: the model computes other probabilities than it "
        f"did when the archive was written ({where}): decode it on the machine and with the "
        "configuration that wrote it"
    )
