"""Decompresses what `python -m dflows.compress` has compressed, with the same checkpoint.

    python -m dflows.decompress --checkpoint runs/lanes/version_0/best.ckpt book.txt.dfl

writes `book.txt`. The whole archive is checked before anything is decoded, and every block before
it is written. `-` is the standard input or output.
"""

import sys
from collections.abc import Sequence

from dflows.cli.checkpoints import add_checkpoint_arguments, read_checkpoint
from dflows.cli.configs import Parser
from dflows.cli.errors import run_command
from dflows.cli.models import text_codec
from dflows.cli.noise import quiet
from dflows.cli.streams import STANDARD, SUFFIX, byte_bar, output, seekable, target_of
from dflows.codec.archive import ArchiveReader
from dflows.errors import UserError

__all__ = ["decompress", "main"]


def _without_suffix(name: str) -> str:
    if not name.endswith(SUFFIX) or name == SUFFIX:
        raise UserError(f"{name} does not end in {SUFFIX}, which would be left away: give -o FILE")
    return name.removesuffix(SUFFIX)


def decompress(arguments: Sequence[str]) -> None:
    """Runs the command.

    Args:
        arguments: Its arguments.

    Raises:
        UserError: If the arguments cannot be honoured, or the archive cannot be decoded.
    """
    quiet()
    parser = Parser(prog="python -m dflows.decompress")
    add_checkpoint_arguments(parser)
    parser.add_argument("input", type=str, help="The archive; - is the standard input.")
    parser.add_argument(
        "-o", "--output", type=str | None, default=None, help=f"The file; INPUT without {SUFFIX}."
    )
    parser.add_argument("--device", type=str, default="cpu", help="What it was compressed on.")
    config = parser.parse_args(list(arguments))
    target = target_of(config.output, config.input, _without_suffix)
    checkpoint = read_checkpoint(config.checkpoint)
    with seekable(config.input) as source:
        name = "the standard input" if config.input == STANDARD else config.input
        archive = ArchiveReader(source, name)
        archive.check()
        codec = text_codec(
            checkpoint,
            allow=config.allow,
            device=config.device,
            archive=archive,
        )
        with output(target) as file, byte_bar("decompressing", None) as progress:
            for part in codec.decompress(archive, progress=progress):
                file.write(part)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(lambda: decompress(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
