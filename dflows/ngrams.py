"""Counted n-grams: interpolated Kneser–Ney smoothing, in tables."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from dflows.errors import UserError
from dflows.lookahead import lookahead

__all__ = ["NGrams"]

BLOCK = 1 << 21
"""Symbols that are counted at once."""

FALLBACK = (0.5, 1.0, 1.5)
"""Discounts where counts of counts give none, as of a few classes that are all frequent."""


class NGrams(nn.Module):
    r"""Creates n-grams that are counted and not trained, and smooths them by Kneser and Ney.

    .. math::
        p_m(w \mid h) = \frac{c_m(hw) - \delta_m(c_m(hw))}{c_m(h)}
            + \gamma_m(h)\, p_{m-1}(w \mid h')

    where h is a context of m - 1 classes, h' is h without its first, :math:`p_0 = 1/K`, and
    :math:`\gamma_m(h)` what the discounts :math:`\delta_m` leave over. At the order that is asked
    for, c is how often a gram occurs; below it, in how many different classes it follows. A context
    that was never seen hands over to the next lower order. After fewer than n - 1 classes the model
    is that of a lower order, the occurrences of whose grams are counted.

    Tables are in float64. Before :meth:`count` everything is uniform.

    Arguments:
        num_classes: K.
        order: n, the classes of the longest gram. A gram is held in 64 bits: 8 of 256 classes.
        discount: What is taken off every count; where it is not given, three amounts an order, for
            counts of 1, 2 and more, found from counts of counts.

    Raises:
        UserError: If a number is out of range.

    References:
        | Improved backing-off for m-gram language modeling (Kneser & Ney, 1995)
        | https://doi.org/10.1109/ICASSP.1995.479394
        | An empirical study of smoothing techniques for language modeling (Chen & Goodman, 1999),
          section 3
        | https://doi.org/10.1006/csla.1999.0128

    Example:
        >>> grams = NGrams(num_classes=3, order=2, discount=0.5)
        >>> grams.count([torch.tensor([0, 1, 0]), torch.tensor([1, 0, 1, 2])])
        >>> grams.log_prob(torch.tensor([[0, 1, 0, 1]])).exp()
        tensor([[0.4286, 0.8889, 0.6111, 0.8889]], dtype=torch.float64)
        >>> grams.following(torch.tensor([0]), torch.tensor([1])).sum(dim=-1)
        tensor([1.], dtype=torch.float64)
    """

    keys: Tensor
    counts: Tensor
    sizes: Tensor

    def __init__(self, num_classes: int, order: int = 6, discount: float | None = None) -> None:
        super().__init__()
        self.bits = max((num_classes - 1).bit_length(), 1)
        if not 1 <= order <= 64 // self.bits:
            raise UserError(
                f"order is {order}: give 1 to {64 // self.bits}, since a gram is held in 64 bits "
                f"and one of {num_classes} classes takes {self.bits}"
            )
        if discount is not None and not 0 < discount < 1:
            raise UserError(
                f"discount is {discount}: give a number between 0 and 1, or none to have it found"
            )
        self.num_classes = num_classes
        self.order = order
        self.discount = discount
        # The grams of all orders, one order after the other, each sorted; and their occurrences.
        self.register_buffer("keys", torch.empty(0, dtype=torch.long))
        self.register_buffer("counts", torch.empty(0, dtype=torch.long))
        self.register_buffer("sizes", torch.zeros(order, dtype=torch.long))
        self._tables: list[_Table] | None = None
        self._ahead: Tensor | None = None

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, order={self.order}, grams={len(self.keys)}"

    @property
    def num_counted(self) -> int:
        """The classes that were counted; none before :meth:`count`."""
        return int(self.counts[: self.sizes[0]].sum())

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def count(self, chunks: Iterable[Any]) -> None:
        """Counts data anew, in one pass.

        Args:
            chunks: Tensors or arrays of classes: of shape (d,), consecutive pieces of one text,
                however it is cut; or (N, d), events, of which none goes on in another.

        Raises:
            UserError: If there are none, or other numbers than classes.
        """
        tallies = [_Tally(self.keys.device) for _ in range(self.order)]
        for rows, before in self._blocks(chunks):
            for m, grams in self._grams(rows):
                # What is there for context alone was counted with the block before.
                tallies[m - 1].add(grams[:, max(before - m + 1, 0) :])
        keys, counts = zip(*(tally.total() for tally in tallies), strict=True)
        if not len(keys[0]):
            raise UserError("there is nothing to count: give at least one class")
        self.keys, self.counts = torch.cat(keys), torch.cat(counts)
        self.sizes = torch.tensor([len(part) for part in keys], device=self.keys.device)
        self._tables = self._ahead = None

    def _blocks(self, chunks: Iterable[Any]) -> Iterator[tuple[Tensor, int]]:
        """Yields rows (N, d), and how many of their first classes were in the row before."""
        tail = self.keys.new_empty(0)
        waiting: list[Tensor] = []
        size = 0
        for chunk in chunks:
            values = self._classes(chunk)
            if values.ndim > 1:
                yield values, 0
                continue
            for part in values.split(BLOCK):
                waiting.append(part)
                size += len(part)
                if size >= BLOCK:
                    row = torch.cat([tail, *waiting])
                    yield row.unsqueeze(0), len(tail)
                    tail = row[max(len(row) - self.order + 1, 0) :]
                    waiting, size = [], 0
        if size:
            yield torch.cat([tail, *waiting]).unsqueeze(0), len(tail)

    def _classes(self, chunk: Any) -> Tensor:
        values = torch.as_tensor(chunk).to(self.keys.device, torch.long)
        outside = values[(values < 0) | (values >= self.num_classes)]
        if len(outside):
            raise UserError(f"a value of {int(outside[0])} lies outside 0..{self.num_classes - 1}")
        return values

    def _grams(self, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yields every order m with its grams (N, d - m + 1), the last class in the lowest bits.

        The highest of 64 bits may be the sign's: an arithmetic shift gives the context all the
        same, and sorted grams keep those of one context together.
        """
        grams = rows
        for m in range(1, min(self.order, rows.shape[1]) + 1):
            if m > 1:
                grams = grams[:, 1:] | (rows[:, : 1 - m] << (self.bits * (m - 1)))
            yield m, grams

    def _tabulated(self) -> "list[_Table]":
        """Returns the table of every order; none where nothing was counted."""
        if self._tables is None:
            with torch.inference_mode(mode=False), torch.no_grad():
                self._tables = self._tabulate() if len(self.keys) else []
        return self._tables

    def _tabulate(self) -> "list[_Table]":
        sizes = self.sizes.tolist()
        keys = self.keys.split(sizes)
        tables = []
        for m, occurrences in enumerate(self.counts.split(sizes)):
            kinds = [occurrences]
            if m + 1 < self.order:
                # Every gram of the next order is one more class that this one follows.
                places = torch.searchsorted(keys[m], keys[m + 1] & self._mask(m + 1))
                kinds.append(places.bincount(minlength=len(keys[m])))
            tables.append(self._table(keys[m], kinds))
        return tables

    def _table(self, keys: Tensor, kinds: Sequence[Tensor]) -> "_Table":
        contexts, group, sizes = (keys >> self.bits).unique_consecutive(
            return_inverse=True, return_counts=True
        )
        shares, rests, totals, taken = [], [], [], []
        for counts in kinds:
            taken.append(self._discounts(counts))
            discounts = taken[-1][counts.clamp(max=3)]
            sums = torch.zeros(2, len(contexts), dtype=torch.double, device=keys.device)
            sums.index_add_(1, group, torch.stack([counts.double(), discounts]))
            total, left = sums
            totals.append(total)
            shares.append((counts - discounts) / total.clamp(min=1)[group])
            rests.append(torch.where(total > 0, left / total, 1.0))
        return _Table(
            keys,
            _padded(keys & self._mask(1), 0),
            contexts,
            starts=torch.cat([sizes.new_zeros(1), sizes, sizes.new_zeros(1)]).cumsum(0),
            shares=_padded(torch.stack(shares), 0.0),
            rests=_padded(torch.stack(rests), 1.0),
            counts=_padded(torch.stack([*kinds]), 0),
            totals=_padded(torch.stack(totals), 0.0),
            discounts=torch.stack(taken),
        )

    def _discounts(self, counts: Tensor) -> Tensor:
        """Returns what is taken off counts of 0, 1, 2, and 3 or more."""
        found = [self.discount or 0.0] * 3
        if self.discount is None:
            n = [int((counts == number).sum()) for number in range(1, 5)]
            found = list(FALLBACK)
            if all(n):
                y = n[0] / (n[0] + 2 * n[1])
                estimated = [k - (k + 1) * y * n[k] / n[k - 1] for k in (1, 2, 3)]
                if all(0 < value < k for k, value in enumerate(estimated, start=1)):
                    found = estimated
        return torch.tensor([0.0, *found], dtype=torch.double, device=counts.device)

    def _mask(self, number: int) -> int:
        """Returns the bits of so many classes, fewer than fill 64."""
        return (1 << (self.bits * number)) - 1

    def log_prob(self, x: Tensor) -> Tensor:
        """Computes the log-probability of every class given those before it, in nats.

        Args:
            x: Indices (N, d).

        Returns:
            Log-probabilities (N, d), in float64.
        """
        probs = torch.full(x.shape, 1 / self.num_classes, dtype=torch.double, device=x.device)
        for (m, grams), table in zip(self._grams(x), self._tabulated(), strict=False):
            # The first of them has no gram of the next order.
            kind = torch.full(grams.shape[1:], len(table.shares) - 1, device=x.device)
            kind[0] = 0
            share = table.shares[kind, _find(table.keys, grams)]
            rest = table.rests[kind, _find(table.contexts, grams >> self.bits)]
            probs[:, m - 1 :] = share + rest * probs[:, m - 1 :]
        return probs.log()

    def following(self, history: Tensor, seen: Tensor | int, own: Tensor | None = None) -> Tensor:
        """Computes the probabilities of all classes to follow.

        Args:
            history: The classes before (N,), packed as :meth:`pack` does, the last in the lowest
                bits; what is in the bits of more classes than were seen does not matter.
            seen: How many classes before are known, (N,) or of all rows; more than n - 1 make no
                difference.
            own: Classes that did follow (N,) in the text that was counted: the counts that such
                an occurrence has added are taken off again, for its own probabilities alone, as
                though the rest of the text had been counted.

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
        tables = self._tabulated()
        for m, table in enumerate(tables):
            kind: Tensor | int
            of_grams: Tensor | int
            if isinstance(seen, int):
                # Sampling comes by here once a class: no look-ups in vain, and none by rows.
                if m > seen:
                    break
                kind = of_grams = 0 if m == seen else -1
            else:
                kind = torch.where(seen == m, 0, len(table.shares) - 1)
                of_grams = kind.unsqueeze(-1)
            context = (history & self._mask(m)) << self.bits >> self.bits
            place = _find(table.contexts, context)
            first, end = table.starts[place, None], table.starts[place + 1, None]
            # The grams of a context stand together; those beyond its last are those of no gram.
            grams = torch.where(first + classes < end, first + classes, len(table.keys))
            rests, shares = table.rests[kind, place], table.shares[of_grams, grams]
            lost: Tensor | None = None
            if own is not None:
                gram = _find(table.keys, (context << self.bits) | own)
                counted = kind == 0
                if m + 1 < len(tables):
                    # It is one of the classes that a gram follows by this occurrence alone.
                    longer = ((history & self._mask(m + 1)) << self.bits) | own
                    occurrences = tables[m + 1].counts[0, _find(tables[m + 1].keys, longer)]
                    counted = counted | (occurrences == 1)
                rests, shares, lost = table.without(kind, place, gram, counted, rests, shares)
            found = (probs * rests.unsqueeze(-1)).scatter_add(1, table.followers[grams], shares)
            if own is not None and lost is not None:
                found = found.scatter_add(1, own.unsqueeze(-1), lost.unsqueeze(-1))
            if isinstance(seen, int):
                probs = found
            else:
                probs = torch.where((seen >= m).unsqueeze(-1), found, probs)
        return probs

    def ahead(
        self,
        gap: Tensor,
        first: Tensor,
        second: Tensor,
        before: Tensor,
        own: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Looks up how likely what stands ahead of a dimension is, given each of its classes.

        Args:
            gap: Unknown dimensions up to what is known ahead, (N,); below 0 where nothing is.
            first: The class ahead (N,).
            second: The class behind that (N,), or K where it is unknown.
            before: The class right before the dimension (N,).
            own: Of the text that was counted, the dimension's class (N,), the log-likelihood (N,)
                of the classes that did follow up to those known, by trigrams, and the same without
                these occurrences, which takes its place.

        Returns:
            Logarithms (N, K), see :func:`dflows.lookahead.lookahead`; 0 where nothing is known.
        """
        if self._ahead is None:
            with torch.inference_mode(mode=False), torch.no_grad():
                self._ahead = lookahead(self._trigrams().float())
        found = self._ahead[gap.clamp(min=0), first, second, before]
        if own is not None:
            classes, whole, rest = own
            found = found.to(whole.dtype)
            of_own = found.gather(-1, classes.unsqueeze(-1)).squeeze(-1)
            lost = (whole - of_own).exp() * -torch.expm1(rest - whole)
            of_own = of_own + torch.log1p(-lost.clamp(max=1 - 1e-6))
            found = found.scatter(-1, classes.unsqueeze(-1), of_own.unsqueeze(-1))
        return found.masked_fill((gap < 0).unsqueeze(-1), 0)

    def _trigrams(self) -> Tensor:
        """Computes the probabilities (K, K, K) of every class after every two."""
        classes = torch.arange(self.num_classes, device=self.keys.device)
        history = self.pack(torch.cartesian_prod(classes, classes, classes[:1]))[:, 2]
        return self.following(history, 2).unflatten(0, (self.num_classes, self.num_classes))

    def pack(self, x: Tensor) -> Tensor:
        """Packs the n - 1 classes before every dimension.

        Args:
            x: Indices (N, d).

        Returns:
            Numbers (N, d), the class right before in the lowest bits; 0 where there is none.
        """
        packed = torch.zeros_like(x)
        for back in range(1, min(self.order, x.shape[1])):
            packed[:, back:] |= x[:, :-back] << (self.bits * (back - 1))
        return packed

    def _apply(self, *args: Any, **options: Any) -> Self:
        super()._apply(*args, **options)
        if self._tables and self._tables[0].keys.device != self.keys.device:
            self._tables = None
        if self._ahead is not None and self._ahead.device != self.keys.device:
            self._ahead = None
        return self

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **options: Any
    ) -> None:
        # How many grams there are is for the data to say.
        for name in ("keys", "counts", "sizes"):
            own = getattr(self, name)
            saved = own if name == "sizes" else state_dict.get(prefix + name, own)
            setattr(self, name, own.new_zeros(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **options)
        self._tables = self._ahead = None


@dataclass(frozen=True)
class _Table:
    """Creates what the grams of one order add to a probability.

    Arguments:
        keys: Grams (G,), sorted.
        followers: The last class of every gram, and of none (G + 1,).
        contexts: Their contexts (C,), sorted.
        starts: Where the grams of every context begin, and where those of none would (C + 2,).
        shares: The discounted probability of every gram, and of none (kinds, G + 1): by
            occurrences first, and then by classes that it follows, where that is used.
        rests: What every context leaves to the next lower order, and none does (kinds, C + 1).
        counts: How often every gram was counted, and none was (kinds, G + 1).
        totals: How often every context was, and none was (kinds, C + 1).
        discounts: What is taken off counts of 0, 1, 2, and 3 or more (kinds, 4).
    """

    keys: Tensor
    followers: Tensor
    contexts: Tensor
    starts: Tensor
    shares: Tensor
    rests: Tensor
    counts: Tensor
    totals: Tensor
    discounts: Tensor

    def without(
        self,
        kind: Tensor | int,
        place: Tensor,
        gram: Tensor,
        counted: Tensor | bool,
        rests: Tensor,
        shares: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Takes one occurrence off, where it was counted.

        Args:
            kind: Which counts are used, (N,) or of all rows.
            place: The place of the context (N,).
            gram: The place of the gram (N,).
            counted: Whether its occurrence was counted, (N,) or of all rows, if it was at all.
            rests: What the contexts leave (N,).
            shares: The shares of all grams of the contexts (N, K).

        Returns:
            The same without it: what the contexts leave (N,), the shares (N, K), and what is then
            to be added to that of the gram itself (N,).
        """
        count, total = self.counts[kind, gram], self.totals[kind, place]
        counted = counted & (count > 0)
        fewer = (count - 1).clamp(min=0)
        before = self.discounts[kind, count.clamp(max=3)]
        after = self.discounts[kind, fewer.clamp(max=3)]
        left = (total - 1).clamp(min=1)
        any_left = total > 1
        growth = torch.where(any_left, total / left, 0.0)
        rest = torch.where(any_left, (rests * total - before + after) / left, 1.0)
        share = torch.where(any_left, (fewer - after) / left, 0.0)
        lost = torch.where(counted, share - self.shares[kind, gram] * growth, 0.0)
        rests = torch.where(counted, rest, rests)
        return rests, shares * torch.where(counted, growth, 1.0).unsqueeze(-1), lost


class _Tally:
    """Creates counts of numbers that come in blocks."""

    def __init__(self, device: torch.device) -> None:
        nothing = torch.empty(0, dtype=torch.long, device=device)
        self._parts = [(nothing, nothing)]
        self._waiting = 0

    def add(self, values: Tensor) -> None:
        """Counts values once more each."""
        part = values.flatten().unique(return_counts=True)
        self._parts.append(part)
        self._waiting += len(part[0])
        # Merged when they have doubled, a number is moved a logarithm of times.
        if self._waiting > max(len(self._parts[0][0]), BLOCK):
            self._parts, self._waiting = [self.total()], 0

    def total(self) -> tuple[Tensor, Tensor]:
        """Returns the numbers, sorted, and their counts."""
        keys, counts = (torch.cat(part) for part in zip(*self._parts, strict=True))
        keys, places = keys.unique(return_inverse=True)
        return keys, torch.zeros_like(keys).index_add(0, places, counts)


def _find(table: Tensor, values: Tensor) -> Tensor:
    """Returns the places of values in a sorted table; its length for those that it has not."""
    if not len(table):
        return torch.zeros_like(values)
    place = torch.searchsorted(table, values.contiguous())
    found = table[place.clamp(max=len(table) - 1)] == values
    return torch.where(found, place, len(table))


def _padded(values: Tensor, value: float) -> Tensor:
    return torch.nn.functional.pad(values, (0, 1), value=value)
