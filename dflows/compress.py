"""Compresses a file with a trained model: its archive takes the model's code length.

    python -m dflows.compress --checkpoint runs/lanes/version_0/best.ckpt book.txt

writes `book.txt.dfl`, which `python -m dflows.decompress` decodes. Any file can be compressed;
what the model has never seen costs more. `-` is the standard input or output.

Encoding takes the passes that generation takes, for many windows at once, as decoding does. The
archive is decoded again before it gets its name, unless `--verify=false` is given.
"""

import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from dflows.cli.checkpoints import Checkpoint, add_checkpoint_arguments, read_checkpoint
from dflows.cli.compressors import Line, compare, print_comparison, training_text
from dflows.cli.configs import Parser
from dflows.cli.errors import run_command
from dflows.cli.models import add_size_arguments, check_counts, text_codec
from dflows.cli.noise import quiet
from dflows.cli.recording import without_machine
from dflows.cli.streams import (
    STANDARD,
    SUFFIX,
    byte_bar,
    opened,
    output,
    size_of,
    target_of,
)
from dflows.cli.summary import stdout_console
from dflows.codec import TextCodec
from dflows.codec.archive import ArchiveReader
from dflows.codec.flows import dtype_of
from dflows.errors import UserError
from dflows.modules import device_of
from dflows.provenance import describe_device
from dflows.records import Record, check_folder, write_record

__all__ = ["compress", "main"]


def _parser() -> Parser:
    parser = Parser(prog="python -m dflows.compress")
    add_checkpoint_arguments(parser)
    parser.add_argument("input", type=str, help="The file; - is the standard input.")
    parser.add_argument(
        "-o", "--output", type=str | None, default=None, help=f"The archive; INPUT{SUFFIX}."
    )
    add_size_arguments(parser)
    parser.add_argument(
        "--batch_size", type=int | None, default=None, help="Windows that are coded together."
    )
    parser.add_argument(
        "--threads", type=int | None, default=None, help="Threads of the CPU, in both directions."
    )
    parser.add_argument(
        "--device", type=str, default="cpu", help="cpu, cuda, …; in both directions"
    )
    parser.add_argument(
        "--verify", type=bool, default=True, help="Whether to decode the archive again."
    )
    parser.add_argument(
        "--benchmark", action="store_true", help="Compare it with gzip, bzip2, xz, zstd and PPMd."
    )
    parser.add_argument(
        "--record", type=str | None, default=None, help="Folder that gets a record of the sizes."
    )
    return parser


def compress(arguments: Sequence[str]) -> None:
    """Runs the command.

    Args:
        arguments: Its arguments.

    Raises:
        UserError: If the arguments cannot be honoured, or the archive does not decode.
    """
    quiet()
    config = _parser().parse_args(list(arguments))
    check_counts(config, "passes", "window")
    if config.benchmark and STANDARD in (config.input, config.output):
        raise UserError("benchmark reads the file again, and prints: give files, and no -")
    if config.record is not None:
        check_folder(config.record)
    target = target_of(config.output, config.input, lambda name: name + SUFFIX)
    checkpoint = read_checkpoint(config.checkpoint)
    codec = text_codec(
        checkpoint,
        allow=config.allow,
        device=config.device,
        passes=config.passes,
        window=config.window,
    )
    total = size_of(config.input)
    times = [time.perf_counter()]
    with opened(config.input) as source, output(target) as file:
        with byte_bar("compressing", total) as progress:
            totals = codec.compress(
                source,
                file,
                batch_size=config.batch_size,
                threads=config.threads,
                progress=progress,
            )
        times.append(time.perf_counter())
        if config.verify:
            file.seek(0)
            with byte_bar("verifying", totals.content) as progress:
                archive = ArchiveReader(file, "the new archive")
                for _ in codec.decompress(archive, progress):
                    pass
            times.append(time.perf_counter())
    seconds = [after - before for before, after in pairwise(times)]
    bits = 8 * totals.size / max(totals.symbols, 1)
    symbols = f"{totals.symbols:,} {codec.symbols.name}"
    if totals.escaped:
        symbols += f", {totals.escaped:,} of them escaped"
    print(
        f"{config.input}: {totals.content:,} bytes, {symbols}; "
        f"{'the output' if target == STANDARD else target}: {totals.size:,} bytes, {bits:.4f} bits "
        f"each, {' and '.join(f'{value:.1f}' for value in seconds)} seconds to encode"
        + (" and to decode" if config.verify else ""),
        file=sys.stderr,
    )
    own = Line(
        f"dflows, {codec.flow.passes} passes",
        totals.size,
        seconds=seconds[0],
        seconds_back=seconds[1] if config.verify else None,
        weights=codec.weights_size,
    )
    others = []
    if config.benchmark:
        content = Path(config.input).expanduser().read_bytes()
        others = compare(content, training_text(checkpoint, config.allow))
        print_comparison(stdout_console(), own, others, totals.content, totals.symbols)
    if config.record is not None:
        record = _record(config, checkpoint, codec, own, others, totals.symbols)
        print(f"record: {write_record(config.record, record)}", file=sys.stderr)


def _record(
    config: Any,
    checkpoint: Checkpoint,
    codec: TextCodec,
    own: Line,
    others: Sequence[Line],
    symbols: int,
) -> Record:
    """Returns the record of an archive, and of what others make of the same text."""
    metrics = {
        "archive_bytes": own.size,
        "archive_bpc": 8 * own.size / max(symbols, 1),
        "archive_seconds": own.seconds,
        "characters": {Path(config.input).name: symbols},
        "passes": codec.flow.passes,
        "weights_bytes": own.weights,
    }
    if own.seconds_back is not None:
        metrics["archive_seconds_back"] = own.seconds_back
    if others:
        metrics["compressed_bytes"] = {line.name: line.size for line in others}
    if others and all(line.primed is not None for line in others):
        metrics["primed_bytes"] = {line.name: line.primed for line in others}
    return Record(
        name=f"{checkpoint.config.get('name') or 'dflows'}-archive",
        kind="compress",
        config=without_machine(checkpoint.config),
        seed=int(checkpoint.config.get("seed_everything") or 0),
        device=describe_device(device_of(codec.flow)),
        precision=dtype_of(codec.flow),
        seconds=own.seconds + (own.seconds_back or 0),
        parameters=sum(parameter.numel() for parameter in codec.flow.parameters()),
        metrics=metrics,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(lambda: compress(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
