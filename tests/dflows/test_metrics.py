"""Metrics against independent references: in one process, cast, copied, and over two processes."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dflows.metrics import (
    BitsPerCharacter,
    ExactMatch,
    GenerationLatency,
    LevelBits,
    NatsPerExample,
    ResidualEntropy,
    bits_per_character,
    entropy_in_bits,
    nats_per_example,
    time_calls,
)
from tests.processes import together

NUM_CLASSES = 5
NUM_FLOWS = 2
GROUPS = [0, 1, 0, 1, 2, 2, 2]
LEVELS = [0, 1, 1, 2, 0, 1, 2]
# Windows of (batch, length): batches differ in size, and the last window is a shorter one.
SHAPES = [(3, 7), (1, 7), (4, 7), (2, 7), (1, 2)]


def batches(shapes=SHAPES):
    """Log-likelihoods (B,) and residuals (flows of (B, d)) of every batch."""
    generator = torch.Generator().manual_seed(1)
    for size, length in shapes:
        log_prob = -10 * torch.rand(size, generator=generator)
        residuals = [
            torch.randint(NUM_CLASSES, (size, length), generator=generator)
            % (NUM_CLASSES - 2 * flow)
            for flow in range(NUM_FLOWS)
        ]
        yield log_prob, residuals


def reference_bpc(shapes=SHAPES):
    nats = -sum(p for log_prob, _ in batches(shapes) for p in log_prob.tolist())
    return nats / math.log(2) / sum(size * length for size, length in shapes)


def reference_nats(shapes=SHAPES):
    nats = -sum(p for log_prob, _ in batches(shapes) for p in log_prob.tolist())
    return nats / sum(size for size, _ in shapes)


def reference_entropy(flow, groups, shapes=SHAPES):
    seen = [
        (groups[position], value)
        for _, residuals in batches(shapes)
        for window in residuals[flow].tolist()
        for position, value in enumerate(window)
    ]
    pairs, of_group = Counter(seen), Counter(group for group, _ in seen)
    return -sum(n * math.log2(n / of_group[group]) for (group, _), n in pairs.items()) / len(seen)


def reference_match(shapes=SHAPES):
    firsts = [
        (one[0], other[0])
        for _, residuals in batches(shapes)
        for one, other in zip(residuals[0].tolist(), residuals[1].tolist(), strict=True)
    ]
    return sum(one == other for one, other in firsts) / len(firsts)


def reference_levels(shapes=SHAPES):
    """The bits of every level, where the first flow's residuals are nats."""
    found = [[] for _ in range(max(LEVELS) + 1)]
    for _, residuals in batches(shapes):
        for window in residuals[0].tolist():
            for level, nats in zip(LEVELS, window, strict=False):
                found[level].append(nats / math.log(2))
    return [math.fsum(bits) / len(bits) for bits in found]


def updated(metric, shapes=SHAPES, take=slice(None)):
    for log_prob, residuals in list(batches(shapes))[take]:
        if isinstance(metric, BitsPerCharacter):
            metric.update(log_prob, residuals[0].numel())
        elif isinstance(metric, NatsPerExample):
            metric.update(log_prob)
        elif isinstance(metric, LevelBits):
            metric.update(-residuals[0].double())
        elif isinstance(metric, ExactMatch):
            metric.update(residuals[0][:, :1], residuals[1][:, :1])
        else:
            metric.update(residuals)
    return metric


def metrics():
    return {
        "bpc": BitsPerCharacter(),
        "nats": NatsPerExample(),
        "match": ExactMatch(),
        "residual": ResidualEntropy(NUM_FLOWS, NUM_CLASSES, GROUPS),
        "levels": LevelBits(LEVELS),
    }


def expected(shapes=SHAPES):
    return {
        "bpc": torch.tensor(reference_bpc(shapes), dtype=torch.float64),
        "nats": torch.tensor(reference_nats(shapes), dtype=torch.float64),
        "match": torch.tensor(reference_match(shapes), dtype=torch.float64),
        "residual": torch.tensor(
            [reference_entropy(flow, GROUPS, shapes) for flow in range(NUM_FLOWS)],
            dtype=torch.float64,
        ),
        "levels": torch.tensor(reference_levels(shapes), dtype=torch.float64),
    }


NAMES = list(metrics())


@pytest.mark.parametrize("name", NAMES)
def test_metric_equals_the_reference(name):
    metric = updated(metrics()[name])
    torch.testing.assert_close(metric.compute(), expected()[name], rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_reset_starts_again(name):
    metric = updated(metrics()[name], SHAPES[:3])
    metric.reset()
    updated(metric)
    torch.testing.assert_close(metric.compute(), expected()[name], rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_forward_returns_the_value_of_the_batch(name):
    metric = metrics()[name]
    log_prob, residuals = next(iter(batches()))
    inputs = {
        "bpc": (log_prob, residuals[0].numel()),
        "nats": (log_prob,),
        "match": (residuals[0][:, :1], residuals[1][:, :1]),
        "residual": (residuals,),
        "levels": (-residuals[0].double(),),
    }
    value = metric(*inputs[name])
    torch.testing.assert_close(value, expected(SHAPES[:1])[name], rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "cast",
    [
        lambda module: module.to(torch.bfloat16),
        lambda module: module.half(),
        lambda module: module.bfloat16(),
        lambda module: module.to("cpu", torch.float16),
        lambda module: module.type(torch.bfloat16),
    ],
    ids=["to", "half", "bfloat16", "device", "type"],
)
def test_states_survive_casts_of_the_module_around_them(name, cast):
    module = nn.ModuleDict({"layer": nn.Linear(2, 2), **metrics()})
    updated(module[name], take=slice(2))
    cast(module)
    assert module["layer"].weight.dtype != torch.float32
    metric = updated(module[name], take=slice(2, None))
    torch.testing.assert_close(metric.compute(), expected()[name], rtol=1e-7, atol=0)
    metric.reset()
    torch.testing.assert_close(updated(metric).compute(), expected()[name], rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_inference_mode_may_end_between_updates(name):
    metric = metrics()[name]
    with torch.inference_mode():
        metric.reset()
        updated(metric, take=slice(2))
    updated(metric, take=slice(2, None))
    torch.testing.assert_close(metric.compute(), expected()[name], rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_counted_is_an_error_that_says_so(name):
    with (
        pytest.warns(UserWarning, match="before the ``update``"),
        pytest.raises(ValueError, match="on any process: update it"),
    ):
        metrics()[name].compute()


def test_the_standard_error_is_that_of_all_examples():
    metric = NatsPerExample()
    values = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 40
    for part in values.split([20, 1, 29]):
        metric.update(part)
    torch.testing.assert_close(metric.standard_error(), values.std() / 50**0.5)
    metric.reset()
    metric.update(values[:1])
    assert metric.standard_error() == 0


@pytest.mark.parametrize("metric", [BitsPerCharacter(), NatsPerExample()])
def test_many_small_updates_do_not_drift(metric):
    log_prob = torch.full((4,), -0.1)
    for _ in range(20_000):
        metric.update(*((log_prob, 4) if isinstance(metric, BitsPerCharacter) else (log_prob,)))
    exact = float(torch.tensor(0.1).double())
    if isinstance(metric, BitsPerCharacter):
        exact /= math.log(2)
    assert float(metric.compute()) == pytest.approx(exact, rel=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_log_prob_of_any_floating_dtype_and_shape(dtype):
    log_prob = -torch.arange(6).view(2, 1, 3).to(dtype)
    metric = BitsPerCharacter()
    metric.update(log_prob, torch.tensor([7, 8]))
    assert float(metric.compute()) == pytest.approx(1 / math.log(2))
    assert metric.num_characters.dtype == torch.long


def test_an_example_is_told_right_in_whole_or_not():
    metric = ExactMatch()
    y = torch.tensor([[0, 1, 2], [0, 1, 1], [2, 2, 2]])
    metric.update(torch.tensor([[0, 1, 2], [0, 1, 2], [2, 2, 2]]), y)
    metric.update(y[1], y[1])
    assert metric.compute() == 0.75
    assert metric.num_examples == 4
    with pytest.raises(ValueError, match=r"shapes .* expected equal"):
        metric.update(y[:2], y)


def test_update_keeps_no_graph():
    log_prob = torch.zeros(3, requires_grad=True)
    metric = NatsPerExample()
    metric.update(log_prob * 2)
    assert not metric.log_prob_sum.requires_grad


def test_impossible_text_costs_infinitely_many_bits():
    metric = BitsPerCharacter()
    metric.update(torch.tensor([-1.0, -math.inf]), 4)
    assert float(metric.compute()) == math.inf


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (lambda: BitsPerCharacter().update(torch.zeros(2, dtype=torch.long), 2), "log_prob holds"),
        (lambda: NatsPerExample().update(torch.zeros(2, dtype=torch.long)), "log_prob holds"),
        (lambda: BitsPerCharacter().update(torch.zeros(2), 2.5), "num_characters holds"),
        (lambda: ResidualEntropy(1, 3).update([torch.zeros(2, 2)]), "residuals hold"),
    ],
)
def test_wrong_dtypes_are_refused(update, message):
    with pytest.raises(TypeError, match=message):
        update()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ResidualEntropy(1, 1), "at least 2 classes"),
        (lambda: ResidualEntropy(1, 3, [0, -1]), "groups is"),
        (lambda: ResidualEntropy(1, 3, []), "groups is"),
        (lambda: LevelBits([]), "levels is"),
        (lambda: LevelBits([0, -1]), "levels is"),
        (lambda: LevelBits([0, 1]).update(torch.zeros(1, 3)), "with d at most 2"),
        (lambda: LevelBits([0]).update(torch.zeros(1)), r"expected \(N, d\)"),
        (lambda: ResidualEntropy(2, 3).update([torch.zeros(1, 2).long()]), "of 1 flows"),
        (lambda: ResidualEntropy(1, 3).update([torch.full((1, 2), 3)]), "expected 0 to 2"),
        (lambda: ResidualEntropy(1, 3).update([torch.full((1, 2), -1)]), "expected 0 to 2"),
        (lambda: ResidualEntropy(1, 3, [0]).update([torch.zeros(1, 2).long()]), "2 positions"),
        (lambda: time_calls(int, repeats=0), "at least 1 call"),
        (lambda: GenerationLatency().update(-1.0), "at least 0"),
        (lambda: GenerationLatency().update(math.nan), "at least 0"),
    ],
)
def test_wrong_values_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_functions_take_batches_as_they_are():
    log_prob = torch.tensor([[-1.0], [-2.0]])
    assert float(bits_per_character(log_prob, torch.tensor(6))) == pytest.approx(0.5 / math.log(2))
    assert float(nats_per_example(log_prob, 2)) == 1.5


def test_entropy_of_counts():
    assert entropy_in_bits(torch.ones(3, 2, 8, dtype=torch.long)).tolist() == [3, 3, 3]
    assert float(entropy_in_bits(torch.tensor([[5, 0, 0]]))) == 0
    assert math.isnan(float(entropy_in_bits(torch.zeros(1, 3))))


def test_residual_entropy_of_a_stack_without_flows_is_empty():
    metric = ResidualEntropy(0, 3)
    metric.update([])
    assert metric.compute().shape == (0,)


def test_residual_entropy_with_one_group_equals_the_reference():
    metric = updated(ResidualEntropy(NUM_FLOWS, NUM_CLASSES))
    values = [reference_entropy(flow, [0] * 7) for flow in range(NUM_FLOWS)]
    assert metric.compute().tolist() == pytest.approx(values)


def test_latency_excludes_warm_up_and_pools_calls():
    calls = []
    metric = GenerationLatency()
    metric.measure(lambda: calls.append(0), repeats=5, warmup=3)
    assert len(calls) == 8
    assert torch.cat(metric.seconds).shape == (5,)
    metric.update(100.0, peak_bytes=7)
    metric.update(torch.tensor([100.0, 100.0]), peak_bytes=5)
    values = metric.compute()
    assert float(values["median"]) < 1
    assert float(values["p95"]) == 100
    assert int(values["peak_bytes"]) == 7


def test_latency_percentiles():
    metric = GenerationLatency()
    metric.update(torch.arange(101).flip(0))
    values = metric.compute()
    assert (float(values["median"]), float(values["p95"])) == (50, 95)


def test_latency_without_calls_is_an_error_that_says_so():
    with (
        pytest.warns(UserWarning, match="before the ``update``"),
        pytest.raises(ValueError, match="no calls"),
    ):
        GenerationLatency().compute()


@pytest.mark.device
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_cuda_states_move_and_memory_is_measured():
    for name, metric in metrics().items():
        updated(metric, take=slice(2))
        updated(metric.to("cuda"), take=slice(2, None))
        torch.testing.assert_close(metric.compute().cpu(), expected()[name], rtol=1e-7, atol=0)
    latency = GenerationLatency().to("cuda")
    latency.measure(lambda: torch.zeros(1 << 20, device="cuda"), repeats=2)
    assert int(latency.compute()["peak_bytes"]) >= 4 << 20


def measured(shares: list[list[int]]) -> dict[str, Any]:
    """What a process of a group finds, with the batches of its share."""
    torch.distributed.init_process_group("gloo")
    share, values = shares[torch.distributed.get_rank()], {}
    for name, metric in metrics().items():
        for index in share:
            updated(metric, take=slice(index, index + 1))
        values[name] = metric.compute().tolist()
        # Once more, after the states of this process were restored.
        updated(metric, take=slice(0, 1))
        values[f"{name} again"] = metric.compute().tolist()
    latency = GenerationLatency()
    for index in share:
        latency.update(float(index), peak_bytes=index)
    values["latency"] = {key: float(value) for key, value in latency.compute().items()}
    torch.distributed.destroy_process_group()
    return values


@pytest.mark.parametrize("shares", [[[0, 1, 3], [2, 4]], [[0, 1, 2, 3, 4], []]], ids=str)
def test_two_processes_with_uneven_batches_equal_one(tmp_path: Path, shares):
    one, other = together(measured, shares, folder=tmp_path)
    assert one == other
    again = [*SHAPES, SHAPES[0], SHAPES[0]]
    for name in NAMES:
        assert one[name] == pytest.approx(expected()[name].tolist(), rel=1e-7)
    # The first batch was added on both processes.
    assert one["bpc again"] != one["bpc"]
    sums = [-sum(log_prob.tolist()) for log_prob, _ in batches()]
    nats = (sum(sums) + 2 * sums[0]) / sum(size for size, _ in again)
    assert one["nats again"] == pytest.approx(nats, rel=1e-6)
    assert one["latency"] == {"median": 2, "p95": pytest.approx(3.8), "peak_bytes": 4}
