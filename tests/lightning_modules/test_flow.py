"""The flow module: five choices, the start of the base, checks, refits and residuals."""

import math
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from datamodules import AdditionDataModule, FullRankDataModule
from dflows.backbones import LSTM, DilatedConvolution, Transformer
from dflows.bases import AutoregressiveBase, FactorizedBase
from dflows.bijections import ModularAffine, ModularShift, RankPermutation
from dflows.checks import CertificateError
from dflows.encoders import SequenceEncoder
from dflows.errors import UserError
from dflows.estimators import (
    GumbelStraightThrough,
    LocalInTurn,
    LocalObjective,
    LocalThenJoint,
    PosteriorRule,
    ReinMax,
    SoftmaxStraightThrough,
)
from dflows.orderings import BehindContext, Halves, Natural, Parity, Reversed, Strided
from lightning_modules import FlowModule, LanguageModel, Optimization
from tests.training import trainer

K, D = 4, 6
CONVOLUTION = partial(DilatedConvolution, width=8, layers=1)


@pytest.fixture(scope="module")
def data():
    return FullRankDataModule(length=D, num_classes=K, batch_size=16, eval_examples=64)


CHOICES = {
    "bijection": [ModularShift, partial(ModularAffine, prime=True), RankPermutation],
    "orderings": [[Parity(), Parity(first=1)], [Natural()], [Strided(3), Parity()]],
    "backbone": [CONVOLUTION, partial(LSTM, width=8), partial(Transformer, width=8, heads=2)],
    "estimator": [
        LocalObjective,
        partial(LocalObjective, draw="level"),
        partial(LocalObjective, draw="flow"),
        SoftmaxStraightThrough,
    ],
    "base": [
        FactorizedBase,
        partial(FactorizedBase, sharing="positions"),
        partial(AutoregressiveBase, ordering=Strided(2), backbone=CONVOLUTION()),
    ],
    "share_backbone": [False, True],
}


@pytest.mark.parametrize(
    ("key", "choice"), [(key, choice) for key, choices in CHOICES.items() for choice in choices]
)
def test_every_choice_is_a_key_and_trains(key, choice, data, tmp_path):
    arguments = {"orderings": [Parity(), Parity(first=1)], "backbone": CONVOLUTION, key: choice}
    if key == "backbone" and choice.func is LSTM:
        arguments["orderings"] = [Natural()]
    if key == "orderings" and isinstance(choice[0], Natural):
        arguments["backbone"] = partial(LSTM, width=8)
    module = FlowModule(K, D, **arguments)
    run = trainer(tmp_path, steps=2, limit_val_batches=1)
    run.fit(module, datamodule=data)
    assert run.callback_metrics["valid_bpc"].isfinite()
    (result,) = run.test(module, datamodule=data, verbose=False)
    assert result["test_nats"] > data.entropy - 1
    flows = len(module.flow.transforms)
    assert len(module.residual_bpc) == flows
    assert module.sample(3, length=4).shape == (3, 4)


@pytest.mark.parametrize(
    ("orderings", "levels"), [([Strided(3)], 3), ([Parity(), Parity(first=1)], 0), ([Natural()], 0)]
)
def test_levels_of_one_ordering_have_bits_of_their_own(orderings, levels, data, tmp_path):
    module = FlowModule(K, D, orderings, CONVOLUTION)
    run = trainer(tmp_path, steps=2)
    run.fit(module, datamodule=data)
    (result,) = run.test(module, datamodule=data, verbose=False)
    assert len(module.level_bpc) == levels
    if levels:
        sizes = Strided(3).levels(D).bincount()
        mean = (torch.tensor(module.level_bpc) * sizes).sum() / D
        assert mean * D * math.log(2) == pytest.approx(result["test_nats"], rel=1e-4)


def test_a_shorter_window_has_levels_of_its_own(text, tmp_path):
    length = text.length
    module = LanguageModel(text.num_classes, length, CONVOLUTION, ordering=Halves())
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


def test_a_shared_backbone_is_one_network():
    arguments = (K, D, [Parity(), Parity(first=1)], CONVOLUTION)
    shared = FlowModule(*arguments, share_backbone=True).flow.transforms
    apart = FlowModule(*arguments).flow.transforms
    assert shared[0].conditioner.backbone is shared[1].conditioner.backbone
    assert apart[0].conditioner.backbone is not apart[1].conditioner.backbone
    assert shared[0].conditioner.head is not shared[1].conditioner.head


def test_a_plain_torch_network_is_a_backbone(data, tmp_path):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    network = partial(nn.TransformerEncoder, layer, 1, enable_nested_tensor=False)
    module = FlowModule(K, D, [Parity()], network, width=8)
    trainer(tmp_path, steps=2).fit(module, datamodule=data)


def test_the_base_starts_from_the_data_once(data, tmp_path):
    module = FlowModule(
        K, D, [Parity()], CONVOLUTION, optimization=Optimization(learning_rate=1e-9)
    )
    run = trainer(tmp_path, steps=1)
    run.fit(module, datamodule=data)
    marginal = data.class_counts().double() / data.class_counts().sum()
    probabilities = module.flow.base.logits.detach().softmax(-1)
    torch.testing.assert_close(probabilities[0].double(), marginal, atol=1e-3, rtol=0)
    assert probabilities[1, 0] == pytest.approx(0.5)
    with torch.no_grad():
        module.flow.base.logits.fill_(0)
    trainer(tmp_path, steps=1).fit(module, datamodule=data)
    assert module.flow.base.logits.abs().max() < 1e-6


def test_a_refitted_base_has_the_frequencies_of_what_it_saw(data, tmp_path):
    module = FlowModule(
        K,
        D,
        [Parity()],
        CONVOLUTION,
        optimization=Optimization(learning_rate=1e-9),
        base_refit_every=1,
        base_refit_decay=0.5,
    )
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    trainer(tmp_path, steps=3, limit_val_batches=0).fit(module, datamodule=data)
    assert not module.flow.base.logits.requires_grad
    assert module.base_counts.sum() == 16 * D * (1 + 0.5 + 0.25)
    probabilities = (module.base_counts + 0.5) / (module.base_counts + 0.5).sum(-1, keepdim=True)
    torch.testing.assert_close(module.flow.base.logits.softmax(-1).double(), probabilities)
    assert set(before) == set(module.state_dict())


@pytest.mark.parametrize(("every", "refits"), [(1, 1 + 0.5 + 0.25), (2, 1), (4, 0)])
def test_the_base_is_refitted_once_a_step_where_gradients_accumulate(every, refits, data, tmp_path):
    module = FlowModule(K, D, [Parity()], CONVOLUTION, base_refit_every=every, base_refit_decay=0.5)
    run = trainer(tmp_path, steps=3, limit_val_batches=0, accumulate_grad_batches=2)
    run.fit(module, datamodule=data)
    assert module.base_counts.sum() == 16 * D * refits


def test_a_held_base_is_not_refitted(data, tmp_path):
    module = FlowModule(
        K,
        D,
        [Parity()],
        CONVOLUTION,
        optimization=Optimization(hold_base_steps=2),
        base_refit_every=1,
        base_refit_decay=0.5,
    )
    trainer(tmp_path, steps=3, limit_val_batches=0).fit(module, datamodule=data)
    assert module.base_counts.sum() == 16 * D


@pytest.mark.parametrize(
    "alone",
    [
        partial(LanguageModel, K, D, partial(LSTM, width=8)),
        partial(FlowModule, K, D, [], CONVOLUTION),
    ],
)
def test_a_base_alone_is_the_model_and_is_not_held(alone, data, tmp_path):
    settings = Optimization(learning_rate=0.5, base_learning_rate=0.1, hold_base_steps=9)
    module = alone(optimization=settings)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    run = trainer(tmp_path, steps=1, limit_val_batches=0)
    run.fit(module, datamodule=data)
    assert not same(before, [*module.parameters()])
    assert {group["initial_lr"] for group in run.optimizers[0].param_groups} == {0.5}


def test_a_refitted_base_alone_leaves_nothing_to_train():
    with pytest.raises(UserError, match="nothing to train: set it to 0"):
        FlowModule(K, D, [], CONVOLUTION, base_refit_every=1)


def test_only_a_factorized_base_can_be_refitted():
    base = partial(AutoregressiveBase, backbone=LSTM(width=8))
    with pytest.raises(UserError, match="AutoregressiveBase has no closed form"):
        FlowModule(K, D, [Parity()], CONVOLUTION, base=base, base_refit_every=5)


def test_the_test_step_scores_as_log_prob_does(data, tmp_path):
    module = FlowModule(K, D, [Strided(3), Parity()], CONVOLUTION)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    (result,) = trainer(tmp_path).test(module, datamodule=data, verbose=False)
    with torch.no_grad():
        nats = -torch.cat([module.log_prob(batch) for batch in data.test_dataloader()]).mean()
    assert result["test_nats"] == pytest.approx(nats.item(), rel=1e-6)


def test_a_leaking_network_is_refused_before_training(data, tmp_path):
    from tests.dflows.cli.bad_backbones import Leaking

    module = FlowModule(K, D, [Natural()], Leaking)
    with pytest.raises(CertificateError, match="leaks: the value at dimension"):
        trainer(tmp_path).fit(module, datamodule=data)


@pytest.mark.parametrize("estimator", [PosteriorRule, GumbelStraightThrough, ReinMax])
def test_estimators_of_a_softmax_train_a_location_scale_map(estimator, data, tmp_path):
    module = FlowModule(K, D, [Parity()], CONVOLUTION, bijection=ModularAffine, estimator=estimator)
    run = trainer(tmp_path, steps=2)
    run.fit(module, datamodule=data)
    assert run.callback_metrics["valid_bpc"].isfinite()


def test_local_then_joint_changes_at_its_step_and_resumes_as_it_was(tmp_path):
    def fitted(steps, **options):
        module = FlowModule(
            K,
            D,
            [Parity(), Parity(first=1)],
            CONVOLUTION,
            bijection=ModularAffine,
            estimator=partial(LocalThenJoint, joint_from_step=2),
        )
        run = trainer(tmp_path, steps, limit_val_batches=1)
        data = FullRankDataModule(length=D, num_classes=K, batch_size=16, eval_examples=64)
        run.fit(module, datamodule=data, **options)
        return module, run

    torch.manual_seed(0)
    uninterrupted, _ = fitted(5)
    for steps, joint in ((2, False), (3, True)):
        torch.manual_seed(0)
        module, run = fitted(steps)
        assert {part.estimator.is_joint for part in module.flow.transforms} == {joint}
        file = tmp_path / f"{steps}.ckpt"
        run.save_checkpoint(file)
        torch.manual_seed(1)
        resumed, _ = fitted(5, ckpt_path=file)
        for name, value in uninterrupted.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], value), name


def parameters_of_flows(module):
    """Those of every flow, the data's side first."""
    flows = module.flow.conditional_transforms[::-1]
    return [[parameter.detach().clone() for parameter in flow.parameters()] for flow in flows]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("steps", [3, None])
def test_flows_do_not_move_but_in_their_turn(steps, data, tmp_path):
    orderings = [Parity(), Parity(first=1), Natural()]
    module = FlowModule(
        K,
        D,
        orderings,
        CONVOLUTION,
        estimator=partial(LocalInTurn, steps=steps),
        optimization=Optimization(learning_rate=0.1, weight_decay=0.5, betas=(0.9, 0.99)),
    )
    history = [parameters_of_flows(module)]

    class Note(pl.Callback):
        def on_train_batch_end(self, *arguments):
            history.append(parameters_of_flows(module))

    run = trainer(tmp_path, steps=11, limit_val_batches=0, callbacks=[Note()])
    run.fit(module, datamodule=data)
    assert len(history) == 12
    for step in range(11):
        turn = 3 * step // 11 if steps is None else min(step // steps, 2)
        for flow in range(3):
            assert same(history[step][flow], history[step + 1][flow]) == (flow != turn), step


@pytest.mark.parametrize(
    ("orderings", "shared", "estimator"),
    [
        ([Parity()], False, LocalObjective),
        ([Parity(), Parity(first=1)], False, LocalInTurn),
        ([Parity(), Parity(first=1)], True, LocalObjective),
    ],
)
def test_a_stack_is_trained_in_turn_by_default(orderings, shared, estimator):
    module = FlowModule(K, D, orderings, CONVOLUTION, share_backbone=shared)
    found = {type(transform.estimator) for transform in module.flow.conditional_transforms}
    assert found == {estimator}


def test_the_learning_rate_takes_its_course_once_an_equal_turn():
    def cycles(**keys):
        optimization = Optimization(**keys)
        orderings = [Parity(), Parity(first=1)]
        module = FlowModule(
            K, D, orderings, CONVOLUTION, estimator=LocalInTurn, optimization=optimization
        )
        return module.optimization.cycles

    assert cycles(schedule="cosine") == 2
    assert cycles(schedule="cosine", cycles=4) == 4
    assert cycles() == 1


def test_turns_that_do_not_fit_the_run_are_refused(data, tmp_path):
    def module(*steps):
        made = FlowModule(
            K, D, [Parity()] * len(steps), CONVOLUTION, estimator=partial(LocalInTurn, steps=1)
        )
        for transform, number in zip(made.flow.conditional_transforms, steps, strict=True):
            transform.train_by(LocalInTurn(number))
        return made

    options = {"limit_val_batches": 0}
    with pytest.raises(UserError, match="turns are of 1 and 2 steps: give every flow the same"):
        trainer(tmp_path, steps=9, **options).fit(module(1, 2), datamodule=data)
    with pytest.raises(UserError, match="flows share the training in turn, and it has no end"):
        trainer(tmp_path, steps=-1, **options).fit(module(None, None), datamodule=data)
    message = "max_steps is 4, and with turns of 2 steps the last of 3 turns begins after 4"
    with pytest.raises(UserError, match=message):
        trainer(tmp_path, steps=4, **options).fit(module(2, 2, 2), datamodule=data)
    trainer(tmp_path, steps=5, **options).fit(module(2, 2, 2), datamodule=data)


def test_an_estimator_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match="PosteriorRule weighs the classes of a softmax"):
        FlowModule(K, D, [Parity()], CONVOLUTION, estimator=PosteriorRule)


class Conditional(FullRankDataModule):
    """Random rows that come with a context: their own first class, as a one-hot vector."""

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(1)
        rows = torch.randint(K, (4, 8, D), generator=generator)
        contexts = nn.functional.one_hot(rows[..., 0], K).float()
        return DataLoader(list(zip(rows, contexts, strict=True)), batch_size=None)

    val_dataloader = train_dataloader


def test_a_conditional_flow_trains_on_pairs(tmp_path):
    data = Conditional(length=D, num_classes=K)
    module = FlowModule(
        K, D, [Parity()], CONVOLUTION, context_encoder=nn.Linear(K, 5), context_features=5
    )
    run = trainer(tmp_path, steps=2)
    run.fit(module, datamodule=data)
    assert run.callback_metrics["valid_bpc"].isfinite()
    with pytest.raises(UserError, match="no context was given"):
        module.sample(2)


def conditional(orderings, base, width=32):
    """A module that adds digits, with all addends read by an LSTM and aligned with the sum."""
    return FlowModule(
        3,
        3,
        orderings,
        partial(LSTM, width=width, bidirectional=base is FactorizedBase),
        ModularAffine,
        base=base,
        context_encoder=SequenceEncoder(3, 16),
        context_features=16,
        align_context=True,
        optimization=Optimization(learning_rate=0.01, base_learning_rate=0.03),
    )


BASE = partial(AutoregressiveBase, backbone=LSTM(width=16), context_features=16, align_context=True)


@pytest.fixture(scope="module")
def sums():
    return AdditionDataModule(length=3, num_classes=3, batch_size=64, eval_examples=100)


class TestAddition:
    def test_a_flow_learns_to_add(self, sums, tmp_path):
        pl.seed_everything(0)
        module = conditional([BehindContext(Strided(1))], FactorizedBase)
        run = trainer(tmp_path, steps=120)
        run.fit(module, datamodule=sums)
        (result,) = run.test(module, datamodule=sums, verbose=False)
        assert result["test_accuracy"] > 0.6  # 0.04 by chance
        assert result["test_nats"] < 1.7  # 3.3 without the addends
        assert module.counted["characters"]["test"] == 300
        total, addends = next(iter(sums.test_dataloader()))
        told = module.flow(addends).mode
        assert (told == total).all(-1).double().mean() == pytest.approx(result["test_accuracy"])
        samples = module.sample(100, context=addends)
        assert (samples == told).all(-1).double().mean() > 0.3
        with pytest.raises(UserError, match="2 samples and 100 contexts"):
            module.sample(2, context=addends)

    @pytest.mark.parametrize(
        ("orderings", "base"),
        [([Reversed()], BASE), ([], BASE), ([Parity(), Parity(first=1)], FactorizedBase)],
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

    def test_a_language_model_may_have_a_context(self, sums, tmp_path):
        module = LanguageModel(
            3,
            3,
            partial(LSTM, width=8),
            context_encoder=SequenceEncoder(3, 4),
            context_features=4,
            align_context=True,
        )
        run = trainer(tmp_path, steps=2)
        run.fit(module, datamodule=sums)
        (result,) = run.test(module, datamodule=sums, verbose=False)
        assert {"test_nats", "test_accuracy"} <= set(result)

    def test_without_a_context_there_is_no_accuracy(self, data, tmp_path):
        module = FlowModule(K, D, [Parity()], CONVOLUTION)
        (result,) = trainer(tmp_path).test(module, datamodule=data, verbose=False)
        assert "test_accuracy" not in result


class TestLanguageModel:
    def test_it_is_a_base_without_a_flow(self, data, tmp_path):
        module = LanguageModel(K, D, partial(LSTM, width=8))
        assert module.flow.passes == D
        assert not len(module.flow.transforms)
        run = trainer(tmp_path)
        run.fit(module, datamodule=data)
        (result,) = run.test(module, datamodule=data, verbose=False)
        assert result["test_nats"] > data.entropy - 1
        assert module.residual_bpc == []
        assert "1,0" not in module.describe()
        assert module.describe().startswith("AutoregressiveBase, 6 dimensions of 4 classes")

    def test_over_levels_it_takes_as_many_passes(self):
        module = LanguageModel(K, D, CONVOLUTION, ordering=Strided(3), draw="level")
        assert module.flow.passes == 3
        assert module.objective(torch.randint(K, (5, D))).shape == (5,)
