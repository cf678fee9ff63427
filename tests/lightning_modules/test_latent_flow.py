"""Latent flows through the trainer and the commands: bounds that say so, annealing, samples."""

import math
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
import yaml

from datamodules import AdditionDataModule, FullRankDataModule
from dflows.backbones import LSTM
from dflows.checks import CertificateError
from dflows.errors import UserError
from dflows.latent import AutoregressivePrior, InverseAutoregressivePrior, LatentFlow
from dflows.records import read_record
from lightning_modules import LatentFlowModule, Optimization
from tests import training
from tests.commands import run_here, small_config, write_text

PRIORS = (AutoregressivePrior, InverseAutoregressivePrior)
NETWORK = partial(LSTM, width=8, bidirectional=True)


def made(num_classes=5, length=16, kind=AutoregressivePrior, **options):
    prior = kind(features=4, hidden=8, couplings=2, coupling_width=8)
    flow = LatentFlow(num_classes, length, prior, NETWORK(), NETWORK())
    return LatentFlowModule(flow, **options)


def trainer(folder, steps=1, **options):
    usual = {"limit_val_batches": 2, "val_check_interval": steps}
    return training.trainer(folder, steps, **usual | options)


def test_the_divergence_is_annealed():
    module = made(kl_zero_steps=2, kl_rise_steps=4)
    weights = [module.kl_weight(step) for step in range(8)]
    assert weights == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert [made().kl_weight(step) for step in (0, 1)] == [1, 1]
    assert [made(kl_zero_steps=1).kl_weight(step) for step in (0, 1)] == [0, 1]


class Weights(pl.Callback):
    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.weights.append(float(trainer.callback_metrics["kl_weight"]))


def test_so_it_is_in_training(text, tmp_path):
    module = made(text.num_classes, kl_zero_steps=1, kl_rise_steps=2)
    watch = Weights()
    trainer(tmp_path, 5, callbacks=[watch]).fit(module, datamodule=text)
    assert watch.weights == [0, 0, 0.5, 1, 1]
    y = torch.zeros(2, 16, dtype=torch.long)
    module._trainer = None  # no step done: the divergence has no weight
    torch.manual_seed(1)
    found = module.evaluate_objective(y)
    torch.manual_seed(1)
    assert torch.equal(found, module.flow.terms(y).log_emission.mean(0))


@pytest.mark.parametrize("kind", PRIORS)
def test_steps_reduce_the_loss(kind):
    module = made(kind=kind, num_samples=4)
    y = torch.arange(16).remainder(5).expand(3, -1)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    losses = []
    for _ in range(25):
        torch.manual_seed(0)
        loss = -module.evaluate_objective(y).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[1] < losses[0]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("kind", PRIORS)
def test_it_is_tested_by_two_bounds_that_do_not_change(kind, text, tmp_path):
    module = made(text.num_classes, kind=kind, importance_samples=8)
    assert module.likelihood == "bound"
    run = trainer(tmp_path)
    run.fit(module, datamodule=text)
    (first,) = run.test(module, datamodule=text, verbose=False)
    torch.rand(3)
    assert run.test(module, datamodule=text, verbose=False) == [first]
    assert first["test_bpc_importance"] < first["test_bpc"]
    assert module.scores["test"].characters == 300
    report = module.report("test")
    assert report.metrics["test_bpc_importance"] == pytest.approx(first["test_bpc_importance"])
    assert report.metrics["importance_samples"] == 8
    (again,) = run.validate(module, datamodule=text, verbose=False)
    assert run.validate(module, datamodule=text, verbose=False) == [again]


@pytest.mark.parametrize("kind", PRIORS)
def test_its_bounds_are_those_of_full_precision(kind, text, tmp_path):
    torch.manual_seed(0)
    module = made(text.num_classes, kind=kind)
    found = [
        trainer(tmp_path, precision=precision).test(module, datamodule=text, verbose=False)
        for precision in ("32-true", "bf16-mixed")
    ]
    assert found[0] == found[1]


def test_one_draw_makes_the_bounds_one(text, tmp_path):
    module = made(text.num_classes, importance_samples=1)
    (found,) = trainer(tmp_path).test(module, datamodule=text, verbose=False)
    assert found["test_bpc_importance"] == pytest.approx(found["test_bpc"], rel=1e-6)


def test_it_learns_a_distribution_and_is_not_called_exact(tmp_path):
    data = FullRankDataModule(length=3, num_classes=3, batch_size=64, eval_examples=2000)
    module = made(3, 3, num_samples=2, optimization=Optimization(learning_rate=0.01))
    run = trainer(tmp_path, 60)
    run.fit(module, datamodule=data)
    (found,) = run.test(module, datamodule=data, verbose=False)
    assert data.entropy < found["test_nats"] < 3 * math.log(3) + 0.5


def test_a_prior_that_does_not_invert_itself_is_refused(text, tmp_path, monkeypatch):
    monkeypatch.setattr(AutoregressivePrior, "transform", lambda _, noise: noise)
    module = made(text.num_classes)
    with torch.no_grad():
        module.flow.prior.start.add_(1)
    with pytest.raises(CertificateError, match="AutoregressivePrior does not invert itself"):
        trainer(tmp_path).fit(module, datamodule=text)
    with pytest.raises(CertificateError, match="AutoregressivePrior does not invert itself"):
        module.certify()


def test_a_context_is_refused(tmp_path):
    data = AdditionDataModule(length=3, num_classes=4, batch_size=8, eval_examples=16)
    with pytest.raises(UserError, match="takes no context"):
        trainer(tmp_path).fit(made(4, 3), datamodule=data)
    with pytest.raises(UserError, match="takes no context"):
        made().sample(2, context=torch.zeros(2, 1))


def test_there_is_one_way_to_draw():
    with pytest.raises(UserError, match="method is 'fixed_point'"):
        made().sample(2, method="fixed_point")


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_samples", 0), ("importance_samples", 0), ("kl_zero_steps", -1), ("kl_rise_steps", -1)],
)
def test_bad_values_are_named(key, value):
    with pytest.raises(UserError, match=f"{key} is {value}: give at least"):
        made(**{key: value})


@pytest.mark.parametrize("kind", PRIORS)
def test_the_commands_take_it(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = small_config(tmp_path, write_text(tmp_path), max_steps=2, val_check_interval=2)
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    network = {
        "class_path": "dflows.backbones.LSTM",
        "init_args": {"width": 8, "bidirectional": True},
    }
    prior = {"features": 4, "hidden": 8, "couplings": 2, "coupling_width": 8}
    config["model"] = {
        "class_path": "lightning_modules.LatentFlowModule",
        "init_args": {
            "flow": {
                "class_path": "dflows.latent.LatentFlow",
                "init_args": {
                    "prior": {"class_path": f"dflows.latent.{kind.__name__}", "init_args": prior},
                    "inference": network,
                    "emission": network,
                },
            },
            "importance_samples": 4,
        },
    }
    path.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    assert run_here("fit", "--config", path, "--record", tmp_path) == 0
    printed = capsys.readouterr().out
    assert "300 characters, bound" in printed
    assert "bound of 4 samples a window" in printed
    assert "exact" not in printed
    record = read_record(tmp_path / "small-1.json")
    assert record.likelihood == "bound"
    assert record.metrics["passes"] == (17 if kind is AutoregressivePrior else 2)
    assert record.metrics["importance_samples"] == 4
    assert record.metrics["test_bpc_importance"] < record.metrics["test_bpc"]
    assert record.metrics["generation_seconds_32"] > 0
    run = tmp_path / "runs" / "small" / "version_0"
    assert run_here("evaluate", "--checkpoint", run, "--record", tmp_path) == 0
    again = read_record(tmp_path / "small-test-1.json")
    assert again.likelihood == "bound"
    for key in ("test_bpc", "test_bpc_importance"):
        assert again.metrics[key] == pytest.approx(record.metrics[key], rel=1e-6)
    capsys.readouterr()
    drawn = []
    for seed in (3, 3, 4):
        asked = ("--num_samples", 2, "--length", 40, "--seed", seed)
        assert run_here("generate", "--checkpoint", run, *asked) == 0
        drawn.append(capsys.readouterr().out)
    assert drawn[0] == drawn[1] != drawn[2]
    assert run_here("generate", "--checkpoint", run, "--method", "fixed_point") == 1
    assert "leave it at levels" in capsys.readouterr().err
