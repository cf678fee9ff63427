"""The flow module: what it trains, the start of the base, checks, refits, stages and residuals."""

import math
from functools import partial
from itertools import pairwise

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from datamodules import AdditionDataModule, FullRankDataModule
from dflows import flows
from dflows.backbones import LSTM, Backbone, DilatedConvolution, Masked, Transformer
from dflows.bases import FactorizedBase
from dflows.bijections import ModularAffine, ModularShift, RankPermutation
from dflows.checks import CertificateError
from dflows.embedding import Context
from dflows.encoders import SequenceEncoder
from dflows.errors import NonFiniteError, UserError
from dflows.flows import AutoregressiveFactory
from dflows.gradients import GumbelStraightThrough, PosteriorRule, ReinMax
from dflows.objectives import (
    EndToEnd,
    Layerwise,
    Local,
    LocalExpectationGradient,
    OneAfterAnother,
)
from dflows.orderings import BehindContext, Halves, Natural, Parity, Reversed, Strided
from lightning_modules import FlowModule, LanguageModel, Optimization
from tests.training import trainer

K, D = 4, 6
CONVOLUTION = partial(DilatedConvolution, width=8, layers=1)
BOTH = (Parity(), Parity(first=1))
FLOW = ("bijection", "base", "share_backbone", "context")


@pytest.fixture(scope="module")
def data():
    return FullRankDataModule(length=D, num_classes=K, batch_size=16, eval_examples=64)


EVEN = (Parity(),)


def make(orderings=EVEN, backbone=CONVOLUTION, **options):
    """A module over a stack; options of either."""
    stack = {key: options.pop(key) for key in FLOW if key in options}
    return FlowModule(flows.stack(K, D, list(orderings), backbone, **stack), **options)


CHOICES = {
    "bijection": [ModularShift, partial(ModularAffine, prime=True), RankPermutation],
    "orderings": [BOTH, [Natural()], [Strided(3), Parity()]],
    "backbone": [CONVOLUTION, partial(LSTM, width=8), partial(Transformer, width=8, heads=2)],
    "objective": [
        Local,
        partial(Local, "levels"),
        partial(Local, "transforms"),
        Layerwise,
        EndToEnd,
        partial(LocalExpectationGradient, num_samples=2),
        lambda: OneAfterAnother(Local(), EndToEnd()),
    ],
    "base": [
        FactorizedBase,
        partial(FactorizedBase, sharing="positions"),
        lambda *sizes: AutoregressiveFactory(CONVOLUTION(), Strided(2))(*sizes),
    ],
    "share_backbone": [False, True],
}


@pytest.mark.parametrize(
    ("key", "choice"), [(key, choice) for key, choices in CHOICES.items() for choice in choices]
)
def test_every_choice_is_a_key_and_trains(key, choice, data, tmp_path):
    arguments = {"orderings": BOTH, key: choice() if key == "objective" else choice}
    if key == "backbone" and choice.func is LSTM:
        arguments["orderings"] = [Natural()]
    if key == "orderings" and isinstance(choice[0], Natural):
        arguments["backbone"] = partial(LSTM, width=8)
    if key == "objective":
        arguments["bijection"] = ModularAffine
    module = make(**arguments)
    before = [parameter.detach().clone() for parameter in module.flow.parameters()]
    run = trainer(tmp_path, steps=2, limit_val_batches=1)
    run.fit(module, datamodule=data)
    assert run.callback_metrics["valid_bpc"].isfinite()
    assert not same(before, [*module.flow.parameters()])
    (result,) = run.test(module, datamodule=data, verbose=False)
    assert result["test_nats"] > data.entropy - 1
    assert len(module.residual_bpc) == len(module.flow.transforms)
    assert module.sample(3, length=4).shape == (3, 4)


@pytest.mark.parametrize("rule", [PosteriorRule, GumbelStraightThrough, ReinMax])
def test_every_rule_of_a_softmax_trains_a_location_scale_map(rule, data, tmp_path):
    module = make(bijection=lambda k: ModularAffine(k, rule=rule()), objective=EndToEnd())
    run = trainer(tmp_path, steps=2)
    run.fit(module, datamodule=data)
    assert run.callback_metrics["valid_bpc"].isfinite()


def test_a_plain_torch_network_is_a_backbone(data, tmp_path):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def network():
        return Masked(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), width=8)

    trainer(tmp_path, steps=2).fit(make(backbone=network), datamodule=data)


class TestTest:
    @pytest.mark.parametrize(
        ("orderings", "levels"), [([Strided(3)], 3), (BOTH, 0), ([Natural()], 0)]
    )
    def test_levels_of_one_ordering_have_bits_of_their_own(self, orderings, levels, data, tmp_path):
        module = make(orderings)
        run = trainer(tmp_path, steps=2)
        run.fit(module, datamodule=data)
        (result,) = run.test(module, datamodule=data, verbose=False)
        assert len(module.level_bpc) == levels
        if levels:
            sizes = Strided(3).levels(D).bincount()
            mean = (torch.tensor(module.level_bpc) * sizes).sum() / D
            assert mean * D * math.log(2) == pytest.approx(result["test_nats"], rel=1e-4)

    def test_a_shorter_window_has_levels_of_its_own(self, text, tmp_path):
        length = text.length
        flow = flows.language_model(text.num_classes, length, CONVOLUTION, ordering=Halves())
        module = LanguageModel(flow)
        run = trainer(tmp_path, steps=1)
        run.fit(module, datamodule=text)
        run.test(module, datamodule=text, verbose=False)
        bits = [[], []]
        for y in text.test_dataloader():
            levels = Halves().levels(y.shape[1])
            scores = -module.flow.base.log_prob(y).detach() / math.log(2)
            for level, found in enumerate(bits):
                found += scores[:, levels == level].flatten().tolist()
        assert y.shape[1] < length
        assert module.level_bpc == pytest.approx([sum(found) / len(found) for found in bits])

    def test_it_scores_as_log_prob_does(self, data, tmp_path):
        module = make([Strided(3), Parity()])
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        (result,) = trainer(tmp_path).test(module, datamodule=data, verbose=False)
        with torch.no_grad():
            nats = -torch.cat([module.log_prob(batch) for batch in data.test_dataloader()]).mean()
        assert result["test_nats"] == pytest.approx(nats.item(), rel=1e-6)


class TestBase:
    def test_it_starts_from_the_data_once(self, data, tmp_path):
        module = make(optimization=Optimization(learning_rate=1e-9))
        trainer(tmp_path, steps=1).fit(module, datamodule=data)
        marginal = data.class_counts().double() / data.class_counts().sum()
        probabilities = module.flow.base.logits.detach().softmax(-1)
        torch.testing.assert_close(probabilities[0].double(), marginal, atol=1e-3, rtol=0)
        assert probabilities[1, 0] == pytest.approx(0.5)
        with torch.no_grad():
            module.flow.base.logits.fill_(0)
        trainer(tmp_path, steps=1).fit(module, datamodule=data)
        assert module.flow.base.logits.abs().max() < 1e-6

    def test_refitted_it_has_the_frequencies_of_what_it_saw(self, data, tmp_path):
        module = make(
            optimization=Optimization(learning_rate=1e-9), base_refit_every=1, base_refit_decay=0.5
        )
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        trainer(tmp_path, steps=3, limit_val_batches=0).fit(module, datamodule=data)
        assert not module.flow.base.logits.requires_grad
        counts = module.base_refit.counts
        assert counts.sum() == 16 * D * (1 + 0.5 + 0.25)
        probabilities = (counts + 0.5) / (counts + 0.5).sum(-1, keepdim=True)
        torch.testing.assert_close(module.flow.base.logits.softmax(-1).double(), probabilities)
        assert set(before) == set(module.state_dict())
        assert torch.equal(module.state_dict()["base_refit.counts"], counts)

    @pytest.mark.parametrize(("every", "refits"), [(1, 1 + 0.5 + 0.25), (2, 1), (4, 0)])
    def test_it_is_refitted_once_a_step_where_gradients_accumulate(
        self, every, refits, data, tmp_path
    ):
        module = make(base_refit_every=every, base_refit_decay=0.5)
        run = trainer(tmp_path, steps=3, limit_val_batches=0, accumulate_grad_batches=2)
        run.fit(module, datamodule=data)
        assert module.base_refit.counts.sum() == 16 * D * refits

    def test_what_diverged_is_located_there_too(self, data, tmp_path):
        class Diverge(pl.Callback):
            def on_train_batch_end(self, run, module, *arguments):
                next(module.flow.transforms.parameters()).data.fill_(torch.nan)

        run = trainer(tmp_path, limit_val_batches=0, callbacks=[Diverge()])
        with pytest.raises(NonFiniteError, match="in the refit of the base, at step 1"):
            run.fit(make(base_refit_every=1), datamodule=data)

    def test_held_it_is_not_refitted(self, data, tmp_path):
        module = make(
            optimization=Optimization(hold_base_steps=2), base_refit_every=1, base_refit_decay=0.5
        )
        trainer(tmp_path, steps=3, limit_val_batches=0).fit(module, datamodule=data)
        assert module.base_refit.counts.sum() == 16 * D

    @pytest.mark.parametrize(
        "alone",
        [
            lambda **options: LanguageModel(
                flows.language_model(K, D, partial(LSTM, width=8)), **options
            ),
            partial(make, []),
        ],
    )
    def test_alone_it_is_the_model_and_is_not_held(self, alone, data, tmp_path):
        settings = Optimization(learning_rate=0.5, base_learning_rate=0.1, hold_base_steps=9)
        module = alone(optimization=settings)
        before = [parameter.detach().clone() for parameter in module.parameters()]
        run = trainer(tmp_path, steps=1, limit_val_batches=0)
        run.fit(module, datamodule=data)
        assert not same(before, [*module.parameters()])
        assert {group["initial_lr"] for group in run.optimizers[0].param_groups} == {0.5}

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"orderings": [], "base_refit_every": 1},
                "nothing to train but the base: set",
            ),
            (
                {
                    "base": AutoregressiveFactory(LSTM(width=8)),
                    "base_refit_every": 5,
                },
                "AutoregressiveBase has no closed form",
            ),
            ({"base_refit_every": -1}, "base_refit_every is -1"),
            ({"base_refit_every": 1, "base_refit_decay": 1.0}, "base_refit_decay is 1.0"),
            ({"base_count_windows": 0}, "base_count_windows is 0: give at least 1"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, options, message):
        with pytest.raises(UserError, match=message):
            make(**options)


class Gated(Backbone):
    """Says that it is level-causal, and is so until training opens its gate."""

    def __init__(self, width=8):
        super().__init__(width, level_causal=True)
        self.linear = nn.Linear(width, width)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, content, query=None, levels=None):
        ahead = torch.tanh(self.linear(content.roll(-1, dims=1)))
        return query + (self.gate - 50).relu() * ahead


class Open(pl.Callback):
    def on_train_batch_end(self, run, module, *arguments):
        for name, parameter in module.named_parameters():
            if name.endswith("gate"):
                nn.init.constant_(parameter, 60)


class TestCertificates:
    def test_a_leaking_network_is_refused_before_training(self, data, tmp_path):
        from tests.dflows.cli.bad_backbones import Leaking

        with pytest.raises(CertificateError, match="leaks: the value at dimension"):
            trainer(tmp_path).fit(make([Natural()], Leaking), datamodule=data)

    @pytest.mark.parametrize("given", [False, True])
    def test_a_leak_that_opens_in_training_is_found_before_a_figure(self, given, data, tmp_path):
        module = make([Natural()], Gated)
        run = trainer(tmp_path, steps=1, limit_val_batches=0)
        run.fit(module, datamodule=data)
        batch = next(iter(data.test_dataloader())) if given else None
        module.certify(batch)
        run = trainer(tmp_path, steps=1, limit_val_batches=0, callbacks=[Open()])
        run.fit(module, datamodule=data)
        with pytest.raises(CertificateError, match="leaks: the value at dimension"):
            module.certify(batch)

    @pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
    def test_they_run_in_the_precision_of_the_training(
        self, precision, data, tmp_path, monkeypatch
    ):
        found = []

        def note(flow, context, *, batch, trained):
            autocast = torch.is_autocast_enabled("cpu")
            found.append((next(flow.parameters()).dtype, autocast, trained, batch.shape))

        monkeypatch.setattr("lightning_modules.flow.check_flow", note)
        module = make([Natural()])
        trainer(tmp_path, steps=1, limit_val_batches=0, precision=precision).fit(
            module, datamodule=data
        )
        dtype = torch.float64 if precision == "64-true" else torch.float32
        assert found == [(dtype, precision == "bf16-mixed", False, (16, D))]
        module.certify(torch.zeros(3, D, dtype=torch.long))
        assert found[1:] == [(dtype, precision == "bf16-mixed", True, (3, D))]

    def test_they_need_no_trainer(self):
        make().certify(torch.zeros(3, D, dtype=torch.long))


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class TestStages:
    @staticmethod
    def parameters_of(module):
        """Those of every transform, the data's side first."""
        transforms = module.flow.conditional_transforms[::-1]
        return [
            [parameter.detach().clone() for parameter in transform.parameters()]
            for transform in transforms
        ]

    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_transforms_do_not_move_but_in_their_stage(self, accumulate, data, tmp_path):
        module = make(
            [*BOTH, Natural()],
            objective=Layerwise(),
            optimization=Optimization(learning_rate=0.1, weight_decay=0.5),
        )
        history, base = [self.parameters_of(module)], []

        class Note(pl.Callback):
            def on_train_batch_end(self, run, *arguments):
                if run.global_step == len(history):
                    history.append(TestStages.parameters_of(module))
                    base.append([part.detach().clone() for part in module.flow.base.parameters()])

        run = trainer(
            tmp_path,
            steps=11,
            limit_val_batches=0,
            callbacks=[Note()],
            accumulate_grad_batches=accumulate,
        )
        run.fit(module, datamodule=data)
        assert len(history) == 12
        for step in range(11):
            stage = 3 * step // 11
            for number in range(3):
                still = same(history[step][number], history[step + 1][number])
                assert still == (number != stage), step
        assert not any(same(*pair) for pair in pairwise(base))

    def test_targets_are_frozen_with_their_transforms(self, data, tmp_path):
        module = make(BOTH, bijection=ModularAffine, objective=Layerwise())
        targets, moved = module.objective.targets, []
        assert set(targets) == {"0", "1"}

        class Note(pl.Callback):
            def on_train_batch_start(self, *arguments):
                self.before = [targets[key].detach().clone() for key in "01"]

            def on_train_batch_end(self, *arguments):
                pairs = zip(self.before, (targets[key] for key in "01"), strict=True)
                moved.append([not torch.equal(*pair) for pair in pairs])

        trainer(tmp_path, steps=4, limit_val_batches=0, callbacks=[Note()]).fit(
            module, datamodule=data
        )
        assert moved == [[False, True]] * 2 + [[True, False]] * 2

    def test_they_are_equal_parts_of_epochs_too(self, tmp_path):
        module = make(BOTH, objective=Layerwise())
        history = [self.parameters_of(module)]

        class Note(pl.Callback):
            def on_train_batch_end(self, *arguments):
                history.append(TestStages.parameters_of(module))

        rows = torch.randint(K, (32, D))
        run = trainer(
            tmp_path,
            steps=-1,
            max_epochs=2,
            val_check_interval=None,
            limit_val_batches=0,
            callbacks=[Note()],
        )
        run.fit(module, DataLoader(rows, batch_size=8), DataLoader(rows))
        moved = [[not same(*pair) for pair in zip(*two, strict=True)] for two in pairwise(history)]
        assert moved == [[True, False]] * 4 + [[False, True]] * 4

    @pytest.mark.parametrize(
        ("objective", "schedule", "epochs"),
        [
            (Layerwise, "constant", 2),
            (LocalExpectationGradient, "constant", 4),
            (lambda: OneAfterAnother(Local(), EndToEnd()), "constant", 2),
            (lambda: OneAfterAnother(Local(), EndToEnd(), at=0.9), "constant", 10),
            (Local, "cosine", 2),
        ],
    )
    def test_epochs_of_no_known_length_must_do_for_all_of_them(
        self, objective, schedule, epochs, tmp_path
    ):
        class Stream(IterableDataset):
            def __iter__(self):
                return iter(torch.randint(K, (8, D)))

        def fit(epochs, **options):
            optimization = Optimization(schedule=schedule)
            module = make(BOTH, objective=objective(), optimization=optimization)
            options = {"steps": -1, "val_check_interval": None, "limit_val_batches": 0, **options}
            run = trainer(tmp_path, max_epochs=epochs, **options)
            run.fit(module, *(DataLoader(Stream(), batch_size=4) for _ in range(2)))

        fit(epochs)
        fit(epochs - 1, limit_train_batches=2)
        with pytest.raises(UserError, match=r"known length.*limit_train_batches"):
            fit(epochs - 1)

    @pytest.mark.parametrize(
        "objective",
        [Layerwise, LocalExpectationGradient, lambda: OneAfterAnother(Local(), EndToEnd())],
    )
    def test_a_training_without_an_end_has_none(self, objective, data, tmp_path):
        run = trainer(tmp_path, steps=-1)
        with pytest.raises(UserError, match=r"trains in stages.*trainer max_steps, max_epochs"):
            run.fit(make(BOTH, objective=objective()), datamodule=data)

    def test_one_transform_needs_no_end(self, data, tmp_path):
        class Stop(pl.Callback):
            def on_train_batch_end(self, run, *arguments):
                run.should_stop = True

        run = trainer(tmp_path, steps=-1, callbacks=[Stop()], limit_val_batches=0)
        run.fit(make(objective=Layerwise()), datamodule=data)
        assert run.global_step == 1

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"orderings": []}, EndToEnd),
            ({}, Local),
            ({"orderings": BOTH}, Layerwise),
            ({"orderings": BOTH, "share_backbone": True}, Local),
        ],
    )
    def test_a_stack_is_trained_layerwise_by_default(self, options, expected):
        assert type(make(**options).objective) is expected

    def test_the_learning_rate_takes_its_course_once_a_stage(self):
        def cycles(orderings=BOTH, **keys):
            return make(orderings, optimization=Optimization(**keys)).optimization.cycles

        assert cycles(schedule="cosine") == 2
        assert cycles(warmup_steps=3) == 2
        assert cycles(schedule="cosine", cycles=4) == 4
        assert cycles() == 1
        assert cycles([Parity()], schedule="cosine") == 1

    def test_objectives_change_at_their_step_and_resume_as_they_were(self, tmp_path):
        def fitted(steps, until=5, **options):
            objective = OneAfterAnother(Local(), EndToEnd(), at=0.4)
            module = make(BOTH, bijection=ModularAffine, objective=objective)
            seen = []
            evaluate = EndToEnd.evaluate
            objective.then.evaluate = lambda *given: (
                seen.append(run.global_step) or evaluate(objective.then, *given)
            )

            class Stop(pl.Callback):
                def on_train_batch_end(self, run, *arguments):
                    run.should_stop = run.global_step == until

            run = trainer(tmp_path, steps, limit_val_batches=0, callbacks=[Stop()])
            data = FullRankDataModule(length=D, num_classes=K, batch_size=16, eval_examples=64)
            run.fit(module, datamodule=data, **options)
            return module, run, seen

        torch.manual_seed(0)
        uninterrupted, _, seen = fitted(5)
        assert seen == [2, 3, 4]
        for until in (2, 3):
            torch.manual_seed(0)
            _, run, seen = fitted(5, until)
            assert seen == [2, 3, 4][: until - 2]
            file = tmp_path / f"{until}.ckpt"
            run.save_checkpoint(file)
            torch.manual_seed(1)
            resumed, _, _ = fitted(5, ckpt_path=file)
            for name, value in uninterrupted.state_dict().items():
                assert torch.equal(resumed.state_dict()[name], value), name

    def test_what_does_not_fit_is_refused(self):
        with pytest.raises(UserError, match="share a backbone"):
            make(BOTH, share_backbone=True, objective=Layerwise())


def conditional(orderings, base, width=32):
    """A module that adds digits, with all addends read by an LSTM and aligned with the sum."""
    flow = flows.stack(
        3,
        3,
        orderings,
        partial(LSTM, width=width, readout=0, bidirectional=base is FactorizedBase),
        ModularAffine,
        base,
        context=Context(16, aligned=True, encoder=SequenceEncoder(3, 16)),
    )
    return FlowModule(flow, optimization=Optimization(learning_rate=0.01, base_learning_rate=0.03))


def autoregressive_base(num_classes, length):
    context = Context(16, aligned=True)
    return AutoregressiveFactory(LSTM(width=16), context=context)(num_classes, length)


@pytest.fixture(scope="module")
def sums():
    return AdditionDataModule(length=3, num_classes=3, batch_size=64, eval_examples=100)


class TestContext:
    def test_a_flow_trains_on_pairs(self, tmp_path):
        rows = torch.randint(K, (32, D))
        contexts = nn.functional.one_hot(rows[:, 0], K).float()
        pairs = DataLoader(list(zip(rows, contexts, strict=True)), batch_size=8)
        module = make(context=Context(5, encoder=nn.Linear(K, 5)))
        run = trainer(tmp_path, steps=2)
        run.fit(module, pairs, pairs)
        assert run.callback_metrics["valid_bpc"].isfinite()
        with pytest.raises(UserError, match="no context was given"):
            module.sample(2)

    def test_it_learns_to_add(self, sums, tmp_path):
        pl.seed_everything(0)
        module = conditional([BehindContext(Strided(1))], FactorizedBase)
        run = trainer(tmp_path, steps=120)
        run.fit(module, datamodule=sums)
        (result,) = run.test(module, datamodule=sums, verbose=False)
        assert result["test_accuracy"] > 0.6  # 0.04 by chance
        assert result["test_nats"] < 1.7  # 3.3 without the addends
        assert module.scores["test"].characters == 300
        assert module.report("test").metrics["accuracy"] == pytest.approx(result["test_accuracy"])
        total, addends = next(iter(sums.test_dataloader()))
        told = module.flow(addends).mode
        assert (told == total).all(-1).double().mean() == pytest.approx(result["test_accuracy"])
        samples = module.sample(100, context=addends)
        assert (samples == told).all(-1).double().mean() > 0.3
        with pytest.raises(UserError, match="2 samples and 100 contexts"):
            module.sample(2, context=addends)

    @pytest.mark.parametrize(
        ("orderings", "base"),
        [([Reversed()], autoregressive_base), ([], autoregressive_base), ([*BOTH], FactorizedBase)],
    )
    def test_accuracy_is_the_share_that_greedy_decoding_tells(
        self, orderings, base, sums, tmp_path
    ):
        module = conditional(orderings, base, width=8)
        run = trainer(tmp_path, steps=2)
        run.fit(module, datamodule=sums)
        (result,) = run.test(module, datamodule=sums, verbose=False)
        total, addends = next(iter(sums.test_dataloader()))
        told = module.flow.greedy(addends)
        assert result["test_accuracy"] == pytest.approx((told == total).all(-1).double().mean())
        nats = -module.flow.log_prob(total, addends).mean()
        assert result["test_nats"] == pytest.approx(nats.item(), rel=1e-5)

    def test_a_language_model_may_have_one(self, sums, tmp_path):
        context = Context(4, aligned=True, encoder=SequenceEncoder(3, 4))
        module = LanguageModel(flows.language_model(3, 3, partial(LSTM, width=8), context=context))
        run = trainer(tmp_path, steps=2)
        run.fit(module, datamodule=sums)
        (result,) = run.test(module, datamodule=sums, verbose=False)
        assert {"test_nats", "test_accuracy"} <= set(result)

    def test_without_one_there_is_no_accuracy(self, data, tmp_path):
        (result,) = trainer(tmp_path).test(make(), datamodule=data, verbose=False)
        assert "test_accuracy" not in result


class TestLanguageModel:
    def test_it_is_a_base_without_a_transform(self, data, tmp_path):
        module = LanguageModel(flows.language_model(K, D, partial(LSTM, width=8)))
        assert module.flow.passes == D
        run = trainer(tmp_path)
        run.fit(module, datamodule=data)
        (result,) = run.test(module, datamodule=data, verbose=False)
        assert result["test_nats"] > data.entropy - 1
        assert module.residual_bpc == []
        assert module.describe().startswith("AutoregressiveBase, 6 dimensions of 4 classes")

    def test_over_levels_it_takes_as_many_passes(self):
        module = LanguageModel(flows.language_model(K, D, CONVOLUTION, ordering=Strided(3)))
        assert module.flow.passes == 3
        assert module.evaluate_objective(torch.randint(K, (5, D))).shape == (5,)
