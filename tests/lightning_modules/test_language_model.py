"""Language models: scored both ways, trained through windows that go on, and with more losses."""

import math
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
import yaml
from torch import nn

from datamodules import FullRankDataModule, LocalText, TextDataModule
from dflows import flows
from dflows.backbones import LSTM, MADE, DilatedConvolution, Masked, Table, Transformer
from dflows.bases import NGramBase
from dflows.errors import UserError
from dflows.flow import DiscreteFlow
from dflows.orderings import Natural, Reversed, Strided
from lightning_modules import Auxiliary, LanguageModel, Optimization
from tests import training
from tests.commands import run_apart, run_here, small_config, write_text
from tests.dflows.small import shaken

D = 6
RECURRENT = partial(LSTM, width=8, layers=2)
ATTENTIVE = partial(Transformer, width=8, layers=3, heads=2)


def trainer(folder, steps=4, **options):
    return training.trainer(folder, steps, **{"limit_val_batches": 1} | options)


@pytest.fixture
def text(tmp_path):
    source = LocalText(path=write_text(tmp_path, size=620).as_posix(), fractions=(0.8, 0.1, 0.1))

    def make(**options):
        return TextDataModule(
            source,
            D,
            4,
            vocabulary="corpus",
            **{"eval_batch_size": 3, "stateful": True} | options,
        )

    return make


def built(num_classes, backbone=RECURRENT, *, ordering=None, ngram_order=None, **options):
    flow = flows.language_model(
        num_classes, D, backbone, ordering=ordering, ngram_order=ngram_order
    )
    return LanguageModel(flow, **options)


def model(data, backbone=RECURRENT, **options):
    torch.manual_seed(0)
    return shaken(built(data.num_classes, backbone, **options))


def bits(log_probs):
    return -torch.stack(log_probs).mean().item() / math.log(2)


@torch.no_grad()
def after(module, before, character):
    """The log-likelihood of a character by a pass over what comes before it in its window."""
    y = torch.cat([before, character.view(1)]).unsqueeze(0)
    return module.flow.base.log_prob(y)[0, -1]


class TestScoredBothWays:
    @pytest.mark.parametrize("stateful", [False, True])
    def test_an_lstm_hands_its_state_on(self, text, tmp_path, stateful):
        data = text()
        module = model(data, stateful=stateful)
        (result,) = trainer(tmp_path).test(module, datamodule=data, verbose=False)
        characters = torch.cat([batch.flatten() for batch in data.test_dataloader()])
        assert len(characters) % D  # the last window is shorter
        conditioner = module.conditioner
        backbone = conditioner.backbone
        states, before, scores = [None, None], backbone.start, []
        with torch.no_grad():
            for character in characters:
                x = before
                for layer, weights in enumerate(backbone.lstm.all_weights):
                    zeros = torch.zeros(8)
                    states[layer] = torch.lstm_cell(
                        x[None], [s[None] for s in states[layer] or (zeros, zeros)], *weights
                    )
                    states[layer] = [state[0] for state in states[layer]]
                    x = states[layer][0]
                logits = conditioner.head(backbone.linear(x) + backbone.readout(x))
                scores.append(logits.log_softmax(-1)[character])
                before = conditioner.embedding.values[character]
        assert result["test_bpc_stateful"] == pytest.approx(bits(scores), rel=1e-5)
        assert result["test_bpc_stateful"] != pytest.approx(result["test_bpc"], rel=1e-3)
        # Again, the same: nothing is left of the first time. And windows begin from zero.
        assert trainer(tmp_path).test(module, datamodule=data, verbose=False) == [result]
        windows = [
            after(module, window[:d], window[d])
            for window in characters.split(D)
            for d in range(len(window))
        ]
        assert result["test_bpc"] == pytest.approx(bits(windows), rel=1e-5)

    @pytest.mark.parametrize("stride", [None, 1, 2, 4, 5, D])
    @pytest.mark.parametrize("eval_batch_size", [1, 3])
    def test_others_see_what_comes_before_by_overlapping_windows(
        self, text, tmp_path, stride, eval_batch_size
    ):
        data = text(eval_batch_size=eval_batch_size)
        module = model(data, ATTENTIVE, overlap_stride=stride)
        (result,) = trainer(tmp_path).test(module, datamodule=data, verbose=False)
        characters = torch.cat([batch.flatten() for batch in data.test_dataloader()])
        stride = stride or 3
        scores, seen = [], []
        for window in range(0, len(characters), D):
            stop = min(window + D, len(characters))
            for begin in range(window, stop, stride):
                end = min(begin + stride, stop)
                # What was kept is D - stride characters, and those of the window before.
                first = max(0, end - D, window - (D - stride))
                for n in range(begin, end):
                    seen.append(n - first)
                    scores.append(after(module, characters[first:n], characters[n]))
        assert len(scores) == len(characters)
        assert min(seen[D:]) >= D - stride
        assert result["test_bpc_stateful"] == pytest.approx(bits(scores), rel=1e-5)
        if stride == D:
            assert result["test_bpc_stateful"] == pytest.approx(result["test_bpc"], rel=1e-6)

    @pytest.mark.parametrize(
        ("backbone", "options"),
        [
            (partial(MADE, width=8, length=D), {}),
            (partial(DilatedConvolution, width=8, layers=1), {}),
            (lambda: Masked(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), width=8), {}),
        ],
    )
    def test_any_network_from_left_to_right_is(self, text, tmp_path, backbone, options):
        data = text()
        module = model(data, backbone, **options)
        (result,) = trainer(tmp_path).test(module, datamodule=data, verbose=False)
        assert math.isfinite(result["test_bpc_stateful"])

    @pytest.mark.parametrize("ordering", [Reversed(), Strided(3)])
    def test_another_ordering_has_windows_alone(self, text, tmp_path, ordering):
        data = text()
        module = model(data, ATTENTIVE, ordering=ordering)
        (result,) = trainer(tmp_path).test(module, datamodule=data, verbose=False)
        assert "test_bpc_stateful" not in result

    def test_data_that_are_no_text_have_windows_alone(self, tmp_path):
        data = FullRankDataModule(length=D, num_classes=2, batch_size=8, eval_examples=64)
        (result,) = trainer(tmp_path).test(model(data), datamodule=data, verbose=False)
        assert "test_bpc_stateful" not in result


class TestMixedPrecision:
    @pytest.mark.parametrize("backbone", [RECURRENT, ATTENTIVE])
    def test_figures_are_those_of_full_precision(self, text, tmp_path, backbone):
        data = text()
        found = []
        for precision in ("32-true", "bf16-mixed"):
            run = trainer(tmp_path, precision=precision)
            module = model(data, backbone)
            scores = run.validate, run.test
            found += [score(module, datamodule=data, verbose=False) for score in scores]
        assert found[:2] == found[2:]
        assert found[1][0].keys() >= {"test_bpc", "test_bpc_stateful"}

    @pytest.mark.parametrize(
        ("backbone", "stateful"), [(RECURRENT, False), (RECURRENT, True), (ATTENTIVE, False)]
    )
    def test_the_loss_is_in_full_precision_and_close(self, text, tmp_path, backbone, stateful):
        data = text()
        losses = {}

        class Watch(pl.Callback):
            def on_before_backward(self, trainer, pl_module, loss):
                assert loss.dtype == torch.float32
                losses.setdefault(trainer.precision, []).append(loss.item())

        for precision in ("32-true", "bf16-mixed"):
            run = trainer(tmp_path, precision=precision, callbacks=[Watch()])
            run.fit(model(data, backbone, stateful=stateful), datamodule=data)
        assert losses["32-true"] == pytest.approx(losses["bf16-mixed"], rel=0.02)


class TestStateful:
    def test_windows_go_on_from_a_state_without_a_gradient(self, text):
        data = text()
        module = model(data, stateful=True, restart=0.0)
        first, second = torch.randint(data.num_classes, (2, 3, D))
        begun = module.evaluate_objective(first)
        torch.testing.assert_close(begun, module.log_prob(first))
        last, (hidden, cells) = (
            first[:, -1],
            module.conditioner.resume(first, first.new_full((3,), -1))[1],
        )
        logits, _ = module.conditioner.resume(second, last, (hidden.detach(), cells.detach()))
        expected = logits.log_softmax(-1).gather(-1, second.unsqueeze(-1)).sum(dim=(1, 2))
        found = module.evaluate_objective(second)
        torch.testing.assert_close(found, expected)
        assert not torch.allclose(found, module.log_prob(second))
        parameters = list(module.flow.parameters())
        for one, two in zip(
            torch.autograd.grad(found.sum(), parameters),
            torch.autograd.grad(expected.sum(), parameters),
            strict=True,
        ):
            torch.testing.assert_close(one, two)

    def test_some_windows_begin_anew(self, text):
        data = text()
        module = model(data, stateful=True, restart=0.5)
        first, second = torch.randint(data.num_classes, (2, 64, D))
        module.evaluate_objective(first)
        same = torch.isclose(module.evaluate_objective(second), module.log_prob(second))
        assert 10 < same.sum() < 54

    @pytest.mark.parametrize("steps", [3, 4])
    def test_a_resumed_run_is_the_uninterrupted_one(self, text, tmp_path, steps):
        def fit(steps, name, **more):
            data = text()
            torch.manual_seed(1)
            module = built(
                data.num_classes,
                partial(RECURRENT, weight_drop=0.3),
                stateful=True,
                optimization=Optimization(learning_rate=0.01),
            )
            run = trainer(tmp_path, steps)
            run.fit(module, datamodule=data, weights_only=True, **more)
            run.save_checkpoint(tmp_path / name)
            return torch.load(tmp_path / name, weights_only=True)

        whole = fit(7, "whole.ckpt")
        fit(steps, "part.ckpt")
        resumed = fit(7, "resumed.ckpt", ckpt_path=tmp_path / "part.ckpt")
        for name, weight in whole["state_dict"].items():
            assert torch.equal(resumed["state_dict"][name], weight), name
        for one, two in zip(
            whole["training"]["states"], resumed["training"]["states"], strict=True
        ):
            assert torch.equal(one, two)

    def test_a_new_fit_begins_anew(self, text, tmp_path):
        data = text()
        module = model(data, stateful=True)
        trainer(tmp_path, steps=2).fit(module, datamodule=data)
        module.trainer = trainer(tmp_path)
        module.trainer.datamodule = data
        assert module._windows is not None
        module.prepare()
        assert module._windows is None

    def test_windows_of_any_places_are_refused(self, text, tmp_path):
        data = text(stateful=False)
        with pytest.raises(UserError, match="set stateful of a TextDataModule"):
            trainer(tmp_path).fit(model(data, stateful=True), datamodule=data)

    def test_another_batch_begins_anew(self, text):
        data = text()
        module = model(data, stateful=True, restart=0.0)
        first, second = torch.randint(data.num_classes, (2, 4, D))
        module.evaluate_objective(first)
        torch.testing.assert_close(
            module.evaluate_objective(second[:3]), module.log_prob(second[:3])
        )


class TestAuxiliary:
    def test_the_value_is_the_log_likelihood_and_the_gradient_has_more(self, text):
        data = text()
        module = model(data, ATTENTIVE, auxiliary=Auxiliary()).double()
        plain = model(data, ATTENTIVE).double()
        plain.load_state_dict(module.state_dict(), strict=False)
        assert len(module.state_dict()) > len(plain.state_dict())
        y = torch.randint(data.num_classes, (5, D))
        torch.testing.assert_close(module.log_prob(y), plain.log_prob(y))
        torch.testing.assert_close(module.evaluate_objective(y), plain.log_prob(y))
        module.evaluate_objective(y).sum().backward()
        plain.evaluate_objective(y).sum().backward()
        _, features = plain.conditioner.layer_logits(y)
        added = module.auxiliary(features, y, 0.0).sum()
        added.backward()
        for (name, one), two in zip(
            module.flow.named_parameters(), plain.flow.parameters(), strict=True
        ):
            torch.testing.assert_close(one.grad, two.grad, msg=name)
        assert all(parameter.grad.any() for parameter in module.parameters())

    def test_without_them_nothing_changes(self, text):
        data = text()
        module = model(data, ATTENTIVE)
        assert module.auxiliary is None
        assert not [name for name in module.state_dict() if "auxiliary" in name]
        y = torch.randint(data.num_classes, (5, D))
        torch.testing.assert_close(module.evaluate_objective(y), module.log_prob(y))

    @pytest.mark.parametrize("layers", [False, True])
    def test_layers_end_with_a_part_of_the_training(self, text, tmp_path, layers):
        data = text()
        auxiliary = Auxiliary(layers=layers, until=0.75)
        module = model(data, ATTENTIVE, auxiliary=auxiliary)
        heads, moved = module.auxiliary, []
        before = [parameter.detach().clone() for parameter in heads.parameters()]

        class Watch(pl.Callback):
            def on_before_optimizer_step(self, *_):
                moved.append([bool(layer[1].weight.grad.any()) for layer in heads.layers])

        trainer(tmp_path, steps=8, callbacks=[Watch()]).fit(module, datamodule=data)
        # Of 3 layers the first two end after a quarter and after half of the 8 steps.
        course = [[True, True]] * 2 + [[False, True]] * 2 + [[False, False]] * 4
        assert moved == (course if layers else [[]] * 8)
        after = list(heads.parameters())
        assert not any(torch.equal(one, two) for one, two in zip(before, after, strict=True))

    def test_layers_end_with_a_part_of_the_time(self, text, tmp_path):
        data = text()
        module = model(data, ATTENTIVE, auxiliary=Auxiliary())
        run = trainer(tmp_path, steps=-1, max_time={"seconds": 1}, limit_val_batches=0)
        run.fit(module, datamodule=data)
        assert module._done > 0.9

    def test_layers_need_an_end(self, text, tmp_path):
        data = text()
        run = trainer(tmp_path, steps=-1)
        with pytest.raises(UserError, match=r"set trainer.max_steps or trainer.max_time"):
            run.fit(model(data, ATTENTIVE, auxiliary=Auxiliary()), datamodule=data)

    def test_other_networks_have_more_targets(self, text, tmp_path):
        data = text()
        module = model(data, RECURRENT, auxiliary=Auxiliary(layers=False))
        before = module.auxiliary.last.weight.detach().clone()
        trainer(tmp_path).fit(module, datamodule=data)
        assert not torch.equal(module.auxiliary.last.weight, before)


@pytest.mark.parametrize(
    ("backbone", "options", "message"),
    [
        (ATTENTIVE, {"overlap_stride": 0}, "overlap_stride is 0: give a number from 1 to 6"),
        (ATTENTIVE, {"overlap_stride": 7}, "overlap_stride is 7"),
        (RECURRENT, {"restart": 1.5}, "restart is 1.5"),
        (ATTENTIVE, {"stateful": True}, "a Transformer over .* carries no state"),
        (RECURRENT, {"stateful": True, "ordering": Reversed()}, "carries no state"),
        (RECURRENT, {"stateful": True, "ngram_order": 2}, "carries no state"),
        (
            RECURRENT,
            {"stateful": True, "auxiliary": Auxiliary(layers=False)},
            "unset stateful or auxiliary",
        ),
        (RECURRENT, {"auxiliary": Auxiliary()}, "no layer before its last"),
        (
            partial(ATTENTIVE, layers=1),
            {"auxiliary": Auxiliary()},
            "no layer before its last",
        ),
        (
            ATTENTIVE,
            {"auxiliary": Auxiliary(), "ordering": Strided(2)},
            "need a level-causal backbone over Natural",
        ),
        (
            partial(DilatedConvolution, width=8),
            {"auxiliary": Auxiliary(), "ordering": Natural()},
            "need a level-causal backbone over Natural",
        ),
        (
            partial(Table, width=2, num_classes=3, length=D),
            {"auxiliary": Auxiliary(layers=False)},
            "need a level-causal backbone over Natural",
        ),
    ],
)
def test_what_does_not_fit_is_refused(backbone, options, message):
    with pytest.raises(UserError, match=message):
        built(3, backbone, **options)


@pytest.mark.parametrize(
    "flow",
    [
        lambda: flows.bipartite(3, D),
        lambda: flows.stack(3, D, [], LSTM),
        lambda: DiscreteFlow(NGramBase(3, D)),
        lambda: flows.autoregressive(
            3, D, RECURRENT, base=flows.AutoregressiveFactory(RECURRENT())
        ),
    ],
)
def test_it_is_an_autoregressive_base_alone(flow):
    with pytest.raises(UserError, match="a LanguageModel is an autoregressive base alone"):
        LanguageModel(flow())


def network(name, **options):
    backbone = {"class_path": f"dflows.backbones.{name}", "init_args": options}
    return {"class_path": "dflows.flows.language_model", "init_args": {"backbone": backbone}}


PROCESSES = {
    "stateful": {"flow": network("LSTM", width=8), "stateful": True, "restart": 0.0},
    "auxiliary": {
        "flow": network("Transformer", width=8, layers=2, heads=2),
        "auxiliary": {"until": 0.5},
    },
}


@pytest.mark.parametrize("name", ["stateful", pytest.param("auxiliary", marks=pytest.mark.slow)])
def test_two_processes_train_as_one(name, tmp_path):
    config = small_config(tmp_path, write_text(tmp_path), max_steps=6, val_check_interval=6)
    content = yaml.safe_load(config.read_text(encoding="utf-8"))
    content["model"] = {
        "class_path": "lightning_modules.LanguageModel",
        "init_args": {**PROCESSES[name], "optimization": {"learning_rate": 0.01}},
    }
    content["data"]["init_args"]["stateful"] = name == "stateful"
    config.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    runs = tmp_path / "runs" / "small"
    two = ("--trainer.devices", 2, "--trainer.strategy", "ddp", "--data.batch_size", 4)
    assert run_here("fit", "--config", config) == 0
    if name == "stateful":
        # The two stop, one goes on from what they have written, and then two again.
        resume = ("--ckpt_path", runs / "version_1" / "last.ckpt")
        for last in (2, 4, 6):
            arguments = ("fit", "--config", config, "--trainer.max_steps", last)
            if last == 4:
                assert run_here(*arguments, *resume) == 0
                continue
            arguments += two if last == 2 else (*two, *resume)
            done = run_apart(*arguments, cwd=tmp_path)
            assert done.returncode == 0, done.stdout + done.stderr
    else:
        done = run_apart("fit", "--config", config, *two, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    checkpoints = [
        torch.load(runs / version / "last.ckpt", weights_only=True)
        for version in ("version_0", "version_1")
    ]
    assert [checkpoint["global_step"] for checkpoint in checkpoints] == [6, 6]
    first, second = (checkpoint["state_dict"] for checkpoint in checkpoints)
    for key, weight in first.items():
        torch.testing.assert_close(second[key], weight, rtol=1e-3, atol=1e-5, msg=key)
    assert run_here("evaluate", "--checkpoint", runs / "version_1") == 0
    if name == "stateful":
        (one, *_), (both, *_) = (checkpoint["training"]["states"] for checkpoint in checkpoints)
        assert torch.equal(both.flatten(), one.flatten())
