from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn

from dflows import DiscreteFlow, FactorizedBase
from dflows.backbones import LSTM, MADE, Backbone, LevelConvolution, Masked, Transformer
from dflows.bases import AutoregressiveBase
from dflows.bijections import RankPermutation
from dflows.checks import CertificateError, check_bijective, check_causal, check_flow
from dflows.conditioner import Conditioner, Context
from dflows.experts import Expert
from dflows.flows import autoregressive, bipartite, language_model, stack
from dflows.orderings import Natural, Parity, Strided
from dflows.representations import exactly
from dflows.transforms import Composition
from tests.dflows.small import WIDTH, make_flow, make_transform, shaken

NETWORKS = {
    "lstm": (partial(LSTM, WIDTH), Natural()),
    "transformer": (partial(Transformer, WIDTH, layers=2, heads=2), Natural()),
    "transformer-strided": (partial(Transformer, WIDTH, layers=2, heads=2), Strided(columns=8)),
    "convolution": (partial(LevelConvolution, WIDTH, layers=2, window=2), Strided(columns=8)),
}


def random_flow(network, length=64, num_classes=27):
    backbone, ordering = NETWORKS[network]
    torch.manual_seed(0)
    return shaken(stack(num_classes, length, [ordering], backbone), scale=0.1)


def network_of(function, **attributes):
    """A level-causal backbone whose features are a function of content and query."""

    class Network(Backbone):
        def __init__(self):
            super().__init__(WIDTH, level_causal=True)
            self.linear = nn.Linear(WIDTH, WIDTH)
            for name, value in attributes.items():
                setattr(self, name, value)

        def forward(self, content, query=None, levels=None):
            return function(self, content, self.linear(query).expand(content.shape))

    return Network()


def base_of(backbone, length=6):
    return DiscreteFlow(AutoregressiveBase(Conditioner(4, length, Natural(), backbone)))


class TestPrecision:
    @pytest.mark.parametrize("network", NETWORKS)
    @pytest.mark.parametrize("length", [5, 64])
    def test_all_values_come_back_under_autocast(self, network, length):
        flow = random_flow(network, length)
        y = torch.randint(27, (32, length))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = flow.residuals(y)[-1]
            assert (x != y).any()
            # The values of a sample, in the way in which the flow draws one.
            flow.base.from_noise = lambda *_, **__: (x, 0)
            for method in ("levels", "fixed_point"):
                assert torch.equal(flow.sample((32,), length=length, method=method), y)
            with torch.no_grad(), exactly(y.device):
                assert torch.equal(Composition(flow.transforms)(x), y)

    @pytest.mark.parametrize("network", NETWORKS)
    def test_flows_are_certified_under_autocast(self, network):
        flow = random_flow(network, 16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            check_flow(flow, batch=torch.randint(27, (4, 16)), trained=True)
            check_flow(language_model(4, 6, partial(LSTM, WIDTH)), trained=True)

    def test_a_transform_by_itself_is_certified_in_the_precision_that_is_set(self):
        flow = random_flow("transformer")
        check_bijective(flow.transforms[0], trained=True)
        with (
            torch.autocast("cpu", dtype=torch.bfloat16),
            pytest.raises(CertificateError, match=r"no bijection in this precision.*32-true"),
        ):
            check_bijective(flow.transforms[0], trained=True)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("network", NETWORKS)
    def test_modules_of_half_precision_come_back_or_are_refused(self, network, dtype):
        flow = random_flow(network).to(dtype)
        y = torch.randint(27, (32, 64))
        with torch.no_grad():
            back = Composition(flow.transforms)(flow.residuals(y)[-1])
        alike = torch.equal(back, y)
        if network in ("lstm", "transformer"):
            assert not alike
        refused = pytest.raises(CertificateError, match="32-true or bf16-mixed")
        with nullcontext() if alike else refused:
            check_flow(flow, trained=True)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_likelihoods_of_half_precision_bases_are_those_of_float32(self, dtype):
        y = torch.randint(27, (8, 64))
        half = shaken(DiscreteFlow(FactorizedBase(27, 64))).to(dtype)
        value = half.log_prob(y)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, half.float().log_prob(y))
        model = shaken(autoregressive(27, 64, partial(LSTM, WIDTH)), scale=0.1).to(dtype).base
        value = model.log_prob(y)
        torch.testing.assert_close(value, model.float().log_prob(y))

    def test_the_head_of_a_half_precision_base_is_float32(self):
        model = shaken(language_model(27, 16, partial(LSTM, WIDTH)), scale=0.1).bfloat16()
        check_flow(model, trained=True)
        y, conditioner = torch.randint(27, (8, 16)), model.base.conditioner
        features = conditioner.features(y).float()
        logits = conditioner.head.float()(features)
        expected = logits.log_softmax(-1).gather(-1, y.unsqueeze(-1)).sum((1, 2))
        conditioner.head.bfloat16()
        torch.testing.assert_close(model.log_prob(y), expected)


class TestTrained:
    def test_a_gate_that_opens_a_leak_in_training_is_refused(self):
        gate = nn.Parameter(torch.tensor(0.0))
        flow = base_of(
            network_of(lambda self, c, q: q + (self.gate - 1).clamp(min=0) * c, gate=gate)
        )
        check_flow(flow, trained=True)
        with torch.no_grad():
            flow.base.conditioner.backbone.gate.fill_(2)
        with pytest.raises(CertificateError, match="leaks"):
            check_flow(flow, trained=True)

    def test_a_gate_of_a_buffer_is_seen_too(self):
        flow = base_of(network_of(lambda self, c, q: q + self.steps_done * c, steps_done=0.0))
        check_flow(flow, trained=True)
        flow.base.conditioner.backbone.steps_done = 1e-3
        with pytest.raises(CertificateError, match="leaks"):
            check_flow(flow)

    @pytest.mark.parametrize("part", ["features", "head", "base"])
    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_weights_that_are_not_finite_are_refused(self, part, value):
        flow = make_flow(3, 4, [Natural()], backbone="causal")
        conditioner = flow.transforms[0].conditioner
        parameter = {
            "features": conditioner.embedding.values,
            "head": conditioner.head.bias,
            "base": flow.base.logits,
        }[part]
        with torch.no_grad():
            parameter.fill_(value)
        message = {
            "features": "backbone Transformer over Natural.*not finite.*learning rate",
            "head": "head or the expert of backbone Transformer.*dimension 1.*learning rate",
            "base": "FactorizedBase was given logits",
        }[part]
        with pytest.raises(ValueError, match=message):
            check_flow(flow, trained=True)


class TestProbes:
    @pytest.mark.parametrize(
        ("leak", "options"),
        [
            (lambda _: torch.is_inference_mode_enabled(), {}),
            (lambda _: not torch.is_inference_mode_enabled(), {}),
            (lambda c: len(c) == 12, {"batch_size": 12, "trained": True}),
            (lambda c: c.shape[1] == 5, {}),
            (lambda c: c.shape[1] == 4, {}),
        ],
        ids=["inference", "no-grad", "batch-size", "shorter", "half"],
    )
    def test_a_leak_under_one_condition_alone_is_refused(self, leak, options):
        flow = base_of(network_of(lambda _, c, q: q + c if leak(c) else q + 0))
        with pytest.raises(CertificateError, match="leaks"):
            check_flow(flow, **options)

    def test_a_leak_of_some_values_alone_is_refused_on_data(self):
        rare = torch.full((3, 64), 26)

        def leaks(_, content, query):
            # Only where all values are the same.
            same = (content.std(dim=1, correction=0) < 1e-5).all(-1)[:, None, None]
            same = same & (content.shape[1] > 3)
            return query + content.roll(-1, 1) * same

        flow = DiscreteFlow(AutoregressiveBase(Conditioner(27, 64, Natural(), network_of(leaks))))
        check_flow(flow)
        with pytest.raises(CertificateError, match="leaks"):
            check_flow(flow, batch=rare)

    @pytest.mark.parametrize(
        "mix", [lambda h: h + h.cumsum(0), lambda h: h + h.flip(0).cumsum(0).flip(0)]
    )
    def test_examples_that_see_those_before_or_behind_are_refused(self, mix):
        network = network_of(lambda _, c, q: q + mix(c.mean(1, keepdim=True) * 0 + c[:, :1]) * 0)
        check_flow(base_of(network))
        plain = nn.Linear(WIDTH, WIDTH)

        class Mixing(nn.Module):
            def forward(self, h):
                return mix(plain(h))

        transform = make_transform(4, 6, Parity(), RankPermutation(4), Masked(Mixing(), WIDTH))
        with pytest.raises(CertificateError, match="mixes the examples"):
            check_causal(transform.conditioner)

    def test_batch_normalization_is_fine_with_running_statistics(self):
        class Normed(nn.Module):
            def __init__(self, running):
                super().__init__()
                self.norm = nn.BatchNorm1d(WIDTH, track_running_stats=running)

            def forward(self, h):
                return self.norm(h.mT).mT

        for running in (True, False):
            flow = bipartite(4, 6, lambda: Masked(Normed(running), WIDTH))  # noqa: B023
            with (
                nullcontext()
                if running
                else pytest.raises(CertificateError, match="must use its running statistics")
            ):
                check_flow(flow)
                check_flow(flow.train(), trained=True)
                assert flow.transforms[0].conditioner.backbone.network.norm.num_batches_tracked == 0

    def test_an_expert_that_sees_the_value_is_refused(self):
        class Knowing(Expert):
            def num_terms(self, levels):
                return 1

            def forward(self, y, levels, dimensions=None, *, num_terms):
                terms = torch.nn.functional.one_hot(y, 4).float().unsqueeze(-1)
                return terms if dimensions is None else terms[:, dimensions]

        for backbone in (LSTM(WIDTH), Masked(nn.Linear(WIDTH, WIDTH), WIDTH)):
            conditioner = Conditioner(4, 6, Natural(), backbone, expert=Knowing(4))
            with pytest.raises(CertificateError, match=r"expert Knowing over.*leaks"):
                check_flow(DiscreteFlow(AutoregressiveBase(conditioner)))

    def test_an_encoder_that_mixes_contexts_is_refused(self):
        class Mixing(nn.Module):
            def forward(self, context):
                return context - context.mean(0)

        flow = make_flow(3, 4, [Natural()], context=Context(2), encoder=Mixing())
        with pytest.raises(CertificateError, match="Mixing mixes the contexts"):
            check_flow(flow, torch.randn(4, 2))


class TestBase:
    @pytest.mark.parametrize("num_classes", [27, 68])
    @pytest.mark.parametrize("length", [1, 2, 3])
    @pytest.mark.parametrize("context", [None, torch.randn(2, 3)], ids=["alone", "context"])
    def test_a_base_must_be_normalized_on_short_events(self, num_classes, length, context):
        class Own(FactorizedBase):
            takes_context = True

            def log_prob(self, x, context=None):
                wrong = x.shape[1] == length or x.shape[1] > 3
                return super().log_prob(x, context) + 0.1 * wrong

        Own.takes_context = context is not None
        flow = DiscreteFlow(Own(num_classes, 64))
        with pytest.raises(CertificateError, match=f"of {length} dimensions.*base Own is not"):
            check_flow(flow, context)

    def test_a_language_model_in_half_precision_is_normalized(self):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            check_flow(shaken(language_model(27, 16, partial(Transformer, WIDTH, heads=2))))


def test_nothing_that_is_remembered_spoils_training():
    data = torch.randint(27, (4, 16))
    flows = [random_flow(network, 16) for network in NETWORKS]
    flows.append(shaken(stack(27, 16, [Natural()], partial(MADE, WIDTH, length=16))))
    for flow in flows:
        modes = [part.training for part in flow.modules()]
        with torch.inference_mode():
            check_flow(flow, batch=data, trained=True)
        assert [part.training for part in flow.modules()] == modes
        (-flow.log_prob(data).mean()).backward()
        assert all(parameter.grad is not None for parameter in flow.transforms.parameters())
