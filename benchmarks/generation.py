"""Seconds to generate text, of every system, beside its opponents and what the device allows.

    python benchmarks/generation.py --record results/benchmarks
    python benchmarks/generation.py --record results/benchmarks --length 2048
        --opponent transformer-lanes --systems {lstm,transformer}-lanes{,-32,-64,-128}

Systems have an equal number of parameters, or the sizes of the paper's comparison. Each is run in
its ways: `steps` (cached steps, one evaluation a level), `compiled` (the same by torch.compile),
`graph` and `compiled-graph` (on a CUDA device); and the autoregressive ones `naive` too: the
Transformer evaluated anew on all that precedes a character, the LSTM by its whole module a
character at a time. Where a naive way would take minutes, every so many characters are timed and
stand for the others. Weights are random, so that there is no fixed point to time: how many
iterations it takes is for trained models to say; dflows.generate --method fixed_point tells it.

The systems over lanes are two networks, each in several numbers of passes beside autoregressive. A
record of another length has it in its name.

The roofline of a system is the longer of two times: to read the weights of every pass, at the
measured bandwidth; and to do its operations, at the measured rate of matrix products. What is read
beside the weights is not counted, nor is that a cache may hold them: it is a bound for weights that
no cache holds.
"""

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import measuring
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from dflows import AutoregressiveBase, Conditioner, DiscreteFlow, NGramBase, flows
from dflows.backbones import LSTM, LevelConvolution, Transformer
from dflows.bijections import Bijection, ModularAffine, ModularShift, RankPermutation
from dflows.categorical import inverse_cdf
from dflows.latent import AutoregressivePrior, FlowPrior, InverseAutoregressivePrior, LatentFlow
from dflows.metrics import GenerationLatency
from dflows.orderings import CoarseToFine, Natural, Ordering, Parity, Reversed, Strided

NUM_CLASSES = 27
HEADS = 4
LENGTH = 288
System = DiscreteFlow | LatentFlow
Network = Callable[..., nn.Module]
"""Makes a network of so many features and layers."""
Build = Callable[[int, int, int], System]
"""Builds a system of so many dimensions, features and layers."""


def language_model(network: Network, ordering: Ordering, length: int, *size: int) -> DiscreteFlow:
    """Builds a base over levels, without transforms."""
    return flows.language_model(NUM_CLASSES, length, partial(network, *size), ordering=ordering)


def stack(
    network: Network,
    orderings: list[Ordering],
    bijection: type[Bijection],
    length: int,
    *size: int,
) -> DiscreteFlow:
    """Builds transforms on a factorized base."""
    return flows.stack(NUM_CLASSES, length, orderings, partial(network, *size), bijection)


def both_directions(length: int, *size: int) -> DiscreteFlow:
    """Builds a right-to-left transform on a left-to-right base."""
    network = partial(LSTM, *size)
    base = flows.AutoregressiveFactory(network())
    return flows.stack(NUM_CLASSES, length, [Reversed()], network, base=base)


def latent(prior: Callable[..., FlowPrior], couplings: int, length: int, *size: int) -> LatentFlow:
    """Builds a model of a latent vector a character, with a quarter of the width."""
    width, layers = size
    networks = bidirectional(*size), bidirectional(*size)
    over_time = prior(max(2, width // 4), 2 * width, layers, couplings)
    return LatentFlow(NUM_CLASSES, length, over_time, *networks)


def n_gram(length: int, *_: int) -> DiscreteFlow:
    """Builds a chain that is counted on random text."""
    base = NGramBase(NUM_CLASSES, length, order=6)
    base.count([torch.randint(NUM_CLASSES, (100_000,))])
    return DiscreteFlow(base)


bidirectional = partial(LSTM, bidirectional=True)
causal = partial(Transformer, heads=HEADS)
full = partial(Transformer, heads=HEADS, attention="full")


def parities(number: int) -> list[Ordering]:
    """Returns alternating bipartite orderings."""
    return [Parity(first=n % 2) for n in range(number)]


LANES = {"": Natural(), **{f"-{passes}": Strided(passes) for passes in (32, 64, 128)}}
"""The orderings of a network over lanes, by what they add to its name."""

# Layers at an equal number of parameters; width and layers of the published systems, where there
# are such, and of ours that are compared with them.
SYSTEMS: dict[str, tuple[Build, int, tuple[int, int]]] = {
    "transformer": (partial(language_model, causal, Natural()), 12, (512, 12)),
    "transformer-64": (partial(language_model, causal, Natural()), 64, (512, 64)),
    "lstm": (partial(language_model, LSTM, Natural()), 1, (512, 1)),
    "lstm-3": (partial(language_model, LSTM, Natural()), 3, (1000, 3)),
    "latent-af": (partial(latent, AutoregressivePrior, 5), 1, (250, 2)),
    "latent-iaf": (partial(latent, InverseAutoregressivePrior, 3), 1, (250, 2)),
    "bipartite-lstm": (partial(stack, bidirectional, parities(2), ModularAffine), 1, (512, 1)),
    "bipartite-4": (partial(stack, full, parities(4), ModularAffine), 3, (512, 3)),
    "bipartite-8-shift": (partial(stack, full, parities(8), ModularShift), 2, (512, 2)),
    "bipartite-8": (partial(stack, full, parities(8), ModularAffine), 2, (512, 2)),
    "both-directions": (both_directions, 1, (512, 1)),
    "coarse-to-fine": (
        partial(stack, LevelConvolution, [CoarseToFine(8)], RankPermutation),
        4,
        (512, 4),
    ),
    **{
        f"few-pass-{passes}": (
            partial(stack, LevelConvolution, [Strided(passes + 1)], RankPermutation),
            4,
            (512, 4),
        )
        for passes in (4, 8, 16, 32)
    },
    **{
        f"levels-{passes}": (
            partial(language_model, LevelConvolution, Strided(passes)),
            4,
            (512, 4),
        )
        for passes in (4, 8, 16, 32)
    },
    "levels-16-transformer": (partial(language_model, causal, Strided(16)), 12, (512, 12)),
    "n-gram": (n_gram, 0, (0, 0)),
    **{
        f"{name}{suffix}": (partial(language_model, network, ordering), *sizes)
        for name, network, *sizes in (
            ("lstm-lanes", partial(LSTM, ahead=16), 1, (512, 1)),
            ("transformer-lanes", partial(causal, positions="lanes"), 8, (512, 8)),
        )
        for suffix, ordering in LANES.items()
    },
}


def conditioner_of(flow: DiscreteFlow) -> Conditioner:
    """Returns the network of a base over levels."""
    return cast("AutoregressiveBase", flow.base).conditioner


def parameters_of(flow: System) -> int:
    """Counts parameters."""
    return sum(parameter.numel() for parameter in flow.parameters())


def sample(flow: System, number: int, generator: torch.Generator | None = None) -> Tensor:
    """Draws so many sequences."""
    if isinstance(flow, LatentFlow):
        return flow.sample(number, generator=generator)
    return flow.sample((number,), generator=generator)


def equal_width(build: Build, length: int, layers: int, parameters: int) -> int:
    """Finds the width, in multiples of the heads' pairs, whose parameters come closest."""
    step = 2 * HEADS

    def miss(width: int) -> float:
        return abs(parameters_of(build(length, width, layers)) - parameters)

    width = step
    while miss(width + step) < miss(width):
        width += step
    return width


def uncached(flow: DiscreteFlow, number: int, generator: torch.Generator, every: int) -> Tensor:
    """Samples by evaluating the whole prefix, one character in so many."""
    conditioner = conditioner_of(flow)
    noise = flow.base.noise(number, flow.length, generator)
    y = torch.zeros(noise.shape, dtype=torch.long, device=noise.device)
    for dimension in range(0, flow.length, every):
        logits = conditioner.level_logits(y[:, : dimension + 1], dimension)
        y[:, dimension] = inverse_cdf(noise[:, dimension], logits=logits[:, 0])
    return y


def by_module(flow: DiscreteFlow, number: int, generator: torch.Generator, every: int) -> Tensor:
    """Samples with nn.LSTM, one character in so many."""
    conditioner = conditioner_of(flow)
    backbone, embedding = cast("LSTM", conditioner.backbone), conditioner.embedding
    readout = cast("nn.Module", backbone.readout)
    noise = flow.base.noise(number, flow.length, generator)
    y = torch.zeros(noise.shape, dtype=torch.long, device=noise.device)
    before, state = backbone.start.expand(number, -1), None
    for dimension in range(0, flow.length, every):
        output, state = backbone.lstm(before.unsqueeze(1), state)
        logits = conditioner.head(backbone.linear(output[:, 0]) + readout(output[:, 0]))
        y[:, dimension] = inverse_cdf(noise[:, dimension], logits=logits)
        before = embedding.values[y[:, dimension]]
    return y


NAIVE = {
    "transformer": uncached,
    "transformer-lanes": uncached,
    "lstm": by_module,
    "lstm-3": by_module,
    "lstm-lanes": by_module,
}


def ways_of(
    name: str, flow: System, device: torch.device, compiled: bool, every: int
) -> Iterator[tuple[str, Callable[[int], Tensor], int]]:
    """Yields the ways to run a system, and for how many characters one that is drawn stands."""

    def draw(number: int) -> Tensor:
        return sample(flow, number, torch.Generator(device).manual_seed(0))

    if name in NAIVE and isinstance(flow, DiscreteFlow):
        naive = NAIVE[name]

        def draw_naively(number: int) -> Tensor:
            return naive(flow, number, torch.Generator(device).manual_seed(0), every)

        yield "naive", draw_naively, every
    yield "steps", draw, 1
    if isinstance(flow, LatentFlow):
        return
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
    """Times a call so often as fits into so many seconds, at least once.

    What is compiled or captured for the first call tells nothing of how many that are.
    """
    latency = GenerationLatency().to(device)
    latency.measure(call, repeats=repeats, most_seconds=most_seconds)
    return latency


def attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Counts the operations of attention on a CPU, which PyTorch counts on GPUs only."""
    return sdpa_flop_count(query, key, value)


def lstm_flops(inputs: Any, *weights: Any, **_: Any) -> int:
    """Counts the operations of an LSTM's layer in one direction on a CPU, (…, N, T, features)."""
    rows, columns, hidden = weights[0][0], weights[0][1], weights[1][1]
    return 2 * inputs[0] * inputs[1] * rows * (columns + hidden)


UNCOUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten.mkldnn_rnn_layer: lstm_flops,
}


def weights_read(flow: System) -> int:
    """Counts the bytes of weights that the passes read, one after the other."""

    def size(module: nn.Module) -> int:
        return sum(p.numel() * p.element_size() for p in module.parameters())

    if isinstance(flow, LatentFlow):
        return flow.prior.passes(flow.length) * size(flow.prior) + size(flow.emission)
    return sum(
        part.passes * (size(part.conditioner.backbone) + size(part.conditioner.head))
        for part in (flow.base, *flow.transforms)
        if hasattr(part, "conditioner")
    )


class Roofline:
    """Creates a device's limits, measured.

    Args:
        device: The device.
        smoke: Whether to measure roughly.
    """

    def __init__(self, device: torch.device, smoke: bool) -> None:
        cuda = device.type == "cuda"
        self.bandwidth = measuring.bandwidth(device, 2**22 if smoke else 2**30 if cuda else 2**28)
        self.rate = measuring.matrix_rate(device, 128 if smoke else 8192 if cuda else 1024)

    def seconds(self, flow: System, number: int) -> float:
        """Returns the least seconds for so many sequences, of a flow that is not accelerated.

        A graph that is replayed would tell of no operations.
        """
        with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
            sample(flow, number)
        return max(weights_read(flow) / self.bandwidth, counter.get_total_flops() / self.rate)


def measure(
    name: str,
    flow: System,
    roofline: Roofline,
    options: Any,
    device: torch.device,
) -> dict[str, dict[str, Any]]:
    """Measures all ways of a system."""
    found: dict[str, dict[str, Any]] = {}
    expected: Tensor | None = None
    counted = parameters_of(flow) and options.roofline
    least = {number: roofline.seconds(flow, number) for number in (1, 32) if counted}
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
            if number in least:
                metrics[f"roofline_seconds_{number}"] = least[number]
        found[way] = metrics
        print(
            f"{name} {way}: "
            + ", ".join(
                f"{metrics[f'generation_seconds_{number}']:.4g} s at batch {number}"
                + (f" (roofline {metrics[f'roofline_seconds_{number}']:.2g})" if least else "")
                for number in (1, 32)
            ),
            flush=True,
        )
    return found


def add_ratios(
    ways: dict[str, dict[str, Any]], opponent: dict[str, dict[str, Any]], rival: str
) -> dict[str, str]:
    """Adds the ratios of a system to its opponent, naive and at its best, and names these."""
    names = {"naive_opponent": f"{rival} naive"}
    for number in (1, 32):
        key = f"generation_seconds_{number}"
        best = min((way for way in opponent if way != "naive"), key=lambda way: opponent[way][key])
        names[f"opponent_{number}"] = f"{rival} {best}"
        seconds, naive = opponent[best][key], opponent["naive"][key]
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
    parser.add_argument("--opponent", choices=list(NAIVE), default="transformer")
    parser.add_argument("--length", type=int, default=None, help=f"of a sequence; {LENGTH}")
    parser.add_argument("--compile", action="store_true", help="time compiled ways too")
    parser.add_argument("--naive-every", type=int, default=1, help="characters that one stands for")
    parser.add_argument(
        "--no-roofline", dest="roofline", action="store_false", help="count no operations: slow"
    )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--most-seconds", type=float, default=60.0, help="of one timing")
    parser.add_argument(
        "--within",
        type=float,
        default=math.inf,
        help="seconds after which no further system is begun",
    )
    options = parser.parse_args()
    begin = time.perf_counter()
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    sizes = options.size if options.length is None else f"{options.size}-{options.length}"
    length = options.length or LENGTH
    if options.smoke:
        length, options.parameters, options.repeats = 16, 20_000, 2
    roofline = Roofline(device, options.smoke)
    print(
        f"{roofline.bandwidth / 1e9:.1f} GB/s, {roofline.rate / 1e9:.1f} GFLOP/s, "
        f"{torch.get_num_threads()} threads"
    )
    opponent: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys([options.opponent, *options.systems]):
        if opponent and time.perf_counter() - begin > options.within:
            print(f"{name}: left out, {options.within:g} seconds are over")
            continue
        build, layers, paper = SYSTEMS[name]
        if options.smoke:
            layers = min(layers, 2)
        size = paper
        if options.smoke or options.size == "equal":
            width = equal_width(build, length, layers, options.parameters) if layers else 0
            size = width, layers
        flow = build(length, *size).to(device).eval()
        for parameter in flow.parameters():  # at initialisation flows are the identity
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
        print(f"{name}: {parameters_of(flow):,} parameters, {flow.passes} passes", flush=True)
        ways = measure(name, flow, roofline, options, device)
        opponent = opponent or ways
        opponents = add_ratios(ways, opponent, options.opponent)
        for way, metrics in ways.items():
            print(
                f"{name} {way}: {metrics['generation_ratio_1']:.3g} times as fast as "
                f"{opponents['opponent_1']} at batch 1, {metrics['generation_ratio_32']:.3g} as "
                f"{opponents['opponent_32']} at 32; than naive {metrics['naive_ratio_1']:.3g} and "
                f"{metrics['naive_ratio_32']:.3g}"
            )
            measuring.write(
                options.record,
                f"generation-{sizes}-{name}-{way}",
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
                parameters=parameters_of(flow),
                begin=begin,
            )


if __name__ == "__main__":
    main()
