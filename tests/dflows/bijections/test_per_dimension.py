"""Dimensions of different numbers of classes: each map stays among its own, by enumeration."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dflows.bijections import ModularShift, PerDimension
from dflows.errors import NonFiniteError, UserError
from dflows.gradients import PosteriorRule
from dflows.representations import to_one_hot
from tests.dflows.small import BIJECTIONS

NUMBERS = [2, 5, 3, 5, 4]
each_bijection = pytest.mark.parametrize("name", BIJECTIONS)


def made(name, numbers=NUMBERS):
    return PerDimension(BIJECTIONS[name], numbers)


def classes_of(numbers):
    """Every class of every dimension once, (max K, D); small ones repeat."""
    return torch.arange(max(numbers)).unsqueeze(-1) % torch.tensor(numbers)


@each_bijection
@given(numbers=st.lists(st.integers(2, 7), min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_the_classes_of_a_dimension_are_permuted(name, numbers, seed):
    bijection = made(name, numbers)
    torch.manual_seed(seed)
    logits = torch.randn(len(numbers), bijection.num_logits).expand(max(numbers), -1, -1)
    y = bijection(classes_of(numbers), logits)
    assert torch.equal(bijection.inverse(y, logits), classes_of(numbers))
    for dimension, number in enumerate(numbers):
        assert sorted(set(y[:, dimension].tolist())) == list(range(number))


@each_bijection
def test_a_dimension_is_mapped_as_by_a_bijection_of_its_own(name):
    bijection, value = made(name), classes_of(NUMBERS)
    logits = torch.randn(len(value), len(NUMBERS), bijection.num_logits)
    for dimension, number in enumerate(NUMBERS):
        own = BIJECTIONS[name](number)
        own.load_state_dict(bijection.members[str(number)].state_dict())
        expected = own(value[:, dimension], logits[:, dimension, : own.num_logits])
        assert torch.equal(bijection(value, logits)[:, dimension], expected)


@each_bijection
def test_some_dimensions_are_mapped_as_among_all(name):
    bijection, value = made(name), classes_of(NUMBERS)
    logits = torch.randn(len(value), len(NUMBERS), bijection.num_logits)
    some = torch.tensor([4, 0, 2])
    whole, part = bijection(value, logits), bijection.at(some)
    assert torch.equal(part(value[:, some], logits[:, some]), whole[:, some])
    assert torch.equal(bijection(value, logits), whole), "a view leaves the bijection as it is"
    local = bijection.local_log_likelihood(value, logits, torch.randn(5).log_softmax(-1))
    assert local.shape == value.shape
    torch.manual_seed(0)
    x, log_prob = bijection.sample_inverse(value, logits, 3, 1.0)
    assert x.shape == log_prob.shape == (3, *value.shape)
    assert (x < torch.tensor(NUMBERS)).all()


@each_bijection
def test_no_dimension_is_an_event_too(name):
    bijection = made(name)
    none, logits = torch.zeros(4, 0, dtype=torch.long), torch.zeros(4, 0, bijection.num_logits)
    assert bijection.inverse(bijection(none, logits), logits).shape == (4, 0)
    assert bijection.local_log_likelihood(none, logits, torch.zeros(5)).shape == (4, 0)
    assert bijection.sample_inverse(none, logits, 2, 1.0)[0].shape == (2, 4, 0)


@each_bijection
@pytest.mark.parametrize("inverse", [False, True])
def test_gradients_of_one_hot_vectors_are_those_of_the_parts(name, inverse):
    bijection = made(name).double()
    value = to_one_hot(classes_of(NUMBERS), 5, torch.double).requires_grad_()
    logits = torch.randn(5, len(NUMBERS), bijection.num_logits, dtype=torch.double)
    logits.requires_grad_()
    upstream = torch.randn(5, len(NUMBERS), 5, dtype=torch.double)
    mapped = (bijection.inverse if inverse else bijection)(value, logits)
    found = torch.autograd.grad((mapped * upstream).sum(), (value, logits))
    for dimension, number in enumerate(NUMBERS):
        own = bijection.members[str(number)]
        part = value[:, dimension, :number].detach().requires_grad_()
        read = logits[:, dimension, : own.num_logits].detach().requires_grad_()
        image = (own.inverse if inverse else own)(part, read)
        expected = torch.autograd.grad(
            (image * upstream[:, dimension, :number]).sum(), (part, read)
        )
        torch.testing.assert_close(found[0][:, dimension, :number], expected[0])
        torch.testing.assert_close(found[1][:, dimension, : own.num_logits], expected[1])
        assert not found[0][:, dimension, number:].any()
        assert not found[1][:, dimension, own.num_logits :].any()
        assert not mapped[:, dimension, number:].any()


@each_bijection
def test_it_starts_as_the_identity(name):
    bijection, value = made(name), classes_of(NUMBERS)
    logits = bijection.initial_logits().expand(len(value), -1, -1)
    assert torch.equal(bijection(value, logits), value)


def test_a_rule_is_that_of_all_dimensions():
    bijection = PerDimension(partial(ModularShift, rule=PosteriorRule()), NUMBERS)
    assert isinstance(bijection.rule, PosteriorRule)
    assert made("rank").rule is None


def test_what_is_no_number_of_classes_and_logits_that_choose_nothing_are_refused():
    with pytest.raises(UserError, match="num_classes is 1, and a bijection needs at least 2"):
        made("rank", [3, 1])
    logits = torch.full((2, 5), torch.nan)
    with pytest.raises(NonFiniteError, match="was given logits with NaN"):
        made("shift", [3, 5])(torch.zeros(2, dtype=torch.long), logits)
