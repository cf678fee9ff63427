"""The maps that bijections are found to have, and the best of them."""

from itertools import permutations

import pytest
import torch

from dflows.bijections import ModularAffine, ModularShift, RankPermutation
from dflows.exact.maps import maps_of, swapped
from tests.dflows.exact.problems import Reflection


class TestMaps:
    @pytest.mark.parametrize(
        ("bijection", "count"),
        [
            (ModularShift(6), 6),
            (ModularAffine(6), 12),
            (ModularAffine(7), 42),
            (ModularAffine(6, prime=True), 42),
            (Reflection(6), 2),
            (RankPermutation(4), 24),
        ],
        ids=repr,
    )
    def test_all_are_found_and_taken_by_their_logits(self, bijection, count):
        maps = maps_of(bijection)
        assert len(maps.listed.unique(dim=0)) == len(maps.listed) == count
        generator = torch.Generator().manual_seed(0)
        gains = torch.rand(50, *[bijection.num_classes] * 2, generator=generator).double()
        choice = maps.best(gains, maps.listed[:50])
        logits = maps.logits(choice).unsqueeze(1).expand(-1, bijection.num_classes, -1)
        classes = torch.arange(bijection.num_classes).expand(len(choice), -1)
        assert torch.equal(bijection.inverse(classes, logits), maps.of(choice))

    @pytest.mark.parametrize("bijection", [ModularAffine(5), RankPermutation(5)], ids=repr)
    def test_the_best_is_the_best_of_all(self, bijection):
        maps = maps_of(bijection)
        gains = torch.rand(20, 5, 5, dtype=torch.float64)
        best = maps.of(maps.best(gains, maps.listed[:20]))
        total = [gains[:, range(5), listed].sum(-1) for listed in maps.listed]
        found = gains.gather(-1, best.unsqueeze(-1)).sum((1, 2))
        torch.testing.assert_close(found, torch.stack(total).amax(0))

    @pytest.mark.parametrize("bijection", [ModularAffine(5), RankPermutation(5)], ids=repr)
    def test_the_best_of_products_is_the_best(self, bijection):
        maps = maps_of(bijection)
        weights, log_probs = torch.rand(20, 5).double(), torch.rand(5).double().log()
        gains = weights.unsqueeze(-1) * log_probs
        alone = maps.of(maps.best_alone(weights, log_probs))
        assert torch.equal(alone, maps.of(maps.best(gains, maps.listed[:20])))

    def test_swaps_end_where_no_swap_gains(self):
        gains = torch.rand(30, 9, 9, dtype=torch.float64)
        begin = torch.rand(30, 9).argsort(-1)
        maps = swapped(gains, begin)
        assert torch.equal(maps.sort(-1).values, torch.arange(9).expand(30, -1))

        def total(maps):
            return gains.gather(-1, maps.unsqueeze(-1)).sum((1, 2))

        assert (total(maps) > total(begin)).all()
        for one, other in permutations(range(9), 2):
            exchanged = maps.clone()
            exchanged[:, [one, other]] = maps[:, [other, one]]
            assert (total(exchanged) <= total(maps) + 1e-12).all()
