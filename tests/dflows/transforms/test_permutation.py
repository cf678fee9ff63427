import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dflows.errors import UserError
from dflows.representations import to_one_hot
from dflows.transforms import PermutationTransform


@given(order=st.permutations(range(7)), length=st.integers(1, 7), seed=st.integers(0, 100))
def test_it_moves_dimensions_there_and_back(order, length, seed):
    x = torch.randint(5, (3, length), generator=torch.Generator().manual_seed(seed))
    transform = PermutationTransform(order)
    y = transform(x)
    kept = [dimension for dimension in order if dimension < length]
    assert torch.equal(y, x[:, kept])
    assert torch.equal(transform.inv(y), x)


@pytest.mark.parametrize("shape", [(), (2,), (2, 3)])
def test_both_representations_and_all_batches(shape):
    transform = PermutationTransform([2, 0, 1])
    x = torch.randint(5, (*shape, 3))
    y = transform(x)
    assert torch.equal(y, x[..., [2, 0, 1]])
    assert torch.equal(transform.log_abs_det_jacobian(x, y), torch.zeros(shape))
    one_hot = transform(to_one_hot(x, 5))
    assert torch.equal(one_hot, to_one_hot(y, 5))
    assert torch.equal(transform.log_abs_det_jacobian(x, one_hot), torch.zeros(shape))
    assert torch.equal(transform.inverse(one_hot), to_one_hot(x, 5))


def test_it_takes_no_network():
    transform = PermutationTransform([1, 0])
    x = torch.tensor([[3, 4]])
    assert transform.passes == 0
    assert transform.inv.passes == 0
    for fixed_point in (False, True):
        y, evaluations = transform.generate(x, fixed_point=fixed_point)
        assert y.tolist() == [[4, 3]]
        assert evaluations == 0
    assert transform.ordering is None
    assert not transform.takes_context
    assert "order=[1, 0]" in repr(transform)
    other = PermutationTransform([0, 1])
    other.load_state_dict(transform.state_dict())
    assert torch.equal(other(x), transform(x))


@pytest.mark.parametrize("order", [[0, 2], [1, 1], [-1, 0], []])
def test_what_is_no_permutation_is_refused(order):
    with pytest.raises(UserError, match="no permutation"):
        PermutationTransform(order)


def test_longer_events_are_refused():
    with pytest.raises(UserError, match="orders 2 dimensions, and there are 3"):
        PermutationTransform([1, 0])(torch.zeros(1, 3, dtype=torch.long))


def test_which_prefixes_it_keeps():
    transform = PermutationTransform([1, 0, 3, 2, 4])
    assert [n for n in range(1, 6) if transform.supports_prefix(n, 5)] == [2, 4, 5]
    assert [n for n in range(1, 4) if transform.supports_prefix(n, 3)] == [2, 3]
    x = torch.randint(5, (3, 5))
    y = transform(x)
    assert torch.equal(transform.generate(x, prefix=y[:, :2])[0], y)
