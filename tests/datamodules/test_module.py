"""Loaders under a real trainer: resume, epochs, evaluation."""

import pytest
import pytorch_lightning as pl
import torch

from datamodules.full_rank import FullRankDataModule
from datamodules.text import TextDataModule
from dflows.errors import UserError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
]


class Recorder(pl.LightningModule):
    """A module that keeps the batches that it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = {"train": [], "valid": [], "test": []}

    def training_step(self, batch, batch_idx):
        self.seen["train"].append(batch)
        return self.weight * batch.float().mean()

    def validation_step(self, batch, batch_idx):
        self.seen["valid"].append(batch)

    def test_step(self, batch, batch_idx):
        self.seen["test"].append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Saver(pl.Callback):
    """Saves checkpoints where ModelCheckpoint does: at the end of a batch, and of a validation."""

    def __init__(self, folder):
        self.folder = folder

    def save(self, trainer, name):
        path = self.folder / f"{trainer.global_step}{name}.ckpt"
        if not path.exists():
            trainer.save_checkpoint(path)

    def on_train_batch_end(self, trainer, *args):
        self.save(trainer, "")

    def on_validation_end(self, trainer, pl_module):
        self.save(trainer, "-validated")


class StopHard(pl.Callback):
    """A failure in the middle of training."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise KeyError("stopped")


def text(**options):
    return TextDataModule(length=8, batch_size=4, max_eval_characters=300, **options)


def fit(data, folder, steps, *, ckpt_path=None, callbacks=(), **options):
    """Trains on a datamodule; returns the module with the batches and the trainer."""
    module = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=-1,
        max_steps=steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        callbacks=[Saver(folder), *callbacks],
        **{"limit_val_batches": 0, **options},
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module, trainer


class TestResume:
    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_goes_on_with_the_batch_that_comes_next(self, workers, accumulate, tmp_path):
        options = {"accumulate_grad_batches": accumulate}
        whole, _ = fit(text(num_workers=workers), tmp_path / "a", 8, **options)
        with pytest.raises(KeyError, match="stopped"):
            fit(text(num_workers=workers), tmp_path, 8, callbacks=[StopHard(5)], **options)
        path = tmp_path / "3.ckpt"
        resumed, _ = fit(text(), tmp_path / "b", 8, ckpt_path=path, **options)
        expected = whole.seen["train"][3 * accumulate :]
        assert torch.equal(torch.stack(resumed.seen["train"]), torch.stack(expected))
        assert torch.equal(resumed.weight, whole.weight)

    def test_twice(self, tmp_path):
        whole, _ = fit(text(), tmp_path / "a", 9)
        fit(text(), tmp_path / "b", 4)
        fit(text(), tmp_path / "c", 7, ckpt_path=tmp_path / "b" / "4.ckpt")
        last, _ = fit(text(), tmp_path / "d", 9, ckpt_path=tmp_path / "c" / "6.ckpt")
        assert torch.equal(torch.stack(last.seen["train"]), torch.stack(whole.seen["train"][6:]))

    @pytest.mark.parametrize("workers", [0, 2])
    def test_epochs_of_a_limited_number_of_batches_go_on(self, workers, tmp_path):
        whole, _ = fit(text(), tmp_path / "a", 10)
        options = {"limit_train_batches": 4}
        data = text(num_workers=workers)
        limited, _ = fit(data, tmp_path / "b", 10, **options)
        assert torch.equal(torch.stack(limited.seen["train"]), torch.stack(whole.seen["train"]))
        path = tmp_path / "b" / "7.ckpt"
        resumed, _ = fit(text(num_workers=workers), tmp_path / "c", 10, ckpt_path=path, **options)
        assert torch.equal(
            torch.stack(resumed.seen["train"])[-3:], torch.stack(whole.seen["train"][-3:])
        )

    @pytest.mark.parametrize("name", ["6.ckpt", "6-validated.ckpt"])
    def test_around_validation(self, name, tmp_path):
        options = {
            "limit_val_batches": 1.0,
            "val_check_interval": 2,
            "check_val_every_n_epoch": None,
        }
        whole, _ = fit(text(), tmp_path / "a", 8, **options)
        assert sum(batch.numel() for batch in whole.seen["valid"]) == 4 * 300
        path = tmp_path / "a" / name
        resumed, _ = fit(text(), tmp_path / "b", 8, ckpt_path=path, **options)
        assert torch.equal(torch.stack(resumed.seen["train"]), torch.stack(whole.seen["train"][6:]))

    def test_another_batch_size_goes_on_with_the_next_row(self, tmp_path):
        whole, _ = fit(text(), tmp_path / "a", 8)
        data = TextDataModule(length=8, batch_size=10)
        path = tmp_path / "a" / "3.ckpt"
        resumed, _ = fit(data, tmp_path / "b", 5, ckpt_path=path)
        assert torch.equal(torch.cat(resumed.seen["train"]), torch.cat(whole.seen["train"])[12:32])
        assert data.state_dict()["row"] == 32

    def test_a_new_fit_begins_anew(self, tmp_path):
        data = text()
        whole, trainer = fit(data, tmp_path / "a", 4)
        trainer.test(whole, datamodule=data, ckpt_path=tmp_path / "a" / "3.ckpt", verbose=False)
        assert sum(batch.numel() for batch in whole.seen["test"]) == 300
        again, _ = fit(data, tmp_path / "b", 4)
        assert torch.equal(torch.stack(again.seen["train"]), torch.stack(whole.seen["train"]))

    def test_checkpoint_holds_plain_values(self, tmp_path):
        data = text()
        fit(data, tmp_path, 3)
        state = torch.load(tmp_path / "3.ckpt", weights_only=True)["TextDataModule"]
        assert state == {"row": 12, "vocabulary": data.vocabulary.to_json()}

    def test_another_vocabulary_is_refused(self):
        state = TextDataModule(vocabulary=["a", "b"]).state_dict()
        with pytest.raises(
            UserError, match=r"another vocabulary \(2 symbols, here 68\): set vocabulary"
        ):
            TextDataModule().load_state_dict(state)

    def test_without_a_trainer(self):
        data = text()
        rows = torch.cat(
            [batch for batch, _ in zip(data.train_dataloader(), range(4), strict=False)]
        )
        other = text()
        other.load_state_dict({**data.state_dict(), "row": 5})
        assert torch.equal(next(iter(other.train_dataloader())), rows[5:9])

    def test_synthetic(self, tmp_path):
        whole, _ = fit(FullRankDataModule(batch_size=4), tmp_path / "a", 8)
        path = tmp_path / "a" / "3.ckpt"
        resumed, _ = fit(FullRankDataModule(batch_size=4), tmp_path / "b", 8, ckpt_path=path)
        assert torch.equal(torch.stack(resumed.seen["train"]), torch.stack(whole.seen["train"][3:]))
