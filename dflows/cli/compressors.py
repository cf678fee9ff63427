"""Other compressors at their strongest, for a comparison."""

import bz2
import importlib
import lzma
import math
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from datamodules.symbols import NO_ESCAPES
from dflows.cli.checkpoints import Checkpoint
from dflows.cli.split import data_of
from dflows.errors import UserError

__all__ = ["Compressor", "Line", "compare", "compressors", "print_comparison", "training_text"]

PPMD_ORDERS = (4, 6, 8, 12, 16)
PPMD_MEMORY = 1 << 28
EXTRA = "compressors"


@dataclass(frozen=True)
class Compressor:
    """Creates a compressor of bytes.

    Args:
        name: Its name and setting.
        compress: Compresses.
        decompress: Does the inverse.
    """

    name: str
    compress: Callable[[bytes], bytes]
    decompress: Callable[[bytes], bytes]


@dataclass(frozen=True)
class Line:
    """Creates a line of the comparison.

    Args:
        name: What compressed.
        size: Bytes of the archive.
        primed: Bytes that it takes beyond those of the training split, where that comes first.
        seconds: Seconds to compress.
        seconds_back: Seconds to decompress, where that was done.
        weights: Bytes of the model.
    """

    name: str
    size: int
    primed: int | None = None
    seconds: float = math.nan
    seconds_back: float | None = None
    weights: int = 0


def compressors() -> Iterator[Compressor]:
    """Yields the compressors of the standard library, and of those packages that are installed."""
    yield Compressor("gzip -9", _gzip, partial(zlib.decompress, wbits=31))
    yield Compressor("bzip2 -9", bz2.compress, bz2.decompress)
    extreme = 9 | lzma.PRESET_EXTREME
    yield Compressor("xz -9e", partial(lzma.compress, preset=extreme), lzma.decompress)
    if (zstd := _installed("zstandard")) is not None:
        settings = zstd.ZstdCompressionParameters.from_level(22, window_log=27, enable_ldm=True)
        yield Compressor(
            "zstd --ultra -22 --long=27",
            zstd.ZstdCompressor(compression_params=settings).compress,
            zstd.ZstdDecompressor(max_window_size=1 << 27).decompress,
        )
    if (ppmd := _installed("pyppmd")) is not None:
        for order in PPMD_ORDERS:
            options = {"max_order": order, "mem_size": PPMD_MEMORY, "variant": "I"}
            yield Compressor(
                f"PPMd, order {order}",
                partial(ppmd.compress, **options),
                partial(ppmd.decompress, **options),
            )


def _gzip(data: bytes) -> bytes:
    deflater = zlib.compressobj(9, wbits=31)
    return deflater.compress(data) + deflater.flush()


def _installed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None


def measure(compressor: Compressor, content: bytes, primer: bytes | None) -> Line:
    """Returns what a compressor makes of a text, alone and behind another.

    Raises:
        UserError: If what comes back is not the text.
    """
    begin = time.perf_counter()
    packed = compressor.compress(content)
    middle = time.perf_counter()
    if compressor.decompress(packed) != content:
        raise UserError(f"{compressor.name} does not give the text back: update its package")
    end = time.perf_counter()
    primed = None
    if primer is not None:
        primed = len(compressor.compress(primer + content)) - len(compressor.compress(primer))
    return Line(compressor.name, len(packed), primed, middle - begin, end - middle)


def training_text(checkpoint: Checkpoint, allow: list[str]) -> bytes | None:
    """Returns the training split of a checkpoint, or None where it is not on this machine."""
    try:
        data = data_of(checkpoint, allow)
        chunks = data.training_chunks()
    except UserError:
        return None
    if chunks is None:
        return None
    symbols = checkpoint.vocabulary.text_symbols()
    parts = (np.asarray(chunk, np.int64) for chunk in chunks)
    return b"".join(symbols.to_bytes(symbols.join(part, NO_ESCAPES)) for part in parts)


def compare(content: bytes, primer: bytes | None) -> list[Line]:
    """Returns what other compressors make of a text, alone and behind the training split.

    Args:
        content: The text.
        primer: The training split, where it is at hand.

    Raises:
        UserError: If one does not give the text back.
    """
    return [*_best_ppmd(measure(each, content, primer) for each in compressors())]


def print_comparison(
    console: Console, own: Line, others: Sequence[Line], content: int, symbols: int
) -> None:
    """Prints a table of an archive and of what others make of the same text.

    Args:
        console: Where to.
        own: The archive; the model has seen the training split.
        others: The others.
        content: Bytes of the text.
        symbols: Its symbols.
    """
    table = Table(title=f"{content:,} bytes", title_justify="left")
    heads = ("", "bytes", "bits", "primed, bytes", "bits", "with the model, bits", "s", "s back")
    for name in (*heads, "symbols/s back"):
        table.add_column(name, justify="right" if name else "left")
    for line in (own, *others):
        table.add_row(*_cells(line, symbols, trained=line is own))
    console.print(table)
    primed = all(line.primed is not None for line in others)
    console.print(
        "bits are those of a symbol; primed: what the text adds where the training split comes "
        "first, as the model has seen it" + ("" if primed else ", which is not on this machine")
    )
    for package in ("zstandard", "pyppmd"):
        if _installed(package) is None:
            console.print(f"{package} is not installed: pip install 'dflows[{EXTRA}]'")


def _cells(line: Line, symbols: int, *, trained: bool) -> list[str]:
    def bits(size: int | None) -> str:
        return "" if size is None else f"{8 * size / max(symbols, 1):.4f}"

    primed = line.size if trained else line.primed
    cold = None if trained else line.size
    return [
        line.name,
        "" if cold is None else f"{cold:,}",
        bits(cold),
        "" if primed is None else f"{primed:,}",
        bits(primed),
        bits(line.size + line.weights),
        f"{line.seconds:.2f}",
        "" if line.seconds_back is None else f"{line.seconds_back:.2f}",
        "" if not line.seconds_back else f"{symbols / line.seconds_back:,.0f}",
    ]


def _best_ppmd(lines: Iterator[Line]) -> Iterator[Line]:
    """Yields lines, of PPMd those of its best orders alone."""
    tried = []
    for line in lines:
        if line.name.startswith("PPMd"):
            tried.append(line)
        else:
            yield line
    if tried:
        best = min(tried, key=lambda line: line.size)
        yield best
        primed = min(tried, key=lambda line: line.primed or 0)
        if primed is not best and primed.primed is not None:
            yield primed
