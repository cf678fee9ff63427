"""Arrays of indices as archives."""

import io
import zlib
from dataclasses import replace

import torch
from torch import Tensor

from dflows.codec.archive import ArchiveError, ArchiveReader, ArchiveWriter, Content
from dflows.codec.blocks import same_numbers
from dflows.codec.flows import check_model, check_size, computed_otherwise, header_of, read, written
from dflows.flow import DiscreteFlow
from dflows.modules import device_of
from dflows.representations import flatten_batch

__all__ = ["compress", "decompress"]


def compress(
    flow: DiscreteFlow,
    indices: Tensor,
    context: Tensor | None = None,
    *,
    batch_size: int | None = None,
    threads: int | None = None,
) -> bytes:
    """Encodes events into an archive, whose size is their code length: -log₂ p(y) in all.

    Encoding takes the passes of generation, as decoding does, so that both compute the same
    numbers; events of a batch share them.

    Args:
        flow: The flow.
        indices: Indices (…, d), of at most D dimensions.
        context: What the flow is conditioned on, (B, …) with B the last batch dimension of the
            indices. It is no part of the archive.
        batch_size: Events that are encoded together; so many that they have 65,536 values by
            default.
        threads: Threads of the CPU, for both directions; torch's by default.

    Returns:
        The archive, in the format of docs/guide/archives.md.

    Raises:
        UserError: If the indices are not of the flow, or a number is out of range.

    Example:
        >>> from dflows import flows
        >>> flow = flows.language_model(num_classes=5, length=16)
        >>> y = flow.sample((100,))
        >>> archive = compress(flow, y)
        >>> torch.equal(decompress(flow, archive), y)
        True
    """
    y = flow.check_indices(indices, wait=True)
    events, threads = check_size(flow, batch_size, threads)
    header = header_of(flow, Content.CLASSES, events, threads)
    header = replace(header, length=y.shape[-1], shape=tuple(y.shape))
    buffer = io.BytesIO()
    writer = ArchiveWriter(buffer, header)
    device = device_of(flow)
    with same_numbers(flow, threads):
        rows, contexts, _ = flatten_batch(y, flow.encode_context(context))
        for begin in range(0, len(rows), events):
            part = rows[begin : begin + events]
            given = None if contexts is None else contexts[begin : begin + events]
            content = _content(part)
            block = written(flow, [part.to(device)], zlib.crc32(content), context=given)
            writer.write(block, content)
    writer.close()
    return buffer.getvalue()


def decompress(flow: DiscreteFlow, archive: bytes, context: Tensor | None = None) -> Tensor:
    """Decodes the events of an archive.

    Args:
        flow: The flow that encoded them.
        archive: What :func:`compress` returned.
        context: What the flow was conditioned on.

    Returns:
        Indices (…, d), on the CPU.

    Raises:
        ArchiveError: If it is no archive, is damaged, or was written by another flow, or where this
            one computes other numbers.
    """
    reader = ArchiveReader(io.BytesIO(archive))
    reader.check()
    header = reader.header
    if header.content != Content.CLASSES or not header.shape:
        raise ArchiveError(f"{reader.name} holds a text: give it to python -m dflows.decompress")
    check_model(flow, reader)
    shape = torch.Size(header.shape)
    batch = torch.zeros(*shape[:-1], 1, dtype=torch.long)
    parts = [torch.empty(0, dtype=torch.long)]
    begin = 0
    with same_numbers(flow, header.threads):
        contexts = flatten_batch(batch, flow.encode_context(context))[1]
        for block in reader.blocks():
            end = begin + block.values // header.length
            given = None if contexts is None else contexts[begin:end]
            values = read(flow, block, reader, given)
            if zlib.crc32(_content(values)) != block.crc:
                raise computed_otherwise(flow, reader)
            parts.append(values)
            begin = end
    return torch.cat(parts).reshape(shape)


def _content(values: Tensor) -> bytes:
    """Returns what the CRCs of an archive of indices are of."""
    return values.cpu().numpy().astype("<i8").tobytes()
