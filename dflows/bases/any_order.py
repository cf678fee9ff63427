"""The base that is trained over all orderings."""

import torch
from torch import Tensor

from dflows.bases.autoregressive import AutoregressiveBase, check_start
from dflows.categorical import inverse_cdf
from dflows.conditioner import Conditioner
from dflows.decoding import Decide
from dflows.errors import UserError
from dflows.orderings import Ordering
from dflows.representations import check_logits, full_precision
from dflows.views import view

__all__ = ["AnyOrderBase"]


class AnyOrderBase(AutoregressiveBase):
    r"""Creates a base with one network for all orderings.

    .. math:: p(x) = \prod_d p(x_d \mid x_e : \ell_e < \ell_d)

    for whichever levels are asked for: each ordering is a distribution of its own, with an exact
    likelihood, and a well-trained network makes them nearly the same. Any dimensions can be
    sampled given any others, exactly as the ordering that takes the others first has it
    (:func:`dflows.completion.complete`). Orderings of few levels sample several dimensions a pass,
    independently given those before; what that costs is the difference of their likelihoods.

    Train it with :class:`dflows.objectives.RandomOrderings`.

    Args:
        conditioner: The network, made with ``any_order=True``, over the ordering that likelihoods
            and samples have until another is asked for (:meth:`with_ordering`).

    Raises:
        UserError: If the conditioner serves one ordering alone.

    References:
        | A Deep and Tractable Density Estimator (Uria, Murray, Larochelle, 2014)
        | https://arxiv.org/abs/1310.1757
        | Autoregressive Diffusion Models (Hoogeboom et al., 2022)
        | https://arxiv.org/abs/2110.02037

    Example:
        >>> _ = torch.manual_seed(0)
        >>> from dflows import flows
        >>> flow = flows.any_order(num_classes=[2, 3, 4], length=3)
        >>> y = torch.tensor([[1, 0, 3], [0, 2, 1]])
        >>> known = torch.tensor([[True, False, True], [False, False, True]])
        >>> from dflows.completion import complete
        >>> complete(flow, y, known)[known].tolist()
        [1, 3, 1]
    """

    any_order = True

    def __init__(self, conditioner: Conditioner) -> None:
        super().__init__(conditioner)
        if not conditioner.any_order:
            raise UserError(
                "an AnyOrderBase needs a network for all orderings: make its Conditioner with "
                "any_order=True"
            )

    def with_ordering(self, ordering: Ordering) -> "AnyOrderBase":
        check_start(ordering, self.length)
        return view(self, conditioner=self.conditioner.with_ordering(ordering))

    def random_order_log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        # As many dimensions as are drawn are known, somewhere; the others are scored given these.
        number, length = x.shape
        rank = torch.rand(x.shape, device=x.device).argsort(dim=-1)
        known = torch.randint(length, (number, 1), device=x.device)
        visible = rank < known
        scores = self.score(self.conditioner.visible_logits(x, visible, context), x)
        hidden = scores.masked_fill(visible, 0).sum(dim=-1)
        return hidden * length / (length - known.squeeze(-1))

    def complete(
        self,
        x: Tensor,
        known: Tensor,
        context: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        def decide(dimensions: Tensor, logits: Tensor) -> Tensor:
            if noise is None:
                return logits.argmax(dim=-1)
            return inverse_cdf(noise[:, dimensions], logits=logits)

        return self._complete(x, known, context, decide)[0]

    def log_prob_given(self, x: Tensor, known: Tensor, context: Tensor | None = None) -> Tensor:
        return self._complete(x, known, context, lambda dimensions, _: x[:, dimensions])[1]

    def _complete(
        self, x: Tensor, known: Tensor, context: Tensor | None, decide: Decide
    ) -> tuple[Tensor, Tensor]:
        """Decides unknown values level by level, and scores them given what was known then."""
        found, visible, terms = x.clone(), known.clone(), []
        dtype = full_precision(self.conditioner.head.weight).dtype
        members = self.conditioner.layout(x.shape[1], x.device).members
        for dimensions in members:
            unknown = ~visible[:, dimensions]
            values = found[:, dimensions]
            if not unknown.any():
                terms.append(torch.zeros_like(values, dtype=dtype))
                continue
            logits = self.conditioner.visible_logits(found, visible, context)[:, dimensions]
            logits = check_logits(logits, type(self).__name__)
            values = torch.where(unknown, decide(dimensions, logits), values)
            terms.append(self.score(logits, values).masked_fill(~unknown, 0))
            found[:, dimensions], visible[:, dimensions] = values, True
        return found, torch.cat(terms, dim=1)[:, torch.cat(members).argsort()]
