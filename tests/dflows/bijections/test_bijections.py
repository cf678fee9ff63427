import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from dflows import modular
from dflows.bijections import MatchedAffine, ModularAffine, ModularShift, RankPermutation
from dflows.errors import UserError
from dflows.estimators import PosteriorRule, SoftmaxStraightThrough
from tests.dflows.small import BIJECTIONS

CLASSES = [2, 3, 4, 5, 6, 8, 9, 10]

each = pytest.mark.parametrize("name", BIJECTIONS)
each_size = pytest.mark.parametrize("num_classes", CLASSES)


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
    @pytest.mark.parametrize("kind", ["normal", "tied"])
    @pytest.mark.parametrize("estimator", [SoftmaxStraightThrough, PosteriorRule])
    def test_one_hot_vectors_and_indices_agree(self, name, num_classes, kind, estimator):
        bijection = BIJECTIONS[name](num_classes)
        x, logits = every_value(bijection, random_logits(bijection, 20, kind))
        ladj = torch.zeros(len(x))
        one_hot = F.one_hot(x, num_classes).float()
        choose = estimator().choose
        for through, plain in (
            (bijection.forward_through, bijection.forward),
            (bijection.inverse_through, bijection.inverse),
        ):
            result, zeros = through(one_hot, logits, ladj, choose)
            assert torch.equal(result, F.one_hot(plain(x, logits), num_classes).float())
            assert zeros.shape == (len(x),)
            assert (zeros == 0).all()

    @pytest.mark.parametrize("inverse", [False, True])
    def test_value_and_logits_receive_gradients(self, name, inverse):
        bijection = BIJECTIONS[name](5)
        logits = random_logits(bijection, 20).expand(-1, 5, -1).clone().requires_grad_()
        x = F.one_hot(torch.arange(5).expand(20, -1), 5).float().requires_grad_()
        through = bijection.inverse_through if inverse else bijection.forward_through
        y, _ = through(x, logits, torch.zeros(20), SoftmaxStraightThrough(1.0).choose)
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
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
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
        affine = ModularAffine(6)
        logits = torch.randn(4, 1, 12, requires_grad=True)
        y = F.one_hot(torch.randint(6, (4, 1)), 6).float()
        target = torch.randn(6).log_softmax(-1)
        for estimator in (SoftmaxStraightThrough(), PosteriorRule()):
            x, ladj = affine.inverse_through(
                y, logits, torch.zeros(4, requires_grad=True), estimator.choose
            )
            ((x * target).sum() + ladj.sum()).backward()
        affine.local_log_likelihood(torch.randint(6, (4, 1)), logits, target).sum().backward()
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
        one_hot, choose = F.one_hot(y, 11).float(), SoftmaxStraightThrough().choose

        def mapped():
            there = affine(y, logits), affine.inverse(y, logits)
            through = (affine.forward_through, affine.inverse_through)
            return [*there, *(f(one_hot, logits, torch.zeros(4000), choose)[0] for f in through)]

        expected = mapped()
        with torch.autocast("cpu", torch.bfloat16):
            found = mapped()
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))

    @pytest.mark.parametrize("inverse", [False, True])
    def test_its_gradient_is_that_of_the_mean_over_all_maps(self, inverse):
        affine = MatchedAffine(5).double()
        logits = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
        value = F.one_hot(torch.randint(5, (4, 3)), 5).double().requires_grad_()
        weight = torch.randn(4, 3, 5, dtype=torch.float64)
        through = affine.inverse_through if inverse else affine.forward_through
        mapped, _ = through(value, logits, torch.zeros(4), SoftmaxStraightThrough(1.0).choose)
        inputs = [logits, value, affine.target]
        actual = torch.autograd.grad((mapped * weight).sum(), inputs)
        scores = affine._scores(logits)
        every = F.one_hot(affine._table(inverse), 5).double()  # (C, K, K)
        hard = F.one_hot(scores.argmax(-1), scores.shape[-1]).double()
        chosen = hard + scores.softmax(-1) - scores.softmax(-1).detach()
        dense = torch.einsum("ndc,ndk,ckj->ndj", chosen, value, every)
        torch.testing.assert_close(mapped, dense)
        torch.testing.assert_close(actual, torch.autograd.grad((dense * weight).sum(), inputs))


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
        x, _ = rank.inverse_through(
            F.one_hot(y, 6).float(), logits, torch.zeros(1), SoftmaxStraightThrough().choose
        )
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
        x, _ = rank.inverse_through(
            F.one_hot(y, 5).float(), logits, torch.zeros(1), SoftmaxStraightThrough().choose
        )
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
