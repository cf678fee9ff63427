"""Modules train on whatever a Lightning trainer takes, without our datamodules."""

import math
import os
import subprocess
import sys
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from dflows import flows
from dflows.backbones import LSTM, DilatedConvolution, Transformer
from dflows.bases import NGramBase
from dflows.checks import CertificateError
from dflows.embedding import Context
from dflows.errors import UserError
from dflows.latent import AutoregressivePrior, LatentFlow
from dflows.objectives import Local
from lightning_modules import FlowModule, LanguageModel, LatentFlowModule, NGramModule
from tests.commands import ROOT, environment
from tests.dflows.cli.bad_backbones import Leaking
from tests.training import trainer

K, D, N = 3, 6, 64
SIZES = (K, K + 2, K, K, K + 1, K)
CONVOLUTION = partial(DilatedConvolution, width=8, layers=1)
RECURRENT = partial(LSTM, width=8)


def rows(seed=0):
    """Rows in which the class 0 is rare."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 2 * K, (N, D), generator=generator) % K


def contexts(y):
    return nn.functional.one_hot(y[:, 0], K).float()


class Ordinary(pl.LightningDataModule):
    """What people have: nothing of our protocol."""

    def setup(self, stage):
        self.rows = rows()

    def train_dataloader(self):
        return DataLoader(TensorDataset(self.rows), batch_size=16, shuffle=True)

    def val_dataloader(self):
        return DataLoader(TensorDataset(self.rows), batch_size=24)

    test_dataloader = val_dataloader


class Stream(IterableDataset):
    def __iter__(self):
        return iter(rows())


class Once(IterableDataset):
    def __init__(self):
        self.left = iter(rows())

    def __iter__(self):
        return self.left


class Batches:
    """No loader of PyTorch's at all."""

    def __iter__(self):
        return iter(rows().split(16))

    def __len__(self):
        return N // 16


KINDS = {
    "tensors": lambda: DataLoader(TensorDataset(rows()), batch_size=16, shuffle=True),
    "rows": lambda: DataLoader(rows(), batch_size=16),
    "bytes": lambda: DataLoader(TensorDataset(rows().byte()), batch_size=16),
    "iterable": Batches,
    "stream": lambda: DataLoader(Stream(), batch_size=16),
    "once": lambda: DataLoader(Once(), batch_size=16),
}

MODULES = {
    "flow": lambda: FlowModule(flows.bipartite(K, D, CONVOLUTION)),
    "refit": lambda: FlowModule(
        flows.bipartite(K, D, CONVOLUTION, num_transforms=1), base_refit_every=1
    ),
    "counted": lambda: FlowModule(
        flows.bipartite(K, D, CONVOLUTION, base=partial(NGramBase, order=2)), base_count_windows=8
    ),
    "own-classes": lambda: FlowModule(flows.bipartite(SIZES, D, CONVOLUTION), Local()),
    "any-order": lambda: FlowModule(flows.any_order(SIZES, D, CONVOLUTION)),
    "language-model": lambda: LanguageModel(flows.language_model(K, D, RECURRENT)),
    "ngram": lambda: NGramModule(K, D, order=2),
    "latent": lambda: LatentFlowModule(
        LatentFlow(
            K,
            D,
            AutoregressivePrior(2, 4),
            *(RECURRENT(bidirectional=True) for _ in range(2)),
        )
    ),
}


def usual(folder, **options):
    """A trainer as people have it: so many epochs, and a validation after each."""
    given = {"val_check_interval": None, "check_val_every_n_epoch": 1, "max_epochs": 2}
    return trainer(folder, -1, **given | options)


def evaluated(run, module, batches):
    """Validates and tests, and compares with the likelihood of each row."""
    y = torch.cat([batch if isinstance(batch, torch.Tensor) else batch[0] for batch in batches])
    found = {}
    for split, judge in (("valid", run.validate), ("test", run.test)):
        (result,) = judge(module, batches, verbose=False)
        assert module.scores[split].characters == y.numel()
        assert math.isfinite(result[f"{split}_bpc"])
        found[split] = result[f"{split}_nats"]
    return y, found


@pytest.mark.parametrize("kind", KINDS)
def test_any_loader_trains(kind, tmp_path):
    module = MODULES["flow"]()
    run = usual(tmp_path)
    if kind == "once":
        with pytest.warns(UserWarning, match="iterated once only"):
            run.fit(module, KINDS[kind](), KINDS["rows"]())
        assert run.global_step == N // 16
    else:
        run.fit(module, KINDS[kind](), KINDS["rows"]())
        assert run.global_step == 2 * N // 16
    assert run.callback_metrics["valid_bpc"].isfinite()
    batches = KINDS["rows" if kind in ("once", "tensors") else kind]()
    y, found = evaluated(run, module, batches)
    with torch.no_grad():
        nats = -module.flow.log_prob(y).mean().item()
    assert found == pytest.approx({"valid": nats, "test": nats}, rel=1e-5)


@pytest.mark.parametrize("name", MODULES)
def test_any_module_trains(name, tmp_path):
    module = MODULES[name]()
    run = usual(tmp_path, max_epochs=1)
    run.fit(module, KINDS["tensors"](), KINDS["bytes"]())
    evaluated(run, module, KINDS["bytes"]())
    assert module.sample(2, length=4).shape == (2, 4)


@pytest.mark.parametrize("name", ["flow", "language-model", "ngram"])
def test_an_ordinary_datamodule_trains(name, tmp_path):
    module, data = MODULES[name](), Ordinary()
    run = usual(tmp_path, max_epochs=1)
    run.fit(module, datamodule=data)
    (result,) = run.test(module, datamodule=data, verbose=False)
    with torch.no_grad():
        nats = -module.flow.log_prob(rows()).mean().item()
    assert result["test_nats"] == pytest.approx(nats, rel=1e-5)
    assert "test_bpc_stateful" not in result


@pytest.mark.parametrize("name", ["flow", "language-model", "latent"])
def test_several_loaders_are_scored_as_one_split(name, tmp_path):
    module, parts = MODULES[name](), rows().split(N // 2)
    loaders = [DataLoader(TensorDataset(part), batch_size=24) for part in parts]
    run = usual(tmp_path, max_epochs=1)
    run.fit(module, KINDS["rows"](), loaders)
    assert module.scores["valid"].characters == rows().numel()
    run.test(module, loaders, verbose=False)
    assert module.scores["test"].characters == rows().numel()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "once"])
def test_the_base_begins_at_what_is_found_in_the_data(kind, tmp_path):
    module = FlowModule(flows.stack(K, D, [], CONVOLUTION))
    # One step that changes nothing.
    run = usual(tmp_path, max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    module.learning_rate = 1e-12
    run.fit(module, KINDS[kind](), KINDS["rows"]())
    counts = rows().flatten().bincount() + 1.0
    probabilities = module.flow.base.logits.detach().softmax(-1)
    torch.testing.assert_close(probabilities, (counts / counts.sum()).expand_as(probabilities))
    assert module.initialised


def test_n_grams_are_counted_on_the_rows(tmp_path):
    module = MODULES["ngram"]()
    usual(tmp_path, max_epochs=1).fit(module, KINDS["rows"](), KINDS["rows"]())
    expected = NGramBase(K, D, order=2)
    expected.count([rows()])
    assert torch.equal(module.flow.base.ngrams.keys, expected.ngrams.keys)
    assert torch.equal(module.flow.base.ngrams.counts, expected.ngrams.counts)


class TestContext:
    def loader(self):
        return DataLoader(TensorDataset(rows(), contexts(rows())), batch_size=16)

    def test_pairs_are_rows_and_what_they_are_conditioned_on(self, tmp_path):
        context = Context(4, encoder=nn.Linear(K, 4))
        module = FlowModule(flows.bipartite(K, D, CONVOLUTION, context=context))
        run = usual(tmp_path)
        run.fit(module, self.loader(), self.loader())
        (result,) = run.test(module, self.loader(), verbose=False)
        with torch.no_grad():
            nats = -module.flow.log_prob(rows(), contexts(rows())).mean().item()
        assert result["test_nats"] == pytest.approx(nats, rel=1e-5)
        assert 0 <= result["test_accuracy"] <= 1

    @pytest.mark.parametrize("name", ["flow", "language-model"])
    def test_a_flow_that_takes_none_says_so(self, name, tmp_path):
        with pytest.raises(UserError, match="a context was given to a flow that takes none"):
            usual(tmp_path).fit(MODULES[name](), self.loader(), self.loader())

    @pytest.mark.parametrize("name", ["ngram", "latent"])
    def test_a_module_that_takes_none_says_so(self, name, tmp_path):
        with pytest.raises(UserError, match="takes no context, and the data are conditioned"):
            usual(tmp_path).fit(MODULES[name](), self.loader(), self.loader())


@pytest.mark.filterwarnings("ignore:The training data can be iterated once only")
@pytest.mark.parametrize("kind", ["tensors", "once"])
def test_a_leak_is_found_before_the_first_step(kind, tmp_path):
    module = FlowModule(flows.autoregressive(K, D, Leaking))
    run = usual(tmp_path)
    with pytest.raises(CertificateError, match="leaks: the value at dimension"):
        run.fit(module, KINDS[kind](), KINDS["rows"]())
    assert run.global_step == 0


def test_other_classes_than_the_model_has_are_refused(tmp_path):
    module = FlowModule(flows.bipartite(2, D, CONVOLUTION))
    with pytest.raises(UserError, match="hold the class 2, and the model has the classes 0 to 1"):
        usual(tmp_path).fit(module, KINDS["rows"](), KINDS["rows"]())


def test_a_network_conditioned_on_n_grams_needs_a_text(tmp_path):
    flow = flows.language_model(K, D, partial(Transformer, width=8, heads=2), ngram_order=2)
    with pytest.raises(UserError, match="no text to count them on: leave ngram_order away"):
        usual(tmp_path).fit(LanguageModel(flow), KINDS["rows"](), KINDS["rows"]())


def test_windows_of_any_data_do_not_go_on(tmp_path):
    module = LanguageModel(flows.language_model(K, D, RECURRENT), stateful=True)
    with pytest.raises(UserError, match="the windows of the data do not continue each other"):
        usual(tmp_path).fit(module, KINDS["rows"](), KINDS["rows"]())


SCRIPT = """
import sys
import torch
from torch.utils.data import DataLoader, TensorDataset
from tests.lightning_modules import test_any_data as here
from tests.training import trainer

def main(folder, devices):
    torch.manual_seed(0)
    module = here.MODULES["refit"]()
    loader = lambda: DataLoader(TensorDataset(here.rows()), batch_size=16 // devices)
    run = trainer(
        folder, -1, max_epochs=2, val_check_interval=None, check_val_every_n_epoch=1,
        devices=devices, strategy="ddp" if devices > 1 else "auto", use_distributed_sampler=True,
    )
    run.fit(module, loader(), loader())
    (result,) = run.test(module, loader(), verbose=False)
    if run.is_global_zero:
        torch.save({"state": module.state_dict(), "result": result}, f"{folder}/{devices}.pt")

if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
"""


def test_two_processes_train_as_one(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT, encoding="utf-8")
    found = []
    for devices in (1, 2):
        done = subprocess.run(
            [sys.executable, str(script), str(tmp_path), str(devices)],
            cwd=ROOT,
            env=environment(GLOO_SOCKET_IFNAME=os.environ.get("GLOO_SOCKET_IFNAME", "lo")),
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        found.append(torch.load(tmp_path / f"{devices}.pt", weights_only=True))
    one, two = (content["result"]["test_bpc"] for content in found)
    # Another sampler shuffles the rows of two processes, so that steps differ, and counts do not.
    counts = [content["state"]["base_refit.counts"].sum().item() for content in found]
    assert counts[1] == pytest.approx(counts[0])
    assert two == pytest.approx(one, abs=0.1)
