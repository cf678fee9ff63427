"""Seconds to generate text, of every system, beside its opponents and what the device allows.

    python benchmarks/generation.py --record results/benchmarks

Systems have an equal number of parameters, or the sizes of the paper's comparison. Each is run in
its ways: `steps` (cached steps, one evaluation a level), `compiled` (the same by torch.compile),
`graph` and `compiled-graph` (on a CUDA device); and the autoregressive ones `naive` too: the
Transformer evaluated anew on all that precedes a character, the LSTM by its whole module a
character at a time. Where a naive way would take minutes, every so many characters are timed and
stand for the others. Weights are random, so that there is no fixed point to time: how many
iterations it takes is for trained models to say; dflows.generate --method fixed_point tells it.

The roofline of a system is the longer of two times: to read the weights of every pass, at the
measured bandwidth; and to do its operations, at the measured rate of matrix products. What is read
beside the weights is not counted, nor is that a cache may hold them: it is a bound for weights that
no cache holds.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import measuring
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dflows import AutoregressiveBase, DiscreteFlow, FactorizedBase, NGramBase
from dflows.backbones import LSTM, LevelConvolution, Transformer
from dflows.bijections import ModularAffine, RankPermutation
from dflows.metrics import GenerationLatency, time_calls
from dflows.orderings import Natural, Ordering, Parity, Reversed, Strided
from dflows.transforms import ConditionalTransform

NUM_CLASSES = 27
HEADS = 8
Build = Callable[[int, int, int], DiscreteFlow]
"""Builds a system of so many dimensions, features and layers."""


def over_levels(
    network: Callable[[int, int], nn.Module], ordering: Ordering, length: int, *size: int
) -> DiscreteFlow:
    """Builds a base over levels, without flows."""
    base = AutoregressiveBase(NUM_CLASSES, length, backbone=network(*size), ordering=ordering)
    return DiscreteFlow(base)


def flows(
    network: Callable[[int, int], nn.Module],
    orderings: list[Ordering],
    bijection: type[ModularAffine] | type[RankPermutation],
    length: int,
    *size: int,
) -> DiscreteFlow:
    """Builds flows on a factorized base."""
    transforms = [
        ConditionalTransform(length, bijection(NUM_CLASSES), ordering, network(*size))
        for ordering in orderings
    ]
    return DiscreteFlow(FactorizedBase(NUM_CLASSES, length, orderings), transforms)


def both_directions(length: int, *size: int) -> DiscreteFlow:
    """Builds a right-to-left flow on a left-to-right base."""
    flow = over_levels(lstm, Natural(), length, *size)
    transform = ConditionalTransform(length, RankPermutation(NUM_CLASSES), Reversed(), lstm(*size))
    return DiscreteFlow(flow.base, [transform])


def n_gram(length: int, *_: int) -> DiscreteFlow:
    """Builds a chain that is counted on random text."""
    base = NGramBase(NUM_CLASSES, length, order=6)
    base.count([torch.randint(NUM_CLASSES, (100_000,))])
    return DiscreteFlow(base)


def lstm(width: int, layers: int) -> LSTM:
    """Builds an LSTM that reads in one direction."""
    return LSTM(width, layers=layers)


def bidirectional(width: int, layers: int) -> LSTM:
    """Builds an LSTM that reads both ways."""
    return LSTM(width, layers=layers, bidirectional=True)


def causal(width: int, layers: int) -> Transformer:
    """Builds a Transformer that keeps to the levels."""
    return Transformer(width, layers=layers, heads=HEADS)


def full(width: int, layers: int) -> Transformer:
    """Builds a Transformer that sees all dimensions."""
    return Transformer(width, layers=layers, heads=HEADS, attention="full")


def parities(number: int) -> list[Ordering]:
    """Returns alternating bipartite orderings."""
    return [Parity(first=n % 2) for n in range(number)]


SYSTEMS: dict[str, tuple[Build, int, tuple[int, int]]] = {
    # Layers at an equal number of parameters; width and layers in the paper's comparison.
    "transformer": (partial(over_levels, causal, Natural()), 12, (512, 12)),
    "lstm": (partial(over_levels, lstm, Natural()), 2, (512, 2)),
    "bipartite-4": (partial(flows, full, parities(4), ModularAffine), 2, (512, 2)),
    "bipartite-8": (partial(flows, full, parities(8), ModularAffine), 2, (512, 2)),
    "bipartite-lstm": (partial(flows, bidirectional, parities(4), ModularAffine), 1, (512, 1)),
    "both-directions": (both_directions, 1, (512, 1)),
    **{
        f"levels-{columns}": (partial(over_levels, causal, Strided(columns)), 12, (512, 12))
        for columns in (4, 8, 16, 32)
    },
    "levels-16-convolution": (partial(over_levels, LevelConvolution, Strided(16)), 4, (512, 4)),
    "rank-16": (partial(flows, causal, [Strided(16)], RankPermutation), 12, (512, 12)),
    "n-gram": (n_gram, 0, (0, 0)),
}
OPPONENT = "transformer"


def parameters_of(flow: DiscreteFlow) -> int:
    """Counts parameters."""
    return sum(parameter.numel() for parameter in flow.parameters())


def equal_width(build: Build, length: int, layers: int, parameters: int) -> int:
    """Finds the width, in multiples of the heads' pairs, whose parameters come closest."""
    step = 2 * HEADS

    def miss(width: int) -> float:
        return abs(parameters_of(build(length, width, layers)) - parameters)

    width = step
    while miss(width + step) < miss(width):
        width += step
    return width


def choose(logits: Tensor, noise: Tensor) -> Tensor:
    """Draws values (N,) as the base does, from logits (N, K) and noise (N,)."""
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    threshold = noise.unsqueeze(-1) * cumulative[..., -1:]
    return (cumulative[..., :-1] <= threshold).sum(dim=-1)


def again_and_again(
    flow: DiscreteFlow, number: int, generator: torch.Generator, every: int
) -> Tensor:
    """Draws by evaluating the whole network on all that precedes, for one character in so many."""
    noise = flow.base.noise(number, flow.length, generator)
    y = torch.zeros(noise.shape, dtype=torch.long, device=noise.device)
    for dimension in range(0, flow.length, every):
        logits = flow.base.conditioner.level_logits(y[:, : dimension + 1], dimension)
        y[:, dimension] = choose(logits[:, 0], noise[:, dimension])
    return y


def by_module(flow: DiscreteFlow, number: int, generator: torch.Generator, every: int) -> Tensor:
    """Draws with nn.LSTM, a character at a time."""
    conditioner = flow.base.conditioner
    backbone = conditioner.backbone
    noise = flow.base.noise(number, flow.length, generator)
    y = torch.zeros(noise.shape, dtype=torch.long, device=noise.device)
    before, state = backbone.start.expand(number, -1), None
    for dimension in range(0, flow.length, every):
        inputs = (before + conditioner.query[dimension]).unsqueeze(1)
        output, state = backbone.lstm(inputs, state)
        logits = conditioner.head(backbone.linear(output[:, 0]))
        y[:, dimension] = choose(logits, noise[:, dimension])
        before = conditioner.embedding[y[:, dimension]]
    return y


NAIVE = {"transformer": again_and_again, "lstm": by_module}


def ways_of(
    name: str, flow: DiscreteFlow, device: torch.device, compiled: bool, every: int
) -> Iterator[tuple[str, Callable[[int], Tensor], int]]:
    """Yields the ways to run a system, and for how many characters one that is drawn stands."""

    def draw(number: int) -> Tensor:
        return flow.sample((number,), generator=torch.Generator(device).manual_seed(0))

    if name in NAIVE:
        naive = NAIVE[name]

        def draw_naively(number: int) -> Tensor:
            return naive(flow, number, torch.Generator(device).manual_seed(0), every)

        yield "naive", draw_naively, every
    yield "steps", draw, 1
    if device.type == "cuda":
        flow.accelerate(cuda_graph=True)
        yield "graph", draw, 1
    if compiled and parameters_of(flow):
        flow.accelerate(compile=True)
        yield "compiled", draw, 1
        if device.type == "cuda":
            flow.accelerate(compile=True, cuda_graph=True)
            yield "compiled-graph", draw, 1
    flow.accelerate()


def latency_of(
    call: Callable[[], Tensor], repeats: int, most_seconds: float, device: torch.device
) -> GenerationLatency:
    """Times a call so often as fits into so many seconds, at least once."""
    (first,), _ = time_calls(call, repeats=1, warmup=0, device=device)
    latency = GenerationLatency().to(device)
    latency.measure(call, repeats=max(1, min(repeats, int(most_seconds / first))), warmup=1)
    return latency


class Roofline:
    """Creates a device's limits, measured.

    Arguments:
        device: The device.
        smoke: Whether to measure roughly.
    """

    def __init__(self, device: torch.device, smoke: bool) -> None:
        cuda = device.type == "cuda"
        self.bandwidth = measuring.bandwidth(device, 2**22 if smoke else 2**30 if cuda else 2**28)
        self.rate = measuring.matrix_rate(device, 128 if smoke else 8192 if cuda else 1024)

    def seconds(self, flow: DiscreteFlow, number: int) -> float:
        """Returns the least seconds for so many sequences."""
        parts = [flow.base, *flow.transforms]
        read = sum(
            part.passes * sum(p.numel() * p.element_size() for p in module.parameters())
            for part in parts
            if hasattr(part, "conditioner")
            for module in (part.conditioner.backbone, part.conditioner.head)
        )
        with FlopCounterMode(display=False) as counter:
            flow.sample((number,))
        return max(read / self.bandwidth, counter.get_total_flops() / self.rate)


def measure(
    name: str, flow: DiscreteFlow, roofline: Roofline, options: Any, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Measures all ways of a system."""
    found: dict[str, dict[str, Any]] = {}
    expected: Tensor | None = None
    for way, draw, every in ways_of(name, flow, device, options.compile, options.naive_every):
        if every == 1:  # all ways draw the same, but for logits that tie
            samples = draw(4)
            expected = samples if expected is None else expected
            same = (samples == expected).all(dim=-1).double().mean()
            if same < 0.5:
                raise SystemExit(f"{name}: {way} draws other samples than the ways before it")
        metrics: dict[str, Any] = {
            "passes": flow.passes,
            "generation_length": flow.length,
            "memory_bandwidth": roofline.bandwidth,
            "matrix_rate": roofline.rate,
        }
        for number in (1, 32):
            call = partial(draw, number)
            seconds = latency_of(call, options.repeats, options.most_seconds, device).compute()
            metrics[f"generation_seconds_{number}"] = float(seconds["median"]) * every
            metrics[f"generation_seconds_{number}_p95"] = float(seconds["p95"]) * every
            if device.type == "cuda":
                metrics[f"generation_bytes_{number}"] = int(seconds["peak_bytes"])
            if parameters_of(flow):
                metrics[f"roofline_seconds_{number}"] = roofline.seconds(flow, number)
        found[way] = metrics
        print(
            f"{name} {way}: "
            + ", ".join(
                f"{metrics[f'generation_seconds_{number}']:.4g} s at batch {number}"
                + (
                    f" (roofline {metrics[f'roofline_seconds_{number}']:.2g})"
                    if parameters_of(flow)
                    else ""
                )
                for number in (1, 32)
            ),
            flush=True,
        )
    return found


def add_ratios(measured: dict[str, dict[str, dict[str, Any]]]) -> dict[str, str]:
    """Adds the ratios to the opponent, naive and at its best, and names these."""
    opponent = measured[OPPONENT]
    names = {"naive_opponent": f"{OPPONENT} naive"}
    for number in (1, 32):
        key = f"generation_seconds_{number}"
        best = min((way for way in opponent if way != "naive"), key=lambda way: opponent[way][key])
        names[f"opponent_{number}"] = f"{OPPONENT} {best}"
        seconds, naive = opponent[best][key], opponent["naive"][key]
        for ways in measured.values():
            for metrics in ways.values():
                metrics[f"generation_ratio_{number}"] = seconds / metrics[key]
                metrics[f"naive_ratio_{number}"] = naive / metrics[key]
    return names


@torch.no_grad()
def main() -> None:
    """Runs the benchmark."""
    parser = measuring.arguments(__doc__)
    parser.add_argument("--size", choices=["equal", "paper"], default="equal")
    parser.add_argument("--parameters", type=int, default=3_000_000, help="of every system")
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--length", type=int, default=288)
    parser.add_argument("--compile", action="store_true", help="time compiled ways too")
    parser.add_argument("--naive-every", type=int, default=1, help="characters that one stands for")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--most-seconds", type=float, default=60.0, help="of one timing")
    options = parser.parse_args()
    begin = time.perf_counter()
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    if options.smoke:
        options.length, options.parameters, options.repeats = 16, 20_000, 2
    roofline = Roofline(device, options.smoke)
    print(
        f"{roofline.bandwidth / 1e9:.1f} GB/s, {roofline.rate / 1e9:.1f} GFLOP/s, "
        f"{torch.get_num_threads()} threads"
    )
    built: dict[str, DiscreteFlow] = {}
    measured: dict[str, dict[str, dict[str, Any]]] = {}
    for name in dict.fromkeys([OPPONENT, *options.systems]):
        build, layers, paper = SYSTEMS[name]
        if options.smoke:
            layers = min(layers, 2)
        size = paper
        if options.smoke or options.size == "equal":
            width = equal_width(build, options.length, layers, options.parameters) if layers else 0
            size = width, layers
        flow = build(options.length, *size).to(device).eval()
        for parameter in flow.parameters():  # at initialisation flows are the identity
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
        built[name] = flow
        print(f"{name}: {parameters_of(flow):,} parameters, {flow.passes} passes", flush=True)
        measured[name] = measure(name, flow, roofline, options, device)
    opponents = add_ratios(measured)
    for name, ways in measured.items():
        for way, metrics in ways.items():
            print(
                f"{name} {way}: {metrics['generation_ratio_1']:.3g} times as fast as "
                f"{opponents['opponent_1']} at batch 1, {metrics['generation_ratio_32']:.3g} as "
                f"{opponents['opponent_32']} at 32; than naive {metrics['naive_ratio_1']:.3g} and "
                f"{metrics['naive_ratio_32']:.3g}"
            )
            measuring.write(
                options.record,
                f"generation-{options.size}-{name}-{way}",
                {
                    "system": name,
                    "way": way,
                    "size": options.size,
                    "num_classes": NUM_CLASSES,
                    "naive_every": options.naive_every,
                    **opponents,
                },
                metrics,
                device=device,
                seed=options.seed,
                parameters=parameters_of(built[name]),
                begin=begin,
            )


if __name__ == "__main__":
    main()
