"""The best of all flows, and that coordinate ascent finds it."""

from itertools import permutations

import pytest

from dflows.bijections import ModularAffine, ModularShift, RankPermutation
from dflows.errors import UserError
from dflows.exact import exhaustive_optimum, factorized_entropy, tabular_flow
from dflows.orderings import Natural
from tests.dflows.exact.problems import autoregressive, full_rank


class TestExhaustiveOptimum:
    @pytest.mark.parametrize("seed", range(4))
    def test_of_all_bijections_is_that_of_all_permutations(self, seed):
        table = full_rank(2, 2, seed)
        best = min(
            factorized_entropy(table.flatten()[list(order)].reshape(2, 2))
            for order in permutations(range(4))
        )
        assert exhaustive_optimum(table) == pytest.approx(best, abs=1e-12)

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize(("flows", "bijection"), [(1, ModularShift), (3, RankPermutation)])
    def test_ascent_finds_it(self, seed, flows, bijection):
        table = full_rank(2, 2, seed)
        arguments = (table, autoregressive(flows), bijection(2))
        best = exhaustive_optimum(*arguments)
        assert exhaustive_optimum(table) <= best + 1e-12
        assert tabular_flow(*arguments, restarts=8).cross_entropy == pytest.approx(best, abs=1e-9)

    def test_ascent_never_goes_below_it(self):
        for seed in range(3):
            arguments = (full_rank(2, 3, seed), autoregressive(1), ModularAffine(3))
            best = exhaustive_optimum(*arguments)
            assert tabular_flow(*arguments).cross_entropy == pytest.approx(best, abs=1e-9)

    def test_without_transforms_it_is_the_factorized_entropy(self):
        table = full_rank(3, 2)
        best = exhaustive_optimum(table, [], ModularShift(2))
        assert best == pytest.approx(factorized_entropy(table))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((full_rank(4, 2),), "more than 9 states"),
            ((full_rank(2, 2), [Natural()]), "given alone"),
            ((full_rank(2, 2), [Natural()], ModularShift(3)), "bijection of 3 classes"),
            ((full_rank(2, 3), autoregressive(3), RankPermutation(3)), "too many flows"),
        ],
    )
    def test_bad_input_is_refused(self, arguments, message):
        with pytest.raises(UserError, match=message):
            exhaustive_optimum(*arguments)
