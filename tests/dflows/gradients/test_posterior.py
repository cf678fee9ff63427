"""The posterior rule, and the weights of examples that it is told."""

from itertools import product

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dflows import modular
from dflows.bijections import ModularAffine, ModularShift
from dflows.errors import UserError
from dflows.gradients import PosteriorRule, example_weights
from tests.dflows.bijections.cases import OF_A_SOFTMAX, one_hot

each_bijection = pytest.mark.parametrize("name", OF_A_SOFTMAX)


class Flow(torch.nn.Module):
    """Transforms of all dimensions, given the sum of the one-hot vectors, over a factorized base.

    It is no flow, but has the graph of one: the logits of a transform depend on values.
    """

    def __init__(self, name, num_classes=5, length=4, num_transforms=2):
        super().__init__()
        self.bijections = torch.nn.ModuleList(
            OF_A_SOFTMAX[name](num_classes, rule=PosteriorRule()) for _ in range(num_transforms)
        )
        size = self.bijections[0].num_logits
        self.networks = torch.nn.ParameterList(
            torch.randn(num_classes, length, size) for _ in range(num_transforms)
        )
        self.base = torch.nn.Parameter(torch.randn(length, num_classes))
        self.num_classes = num_classes
        self.double()

    def forward(self, y, checkpointed=False):
        value = one_hot(y, self.num_classes, torch.float64)
        shape = value.shape[:-2]
        value = value.flatten(0, -3) if shape else value.unsqueeze(0)
        with example_weights() as weights:
            for bijection, network in zip(self.bijections, self.networks, strict=True):

                def transform(value, bijection=bijection, network=network):
                    logits = torch.einsum("ndk,kem->nem", value, network)
                    return bijection.inverse(value, logits)

                if checkpointed:
                    value = checkpoint(transform, value, use_reentrant=False)
                else:
                    value = transform(value)
            log_prob = (value * self.base.log_softmax(-1)).sum((-1, -2)).reshape(shape)
            return weights(log_prob)


def gradients(flow):
    taken = {name: parameter.grad.clone() for name, parameter in flow.named_parameters()}
    flow.zero_grad(set_to_none=True)
    return taken


def assert_close(one, other, **tolerances):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **tolerances)


class TestRule:
    @pytest.mark.parametrize("weighted", [False, True])
    def test_the_gradient_is_the_posterior_less_the_prior(self, weighted):
        logits = torch.randn(6, 3, 5, dtype=torch.float64, requires_grad=True)
        log_likelihood = torch.randn(6, 3, 5, dtype=torch.float64)
        c = torch.randn(6, dtype=torch.float64)
        c[2] = 0
        if not weighted:
            c = torch.ones(6, dtype=torch.float64)
            log_prob = (PosteriorRule()(logits) * log_likelihood).sum((-1, -2))
        else:
            with example_weights() as weights:
                log_prob = weights((PosteriorRule()(logits) * log_likelihood).sum((-1, -2)))
        (grad,) = torch.autograd.grad((c * log_prob).sum(), logits)
        difference = (logits + log_likelihood).softmax(-1) - logits.softmax(-1)
        torch.testing.assert_close(grad, c[:, None, None] * difference)

    @pytest.mark.parametrize("num_classes", [3, 4])
    @pytest.mark.parametrize("kind", ["shift", "affine", "affine-prime"])
    @pytest.mark.parametrize("reduce", [torch.sum, torch.mean], ids=["sum", "mean"])
    def test_next_to_the_base_it_is_the_true_gradient_of_the_mixture(
        self, kind, num_classes, reduce
    ):
        bijection = OF_A_SOFTMAX[kind](num_classes, rule=PosteriorRule())
        size = (7, 2, bijection.num_logits)
        logits = torch.randn(size, dtype=torch.float64, requires_grad=True)
        base = torch.randn(2, num_classes, dtype=torch.float64).log_softmax(-1)
        y = torch.randint(num_classes, (7, 2))
        with example_weights() as weights:
            x = bijection.inverse(one_hot(y, num_classes, torch.float64), logits)
            log_prob = weights((x * base).sum((-1, -2)))
        (actual,) = torch.autograd.grad(reduce(log_prob), logits)
        expected = reduce(mixture(bijection, y, logits, base))
        torch.testing.assert_close(actual, torch.autograd.grad(expected, logits)[0])

    def test_it_is_exact_over_all_states(self):
        # One location for all of a dimension, no network in between; all states as data.
        shift = ModularShift(3, PosteriorRule())
        logits = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
        base = torch.randn(2, 3, dtype=torch.float64).log_softmax(-1)
        y = torch.tensor(list(product(range(3), repeat=2)))
        with example_weights() as weights:
            x = shift.inverse(one_hot(y, 3, torch.float64), logits.expand(9, 2, 3))
            log_prob = weights((x * base).sum((-1, -2)))
        (actual,) = torch.autograd.grad(log_prob.sum(), logits)
        expected = mixture(shift, y, logits.expand(9, 2, 3), base).sum()
        torch.testing.assert_close(actual, torch.autograd.grad(expected, logits)[0])


def mixture(bijection, y, logits, base):
    """The log-likelihood (N,) of the mixture over the choices of one transform next to the base.

    Locations are mixed at the chosen scale, and scales at the chosen location.
    """
    num_classes, choices = bijection.num_classes, y.unsqueeze(-1)
    if isinstance(bijection, ModularAffine):
        modulus = bijection.modulus
        locs, units = torch.arange(modulus), modular.units(modulus)
        of_loc, of_scale = logits[..., :modulus], logits[..., modulus:][..., units]
        loc, scale = of_loc.argmax(-1, True), units[of_scale.argmax(-1, True)]
        options = {"num_classes": num_classes, "modulus": modulus}
        parts = [
            (of_loc, modular.affine_inverse(choices, locs, scale, **options)),
            (of_scale, modular.affine_inverse(choices, loc, units, **options)),
        ]
    else:
        parts = [(logits, (choices - torch.arange(num_classes)) % num_classes)]
    total = 0
    for chosen, x in parts:
        likelihoods = base.expand(*y.shape, num_classes).gather(-1, x)
        total = total + (chosen.log_softmax(-1) + likelihoods).logsumexp(-1).sum(-1)
    return total


@each_bijection
class TestWeights:
    def test_means_accumulation_and_loss_scaling_scale_gradients_and_nothing_else(self, name):
        flow, y = Flow(name), torch.randint(5, (8, 4))
        (-flow(y).sum()).backward()
        plain = gradients(flow)
        for factor, losses in (
            (1 / 8, [-flow(y).mean()]),  # a batch mean
            (1 / 8, [-flow(part).mean() / 4 for part in y.split(2)]),  # accumulation
            (1024.0, [-1024 * flow(y).sum()]),  # loss scaling
            (-0.3, [0.3 * flow(y).sum()]),  # descent in place of ascent
            (1.0, [-flow(y.reshape(2, 4, 4)).sum()]),  # batch dimensions
            (0.5, [-0.5 * flow(row) for row in y]),  # single examples
        ):
            for loss in losses:
                loss.backward()
            scaled = {key: grad / factor for key, grad in gradients(flow).items()}
            assert_close(scaled, plain)

    def test_weights_of_examples_weigh_their_gradients(self, name):
        flow, y = Flow(name), torch.randint(5, (4, 4))
        weight = torch.tensor([0.5, 0.0, 3.0, -2.0])
        (flow(y) * weight).sum().backward()
        actual = gradients(flow)
        for row, factor in zip(y, weight, strict=True):
            (factor * flow(row)).backward()
        assert_close(actual, gradients(flow))

    def test_an_example_that_is_left_out_weighs_nothing(self, name):
        flow, y = Flow(name), torch.randint(5, (4, 4))
        flow(y)[[0, 3]].sum().backward()
        actual = gradients(flow)
        flow(y[[0, 3]]).sum().backward()
        assert_close(actual, gradients(flow))

    def test_every_backward_pass_through_one_graph_has_weights_of_its_own(self, name):
        flow, y = Flow(name), torch.randint(5, (4, 4))
        weights = [torch.randn(4), torch.zeros(4), torch.randn(4)]
        log_prob = flow(y)
        for weight in weights:
            (log_prob * weight).sum().backward(retain_graph=True)
            again = gradients(flow)
            (flow(y) * weight).sum().backward()
            assert_close(again, gradients(flow))

    def test_evaluations_do_not_hear_of_each_other(self, name):
        flow, y = Flow(name), torch.randint(5, (8, 4))
        first, second = flow(y[:4]), flow(y[4:])  # both graphs are made before either is used
        (2 * second.sum() - first.mean()).backward()
        actual = gradients(flow)
        (2 * flow(y[4:]).sum()).backward()
        (-flow(y[:4]).mean()).backward()
        assert_close(actual, gradients(flow))

    def test_checkpointing_changes_nothing(self, name):
        flow, y = Flow(name), torch.randint(5, (8, 4))
        for weight in (torch.randn(8), torch.zeros(8)):
            (flow(y) * weight).sum().backward()
            plain = gradients(flow)
            (flow(y, checkpointed=True) * weight).sum().backward()
            assert_close(gradients(flow), plain)
            # Forgotten and computed anew as a whole.
            (checkpoint(flow, y, use_reentrant=False) * weight).sum().backward()
            assert_close(gradients(flow), plain)

    def test_the_log_likelihood_is_what_it_was(self, name):
        flow, y = Flow(name), torch.randint(5, (8, 4))
        log_prob = flow(y)
        with torch.no_grad():
            assert torch.equal(flow(y), log_prob)


def test_what_reads_only_the_residuals_weighs_nothing():
    rule, logits = PosteriorRule(), torch.randn(3, 2, 4, requires_grad=True)
    with example_weights() as weights:
        one_hot_vectors = rule(logits)
        log_prob = weights(one_hot_vectors.sum((-1, -2)))
    log_prob.sum().backward(retain_graph=True)
    logits.grad = None
    (one_hot_vectors * torch.randn(4)).sum().backward()
    assert not logits.grad.any()


def test_rules_that_do_not_ask_leave_the_log_likelihoods_alone():
    with example_weights() as weights:
        log_prob = torch.randn(3)
        assert weights(log_prob) is log_prob


def test_evaluations_may_be_nested_and_end_with_an_error():
    rule = PosteriorRule()
    outer, inner = (torch.randn(3, 2, 4, requires_grad=True) for _ in range(2))

    def fail():
        with example_weights():
            rule(inner)
            raise RuntimeError("on purpose")

    with example_weights() as of_outer:
        first = rule(outer)
        with example_weights() as of_inner:
            inside = of_inner(rule(inner).sum((-1, -2)))
        with pytest.raises(RuntimeError, match="on purpose"):
            fail()
        log_prob = of_outer((first * torch.randn(4)).sum((-1, -2)))
    inside.sum().backward()
    assert outer.grad is None
    log_prob.sum().backward()
    assert outer.grad.any()


def test_other_numbers_of_examples_within_one_evaluation_are_refused():
    rule = PosteriorRule()
    with example_weights() as weights:
        rule(torch.randn(3, 2, 4, requires_grad=True))
        with pytest.raises(UserError, match="3 and 6 examples"):
            rule(torch.randn(6, 1, 4, requires_grad=True))
        with pytest.raises(UserError, match="3 and 5 examples"):
            weights(torch.zeros(5))


def test_types_may_differ():
    logits = torch.randn(3, 2, 4, requires_grad=True)
    with example_weights() as weights:
        chosen = PosteriorRule()(logits)
        log_prob = weights((chosen.double() * torch.randn(4).double()).sum((-1, -2)))
    assert log_prob.dtype == torch.float64
    log_prob.mean().backward()
    assert logits.grad.dtype == torch.float32
