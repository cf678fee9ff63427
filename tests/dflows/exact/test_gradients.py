import copy

import pytest
import torch

from dflows import FactorizedBase
from dflows.errors import UserError
from dflows.exact import (
    compare_gradients,
    compare_objectives,
    expected_log_likelihood,
    states,
)
from dflows.gradients import PosteriorRule, ReinMax, SoftmaxStraightThrough
from dflows.objectives import EndToEnd, Local, OneAfterAnother
from dflows.orderings import Natural, Parity, Reversed
from dflows.records import METRICS
from tests.dflows.small import (
    OBJECTIVES,
    RULES,
    make_flow,
    prepared,
    random_probabilities,
)


def compare(rule=None, objective=None, bijection="shift", orderings=None, base=None, **options):
    flow = make_flow(3, 3, orderings or [Natural()], bijection, "causal", "reinmax", base=base)
    if base is not None:
        base.logits.data.copy_(torch.tensor([[30.0, 0.0, 0.0]]))
    with torch.no_grad():  # undecided: near a certain choice all gradients look alike
        for transform in flow.transforms:
            transform.conditioner.head.weight.mul_(0.1)
    named = {"one": (rule, objective or EndToEnd())}
    probabilities = random_probabilities(3, 3)
    return compare_objectives(flow, named, probabilities, **options)["one"]


class TestComparison:
    @pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
    def test_straight_through_is_exact_for_one_choice_next_to_the_base(self, temperature):
        one = compare(SoftmaxStraightThrough(temperature))
        assert (one.cosine, one.norm_ratio) == pytest.approx((1, 1), abs=1e-9)
        assert one.mixture_cosine < 0.999
        assert (one.num_samples, one.standard_error) == (1, 0)

    def test_of_two_choices_it_takes_the_other_as_made(self):
        assert compare(SoftmaxStraightThrough(1.0), bijection="affine").cosine < 0.99

    def test_the_posterior_rule_is_exact_for_the_mixture_next_to_the_base(self):
        one = compare(PosteriorRule())
        assert (one.mixture_cosine, one.mixture_norm_ratio) == pytest.approx((1, 1), abs=1e-9)
        assert one.cosine < 0.999

    @pytest.mark.parametrize("objective", [Local(), OneAfterAnother(Local(), EndToEnd())], ids=repr)
    def test_the_local_objective_is_that_of_the_mixture_on_a_base_of_class_0(self, objective):
        cold = SoftmaxStraightThrough(0.1)  # of no matter: it is no rule that trains
        one = compare(cold, objective, base=FactorizedBase(3, 3, sharing="levels"))
        assert (one.mixture_cosine, one.mixture_norm_ratio) == pytest.approx((1, 1), abs=1e-4)

    @pytest.mark.parametrize("bijection", ["shift", "affine"])
    def test_reinmax_is_unbiased_for_one_flow(self, bijection):
        one = compare(ReinMax(), bijection=bijection, num_samples=400, batches=2)
        assert one.num_samples == 400
        assert 0 < one.standard_error < 0.15
        assert abs(one.norm_ratio - 1) < 4 * one.standard_error
        assert 1 - one.cosine < 8 * one.standard_error**2

    def test_two_flows_bias_all_but_the_expectation(self):
        for rule in (SoftmaxStraightThrough(1.0), PosteriorRule()):
            one = compare(rule, orderings=[Natural(), Reversed()])
            assert one.cosine < 0.99
            assert one.mixture_cosine < 0.999

    def test_the_variance_is_that_of_independent_examples(self):
        flow = make_flow(3, 2, [Natural()], "shift", "causal", "posterior").double()
        probabilities = random_probabilities(3, 2)
        rows = []
        for y in states(3, 2):
            parameters = list(flow.transforms[0].conditioner.parameters())
            grads = torch.autograd.grad(
                flow.log_prob(y), parameters, allow_unused=True, materialize_grads=True
            )
            rows.append(torch.cat([grad.flatten() for grad in grads]))
        rows, weights = torch.stack(rows), probabilities.flatten()
        variance = weights @ rows.square().sum(-1) - (weights @ rows).square().sum()
        flow.zero_grad()
        (weights @ expected_log_likelihood(flow)).backward()
        size = sum(
            p.grad.square().sum()
            for p in flow.transforms[0].conditioner.parameters()
            if p.grad is not None
        )
        one = compare_gradients(flow, EndToEnd(), probabilities, batch_size=5, batches=600)
        assert one.variance == pytest.approx(float(variance / size) / 5, rel=0.15)
        half = compare_gradients(flow, EndToEnd(), probabilities, batch_size=10, batches=600)
        assert half.variance == pytest.approx(one.variance / 2, rel=0.2)

    @pytest.mark.parametrize(
        ("backbone", "sampled"),
        [
            ("causal", {"gumbel", "reinmax", "local-transforms"}),
            (
                "masked",
                {"gumbel", "reinmax", "local-transforms", "local-levels", "layerwise"}
                | {"local-expectation"},
            ),
        ],
    )
    def test_all_are_compared_at_the_same_parameters(self, backbone, sampled):
        flow = make_flow(3, 3, [Natural(), Parity()], backbone=backbone, rule="posterior")
        objectives = {name: (make(), EndToEnd()) for name, make in RULES.items()}
        objectives |= {name: (None, make()) for name, make in OBJECTIVES.items()}
        before, local = copy.deepcopy(flow), objectives["local"][1]
        state = torch.random.get_rng_state()
        probabilities = random_probabilities(3, 3)
        options = {"batch_size": 8, "num_samples": 3, "batches": 3}
        compared = compare_objectives(flow, objectives, probabilities, **options)
        assert torch.equal(state, torch.random.get_rng_state())
        assert compared.keys() == objectives.keys()
        assert {name for name, one in compared.items() if one.num_samples == 3} == sampled
        for one in compared.values():
            assert one.metrics.keys() <= METRICS.keys()
            assert one.variance > 0
        again = compare_gradients(flow, EndToEnd(), probabilities, **options)
        assert again == compared["posterior"] == compared["end-to-end"]
        for (name, one), other in zip(flow.named_parameters(), before.parameters(), strict=True):
            assert torch.equal(one, other), name
            assert one.grad is None
        assert flow.training
        assert not local.targets  # it is a copy that was prepared
        assert isinstance(flow.transforms[0].bijection.rule, PosteriorRule)

    @pytest.mark.parametrize("where", ["alone", "before another", "after another"])
    def test_a_trained_target_is_kept(self, where):
        stack, probabilities = [Natural(), Parity()], random_probabilities(3, 3)
        flow = make_flow(3, 3, stack, backbone="causal")
        options = {"batch_size": 8, "batches": 2}
        trained = local = prepared("local", flow)
        with torch.no_grad():
            for number, target in local.targets.items():
                target.copy_(torch.tensor([0.0, 1.0, -2.0]).roll(int(number)))
        if where != "alone":
            parts = (local, EndToEnd()) if where == "before another" else (EndToEnd(), local)
            trained = OneAfterAnother(*parts)
        new = {"local": (None, Local()), "end-to-end": (None, EndToEnd())}
        compared = compare_objectives(flow, new, probabilities, trained=trained, **options)
        assert compared["local"] == compare_gradients(flow, local, probabilities, **options)
        assert compared["local"] != compare_gradients(flow, Local(), probabilities, **options)

    def test_what_cannot_be_compared_is_refused(self):
        flow = make_flow(3, 3)
        with pytest.raises(UserError, match=r"those of 9 states, and the flow has 27.*\(3,\) \* 3"):
            compare_gradients(flow, EndToEnd(), random_probabilities(3, 2))
        flat = copy.deepcopy(flow)
        flat.base.logits.data.zero_()
        with pytest.raises(UserError, match="exact gradient is 0"):
            compare_gradients(flat, EndToEnd(), random_probabilities(3, 3))
        rank = make_flow(3, 3, bijection="rank")
        for name in RULES:
            named = {name: (RULES[name](), EndToEnd())}
            with pytest.raises(UserError, match="RankPermutation"):
                compare_objectives(rank, named, random_probabilities(3, 3))
