import pytest
import torch
from torch import nn

from dflows import DiscreteFlow, FactorizedBase, PermutationTransform
from dflows.backbones import DilatedConvolution
from dflows.bijections import ModularAffine, ModularShift, RankPermutation
from dflows.errors import UserError
from dflows.estimators import (
    GumbelStraightThrough,
    JointInTurn,
    LocalInTurn,
    LocalObjective,
    LocalThenJoint,
    PosteriorRule,
    ReinMax,
    SoftmaxStraightThrough,
)
from dflows.modular import affine_inverse, units
from dflows.orderings import Natural, Parity, Strided
from dflows.transforms import ConditionalTransform
from tests.dflows.small import (
    ESTIMATORS,
    OF_A_SOFTMAX,
    assert_gradients_close,
    expectation,
    gradients,
    make_flow,
    shaken,
    skip_refused,
    states,
)

STACK = [Strided(columns=3), Natural(), Parity(first=1)]


class TestStraightThrough:
    @pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
    def test_the_gradient_is_that_of_a_softmax(self, temperature):
        logits = torch.randn(6, 3, 5, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(6, 3, 5, dtype=torch.float64)
        hard, ladj = SoftmaxStraightThrough(temperature).choose(logits, torch.zeros(6))
        p = (logits / temperature).softmax(-1)
        expected = p * (weight - (p * weight).sum(-1, keepdim=True)) / temperature
        (grad,) = torch.autograd.grad((hard * weight).sum(), logits)
        torch.testing.assert_close(grad, expected)
        assert torch.equal(hard, nn.functional.one_hot(logits.argmax(-1), 5).double())
        assert (ladj == 0).all()

    def test_the_expected_log_likelihood_is_what_it_ascends(self):
        # Of one flow next to the base: the gradient of the mean of log p over the choices.
        flow = make_flow(orderings=[Parity()], bijection="shift", estimator="straight-through")
        flow.transforms[0].estimator.temperature = 1.0
        y = torch.randint(3, (7, 4))
        flow.log_prob(y).sum().backward()
        actual = gradients(flow.transforms[0])
        _mixture(flow, y, of_logs=True).backward()
        assert_gradients_close(actual, gradients(flow.transforms[0]))

    @pytest.mark.parametrize("temperature", [0, -1.0])
    @pytest.mark.parametrize("estimator", [SoftmaxStraightThrough, GumbelStraightThrough, ReinMax])
    def test_a_temperature_that_is_not_positive_is_refused(self, estimator, temperature):
        with pytest.raises(UserError, match="positive"):
            estimator(temperature)


def _mixture(flow, y, of_logs=False):
    """The log-likelihood of the mixture over the choices of one flow next to the base, summed.

    Locations are mixed at the chosen scale, and scales at the chosen location. With `of_logs` it is
    the mean log-likelihood instead.
    """
    (transform,) = flow.transforms
    num_classes = flow.num_classes
    logits = transform.conditioner(y)
    total = logits.new_zeros(())
    levels = transform.ordering.levels(y.shape[1])
    for d in (levels > 0).nonzero().squeeze(-1).tolist():
        base = flow.base.log_prob(
            torch.arange(num_classes).unsqueeze(-1).expand(-1, y.shape[1])
        ).detach()[:, d]
        theta, choices = logits[:, d], y[:, d, None]
        if isinstance(transform.bijection, ModularShift):
            parts = [(theta, (choices - torch.arange(num_classes)) % num_classes)]
        else:
            modulus = transform.bijection.modulus
            locs, unit = torch.arange(modulus), units(modulus)
            of_loc, of_scale = theta[:, :modulus], theta[:, modulus:][:, unit]
            loc, scale = of_loc.argmax(-1, True), unit[of_scale.argmax(-1, True)]
            options = {"num_classes": num_classes, "modulus": modulus}
            parts = [
                (of_loc, affine_inverse(choices, locs, scale, **options)),
                (of_scale, affine_inverse(choices, loc, unit, **options)),
            ]
        for chosen, x in parts:
            if of_logs:
                total = total + (chosen.softmax(-1) * base[x]).sum()
            else:
                total = total + (chosen.log_softmax(-1) + base[x]).logsumexp(-1).sum()
    return total


class TestPosteriorRule:
    def test_the_gradient_is_the_posterior_less_the_prior(self):
        logits = torch.randn(6, 3, 5, dtype=torch.float64, requires_grad=True)
        log_likelihood = torch.randn(6, 3, 5, dtype=torch.float64)
        c = torch.randn(6, dtype=torch.float64)
        c[2] = 0
        hard, ladj = PosteriorRule().choose(logits, torch.zeros(6, dtype=torch.float64))
        log_prob = (hard * log_likelihood).sum((-1, -2)) + ladj
        (grad,) = torch.autograd.grad((c * log_prob).sum(), logits)
        difference = (logits + log_likelihood).softmax(-1) - logits.softmax(-1)
        torch.testing.assert_close(grad, c[:, None, None] * difference)

    @pytest.mark.parametrize("ordering", [Parity(), Natural(), Strided(columns=3)], ids=str)
    @pytest.mark.parametrize("bijection", ["shift", "affine", "affine-prime"])
    @pytest.mark.parametrize("backbone", ["causal", "masked"])
    @pytest.mark.parametrize("num_classes", [3, 4])
    def test_next_to_the_base_it_is_the_true_gradient_of_the_mixture(
        self, ordering, bijection, backbone, num_classes
    ):
        flow = make_flow(num_classes, 4, [ordering], bijection, "posterior", backbone)
        y = torch.randint(num_classes, (7, 4))
        flow.log_prob(y).sum().backward()
        actual = gradients(flow.transforms[0])
        _mixture(flow, y).backward()
        assert_gradients_close(actual, gradients(flow.transforms[0]), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("bijection", ["shift", "affine"])
    def test_means_accumulation_and_loss_scaling_scale_it_and_nothing_else(self, bijection):
        flow = make_flow(5, 4, bijection=bijection, estimator="posterior").double()
        y = torch.randint(5, (8, 4))
        (-flow.objective(y).sum()).backward()
        plain = gradients(flow)
        for factor, losses in (
            (1 / 8, [-flow.objective(y).mean()]),  # a batch mean
            (1 / 8, [-flow.objective(part).mean() / 4 for part in y.split(2)]),  # accumulation
            (1024.0, [-1024 * flow.objective(y).sum()]),  # loss scaling
            (-0.3, [0.3 * flow.objective(y).sum()]),  # descent in place of ascent
        ):
            for loss in losses:
                loss.backward()
            scaled = {name: grad / factor for name, grad in gradients(flow).items()}
            assert_gradients_close(scaled, plain, rtol=1e-5, atol=1e-7)

    def test_weights_of_examples_weigh_their_gradients(self):
        flow = make_flow(5, 4, estimator="posterior").double()
        y, weight = torch.randint(5, (3, 4)), torch.tensor([0.5, 0.0, 3.0])
        (flow.objective(y) * weight).sum().backward()
        actual = gradients(flow)
        for row, factor in zip(y, weight, strict=True):
            if factor:
                (factor * flow.objective(row)).backward()
        assert_gradients_close(actual, gradients(flow), rtol=1e-6, atol=1e-8)

    @pytest.mark.parametrize("name", sorted(OF_A_SOFTMAX))
    def test_what_does_not_choose_by_a_softmax_is_refused(self, name):
        estimator = ESTIMATORS[name]()
        with pytest.raises(UserError, match=r"softmax, and RankPermutation.*LocalObjective"):
            ConditionalTransform(4, RankPermutation(3), Parity(), DilatedConvolution(8), estimator)


def _through(p, grad):
    """The gradient of the logits of a softmax p, where that of its value is given."""
    return p * (grad - (p * grad).sum(-1, keepdim=True))


class TestDrawnMaps:
    @pytest.mark.parametrize("estimator", [GumbelStraightThrough, ReinMax])
    def test_it_draws_from_the_softmax_in_training_mode_alone(self, estimator):
        logits = torch.randn(1, 4).expand(40_000, 1, 4)
        estimator = estimator()
        torch.manual_seed(1)
        drawn, ladj = estimator.choose(logits, torch.zeros(40_000))
        assert torch.equal(drawn.sum(-1), torch.ones(40_000, 1))
        torch.testing.assert_close(drawn.mean(0), logits[0].softmax(-1), atol=0.01, rtol=0)
        assert (ladj == 0).all()
        chosen, _ = estimator.eval().choose(logits, torch.zeros(40_000))
        assert torch.equal(chosen.argmax(-1), logits.argmax(-1))

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
    def test_gumbel_softmax_has_the_gradient_of_the_perturbed_softmax(self, temperature):
        logits = torch.randn(6, 3, 5, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(6, 3, 5, dtype=torch.float64)
        torch.manual_seed(1)
        hard, _ = GumbelStraightThrough(temperature).choose(logits, torch.zeros(6))
        (grad,) = torch.autograd.grad((hard * weight).sum(), logits)
        torch.manual_seed(1)
        perturbed = logits - torch.empty_like(logits).exponential_().log()
        assert torch.equal(hard.argmax(-1), perturbed.argmax(-1))
        p = (perturbed / temperature).softmax(-1)
        torch.testing.assert_close(grad, _through(p, weight) / temperature)

    def test_gumbel_softmax_is_unbiased_for_linear_functions_as_the_temperature_falls(self):
        logits = torch.randn(5, dtype=torch.float64)
        weight = torch.randn(5, dtype=torch.float64)
        exact = _through(logits.softmax(-1), weight)
        torch.manual_seed(1)
        distances = []
        for temperature in (3.0, 0.1):
            many = logits.expand(200_000, 1, 5).requires_grad_()
            hard, _ = GumbelStraightThrough(temperature).choose(many, torch.zeros(len(many)))
            (grad,) = torch.autograd.grad((hard * weight).sum(), many)
            distances.append(float((grad.mean((0, 1)) - exact).norm() / exact.norm()))
        assert distances[1] < 0.03 < distances[0]

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
    def test_reinmax_has_its_formula(self, temperature):
        logits = torch.randn(6, 3, 5, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(6, 3, 5, dtype=torch.float64)
        hard, _ = ReinMax(temperature).choose(logits, torch.zeros(6))
        (grad,) = torch.autograd.grad((hard * weight).sum(), logits)
        # Algorithm 2 of the paper, as it stands there, by automatic differentiation.
        p0 = logits.softmax(-1)
        p1 = (hard.detach() + (logits / temperature).softmax(-1)) / 2
        p1 = ((p1.log() - logits).detach() + logits).softmax(-1)
        (expected,) = torch.autograd.grad(((2 * p1 - p0 / 2) * weight).sum(), logits)
        torch.testing.assert_close(grad, expected)

    @pytest.mark.parametrize("degree", [1, 2, 3])
    def test_reinmax_is_unbiased_up_to_quadratic_functions(self, monkeypatch, degree):
        # The expectation over the choice, by enumeration.
        logits = torch.randn(4, dtype=torch.float64, requires_grad=True)
        form = torch.randn(*[4] * degree, dtype=torch.float64)

        def f(one_hot):
            value = form
            for _ in range(degree):
                value = value @ one_hot
            return value

        p = logits.softmax(-1)
        choices = torch.eye(4, dtype=torch.float64)
        exact = torch.autograd.grad(sum(p[k] * f(choices[k]) for k in range(4)), logits)[0]
        mean = torch.zeros(4, dtype=torch.float64)
        for k in range(4):
            noise = torch.where(choices[k] > 0, 1e-9, 1e9)
            monkeypatch.setattr(torch.Tensor, "exponential_", lambda self, n=noise: self.copy_(n))
            hard, _ = ReinMax().choose(logits.expand(1, 4), torch.zeros(()))
            assert torch.equal(hard[0], choices[k])
            mean += p[k].detach() * torch.autograd.grad(f(hard[0]), logits)[0]
        assert torch.allclose(mean, exact, rtol=1e-9, atol=1e-9) == (degree < 3)

    @pytest.mark.parametrize("name", ["gumbel", "reinmax"])
    @pytest.mark.parametrize("backbone", ["causal", "masked"])
    def test_the_objective_is_that_of_drawn_maps_and_log_prob_that_of_the_chosen(
        self, name, backbone
    ):
        flow = make_flow(4, 5, STACK, estimator=name, backbone=backbone)
        y = torch.randint(4, (20, 5))
        with torch.no_grad():
            exact = flow.log_prob(y)
        assert torch.equal(flow.log_prob(y), exact)
        first, second = flow.objective(y), flow.objective(y)
        assert not torch.equal(first, second)
        torch.manual_seed(1)
        flow.log_prob(y).sum().backward()
        one = gradients(flow)
        torch.manual_seed(1)
        flow.objective(y).sum().backward()
        assert_gradients_close(one, gradients(flow))
        torch.testing.assert_close(flow.eval().objective(y), exact)

    @pytest.mark.parametrize("name", ["gumbel", "reinmax"])
    def test_a_mean_over_draws_is_the_expected_log_likelihood(self, name):
        flow = make_flow(3, 4, [Parity()], "shift", name)
        y = torch.randint(3, (5, 4))
        torch.manual_seed(1)
        with torch.no_grad():
            expected = _mixture(flow, y, of_logs=True)
            untouched = flow.base.log_prob(y)[:, [0, 2]].sum()
        drawn = flow.objective(y.expand(20_000, 5, 4)).mean(0).sum().detach()
        torch.testing.assert_close(drawn, expected + untouched, rtol=0, atol=0.05)


class TestLocalInTurn:
    @pytest.mark.parametrize("where", [0, 1, 3])
    @pytest.mark.parametrize("backbone", ["causal", "masked"])
    def test_one_flow_learns_as_by_the_local_objective_and_the_base(
        self, monkeypatch, where, backbone
    ):
        y = torch.randint(4, (6, 5))
        options = {"num_classes": 4, "length": 5, "orderings": STACK, "backbone": backbone}
        results = []
        for name in ("in-turn", "local"):
            stack = list(make_flow(estimator=name, **options).transforms)
            stack.insert(where, PermutationTransform([2, 0, 3, 1, 4]))
            results.append(shaken(DiscreteFlow(FactorizedBase(4, 5, STACK), stack)))
        flow, whole = results
        (-whole.objective(y).mean()).backward()
        expected = gradients(whole)
        for step in range(4):
            flow.at_step(step)

            def run():
                objective = flow.objective(y)
                (-objective.mean()).backward()
                return {"value": objective.detach()} | gradients(flow)

            mean = expectation(monkeypatch, run)  # of a masked backbone a level is drawn
            torch.testing.assert_close(mean.pop("value"), flow.log_prob(y).detach())
            turn = flow.conditional_transforms[2 - min(step, 2)]
            learns = next(f"{n}." for n, part in flow.named_modules() if part is turn)
            for name, grad in mean.items():
                if name.startswith(("base", learns)):
                    torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6)
                else:
                    assert not grad.any(), name  # and there: distributed training awaits it

    def test_equal_parts_of_the_training(self):
        y = torch.randint(4, (6, 5))
        stack = make_flow(4, 5, STACK, backbone="causal").transforms
        for transform in stack:
            transform.train_by(LocalInTurn())
        flow = DiscreteFlow(FactorizedBase(4, 5, STACK), stack)
        with pytest.raises(UserError, match=r"how much of it is done is not known: call at_step"):
            flow.objective(y)
        flows = flow.conditional_transforms[::-1]
        for progress, turn in ((0.0, 0), (0.33, 0), (0.34, 1), (0.67, 2), (1.0, 2)):
            flow.at_step(7, progress)
            assert flow.waiting == [each for each in flows if each is not flows[turn]]
        flow.objective(y)

    def test_one_flow_alone_is_trained_as_ever(self):
        y = torch.randint(4, (6, 5))
        flow = make_flow(4, 5, [Natural()], estimator="in-turn", backbone="causal")
        (-flow.objective(y).mean()).backward()
        actual = gradients(flow)
        (-_local_loss(flow, y).mean()).backward()
        assert_gradients_close(actual, gradients(flow), rtol=1e-4, atol=1e-6)

    def test_what_does_not_stand_in_a_row_is_refused(self):
        with pytest.raises(UserError, match="at least 1"):
            LocalInTurn(0)
        shared = DilatedConvolution(8)
        transforms = [
            ConditionalTransform(4, RankPermutation(3), Parity(), shared, LocalInTurn(5))
            for _ in range(2)
        ]
        with pytest.raises(UserError, match="share a backbone"):
            DiscreteFlow(FactorizedBase(3, 4), transforms)
        for other in (LocalInTurn(6), LocalInTurn(), JointInTurn(5)):
            transforms[0].train_by(other)
            with pytest.raises(UserError, match=r"take turns as .* and as LocalInTurn\(steps="):
                DiscreteFlow(FactorizedBase(3, 4), transforms)
        transforms[0].train_by(LocalObjective())
        with pytest.raises(UserError, match="every one LocalInTurn, or none"):
            DiscreteFlow(FactorizedBase(3, 4), transforms)


class TestLocalThenJoint:
    def test_it_is_one_and_then_the_other(self):
        y = torch.randint(4, (6, 5))
        options = {"num_classes": 4, "length": 5, "orderings": STACK, "backbone": "causal"}
        flow = make_flow(estimator="local-then-joint", **options)
        exact = flow.log_prob(y)
        for step, name in ((0, "local"), (1, "posterior"), (7, "posterior"), (0, "local")):
            flow.at_step(step)
            other = make_flow(estimator=name, **options)
            other.load_state_dict(flow.state_dict(), strict=False)
            torch.testing.assert_close(flow.log_prob(y), exact)
            for each in (flow, other):
                each.objective(y).sum().backward()
            expected, actual = gradients(other), gradients(flow)
            for target in actual.keys() - expected.keys():
                # A target that is not used is trained to stay: distributed training awaits it.
                assert not actual.pop(target).any()
            assert_gradients_close(actual, expected)

    @pytest.mark.parametrize("joint", [GumbelStraightThrough, ReinMax])
    def test_the_likelihood_is_exact_while_maps_are_drawn(self, joint):
        transforms = [
            ConditionalTransform(
                4, ModularAffine(3), ordering, DilatedConvolution(8), LocalThenJoint(2, joint())
            )
            for ordering in (Natural(), Parity())
        ]
        flow = shaken(DiscreteFlow(FactorizedBase(3, 4), transforms)).train()
        y = states(3, 4)
        with torch.no_grad():
            exact = flow.log_prob(y)
        torch.testing.assert_close(exact.exp().sum(), torch.tensor(1.0))
        torch.testing.assert_close(flow.objective(y), exact)
        flow.at_step(2)
        torch.testing.assert_close(flow.log_prob(y), exact)
        assert (flow.objective(y) - exact).abs().max() > 0.1

    @pytest.mark.parametrize("draw", ["level", "flow"])
    def test_it_draws_what_the_local_objective_draws(self, draw):
        orderings = [Natural(), Parity()]
        transforms = [
            ConditionalTransform(
                4, ModularAffine(3), ordering, DilatedConvolution(8), LocalThenJoint(3, draw=draw)
            )
            for ordering in orderings
        ]
        flow = shaken(DiscreteFlow(FactorizedBase(3, 4, orderings), transforms))
        y = torch.randint(3, (9, 4))
        exact = flow.log_prob(y)
        assert not torch.equal(flow.objective(y), exact)
        flow.at_step(3)
        torch.testing.assert_close(flow.objective(y), exact)

    def test_steps_are_not_negative_and_what_is_joint_hands_a_gradient_on(self):
        with pytest.raises(UserError, match="at least 0"):
            LocalThenJoint(-1)
        with pytest.raises(UserError, match="LocalObjective, which hands no gradient"):
            LocalThenJoint(1, LocalObjective())
        with pytest.raises(UserError, match="'all', 'level' or 'flow'"):
            LocalThenJoint(1, draw="levels")

    def test_ranks_can_be_trained_by_a_joint_estimator_of_theirs(self):
        LocalThenJoint(1, SoftmaxStraightThrough()).check(RankPermutation(3))


def _local_loss(flow, y):
    """The sum of the flows' own likelihoods and the base's, with no gradient between them."""
    total = torch.zeros(len(y))
    for transform in reversed(flow.transforms):
        dimensions = (transform.ordering.levels(y.shape[1]) > 0).nonzero().squeeze(-1)
        target = None if transform.target is None else transform.target.log_softmax(-1)
        logits = transform.conditioner(y)[:, dimensions]
        local = transform.bijection.local_log_likelihood(y[:, dimensions], logits, target)
        total = total + local.sum(-1)
        with torch.no_grad():
            y = transform.inv(y)
    return total + flow.base.log_prob(y).sum(-1)


class TestLocalObjective:
    @pytest.mark.parametrize("bijection", ["shift", "affine", "affine-prime", "rank"])
    @pytest.mark.parametrize("backbone", ["causal", "masked"])
    def test_the_gradient_is_that_of_the_plain_local_loss(self, bijection, backbone):
        flow = make_flow(4, 5, STACK, bijection, "local", backbone)
        y = torch.randint(4, (6, 5))
        for method in (flow.objective, flow.log_prob):
            (-method(y).mean()).backward()
            actual = gradients(flow)
            (-_local_loss(flow, y).mean()).backward()
            assert_gradients_close(actual, gradients(flow), rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("estimator", ["one-level", "one-flow"])
    @pytest.mark.parametrize("bijection", ["affine", "rank"])
    @pytest.mark.parametrize("stack", [STACK[:1], STACK[:2], STACK[2:]], ids=str)
    def test_drawn_levels_and_flows_are_unbiased(self, monkeypatch, estimator, bijection, stack):
        drawn = make_flow(3, 4, stack, bijection, estimator)
        whole = make_flow(3, 4, stack, bijection, "local")
        y = torch.randint(3, (5, 4))

        def value_and_gradients(flow):
            objective = flow.objective(y)
            objective.sum().backward()
            zeros = {n: torch.zeros_like(p) for n, p in flow.named_parameters()}
            return {"value": objective.detach()} | zeros | gradients(flow)

        mean = expectation(monkeypatch, lambda: value_and_gradients(drawn))
        expected = value_and_gradients(whole)
        assert_gradients_close(mean, expected, rtol=1e-4, atol=1e-5)

    def test_a_level_causal_flow_needs_no_drawn_levels(self):
        drawn = make_flow(3, 4, STACK[:2], estimator="one-level", backbone="causal")
        y = torch.randint(3, (5, 4))
        assert torch.equal(drawn.objective(y), drawn.log_prob(y))
        assert not drawn.transforms[0].draws_levels

    def test_what_it_draws_is_one_of_three(self):
        assert "draw='level'" in repr(LocalObjective("level"))
        with pytest.raises(UserError, match="'all', 'level' or 'flow'"):
            LocalObjective("levels")

    def test_a_stack_draws_flows_for_all_or_none(self):
        estimators = [LocalObjective("flow"), LocalObjective("level")]
        transforms = [
            ConditionalTransform(4, RankPermutation(3), Parity(), DilatedConvolution(8), estimator)
            for estimator in estimators
        ]
        with pytest.raises(UserError, match="or none"):
            DiscreteFlow(FactorizedBase(3, 4), transforms)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("bijection", [ModularShift, ModularAffine, RankPermutation])
class TestEach:
    def test_log_determinants_are_zero_and_values_plain(self, name, bijection):
        skip_refused(name, bijection)
        estimator, bijection = ESTIMATORS[name]().eval(), bijection(4)
        logits = torch.randn(6, 3, bijection.num_logits, requires_grad=True)
        y = torch.randint(4, (6, 3))
        one_hot = nn.functional.one_hot(y, 4).float()
        target = torch.randn(4).log_softmax(-1)
        x, ladj = estimator.inverse(bijection, one_hot, logits, torch.zeros(6), target)
        assert torch.equal(x.argmax(-1), bijection.inverse(y, logits))
        assert torch.equal(x, x.round())
        assert torch.equal(ladj, torch.zeros(6))
        back, ladj = estimator.forward_map(bijection, x, logits, torch.zeros(6))
        assert torch.equal(back, one_hot)
        assert torch.equal(ladj, torch.zeros(6))

    def test_logits_learn(self, name, bijection):
        skip_refused(name, bijection)
        estimator, bijection = ESTIMATORS[name](), bijection(4)
        logits = torch.zeros(1, 1, bijection.num_logits) + bijection.initial_logits()
        logits = logits.requires_grad_()
        base = torch.tensor([0.6, 0.2, 0.15, 0.05]).log()
        y = torch.tensor([[2]])
        value = y if not estimator.through else nn.functional.one_hot(y, 4).float()
        optimizer = torch.optim.SGD([logits], lr=0.3)
        torch.manual_seed(0)
        for _ in range(60):
            x, ladj = estimator.inverse(bijection, value, logits, torch.zeros(1), base)
            score = base[x] if not estimator.through else (x * base).sum(-1)
            loss = -(score.sum() + ladj.sum())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert bijection.inverse(y, logits).item() == 0  # the value has moved to the base's peak


def test_the_rule_is_exact_over_all_states_of_a_base_of_positions():
    # The same by enumeration: one location for all of a dimension, no network in between.
    flow = make_flow(3, 2, [Parity()], "shift", "posterior")
    y = states(3, 2)
    flow.log_prob(y).sum().backward()
    actual = gradients(flow.transforms[0])
    _mixture(flow, y).backward()
    assert_gradients_close(actual, gradients(flow.transforms[0]), rtol=1e-4, atol=1e-5)
