"""The proof of a likelihood: the archive of a split, which is as large as its code length."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from datamodules.symbols import NO_ESCAPES
from dflows.cli.models import exact_flow
from dflows.cli.trained import TrainedModel
from dflows.codec import compress, decompress
from dflows.codec.flows import check_size
from dflows.errors import UserError
from dflows.reporting import Report
from lightning_modules import BaseModule
from lightning_modules.data import unpack

__all__ = ["check_provable", "prove"]


def check_provable(module: BaseModule, trainer: pl.Trainer, split: str = "test") -> None:
    """Refuses what cannot be proved by an archive, before anything is done.

    Raises:
        UserError: If the likelihood is a bound, several processes evaluate, or not all is scored.
    """
    check_size(exact_flow(module), None, None)
    if trainer.world_size > 1:
        raise UserError(
            f"archive is set, and {trainer.world_size} processes evaluate, of which one encodes: "
            "set trainer.devices to 1, or archive to false and use python -m dflows.evaluate "
            "--archive"
        )
    key = "limit_test_batches" if split == "test" else "limit_val_batches"
    limit = getattr(trainer, key)
    if isinstance(limit, int) or limit != 1.0:  # an integer counts batches
        raise UserError(
            f"archive is set, and trainer.{key} is {limit}: an archive is of the whole split, "
            "leave it out, or set data.max_eval_characters"
        )


def prove(module: BaseModule, data: Any, split: str) -> Report:
    """Encodes a split, decodes it, and reports the size of the archive.

    Args:
        module: The module, on its device.
        data: The datamodule, set up for the split.
        split: `test` or `valid`.

    Returns:
        The archive's bytes and bits a character, and the seconds of both directions.

    Raises:
        UserError: If the likelihood is a bound, or the archive does not decode to the split.
    """
    flow = exact_flow(module)
    loader = data.test_dataloader() if split == "test" else data.val_dataloader()
    batches = [unpack(batch) for batch in loader]
    if getattr(data, "is_text", False) and data.length == flow.length and not flow.takes_context:
        encode, comes_back = _of_text(module, data, batches)
    else:
        encode, comes_back = _of_arrays(module, batches)
    begin = time.perf_counter()
    archives = encode()
    middle = time.perf_counter()
    same = comes_back(archives)
    seconds, seconds_back = middle - begin, time.perf_counter() - middle
    if not same:
        raise UserError(
            f"the archive of the {split} split decodes to something else: this is a fault of the "
            "model or of dflows, please report it"
        )
    size = sum(map(len, archives))
    characters = sum(y.numel() for y, _ in batches)
    report = Report(
        {
            "archive_bytes": size,
            "archive_bpc": 8 * size / characters,
            "archive_seconds": seconds,
            "archive_seconds_back": seconds_back,
        }
    )
    bits = f"{8 * size / characters:.4f}"
    remark = f"{size:,} bytes, encoded in {seconds:.1f} s and decoded in {seconds_back:.1f}"
    return report.row(f"{split}, bits per character of the archive", bits, remark)


Batches = list[tuple[Tensor, Tensor | None]]
Proof = tuple[Callable[[], list[bytes]], Callable[[list[bytes]], bool]]
"""What encodes, and what says whether all comes back."""


def _of_text(module: BaseModule, data: Any, batches: Batches) -> Proof:
    symbols = data.vocabulary.text_symbols()
    classes = torch.cat([y.flatten() for y, _ in batches]).cpu().numpy()
    text = symbols.to_bytes(symbols.join(classes, NO_ESCAPES))
    model = TrainedModel(module, data.vocabulary, data.length)
    return (
        lambda: [model.compress(text)],
        lambda archives: b"".join(map(model.decompress, archives)) == text,
    )


def _of_arrays(module: BaseModule, batches: Batches) -> Proof:
    flow, groups = exact_flow(module), [*_by_length(batches)]

    def encode() -> list[bytes]:
        return [compress(flow, y.to(module.device), _on(module, context)) for y, context in groups]

    def comes_back(archives: list[bytes]) -> bool:
        return all(
            torch.equal(decompress(flow, archive, _on(module, context)), y)
            for archive, (y, context) in zip(archives, groups, strict=True)
        )

    return encode, comes_back


def _on(module: BaseModule, context: Tensor | None) -> Tensor | None:
    return None if context is None else context.to(module.device)


def _by_length(batches: Batches) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yields the events of every length together."""
    for length in sorted({y.shape[1] for y, _ in batches}):
        found = [(y, context) for y, context in batches if y.shape[1] == length]
        contexts = [context for _, context in found if context is not None]
        yield torch.cat([y for y, _ in found]).cpu(), torch.cat(contexts) if contexts else None
