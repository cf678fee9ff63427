"""What a finished run is judged by: its figures, one table, samples and a record."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from datamodules import EnumerableDataModule, TextDataModule
from datamodules.module import StreamDataModule
from dflows.checks import check_above_entropy
from dflows.cli.callbacks import Stopwatch
from dflows.exact import expected_loss, states
from dflows.metrics import GenerationLatency, entropy_in_bits
from lightning_modules import BaseModule, DiscreteFlowModule, LatentFlowModule
from lightning_modules.base import Batch

__all__ = [
    "Figures",
    "bigram_bpc",
    "end_processes",
    "exact_nats",
    "measure_generation",
    "print_samples",
    "stdout_console",
    "trainer_device",
    "unigram_bpc",
]

EXACT_STATES = 10_000_000
SHOWN_STATES = 10_000


def unigram_bpc(data: StreamDataModule, split: str) -> float:
    """Returns the unigram entropy of a split, in bits per character."""
    return float(entropy_in_bits(data.class_counts(split).unsqueeze(0)))


def bigram_bpc(data: TextDataModule, split: str) -> float:
    """Returns the bigram entropy of a split, in bits: that of a character given the one before."""
    classes = np.concatenate(list(data.evaluation_chunks(split))).astype(np.int64)
    counts = torch.zeros(data.num_classes, data.num_classes, dtype=torch.double)
    pairs = torch.from_numpy(classes[:-1] * data.num_classes + classes[1:])
    counts.view(-1).index_add_(0, pairs, torch.ones(len(pairs), dtype=torch.double))
    return float(entropy_in_bits(counts))


def exact_nats(module: BaseModule, data: EnumerableDataModule) -> float:
    """Sums the loss of a model over all states, weighted by their true probabilities.

    Args:
        module: A model without a context.
        data: The distribution.

    Returns:
        The exact cross-entropy, nats per example.

    Raises:
        CertificateError: If it lies below the entropy, as it can only where the model is no
            distribution.
    """
    nll = expected_loss(module, module.log_prob, data.probabilities)
    check_above_entropy(nll, data.entropy)
    return nll


def contexts(module: BaseModule, data: StreamDataModule, number: int) -> Tensor | None:
    """Returns so many contexts of the test split to sample with, if the model takes any."""
    if not isinstance(module, DiscreteFlowModule) or not module.conditional:
        return None
    batch: Batch = next(iter(data.test_dataloader()))
    given = module.context_of(batch)
    if given is None:
        return None
    return given[torch.arange(number) % len(given)].to(module.device)


def measure_generation(
    module: BaseModule,
    num_samples: int,
    *,
    context: Tensor | None = None,
    repeats: int = 10,
    warmup: int = 2,
) -> dict[str, float]:
    """Times the generation of so many sequences at once, median and 95th percentile."""
    given: dict[str, Any] = {} if context is None else {"context": context[:num_samples]}
    latency = GenerationLatency().to(module.device)
    with (
        torch.random.fork_rng([module.device] if module.device.type == "cuda" else []),
        torch.no_grad(),
    ):
        latency.measure(lambda: module.sample(num_samples, **given), repeats=repeats, warmup=warmup)
    return {name: float(value) for name, value in latency.compute().items()}


@dataclass
class Figures:
    """Creates the figures of a run, to be printed as a table and written as a record.

    Arguments:
        metrics: Values by the names of :data:`dflows.records.METRICS`.
        rows: Rows of the table: what, value, remark.
        exact_states: The likelihood of a known distribution is summed over all states, where there
            are not more than these.
        likelihood: ``exact``, or ``bound`` where those of the model are bounds.
    """

    metrics: dict[str, Any] = field(default_factory=dict)
    rows: list[tuple[str, str, str]] = field(default_factory=list)
    exact_states: int = EXACT_STATES
    likelihood: str = "exact"

    def add_likelihood(
        self, module: BaseModule, data: StreamDataModule, split: str, bpc: float
    ) -> None:
        """Adds the likelihood of a split, and the unigram entropy of the same split.

        Raises:
            CertificateError: If it lies below the entropy of the data, where that is known, by more
                than chance explains.
        """
        characters = module.counted["characters"][split]
        examples = module.counted["examples"][split]
        nats = bpc * math.log(2) * characters / examples
        unigram = unigram_bpc(data, split)
        self.metrics.setdefault("characters", {})[split] = characters
        self.metrics.setdefault("examples", {})[split] = examples
        self.metrics |= {
            f"{split}_bpc": bpc,
            f"{split}_nats": nats,
            "unigram_bpc" if split == "test" else f"{split}_unigram_bpc": unigram,
        }
        self.likelihood = module.likelihood
        remark = f"{characters:,} characters, {module.likelihood}; unigram entropy {unigram:.3f}"
        self.rows.append((f"{split}, bits per character", f"{bpc:.4f}", remark))
        if isinstance(data, TextDataModule) and split == "test" and characters > 1:
            self.metrics["bigram_bpc"] = bigram_bpc(data, split)
        carried = module.trainer.callback_metrics.get("test_bpc_carried")
        if split == "test" and carried is not None:
            self.metrics["test_bpc_carried"] = float(carried)
            remark = "every window after those before it"
            self.rows.append(("test, context carried", f"{float(carried):.4f}", remark))
        if split == "test" and isinstance(module, LatentFlowModule):
            importance = float(module.trainer.callback_metrics["test_bpc_importance"])
            draws = module.importance_draws
            self.metrics |= {"test_bpc_importance": importance, "importance_draws": draws}
            remark = f"bound of {draws} draws a window"
            self.rows.append(("test, importance-weighted", f"{importance:.4f}", remark))
        accuracy = module.trainer.callback_metrics.get("test_accuracy")
        if split == "test" and accuracy is not None:
            self.metrics["accuracy"] = float(accuracy)
            self.rows.append(("test, told exactly", f"{float(accuracy):.4f}", "share of examples"))
        if data.entropy is not None:
            self.metrics["entropy"] = data.entropy
            # What no example showed is in no deviation either: a share of 1/N of the distribution,
            # over all states at the most.
            unseen = (math.log(examples) + data.length * math.log(data.num_classes)) / examples
            error = math.hypot(module.standard_error[split], unseen)
            if split == "test":
                self.metrics["standard_error_nats"] = module.standard_error[split]
            check_above_entropy(nats, data.entropy, error)
            remark = f"{examples:,} examples; entropy {data.entropy:.3f}"
            self.rows.append((f"{split}, nats per example", f"{nats:.4f}", remark))

    def add_exact(self, module: BaseModule, data: StreamDataModule) -> None:
        """Adds the exact expected loss, where the distribution of the data is known.

        Raises:
            CertificateError: If it lies below the entropy.
        """
        if not isinstance(data, EnumerableDataModule):
            return
        self.metrics["factorized_entropy"] = data.factorized_entropy
        count = data.num_classes**data.length
        if count > self.exact_states or module.likelihood != "exact":
            return
        nats = exact_nats(module, data)
        self.metrics |= {
            "exact_nats": nats,
            "kl": nats - data.entropy,
            "factorized_kl": data.factorized_entropy - data.entropy,
        }
        remark = f"entropy {data.entropy:.4f}, best factorized {data.factorized_entropy:.4f}"
        self.rows.append((f"all {count:,} states, nats", f"{nats:.4f}", remark))
        if data.length == 2 and count <= SHOWN_STATES:
            y = states(data.num_classes, data.length).to(module.device)
            with torch.no_grad():
                table = module.log_prob(y).double().exp().cpu()
            self.metrics["probabilities"] = [float(f"{value:.4g}") for value in table.tolist()]

    def add_flows(self, module: BaseModule) -> None:
        """Adds what the flows are, and what each leaves on the test split."""
        if not isinstance(module, DiscreteFlowModule):
            if module.passes is not None:
                self.metrics["passes"] = module.passes
                self.rows.append(("passes to generate", str(module.passes), "a whole window"))
            return
        flow = module.flow
        self.metrics |= {"passes": flow.passes, "untransformed": flow.untransformed}
        if module.residual_bpc:
            self.metrics["residual_bpc"] = module.residual_bpc
            residuals = ", ".join(f"{bits:.3f}" for bits in module.residual_bpc)
            self.rows.append(
                ("entropy after each flow, bits", residuals, "test, from data to base")
            )
        if module.level_bpc and all(map(math.isfinite, module.level_bpc)):
            self.metrics["level_bpc"] = module.level_bpc
            levels = ", ".join(f"{bits:.2f}" for bits in module.level_bpc)
            self.rows.append(("bits of each level", levels, "test, in the order of generation"))
        of = f"{flow.length} characters at once" if flow.passes else "no network"
        self.rows.append(("passes to generate", str(flow.passes), of))

    def add_speed(self, stopwatch: Stopwatch, module: BaseModule, steps: int) -> None:
        """Adds the speed of training and of evaluation."""
        if stopwatch.train_seconds and stopwatch.train_characters:
            # What was read beside the batches, as where a model is counted, is what it learnt from.
            read = module.counted["characters"].get("train", stopwatch.train_characters)
            speed = read / stopwatch.train_seconds
            self.metrics |= {
                "steps": steps,
                "train_seconds": stopwatch.train_seconds,
                "characters_per_second": speed,
                "examples_per_second": speed
                * stopwatch.train_examples
                / stopwatch.train_characters,
            }
            self.rows.append(
                ("training, characters a second", f"{speed:,.0f}", f"{steps:,} steps in all")
            )
        if stopwatch.test_seconds and "test" in module.counted["characters"]:
            speed = module.counted["characters"]["test"] / stopwatch.test_seconds
            self.rows.append(("evaluation, characters a second", f"{speed:,.0f}", "test"))

    def add_generation(self, module: BaseModule, data: StreamDataModule, repeats: int = 10) -> None:
        """Times generation and adds the latencies."""
        length = data.length
        self.metrics["generation_length"] = length
        context = contexts(module, data, 32)
        for number in (1, 32):
            timed = measure_generation(module, number, context=context, repeats=repeats)
            key = f"generation_seconds_{number}"
            self.metrics |= {key: timed["median"], f"{key}_p95": timed["p95"]}
            if timed["peak_bytes"]:
                self.metrics[f"generation_bytes_{number}"] = int(timed["peak_bytes"])
            what = "1 sequence" if number == 1 else f"{number} sequences"
            self.rows.append(
                (
                    f"generating {what}, seconds",
                    f"{timed['median']:.4f}",
                    f"median; 95th percentile {timed['p95']:.4f}; {length} characters each",
                )
            )

    def add_fixed_point(self, module: BaseModule, data: StreamDataModule, repeats: int = 4) -> None:
        """Adds how many iterations the fixed point takes for a sequence, in the mean of some."""
        if not isinstance(module, DiscreteFlowModule) or not module.flow.passes:
            return
        context = contexts(module, data, 1)
        generator = torch.Generator(module.device).manual_seed(0)
        counts = []
        for _ in range(repeats):
            module.sample(1, context=context, generator=generator, method="fixed_point")
            counts.append(sum(module.flow.evaluations))
        mean = sum(counts) / repeats
        self.metrics["fixed_point_iterations"] = mean
        what = "iterations of the fixed point"
        self.rows.append((what, f"{mean:.4g}", f"1 sequence, mean of {repeats}"))

    def add_samples(
        self, module: BaseModule, data: StreamDataModule, seed: int, number: int = 4
    ) -> list[str]:
        """Generates independent windows, returns them, and adds them where they are text."""
        generator = torch.Generator(module.device).manual_seed(seed)
        context = contexts(module, data, number)
        given: dict[str, Any] = {} if context is None else {"context": context}
        samples = module.sample(number, generator=generator, **given)
        decoded = [data.decode(row) for row in samples.cpu()]
        if isinstance(data, TextDataModule):
            self.metrics["samples"] = decoded
        return decoded

    def print(self, console: Console, title: str) -> None:
        """Prints the table."""
        table = Table(title=title, title_justify="left", show_header=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(justify="right")
        table.add_column(style="dim")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)


def stdout_console() -> Console:
    """Returns a console that does not cut lines where there is no terminal."""
    columns = os.environ.get("COLUMNS")
    console = Console()
    if not console.is_terminal and not columns:
        console = Console(width=120)
    return console


def print_samples(console: Console, samples: Sequence[str]) -> None:
    """Prints independent windows of generated text."""
    console.rule("sample", align="left", style="dim")
    console.print("\n".join(samples), markup=False, highlight=False, soft_wrap=True)
    console.rule(style="dim")


def trainer_device(trainer: pl.Trainer) -> torch.device:
    """Returns the device of this process's model."""
    return trainer.strategy.root_device


def end_processes() -> None:
    """Ends the group of processes, so that what follows on the first disturbs none and is alone."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
