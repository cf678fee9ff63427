"""Loaders under a real trainer: resume, epochs, evaluation."""

import pytest
import pytorch_lightning as pl
import torch

from datamodules.addition import AdditionDataModule
from datamodules.full_rank import FullRankDataModule
from datamodules.sources import TextSource
from datamodules.text import TextDataModule
from dflows.errors import UserError
from tests.datamodules.process import Process
from tests.processes import together

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]


class Recorder(pl.LightningModule):
    """A module that keeps the batches that it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = {"train": [], "valid": [], "test": []}

    def training_step(self, batch, batch_idx):
        self.seen["train"].append(batch)
        numbers = batch if isinstance(batch, torch.Tensor) else batch[0]
        return self.weight * numbers.float().mean()

    def validation_step(self, batch, batch_idx):
        self.seen["valid"].append(batch)

    def test_step(self, batch, batch_idx):
        self.seen["test"].append(batch)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        self.total = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / self.total)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def rows(self):
        """The training batches, one after the other."""
        return torch.stack(self.seen["train"])


class Saver(pl.Callback):
    """Saves checkpoints where ModelCheckpoint does: at the end of a batch, and of a validation."""

    def __init__(self, folder):
        self.folder = folder
        self.saved = set()

    def save(self, trainer, name):
        path = self.folder / f"{trainer.global_step}{name}.ckpt"
        # All processes must come by, and what one sees on the disk another may not see yet.
        if path not in self.saved:
            self.saved.add(path)
            trainer.save_checkpoint(path)

    def on_train_batch_end(self, trainer, *args):
        self.save(trainer, "")

    def on_validation_end(self, trainer, pl_module):
        self.save(trainer, "-validated")

    def on_train_epoch_end(self, trainer, pl_module):
        self.save(trainer, "-epoch")


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
        max_steps=steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        callbacks=[Saver(folder), *callbacks],
        **{"devices": 1, "max_epochs": -1, "limit_val_batches": 0, **options},
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

    @pytest.mark.parametrize(
        ("ranks", "options", "message"),
        [
            (2, {}, "8 rows at a time, and the run .* had 4, with 1: set data.batch_size to 2"),
            (3, {}, "had 4, with 1: which 3 processes cannot share equally: start 1"),
            (1, {"stateful": True, "batch_size": 8}, "had 4, with 1: set data.batch_size to 4"),
            (2, {"batch_size": 2}, None),
            (1, {"batch_size": 8}, None),
        ],
    )
    def test_processes_go_on_with_as_many_rows_or_are_refused(self, ranks, options, message):
        state = TextDataModule(length=8, batch_size=4).state_dict()
        data = TextDataModule(**{"length": 8, "batch_size": 4, **options})
        data.trainer = Process(0, ranks)
        if message is None:
            data.load_state_dict(state)
            return
        with pytest.raises(UserError, match=message):
            data.load_state_dict(state)
        data.trainer.state.fn = "test"
        data.load_state_dict(state)  # what is evaluated is the same

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
        place = {"row": 12, "batches": 3, "of_epoch": 3, "processes": 1, "rows_of_batch": 4}
        assert state == {**place, "vocabulary": data.vocabulary.to_json()}

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


class Pieces(TextSource):
    """A text of 135 training characters: 16 windows of 8, wherever the first begins."""

    def describe(self, stream):
        return stream

    def pieces(self, stream):
        size = 135 if stream == "train" else 40
        yield stream, "".join(chr(32 + place % 90) for place in range(size))


KINDS = {"memory": {}, "streaming": {"streaming": True}, "stateful": {"stateful": True}}


def pieces(batch_size=3, **options):
    return TextDataModule(Pieces(), 8, batch_size, eval_batch_size=2, **options)


class TestEpochs:
    """An epoch of the text has 16 windows, 17 where they go on: 6 batches of 3."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_end_after_so_many(self, kind, tmp_path):
        module, trainer = fit(pieces(**KINDS[kind]), tmp_path / "a", -1, max_epochs=2)
        assert (trainer.global_step, trainer.current_epoch, module.total) == (12, 2, 12)
        assert trainer.optimizers[0].param_groups[0]["lr"] == 0
        steps, _ = fit(pieces(**KINDS[kind]), tmp_path / "b", 12)
        assert torch.equal(module.rows(), steps.rows())

    def test_every_window_is_trained_on_once(self, tmp_path):
        module, trainer = fit(pieces(batch_size=4), tmp_path, -1, max_epochs=3)
        assert trainer.global_step == 12
        for epoch in module.rows().reshape(3, 16, 8):
            assert len(epoch.unique(dim=0)) == 16

    def test_validation_comes_at_their_end(self, tmp_path):
        module, _ = fit(pieces(), tmp_path / "a", -1, max_epochs=2, limit_val_batches=1.0)
        assert sum(batch.numel() for batch in module.seen["valid"]) == 2 * 40
        more = {"val_check_interval": 0.5, "limit_val_batches": 1.0}
        module, _ = fit(pieces(), tmp_path / "b", -1, max_epochs=2, **more)
        assert sum(batch.numel() for batch in module.seen["valid"]) == 4 * 40

    @pytest.mark.parametrize(("kind", "workers"), [("memory", 0), ("streaming", 2)])
    @pytest.mark.parametrize("name", ["4", "6", "6-validated", "6-epoch", "9", "12-epoch"])
    def test_resume(self, kind, name, workers, tmp_path):
        options = {"max_epochs": 3, "limit_val_batches": 1.0}
        data = {**KINDS[kind], "num_workers": workers}
        whole, _ = fit(pieces(**data), tmp_path / "a", -1, **options)
        path = tmp_path / "a" / f"{name}.ckpt"
        resumed, trainer = fit(pieces(**data), tmp_path / "b", -1, ckpt_path=path, **options)
        done = int(name.split("-")[0])
        assert torch.equal(resumed.rows(), whole.rows()[done:])
        assert torch.equal(resumed.weight, whole.weight)
        assert (trainer.global_step, resumed.total) == (18, 18)
        # The last checkpoints of both hold the same place.
        first, second = (
            torch.load(tmp_path / folder / "18.ckpt", weights_only=True)["TextDataModule"]
            for folder in "ab"
        )
        assert first == second

    def test_resume_of_a_resumed_run(self, tmp_path):
        whole, _ = fit(pieces(), tmp_path / "a", -1, max_epochs=3)
        fit(pieces(), tmp_path / "b", -1, max_epochs=2, ckpt_path=tmp_path / "a" / "4.ckpt")
        path = tmp_path / "b" / "8.ckpt"
        last, _ = fit(pieces(), tmp_path / "c", -1, max_epochs=3, ckpt_path=path)
        assert torch.equal(last.rows(), whole.rows()[8:])

    def test_may_be_parts(self, tmp_path):
        module, trainer = fit(pieces(), tmp_path / "a", -1, max_epochs=2, limit_train_batches=0.5)
        assert trainer.global_step == 6
        steps, _ = fit(pieces(), tmp_path / "b", 6)
        assert torch.equal(module.rows(), steps.rows())
        _, trainer = fit(pieces(), tmp_path / "c", -1, max_epochs=2, limit_train_batches=4)
        assert trainer.global_step == 8

    @pytest.mark.parametrize("ranks", [1, 2, 4])
    def test_are_those_of_all_processes(self, ranks):
        data = pieces(batch_size=2)
        data.trainer = Process(0, ranks, max_epochs=2, max_steps=-1)
        assert len(data.train_dataloader()) == 8 // ranks

    def test_there_is_no_end_without_them(self):
        data = pieces()
        for trainer in (None, Process(0, 1)):
            data.trainer = trainer
            with pytest.raises(TypeError, match="no end"):
                len(data.train_dataloader())

    def test_samples_without_end_have_none(self, tmp_path):
        data = FullRankDataModule(batch_size=4)
        with pytest.raises(UserError) as error:
            fit(data, tmp_path / "a", -1, max_epochs=2)
        assert str(error.value) == (
            "a FullRankDataModule has samples without end, and no epoch that the trainer could "
            "count (max_epochs is 2): set trainer.max_steps, or trainer.limit_train_batches to the "
            "batches of an epoch"
        )
        module, trainer = fit(data, tmp_path / "b", -1, max_epochs=2, limit_train_batches=3)
        assert (trainer.global_step, module.total) == (6, 6)
        _, trainer = fit(data, tmp_path / "c", 5, max_epochs=2)
        assert trainer.global_step == 5

    def test_sums_have_them_where_they_are_few(self, tmp_path):
        data = AdditionDataModule(1, 10, 20, eval_examples=10)
        data.trainer = Process(0, 1, max_epochs=1, max_steps=-1)
        assert len(data.train_dataloader()) == 4
        data = AdditionDataModule()
        data.trainer = Process(0, 1, max_epochs=1, max_steps=-1)
        with pytest.raises(UserError, match="without end"):
            data.train_dataloader()


class TestOverfit:
    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("kind", KINDS)
    def test_trains_on_the_same_batches(self, kind, workers, tmp_path):
        data = pieces(**KINDS[kind], num_workers=workers)
        module, _ = fit(data, tmp_path / "a", 8, overfit_batches=3)
        steps, _ = fit(pieces(**KINDS[kind]), tmp_path / "b", 3)
        assert torch.equal(module.rows(), torch.cat([steps.rows()] * 3)[:8])

    def test_synthetic(self, tmp_path):
        data = AdditionDataModule(4, batch_size=4)
        module, _ = fit(data, tmp_path, 4, overfit_batches=2)
        first, second = module.seen["train"][:2], module.seen["train"][2:]
        for before, after in zip(first, second, strict=True):
            assert all(torch.equal(*parts) for parts in zip(before, after, strict=True))

    def test_parts_of_an_epoch_are_refused(self, tmp_path):
        with pytest.raises(UserError, match=r"overfit_batches is 0\.5: give a whole number of bat"):
            fit(pieces(), tmp_path, 8, overfit_batches=0.5)

    @pytest.mark.parametrize(("steps", "epochs"), [(8, -1), (-1, 3)])
    @pytest.mark.parametrize("name", ["2", "3", "3-epoch", "5"])
    def test_resume(self, name, steps, epochs, tmp_path):
        options = {"overfit_batches": 3, "max_epochs": epochs}
        whole, _ = fit(pieces(), tmp_path / "a", steps, **options)
        path = tmp_path / "a" / f"{name}.ckpt"
        resumed, _ = fit(pieces(), tmp_path / "b", steps, ckpt_path=path, **options)
        assert torch.equal(resumed.rows(), whole.rows()[int(name[0]) :])

    def test_evaluates(self, tmp_path):
        options = {"limit_val_batches": 1.0, "max_epochs": 2}
        module, _ = fit(pieces(), tmp_path, -1, overfit_batches=2, **options)
        assert len(module.seen["valid"]) == 4


def trained(folder, path, options):
    """What a process of two trains on, and after how many steps it ends."""
    options = {**options, "strategy": "ddp", "devices": 2}
    module, trainer = fit(pieces(2, num_workers=1), folder, -1, ckpt_path=path, **options)
    return module.rows(), trainer.global_step


@pytest.mark.parametrize(
    ("options", "steps", "before"),
    [
        ({"max_epochs": 3}, 12, "one"),
        pytest.param({"max_epochs": 3, "overfit_batches": 3}, 9, "two", marks=pytest.mark.slow),
    ],
)
def test_two_processes_have_the_epochs_of_one(options, steps, before, tmp_path):
    whole, trainer = fit(pieces(4), tmp_path / "one", -1, **options)
    assert trainer.global_step == steps
    folders = {name: tmp_path / name for name in ("two", "resumed")}
    ways = {"two": (None, 0), "resumed": (str(tmp_path / before / "5.ckpt"), 5)}
    for name, (path, first) in ways.items():
        folders[name].mkdir()
        found = together(trained, folders[name], path, options, folder=tmp_path)
        parts, numbers = zip(*found, strict=True)
        assert numbers == (steps, steps)
        assert torch.equal(torch.cat(parts, dim=1), whole.rows()[first:])
    path = folders["two"] / "5.ckpt"
    resumed, _ = fit(pieces(4), tmp_path / "last", -1, ckpt_path=path, **options)
    assert torch.equal(resumed.rows(), whole.rows()[5:])


def test_no_data_are_made_of_a_checkpoint(tmp_path):
    path = tmp_path / "some.ckpt"
    content = {TextDataModule.CHECKPOINT_HYPER_PARAMS_KEY: {"_instantiator": "os.system"}}
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.0.0", **content}, path)
    with pytest.raises(UserError, match="a TextDataModule is made by its constructor"):
        TextDataModule.load_from_checkpoint(path)
