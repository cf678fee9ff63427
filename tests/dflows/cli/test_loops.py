"""Wherever a run stops, it goes on as the uninterrupted one: weights, best, logs."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins import MixedPrecision
from torch.amp import GradScaler

from datamodules import LocalText, TextDataModule
from dflows import acceleration, flows
from dflows.backbones import LSTM, DilatedConvolution
from dflows.cli.callbacks import Stopwatch
from dflows.cli.checkpoints import WholeCheckpoints
from dflows.cli.noise import quiet
from dflows.cli.saving import BestCheckpoint, LastCheckpoint
from dflows.cli.trainer import Trainer
from dflows.objectives import Local
from lightning_modules import FlowModule, LanguageModel, Optimization
from tests.commands import write_text

EPOCHS = {"max_steps": -1, "check_val_every_n_epoch": 1, "limit_train_batches": 4}
MODES = {
    "steps": {},
    "every three steps": {"every": 3},
    "accumulated": {"max_steps": 6, "accumulate_grad_batches": 2, "val_check_interval": 3},
    "epochs": {**EPOCHS, "max_epochs": 3, "val_check_interval": 1.0},
    "within epochs": {**EPOCHS, "max_epochs": 2, "val_check_interval": 2, "every": 1},
    "accumulated epochs": {
        **EPOCHS,
        "limit_train_batches": 5,
        "accumulate_grad_batches": 2,
        "max_epochs": 2,
        "val_check_interval": 1.0,
    },
    "every other epoch": {
        **EPOCHS,
        "check_val_every_n_epoch": 2,
        "limit_train_batches": 3,
        "max_epochs": 4,
        "val_check_interval": 1.0,
    },
    "no validation": {"limit_val_batches": 0, "max_steps": 6},
    "overfit": {"overfit_batches": 2, "max_steps": 7, "val_check_interval": 2},
    "stateful": {"stateful": True},
    "clipped by norm": {"gradient_clip_val": 0.01},
    "clipped by value": {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "64-true": {"precision": "64-true"},
    # Steps are skipped at first, and again whenever the scale has grown.
    "16-mixed": {"scale": 2.0**27},
    "16-mixed, clipped": {"scale": 2.0**27, "gradient_clip_val": 0.01},
    "gradient checkpointing": {"settings": {"gradient_checkpointing": True}},
    "compiled": {"settings": {"compile": True}},
}
HOOKS = (
    "on_train_batch_start",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_batch_end",
    "on_validation_end",
    "on_train_epoch_start",
    "on_train_epoch_end",
)


class Stop(BaseException):
    """What ends a run: no error, so that nothing takes it for one."""


class StopAt(Callback):
    """Ends a run the n-th time that it comes by one of Lightning's hooks."""

    def __init__(self, hook, number):
        self._left = number
        setattr(self, hook, self._come_by)

    def _come_by(self, *arguments, **options):
        self._left -= 1
        if not self._left:
            raise Stop


class Log(Logger):
    """A log in memory."""

    name = version = None

    def __init__(self):
        super().__init__()
        self.values = {}

    def log_metrics(self, metrics, step=None):
        self.values |= {(name, step): value for name, value in metrics.items()}

    def log_hyperparams(self, params):
        pass


@pytest.fixture(autouse=True)
def _without_a_compiler(monkeypatch):
    """What is compiled is what dynamo and autograd make of it, with no compiler behind them."""
    monkeypatch.setattr(acceleration, "BACKEND", "aot_eager")


def module_of(data, stateful, settings):
    torch.manual_seed(3)
    settings = Optimization(learning_rate=0.01, schedule="linear", **settings)
    if stateful:
        flow = flows.language_model(data.num_classes, data.length, partial(LSTM, width=4))
        return LanguageModel(flow, settings, stateful=True, restart=0.3)
    # A level is drawn an example and step, and weights are dropped.
    backbone = partial(DilatedConvolution, width=4, layers=1, dropout=0.2)
    flow = flows.strided(data.num_classes, data.length, columns=4, backbone=backbone)
    return FlowModule(flow, Local(subsample="levels"), settings, base_refit_every=3)


def fit(
    folder,
    *,
    stop=None,
    resume=None,
    every=None,
    stateful=False,
    scale=None,
    settings=None,
    **options,
):
    """Trains for 12 steps, or as far as it may."""
    quiet()
    text = LocalText(path=write_text(folder).as_posix(), fractions=(0.8, 0.1, 0.1))
    data = TextDataModule(text, length=8, batch_size=4, eval_batch_size=20, stateful=stateful)
    module, log = module_of(data, stateful, settings or {}), Log()
    plugins = [WholeCheckpoints()]
    if scale is not None:
        scaler = GradScaler("cpu", init_scale=scale, growth_interval=2)
        plugins.append(MixedPrecision("16-mixed", "cpu", scaler))
    kept = BestCheckpoint(dirpath=str(folder)), LastCheckpoint(every, dirpath=str(folder))
    usual = {
        "accelerator": "cpu",
        "max_steps": 12,
        "max_epochs": -1,
        "val_check_interval": 4,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "logger": log,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "plugins": plugins,
        "callbacks": [*([StopAt(*stop)] if stop else []), Stopwatch(), *kept],
    }
    trainer = Trainer(**usual | options)
    ended = True
    try:
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    except Stop:
        ended = False
    best = folder / "best.ckpt"
    return SimpleNamespace(
        ended=ended,
        step=trainer.global_step,
        weights=module.state_dict(),
        best=torch.load(best, weights_only=True)["state_dict"] if best.is_file() else {},
        log=log.values,
        scaler=trainer.precision_plugin.state_dict(),
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted runs, each made when it is first asked for."""
    made = {}

    def run(mode):
        if mode not in made:
            made[mode] = fit(tmp_path_factory.mktemp("whole"), **MODES[mode])
        return made[mode]

    return run


def assert_exact(whole, folder, mode, hook, number):
    """Stops a run and resumes it; returns whether it came by there at all."""
    stopped = fit(folder, stop=(hook, number), **MODES[mode])
    if stopped.ended:
        return False
    last = folder / "last.ckpt"
    if last.is_file():
        resumed = fit(folder, resume=last, **MODES[mode])
        assert resumed.step == whole.step
        for found, expected in ((resumed.weights, whole.weights), (resumed.best, whole.best)):
            assert found.keys() == expected.keys()
            for name, weight in expected.items():
                assert torch.equal(found[name], weight), name
        assert stopped.log | resumed.log == whole.log
        assert resumed.scaler == whole.scaler
        assert torch.load(last, weights_only=True)["global_step"] == whole.step
    return True


@pytest.mark.filterwarnings("ignore:.ModelCheckpoint.monitor:UserWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    ("mode", "hook", "number"),
    [
        ("steps", "on_after_backward", 7),  # within a step, whose randomness is drawn again
        ("steps", "on_validation_batch_end", 4),  # the second validation is made up for
        ("steps", "on_validation_start", 3),  # the last, after which no step is left
        ("every three steps", "on_train_batch_start", 8),  # after a refit of the base
        ("every three steps", "on_train_batch_end", 6),  # before it: the checkpoint stays
        ("accumulated", "on_validation_start", 1),  # gradients wait for more
        ("accumulated", "on_train_batch_start", 6),
        ("epochs", "on_train_batch_start", 5),  # the first of an epoch
        ("epochs", "on_train_epoch_end", 2),
        ("within epochs", "on_validation_start", 2),
        ("every other epoch", "on_train_epoch_start", 3),
        ("no validation", "on_after_backward", 4),
        ("stateful", "on_after_backward", 6),
        ("clipped by value", "on_after_backward", 5),
        ("bf16-mixed", "on_after_backward", 5),
        ("64-true", "on_after_backward", 5),
        ("16-mixed", "on_after_backward", 7),
        ("16-mixed", "on_train_batch_start", 2),  # a step that was skipped is behind
        ("16-mixed, clipped", "on_before_optimizer_step", 6),
        ("gradient checkpointing", "on_after_backward", 5),
        ("compiled", "on_after_backward", 5),
    ],
)
def test_a_run_that_stops_goes_on_exactly(whole, tmp_path, mode, hook, number):
    assert assert_exact(whole(mode), tmp_path, mode, hook, number)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.ModelCheckpoint.monitor:UserWarning")
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("mode", MODES)
def test_a_run_goes_on_exactly_wherever_it_stops(whole, tmp_path, mode, hook):
    for number in range(1, 100):
        folder = tmp_path / str(number)
        folder.mkdir()
        if not assert_exact(whole(mode), folder, mode, hook, number):
            break


CHANGES = {
    "compiled from here on": ({}, {"compile": True}),
    "compiled no more": ({"compile": True}, {}),
    "layers computed twice from here on": ({}, {"gradient_checkpointing": True}),
}


@pytest.mark.filterwarnings("ignore:.ModelCheckpoint.monitor:UserWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("change", CHANGES)
def test_how_a_step_is_computed_may_change_on_the_way(whole, tmp_path, change):
    before, after = CHANGES[change]
    fit(tmp_path, settings=before, stop=("on_train_batch_start", 6))
    resumed = fit(tmp_path, settings=after, resume=tmp_path / "last.ckpt")
    assert resumed.step == 12
    for name, weight in whole("steps").weights.items():
        torch.testing.assert_close(resumed.weights[name], weight, rtol=1e-4, atol=1e-5, msg=name)


def test_steps_that_are_skipped_count_and_spoil_nothing(tmp_path):
    run = fit(tmp_path, scale=2.0**27)
    assert run.step == 12
    assert run.scaler["scale"] < 2.0**27
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    (optimizer,) = state["optimizer_states"]
    taken = {int(entry["step"]) for entry in optimizer["state"].values()}
    assert len(taken) == 1
    assert 0 < taken.pop() < 12  # Adam's own count, of those that were not skipped
    assert state["lr_schedulers"][0]["last_epoch"] == 12
    assert state["state_dict"]["base_refit.counts"].isfinite().all()
    assert state["datamodule" if "datamodule" in state else "TextDataModule"]["row"] == 12 * 4


def test_a_run_without_validations_leaves_a_last_checkpoint(tmp_path):
    fit(tmp_path, limit_val_batches=0, max_steps=3)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3


def test_a_step_that_fails_half_done_keeps_the_checkpoint_before(tmp_path):
    fit(tmp_path, stop=("on_train_batch_end", 6), every=2, max_steps=8)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4


def test_a_run_that_fails_before_its_first_step_writes_no_checkpoint(tmp_path):
    fit(tmp_path, max_steps=3)
    before = (tmp_path / "last.ckpt").read_bytes()
    fit(tmp_path, stop=("on_train_batch_start", 1), resume=tmp_path / "last.ckpt", max_steps=6)
    assert (tmp_path / "last.ckpt").read_bytes() == before
