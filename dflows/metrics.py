r"""Metrics of discrete flows, as torchmetrics: likelihoods, exact matches, residuals, latency.

Functions do the arithmetic on tensors; the classes accumulate their inputs over batches and
processes. Sums are kept in float64 and counts as 64-bit integers, whatever the precision of the
model that the metric is an attribute of: a float32 sum drifts over a long evaluation. Every
process may see a different number of batches, of different sizes, or none.

In a Lightning module, update the metric in the step, and call ``compute()`` and ``reset()`` on all
ranks at the end of the epoch: logging the value of a step averages over batches, which is wrong
when they differ in size.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

__all__ = [
    "BitsPerCharacter",
    "ExactMatch",
    "GenerationLatency",
    "LevelBits",
    "NatsPerExample",
    "ResidualEntropy",
    "bits_per_character",
    "entropy_in_bits",
    "nats_per_example",
    "time_calls",
]


def bits_per_character(log_prob: Tensor, num_characters: int | Tensor) -> Tensor:
    r"""Converts log-likelihoods into bits per character.

    .. math:: -\frac{1}{N \ln 2} \sum_i \log p(y_i)

    Args:
        log_prob: Log-likelihoods in nats (…), of any texts that have N characters together.
        num_characters: N.

    Returns:
        Bits per character, a float64 scalar.

    Example:
        >>> bits_per_character(torch.tensor([-1.0, -3.0]) * math.log(2), 8)
        tensor(0.5000, dtype=torch.float64)
    """
    return -log_prob.double().sum() / num_characters / math.log(2)


def nats_per_example(log_prob: Tensor, num_examples: int | Tensor) -> Tensor:
    r"""Converts log-likelihoods into nats per example.

    .. math:: -\frac{1}{N} \sum_i \log p(y_i)

    Args:
        log_prob: Log-likelihoods in nats (…), of N examples together.
        num_examples: N.

    Returns:
        Nats per example, a float64 scalar.

    Example:
        >>> nats_per_example(torch.tensor([-1.0, -3.0]), 2)
        tensor(2., dtype=torch.float64)
    """
    return -log_prob.double().sum() / num_examples


def entropy_in_bits(counts: Tensor) -> Tensor:
    r"""Computes the entropy per dimension of the empirical distribution of every group.

    .. math:: \sum_g \frac{n_g}{n} H\left(\frac{n_{g,1}}{n_g}, …, \frac{n_{g,K}}{n_g}\right)

    This is what a factorized base that is shared within groups costs at best.

    Args:
        counts: How often each class was seen in each group (…, G, K).

    Returns:
        Bits per dimension (…), float64; NaN where nothing was counted.

    Example:
        >>> entropy_in_bits(torch.tensor([[1, 1], [6, 0]]))
        tensor(0.2500, dtype=torch.float64)
    """
    counts = counts.double()
    group = counts.sum(-1, keepdim=True)
    bits = torch.special.xlogy(counts, group) - torch.special.xlogy(counts, counts)
    return bits.sum((-2, -1)) / (group.sum((-2, -1)) * math.log(2))


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def time_calls(
    function: Callable[[], Any],
    *,
    repeats: int = 10,
    warmup: int = 2,
    device: torch.device | str = "cpu",
) -> tuple[list[float], int]:
    """Times a function call by call, waiting for the device before and after each.

    Args:
        function: What to time.
        repeats: Calls that are timed, at least 1.
        warmup: Calls before them that are not: they compile, fill caches and reserve memory.
        device: Where the function computes.

    Returns:
        Seconds of each timed call; and the largest number of bytes that tensors took on the device
        during them, the model's own included (0 unless the device is CUDA).

    Raises:
        ValueError: If there is no call to time.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(
            f"repeats is {repeats} and warmup is {warmup}: "
            "time at least 1 call, after at least 0 untimed ones"
        )
    device = torch.device(device)
    for _ in range(warmup):
        function()
    _synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


class _Accumulator(Metric):
    """Creates a metric whose states keep their dtype when the module around them is cast."""

    full_state_update = False
    is_differentiable = False
    higher_is_better = False

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Self:
        def move(tensor: Tensor) -> Tensor:
            device = fn(tensor.new_zeros(1, dtype=torch.float32)).device
            if device.type == "mps" and tensor.dtype == torch.float64:
                device = torch.device("cpu")  # MPS has no float64, nor several processes to sync
            return tensor.to(device)

        super()._apply(move, exclude_state)
        return self


def _sum_of(log_prob: Tensor, device: torch.device) -> Tensor:
    if not log_prob.is_floating_point():
        raise TypeError(f"log_prob holds {log_prob.dtype}: expected log-likelihoods in nats")
    # Moved first: a device without float64 cannot convert.
    return log_prob.detach().to(device).double().sum()


def _check_counted(metric: Metric, count: Tensor, what: str) -> None:
    if count == 0:
        raise ValueError(
            f"{type(metric).__name__} has counted no {what} on any process: "
            "update it with at least one batch before compute()"
        )


class BitsPerCharacter(_Accumulator):
    r"""Creates a metric of the exact bits per character of a text.

    .. math:: -\frac{1}{N \ln 2} \sum_i \log p(y_i)

    over all batches and processes, with N the characters of all of them: batches may differ in
    size, and windows in length.

    ``update(log_prob, num_characters)`` takes log-likelihoods in nats (…), one a window, and the
    number of characters that they cover together, or tensors of such numbers. ``compute()`` returns
    a float64 scalar, the same on all processes, and raises a ``ValueError`` if no process has
    counted a character. A first process that had no batch of its own is warned by torchmetrics;
    its value is right all the same.

    Args:
        kwargs: Keyword arguments of :class:`torchmetrics.Metric`.

    Example:
        >>> metric = BitsPerCharacter()
        >>> metric.update(torch.tensor([-4.0, -4.0]) * math.log(2), num_characters=2 * 4)
        >>> metric.update(torch.tensor([-4.0]) * math.log(2), num_characters=2)
        >>> metric.compute()
        tensor(1.2000, dtype=torch.float64)
        >>> metric.num_characters
        tensor(10)
    """

    log_prob_sum: Tensor
    num_characters: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("log_prob_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_characters", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, log_prob: Tensor, num_characters: int | Tensor) -> None:
        """Adds a batch: log-likelihoods in nats (…), and the characters that they cover."""
        device = self.log_prob_sum.device
        counted = torch.as_tensor(num_characters, device=device).sum()
        if counted.is_floating_point():
            raise TypeError(f"num_characters holds {counted.dtype}: expected whole numbers")
        self.log_prob_sum = self.log_prob_sum + _sum_of(log_prob, device)
        self.num_characters = self.num_characters + counted

    def compute(self) -> Tensor:
        """Returns the bits per character of everything seen."""
        _check_counted(self, self.num_characters, "characters")
        return bits_per_character(self.log_prob_sum, self.num_characters)


class NatsPerExample(_Accumulator):
    r"""Creates a metric of the exact negative log-likelihood of an example, in nats.

    .. math:: -\frac{1}{N} \sum_{i=1}^{N} \log p(y_i)

    over all batches and processes, which may differ in size.

    ``update(log_prob)`` takes log-likelihoods in nats (…), one an example. ``compute()`` returns a
    float64 scalar, the same on all processes, and raises a ``ValueError`` if no process has counted
    an example.

    Args:
        kwargs: Keyword arguments of :class:`torchmetrics.Metric`.

    Example:
        >>> metric = NatsPerExample()
        >>> metric.update(torch.tensor([-1.0, -2.0]))
        >>> metric.update(torch.tensor([-6.0]))
        >>> metric.compute(), metric.standard_error()
        (tensor(3., dtype=torch.float64), tensor(1.5275, dtype=torch.float64))
    """

    log_prob_sum: Tensor
    square_sum: Tensor
    num_examples: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("log_prob_sum", "square_sum"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_examples", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, log_prob: Tensor) -> None:
        """Adds a batch of log-likelihoods in nats (…), one an example."""
        device = self.log_prob_sum.device
        self.log_prob_sum = self.log_prob_sum + _sum_of(log_prob, device)
        self.square_sum = self.square_sum + log_prob.detach().to(device).double().square().sum()
        self.num_examples = self.num_examples + log_prob.numel()

    def compute(self) -> Tensor:
        """Returns the nats per example of everything seen."""
        _check_counted(self, self.num_examples, "examples")
        return nats_per_example(self.log_prob_sum, self.num_examples)

    def standard_error(self) -> Tensor:
        """Returns the standard error of the mean, float64; 0 of a single example.

        Like ``compute()`` it has to be called on all processes, and before ``reset()``.

        Raises:
            ValueError: If no process has counted an example.
        """
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn,
            should_sync=self._to_sync,
            should_unsync=self._should_unsync,
        ):
            _check_counted(self, self.num_examples, "examples")
            mean = self.log_prob_sum / self.num_examples
            variance = (self.square_sum / self.num_examples - mean**2).clamp(min=0)
            return (variance / (self.num_examples - 1).clamp(min=1)).sqrt()


class ExactMatch(_Accumulator):
    """Creates a metric of the share of examples predicted exactly, in every dimension.

    It is that of all batches and processes, which may differ in size.

    ``update(prediction, y)`` takes indices (…, d). ``compute()``
    returns a float64 scalar, the same on all processes, and raises a ``ValueError`` if no process
    has counted an example.

    Args:
        kwargs: Keyword arguments of :class:`torchmetrics.Metric`.

    Example:
        >>> metric = ExactMatch()
        >>> metric.update(torch.tensor([[0, 1], [2, 2]]), torch.tensor([[0, 1], [2, 0]]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better = True
    num_right: Tensor
    num_examples: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("num_right", "num_examples"):
            self.add_state(name, torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, y: Tensor) -> None:
        """Adds a batch: predictions and the truth, indices (…, d)."""
        if prediction.shape != y.shape:
            raise ValueError(f"shapes {tuple(prediction.shape)}, {tuple(y.shape)}: expected equal")
        right = (prediction == y).all(dim=-1)
        self.num_right = self.num_right + right.sum().to(self.num_right.device)
        self.num_examples = self.num_examples + right.numel()

    def compute(self) -> Tensor:
        """Returns the share of examples predicted exactly, 0 to 1."""
        _check_counted(self, self.num_examples, "examples")
        return self.num_right.double() / self.num_examples


def _of_positions(name: str, numbers: Sequence[int] | Tensor) -> Tensor:
    """Returns the numbers (length,) of positions, of at least 0, as a tensor."""
    table = torch.as_tensor(numbers, dtype=torch.long)
    if table.ndim != 1 or not len(table) or int(table.min()) < 0:
        raise ValueError(
            f"{name} is {table.tolist()}: expected one number of at least 0 for every position"
        )
    return table


class LevelBits(_Accumulator):
    """Creates a metric of the bits that the dimensions of every level cost.

    Over a strided ordering these are the bits of the columns: what is generated first, knowing the
    least, and what comes after it.

    ``update(log_prob)`` takes log-likelihoods in nats (N, d), one a dimension, with d at most the
    length, and where d dimensions have other levels than the first d of all, ``update(log_prob,
    levels)`` takes these, (d,). ``compute()`` returns a float64 tensor, bits per dimension of each
    level, the same on all processes, and raises a ``ValueError`` if no process has counted a
    dimension.

    Args:
        levels: The level of every position, (length,).
        kwargs: Keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If a level is negative, or there is none.

    Example:
        >>> metric = LevelBits([0, 1, 0, 1])
        >>> metric.update(torch.tensor([[-4.0, -1.0, -2.0, -1.0]]) * math.log(2))
        >>> metric.compute()
        tensor([3.0000, 1.0000], dtype=torch.float64)
    """

    levels: Tensor
    log_prob_sums: Tensor
    counts: Tensor

    def __init__(self, levels: Sequence[int] | Tensor, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        table = _of_positions("levels", levels)
        self.register_buffer("levels", table, persistent=False)
        size = int(table.max()) + 1
        self.add_state(
            "log_prob_sums", torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum"
        )
        self.add_state("counts", torch.zeros(size, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, log_prob: Tensor, levels: Tensor | None = None) -> None:
        """Adds a batch: log-likelihoods in nats (N, d), and the levels (d,) of the dimensions."""
        if log_prob.ndim != 2 or log_prob.shape[1] > len(self.levels):
            raise ValueError(
                f"log_prob has shape {tuple(log_prob.shape)}: expected (N, d), with d at most "
                f"{len(self.levels)}"
            )
        if levels is None:
            levels = self.levels[: log_prob.shape[1]]
        levels = levels.to(self.levels.device)
        sums = log_prob.to(self.log_prob_sums).sum(dim=0)
        self.log_prob_sums = self.log_prob_sums.index_add(0, levels, sums)
        number = torch.full_like(levels, len(log_prob))
        self.counts = self.counts.index_add(0, levels, number)

    def compute(self) -> Tensor:
        """Returns the bits per dimension of every level, NaN where none was counted."""
        _check_counted(self, self.counts.sum(), "dimensions")
        return -self.log_prob_sums / self.counts / math.log(2)


class ResidualEntropy(_Accumulator):
    r"""Creates a metric of what every flow of a stack leaves to those below it.

    The entropy, in bits per dimension, of the values that remain after each transform was undone,
    counted over all positions of a group together: what a factorized base shared within groups
    would cost there. It falls from flow to flow where the flows learn.

    ``update(residuals)`` takes what :meth:`dflows.flow.DiscreteFlow.residuals` returns: for every
    flow, data side first, indices (…, d) with d at most the length. ``compute()`` returns a float64
    tensor (num_flows,), the same on all processes, and raises a ``ValueError`` if no process has
    counted a value.

    Args:
        num_flows: Transforms of the stack.
        num_classes: K.
        groups: The group of every position, (length,), contiguous from 0: the positions that the
            flows treat alike. All positions are one group unless it is given.
        kwargs: Keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If there are fewer than 2 classes, or a group is negative.

    Example:
        >>> metric = ResidualEntropy(num_flows=2, num_classes=4)
        >>> metric.update([torch.tensor([[0, 1, 2, 3]]), torch.tensor([[0, 0, 1, 1]])])
        >>> metric.compute()
        tensor([2., 1.], dtype=torch.float64)
    """

    counts: Tensor
    groups: Tensor | None

    def __init__(
        self,
        num_flows: int,
        num_classes: int,
        groups: Sequence[int] | Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if num_flows < 0 or num_classes < 2:
            raise ValueError(
                f"num_flows is {num_flows} and num_classes is {num_classes}: "
                "expected at least 0 flows of at least 2 classes"
            )
        self.num_classes = num_classes
        table = None if groups is None else _of_positions("groups", groups)
        self.register_buffer("groups", table, persistent=False)
        num_groups = 1 if table is None else int(table.max()) + 1
        counts = torch.zeros(num_flows, num_groups, num_classes, dtype=torch.long)
        self.add_state("counts", counts, dist_reduce_fx="sum")

    def update(self, residuals: Sequence[Tensor]) -> None:
        """Adds a batch: indices (…, d) for every flow."""
        num_flows, num_groups, _ = self.counts.shape
        if len(residuals) != num_flows:
            raise ValueError(f"got the residuals of {len(residuals)} flows: expected {num_flows}")
        counts = torch.zeros_like(self.counts)
        for flow, values in enumerate(residuals):
            self._check_values(values)
            values = values.to(counts.device)
            if self.groups is not None:
                values = values + self.groups[: values.shape[-1]] * self.num_classes
            counted = torch.bincount(values.flatten(), minlength=num_groups * self.num_classes)
            counts[flow] = counted.view(num_groups, self.num_classes)
        self.counts = self.counts + counts

    def _check_values(self, values: Tensor) -> None:
        if values.is_floating_point():
            raise TypeError(f"residuals hold {values.dtype}: expected indices (…, d)")
        if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < self.num_classes:
            raise ValueError(
                f"residuals reach from {int(values.min())} to {int(values.max())}: "
                f"expected 0 to {self.num_classes - 1}"
            )
        if self.groups is not None and values.shape[-1] > len(self.groups):
            raise ValueError(
                f"residuals have {values.shape[-1]} positions, and groups only {len(self.groups)}"
            )

    def compute(self) -> Tensor:
        """Returns the bits per dimension after every flow, (num_flows,)."""
        if self.counts.numel():
            _check_counted(self, self.counts.sum(), "values")
        return entropy_in_bits(self.counts)


class GenerationLatency(_Accumulator):
    """Creates a metric of the seconds that generating one batch takes.

    ``measure(sample)`` runs and times a function; ``update(seconds)`` adds what was timed
    elsewhere (with :func:`time_calls`, say). ``compute()`` returns, over all calls and processes,
    ``median`` and ``p95`` seconds (the 95th percentile, interpolated linearly) and ``peak_bytes``,
    the largest memory of tensors on the device (0 where unknown), and raises a ``ValueError`` if
    nothing was timed.

    Args:
        kwargs: Keyword arguments of :class:`torchmetrics.Metric`.

    Example:
        >>> metric = GenerationLatency()
        >>> metric.update([0.5, 0.25, 0.75])
        >>> metric.compute()["median"]
        tensor(0.5000)
        >>> metric.reset()
        >>> metric.measure(lambda: torch.randn(8), repeats=5, warmup=1)
        >>> bool(metric.compute()["median"] <= metric.compute()["p95"])
        True
    """

    seconds: list[Tensor]
    peak_bytes: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("seconds", [], dist_reduce_fx="cat")
        self.add_state("peak_bytes", torch.zeros((), dtype=torch.long), dist_reduce_fx="max")

    def update(self, seconds: float | Sequence[float] | Tensor, peak_bytes: int = 0) -> None:
        """Adds the seconds of one call or several, and the memory that they reached."""
        # A process without calls enters an empty tensor of the metric's dtype into the gathering.
        timed = torch.as_tensor(seconds, dtype=self.dtype, device=self.device).reshape(-1)
        if not bool((timed >= 0).all()):
            raise ValueError(f"seconds are {timed.tolist()}: expected numbers of at least 0")
        self.seconds.append(timed)
        self.peak_bytes = self.peak_bytes.clamp(min=peak_bytes)

    def measure(
        self,
        sample: Callable[[], Any],
        *,
        repeats: int = 10,
        warmup: int = 2,
        most_seconds: float = math.inf,
    ) -> None:
        """Times a function on the metric's device and adds its seconds.

        Args:
            sample: What to time, for example ``lambda: flow.sample((32,))`` under ``no_grad``.
            repeats: Calls that are timed, at least 1.
            warmup: Calls before them that are not.
            most_seconds: Seconds of the calls that are timed: fewer are, but one at least, if the
                last call of the warm-up says that they would take longer. It needs a warm-up.
        """
        if most_seconds < math.inf:
            (last,), _ = time_calls(sample, repeats=1, warmup=warmup - 1, device=self.device)
            repeats, warmup = max(1, min(repeats, int(most_seconds / last))), 0
        seconds, peak_bytes = time_calls(sample, repeats=repeats, warmup=warmup, device=self.device)
        self.update(seconds, peak_bytes)

    def compute(self) -> dict[str, Tensor]:
        """Returns ``median`` and ``p95`` in seconds, and ``peak_bytes``."""
        # After synchronisation the list is one tensor, and may be empty before.
        seconds = dim_zero_cat([torch.empty(0, device=self.device), *self.seconds])
        _check_counted(self, torch.tensor(seconds.numel()), "calls")
        return {
            "median": seconds.quantile(0.5),
            "p95": seconds.quantile(0.95),
            "peak_bytes": self.peak_bytes,
        }
