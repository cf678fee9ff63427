import pytest
import torch

from dflows.errors import UserError
from dflows.representations import (
    batch_shape,
    flatten_batch,
    is_one_hot,
    to_indices,
    to_one_hot,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_both_representations_hold_the_same_value(dtype):
    indices = torch.randint(5, (2, 3, 4))
    one_hot = to_one_hot(indices, 5, dtype)
    assert one_hot.dtype == dtype
    assert one_hot.shape == (2, 3, 4, 5)
    assert is_one_hot(one_hot)
    assert not is_one_hot(indices)
    assert torch.equal(to_indices(one_hot), indices)


def test_a_value_in_the_wanted_representation_is_returned_as_it_is():
    indices = torch.randint(5, (2, 3))
    one_hot = to_one_hot(indices, 5)
    assert to_indices(indices) is indices
    assert to_one_hot(one_hot, 5) is one_hot


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,)])
def test_the_batch_shape_is_that_before_the_event(shape):
    indices = torch.zeros(*shape, 4, dtype=torch.long)
    one_hot = to_one_hot(indices, 5)
    assert batch_shape(indices) == batch_shape(one_hot) == shape
    for value in (indices, one_hot):
        flat, context, kept = flatten_batch(value)
        assert flat.shape[1:] == value.shape[len(shape) :]
        assert kept == shape
        assert context is None


@pytest.mark.parametrize("event", [(2,), (3, 2)])
def test_a_context_is_repeated_for_the_batch_dimensions_in_front(event):
    context = torch.randn(3, *event)
    y = torch.arange(2 * 3 * 4).reshape(2, 3, 4)
    flat, repeated, _ = flatten_batch(y, context)
    for sample in range(2):
        for example in range(3):
            row = 3 * sample + example
            assert torch.equal(flat[row], y[sample, example])
            assert torch.equal(repeated[row], context[example])


@pytest.mark.parametrize(
    ("y", "context", "message"),
    [
        ((2, 4), (3, 5), "last batch dimension"),
        ((4,), (1, 5), "last batch"),
        ((2, 4), (2,), "give"),
    ],
)
def test_a_context_of_another_batch_is_refused(y, context, message):
    with pytest.raises(UserError, match=message):
        flatten_batch(torch.zeros(y, dtype=torch.long), torch.zeros(context))
