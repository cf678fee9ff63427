import warnings
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from dflows import modular
from dflows.bijections import MatchedAffine, ModularAffine, ModularShift, RankPermutation
from dflows.errors import NonFiniteError, UserError
from dflows.gradients import PosteriorRule, SoftmaxStraightThrough
from tests.dflows.bijections.cases import BIJECTIONS, OF_A_SOFTMAX, RULES, dense, one_hot

CLASSES = [2, 3, 4, 5, 6, 8, 9, 10]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

each = pytest.mark.parametrize("name", BIJECTIONS)
each_size = pytest.mark.parametrize("num_classes", CLASSES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
either_way = pytest.mark.parametrize("inverse", [False, True])


def make(name, num_classes, rule=None):
    """The bijection, with a rule where it has one."""
    return BIJECTIONS[name](num_classes, **({} if rule is None else {"rule": rule}))


def random_logits(bijection, count, kind="normal", dtype=torch.float32):
    shape = (count, 1, bijection.num_logits)
    if kind == "tied":  # few values, so that nearly every argmax and rank is a tie
        return torch.randint(2, shape).to(dtype)
    if kind == "equal":
        return torch.zeros(shape, dtype=dtype)
    return torch.randn(shape, dtype=dtype)


def every_value(bijection, logits):
    """All classes (N, K) with the logits (N, K, num_logits) of each row."""
    x = torch.arange(bijection.num_classes).expand(len(logits), -1)
    return x, logits.expand(-1, bijection.num_classes, -1)


@each
class TestEach:
    @each_size
    @pytest.mark.parametrize("kind", ["normal", "tied", "equal"])
    def test_all_classes_are_met_once_and_come_back(self, name, num_classes, kind):
        bijection = BIJECTIONS[name](num_classes)
        x, logits = every_value(bijection, random_logits(bijection, 40, kind))
        y = bijection(x, logits)
        assert torch.equal(y.sort(dim=-1).values, x)
        assert torch.equal(bijection.inverse(y, logits), x)
        assert torch.equal(bijection(bijection.inverse(x, logits), logits), x)

    @each_size
    def test_it_starts_as_the_identity_without_a_tie(self, name, num_classes):
        bijection = BIJECTIONS[name](num_classes)
        initial = bijection.initial_logits()
        assert initial.shape == (bijection.num_logits,)
        x, logits = every_value(bijection, initial.expand(1, 1, -1))
        for noise in (0.0, 0.04 / num_classes if name in ("rank", "matched") else 0.04):
            noisy = logits + noise * (2 * torch.rand_like(logits) - 1)
            assert torch.equal(bijection(x, noisy), x)
            assert torch.equal(bijection.inverse(x, noisy), x)

    @each_size
    @pytest.mark.parametrize("rule", RULES)
    def test_one_hot_vectors_and_indices_agree(self, name, num_classes, rule):
        if name == "rank" and rule != "straight-through":
            pytest.skip("ranks have no rule")
        bijection = make(name, num_classes, None if name == "rank" else RULES[rule]()).eval()
        for dtype, kind in product(DTYPES, ["normal", "tied"]):
            x, logits = every_value(bijection, random_logits(bijection, 20, kind, dtype))
            for direction in (bijection.forward, bijection.inverse):
                result = direction(one_hot(x, num_classes, dtype), logits)
                assert torch.equal(result, one_hot(direction(x, logits), num_classes, dtype))

    @either_way
    def test_value_and_logits_receive_gradients(self, name, inverse):
        bijection = make(name, 5, None if name == "rank" else SoftmaxStraightThrough(1.0))
        logits = random_logits(bijection, 20).expand(-1, 5, -1).clone().requires_grad_()
        x = F.one_hot(torch.arange(5).expand(20, -1), 5).float().requires_grad_()
        y = bijection.inverse(x, logits) if inverse else bijection(x, logits)
        weight = torch.randn(20, 5, 5)
        grad_x, grad_logits = torch.autograd.grad((y * weight).sum(), (x, logits))
        # A fixed bijection permutes the entries of a one-hot vector, and so its gradient.
        torch.testing.assert_close(grad_x.sort(dim=-1).values, weight.sort(dim=-1).values)
        assert grad_logits.isfinite().all()
        assert (grad_logits != 0).any(dim=0).any(dim=0).sum() >= 5

    def test_the_local_likelihood_has_the_shape_of_values_and_a_finite_gradient(self, name):
        bijection = BIJECTIONS[name](6)
        logits = random_logits(bijection, 4).expand(-1, 3, -1).clone().requires_grad_()
        target = torch.randn(6).log_softmax(-1)
        local = bijection.local_log_likelihood(torch.randint(6, (4, 3)), logits, target)
        assert local.shape == (4, 3)
        assert (local < 0).all()
        local.sum().backward()
        assert logits.grad.isfinite().all()

    @pytest.mark.parametrize("num_classes", [1, 0])
    def test_fewer_than_2_classes_are_refused(self, name, num_classes):
        with pytest.raises(ValueError, match="at least 2"):
            BIJECTIONS[name](num_classes)

    def test_it_shows_its_classes_and_holds_no_parameters(self, name):
        bijection = BIJECTIONS[name](6)
        assert "num_classes=6" in repr(bijection)
        held = {"target"} if name == "matched" else set()
        assert set(bijection.state_dict()) == dict(bijection.named_parameters()).keys() == held


@given(
    name=st.sampled_from(sorted(BIJECTIONS)),
    num_classes=st.integers(2, 30),
    batch=st.lists(st.integers(1, 3), max_size=3),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from(DTYPES),
)
def test_there_and_back(name, num_classes, batch, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    bijection = BIJECTIONS[name](num_classes)
    x = torch.randint(num_classes, (*batch, 4), generator=generator)
    logits = torch.randn(*x.shape, bijection.num_logits, generator=generator).to(dtype)
    y = bijection(x, logits)
    assert y.shape == x.shape
    assert y.min() >= 0
    assert y.max() < num_classes
    assert torch.equal(bijection.inverse(y, logits), x)


class TestShift:
    def test_it_adds_the_most_probable_location(self):
        shift, logits = ModularShift(7), torch.randn(50, 7)
        x = torch.randint(7, (50,))
        assert torch.equal(shift(x, logits), (x + logits.argmax(-1)) % 7)

    def test_its_local_likelihood_is_a_cross_entropy(self):
        logits, y = torch.randn(10, 7), torch.randint(7, (10,))
        local = ModularShift(7).local_log_likelihood(y, logits, None)
        torch.testing.assert_close(local, -F.cross_entropy(logits, y, reduction="none"))

    def test_the_most_probable_class_becomes_class_0(self):
        shift, logits = ModularShift(7), torch.randn(10, 7)
        assert (shift.inverse(logits.argmax(-1), logits) == 0).all()


class TestAffine:
    @pytest.mark.parametrize("num_classes", [4, 6, 8, 9, 10, 12])
    def test_scales_that_are_no_units_are_never_chosen(self, num_classes):
        affine = ModularAffine(num_classes)
        unit = modular.unit_mask(num_classes)
        logits = torch.zeros(1, 2 * num_classes)
        logits[0, num_classes:][~unit] = 100.0  # what an unmasked scale would take
        x = torch.arange(num_classes)
        y = affine(x, logits.expand(num_classes, -1))
        assert torch.equal(y.sort().values, x)

    def test_masked_scales_receive_no_gradient(self):
        logits = torch.randn(4, 1, 12, requires_grad=True)
        y = F.one_hot(torch.randint(6, (4, 1)), 6).float()
        target = torch.randn(6).log_softmax(-1)
        for rule in RULES.values():
            (ModularAffine(6, rule=rule()).inverse(y, logits) * target).sum().backward()
        y = torch.randint(6, (4, 1))
        ModularAffine(6).local_log_likelihood(y, logits, target).sum().backward()
        assert logits.grad.isfinite().all()
        masked = ~modular.unit_mask(6)
        assert (logits.grad[..., 6:][..., masked] == 0).all()
        assert (logits.grad[..., :6] != 0).all()

    @pytest.mark.parametrize("prime", [False, True])
    @pytest.mark.parametrize("num_classes", [4, 5, 6])
    def test_its_local_likelihood_is_that_of_two_mixtures(self, num_classes, prime):
        affine = ModularAffine(num_classes, prime)
        modulus = affine.modulus
        target = torch.randn(num_classes, dtype=torch.float64).log_softmax(-1)
        logits = torch.randn(2 * modulus, dtype=torch.float64, requires_grad=True)
        units = modular.units(modulus).tolist()
        loc_logits, scale_logits = logits[:modulus], logits[modulus:]
        scale_probs = torch.softmax(scale_logits[units], -1)
        loc, scale = int(loc_logits.argmax()), units[int(scale_logits[units].argmax())]

        def inverse(y, loc, scale):
            arguments = (torch.tensor(value) for value in (y, loc, scale))
            return modular.affine_inverse(*arguments, num_classes, modulus=modulus)

        for y in range(num_classes):
            over_loc = sum(
                loc_logits.softmax(-1)[k] * target[inverse(y, k, scale)].exp()
                for k in range(modulus)
            )
            over_scale = sum(
                scale_probs[n] * target[inverse(y, loc, s)].exp() for n, s in enumerate(units)
            )
            expected = over_loc.log() + over_scale.log()
            local = affine.local_log_likelihood(torch.tensor(y), logits, target)
            torch.testing.assert_close(local, expected)
            torch.testing.assert_close(
                *(
                    torch.autograd.grad(value, logits, retain_graph=True)[0]
                    for value in (local, expected)
                )
            )

    def test_its_local_likelihood_needs_a_target(self):
        with pytest.raises(ValueError, match="target"):
            ModularAffine(4).local_log_likelihood(torch.tensor(1), torch.randn(8), None)

    @pytest.mark.parametrize(("num_classes", "modulus"), [(4, 5), (5, 5), (6, 7), (24, 29)])
    def test_a_prime_modulus_makes_every_scale_but_0_a_unit(self, num_classes, modulus):
        affine = ModularAffine(num_classes, prime=True)
        assert affine.modulus == modulus
        assert affine.unit.tolist() == [False] + [True] * (modulus - 1)
        assert affine.num_logits == 2 * modulus


class TestMatched:
    @pytest.mark.parametrize("num_classes", [2, 5, 6])
    def test_its_map_is_the_one_under_which_x_is_expected_to_be_likeliest(self, num_classes):
        affine = MatchedAffine(num_classes)
        with torch.no_grad():
            affine.target.normal_()
        log_target, classes = affine.target.detach().log_softmax(-1), torch.arange(num_classes)
        maps = [
            modular.affine_inverse(classes, torch.tensor(loc), scale, num_classes)
            for loc in range(num_classes)
            for scale in modular.units(num_classes)
        ]
        for logits in torch.randn(30, num_classes):
            expected = torch.stack([logits.softmax(-1) @ log_target[x] for x in maps])
            x = affine.inverse(classes, logits.expand(num_classes, -1))
            assert torch.equal(x, maps[expected.argmax()])

    def test_its_local_likelihood_is_a_cross_entropy_and_that_of_x(self):
        affine, logits, y = MatchedAffine(5), torch.randn(7, 3, 5), torch.randint(5, (7, 3))
        x = affine.inverse(y, logits)
        expected = -F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none")
        expected = expected + affine.target.log_softmax(-1)[x.flatten()]
        torch.testing.assert_close(affine.local_log_likelihood(y, logits, None).flatten(), expected)

    def test_autocast_chooses_the_maps_of_full_precision(self):
        affine, logits, y = MatchedAffine(11), torch.randn(4000, 11), torch.randint(11, (4000,))

        def mapped():
            values = (y, one_hot(y, 11))
            return [f(value, logits) for value in values for f in (affine, affine.inverse)]

        expected = mapped()
        with torch.autocast("cpu", torch.bfloat16):
            found = mapped()
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))

    @either_way
    def test_its_gradient_is_that_of_the_mean_over_all_maps(self, inverse):
        affine = MatchedAffine(5, SoftmaxStraightThrough(1.0)).double()
        logits = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
        value = one_hot(torch.randint(5, (4, 3)), 5, torch.float64).requires_grad_()
        weight = torch.randn(4, 3, 5, dtype=torch.float64)
        mapped = affine.inverse(value, logits) if inverse else affine(value, logits)
        inputs = [logits, value, affine.target]
        actual = torch.autograd.grad((mapped * weight).sum(), inputs)
        table = torch.stack(
            [affine.map_by(torch.arange(5), (torch.tensor(c),), inverse=True) for c in range(20)]
        )
        scores = logits.softmax(-1) @ affine.target.log_softmax(-1)[table].T
        hard = one_hot(scores.argmax(-1), 20, torch.float64)
        choice = hard + scores.softmax(-1) - scores.softmax(-1).detach()
        expected = dense(affine, value, [choice], inverse)
        torch.testing.assert_close(mapped, expected)
        torch.testing.assert_close(actual, torch.autograd.grad((expected * weight).sum(), inputs))

    def test_a_row_that_round_off_decided_is_a_bijection(self):
        torch.manual_seed(20)
        row = (torch.randn(7) * 30).expand(7, -1)
        for affine in (MatchedAffine(7), MatchedAffine(7).double()):
            for logits in (row, row.double()):
                x = affine.inverse(torch.arange(7), logits)
                assert x.sort().values.tolist() == list(range(7))
                assert torch.equal(affine(x, logits), torch.arange(7))

    @pytest.mark.parametrize("scale", [0.1, 1, 30])
    def test_all_events_of_many_dimensions_come_back(self, scale):
        affine = MatchedAffine(50)
        y, logits = torch.randint(50, (20, 128)), scale * torch.randn(20, 128, 50)
        x = affine.inverse(y, logits)
        assert torch.equal(affine(x, logits), y)
        columns = [affine(x[:, d : d + 1], logits[:, d : d + 1]) for d in range(128)]
        assert torch.equal(torch.cat(columns, dim=1), y)

    @pytest.mark.parametrize("num_classes", [5, 8, 27, 50])
    @pytest.mark.parametrize("scale", [1, 30])
    def test_only_ties_are_decided_otherwise_than_by_the_sums_in_floating_point(
        self, num_classes, scale
    ):
        affine = MatchedAffine(num_classes)
        with torch.no_grad():
            affine.target.normal_()
        logits = scale * torch.randn(2000, num_classes, dtype=torch.float64)
        (best,) = affine.chosen(logits)
        log_target = affine.target.detach().double().log_softmax(-1)
        scores = logits.softmax(-1) @ log_target[affine._table(inverse=True)].T
        lost = scores.amax(-1) - scores.gather(-1, best.unsqueeze(-1)).squeeze(-1)
        bits = (num_classes - 1).bit_length()
        assert (lost <= 2.0 ** (bits - 26) * (log_target.max() - log_target.min())).all()
        if scale == 1:  # p that is nearly certain of one class leaves nothing but near-ties
            assert (best != scores.argmax(-1)).float().mean() < 0.001

    @pytest.mark.parametrize("num_classes", [2, 3, 50, 64, 256])
    def test_sums_are_exact_in_any_order(self, num_classes):
        # The largest weights and steps that there can be, against integers of any size.
        affine = MatchedAffine(num_classes)
        logits = torch.randn(3, num_classes)
        logits[0] = 0.0
        logits[1] = torch.linspace(0, -1e-6, num_classes)
        with torch.no_grad():
            affine.target.fill_(1.0).view(-1)[-1] = -1.0
        weights, steps = affine._integers(logits)
        assert torch.equal(weights, weights.round())
        assert torch.equal(steps, steps.round())
        for row in weights.long().tolist():
            total = sum(w * t for w, t in zip(row, steps.long().tolist(), strict=True))
            assert total < 2**53
            assert max(row) == 2**26

    def test_round_off_does_not_part_the_ways_of_indices_and_one_hot_vectors(self):
        # Every score ties but for round-off: p is uniform, and so would be every mean.
        for num_classes in range(2, 13):
            affine = MatchedAffine(num_classes)
            with torch.no_grad():
                affine.target.normal_()
            logits = torch.randn(50, 1).expand(50, num_classes)
            (scores,) = affine.choice_logits(logits)
            assert torch.equal(scores.argmax(-1), affine.chosen(logits)[0])
            assert (affine.chosen(logits)[0] == 0).all()  # the first map is the identity

    def test_a_target_that_is_not_finite_is_refused(self):
        affine = MatchedAffine(4)
        for value in (torch.nan, torch.inf, -torch.inf):
            with torch.no_grad():
                affine.target[1] = value
            with pytest.raises(NonFiniteError, match="MatchedAffine's target"):
                affine(torch.arange(4), torch.randn(4, 4))


class TestRank:
    def test_it_is_the_rank_among_the_sorted_logits(self):
        rank, logits = RankPermutation(9), torch.randn(9)
        in_order = sorted(range(9), key=lambda c: -float(logits[c]))
        x = rank.inverse(torch.arange(9), logits.expand(9, -1))
        assert x.tolist() == [in_order.index(c) for c in range(9)]

    def test_equal_logits_rank_in_the_order_of_their_classes(self):
        rank, logits = RankPermutation(5), torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0])
        x = rank.inverse(torch.arange(5), logits.expand(5, -1))
        assert x.tolist() == [2, 0, 3, 1, 4]

    def test_every_permutation_can_be_reached(self):
        rank = RankPermutation(3)
        orders = torch.cartesian_prod(*[torch.arange(3.0)] * 3)
        reached = {tuple(rank(torch.arange(3), row.expand(3, -1)).tolist()) for row in orders}
        assert len(reached) == 6

    def test_raising_the_logit_of_the_value_lowers_its_rank(self):
        rank, logits = RankPermutation(6), torch.randn(1, 6, 6, requires_grad=True)
        y = torch.arange(6).unsqueeze(0)
        x = rank.inverse(one_hot(y, 6), logits)
        (x * torch.arange(6.0)).sum().backward()  # the rank itself
        own = logits.grad.gather(-1, y.unsqueeze(-1))
        assert (own < 0).all()
        others = logits.grad.scatter(-1, y.unsqueeze(-1), 0)
        assert (others >= 0).all()

    @pytest.mark.parametrize("value", range(5))
    def test_the_gradient_of_a_rank_is_that_of_the_soft_rank(self, value):
        # Of a function that is linear in the rank it must not matter which rank it is.
        temperature, slope = 0.7, 3.0
        rank = RankPermutation(5, temperature)
        logits = torch.randn(1, 1, 5, requires_grad=True)
        y = torch.tensor([[value]])
        x = rank.inverse(one_hot(y, 5), logits)
        (grad,) = torch.autograd.grad((x * slope * torch.arange(5.0)).sum(), logits)
        soft = ((logits - logits[..., value : value + 1]) / temperature).sigmoid().sum()
        (expected,) = torch.autograd.grad(slope * soft, logits)
        torch.testing.assert_close(grad, expected)

    def test_its_local_likelihood_is_a_cross_entropy(self):
        logits, y = torch.randn(10, 7), torch.randint(7, (10,))
        local = RankPermutation(7).local_log_likelihood(y, logits, None)
        torch.testing.assert_close(local, -F.cross_entropy(logits, y, reduction="none"))

    @pytest.mark.parametrize("temperature", [0, -1, float("nan"), float("inf")])
    def test_a_temperature_that_is_not_positive_is_refused(self, temperature):
        with pytest.raises(UserError, match=f"temperature is {temperature}"):
            RankPermutation(4, temperature=temperature)

    def test_the_gradient_towards_the_data_is_that_of_a_softmax_of_distances(self):
        rank, logits = RankPermutation(5, 0.7), torch.randn(6, 3, 5, requires_grad=True)
        x, weight = torch.randint(5, (6, 3)), torch.randn(6, 3, 5)
        y = rank(x, logits)
        (actual,) = torch.autograd.grad((rank(one_hot(x, 5), logits) * weight).sum(), logits)
        chosen = logits.gather(-1, y.unsqueeze(-1))
        soft = (-(logits - chosen).abs() / 0.7).softmax(-1)
        torch.testing.assert_close(actual, torch.autograd.grad((soft * weight).sum(), logits)[0])

    def test_zeros_of_either_sign_tie(self):
        rank, x = RankPermutation(4), torch.arange(4)
        logits = torch.tensor([-0.0, 0.0, -0.0, 0.0]).expand(4, -1)
        assert torch.equal(rank(x, logits), x)
        assert torch.equal(rank.inverse(x, logits), x)


def spoiled(bijection, kind, dtype):
    """Logits (6, 3, num_logits) of which one row is not finite, in one of its choices."""
    logits = torch.randn(6, 3, bijection.num_logits).to(dtype)
    size = getattr(bijection, "modulus", bijection.num_classes)
    part = logits[4, 1, -size:]
    if kind == "nothing but -inf":
        part.fill_(-torch.inf)
    else:
        part[2] = {"nan": torch.nan, "+inf": torch.inf}[kind]
    return logits


@each
@each_dtype
@pytest.mark.parametrize("kind", ["nan", "+inf", "nothing but -inf"])
class TestNotFinite:
    def test_it_is_an_error_in_both_directions(self, name, kind, dtype):
        bijection = BIJECTIONS[name](6)
        logits = spoiled(bijection, kind, dtype)
        y = torch.randint(6, (6, 3))
        kinds = "NaN|\\+inf|nothing but -inf"
        message = f"{type(bijection).__name__} was given logits with ({kinds}) in 1 of 18 rows"
        for value in (y, one_hot(y, 6), one_hot(y, 6, dtype)):
            for direction in (bijection.forward, bijection.inverse):
                for grad in (True, False):
                    with torch.set_grad_enabled(grad), pytest.raises(NonFiniteError, match=message):
                        direction(value, logits.clone().requires_grad_(grad))

    def test_it_is_an_error_in_what_training_asks_for(self, name, kind, dtype):
        bijection = BIJECTIONS[name](6)
        logits = spoiled(bijection, kind, dtype)
        y, target = torch.randint(6, (6, 3)), torch.zeros(6)
        with pytest.raises(NonFiniteError, match=type(bijection).__name__):
            bijection.local_log_likelihood(y, logits, target)
        with pytest.raises(NonFiniteError, match=type(bijection).__name__):
            bijection.sample_inverse(y, logits, 3, 1.0)


def test_a_spoiled_logit_of_a_scale_that_is_no_unit_is_an_error():
    affine = ModularAffine(6)
    logits = torch.randn(4, 12)
    logits[2, 6 + 3] = torch.nan
    with pytest.raises(NonFiniteError, match="1 of 4"):
        affine(torch.zeros(4, dtype=torch.long), logits)


def test_scales_of_which_no_unit_is_possible_are_an_error():
    affine = ModularAffine(6)
    logits = torch.randn(4, 12)
    logits[2, [7, 11]] = -torch.inf
    with pytest.raises(NonFiniteError, match="nothing but -inf"):
        affine(torch.zeros(4, dtype=torch.long), logits)


@each
@each_dtype
def test_a_class_of_probability_0_is_no_error(name, dtype):
    bijection = BIJECTIONS[name](5)
    logits = torch.randn(40, 1, bijection.num_logits).to(dtype)
    out = torch.rand_like(logits, dtype=torch.float32) < 0.5
    out[..., 1] = out[..., -1] = False  # a location and a scale stay possible
    x, logits = every_value(bijection, logits.masked_fill(out, -torch.inf))
    y = bijection(x, logits)
    assert torch.equal(y.sort(dim=-1).values, x)
    assert torch.equal(bijection.inverse(y, logits), x)
    logits = logits.float().requires_grad_()
    for direction in (bijection.forward, bijection.inverse):
        there = direction(one_hot(x, 5), logits)
        assert torch.equal(there, one_hot(direction(x, logits), 5))
        (grad,) = torch.autograd.grad((there * torch.randn(5)).sum(), logits)
        assert grad.isfinite().all()
    x, log_probs = bijection.sample_inverse(y, logits, 3, 1.0)
    (grad,) = torch.autograd.grad(log_probs.sum(), logits)
    assert grad.isfinite().all()
    assert log_probs.isfinite().all()
    assert torch.equal(x.sort(dim=-1).values.unique(), torch.arange(5))


TIES = st.lists(st.sampled_from([-30.0, -1.0, -0.0, 0.0, 1e-8, 0.1, 1.0, 30.0]), min_size=26)


@given(
    name=st.sampled_from(sorted(BIJECTIONS)),
    num_classes=st.integers(2, 12),
    row=TIES,
    bits=st.lists(st.integers(-8, 8), min_size=26, max_size=26),
    peak=st.sampled_from([0.0, 1.0, 5.0]),
    dtype=st.sampled_from(DTYPES),
)
def test_ties_keep_a_bijection_whatever_the_batch(name, num_classes, row, bits, peak, dtype):
    bijection = BIJECTIONS[name](num_classes)
    if name == "matched":
        with torch.no_grad():
            bijection.target.copy_(torch.tensor(bits[:num_classes]) * peak / 8)
    size = bijection.num_logits
    logits = (torch.tensor(row[:size]) + 2.0**-23 * torch.tensor(bits[:size])).to(dtype)
    classes = torch.arange(num_classes)
    alone = [f(classes, logits.expand(num_classes, -1)) for f in (bijection, bijection.inverse)]
    for one, other in (alone, alone[::-1]):
        assert one.sort().values.tolist() == list(range(num_classes))
        assert torch.equal(other[one], classes)
    # Row by row, and in batches that hold other rows, in memory as they come.
    others = torch.randn(37, num_classes, size).to(dtype)
    others[11] = logits
    strided = torch.stack([torch.zeros_like(others), others], dim=-1)[..., 1]
    turned = others.transpose(0, 1).contiguous().transpose(0, 1)
    for batch in (others, strided, turned, others[11:12], others[5:30].clone()):
        place = {37: 11, 1: 0, 25: 6}[len(batch)]
        values = classes.expand(len(batch), -1)
        for direction, expected in zip((bijection, bijection.inverse), alone, strict=True):
            assert torch.equal(direction(values, batch)[place], expected)
            through = direction(one_hot(values, num_classes), batch)
            assert torch.equal(through.argmax(-1)[place], expected)
    for c in range(num_classes):
        assert bijection(classes[c], logits) == alone[0][c]
        assert bijection.inverse(classes[c], logits) == alone[1][c]


@pytest.mark.parametrize("name", OF_A_SOFTMAX)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("num_classes", [2, 3, 4, 6])
@either_way
def test_gradients_are_those_of_the_dense_form(name, rule, num_classes, inverse):
    # The map is linear in the value and in each choice: the rule acts on every choice by itself.
    bijection = make(name, num_classes, RULES[rule]()).double()
    logits = torch.randn(5, 3, bijection.num_logits, dtype=torch.float64, requires_grad=True)
    value = one_hot(torch.randint(num_classes, (5, 3)), num_classes, torch.float64).requires_grad_()
    weight = torch.randn(5, 3, num_classes, dtype=torch.float64)
    inputs = [logits, value, *bijection.parameters()]

    def gradients(mapping):
        torch.manual_seed(3)  # what stochastic rules draw
        mapped = mapping()
        return mapped, torch.autograd.grad((mapped * weight).sum(), inputs)

    def by_the_form():
        choices = [bijection.rule(part) for part in bijection.choice_logits(logits)]
        return dense(bijection, value, choices, inverse)

    mapped, actual = gradients(
        lambda: bijection.inverse(value, logits) if inverse else bijection(value, logits)
    )
    expected, others = gradients(by_the_form)
    torch.testing.assert_close(mapped, expected)
    torch.testing.assert_close(actual, others)


class TestSampling:
    @pytest.mark.parametrize("name", OF_A_SOFTMAX)
    @pytest.mark.parametrize("temperature", [0.5, 2.0])
    def test_maps_are_sampled_as_often_as_they_are_probable(self, name, temperature):
        bijection = BIJECTIONS[name](4)
        logits, y = 0.7 * torch.randn(bijection.num_logits), torch.tensor(1)
        torch.manual_seed(1)
        x, log_probs = bijection.sample_inverse(y, logits, 20_000, temperature)
        probs = [(part / temperature).softmax(-1) for part in bijection.choice_logits(logits)]
        chances = dense(
            bijection, one_hot(y, 4, torch.float64), [p.double() for p in probs], inverse=True
        )
        assert chi_square(torch.bincount(x, minlength=4), chances) < 21.1  # 3 degrees: 1 in 10,000
        combined = sum(
            p.log().reshape(-1, *[1] * (len(probs) - 1 - i)) for i, p in enumerate(probs)
        )
        assert torch.isclose(log_probs[:200, None], combined.flatten(), atol=1e-5).any(-1).all()

    def test_ranks_are_sampled_by_the_order_of_choices_without_replacement(self):
        rank, logits = RankPermutation(3), torch.tensor([0.3, -0.5, 0.9])
        torch.manual_seed(1)
        y = torch.tensor(2)
        x, log_probs = rank.sample_inverse(y, logits, 20_000, 0.8)
        p = (logits / 0.8).softmax(-1)
        chances = torch.zeros(3, dtype=torch.float64)
        probabilities = {}
        for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)):
            first, second, _ = order
            chance = float(p[first] * p[second] / (1 - p[first]))
            chances[order.index(2)] += chance
            probabilities[round(chance, 4)] = order.index(2)
        assert chi_square(torch.bincount(x, minlength=3), chances) < 18.4  # 2 degrees
        for value, log_prob in zip(x[:50].tolist(), log_probs[:50].tolist(), strict=True):
            chance = min(probabilities, key=lambda c: abs(c - torch.tensor(log_prob).exp()))
            assert probabilities[chance] == value

    @each
    def test_shapes_and_gradient(self, name):
        bijection = BIJECTIONS[name](5)
        logits = torch.randn(2, 3, bijection.num_logits, requires_grad=True)
        x, log_probs = bijection.sample_inverse(torch.randint(5, (2, 3)), logits, 7, 0.5)
        assert x.shape == log_probs.shape == (7, 2, 3)
        assert not x.is_floating_point()
        log_probs.sum().backward()
        assert (logits.grad != 0).any()


def chi_square(counts, chances):
    expected = chances.detach() * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("rule", ["gumbel", "reinmax"])
@pytest.mark.parametrize("name", OF_A_SOFTMAX)
def test_stochastic_rules_sample_in_training_mode_alone(name, rule):
    bijection = make(name, 4, RULES[rule]())
    row = bijection.initial_logits() + 0.3 * torch.randn(bijection.num_logits)
    logits, y = row.expand(20_000, 1, -1), torch.tensor([2]).expand(20_000, 1)
    value = one_hot(y, 4)
    torch.manual_seed(1)
    x = bijection.inverse(value, logits).argmax(-1)
    parts = [part.double().softmax(-1) for part in bijection.choice_logits(row)]
    chances = dense(bijection, value[0, 0].double(), parts, inverse=True)
    assert chi_square(torch.bincount(x[:, 0], minlength=4), chances) < 21.1
    expected = bijection.inverse(y, logits)
    assert len(expected.unique()) == 1  # indices never wait for chance
    state = torch.random.get_rng_state()
    assert torch.equal(bijection.eval().inverse(value, logits).argmax(-1), expected)
    assert torch.equal(torch.random.get_rng_state(), state)


class TestRule:
    @pytest.mark.parametrize("name", OF_A_SOFTMAX)
    def test_the_papers_is_the_default_and_another_is_part_of_the_bijection(self, name):
        bijection = BIJECTIONS[name](4)
        assert isinstance(bijection.rule, SoftmaxStraightThrough)
        assert bijection.rule.temperature == 0.1
        bijection = make(name, 4, PosteriorRule())
        assert isinstance(bijection.rule, PosteriorRule)
        assert "PosteriorRule" in repr(bijection)
        assert not bijection.eval().rule.training

    def test_ranks_have_none(self):
        assert RankPermutation(4).rule is None


@pytest.mark.slow
@pytest.mark.parametrize("name", BIJECTIONS)
def test_it_compiles(name):
    bijection = BIJECTIONS[name](6)
    logits, y = torch.randn(5, 3, bijection.num_logits), torch.randint(6, (5, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler's own parts
        compiled = torch.compile(bijection.inverse, fullgraph=True)
        assert torch.equal(compiled(y, logits), bijection.inverse(y, logits))
