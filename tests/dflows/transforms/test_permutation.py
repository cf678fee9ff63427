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
    y, ladj = transform.call_and_ladj(x)
    assert torch.equal(y, x[..., [2, 0, 1]])
    assert torch.equal(ladj, torch.zeros(shape))
    one_hot, ladj = transform.call_and_ladj(to_one_hot(x, 5))
    assert torch.equal(one_hot, to_one_hot(y, 5))
    assert torch.equal(ladj, torch.zeros(shape))
    back, _ = transform.inverse_and_ladj(one_hot)
    assert torch.equal(back, to_one_hot(x, 5))


def test_it_takes_no_network():
    transform = PermutationTransform([1, 0])
    x = torch.tensor([[3, 4]])
    assert transform.passes == 0
    assert transform.inv.passes == 0
    assert transform.fixed_point(x)[0].tolist() == [[4, 3]]
    assert transform.fixed_point(x)[1] == 0
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
