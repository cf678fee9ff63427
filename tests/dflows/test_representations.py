import pytest
import torch

from dflows import representations
from dflows.errors import NonFiniteError, UserError
from dflows.representations import (
    batch_shape,
    check_logits,
    flatten_batch,
    full_precision,
    is_one_hot,
    lstm_autocast,
    to_indices,
    to_one_hot,
    without_tf32,
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


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_full_precision_is_float32_or_better(dtype, expected):
    values = torch.tensor([0.5, -torch.inf, 3.0], dtype=dtype)
    for full in (full_precision(values), check_logits(values, "A part")):
        assert full.dtype == expected
        assert torch.equal(full, values.to(expected))
        assert dtype != expected or full is values


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
class TestCheckLogits:
    @pytest.mark.parametrize(
        ("row", "what"),
        [
            ([0.0, torch.nan, 1.0], "NaN"),
            ([-torch.inf, torch.nan, torch.inf], "NaN"),
            ([0.0, torch.inf, 1.0], r"\+inf"),
            ([-torch.inf, torch.inf, -torch.inf], r"\+inf"),
            ([-torch.inf] * 3, "nothing but -inf"),
        ],
    )
    def test_rows_that_choose_nothing_are_refused(self, dtype, row, what):
        logits = torch.zeros(4, 5, 3, dtype=dtype)
        logits[2, 3] = torch.tensor(row)
        with pytest.raises(NonFiniteError, match=f"A part.*{what} in 1 of 20 rows"):
            check_logits(logits, "A part")
        with pytest.raises(NonFiniteError, match="2 of 40 rows"):
            check_logits(logits.expand(2, 4, 5, 3), "A part")

    def test_a_row_of_a_finite_maximum_is_not(self, dtype):
        largest = torch.finfo(dtype).max
        for row in ([0.0, -torch.inf], [largest, largest], [-largest, -torch.inf]):
            logits = torch.tensor(row, dtype=dtype).expand(100, 2)  # their sum overflows
            assert torch.equal(check_logits(logits, "A part"), logits.to(full_precision(logits)))

    def test_no_rows_are_no_error(self, dtype):
        assert check_logits(torch.zeros(3, 0, 4, dtype=dtype), "A part").shape == (3, 0, 4)


def test_a_check_is_no_part_of_the_graph():
    logits = torch.randn(3, 4, requires_grad=True)
    assert check_logits(logits, "A part") is logits


def test_what_cannot_be_looked_at_is_not_refused():
    logits = torch.full((3, 4), torch.nan, device="meta")
    assert check_logits(logits, "A part") is logits
    compiled = torch.compile(
        lambda t: check_logits(t, "A part") + 0, backend="eager", fullgraph=True
    )
    assert compiled(torch.full((3, 4), torch.nan)).isnan().all()


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fast", [True, False])
def test_an_lstm_has_autocast_where_the_processor_has_one_for_it(monkeypatch, enabled, dtype, fast):
    monkeypatch.setattr(representations, "has_bfloat16", {"cpu": fast}.get)
    with torch.autocast("cpu", dtype, enabled=enabled):
        with lstm_autocast():
            kept = torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu") == enabled
    assert kept == (enabled and fast and dtype == torch.bfloat16)


@pytest.mark.parametrize("matrices", ["highest", "medium"])
@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.parametrize("precision", [None, "tf32", "ieee"])
def test_float32_is_multiplied_as_such_and_settings_come_back(matrices, allowed, precision):
    backends, before = torch.backends, torch.get_float32_matmul_precision()
    kinds = backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul
    try:
        torch.set_float32_matmul_precision(matrices)
        backends.cudnn.allow_tf32 = allowed
        if precision is not None:  # of the newer functions, which older ones do not agree with
            backends.cudnn.rnn.fp32_precision = precision
        given = [kind.fp32_precision for kind in kinds]
        with without_tf32():
            assert {kind.fp32_precision for kind in kinds} == {"ieee"}
            assert torch.get_float32_matmul_precision() == "highest"
            assert not backends.cudnn.allow_tf32
        assert [kind.fp32_precision for kind in kinds] == given
    finally:
        backends.cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision(before)
