import math

import pytest
import torch

from dflows import DiscreteFlow
from dflows.backbones import Table
from dflows.bijections import ModularAffine, ModularShift, RankPermutation
from dflows.errors import UserError
from dflows.exact import (
    cross_entropy,
    divergence,
    entropy,
    factorized_entropy,
    probabilities,
    states,
    tabular_flow,
)
from dflows.objectives import EndToEnd
from dflows.orderings import Blocks, Halves, Natural, Reversed
from tests.dflows.exact.problems import Reflection, autoregressive, bipartite, full_rank, mixture
from tests.dflows.small import BIJECTIONS, ORDERINGS


class TestTabularFlow:
    @pytest.mark.parametrize("bijection", BIJECTIONS)
    @pytest.mark.parametrize("ordering", ORDERINGS.values(), ids=ORDERINGS)
    def test_every_ordering_and_bijection(self, ordering, bijection):
        table = full_rank(5, 3)
        flow, nats, _ = tabular_flow(
            table, [ordering, Natural()], BIJECTIONS[bijection](3), sweeps=4
        )
        assert cross_entropy(flow, table) == pytest.approx(nats, abs=1e-9)
        assert entropy(table) < nats < factorized_entropy(table)
        assert float(probabilities(flow).sum()) == pytest.approx(1)
        y = states(3, 5)
        for transform in flow.transforms:
            assert torch.equal(transform(transform.inv(y)), y)

    @pytest.mark.parametrize("base", [None, Blocks(size=2), Natural()], ids=repr)
    def test_every_base(self, base):
        table = full_rank(4, 3)
        flow, nats, _ = tabular_flow(table, [Halves()], RankPermutation(3), base=base)
        assert cross_entropy(flow, table) == pytest.approx(nats, abs=1e-9)
        if base == Natural():
            assert nats == pytest.approx(entropy(table), abs=1e-9)

    def test_without_transforms_it_is_the_best_base(self):
        table = full_rank(3, 3)
        flow, nats, _ = tabular_flow(table, [], ModularShift(3))
        assert nats == pytest.approx(factorized_entropy(table))
        assert cross_entropy(flow, table) == pytest.approx(nats)

    def test_of_a_users_own_bijection(self):
        table = full_rank(3, 4)
        flow, nats, _ = tabular_flow(table, [Natural(), Reversed()], Reflection(4))
        assert cross_entropy(flow, table) == pytest.approx(nats, abs=1e-9)
        assert nats < factorized_entropy(table)

    def test_a_better_bijection_and_more_flows_are_better(self):
        table = full_rank(4, 4)
        found = [
            tabular_flow(table, autoregressive(flows), bijection(4))[1]
            for flows, bijection in [
                (1, ModularShift),
                (1, ModularAffine),
                (1, RankPermutation),
                (3, RankPermutation),
            ]
        ]
        assert found == sorted(found, reverse=True)

    def test_what_is_deterministic_is_reached(self):
        table = torch.eye(5, dtype=torch.float64) / 5
        flow, nats, _ = tabular_flow(table, [Natural()], ModularShift(5))
        assert nats == pytest.approx(math.log(5))
        assert divergence(flow, table) == pytest.approx(0, abs=1e-9)

    def test_the_ascent_begins_with_transforms_that_are_fitted_layerwise(self):
        arguments = full_rank(3, 3), autoregressive(2), ModularAffine(3)
        begun = tabular_flow(*arguments, restarts=0, sweeps=0)
        ascended = tabular_flow(*arguments)
        assert begun.layerwise == pytest.approx(begun.cross_entropy, abs=1e-9)
        assert ascended.layerwise == begun.layerwise > ascended.cross_entropy

    def test_equal_seeds_give_equal_flows(self):
        table = full_rank(3, 4)
        one, other = (tabular_flow(table, [Natural()], ModularAffine(4), seed=3) for _ in range(2))
        assert one.cross_entropy == other.cross_entropy
        for name, value in one.flow.state_dict().items():
            assert torch.equal(value, other.flow.state_dict()[name])

    @pytest.mark.parametrize("base", [None, Blocks(size=2)], ids=repr)
    def test_it_is_saved_loaded_and_sampled(self, base, tmp_path):
        table = full_rank(3, 3)
        arguments = ([Natural(), Reversed()], RankPermutation(3))
        flow, nats, _ = tabular_flow(table, *arguments, base=base)
        torch.save(flow.state_dict(), tmp_path / "flow.pt")
        empty, *_ = tabular_flow(torch.full_like(table, 1 / 27), *arguments, base=base, sweeps=0)
        empty.load_state_dict(torch.load(tmp_path / "flow.pt"))
        assert cross_entropy(empty, table) == pytest.approx(nats, abs=1e-9)
        assert cross_entropy(empty.float(), table) == pytest.approx(nats, abs=1e-6)
        y = flow.sample((20_000,), generator=torch.Generator().manual_seed(0))
        counts = (y @ torch.tensor([9, 3, 1])).bincount(minlength=27)
        torch.testing.assert_close(
            counts / 20_000, probabilities(flow).flatten().float(), atol=0.01, rtol=0
        )

    def test_it_is_an_ordinary_flow_and_leaves_the_bijection_alone(self):
        bijection = ModularAffine(3)
        flow, *_ = tabular_flow(full_rank(3, 3), [Natural()], bijection)
        assert type(flow) is DiscreteFlow
        assert isinstance(flow.transforms[0].conditioner.backbone, Table)
        assert flow.transforms[0].bijection is not bijection
        EndToEnd()(flow, states(3, 3)).sum().backward()

    @pytest.mark.parametrize(
        ("arguments", "options", "message"),
        [
            ((full_rank(3, 3), [Natural()], ModularShift(4)), {}, "bijection of 4 classes"),
            ((full_rank(3, 3), [Natural()], ModularShift(3)), {"restarts": -1}, "restarts is -1"),
            ((full_rank(3, 3), [Natural()], ModularShift(3)), {"sweeps": -1}, "sweeps is -1"),
            ((full_rank(1, 3), [Natural()], ModularShift(3)), {}, "the same level"),
            ((full_rank(3, 3) * 2, [Natural()], ModularShift(3)), {}, "sum to 2"),
            (
                (torch.full((3300, 3300), 3300.0**-2), [Natural()], ModularShift(3300)),
                {},
                "at most 10,000,000",
            ),
        ],
    )
    def test_bad_input_is_refused(self, arguments, options, message):
        with pytest.raises(UserError, match=message):
            tabular_flow(*arguments, **options)


class TestReferences:
    """The best tabular flows that were known before: to within 0.01 nats, or better."""

    def check(self, table, orderings, bijection, known, **options):
        flow, nats, _ = tabular_flow(table, orderings, bijection(table.shape[0]), **options)
        assert entropy(table) <= nats <= known + 0.01
        if table.numel() < 10**6:
            assert cross_entropy(flow, table) == pytest.approx(nats, abs=1e-9)

    @pytest.mark.parametrize(
        ("bijection", "flows", "known"),
        [
            (ModularAffine, 1, 7.739),
            (ModularAffine, 2, 7.666),
            (ModularAffine, 8, 7.644),
            (RankPermutation, 1, 7.696),
            (RankPermutation, 2, 7.643),
            (RankPermutation, 8, 7.632),
        ],
    )
    def test_autoregressive(self, bijection, flows, known):
        self.check(full_rank(5, 5), autoregressive(flows), bijection, known, sweeps=20)

    @pytest.mark.parametrize(
        ("bijection", "known"), [(ModularAffine, 7.793), (RankPermutation, 7.776)]
    )
    def test_bipartite(self, bijection, known):
        self.check(full_rank(5, 5), bipartite(8, 5), bijection, known)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("bijection", "flows", "known"),
        [
            (ModularAffine, 1, 11.294),
            (ModularAffine, 2, 11.205),
            (ModularAffine, 8, 11.144),
            (RankPermutation, 1, 11.135),
            (RankPermutation, 2, 11.097),
            (RankPermutation, 8, 11.092),
        ],
    )
    def test_autoregressive_of_ten_classes(self, bijection, flows, known):
        options = {"restarts": flows // 8, "sweeps": 40}
        self.check(full_rank(5, 10), autoregressive(flows), bijection, known, **options)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("bijection", "known"), [(ModularAffine, 11.395), (RankPermutation, 11.328)]
    )
    def test_bipartite_of_ten_classes(self, bijection, known):
        self.check(full_rank(5, 10), bipartite(8, 5), bijection, known)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("bijection", "flows", "known"),
        [
            (ModularAffine, 1, 15.796),
            (ModularAffine, 2, 15.720),
            (RankPermutation, 1, 15.750),
            (RankPermutation, 2, 15.693),
        ],
    )
    def test_autoregressive_of_ten_dimensions(self, bijection, flows, known):
        options = {"restarts": 0, "sweeps": 0}
        self.check(full_rank(10, 5), autoregressive(flows), bijection, known, **options)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("bijection", "known"), [(ModularAffine, 16.083), (RankPermutation, 16.079)]
    )
    def test_bipartite_of_ten_dimensions(self, bijection, known):
        options = {"restarts": 0, "sweeps": 0}
        self.check(full_rank(10, 5), bipartite(8, 10), bijection, known, **options)

    @pytest.mark.parametrize(
        ("bijection", "flows", "known"),
        [
            (ModularShift, 6, 0.307),
            (RankPermutation, 1, 0.061),
            pytest.param(ModularAffine, 6, 0.276, marks=pytest.mark.slow),
            pytest.param(RankPermutation, 6, 0.020, marks=pytest.mark.slow),
        ],
    )
    def test_mixture(self, bijection, flows, known):
        table = mixture()
        assert factorized_entropy(table) - entropy(table) == pytest.approx(0.732, abs=0.001)
        orderings = [Halves(first=number % 2) for number in range(flows)]
        options = {"restarts": 0, "sweeps": 5}
        self.check(table, orderings, bijection, entropy(table) + known, **options)
