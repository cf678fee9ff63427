"""The modular map with its gradient, and the training step of a flow.

    python benchmarks/modular.py --record results/benchmarks

The map y = loc + scale·x of one-hot vectors is computed, with the gradients of all three, by three
gathers as in dflows.modular, and by its opponents: by dense products of one-hot vectors, K² numbers
a dimension; and with the sum by FFT. Where an opponent would not fit into memory it is timed on
fewer rows, and its figures are those of the whole in proportion.

A flow's training step, optimizer included, is timed against that of the same network over the same
ordering as a plain language model. The flow's base is trained by gradients.
"""

import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import measuring
import torch
from torch import Tensor, nn

from dflows import DiscreteFlow, flows, modular
from dflows.backbones import DilatedConvolution, LevelConvolution, Transformer
from dflows.bijections import ModularAffine, RankPermutation
from dflows.metrics import GenerationLatency
from dflows.objectives import Local
from dflows.orderings import Ordering, Parity, Strided
from dflows.representations import to_one_hot

MOST_BYTES = 2**28
"""Bytes of one intermediate result of an opponent."""


@cache
def table(num_classes: int, device: torch.device) -> Tensor:
    """Tabulates all products modulo K as one-hot vectors (K, K, K)."""
    classes = torch.arange(num_classes, device=device)
    return to_one_hot(classes.unsqueeze(-1) * classes % num_classes, num_classes)


def dense_product(x: Tensor, scale: Tensor) -> Tensor:
    """Multiplies one-hot vectors (…, K) modulo K.

    Where the table (K, K, K) of all products fits it is by matrix products, which is quickest, and
    else by adding up all products of two entries.
    """
    num_classes = x.shape[-1]
    if 4 * num_classes**3 <= MOST_BYTES:
        return torch.einsum("...j,jsk,...s->...k", x, table(num_classes, x.device), scale)
    classes = torch.arange(num_classes, device=x.device)
    places = (classes.unsqueeze(-1) * classes % num_classes).flatten()
    products = (x.unsqueeze(-1) * scale.unsqueeze(-2)).flatten(-2)
    return torch.zeros_like(x).index_add(-1, places, products)


def dense(x: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """Computes the map by dense products: a circulant matrix of the location for the sum."""
    num_classes = x.shape[-1]
    classes = torch.arange(num_classes, device=x.device)
    circulant = loc[..., (classes - classes.unsqueeze(-1)) % num_classes]
    return (dense_product(x, scale).unsqueeze(-2) @ circulant).squeeze(-2)


def fourier(x: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """Computes the map with the sum as a convolution by FFT."""
    product = torch.fft.rfft(dense_product(x, scale)) * torch.fft.rfft(loc)
    return torch.fft.irfft(product, n=x.shape[-1])


def gathers(x: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """Computes the map as dflows does."""
    return modular.affine(x, loc, scale, x.shape[-1])


WAYS = {"gathers": gathers, "dense": dense, "fft": fourier}


def values(shape: tuple[int, int], num_classes: int, device: torch.device) -> list[Tensor]:
    """Draws x, location and scale as one-hot vectors that take a gradient."""
    units = modular.units(num_classes).to(device)
    x, loc = torch.randint(num_classes, (2, *shape), device=device)
    scale = units[torch.randint(len(units), shape, device=device)]
    return [to_one_hot(part, num_classes).requires_grad_() for part in (x, loc, scale)]


def with_gradient(
    way: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: list[Tensor], weight: Tensor
) -> tuple[Tensor, ...]:
    """Computes the map and its three gradients."""
    return torch.autograd.grad(way(*inputs), inputs, weight)


def time_maps(
    num_classes: int, shape: tuple[int, int], repeats: int, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Times all ways, and checks that they agree on values and gradients."""
    found: dict[str, dict[str, Any]] = {}
    few = values((2, 8), num_classes, device)
    weight = torch.randn(2, 8, num_classes, device=device)
    for name, way in WAYS.items():
        torch.testing.assert_close(way(*few), gathers(*few), rtol=0, atol=1e-4)
        grads = with_gradient(way, few, weight)
        for part, expected in enumerate(with_gradient(dense, few, weight)):
            if part == 2:  # scales that are no units have no gradient
                expected = expected * modular.unit_mask(num_classes).to(device)
                grads = (*grads[:2], grads[2] * modular.unit_mask(num_classes).to(device))
            torch.testing.assert_close(grads[part], expected, rtol=0, atol=1e-3)
        rows = shape[0]
        if name != "gathers":
            rows = max(1, min(rows, MOST_BYTES // (4 * shape[1] * num_classes**2)))
        inputs = values((rows, shape[1]), num_classes, device)
        call = partial(with_gradient, way, inputs, torch.randn_like(inputs[0]))
        latency = GenerationLatency().to(device)
        latency.measure(call, repeats=repeats, warmup=2)
        seconds = latency.compute()
        whole = shape[0] / rows
        found[name] = {
            "call_seconds": float(seconds["median"]) * whole,
            "call_seconds_p95": float(seconds["p95"]) * whole,
            "call_bytes": round(measuring.peak_bytes(call, device) * whole),
            "rows": rows,
        }
    return found


class Training(nn.Module):
    """Creates what a training step takes of a flow.

    Args:
        flow: The flow.
        objective: What is maximised.
    """

    def __init__(self, flow: DiscreteFlow, objective: Local) -> None:
        super().__init__()
        objective.prepare(flow)
        self.flow = flow
        self.objective = objective

    def stepper(self, y: Tensor) -> Callable[[], None]:
        """Returns a training step."""
        optimizer = torch.optim.AdamW(self.parameters(), fused=True)

        def step() -> None:
            loss = -self.objective(self.flow, y).mean() / y.shape[1]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step

    @property
    def size(self) -> int:
        """Parameters, those of the objective included."""
        return sum(parameter.numel() for parameter in self.parameters())


def steps_of(
    device: torch.device, smoke: bool
) -> dict[str, tuple[Training, Training, tuple[int, int, int]]]:
    """Builds flows and language models of the same network and ordering, with (N, D, K)."""
    num_classes, length, rows = (5, 32, 2) if smoke else (50, 128, 16)
    width, layers = (16, 1) if smoke else (128, 3)
    networks: dict[str, tuple[Callable[[], nn.Module], Ordering]] = {
        "transformer": (partial(Transformer, width, layers=layers), Strided(16)),
        "level-convolution": (partial(LevelConvolution, width, layers=layers), Strided(16)),
        "masked-convolution": (partial(DilatedConvolution, width, layers=layers), Parity()),
    }
    bijections = {"rank": RankPermutation, "affine": ModularAffine}
    built = {}
    for name, (backbone, ordering) in networks.items():
        for kind, bijection in bijections.items():
            torch.manual_seed(0)
            both = [
                Training(flow, Local("levels")).to(device)
                for flow in (
                    flows.stack(num_classes, length, [ordering], backbone, bijection),
                    flows.language_model(num_classes, length, backbone, ordering=ordering),
                )
            ]
            built[f"{name}-{kind}"] = both[0], both[1], (rows, length, num_classes)
    return built


def time_steps(
    flow: Training, model: Training, shape: tuple[int, int, int], repeats: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Times the steps of both in turns."""
    device = next(flow.parameters()).device
    y = torch.randint(shape[2], shape[:2], device=device)
    steps = [flow.stepper(y), model.stepper(y)]
    latencies = [GenerationLatency().to(device) for _ in steps]
    for turn in range(repeats + 1):
        for step, latency in zip(steps, latencies, strict=True):
            latency.measure(step, repeats=1 if turn else 2, warmup=0 if turn else 2)
    found = []
    for latency in latencies:
        seconds = latency.compute()
        found.append(
            {
                "call_seconds": float(seconds["median"]),
                "call_seconds_p95": float(seconds["p95"]),
            }
        )
    return found[0], found[1]


def main() -> None:
    """Runs the benchmark."""
    parser = measuring.arguments(__doc__)
    parser.add_argument("--classes", type=int, nargs="+", default=[27, 53, 256, 1024])
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    begin = time.perf_counter()
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    shape = (4, 16) if options.smoke else (64, 256)
    classes = [5, 27] if options.smoke else options.classes
    repeats = 2 if options.smoke else options.repeats
    write = partial(measuring.write, options.record, device=device, seed=options.seed, begin=begin)
    for num_classes in classes:
        found = time_maps(num_classes, shape, repeats, device)
        ours = found["gathers"]
        for name, metrics in found.items():
            rows = metrics.pop("rows")
            config = {"way": name, "num_classes": num_classes, "shape": shape, "rows": rows}
            line = (
                f"K={num_classes} {name}: {metrics['call_seconds'] * 1e3:.2f} ms, "
                f"{metrics['call_bytes'] / 1e6:.1f} MB"
            )
            if name != "gathers":
                of = {
                    "seconds_ratio": ours["call_seconds"] / metrics["call_seconds"],
                    "bytes_ratio": ours["call_bytes"] / max(metrics["call_bytes"], 1),
                }
                metrics |= of
                config["opponent"] = f"modular-gathers-{num_classes}"
                line += (
                    f": {1 / of['seconds_ratio']:.1f} and {1 / of['bytes_ratio']:.1f} times as much"
                )
            print(line, flush=True)
            write(f"modular-{name}-{num_classes}", config, metrics, parameters=0)
    for name, (flow, model, of) in steps_of(device, options.smoke).items():
        metrics, plain = time_steps(flow, model, of, repeats)
        metrics["seconds_ratio"] = plain["call_seconds"] / metrics["call_seconds"]
        print(
            f"training step, {name}: {metrics['call_seconds'] * 1e3:.1f} ms, language model "
            f"{plain['call_seconds'] * 1e3:.1f} ms: {1 / metrics['seconds_ratio']:.2f} times",
            flush=True,
        )
        config = {"network": name, "shape": of, "opponent": f"step-{name}-language-model"}
        write(f"step-{name}", config, metrics, parameters=flow.size)
        config = {"network": name, "shape": of}
        write(f"step-{name}-language-model", config, plain, parameters=model.size)


if __name__ == "__main__":
    main()
