"""N-gram models through the trainer: counted once, tested both ways, and under transforms."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import yaml

from datamodules import AdditionDataModule, FullRankDataModule, LocalText, TextDataModule
from dflows import flows
from dflows.backbones import DilatedConvolution
from dflows.bases import NGramBase
from dflows.embedding import Context
from dflows.errors import UserError
from dflows.objectives import EndToEnd
from dflows.orderings import Parity
from dflows.records import read_record
from lightning_modules import FlowModule, NGramModule, Optimization
from tests import training
from tests.commands import run_here, small_config, write_text

CONVOLUTION = partial(DilatedConvolution, width=8, layers=1)


def trainer(folder, steps=1, **options):
    usual = {"val_check_interval": 1, "gradient_clip_val": 1.0}
    return training.trainer(folder, steps, **usual | options)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("order", [1, 3])
def test_it_is_counted_on_the_whole_text_and_scores_it_both_ways(order, streaming, tmp_path):
    source = LocalText(path=write_text(tmp_path).as_posix(), fractions=(0.8, 0.1, 0.1))
    data = TextDataModule(source, 16, 4, eval_batch_size=3, streaming=streaming)
    module = NGramModule(data.num_classes, 16, order=order)
    run = trainer(tmp_path)
    run.fit(module, datamodule=data)
    base = module.flow.base
    assert base.num_counted == data.characters("train") == 2400
    assert module.characters_read == 2400
    expected = NGramBase(data.num_classes, 16, order=order)
    expected.count(data.training_chunks())
    assert torch.equal(base.ngrams.keys, expected.ngrams.keys)
    assert torch.equal(base.ngrams.counts, expected.ngrams.counts)
    (result,) = run.test(module, datamodule=data, verbose=False)
    test = torch.cat([batch.flatten() for batch in data.test_dataloader()])
    stateful = -base.log_prob(test[None]).mean() / math.log(2)
    assert result["test_bpc_stateful"] == pytest.approx(stateful.item(), abs=1e-5)
    if order == 1:
        assert result["test_bpc"] == pytest.approx(stateful.item(), abs=1e-5)
    else:
        assert result["test_bpc"] > stateful
    # Again, the same: nothing is left of the first time.
    assert run.test(module, datamodule=data, verbose=False) == [result]


def test_it_is_counted_once(text, tmp_path, monkeypatch):
    module = NGramModule(text.num_classes, 16, order=2)
    trainer(tmp_path).fit(module, datamodule=text)
    monkeypatch.setattr(NGramBase, "count", lambda *_: pytest.fail("counted again"))
    trainer(tmp_path, steps=2).fit(module, datamodule=text)
    trainer(tmp_path).validate(module, datamodule=text, verbose=False)


def test_data_without_an_end_are_drawn(tmp_path):
    data = FullRankDataModule(length=3, num_classes=3, batch_size=8, eval_examples=2000)
    module = NGramModule(3, 3, order=3, count_windows=50_000)
    run = trainer(tmp_path)
    run.fit(module, datamodule=data)
    assert module.flow.base.num_counted == 150_000
    (result,) = run.test(module, datamodule=data, verbose=False)
    # The same n-grams serve at all positions, so that it falls short of the entropy.
    assert data.entropy < result["test_nats"] < data.factorized_entropy
    assert "test_bpc_stateful" not in result


def test_a_context_is_refused(tmp_path):
    data = AdditionDataModule(length=3, num_classes=4, batch_size=8, eval_examples=16)
    with pytest.raises(UserError, match="takes no context"):
        trainer(tmp_path).fit(NGramModule(4, 3), datamodule=data)


def test_several_processes_are_refused(text):
    module = NGramModule(text.num_classes, 16)
    module._trainer = SimpleNamespace(datamodule=text, world_size=2)  # all that is asked
    with pytest.raises(UserError, match="2 processes would count the same"):
        module.prepare()


class TestUnderTransforms:
    def module(self, data, context=None, **options):
        flow = flows.stack(
            data.num_classes,
            16,
            [Parity(), Parity(first=1)],
            CONVOLUTION,
            base=partial(NGramBase, order=3),
            context=context,
        )
        return FlowModule(flow, base_count_windows=10, **options)

    def test_a_context_is_refused(self, text):
        with pytest.raises(UserError, match="knows nothing of a context"):
            self.module(text, Context(3))

    def test_end_to_end_there_would_be_no_gradient(self, text):
        with pytest.raises(UserError, match="a NGramBase has none: train with Local"):
            self.module(text, objective=EndToEnd())

    def test_it_is_counted_on_what_they_leave(self, text, tmp_path):
        module = self.module(text, optimization=Optimization(learning_rate=0.05))
        run = trainer(tmp_path, steps=5)
        run.fit(module, datamodule=text)
        assert module.characters_read is None
        base = module.flow.base
        assert base.num_counted == 10 * 16
        rows = torch.from_numpy(text.training_stream().read(0, 10).astype("int64"))
        left = module.flow.residuals(rows)[-1]
        assert not torch.equal(left, rows)
        expected = NGramBase(text.num_classes, 16, order=3)
        expected.count([left])
        assert torch.equal(base.ngrams.keys, expected.ngrams.keys)
        assert not base.ngrams.keys.is_inference()
        (result,) = run.test(module, datamodule=text, verbose=False)
        assert math.isfinite(result["test_bpc"])
        assert len(module.residual_bpc) == 2

    def test_evaluation_leaves_it_as_it_is(self, text, tmp_path):
        module = self.module(text)
        trainer(tmp_path).fit(module, datamodule=text)
        module.flow.base.count([torch.zeros(5)])
        trainer(tmp_path).validate(module, datamodule=text, verbose=False)
        assert module.flow.base.num_counted == 5

    def test_windows_are_at_least_one(self):
        with pytest.raises(UserError, match="base_count_windows is 0"):
            NGramModule(3, 4, count_windows=0)


def test_the_commands_take_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = small_config(tmp_path, write_text(tmp_path), max_steps=1)
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    config["model"] = {
        "class_path": "lightning_modules.NGramModule",
        "init_args": {"order": 4, "discount": 0.5},
    }
    path.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    assert run_here("fit", "--config", path, "--record", tmp_path) == 0
    printed = capsys.readouterr().out
    assert "test, stateful" in printed
    assert "no network" in printed
    record = read_record(tmp_path / "small-1.json")
    assert record.parameters == 0
    assert record.metrics["passes"] == 0
    assert record.metrics["test_bpc_stateful"] < record.metrics["test_bpc"]
    speed = record.metrics["characters_per_second"]
    assert speed * record.metrics["train_seconds"] == pytest.approx(2400)
    run = tmp_path / "runs" / "small" / "version_0"
    assert run_here("evaluate", "--checkpoint", run, "--record", tmp_path) == 0
    again = read_record(tmp_path / "small-test-1.json")
    for key in ("test_bpc", "test_bpc_stateful"):
        assert again.metrics[key] == pytest.approx(record.metrics[key])
    capsys.readouterr()
    assert run_here("generate", "--checkpoint", run, "--num_samples", 2, "--length", 40) == 0
    assert capsys.readouterr().out
    on = ("--ckpt_path", run / "last.ckpt", "--trainer.max_steps", 2)
    assert run_here("fit", "--config", path, *on) == 0
