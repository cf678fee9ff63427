import itertools
from functools import partial

import pytest
import torch

from dflows.backbones import Table
from dflows.errors import UserError
from dflows.flows import stack
from dflows.orderings import Halves, Natural, Parity, Permutation, Reversed, Strided
from dflows.representations import to_one_hot

ORDERINGS = [
    Natural(),
    Reversed(),
    Parity(first=1),
    Halves(),
    Strided(columns=3),
    Permutation([2, 0, 3, 1]),
]


def states(num_classes, length):
    return torch.tensor(list(itertools.product(range(num_classes), repeat=length)))


def product(table, one_hot):
    """The features as a multilinear function of the one-hot vectors, by Kronecker products."""
    levels, begin, features = table.ordering.levels(table.length), 0, []
    for d in range(table.length):
        weights = one_hot.new_ones(one_hot.shape[0], 1)
        for e in range(table.length):
            if levels[e] < levels[d]:
                # The first of the conditioning dimensions changes fastest.
                weights = (one_hot[:, e].unsqueeze(-1) * weights.unsqueeze(1)).flatten(1)
        features.append(weights @ table.rows[begin : begin + weights.shape[1]])
        begin += weights.shape[1]
    assert begin == len(table.rows)
    return torch.stack(features, dim=1)


@pytest.mark.parametrize("ordering", ORDERINGS, ids=repr)
@pytest.mark.parametrize("num_classes", [1, 2, 3])
def test_values_and_gradients_equal_kronecker_products(ordering, num_classes):
    table = Table(5, num_classes, length=4, ordering=ordering).double()
    indices = states(num_classes, 4)
    levels = ordering.levels(4)
    one_hot = to_one_hot(indices, num_classes, torch.float64).requires_grad_()
    expected = product(table, one_hot)
    torch.testing.assert_close(table(indices, None, levels), expected)
    torch.testing.assert_close(table(one_hot, None, levels), expected)

    upstream = torch.randn_like(expected)
    inputs = [one_hot, table.rows]
    right = torch.autograd.grad((expected * upstream).sum(), inputs)
    ours = torch.autograd.grad((table(one_hot, None, levels) * upstream).sum(), inputs)
    torch.testing.assert_close(ours, right)
    by_indices = torch.autograd.grad((table(indices) * upstream).sum(), table.rows)
    torch.testing.assert_close(by_indices[0], right[1])


@pytest.mark.parametrize("ordering", ORDERINGS, ids=repr)
def test_every_state_has_a_row_of_its_own(ordering):
    table = Table(1, num_classes=3, length=4, ordering=ordering)
    with torch.no_grad():
        table.rows.copy_(torch.arange(len(table.rows)).unsqueeze(-1))
    rows = table(states(3, 4)).squeeze(-1)
    levels = ordering.levels(4)
    counts = [len(rows[:, d].unique()) for d in range(4)]
    assert counts == [3 ** int((levels < levels[d]).sum()) for d in range(4)]
    assert sum(counts) == len(rows.unique()) == len(table.rows)


def test_features_depend_on_lower_levels_only():
    table = Table(3, num_classes=3, length=4, ordering=Strided(columns=2))
    levels = Strided(columns=2).levels(4)
    y = states(3, 4)
    for d in range(4):
        changed = torch.where(levels < levels[d], y, (y + 1) % 3)
        assert torch.equal(table(changed)[:, d], table(y)[:, d])


def test_hidden_values_are_of_no_account():
    # Masked execution blanks what a level may not see: indices to 0, one-hot vectors to zeros.
    table = Table(3, num_classes=3, length=4, ordering=Natural())
    y = states(3, 4)
    visible = torch.arange(4) < 2
    one_hot = to_one_hot(y, 3) * visible.unsqueeze(-1)
    assert torch.equal(table(one_hot)[:, 2], table(y)[:, 2])
    assert torch.equal(table(y * visible)[:, 2], table(y)[:, 2])


def test_every_row_gets_a_gradient_and_starts_away_from_zero():
    table = Table(3, num_classes=2, length=3, ordering=Natural())
    assert (table.rows.abs() > 0).all()
    table(states(2, 3)).square().sum().backward()
    assert (table.rows.grad.abs() > 0).all()


def test_a_large_problem_costs_what_its_batch_does():
    table = Table(2, num_classes=5, length=10, ordering=Natural())
    y = torch.randint(5, (64, 10))
    one_hot = to_one_hot(y, 5).requires_grad_()
    features = table(one_hot)
    assert torch.equal(features, table(y))
    features.sum().backward()
    assert one_hot.grad.shape == (64, 10, 5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    table = Table(3, num_classes=2, length=3, ordering=Natural()).to(dtype)
    one_hot = to_one_hot(states(2, 3), 2, dtype).requires_grad_()
    features = table(one_hot)
    assert features.dtype == dtype
    features.sum().backward()
    assert one_hot.grad.dtype == dtype


def test_autocast_changes_nothing():
    table = Table(3, num_classes=2, length=3, ordering=Natural())
    one_hot = to_one_hot(states(2, 3), 2).requires_grad_()
    exact = table(one_hot)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(table(one_hot), exact)


def test_state_goes_round_and_moves():
    table = Table(3, num_classes=2, length=3, ordering=Natural())
    assert set(table.state_dict()) == {"rows"}
    other = Table(3, num_classes=2, length=3, ordering=Natural())
    other.load_state_dict(table.state_dict())
    assert torch.equal(other(states(2, 3)), table(states(2, 3)))
    assert table.to("meta").strides.device.type == "meta"
    assert repr(table) == "Table(width=3, num_classes=2, length=3, ordering=Natural())"


def test_ten_million_rows_are_the_most():
    with pytest.raises(UserError, match="has 11,111,111 rows, more than 10,000,000"):
        Table(1, num_classes=10, length=8, ordering=Natural())


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(2, 2, dtype=torch.long),
        torch.zeros(2, 4, dtype=torch.long),
        torch.zeros(2, 3, 3),
        torch.zeros(3, dtype=torch.long),
    ],
)
def test_values_of_another_shape_are_refused(value):
    table = Table(1, num_classes=2, length=3, ordering=Natural())
    with pytest.raises(UserError, match=r"length=3 and num_classes=2 was given values"):
        table(value)


@pytest.mark.parametrize(("num_classes", "length"), [(0, 3), (2, 0)])
def test_bad_sizes_are_refused(num_classes, length):
    with pytest.raises(UserError, match="give at least 1"):
        Table(1, num_classes, length, Natural())


@pytest.mark.parametrize("ordering", ORDERINGS, ids=repr)
def test_without_an_ordering_it_takes_that_of_the_call(ordering):
    free, bound = Table(5, 3, length=4), Table(5, 3, length=4, ordering=ordering)
    assert len(free.rows) == 1 + 3 + 9 + 27 >= len(bound.rows)
    with torch.no_grad():
        bound.rows.copy_(free.rows[: len(bound.rows)])
    levels = ordering.levels(4)
    one_hot = to_one_hot(states(3, 4), 3, torch.float32).requires_grad_()
    torch.testing.assert_close(free(one_hot, levels=levels), bound(one_hot, levels=levels))
    ours, theirs = (
        torch.autograd.grad(table(one_hot, levels=levels).square().sum(), one_hot)[0]
        for table in (free, bound)
    )
    torch.testing.assert_close(ours, theirs)


def test_a_stack_of_any_orderings_is_made_of_one_factory():
    flow = stack(3, 4, [Natural(), Parity(), Reversed()], partial(Table, 8, 3, 4))
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(torch.randn_like(parameter))
    total = flow.log_prob(states(3, 4)).exp().sum()
    assert total.item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("ordering", [Halves(), Parity(first=1)], ids=repr)
def test_fewer_conditioning_dimensions_need_fewer_rows(ordering):
    few, all_ = Table(5, 3, length=4, conditioning=2), Table(5, 3, length=4)
    assert len(few.rows) == 1 + 3 + 9 + 9
    assert repr(few) == "Table(width=5, num_classes=3, length=4, conditioning=2)"
    with torch.no_grad():
        few.rows.copy_(all_.rows[: len(few.rows)])
    y, levels = states(3, 4), ordering.levels(4)
    assert torch.equal(few(y, levels=levels), all_(y, levels=levels))


def test_more_conditioning_dimensions_than_it_has_rows_for_are_refused():
    few = Table(5, 3, length=4, conditioning=2)
    for levels in (None, Reversed().levels(4)):
        with pytest.raises(UserError, match="conditioning=2 was given levels of which one has mor"):
            few(states(3, 4), levels=levels)
    with pytest.raises(UserError, match="leave one of the two away"):
        Table(5, 3, length=4, ordering=Halves(), conditioning=2)
    with pytest.raises(UserError, match="conditioning is 0: give at least 1"):
        Table(5, 3, length=4, conditioning=0)
