"""Seconds to decode archives of text: models over lanes beside their autoregressive twin.

    python benchmarks/compression.py --record results/benchmarks

The twin is the same LSTM over the natural order, in cached steps. Both decode archives of 1
sequence and of 32 with :func:`dflows.codec.decompress`, on one thread; what they say is checked.
Weights are random, and the text is drawn from each model.
"""

import time
from functools import partial
from typing import Any

import measuring
import torch

from dflows import DiscreteFlow, flows
from dflows.backbones import LSTM
from dflows.codec import compress, decompress
from dflows.metrics import time_calls
from dflows.orderings import Natural, Strided

NUM_CLASSES = 50
TWIN = "lstm"


def systems(length: int, passes: list[int], width: int, hidden: int) -> dict[str, DiscreteFlow]:
    """Returns the twin, and models of its size over lanes."""
    network = partial(LSTM, width, hidden=hidden)
    build = partial(flows.language_model, NUM_CLASSES, length)
    found = {TWIN: build(network, ordering=Natural())}
    for number in passes:
        lanes = build(partial(network, ahead=24), ordering=Strided(number))
        found[f"lstm-lanes-{number}"] = lanes
    return found


@torch.no_grad()
def main() -> None:
    """Runs the benchmark."""
    parser = measuring.arguments(__doc__)
    parser.add_argument("--length", type=int, default=1024, help="of a sequence")
    parser.add_argument("--passes", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    begin = time.perf_counter()
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)
    device = torch.device(options.device)
    if options.smoke:
        options.length, options.passes = 32, [8]
        options.width = options.hidden = 8
        options.repeats = 2
    twin: dict[str, Any] = {}
    found = systems(options.length, options.passes, options.width, options.hidden)
    for name, flow in found.items():
        flow.to(device).eval()
        for parameter in flow.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
        metrics: dict[str, Any] = {"passes": flow.passes, "generation_length": options.length}
        for number in (1, 32):
            y = flow.sample((number,))
            archive = compress(flow, y, batch_size=number)
            if not torch.equal(decompress(flow, archive), y.cpu()):
                raise SystemExit(f"{name}: the archive decodes to something else")
            call = partial(decompress, flow, archive)
            seconds = sorted(time_calls(call, repeats=options.repeats, device=device)[0])
            metrics[f"decode_seconds_{number}"] = seconds[len(seconds) // 2]
        twin = twin or metrics
        for number in (1, 32):
            key = f"decode_seconds_{number}"
            metrics[f"decode_ratio_{number}"] = twin[key] / metrics[key]
        print(
            f"{name}: {flow.passes} passes, "
            + ", ".join(
                f"{metrics[f'decode_seconds_{number}']:.4g} s for {number}, "
                f"{metrics[f'decode_ratio_{number}']:.3g} times as fast as the {TWIN}"
                for number in (1, 32)
            ),
            flush=True,
        )
        measuring.write(
            options.record,
            f"compression-{name}",
            {"system": name, "opponent": f"compression-{TWIN}", "num_classes": NUM_CLASSES},
            metrics,
            device=device,
            seed=options.seed,
            parameters=sum(parameter.numel() for parameter in flow.parameters()),
            begin=begin,
        )


if __name__ == "__main__":
    main()
