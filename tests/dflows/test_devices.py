"""The same values on every device: on a GPU where there is one, else on the CPU.

`python -m experiments.hardware` runs these tests, and all others with the marker `device`.
"""

from functools import partial

import pytest
import torch

from datamodules import TextDataModule
from dflows import flows
from dflows.backbones import LSTM, LevelConvolution, Transformer
from dflows.objectives import EndToEnd, Local, SampledPasses
from dflows.orderings import Parity, Strided
from lightning_modules import FlowModule
from tests.dflows.small import make_flow, shaken
from tests.training import trainer

pytestmark = pytest.mark.device

CLASSES, LENGTH, NUMBER = 7, 32, 24
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def language_model(backbone, passes=8):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flow = flows.language_model(CLASSES, LENGTH, backbone, ordering=Strided(passes))
    return shaken(flow, scale=0.1).eval()


def transforms(backbone, bijection):
    orderings = (Parity(), Strided(4))
    return make_flow(CLASSES, LENGTH, orderings, bijection, backbone).eval()


LANES = {
    "lstm over lanes": partial(LSTM, width=16, layers=2, ahead=4),
    "transformer over lanes": partial(Transformer, width=16, heads=2, positions="lanes"),
}
FLOWS = {
    **{name: partial(language_model, backbone) for name, backbone in LANES.items()},
    "levels": partial(language_model, partial(LevelConvolution, width=16)),
    "rank flow": partial(transforms, "causal", "rank"),
    "masked rank flow": partial(transforms, "masked", "rank"),
    "affine flow": partial(transforms, "causal-convolution", "affine"),
}
every = pytest.mark.parametrize("name", FLOWS)
over_lanes = pytest.mark.parametrize("name", LANES)


@pytest.fixture
def draw(monkeypatch):
    """Draws from flows on any device with the same noise: generators of devices differ."""

    def draw(flow, seed=0, number=NUMBER):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.rand(number, flow.length, generator=generator)

        def drawn(base, *_):
            return noise.to(next(base.parameters()).device)

        monkeypatch.setattr(type(flow.base), "noise", drawn)
        return flow.sample((number,)).cpu()

    return draw


def moved(name, dtype):
    """A flow on the CPU and the same on the device."""
    return FLOWS[name]().to(dtype), FLOWS[name]().to(dtype).to(DEVICE)


# In float32 a number may fall between two classes that are as near as round-off.
precisions = pytest.mark.parametrize(("dtype", "share"), [(torch.double, 1), (torch.float, 0.9)])


@every
@precisions
def test_samples_are_those_of_the_cpu(name, dtype, share, draw):
    here, there = moved(name, dtype)
    samples = draw(here)
    assert len(samples.unique(dim=0)) > NUMBER / 2
    assert (draw(there) == samples).all(dim=-1).double().mean() >= share


@every
@precisions
@torch.no_grad()
def test_likelihoods_are_those_of_the_cpu(name, dtype, share):
    here, there = moved(name, dtype)
    y = torch.randint(CLASSES, (NUMBER, LENGTH))
    expected, found = here.log_prob(y), there.log_prob(y.to(DEVICE)).cpu()
    close = 1e-8 if dtype == torch.double else 1e-3
    assert ((found - expected).abs() < close).double().mean() >= share


@over_lanes
@pytest.mark.parametrize("passes", [1, 3, 16, LENGTH])
def test_in_every_number_of_passes_too(name, passes, draw):
    here, there = (flow.with_passes(passes) for flow in moved(name, torch.double))
    samples = draw(here)
    assert torch.equal(draw(there), samples)
    with torch.no_grad():
        found = there.log_prob(samples.to(DEVICE)).cpu()
        torch.testing.assert_close(found, here.log_prob(samples))


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.half, marks=NEEDS_CUDA)])
def test_a_step_in_half_precision_is_finite_and_near_one_in_full(name, dtype):
    flow = FLOWS[name]().to(DEVICE).train()
    y = torch.randint(CLASSES, (NUMBER, LENGTH), device=DEVICE)
    objective = Local() if len(flow.transforms) else EndToEnd()
    objective.prepare(flow)
    optimizer = torch.optim.SGD(flow.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=64, enabled=dtype == torch.half)
    exact = -objective(flow, y, progress=0.0).mean()
    with torch.autocast(DEVICE.type, dtype):
        loss = -objective(flow, y, progress=0.0).mean()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.testing.assert_close(loss.float(), exact, rtol=0.1, atol=0.1)
    learned = [parameter.grad for parameter in flow.parameters() if parameter.grad is not None]
    assert learned
    assert all(gradient.isfinite().all() for gradient in learned)
    scaler.step(optimizer)
    flow.eval()
    with torch.no_grad():
        likelihood = flow.log_prob(y)
        with torch.autocast(DEVICE.type, dtype):
            assert torch.equal(flow.log_prob(y), likelihood)
    assert likelihood.isfinite().all()


@over_lanes
@pytest.mark.parametrize("precision", ["bf16-mixed", pytest.param("16-mixed", marks=NEEDS_CUDA)])
def test_a_fit_in_half_precision_scores_in_full(name, precision, tmp_path):
    data = TextDataModule(length=LENGTH, batch_size=4, max_eval_characters=2 * LENGTH)
    flow = flows.language_model(data.num_classes, LENGTH, LANES[name], ordering=Strided(8))
    module = FlowModule(flow, SampledPasses([4, 8, LENGTH]))
    accelerator = "gpu" if DEVICE.type == "cuda" else "cpu"
    options = {"accelerator": accelerator, "devices": 1, "precision": precision}
    run = trainer(tmp_path, steps=3, **options)
    run.fit(module, datamodule=data)
    (result,) = run.test(module, datamodule=data, verbose=False)
    (y,) = data.test_dataloader()
    with torch.no_grad():
        exact = -module.flow.cpu().double().log_prob(y).sum() / y.numel()
    assert result["test_bpc"] == pytest.approx(float(exact / torch.tensor(2.0).log()), rel=1e-4)


@over_lanes
def test_a_view_has_graphs_of_its_own(name):
    flow = FLOWS[name]()
    flow.accelerate(cuda_graph=True)
    flow._acceleration._graphs["a key"] = None
    for view in (flow.with_passes(4), flow.with_length(2 * LENGTH)):
        assert view._acceleration.cuda_graph
        assert not view._acceleration._graphs
    assert flow._acceleration._graphs


@over_lanes
@NEEDS_CUDA
def test_a_view_replays_no_graph_of_another_ordering(name, draw):
    flow = FLOWS[name]().cuda()
    choices = (8, 4, LENGTH)
    plain = {passes: draw(flow.with_passes(passes)) for passes in choices}
    longer = draw(flow.with_length(2 * LENGTH))
    flow.accelerate(cuda_graph=True)
    views = {passes: flow.with_passes(passes) for passes in choices}
    for _ in range(2):
        assert torch.equal(draw(flow), plain[8])
        for passes, view in views.items():
            assert torch.equal(draw(view), plain[passes])
        assert torch.equal(draw(flow.with_length(2 * LENGTH)), longer)
