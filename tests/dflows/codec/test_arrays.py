import io
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd.profiler import profile

from dflows import Context, DiscreteFlow, flows
from dflows.backbones import LSTM, MADE, Table
from dflows.bases import AutoregressiveBase, FactorizedBase, NGramBase
from dflows.bijections import RankPermutation
from dflows.codec import ArchiveError, compress, decompress
from dflows.codec import flows as of_flows
from dflows.codec.archive import ArchiveReader, ArchiveWriter
from dflows.codec.blocks import same_numbers
from dflows.errors import UserError
from dflows.memory import most_held
from dflows.orderings import Halves, Natural, Parity, Reversed, Strided
from dflows.transforms import ConditionalTransform, Inverse, PermutationTransform
from tests.dflows.small import (
    BIJECTIONS,
    ORDERINGS,
    make_conditioner,
    make_flow,
    make_transform,
    shaken,
    states,
)

OVERHEAD = 8 * 300


def counted(num_classes, length):
    base = NGramBase(num_classes, length, order=3)
    base.count([torch.randint(num_classes, (500,)).numpy()])
    return base


def language_model(ordering, backbone="causal"):
    return DiscreteFlow(shaken(AutoregressiveBase(make_conditioner(3, 6, ordering, backbone))))


FLOWS = {
    **{
        f"{bijection}-{backbone}": partial(
            make_flow, 3, 6, [Strided(3), Parity(), Natural()], bijection, backbone
        )
        for bijection in BIJECTIONS
        for backbone in ("causal", "causal-convolution", "masked")
    },
    "n-grams": lambda: DiscreteFlow(counted(3, 6)),
    "ranks on n-grams": lambda: make_flow(3, 6, [Parity()], "rank", base=counted(3, 6)),
    "lstm over lanes": lambda: language_model(Strided(3), LSTM(8)),
    "lstm": lambda: language_model(Natural(), LSTM(8)),
    "lstm from the right": lambda: language_model(Reversed(), LSTM(8)),
    "transformer": lambda: language_model(Natural()),
    "masked": lambda: language_model(Halves(), "masked"),
    "made": lambda: language_model(Natural(), MADE(8, length=6, hidden=16)),
    "an autoregressive base under a transform": lambda: shaken(
        DiscreteFlow(
            AutoregressiveBase(make_conditioner(3, 6, Strided(2), "causal")),
            [make_transform(3, 6, Parity(), "rank"), PermutationTransform([3, 1, 0, 2, 5, 4])],
        )
    ),
    "inverses": lambda: shaken(
        DiscreteFlow(FactorizedBase(3, 6), [Inverse(make_transform(3, 6, Natural(), "rank"))])
    ),
    "no transform": lambda: shaken(DiscreteFlow(FactorizedBase(3, 6))),
}


@pytest.mark.parametrize("make", FLOWS.values(), ids=FLOWS)
def test_all_events_come_back(make):
    flow, y = make(), states(3, 6)
    assert torch.equal(decompress(flow, compress(flow, y, batch_size=250)), y)


@pytest.mark.parametrize("make", FLOWS.values(), ids=FLOWS)
def test_samples_take_their_code_length(make):
    flow = make()
    y = flow.sample((1000,))
    bits = -flow.log_prob(y).sum().item() / math.log(2)
    archive = compress(flow, y)
    assert bits <= 8 * len(archive) <= bits * 1.001 + OVERHEAD
    assert torch.equal(decompress(flow, archive), y)


@pytest.mark.parametrize("ordering", ORDERINGS.values(), ids=ORDERINGS)
@pytest.mark.parametrize("bijection", ["affine", "matched", "rank"])
def test_both_directions_of_a_transform_by_levels_are_its_own(ordering, bijection):
    transform = shaken(make_transform(3, 5, ordering, bijection, "causal"))
    x = states(3, 5)
    with torch.no_grad():
        y = transform(x)
        assert torch.equal(transform.by_levels(x), y)
        assert torch.equal(transform.by_levels(y, inverse=True), x)


@pytest.mark.parametrize("shape", [(4,), (0, 4), (3, 4), (2, 3, 4), (5, 2)])
def test_shapes_come_back(shape):
    flow = make_flow(5, 4)
    y = torch.randint(5, shape)
    found = decompress(flow, compress(flow, y))
    assert found.shape == shape
    assert torch.equal(found, y)


def test_the_mode_of_a_flow_and_its_parameters_stay_and_so_do_the_threads():
    flow = make_flow(3, 4, backbone="causal").train()
    threads = torch.get_num_threads()
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    decompress(flow, compress(flow, states(3, 4), threads=threads + 1))
    assert flow.training
    assert torch.is_grad_enabled()
    assert torch.get_num_threads() == threads
    assert all(torch.equal(value, before[name]) for name, value in flow.state_dict().items())


def test_dropout_is_off():
    conditioner = make_conditioner(3, 6, Natural(), LSTM(8, dropout=0.5))
    flow = shaken(DiscreteFlow(AutoregressiveBase(conditioner))).train()
    y = states(3, 6)[::7]
    assert torch.equal(decompress(flow, compress(flow, y)), y)


def test_a_context_is_given_on_both_sides():
    network = partial(LSTM, 8, bidirectional=True)
    flow = flows.stack(3, 4, [Parity(), Parity(first=1)], network, context=Context(2))
    flow = shaken(flow)
    y, context = torch.randint(3, (3, 7, 4)), torch.randn(7, 2)
    archive = compress(flow, y, context, batch_size=5)
    assert torch.equal(decompress(flow, archive, context), y)
    with pytest.raises(ArchiveError, match="computes other probabilities"):
        decompress(flow, archive, context + 1)
    with pytest.raises(UserError, match="context"):
        decompress(flow, archive)


def test_double_precision_is_coded_in_it():
    flow = make_flow(3, 6, backbone="causal").double()
    y = states(3, 6)[::5]
    archive = compress(flow, y)
    assert torch.equal(decompress(flow, archive), y)
    with pytest.raises(ArchiveError, match="dtype float64, and this one has float32"):
        decompress(make_flow(3, 6, backbone="causal"), archive)


def test_few_passes_are_read_in_as_many():
    flow = shaken(flows.language_model(3, 8, partial(LSTM, 8), ordering=Strided(4)))
    y = torch.randint(3, (20, 8))
    archive = compress(flow.with_passes(2), y)
    assert torch.equal(decompress(flow.with_passes(2), archive), y)
    with pytest.raises(ArchiveError, match=r"written in 2 passes of 8 .* takes 4 .*with_passes"):
        decompress(flow, archive)


@pytest.mark.parametrize("kind", ["dropout", "batch norm"])
def test_what_encodes_a_context_is_evaluated_as_the_rest_is(kind):
    encoder = nn.Dropout(0.5) if kind == "dropout" else nn.BatchNorm1d(2)
    network = partial(LSTM, 8, bidirectional=True)
    made = flows.stack(3, 4, [Parity()], network, context=Context(2))
    flow = shaken(DiscreteFlow(made.base, made.transforms, encoder)).train()
    y, context = torch.randint(3, (7, 4)), torch.randn(7, 2)
    archive = compress(flow, y, context)
    for _ in range(2):
        assert torch.equal(decompress(flow, archive, context), y)
    assert encoder.training


def test_a_part_that_is_held_in_evaluation_mode_stays_so():
    flow = make_flow(3, 4).train()
    flow.base.eval()
    decompress(flow, compress(flow, states(3, 4)))
    assert flow.training
    assert not flow.base.training


def test_a_factorized_base_of_many_classes_takes_little_memory():
    flow = DiscreteFlow(FactorizedBase(2000, 64, "positions"))
    y = torch.randint(2000, (200, 64))
    archive = compress(flow, y)
    with profile(profile_memory=True) as profiled:
        assert torch.equal(decompress(flow, archive), y)
    assert most_held(profiled) < 100e6


class TestRefusals:
    def test_other_weights(self):
        flow = make_flow(3, 4)
        archive = compress(flow, states(3, 4))
        with torch.no_grad():
            flow.base.logits[0, 0] += 1e-6
        with pytest.raises(ArchiveError, match="other weights: give the checkpoint that wrote it"):
            decompress(flow, archive)

    def test_other_classes(self):
        with pytest.raises(ArchiveError, match="num_classes 3, and this one has 4"):
            decompress(make_flow(4, 4), compress(make_flow(3, 4), states(3, 4)))

    def test_an_ordering_of_another_kind(self):
        archive = compress(language_model(Natural(), LSTM(8)), states(3, 6))
        with pytest.raises(ArchiveError, match="other weights"):
            decompress(language_model(Reversed(), LSTM(8)), archive)

    @pytest.mark.parametrize("shape", [(1 << 40, 4), (1 << 63, 4), (7, 2), (4,), (30, 2, 2)])
    def test_a_crafted_shape(self, shape):
        flow = make_flow(3, 4)
        archive = compress(flow, states(3, 4)[:7])
        reader = ArchiveReader(io.BytesIO(archive))
        file = io.BytesIO()
        writer = ArchiveWriter(file, replace(reader.header, shape=shape))
        for block in reader.blocks():
            writer.write(block, b"")
        writer.close()
        with pytest.raises(ArchiveError, match="damaged"):
            decompress(flow, file.getvalue())

    @pytest.mark.parametrize("part", ["base", "transforms"])
    def test_other_numbers_of_the_same_weights(self, part, monkeypatch):
        """As of another device or library: found by the first passes, or by the CRC."""
        make = language_model if part == "base" else partial(make_flow, 3, 6, bijection="rank")
        flow = make([Natural()] if part == "transforms" else Natural())
        archive = compress(flow, states(3, 6))
        monkeypatch.setattr(of_flows, "fingerprint", lambda _: archive[30:46])
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        with pytest.raises(ArchiveError, match=r"computes other probabilities.*both say torch"):
            decompress(flow, archive)

    def test_indices_of_another_flow(self):
        with pytest.raises(UserError, match=r"a value of 3 lies outside 0\.\.2"):
            compress(make_flow(3, 4), torch.full((2, 4), 3))

    @pytest.mark.parametrize("number", ["batch_size", "threads"])
    def test_numbers_out_of_range(self, number):
        with pytest.raises(UserError, match=f"{number} is 0: give 1 to"):
            compress(make_flow(3, 4), states(3, 4), **{number: 0})

    def test_too_many_classes(self):
        flow = DiscreteFlow(FactorizedBase((1 << 20) + 1, 1))
        with pytest.raises(UserError, match="frequencies of 24 bits are coarse"):
            compress(flow, torch.zeros(1, 1, dtype=torch.long))


def test_events_of_a_length_that_a_part_does_not_take_are_coded_without_the_model():
    table = Table(8, 3, 6, Natural())
    flow = language_model(Natural(), table)
    y = states(3, 4)
    archive = compress(flow, y)
    assert torch.equal(decompress(flow, archive), y)
    assert 8 * len(archive) >= y.numel() * math.log2(3)


def test_what_is_computed_within_is_in_full_precision():
    flow = make_flow(3, 6, backbone="causal")
    y = states(3, 6)
    plain = compress(flow, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert compress(flow, y) == plain
        with same_numbers(flow, 1):
            assert not torch.is_autocast_enabled("cpu")


def test_a_rank_permutation_of_near_ties_comes_back():
    """Ranks that one evaluation of all levels and one a level could order differently."""
    conditioner = make_conditioner(7, 64, Natural(), LSTM(16), num_logits=7)
    transform = ConditionalTransform(RankPermutation(7), conditioner)
    shaken(transform)
    with torch.no_grad():
        conditioner.head.weight.mul_(1e-7)
        conditioner.head.bias.zero_()
    flow = DiscreteFlow(FactorizedBase(7, 64), [transform])
    y = torch.randint(7, (200, 64))
    assert torch.equal(decompress(flow, compress(flow, y)), y)
