"""A batch that cannot fit is refused before it is read, and whatever fits is not."""

from functools import partial

import pytest
import torch
import yaml

from datamodules import AdditionDataModule, FullRankDataModule
from dflows import Context, flows, memory
from dflows.backbones import LSTM, DilatedConvolution
from dflows.encoders import SequenceEncoder
from dflows.errors import UserError
from lightning_modules import FlowModule, LanguageModel, NGramModule, Optimization, estimates
from lightning_modules.estimates import BYTES
from tests.commands import ROOT
from tests.training import trainer

SHIPPED = sorted((ROOT / "configs").rglob("*.yaml"))


def flow_module():
    return FlowModule(flows.bipartite(5, 5, partial(DilatedConvolution, width=8)))


def fit(folder, module, batch_size, **options):
    data = FullRankDataModule(batch_size=batch_size, eval_examples=10)
    trainer(folder, steps=1, limit_val_batches=0, **options).fit(module, datamodule=data)


def needed(folder, monkeypatch, module, batch_size):
    """What a batch is said to take."""
    with monkeypatch.context() as patch:
        patch.setattr(estimates, "total_memory", lambda *_: 0)
        found = []
        patch.setattr(estimates, "check_memory", lambda needed, *_: found.append(needed))
        fit(folder, module, batch_size)
    return found[0]


def test_it_is_what_the_backward_pass_of_the_batch_needs(tmp_path, monkeypatch):
    module = flow_module()
    one, many = (needed(tmp_path, monkeypatch, module, size) for size in (1, 1000))
    assert many == 1000 * one > 0
    y = torch.randint(5, (500, 5))
    saved = estimates.saved_bytes(_attached(module), y) - estimates.saved_bytes(
        _attached(module), y[:1]
    )
    assert saved == pytest.approx(499 * one, rel=0.01)


def test_layers_that_are_computed_twice_need_less(tmp_path, monkeypatch):
    plain, again = (
        FlowModule(
            flows.bipartite(5, 5, partial(DilatedConvolution, width=8)),
            optimization=Optimization(gradient_checkpointing=wanted),
        )
        for wanted in (False, True)
    )
    least, most = (needed(tmp_path, monkeypatch, module, 1000) for module in (again, plain))
    assert 0 < least < most / 2


def _attached(module):
    module.trainer = trainer(".", steps=1)
    return module


@pytest.mark.parametrize(
    "module",
    [
        flow_module,
        lambda: FlowModule(flows.language_model(5, 5, partial(LSTM, width=8))),
        lambda: LanguageModel(flows.language_model(5, 5, partial(LSTM, width=8))),
    ],
)
def test_what_does_not_fit_is_refused_and_what_fits_is_trained(module, tmp_path, monkeypatch):
    size = needed(tmp_path, monkeypatch, module(), 100)
    monkeypatch.setattr(estimates, "total_memory", lambda *_: 0)
    monkeypatch.setattr(memory, "total_memory", lambda *_: size)
    fit(tmp_path, module(), 100)
    monkeypatch.setattr(memory, "total_memory", lambda *_: size - 1)
    message = "a training batch of 100 examples of 5 dimensions takes at least .* data.batch_size"
    with pytest.raises(UserError, match=message):
        fit(tmp_path, module(), 100)


def test_a_context_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(estimates, "total_memory", lambda *_: 0)
    context = Context(8, encoder=SequenceEncoder(10, 8))
    module = FlowModule(flows.language_model(10, 3, partial(LSTM, width=8), context=context))
    data = AdditionDataModule(length=3, batch_size=10**7)
    run = trainer(tmp_path, steps=1, limit_val_batches=0)
    with pytest.raises(UserError, match="a training batch of 10,000,000 examples"):
        run.fit(module, datamodule=data)


def test_what_is_counted_needs_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(estimates, "total_memory", lambda *_: 0)
    fit(tmp_path, NGramModule(5, 5, order=2), 1000)


def test_an_objective_that_cannot_take_two_examples_is_not_asked(tmp_path, monkeypatch):
    class Picky(FlowModule):
        def evaluate_objective(self, batch):
            if len(batch) < 3:
                raise RuntimeError("too few")
            return super().evaluate_objective(batch)

    monkeypatch.setattr(estimates, "total_memory", lambda *_: 0)
    fit(tmp_path, Picky(flow_module().flow), 10)


def test_a_run_is_the_same_whether_it_was_looked_at(tmp_path, monkeypatch):
    weights = []
    for size in (10**15, 0):
        monkeypatch.setattr(estimates, "total_memory", lambda *_, size=size: size)
        torch.manual_seed(0)
        module = flow_module()
        fit(tmp_path, module, 16)
        weights.append(module.state_dict())
    assert all(torch.equal(*pair) for pair in zip(*(one.values() for one in weights), strict=True))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_no_shipped_configuration_is_near(file):
    data = yaml.safe_load(file.read_text(encoding="utf-8")).get("data", {}).get("init_args", {})
    assert data.get("batch_size", 32) * data.get("length", 64) * BYTES < 16 * 10**9
