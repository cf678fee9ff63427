"""What objectives maximise, in the plainest way: sums over tables of all maps, and loops."""

import math

import torch

from dflows.bijections import MatchedAffine, ModularShift, RankPermutation
from dflows.gradients import GumbelStraightThrough, PosteriorRule, ReinMax

STAGES = torch.linspace(0, 1, 13)[:-1].tolist()
"""Points of the training, some in every stage of up to three transforms in up to two rounds."""


class _Surrogate(torch.autograd.Function):
    """A choice that is made already, and a gradient given that of the choice."""

    @staticmethod
    def forward(ctx, logits, hard, gradient):
        ctx.save_for_backward(logits, hard)
        ctx.gradient = gradient
        return hard.clone()

    @staticmethod
    def backward(ctx, grad):
        logits, hard = ctx.saved_tensors
        return ctx.gradient(logits, hard, grad), None, None


def _through(p, grad):
    """The gradient of the logits of a softmax p, where that of its value is given."""
    return p * (grad - (p * grad).sum(-1, keepdim=True))


def _chosen(rule, logits, tie=0.0):
    """The one-hot choice with the gradient of its rule; an example weighs 1 in the loss.

    Of logits that differ by less than a tie the first is chosen.
    """
    noise = torch.zeros_like(logits)
    if rule.stochastic and rule.training:
        noise = -torch.empty_like(logits).exponential_().log()
    perturbed = (logits + noise).detach()
    first = (perturbed >= perturbed.amax(-1, keepdim=True) - tie).int().argmax(-1)
    hard = torch.nn.functional.one_hot(first, logits.shape[-1])

    def posterior(logits, hard, grad):
        return (logits + grad).softmax(-1) - logits.softmax(-1)

    def gumbel(logits, hard, grad):
        return _through(((logits + noise) / rule.temperature).softmax(-1), grad) / rule.temperature

    def reinmax(logits, hard, grad):
        middle = (hard + (logits / rule.temperature).softmax(-1)) / 2
        return 2 * _through(middle, grad) - _through(logits.softmax(-1), grad) / 2

    def straight_through(logits, hard, grad):
        return _through((logits / rule.temperature).softmax(-1), grad) / rule.temperature

    found = {PosteriorRule: posterior, GumbelStraightThrough: gumbel, ReinMax: reinmax}
    gradient = found.get(type(rule), straight_through)
    return _Surrogate.apply(logits, hard.to(logits.dtype), gradient)


def _walk(x, loc, scale, num_classes, modulus):
    y = (loc + scale * x) % modulus
    while y >= num_classes:
        y = (loc + scale * y) % modulus
    return y


def _inverses(num_classes, modulus, locs, scales):
    """One-hot vectors (locs, scales, y, x): what every map makes of every y."""
    table = torch.zeros(len(locs), len(scales), num_classes, num_classes, dtype=torch.float64)
    for i, loc in enumerate(locs):
        for j, scale in enumerate(scales):
            for x in range(num_classes):
                if math.gcd(scale, modulus) == 1:
                    table[i, j, _walk(x, loc, scale, num_classes, modulus), x] = 1
    return table


def _mapped(bijection, y, logits):
    """Data → base: one-hot vectors (N, n, K) with the gradients of the bijection's rule."""
    num_classes, rule = bijection.num_classes, bijection.rule
    every = range(num_classes)
    if isinstance(bijection, RankPermutation):
        return _ranked(bijection, y, logits)
    if isinstance(bijection, ModularShift):
        table = _inverses(num_classes, num_classes, every, [1]).squeeze(1)
        return torch.einsum("ndl,ndy,lyx->ndx", _chosen(rule, logits), y, table)
    if isinstance(bijection, MatchedAffine):
        units = [scale for scale in every if math.gcd(scale, num_classes) == 1]
        table = _inverses(num_classes, num_classes, every, units).flatten(0, 1)
        target = bijection.target.log_softmax(-1)
        scores = torch.einsum("ndy,myx,x->ndm", logits.softmax(-1), table, target)
        return torch.einsum("ndm,ndy,myx->ndx", _chosen(rule, scores, tie=1e-7), y, table)
    modulus = bijection.modulus
    table = _inverses(num_classes, modulus, range(modulus), range(modulus))
    unit = torch.tensor([math.gcd(scale, modulus) == 1 for scale in range(modulus)])
    loc, scale = logits.split(modulus, dim=-1)
    loc = _chosen(rule, loc)
    scale = _chosen(rule, scale.masked_fill(~unit, -math.inf))
    return torch.einsum("ndl,nds,ndy,lsyx->ndx", loc, scale, y, table)


def _ranked(bijection, y, logits):
    x = torch.zeros_like(y)
    for n in range(len(y)):
        for d in range(y.shape[1]):
            theta = logits[n, d]
            order = sorted(range(len(theta)), key=(-theta.detach()).tolist().__getitem__)
            value = int(y[n, d].argmax())
            rank = order.index(value)
            soft = ((theta - theta[value]) / bijection.temperature).sigmoid().sum()
            up, down = min(rank + 1, len(order) - 1), max(rank - 1, 0)
            slope = torch.zeros(len(order), dtype=y.dtype)
            slope[up] += 1 / (up - down)
            slope[down] -= 1 / (up - down)
            x[n, d] = y[n, d, order] + (soft - soft.detach()) * slope
    return x


def dense_log_prob(flow, y):
    """The log-probability (N,) of indices (N, D), with the gradients of the bijections' rules."""
    value = torch.nn.functional.one_hot(y, flow.num_classes).double()
    for transform in reversed(flow.transforms):
        above = (transform.ordering.levels(y.shape[1]) > 0).nonzero().squeeze(-1)
        logits = transform.conditioner(value, first_level=1)[:, above]
        part = _mapped(transform.bijection, value[:, above], logits)
        value = value.index_copy(1, above, part)
    table = flow.base.logits.log_softmax(-1)[flow.base.groups[: y.shape[1]]]
    return (value * table).sum((-1, -2))


def local_loss(flow, objective, y, context=None):
    """The sum of the transforms' own likelihoods and the base's, with no gradient between them."""
    total = torch.zeros(len(y), dtype=flow.base.log_prob(y[:1]).dtype)
    number = len(flow.conditional_transforms)
    for transform in reversed(flow.transforms):
        if transform.ordering is not None:
            number -= 1
            above = (transform.ordering.levels(y.shape[1]) > 0).nonzero().squeeze(-1)
            target = getattr(objective.targets, str(number), None)
            target = None if target is None else target.log_softmax(-1)
            logits = transform.conditioner(y, context)[:, above]
            local = transform.bijection.local_log_likelihood(y[:, above], logits, target)
            total = total + local.sum(-1)
        with torch.no_grad():
            y = transform.inverse(y, context)
    return total + flow.base.log_prob(y, context).sum(-1)


def mixture(flow, y, *, of_logs=False):
    """The log-likelihood of the mixture over the choices of one transform, summed over examples.

    Locations are mixed at the chosen scale, and scales at the chosen location. With `of_logs` it is
    the mean log-likelihood instead. What no transform changes is left out.
    """
    (transform,) = flow.transforms
    bijection, num_classes = transform.bijection, flow.num_classes
    logits = transform.conditioner(y)
    total = logits.new_zeros(())
    for d in (transform.ordering.levels(y.shape[1]) > 0).nonzero().squeeze(-1).tolist():
        every = torch.arange(num_classes).unsqueeze(-1).expand(-1, y.shape[1])
        base = flow.base.log_prob(every).detach()[:, d]
        theta = logits[:, d]
        if isinstance(bijection, ModularShift):
            parts = [(theta, _inverses(num_classes, num_classes, range(num_classes), [1])[:, 0])]
            maps = [part[1][:, y[:, d]].argmax(-1).T for part in parts]
        else:
            modulus = bijection.modulus
            table = _inverses(num_classes, modulus, range(modulus), range(modulus)).argmax(-1)
            units = [scale for scale in range(modulus) if math.gcd(scale, modulus) == 1]
            of_loc, of_scale = theta[:, :modulus], theta[:, modulus:][:, units]
            loc, scale = of_loc.argmax(-1), torch.tensor(units)[of_scale.argmax(-1)]
            parts = [(of_loc,), (of_scale,)]
            maps = [
                table[:, scale, y[:, d]].T,
                table[loc][:, units]
                .gather(2, y[:, d, None, None].expand(-1, len(units), 1))
                .squeeze(-1),
            ]
        for (chosen, *_), x in zip(parts, maps, strict=True):
            if of_logs:
                total = total + (chosen.softmax(-1) * base[x]).sum()
            else:
                total = total + (chosen.log_softmax(-1) + base[x]).logsumexp(-1).sum()
    return total
