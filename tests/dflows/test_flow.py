import copy
import pickle
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Distribution

from dflows import DiscreteFlow, PermutationTransform
from dflows.backbones import LSTM, DilatedConvolution, Table, Transformer
from dflows.bases import AutoregressiveBase, FactorizedBase, NGramBase
from dflows.bijections import RankPermutation
from dflows.conditioner import Conditioner, Context
from dflows.errors import UserError
from dflows.flows import AutoregressiveFactory, bipartite
from dflows.objectives import EndToEnd
from dflows.orderings import BehindContext, Blocks, Natural, Parity, Reversed, Strided
from dflows.transforms import Composition
from tests.dflows.small import (
    BACKBONES,
    BIJECTIONS,
    BOTH_PARITIES,
    ORDERINGS,
    RULES,
    WIDTH,
    assert_gradients_close,
    gradients,
    make_conditioner,
    make_flow,
    make_transform,
    shaken,
    states,
)

ONE = torch.tensor(1.0)


def autoregressive_base(num_classes, length, backbone="causal", ordering=None, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ordering = ordering or Natural()
        return AutoregressiveBase(
            make_conditioner(num_classes, length, ordering, backbone, **options)
        )


@pytest.mark.parametrize("orderings", [[], [Natural()], [Parity(), Natural()]])
def test_terms_of_a_log_probability_sum_to_it_in_any_shape(orderings):
    flow = make_flow(3, 4, orderings, "rank", "causal")
    y = torch.randint(3, (2, 5, 3))
    terms = flow.log_prob_terms(y)
    assert terms.shape == y.shape
    torch.testing.assert_close(terms.sum(-1), flow.log_prob(y).detach())
    assert flow.log_prob_terms(y[0, 0]).shape == (3,)
    with pytest.raises(UserError, match="a value of 3 lies outside"):
        flow.log_prob_terms(torch.full((4,), 3))


class TestLogProb:
    @pytest.mark.parametrize("bijection", BIJECTIONS)
    @pytest.mark.parametrize("ordering", ORDERINGS.values(), ids=ORDERINGS)
    @pytest.mark.parametrize("backbone", ["causal", "masked"])
    def test_probabilities_of_all_states_sum_to_1(self, bijection, ordering, backbone):
        flow = make_flow(3, 4, [ordering, Parity(first=1)], bijection, backbone=backbone)
        y = states(3, 4)
        torch.testing.assert_close(flow.log_prob(y).exp().sum(), ONE)
        for length in (1, 3):
            shorter = flow.log_prob(states(3, length))
            assert shorter.shape == (3**length,)
            torch.testing.assert_close(shorter.exp().sum(), ONE)

    @pytest.mark.parametrize(("num_classes", "length"), [(2, 7), (5, 3), (6, 2), (10, 3)])
    @pytest.mark.parametrize("bijection", ["affine", "affine-prime", "rank"])
    def test_for_other_sizes_too(self, num_classes, length, bijection):
        flow = make_flow(num_classes, length, [Natural(), *BOTH_PARITIES], bijection)
        torch.testing.assert_close(
            flow.log_prob(states(num_classes, length)).double().exp().sum(),
            ONE.double(),
            rtol=1e-5,
            atol=0,
        )

    @given(
        num_classes=st.integers(2, 7),
        length=st.integers(2, 4),
        orderings=st.lists(
            st.sampled_from([o for n, o in ORDERINGS.items() if n != "permutation"]), max_size=3
        ),
        bijection=st.sampled_from(sorted(BIJECTIONS)),
        backbone=st.sampled_from(["causal", "masked"]),
        base=st.sampled_from(["factorized", "autoregressive"]),
    )
    def test_any_stack_is_normalized(
        self, num_classes, length, orderings, bijection, backbone, base
    ):
        orderings = [o for o in orderings if int(o.levels(length).max())]
        standing = None if base == "factorized" else autoregressive_base(num_classes, length)
        flow = make_flow(
            num_classes, length, orderings, bijection, backbone=backbone, base=standing
        )
        if num_classes**length > 1500:
            return
        y = states(num_classes, length)
        torch.testing.assert_close(flow.log_prob(y).exp().sum(), ONE, rtol=1e-4, atol=0)
        assert len(flow.residuals(y)[-1].unique(dim=0) if orderings else y) == len(y)

    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("bijection", BIJECTIONS)
    @pytest.mark.parametrize("backbone", ["causal", "masked"])
    def test_its_value_is_the_same_with_and_without_a_gradient(self, rule, bijection, backbone):
        flow = make_flow(4, 5, [Strided(columns=3), Reversed()], bijection, backbone, rule).eval()
        y = torch.randint(4, (2, 3, 5))
        with torch.no_grad():
            expected = flow.log_prob(y)
        assert not expected.requires_grad
        actual = flow.log_prob(y)  # on one-hot vectors, where a gradient crosses transforms
        assert actual.requires_grad
        torch.testing.assert_close(actual, expected)
        x = flow.residuals(y)[-1]
        torch.testing.assert_close(
            flow.base.log_prob(x.reshape(6, 5)).sum(-1).reshape(2, 3), actual
        )

    @pytest.mark.parametrize("rule", ["gumbel", "reinmax"])
    @pytest.mark.parametrize("backbone", ["causal", "masked"])
    def test_rules_that_draw_do_so_in_training_mode_with_gradients_alone(self, rule, backbone):
        flow = make_flow(3, 4, [Natural(), Parity()], "affine", backbone, rule).train()
        y = states(3, 4)
        with torch.no_grad():
            exact = flow.log_prob(y)
        torch.testing.assert_close(exact.exp().sum(), ONE)
        with torch.inference_mode():
            assert torch.equal(flow.log_prob(y), exact)
        first, second = flow.log_prob(y), flow.log_prob(y)
        assert not torch.equal(first, second)
        torch.testing.assert_close(flow.eval().log_prob(y), exact)

    @pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 1, 2), (0,)])
    def test_batch_dimensions_are_kept(self, shape):
        flow = make_flow(4, 5, [Natural(), Parity(first=1)])
        y = torch.randint(4, (*shape, 5))
        log_prob = flow.log_prob(y)
        assert log_prob.shape == EndToEnd()(flow, y).shape == shape
        for row, value in zip(y.reshape(-1, 5), log_prob.flatten(), strict=True):
            torch.testing.assert_close(flow.log_prob(row), value)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
    def test_any_integers_will_do(self, dtype):
        flow, y = make_flow(bijection="rank"), torch.randint(3, (5, 4))
        assert torch.equal(flow.log_prob(y.to(dtype)), flow.log_prob(y))

    @pytest.mark.parametrize("rule", RULES)
    def test_float64_is_kept(self, rule):
        flow = make_flow(rule=rule).double()
        assert flow.log_prob(torch.randint(3, (5, 4))).dtype == torch.float64

    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("backbone", ["causal", "masked"])
    def test_autocast_gives_a_likelihood_and_gradients(self, rule, backbone):
        flow = make_flow(5, 4, rule=rule, backbone=backbone)
        y = torch.randint(5, (30, 4))
        with torch.autocast("cpu", torch.bfloat16):
            loss = -flow.log_prob(y).mean()
            loss.backward()
            every = states(5, 4)
            with torch.no_grad():
                torch.testing.assert_close(flow.log_prob(every).exp().sum(), ONE)
        assert loss.dtype == torch.float32
        assert all(p.grad is None or p.grad.isfinite().all() for p in flow.parameters())

    @pytest.mark.parametrize("orderings", [[], [Parity()]])
    def test_without_gradients_a_flow_is_evaluated_without_tf32(self, orderings):
        seen = []

        class Noting(FactorizedBase):
            def log_prob(self, x, context=None):
                seen.append(torch.backends.cudnn.rnn.fp32_precision)
                return super().log_prob(x, context)

        transforms = [make_transform(3, 4, ordering, RankPermutation(3)) for ordering in orderings]
        flow = DiscreteFlow(Noting(3, 4), transforms)
        y = torch.zeros(1, 4, dtype=torch.long)
        with torch.no_grad():
            flow.log_prob(y)
        flow.log_prob(y)
        assert seen[0] == "ieee" != seen[1]

    @pytest.mark.parametrize("alone", [False, True])
    def test_without_gradients_autocast_changes_nothing(self, alone):
        encoder = nn.Sequential(nn.Linear(5, 32), nn.Tanh(), nn.Linear(32, 3))
        base = AutoregressiveFactory(DilatedConvolution(8), context=Context(3))
        flow = make_flow(5, 6, base=base(5, 6), context=Context(3), encoder=encoder)
        if alone:
            flow = DiscreteFlow(flow.base, context_encoder=encoder)
        context = torch.randn(20, 5)
        with torch.no_grad():
            found = []
            for enabled in (False, True):
                with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                    y = flow.greedy(context)
                    found += [y, flow.log_prob(y, context), flow(context).log_prob(y)]
        assert all(map(torch.equal, found[:3], found[3:]))

    @pytest.mark.parametrize(
        ("y", "message"),
        [
            (torch.zeros(2, 4), "dtype torch.float32"),
            (torch.zeros(2, 4, dtype=torch.bool), "dtype torch.bool"),
            (torch.zeros(2, 5, dtype=torch.long), "5 dimensions.*the flow has 4"),
            (torch.zeros(2, 0, dtype=torch.long), "0 dimensions"),
            (torch.tensor([[0, 1, 3, 0]]), "value of 3 lies outside 0..2"),
            (torch.tensor([[0, 1, -1, 0]]), "value of -1 lies outside 0..2"),
        ],
    )
    def test_what_is_no_event_is_refused(self, y, message):
        for flow in (make_flow(), make_flow(orderings=[])):
            objective = partial(EndToEnd(), flow)
            for method in (flow.log_prob, objective, flow.residuals, flow().log_prob):
                with pytest.raises(UserError, match=message):
                    method(y)


class TestStack:
    @pytest.mark.parametrize("rule", ["straight-through", "posterior"])
    def test_compositions_are_taken_apart(self, rule):
        one, two = (make_flow(4, 5, rule=rule) for _ in range(2))
        nested = Composition([two.transforms[0], Composition([two.transforms[1]])])
        nested = DiscreteFlow(two.base, [nested])
        y = torch.randint(4, (6, 5))
        torch.testing.assert_close(nested.log_prob(y), one.log_prob(y))
        assert nested.passes == one.passes == 2
        assert nested.untransformed == one.untransformed == 0
        assert len(nested.transforms) == 2
        one.log_prob(y).sum().backward()
        nested.log_prob(y).sum().backward()
        assert_gradients_close(gradients(nested), gradients(one))

    @pytest.mark.parametrize("rule", ["straight-through", "posterior"])
    def test_an_inverse_may_stand_in_it(self, rule):
        transform = make_transform(3, 4, Natural(), "affine", "causal", rule)
        flow = shaken(DiscreteFlow(FactorizedBase(3, 4), [transform.inv]))
        y = states(3, 4)
        torch.testing.assert_close(flow.log_prob(y).exp().sum(), ONE)
        flow.log_prob(y).sum().backward()
        assert all(parameter.grad is not None for parameter in flow.parameters())
        assert flow.passes == 1
        samples = flow.sample((50,), generator=torch.Generator().manual_seed(0))
        again = flow.sample((50,), generator=torch.Generator().manual_seed(0), method="fixed_point")
        assert torch.equal(samples, again)

    def test_a_permutation_is_undone_where_it_stands(self):
        flow = make_flow(3, 4, [Natural()], "rank")
        order = [2, 0, 3, 1]
        permuted = DiscreteFlow(flow.base, [*flow.transforms, PermutationTransform(order)])
        y = states(3, 4)
        torch.testing.assert_close(permuted.log_prob(y[:, order]), flow.log_prob(y))

    def test_flows_may_share_a_backbone(self):
        backbone = BACKBONES["masked"]()
        transforms = [
            make_transform(3, 4, ordering, "rank", backbone) for ordering in BOTH_PARITIES
        ]
        flow = shaken(DiscreteFlow(FactorizedBase(3, 4), transforms))
        torch.testing.assert_close(flow.log_prob(states(3, 4)).exp().sum(), ONE)
        shared = sum(p.numel() for p in backbone.parameters())
        separate = make_flow(3, 4, BOTH_PARITIES, "rank", sharing="levels")
        fewer = sum(p.numel() for p in flow.parameters())
        assert fewer == sum(p.numel() for p in separate.parameters()) - shared

    def test_a_plain_torch_encoder_is_a_backbone(self):
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)
        network = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        network.width = WIDTH
        flow = make_flow(3, 5, [Parity()], "rank", network)
        torch.testing.assert_close(flow.log_prob(states(3, 5)).exp().sum(), ONE)

    def test_passes_and_untransformed(self):
        flow = make_flow(3, 6, [Natural(), Strided(columns=3)])
        assert (flow.passes, flow.untransformed) == (5 + 2, 1)
        assert (flow.num_classes, flow.length) == (3, 6)
        flow = make_flow(3, 6, [Parity()], base=autoregressive_base(3, 6))
        assert (flow.passes, flow.untransformed) == (6 + 1, 3)
        assert make_flow(3, 6, []).untransformed == 6

    def test_parts_that_do_not_fit_are_refused(self):
        with pytest.raises(UserError, match="transform of 4 dimensions does not fit a base of 5"):
            make_flow(3, 4, base=FactorizedBase(3, 5))
        with pytest.raises(UserError, match="bijection of 3 classes does not fit a base of 4"):
            make_flow(3, 4, base=FactorizedBase(4, 4))

    def test_a_base_is_told_the_orderings_of_the_transforms(self):
        base = FactorizedBase(3, 5)
        make_flow(3, 5, [Strided(columns=3), Parity()], base=base)
        assert base.groups.tolist() == [0, 3, 4, 1, 2]
        assert len(base.logits) == 5
        nested = FactorizedBase(3, 5)
        parts = [make_transform(3, 5, Strided(columns=3)), make_transform(3, 5, Parity())]
        DiscreteFlow(nested, [Composition(parts[:1]), Composition([Composition(parts[1:])])])
        assert torch.equal(nested.groups, base.groups)

    @pytest.mark.parametrize("other", [[Natural()], [Parity(), Parity()], []], ids=str)
    def test_a_base_under_other_orderings_is_refused(self, other):
        flow = make_flow(3, 4, [Parity()], sharing="levels")
        probs = flow.log_prob(states(3, 4))
        with pytest.raises(UserError, match="create one for each flow"):
            make_flow(3, 4, other, base=flow.base)
        assert torch.equal(flow.log_prob(states(3, 4)), probs)
        same = DiscreteFlow(flow.base, list(flow.transforms))
        assert torch.equal(same.log_prob(states(3, 4)), probs)


def chi_square(samples, probs):
    """How far frequencies are from probabilities, in deviations of the statistic's own."""
    counts = samples.bincount(minlength=len(probs)).double()
    expected = probs.double() * counts.sum()
    few = expected < 5  # too rare for the test one by one: one cell
    if few.any():
        counts = torch.cat([counts[~few], counts[few].sum().unsqueeze(0)])
        expected = torch.cat([expected[~few], expected[few].sum().unsqueeze(0)])
    statistic = ((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum()
    freedom = len(counts) - 1
    return (statistic - freedom) / (2 * freedom) ** 0.5


class TestSample:
    @pytest.mark.parametrize("bijection", BIJECTIONS)
    @pytest.mark.parametrize("backbone", ["causal", "masked"])
    @pytest.mark.parametrize("base", ["factorized", "autoregressive"])
    def test_frequencies_agree_with_log_prob(self, bijection, backbone, base):
        standing = autoregressive_base(3, 4) if base == "autoregressive" else None
        flow = make_flow(
            3, 4, [Natural(), Parity(first=1)], bijection, backbone=backbone, base=standing
        )
        with torch.no_grad():
            probs = flow.log_prob(states(3, 4)).exp()
        samples = flow.sample((20_000,), generator=torch.Generator().manual_seed(0))
        cells = (samples * torch.tensor([27, 9, 3, 1])).sum(-1)
        assert chi_square(cells, probs) < 4
        assert chi_square(cells, probs.roll(1)) > 10  # the test can tell

    @pytest.mark.parametrize("bijection", BIJECTIONS)
    @pytest.mark.parametrize("backbone", BACKBONES)
    @pytest.mark.parametrize("base", ["factorized", "autoregressive"])
    @pytest.mark.parametrize("length", [7, 4, 1])
    def test_levels_and_fixed_points_give_the_same(self, bijection, backbone, base, length):
        standing = autoregressive_base(5, 7, ordering=Strided(2)) if base != "factorized" else None
        flow = make_flow(
            5, 7, [Natural(), Strided(columns=3)], bijection, backbone=backbone, base=standing
        )
        one, two = (
            flow.sample(
                (3, 10),
                length=length,
                temperature=0.7,
                method=method,
                generator=torch.Generator().manual_seed(1),
            )
            for method in ("levels", "fixed_point")
        )
        assert one.shape == (3, 10, length)
        assert torch.equal(one, two)

    def test_extra_classes_of_a_prime_modulus_are_never_drawn(self):
        flow = make_flow(4, 5, [Natural()], "affine-prime")
        assert flow.transforms[0].bijection.modulus == 5
        assert flow.sample((2000,)).max() == 3

    def test_temperature_is_that_of_the_base(self):
        flow = make_flow(3, 4, [Natural()], "rank")
        x = flow.base.sample(40, 4, temperature=0.3, generator=torch.Generator().manual_seed(0))
        y = flow.sample((40,), temperature=0.3, generator=torch.Generator().manual_seed(0))
        assert torch.equal(flow.residuals(y)[-1], x)

    def test_residuals_go_from_data_to_base(self):
        flow = make_flow(3, 4, [Natural(), Parity(first=1)], "rank")
        y = torch.randint(3, (2, 3, 4))
        first, last = flow.residuals(y)
        assert torch.equal(first, flow.transforms[1].inv(y))
        assert torch.equal(last, flow.transforms[0].inv(first))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"temperature": 0}, "temperature is 0"),
            ({"temperature": float("nan")}, "temperature is nan"),
            ({"temperature": float("inf")}, "temperature is inf"),
            ({"method": "guess"}, "method is 'guess'"),
            ({"length": 5}, "length is 5: give 1 to 4"),
            ({"length": 0}, "length is 0"),
        ],
    )
    def test_what_cannot_be_had_is_refused(self, options, message):
        with pytest.raises(UserError, match=message):
            make_flow().sample((2,), **options)


def test_a_fresh_flow_is_its_base():
    transforms = [make_transform(3, 5, ordering) for ordering in BOTH_PARITIES]
    flow = DiscreteFlow(FactorizedBase(3, 5), transforms)
    y = torch.randint(3, (20, 5))
    torch.testing.assert_close(flow.log_prob(y), flow.base.log_prob(y).sum(-1))


class Mean(nn.Module):
    """A user's encoder of a context (B, S, 2): a vector of 3 features."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 3)

    def forward(self, context):
        return self.linear(context).mean(1)


class TestDistribution:
    def test_it_is_one_of_torchs(self):
        flow = make_flow(3, 4, [Natural()])
        distribution = flow()
        assert isinstance(distribution, Distribution)
        assert distribution.event_shape == (4,)
        assert distribution.batch_shape == ()
        assert distribution.sample().shape == (4,)
        assert distribution.sample((2, 3)).shape == (2, 3, 4)
        samples = distribution.sample(torch.Size([50]))
        assert distribution.support.check(samples).all()
        assert not distribution.support.check(samples + 3).any()
        assert distribution.support.event_dim == 1
        torch.testing.assert_close(distribution.log_prob(samples), flow.log_prob(samples))
        assert repr(distribution) == (
            "FlowDistribution(num_classes=3, batch_shape=(), event_shape=(4,))"
        )

    @pytest.mark.parametrize("shape", [(3, 2), (3, 4, 2)])
    @pytest.mark.parametrize("backbone", ["causal", "masked"])
    def test_a_context_is_conditioned_on(self, shape, backbone):
        flow = make_flow(4, 4, [Natural(), Reversed()], backbone=backbone, context=Context(2))
        context = torch.randn(shape)
        distribution = flow(context)
        assert distribution.batch_shape == (3,)
        assert distribution.sample().shape == (3, 4)
        samples = distribution.sample((2, 5))
        assert samples.shape == (2, 5, 3, 4)
        log_prob = distribution.log_prob(samples)
        assert log_prob.shape == (2, 5, 3)
        every = states(4, 4)
        for example in range(3):
            one = flow(context[example : example + 1])
            torch.testing.assert_close(
                one.log_prob(samples[:, :, example : example + 1])[..., 0], log_prob[..., example]
            )
            torch.testing.assert_close(one.log_prob(every.unsqueeze(1)).exp().sum(), ONE)
        torch.testing.assert_close(
            distribution.log_prob(every[7]), distribution.log_prob(every[7].expand(3, 4))
        )
        torch.testing.assert_close(flow.log_prob(samples, context), log_prob)
        assert EndToEnd()(flow, samples, context).shape == (2, 5, 3)
        one, two = (
            flow.sample((5,), context, method=method, generator=torch.Generator().manual_seed(2))
            for method in ("levels", "fixed_point")
        )
        assert torch.equal(one, two)
        assert one.shape == (5, 3, 4)

    def test_frequencies_agree_with_log_prob_given_a_context(self):
        flow = make_flow(3, 3, [Natural(), Reversed()], context=Context(2))
        context = torch.tensor([[4.0, -4.0], [-4.0, 4.0]])
        samples = flow.sample((10_000,), context, generator=torch.Generator().manual_seed(0))
        every = states(3, 3).unsqueeze(1).expand(-1, 2, -1)
        with torch.no_grad():
            probs = flow.log_prob(every, context).exp()
        cells = (samples * torch.tensor([9, 3, 1])).sum(-1)
        assert chi_square(cells[:, 0], probs[:, 0]) < 4
        assert chi_square(cells[:, 1], probs[:, 1]) < 4
        assert chi_square(cells[:, 0], probs[:, 1]) > 10

    def test_an_encoder_of_contexts_is_trained_along(self):
        flow = make_flow(4, 4, encoder=Mean(), context=Context(3))
        y, context = torch.randint(4, (6, 4)), torch.randn(6, 5, 2)
        flow.log_prob(y, context).sum().backward()
        assert flow.context_encoder.linear.weight.grad.any()
        torch.testing.assert_close(flow(context).log_prob(y), flow.log_prob(y, context))

    @pytest.mark.parametrize("value", [3, -1])
    def test_values_outside_the_support_are_refused(self, value):
        with pytest.raises(UserError, match=f"{value} lies outside 0..2"):
            make_flow()().log_prob(torch.tensor([0, 1, value, 0]))

    def test_a_context_too_many_or_too_few_is_refused(self):
        y = torch.randint(3, (2, 4))
        with pytest.raises(UserError, match="takes none"):
            make_flow().log_prob(y, torch.randn(2, 2))
        with pytest.raises(UserError, match="no context was given"):
            make_flow(context=Context(2)).log_prob(y)

    @pytest.mark.parametrize(
        "flow",
        [
            DiscreteFlow(FactorizedBase(3, 4)),
            DiscreteFlow(NGramBase(3, 4), [PermutationTransform([1, 0, 3, 2])]),
            DiscreteFlow(AutoregressiveBase(Conditioner(3, 4, Natural(), Table(2, 3, 4)))),
            DiscreteFlow(
                FactorizedBase(3, 4),
                [make_transform(3, 4, Natural(), "rank", Table(2, 3, 4)).inv],
            ),
        ],
        ids=["factorized", "n-gram", "table-base", "table-inverted"],
    )
    def test_where_no_part_takes_a_context_none_is_ignored(self, flow):
        y, context = torch.randint(3, (2, 4)), torch.randn(2, 5)
        for method in (flow.log_prob, partial(EndToEnd(), flow), flow.residuals):
            method(y)
            with pytest.raises(UserError, match="flow that takes none"):
                method(y, context)
        for method in (flow, flow.greedy, partial(flow.sample, ())):
            with pytest.raises(UserError, match="flow that takes none"):
                method(context)

    def test_a_table_refuses_one_beside_a_part_that_takes_it(self):
        base = autoregressive_base(3, 4, LSTM(8), context=Context(5))
        flow = DiscreteFlow(base, [make_transform(3, 4, Natural(), "rank", Table(2, 3, 4))])
        y = torch.randint(3, (2, 4))
        with pytest.raises(UserError, match="a context was given to a Table that takes none"):
            flow.log_prob(y, torch.randn(2, 5))

    @pytest.mark.parametrize("aligned", [False, True])
    @pytest.mark.parametrize("backbone", ["causal", "masked"])
    def test_one_of_other_features_is_refused(self, aligned, backbone):
        flow = make_flow(backbone=backbone, context=Context(2, aligned=aligned))
        context, y = torch.randn(2, 4, 3), torch.randint(3, (2, 4))
        for call in (partial(flow.log_prob, y), partial(flow.sample, ())):
            with pytest.raises(UserError, match="has 3 features, and the conditioner expects 2"):
                call(context)

    def test_parts_of_ones_own_may_take_one(self):
        class Own(FactorizedBase):
            takes_context = True

            def log_prob(self, x, context=None):
                return super().log_prob(x) + context.sum(-1, keepdim=True)

        y, flow = torch.randint(3, (2, 4)), DiscreteFlow(Own(3, 4))
        assert flow.log_prob(y, torch.ones(2, 5)).shape == (2,)


ALIGNED = {
    "causal": [Natural(), Reversed()],
    "causal-convolution": [Strided(columns=3), Reversed()],
    "masked": [*BOTH_PARITIES],
    "behind": [BehindContext(Parity())],
    "at-once": [BehindContext(Blocks(size=4))],
}


@pytest.mark.parametrize("name", ALIGNED)
class TestAlignedContext:
    def make(self, name, **options):
        backbone = name if name.startswith("causal") else "masked"
        return make_flow(
            3,
            4,
            ALIGNED[name],
            "rank",
            backbone=backbone,
            context=Context(2, aligned=True),
            **options,
        )

    def test_probabilities_sum_to_one_and_samples_follow_them(self, name):
        flow, context = self.make(name), torch.randn(2, 4, 2)
        every = states(3, 4).unsqueeze(1).expand(-1, 2, -1)
        with torch.no_grad():
            probs = flow.log_prob(every, context).exp()
        torch.testing.assert_close(probs.sum(0), torch.ones(2))
        assert not torch.allclose(probs[:, 0], probs[:, 1])
        one, two = (
            flow.sample((5000,), context, method=method, generator=torch.Generator().manual_seed(2))
            for method in ("levels", "fixed_point")
        )
        assert torch.equal(one, two)
        cells = (one * torch.tensor([27, 9, 3, 1])).sum(-1)
        assert chi_square(cells[:, 0], probs[:, 0]) < 4
        assert chi_square(cells[:, 1], probs[:, 1]) < 4

    def test_the_mode_is_the_most_probable_event(self, name):
        flow, context = self.make(name), torch.randn(3, 4, 2)
        every = states(3, 4)
        with torch.no_grad():
            log_probs = flow.log_prob(every.unsqueeze(1).expand(-1, 3, -1), context)
            expected = every[log_probs.argmax(0)]
        assert torch.equal(flow(context).mode, expected)
        assert torch.equal(flow.greedy(context), expected)


class TestMode:
    def test_without_a_context(self):
        flow = make_flow(3, 4, [Natural(), Reversed()], "rank")
        every = states(3, 4)
        expected = every[flow.log_prob(every).argmax()]
        assert torch.equal(flow().mode, expected)
        assert torch.equal(flow.greedy(), expected)
        assert flow.greedy(length=2).shape == (2,)
        with pytest.raises(UserError, match="length is 5: give 1 to 4"):
            flow.greedy(length=5)

    def test_greedy_decoding_takes_the_most_likely_value_after_those_before(self):
        base = autoregressive_base(3, 4, Transformer(WIDTH, heads=2))
        flow = make_flow(3, 4, [Reversed()], base=base, backbone="causal")
        x = torch.zeros(1, 4, dtype=torch.long)
        for d in range(4):
            x[0, d] = base.conditioner(x)[0, d].argmax()
        assert torch.equal(flow.greedy(), flow.transforms[0](x)[0])
        with pytest.raises(UserError, match=r"takes a search over all events: use flow\.greedy"):
            _ = flow().mode

    def test_given_a_context_dimensions_are_independent_over_one_level(self):
        base = autoregressive_base(
            3,
            4,
            LSTM(WIDTH, bidirectional=True),
            Strided(columns=1),
            context=Context(2, aligned=True),
        )
        flow = make_flow(3, 4, [], base=base)
        context, every = torch.randn(5, 4, 2), states(3, 4)
        log_probs = flow.log_prob(every.unsqueeze(1).expand(-1, 5, -1), context)
        assert torch.equal(flow(context).mode, every[log_probs.argmax(0)])
        assert flow.passes == 1


class TestObject:
    @pytest.mark.parametrize("rule", RULES)
    def test_state_dict_pickle_and_copies_round_trip(self, rule):
        orderings = [Natural(), Strided(columns=3)]
        flow = make_flow(4, 5, orderings, rule=rule, backbone="causal-convolution").eval()
        other = make_flow(4, 5, orderings, rule=rule, backbone="causal-convolution").eval()
        shaken(other, 3)
        y = torch.randint(4, (20, 5))
        expected = flow.log_prob(y)
        assert not torch.allclose(other.log_prob(y), expected)
        other.load_state_dict(flow.state_dict())
        for same in (other, copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
            assert torch.equal(same.log_prob(y), expected)
            drawn = same.sample((5,), generator=torch.Generator().manual_seed(0))
            assert torch.equal(drawn, flow.sample((5,), generator=torch.Generator().manual_seed(0)))

    def test_state_dict_holds_parameters_and_fixed_choices_alone(self):
        flow = make_flow(4, 5, [Natural()], backbone="causal")
        buffers = set(flow.state_dict()) - {name for name, _ in flow.named_parameters()}
        assert buffers == {"base.groups"}
        flow.log_prob(torch.randint(4, (2, 5)))
        assert buffers == set(flow.state_dict()) - {name for name, _ in flow.named_parameters()}

    def test_repr_shows_the_structure(self):
        shown = repr(make_flow(4, 5, [Strided(columns=3)], "rank"))
        for part in ("FactorizedBase(num_classes=4", "RankPermutation(", "Strided(columns=3)"):
            assert part in shown

    def test_training_works_after_a_validation_in_inference_mode(self):
        flow, y = make_flow(4, 5, backbone="causal-convolution"), torch.randint(4, (6, 5))
        with torch.inference_mode():
            flow.log_prob(y)
            flow.sample((2,))
        flow.log_prob(y).sum().backward()


def test_the_first_parameter_may_be_a_scalar():
    class Tempered(AutoregressiveBase):
        def __init__(self):
            super().__init__(Conditioner(3, 4, Natural(), LSTM(width=4)))
            self.temperature = nn.Parameter(torch.tensor(1.0))

        def log_prob(self, x, context=None):
            logits = self.conditioner(x, context) / self.temperature
            return self.score(logits, x)

    flow = DiscreteFlow(Tempered(), bipartite(3, 4).transforms)
    assert not next(flow.parameters()).ndim
    flow.log_prob(states(3, 4)).mean().backward()
    assert flow.transforms[0].conditioner.head.bias.grad.abs().sum() > 0
