"""The interface of all estimators."""

import math
from abc import ABC, abstractmethod
from typing import Literal

from torch import Tensor, nn

from dflows.bijections import Bijection
from dflows.errors import UserError

__all__ = ["Draw", "Estimator", "check_positive", "check_softmax"]

Draw = Literal["all", "level", "flow", "turn"]


class Estimator(nn.Module, ABC):
    """Creates an estimator of the gradient of the log-likelihood with respect to logits.

    What it says of itself may change from step to step (:meth:`at_step`), never within one.
    """

    through: bool
    """Whether the gradient crosses flows, which then run on one-hot vectors while training."""
    draw: Draw = "all"
    """What is trained in one step: all flows and levels, one level of each flow, one flow, or the
    flow whose turn it is."""
    turn: int | None = 0
    """Number of the flow whose turn it is, the data's side first, where `draw` says so; None where
    it is not known."""
    rounds: int = 1
    """How often every flow has a turn."""
    draws_maps: bool = False
    """Whether the objective draws the maps in training mode, in place of taking the chosen ones.

    Its value is then an estimate of the expected log-likelihood of drawn maps.
    """

    @property
    def map_temperature(self) -> float:
        """Temperature of the softmax of which maps would be drawn that the gradient stands for."""
        return 1.0

    def check(self, bijection: Bijection) -> None:
        """Refuses a bijection that the estimator cannot train.

        Raises:
            UserError: If it cannot.
        """

    def at_step(self, step: int) -> None:
        """Takes notice of how many optimizer steps were done, before each; a hook."""

    def at_progress(self, progress: float, num_flows: int) -> None:
        """Takes notice of the part of the training that is done, 0 to 1, before each step; a hook.

        Args:
            progress: The part.
            num_flows: Transforms of the stack that hold a network.
        """

    @abstractmethod
    def inverse(
        self, bijection: Bijection, y: Tensor, logits: Tensor, ladj: Tensor, target: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Maps data → base, with the estimator's gradient.

        Args:
            bijection: The map of one dimension.
            y: One-hot vectors (…, D, K) where `through`, else indices (…, D) or one-hot vectors.
            logits: Logits (…, D, num_logits).
            ladj: Log-determinants (…), zeros.
            target: Log-probabilities (K,) of the x to aim at, where the bijection needs them.

        Returns:
            The value in the representation of `y`, and log-determinants (…), zeros.
        """

    @abstractmethod
    def forward_map(
        self, bijection: Bijection, x: Tensor, logits: Tensor, ladj: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Maps base → data on one-hot vectors (…, D, K), as :meth:`inverse` does data → base."""


def check_softmax(estimator: Estimator, bijection: Bijection) -> None:
    """Refuses a bijection whose map is not chosen by a softmax.

    Raises:
        UserError: If it is not.
    """
    if not bijection.categorical:
        raise UserError(
            f"{type(estimator).__name__} weighs the classes of a softmax, and "
            f"{type(bijection).__name__} does not choose by one: train it with LocalObjective or "
            "SoftmaxStraightThrough"
        )


def check_positive(temperature: float) -> float:
    """Returns a temperature.

    Raises:
        UserError: If it is not positive.
    """
    if not 0 < temperature < math.inf:
        raise UserError(f"temperature is {temperature}: give a positive number")
    return temperature
