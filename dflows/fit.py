"""Trains a model, tests the best checkpoint, and prints and records what came of it.

    python -m dflows.fit --config configs/quickstart.yaml

Every key of a configuration is an argument as well (``--data.length 128``), and several
configurations are laid one over the other. ``--print_config`` shows the result, ``--help`` all
keys. ``--ckpt_path`` resumes a run from a checkpoint.
"""

import sys
from collections.abc import Sequence

from dflows.cli.errors import run_command
from dflows.cli.fitting import fit

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(lambda: fit(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
