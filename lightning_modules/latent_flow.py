"""The opponents with a continuous latent sequence: AF/SCF and IAF/SCF, judged by bounds."""

import copy
from typing import Literal

import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Generator, Tensor

from dflows.checks import CertificateError
from dflows.errors import UserError
from dflows.latent import LatentFlow
from dflows.metrics import BitsPerCharacter
from dflows.reporting import Report
from lightning_modules.base import DEFAULT_OPTIMIZATION, BaseModule, Batch, Optimization, compute

__all__ = ["LatentFlowModule"]

CHECKED = 16
TOLERANCE = 1e-4


class LatentFlowModule(BaseModule):
    r"""Creates a latent-variable model of windows and trains it by the evidence lower bound.

    Its likelihoods are bounds, not exact: `valid_bpc`, `test_bpc` and the nats are those of the
    evidence lower bound, and `test_bpc_importance` is the importance-weighted bound of
    `importance_samples` samples, which testing logs too. Evaluation draws the same numbers every
    time, so that a checkpoint gives the same figures.

    In training the divergence of posterior and prior has a weight, `kl_weight`, which is 0 at first
    and then rises to 1, so that the model learns to use the latent sequence before it pays for it;
    `train_bpc` is that of the weighted bound, which is no likelihood while the weight is below 1.
    Before a fit the prior is checked: its two directions must undo each other.

    Args:
        flow: The model.
        num_samples: Latent sequences drawn for a window in training and validation.
        importance_samples: Those of the bounds on the test split, drawn at once: memory grows with
            them and with `eval_batch_size`.
        kl_zero_steps: First steps in which the divergence has weight 0.
        kl_rise_steps: Steps after those in which the weight rises to 1.
        optimization: Settings of the optimizer.

    Raises:
        UserError: If a number is out of range.

    References:
        Latent Normalizing Flows for Discrete Sequences (Ziegler & Rush, 2019), arXiv:1901.10548

    Example:
        >>> from dflows.backbones import LSTM
        >>> from dflows.latent import InverseAutoregressivePrior
        >>> prior = InverseAutoregressivePrior(features=4, hidden=8)
        >>> inference, emission = (LSTM(width=8, bidirectional=True) for _ in range(2))
        >>> LatentFlowModule(LatentFlow(27, 16, prior, inference, emission)).passes
        2
    """

    likelihood = "bound"

    def __init__(
        self,
        flow: LatentFlow,
        *,
        num_samples: int = 1,
        importance_samples: int = 16,
        kl_zero_steps: int = 0,
        kl_rise_steps: int = 0,
        optimization: Optimization = DEFAULT_OPTIMIZATION,
    ) -> None:
        super().__init__(optimization)
        for name, value, least in (
            ("num_samples", num_samples, 1),
            ("importance_samples", importance_samples, 1),
            ("kl_zero_steps", kl_zero_steps, 0),
            ("kl_rise_steps", kl_rise_steps, 0),
        ):
            if value < least:
                raise UserError(f"{name} is {value}: give at least {least}")
        self.flow = flow
        self.num_samples = num_samples
        self.importance_samples = importance_samples
        self.kl_zero_steps = kl_zero_steps
        self.kl_rise_steps = kl_rise_steps
        self.importance = BitsPerCharacter()
        self.bpc_importance: float | None = None
        self._generator: Generator | None = None

    @property
    def passes(self) -> int:
        return self.flow.passes

    def kl_weight(self, step: int) -> float:
        """Returns the weight of the divergence after so many optimizer steps.

        Args:
            step: Optimizer steps done.
        """
        rising = step - self.kl_zero_steps
        if rising < 0:
            return 0.0
        return min(1.0, rising / self.kl_rise_steps) if self.kl_rise_steps else 1.0

    def evaluate_objective(self, batch: Batch) -> Tensor:
        weight = self.kl_weight(self.global_step)
        return self.flow.terms(self.indices_of(batch), self.num_samples).bound(weight)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """Returns the loss, and logs the weight of the divergence in it."""
        self.log("kl_weight", self.kl_weight(self.global_step))
        return super().training_step(batch, batch_idx)

    def log_prob(self, batch: Batch) -> Tensor:
        """Computes the evidence lower bound (B,) on the log-likelihood, in nats."""
        return self.flow.terms(self.indices_of(batch), self.num_samples, self._generator).bound()

    def sample(
        self,
        num_samples: int,
        *,
        length: int | None = None,
        temperature: float = 1.0,
        generator: Generator | None = None,
        method: Literal["levels", "fixed_point"] = "levels",
        context: Tensor | None = None,
    ) -> Tensor:
        if method != "levels":
            raise UserError(
                f"method is {method!r}, and a latent flow draws its latent sequence in one way: "
                "leave it at levels"
            )
        if context is not None:
            raise UserError("a latent flow takes no context: choose a FlowModule or LanguageModel")
        return self.flow.sample(
            num_samples, length=length, temperature=temperature, generator=generator
        )

    def prepare(self) -> None:
        self.data.refuse_context("a LatentFlowModule")
        rank_zero_info(self.describe())
        self.certify(trained=False)

    def certify(self, batch: Batch | None = None, *, trained: bool = True) -> None:
        """Shows that the prior inverts itself: what its two directions make of each other.

        Raises:
            CertificateError: If it does not.
        """
        self._check_prior()

    @torch.no_grad()
    def _check_prior(self) -> None:
        # In double precision, so that it is the map that is judged, and not its rounding.
        prior = copy.deepcopy(self.flow.prior).double().eval()
        noise = prior.start.new_empty(2, min(self.flow.length, CHECKED), prior.features).normal_()
        again, _ = prior.inv(prior.transform(noise))
        error = float((again - noise).abs().max())
        if not error < TOLERANCE:
            raise CertificateError(
                f"a {type(prior).__name__} does not invert itself: noise comes back with an error "
                f"of {error:.2g}"
            )

    def describe(self) -> str:
        """Returns what the model is, in a line."""
        flow = self.flow
        return ", ".join(
            [
                f"{type(flow.prior).__name__} of {flow.prior.features} features a position",
                f"{flow.length} dimensions of {flow.num_classes} classes",
                f"{flow.passes} passes to generate",
                f"{sum(parameter.numel() for parameter in self.parameters()):,} parameters",
                "its likelihoods are bounds",
            ]
        )

    def on_validation_epoch_start(self) -> None:
        """Seeds the samples of the validation split, the same every time."""
        self._restart()

    def on_test_epoch_start(self) -> None:
        """Seeds the samples of the test split, the same every time."""
        self._restart()

    def _restart(self) -> None:
        self._generator = Generator(self.device).manual_seed(self.trainer.global_rank)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds a batch to the metrics of both bounds, which share their samples."""
        y = self.indices_of(batch)
        with self.located("test"):
            terms = self.flow.terms(y, self.importance_samples, self._generator)
            self._update("test", batch, terms.bound())
            self.importance.update(terms.importance_bound(), y.numel())

    def on_test_epoch_end(self) -> None:
        """Logs both bounds."""
        super().on_test_epoch_end()
        self._generator = None
        bits = compute(self.importance)
        self.bpc_importance = float(bits)
        self.log("test_bpc_importance", bits.float(), sync_dist=True)
        self.importance.reset()

    def on_validation_epoch_end(self) -> None:
        """Logs the bound."""
        super().on_validation_epoch_end()
        self._generator = None

    def report(self, split: str) -> Report:
        report = super().report(split)
        if split == "test" and self.bpc_importance is not None:
            number, bits = self.importance_samples, self.bpc_importance
            report.metrics |= {"test_bpc_importance": bits, "importance_samples": number}
            remark = f"bound of {number} samples a window"
            report.row("test, importance-weighted", f"{bits:.4f}", remark)
        return report
