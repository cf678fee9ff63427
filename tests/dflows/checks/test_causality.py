import pytest
import torch
from torch import nn

from dflows import DiscreteFlow, FactorizedBase
from dflows.backbones import (
    LSTM,
    MADE,
    Backbone,
    DilatedConvolution,
    LevelConvolution,
    Masked,
    Table,
    Transformer,
)
from dflows.bases import AutoregressiveBase
from dflows.bijections import Bijection, ModularAffine, RankPermutation
from dflows.checks import (
    CertificateError,
    check_above_entropy,
    check_autoregressive,
    check_bijective,
    check_causal,
    check_flow,
    check_normalized,
)
from dflows.conditioner import Conditioner, Context
from dflows.errors import LengthError, UserError
from dflows.orderings import Blocks, Natural, Parity, Permutation, Reversed, Strided
from dflows.transforms import DiscreteTransform
from tests.dflows.small import BIJECTIONS, ORDERINGS, WIDTH, make_flow, make_transform


class Leaking(Backbone):
    """Sees the value that it must predict, of the dimensions from a given one on."""

    def __init__(self, begin=0):
        super().__init__(WIDTH, level_causal=True)
        self.begin = begin
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, content, query=None, levels=None):
        features = self.linear(query).expand(content.shape).clone()
        features[:, self.begin :] += content[:, self.begin :]
        return features


class LookingAhead(Leaking):
    """Sees the value to the right."""

    def forward(self, content, query=None, levels=None):
        return self.linear(query) + content.roll(-1, dims=1)


class OneLeak(Leaking):
    """Sees one value at one dimension, or at every dimension that is given."""

    def __init__(self, source, target):
        super().__init__()
        self.source, self.target = source, target

    def forward(self, content, query=None, levels=None):
        features = self.linear(query).expand(content.shape).clone()
        features[:, self.target] += content[:, self.source]
        return features


class LeakingLSTM(LSTM):
    """Sees the value to the right in one evaluation, which its steps cannot."""

    def forward(self, content, query=None, levels=None):
        return super().forward(content, query, levels) + content.roll(-1, dims=1)


class LeakingWindows(LSTM):
    """Is right in all but windows that continue, or start a text."""

    def __init__(self, begins):
        super().__init__(WIDTH)
        self.begins = begins

    def resume(self, content, query, levels, before, state=None):
        features, after = super().resume(content, query, levels, before, state)
        return features + content * ((state is None) == self.begins), after


class OtherSteps(LSTM):
    """Is right in one evaluation, and wrong in steps."""

    def advance(self, cache, level, content):
        return super().advance(cache, level, content) * (1 + (level == 3))


class Plain(nn.Module):
    """A user's network, of which a function of (batch, length, width) may go wrong."""

    def __init__(self, function):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.function = function

    def forward(self, features):
        return self.function(self.linear(features))


def transform_of(length, bijection, ordering, backbone, **options):
    backbone = backbone if isinstance(backbone, Backbone) else Masked(backbone, WIDTH)
    return make_transform(bijection.num_classes, length, ordering, bijection, backbone, **options)


def flow_of(backbone, ordering=None, bijection=RankPermutation, **options):
    transform = transform_of(6, bijection(4), ordering or Parity(), backbone, **options)
    return DiscreteFlow(FactorizedBase(4, 6), [transform])


class TestCheckFlow:
    @pytest.mark.parametrize("ordering", ORDERINGS.values(), ids=ORDERINGS)
    @pytest.mark.parametrize("backbone", ["causal", "masked"])
    def test_every_ordering_passes(self, ordering, backbone):
        check_flow(make_flow(3, 5, [ordering], backbone=backbone))

    @pytest.mark.parametrize("bijection", BIJECTIONS)
    def test_every_bijection_passes(self, bijection):
        check_flow(make_flow(4, 5, [Reversed(), Parity()], bijection))

    @pytest.mark.parametrize("shape", [(2, 3), (2, 4, 3)])
    @pytest.mark.parametrize("backbone", ["causal", "masked"])
    def test_a_conditional_flow_is_checked_with_a_context(self, shape, backbone):
        flow = make_flow(3, 4, [Natural()], backbone=backbone, context=Context(3))
        check_flow(flow, torch.randn(shape))
        with pytest.raises(UserError, match="no context was given"):
            check_flow(flow)

    def test_sizes_of_real_text_pass(self):
        flow = make_flow(30, 256, [Strided(columns=8)], "rank", backbone="causal-convolution")
        check_flow(flow)

    @pytest.mark.parametrize(
        ("function", "message"),
        [
            (lambda h: h[..., :-1], r"Plain returned \(.*7\).*must keep"),
            (lambda h: h.mean(1), "must keep"),
            (lambda h: h.transpose(1, 2), "must keep"),
            (lambda h: h @ torch.zeros(3, 3), "Plain over Parity.*failed on features"),
            (lambda h: h + h.mean(0, keepdim=True), "mixes the examples of a batch.*dimension"),
            (lambda h: h.roll(1, dims=0), "mixes the examples"),
            (lambda h: h + torch.rand_like(h), "another result when it is evaluated again"),
            (lambda h: h / 0, "not finite, first at dimension 0"),
        ],
    )
    def test_networks_that_go_wrong_are_refused(self, function, message):
        with pytest.raises(UserError, match=message):
            check_flow(flow_of(Plain(function)))

    def test_a_torch_transformer_without_batch_first_is_refused(self):
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16)
        encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        with pytest.raises(CertificateError, match="batch_first: true"):
            check_flow(flow_of(encoder))

    def test_dropout_is_no_chance_in_evaluation(self):
        flow = flow_of(DilatedConvolution(WIDTH, layers=1, dropout=0.5))
        flow.train()
        check_flow(flow)

    def test_a_leak_of_a_base_is_refused_too(self):
        base = AutoregressiveBase(Conditioner(4, 6, Natural(), Leaking()))
        with pytest.raises(CertificateError, match=r"Leaking over Natural\(\) leaks"):
            check_flow(DiscreteFlow(base))

    def test_it_leaves_the_flow_and_the_random_state_alone(self):
        flow = make_flow(3, 4, [Natural()])
        flow.train()
        flow.transforms[0].eval()
        before = {name: value.clone() for name, value in flow.state_dict().items()}
        modes = [part.training for part in flow.modules()]
        state = torch.random.get_rng_state()
        check_flow(flow)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert [part.training for part in flow.modules()] == modes
        assert all(torch.equal(value, before[name]) for name, value in flow.state_dict().items())
        assert all(parameter.grad is None for parameter in flow.parameters())


class TestCausal:
    @pytest.mark.parametrize(
        "backbone",
        [
            Transformer(WIDTH, layers=2, heads=2),
            LevelConvolution(WIDTH, layers=3, window=2),
            MADE(WIDTH, length=12),
            LSTM(WIDTH),
        ],
        ids=lambda backbone: type(backbone).__name__,
    )
    def test_backbones_of_dflows_keep_to_an_ordering(self, backbone):
        check_autoregressive(backbone, length=12)
        check_autoregressive(backbone, length=12, ordering=Reversed())
        if not isinstance(backbone, LSTM):
            check_autoregressive(backbone, length=12, ordering=Strided(columns=4))
            check_autoregressive(backbone, length=12, ordering=Blocks(size=3))

    @pytest.mark.parametrize("begin", [0, 3])
    def test_a_leak_is_named_with_its_place(self, begin):
        with pytest.raises(CertificateError) as caught:
            check_autoregressive(Leaking(begin), length=6)
        assert (
            f"backbone Leaking over Natural() leaks: the value at dimension {begin} (level {begin})"
            f" changes the output at dimension {begin} (level {begin})"
        ) in str(caught.value)

    def test_a_look_ahead_is_named_with_its_place(self):
        with pytest.raises(
            CertificateError, match=r"dimension 1 \(level 1\).*dimension 0 \(level 0"
        ):
            check_autoregressive(LookingAhead(), length=6)

    @pytest.mark.parametrize("length", [6, 300])
    def test_a_single_leak_at_the_end_is_found(self, length):
        with pytest.raises(CertificateError, match=f"dimension {length - 1} "):
            check_autoregressive(Leaking(length - 1), length=length)

    @pytest.mark.parametrize("length", [128, 256, 512])
    @pytest.mark.parametrize(
        ("source", "target", "found"),
        [
            (7, 6, (7, 6)),
            (71, 70, (71, 70)),
            (100, 100, (100, 100)),
            (127, 1, (127, 1)),
            (slice(1, None, 2), slice(0, None, 2), (1, 0)),
            (slice(2, None, 2), slice(1, -1, 2), (2, 1)),
        ],
    )
    def test_one_leak_among_many_dimensions_is_found(self, length, source, target, found):
        backbone = OneLeak(source, target)
        base = DiscreteFlow(AutoregressiveBase(Conditioner(4, length, Natural(), backbone)))
        transform = transform_of(length, RankPermutation(4), Natural(), backbone)
        for flow in (base, DiscreteFlow(FactorizedBase(4, length), [transform])):
            source, target = found
            if flow is not base and target == 0:
                source, target = 3, 2  # a flow has no use for the output at level 0
            with pytest.raises(
                CertificateError, match=rf"dimension {source} .*at dimension {target} "
            ):
                check_flow(flow)

    def test_a_leak_over_a_shuffled_ordering_is_named_by_its_dimensions(self):
        with pytest.raises(CertificateError, match=r"dimension 4 \(level 3\).*dimension 2 \(level"):
            check_autoregressive(OneLeak(4, 2), length=6, ordering=Permutation([3, 2, 0, 4, 1, 5]))

    def test_one_evaluation_is_held_against_steps(self):
        check_autoregressive(LSTM(WIDTH), length=300)
        with pytest.raises(CertificateError, match=r"dimension 1 \(level 1\) changes the output"):
            check_autoregressive(LeakingLSTM(WIDTH), length=300)
        with pytest.raises(CertificateError, match=r"by steps than in one.*first at dimension 3"):
            check_autoregressive(OtherSteps(WIDTH), length=6)

    @pytest.mark.parametrize(
        ("begins", "message"), [(True, "other logits from an empty state"), (False, "go on, leaks")]
    )
    def test_windows_that_go_on_keep_to_it_too(self, begins, message):
        with pytest.raises(CertificateError, match=message):
            check_autoregressive(LeakingWindows(begins))

    def test_what_is_masked_cannot_leak(self):
        network = Plain(lambda h: h + h.roll(-1, dims=1))
        transform = transform_of(6, RankPermutation(4), Natural(), network)
        check_causal(transform.conditioner)
        check_bijective(transform)
        with pytest.raises(CertificateError, match="leaks"):
            check_causal(transform_of(6, RankPermutation(4), Natural(), LookingAhead()).conditioner)

    def test_only_a_level_causal_backbone_can_be_autoregressive(self):
        with pytest.raises(UserError, match="not level-causal"):
            check_autoregressive(DilatedConvolution(WIDTH))


class Broken(RankPermutation):
    """Maps two classes to one."""

    def forward(self, x, logits):
        return super().forward(x.clamp(min=1), logits)


class UnmaskedScale(ModularAffine):
    """Takes any scale, 0 included: what makes a likelihood of 0 nats."""

    def inverse(self, y, logits):
        loc, scale = logits.chunk(2, dim=-1)
        return (scale.argmax(-1) * (y - loc.argmax(-1))) % self.num_classes


class Shifted(RankPermutation):
    """Bijective both ways, but the one is not the inverse of the other."""

    def inverse(self, y, logits):
        return (super().inverse(y, logits) + 1) % self.num_classes


class TestBijective:
    @pytest.mark.parametrize("bijection", [Broken, UnmaskedScale, Shifted])
    @pytest.mark.parametrize("ordering", [Parity(), Natural()], ids=str)
    def test_a_bijection_that_is_none_is_refused(self, bijection, ordering):
        transform = transform_of(6, bijection(4), ordering, LevelConvolution(WIDTH))
        assert isinstance(transform.bijection, Bijection)
        with pytest.raises(CertificateError, match=r"over .* is no bijection.*first at dimension"):
            check_bijective(transform)
        with pytest.raises(CertificateError, match="no bijection"):
            check_flow(DiscreteFlow(FactorizedBase(4, 6), [transform]))

    @pytest.mark.parametrize("network", [LevelConvolution, LSTM])
    def test_the_own_length_is_tried_where_that_can_be_had(self, network):
        class Late(RankPermutation):
            """Goes wrong beyond 64 dimensions."""

            def inverse(self, y, logits):
                return super().inverse(y, logits) if y.shape[1] < 100 else y

        transform = transform_of(128, Late(4), Natural(), network(WIDTH))
        with pytest.raises(CertificateError, match=r"no bijection.* of 512 values"):
            check_bijective(transform)

    @pytest.mark.parametrize("inverted", [False, True])
    def test_transforms_of_ones_own_are_tried_too(self, inverted):
        class Mine(DiscreteTransform):
            def __init__(self, function, inverse):
                super().__init__()
                self.functions = (function, inverse)

            @property
            def passes(self):
                return 0

            def forward(self, x, context=None):
                return self.functions[inverted](x)

            def inverse(self, y, context=None):
                return self.functions[not inverted](y)

        base = FactorizedBase(4, 100)
        good = Mine(lambda x: (x + 1) % 4, lambda y: (y - 1) % 4)
        check_flow(DiscreteFlow(base, [good, good.inv, make_transform(4, 100, Parity())]))
        check_bijective(good, num_classes=4, length=3)
        with pytest.raises(UserError, match="Mine does not tell its shape: give num_classes"):
            check_bijective(good)
        for function, inverse, message in (
            (lambda x: (x + 1) % 4, lambda y: (y - 2) % 4, "Mine is no bijection"),
            (lambda x: x.clamp(min=1), lambda y: y, "Mine is no bijection"),
            (lambda x: x + 1, lambda y: y - 1, r"Mine makes values outside 0\.\.3"),
            (lambda x: x[:, 1:], lambda y: y, r"Mine makes \(.*, 99\).* of indices \(.*, 100\)"),
            (lambda x: 1.0 * x, lambda y: y.long(), "Mine makes .* of dtype torch.float32"),
        ):
            with pytest.raises(CertificateError, match=message):
                check_flow(DiscreteFlow(FactorizedBase(4, 100), [good, Mine(function, inverse)]))

    def test_an_inverse_is_tried_as_what_it_inverts(self):
        for bijection, backbone, message in (
            (RankPermutation, Leaking(), "Leaking over Natural.* leaks"),
            (
                Shifted,
                LevelConvolution(WIDTH),
                "the inverse of a transform over .* is no bijection",
            ),
        ):
            transform = transform_of(6, bijection(4), Natural(), backbone)
            with pytest.raises(CertificateError, match=message):
                check_flow(DiscreteFlow(FactorizedBase(4, 6), [transform.inv]))

    def test_long_events_are_shown_on_shorter_ones(self):
        check_bijective(make_transform(3, 2000, Natural(), backbone="causal-convolution"))


class TestNormalized:
    def test_it_returns_the_sum_where_it_can_be_had(self):
        flow = make_flow(3, 4, [Natural()])
        assert check_normalized(flow) == pytest.approx(1, abs=1e-6)
        assert check_normalized(flow, max_states=80) is None
        assert check_normalized(make_flow(3, 9, [Natural()]), max_seconds=0.0) is None

    def test_probabilities_that_do_not_sum_to_1_are_refused(self):
        class Twice(FactorizedBase):
            def log_prob(self, x, context=None):
                return super().log_prob(x, context) + 0.1

        flow = DiscreteFlow(Twice(3, 4))
        with pytest.raises(
            CertificateError,
            match=r"all 81 states of 4 dimensions sum to 1\.49.*the base Twice is not",
        ):
            check_normalized(flow)

    def test_a_scale_of_0_makes_more_than_1(self):
        class Zero(ModularAffine):
            def inverse(self, y, logits):
                return 0 * y

        transform = transform_of(4, Zero(4), Parity(), DilatedConvolution(WIDTH))
        with pytest.raises(CertificateError, match="not to 1"):
            check_normalized(DiscreteFlow(FactorizedBase(4, 4), [transform]))


class TestAboveEntropy:
    @pytest.mark.parametrize(
        ("nll", "error"), [(2.5, 0.0), (2.6, 0.0), (2.41, 0.03), (2.5 - 1e-9, 0.0)]
    )
    def test_from_the_entropy_on_all_is_well(self, nll, error):
        check_above_entropy(nll, 2.5, error)

    @pytest.mark.parametrize(("nll", "error"), [(0.0, 0.0), (2.49, 0.0), (2.3, 0.03)])
    def test_below_it_there_is_no_likelihood(self, nll, error):
        with pytest.raises(CertificateError, match="below the entropy"):
            check_above_entropy(nll, 2.5, error)


def test_a_backbone_of_one_length_only_is_refused():
    class Fixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = torch.nn.Linear(5, 5)

        def forward(self, features):
            return self.mix(features.mT).mT

    transform = transform_of(5, RankPermutation(3), Parity(), Fixed())
    flow = DiscreteFlow(FactorizedBase(3, 5), [transform])
    with pytest.raises(CertificateError, match="an event of 4 dimensions fails"):
        check_flow(flow)


@pytest.mark.parametrize("length", [4, 2, 1])
def test_a_wrong_shape_for_shorter_events_is_refused(length):
    def cut(features):
        return features[:, :-1] if features.shape[1] == length else features

    transform = transform_of(5, RankPermutation(3), Natural(), WrongWhenShort(cut))
    flow = DiscreteFlow(FactorizedBase(3, 5), [transform])
    with pytest.raises(CertificateError, match=f"an event of {length} dim.*returned features"):
        check_flow(flow)


class WrongWhenShort(Backbone):
    def __init__(self, function):
        super().__init__(WIDTH, level_causal=True)
        self.function = function

    def forward(self, content, query=None, levels=None):
        return self.function(content * 0 + query)


def test_what_takes_one_length_alone_may_say_so():
    table = Table(4, num_classes=3, length=4)
    check_flow(DiscreteFlow(AutoregressiveBase(Conditioner(3, 4, Natural(), table))))
    with pytest.raises(LengthError, match="of its own length"):
        table(torch.zeros(1, 3, dtype=torch.long), levels=torch.arange(3))
    with pytest.raises(UserError, match="num_classes=3") as caught:
        table(torch.zeros(1, 4, 2), levels=torch.arange(4))
    assert not isinstance(caught.value, LengthError)


@pytest.mark.parametrize("length", [1, 2])
def test_there_need_not_be_shorter_events(length):
    check_flow(DiscreteFlow(AutoregressiveBase(Conditioner(3, length, Natural(), LSTM(WIDTH)))))
