"""The n-gram model: counts, smoothed, and looked up."""

from collections.abc import Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from dflows.counted import Counted
from dflows.errors import UserError
from dflows.ngrams.counts import Packing, count_ngrams
from dflows.ngrams.kneser_ney import Table, find, smooth
from dflows.ngrams.lookup import Lookup
from dflows.ngrams.messages import right_context_messages

__all__ = ["NGrams"]


class NGrams(Counted):
    r"""Creates n-grams that are counted and not trained, smoothed by interpolated Kneser–Ney.

    .. math::
        p_m(w \mid h) = \frac{c_m(hw) - \delta_m(c_m(hw))}{c_m(h)}
            + \gamma_m(h)\, p_{m-1}(w \mid h')

    where h is a context of m - 1 classes, h' is h without its first, :math:`p_0 = 1/K`, and
    :math:`\gamma_m(h)` what the discounts :math:`\delta_m` leave over. At order n, c is
    how often an n-gram occurs; below it, how many different classes it follows. A context that was
    never seen backs off to the next lower order. After only m - 1 < n - 1 classes, a model of order
    m predicts, from the counts of m-grams.

    Tables are in float64. Before :meth:`count` everything is uniform.

    Args:
        num_classes: K.
        order: n, the classes of the longest n-gram. An n-gram is held in 64 bits: 8 of 256 classes.
        discount: What is taken off every count; by default three amounts an order, for counts of 1,
            2 and more, found from counts of counts.

    Raises:
        UserError: If a number is out of range.

    References:
        | Improved backing-off for m-gram language modeling (Kneser & Ney, 1995)
        | https://doi.org/10.1109/ICASSP.1995.479394
        | An empirical study of smoothing techniques for language modeling (Chen & Goodman, 1999),
          section 3
        | https://doi.org/10.1006/csla.1999.0128

    Example:
        >>> ngrams = NGrams(num_classes=3, order=2, discount=0.5)
        >>> ngrams.count([torch.tensor([0, 1, 0]), torch.tensor([1, 0, 1, 2])])
        >>> ngrams.log_prob(torch.tensor([[0, 1, 0, 1]])).exp()
        tensor([[0.4286, 0.8889, 0.6111, 0.8889]], dtype=torch.float64)
        >>> ngrams.next_probs(torch.tensor([0]), torch.tensor([1])).sum(dim=-1)
        tensor([1.], dtype=torch.float64)
    """

    keys: Tensor
    counts: Tensor
    sizes: Tensor

    def __init__(self, num_classes: int, order: int = 6, discount: float | None = None) -> None:
        super().__init__()
        self.packing = Packing.of(num_classes, order)
        if discount is not None and not 0 < discount < 1:
            raise UserError(
                f"discount is {discount}: give a number between 0 and 1, or none to have it found"
            )
        self.num_classes = num_classes
        self.order = order
        self.discount = discount
        # The n-grams of all orders, one order after the other, each sorted; and their occurrences.
        self.register_buffer("keys", torch.empty(0, dtype=torch.long))
        self.register_buffer("counts", torch.empty(0, dtype=torch.long))
        self.register_buffer("sizes", torch.zeros(order, dtype=torch.long))
        self._tables: list[Table] | None = None
        self._lookup: Lookup | None = None
        self._messages: Tensor | None = None

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, order={self.order}, ngrams={len(self.keys)}"

    @property
    def bits(self) -> int:
        """The bits of one class in a packed history."""
        return self.packing.bits

    @property
    def num_counted(self) -> int:
        return int(self.counts[: self.sizes[0]].sum())

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def count(self, chunks: Iterable[Any]) -> None:
        """Counts data in one pass, in place of what was counted before.

        Args:
            chunks: Tensors or arrays of classes: of shape (d,), consecutive pieces of one text,
                however it is cut; or (N, d), independent events.

        Raises:
            UserError: If there is nothing to count, or a value is no class.
        """
        found = count_ngrams(chunks, self.num_classes, self.packing, self.keys.device)
        keys, counts = zip(*found, strict=True)
        self.keys, self.counts = torch.cat(keys), torch.cat(counts)
        self.sizes = torch.tensor([len(part) for part in keys], device=self.keys.device)
        self._tables = self._lookup = self._messages = None

    @property
    def tables(self) -> list[Table]:
        """The table of every order; none where nothing was counted."""
        if self._tables is None:
            self._tables = []
            if len(self.keys):
                sizes = self.sizes.tolist()
                with torch.inference_mode(mode=False), torch.no_grad():
                    keys, counts = self.keys.split(sizes), self.counts.split(sizes)
                    self._tables = smooth(keys, counts, self.packing, self.discount)
        return self._tables

    def lookup(self) -> Lookup:
        """Returns what finds the same as :meth:`next_probs` for a few histories, and faster."""
        if self._lookup is None:
            with torch.inference_mode(mode=False), torch.no_grad():
                tables = self.tables
                self._lookup = Lookup.of(tables, self.packing, self.num_classes, self.keys.device)
        return self._lookup

    def log_prob(self, x: Tensor) -> Tensor:
        """Computes the log-probability of every class given those before it, in nats.

        Args:
            x: Indices (N, d).

        Returns:
            Log-probabilities (N, d), in float64.
        """
        probs = torch.full(x.shape, 1 / self.num_classes, dtype=torch.double, device=x.device)
        for (m, ngrams), table in zip(self.packing.ngrams(x), self.tables, strict=False):
            # The first of them has no n-gram of the next order.
            kind = torch.full(ngrams.shape[1:], len(table.shares) - 1, device=x.device)
            kind[0] = 0
            share = table.shares[kind, find(table.keys, ngrams)]
            rest = table.rests[kind, find(table.contexts, ngrams >> self.bits)]
            probs[:, m - 1 :] = share + rest * probs[:, m - 1 :]
        return probs.log()

    def next_probs(
        self, history: Tensor, seen: Tensor | int, leave_out: Tensor | None = None
    ) -> Tensor:
        """Computes the probabilities of all classes to come next.

        Args:
            history: The classes before (N,), packed as :meth:`pack` does, the last in the lowest
                bits; what is in the bits of more classes than were seen does not matter.
            seen: How many classes before are known, (N,) or of all rows; more than n - 1 make no
                difference.
            leave_out: Classes that did come next (N,) in the text that was counted: the counts that
                such an occurrence has added are taken off again, for its own probabilities alone,
                as though the rest of the text had been counted.

        Returns:
            Probabilities (N, K), in float64.
        """
        classes = torch.arange(self.num_classes, device=history.device)
        probs = torch.full(
            (len(history), self.num_classes),
            1 / self.num_classes,
            dtype=torch.double,
            device=history.device,
        )
        tables, packing = self.tables, self.packing
        seen = torch.as_tensor(seen, device=history.device).expand(len(history))
        for m, table in enumerate(tables):
            kind = torch.where(seen == m, 0, len(table.shares) - 1)
            context = (history & packing.mask(m)) << self.bits >> self.bits
            place = find(table.contexts, context)
            first, end = table.starts[place, None], table.starts[place + 1, None]
            # The n-grams of a context stand together; those beyond its last are those of no n-gram.
            ngrams = torch.where(first + classes < end, first + classes, len(table.keys))
            rests, shares = table.rests[kind, place], table.shares[kind.unsqueeze(-1), ngrams]
            lost: Tensor | None = None
            if leave_out is not None:
                ngram = find(table.keys, (context << self.bits) | leave_out)
                counted = kind == 0
                if m + 1 < len(tables):
                    # It is one of the classes that an n-gram follows by this occurrence alone.
                    longer = ((history & packing.mask(m + 1)) << self.bits) | leave_out
                    occurrences = tables[m + 1].counts[0, find(tables[m + 1].keys, longer)]
                    counted = counted | (occurrences == 1)
                rests, shares, lost = table.leave_out(kind, place, ngram, counted, rests, shares)
            found = (probs * rests.unsqueeze(-1)).scatter_add(1, table.last[ngrams], shares)
            if leave_out is not None and lost is not None:
                found = found.scatter_add(1, leave_out.unsqueeze(-1), lost.unsqueeze(-1))
            probs = torch.where((seen >= m).unsqueeze(-1), found, probs)
        return probs

    def pack(self, x: Tensor, dimensions: Tensor | None = None) -> Tensor:
        """Packs the n - 1 classes before every dimension.

        Args:
            x: Indices (N, d).
            dimensions: Some of the dimensions (m,); all by default.

        Returns:
            Numbers (N, d) or (N, m), the class right before in the lowest bits; 0 where there is
            none.
        """
        return self.packing.histories(x, dimensions)

    def trigrams(self) -> Tensor:
        """Computes the probabilities (K, K, K) of every class after every two, in float64."""
        classes = torch.arange(self.num_classes, device=self.keys.device)
        history = self.pack(torch.cartesian_prod(classes, classes, classes[:1]))[:, 2]
        return self.next_probs(history, 2).unflatten(0, (self.num_classes, self.num_classes))

    def messages(self) -> Tensor:
        """Returns the :func:`~dflows.ngrams.messages.right_context_messages` of the trigrams."""
        if self._messages is None:
            with torch.inference_mode(mode=False), torch.no_grad():
                self._messages = right_context_messages(self.trigrams().float())
        return self._messages

    def _apply(self, *args: Any, **options: Any) -> Self:
        super()._apply(*args, **options)
        if self._tables and self._tables[0].keys.device != self.keys.device:
            self._tables = None
        if self._lookup is not None and self._lookup.contexts.device != self.keys.device:
            self._lookup = None
        if self._messages is not None and self._messages.device != self.keys.device:
            self._messages = None
        return self

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **options: Any
    ) -> None:
        # How many n-grams there are is for the data to say.
        for name in ("keys", "counts", "sizes"):
            own = getattr(self, name)
            saved = own if name == "sizes" else state_dict.get(prefix + name, own)
            setattr(self, name, own.new_zeros(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **options)
        self._tables = self._lookup = self._messages = None
