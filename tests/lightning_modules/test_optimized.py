"""How a step is computed: each key of training against a loop that is written by hand."""

import copy
import warnings
from functools import partial
from itertools import islice

import pytest
import torch
from pytorch_lightning.plugins import MixedPrecision
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch._inductor.exc import InvalidCxxCompiler
from torch.amp import GradScaler

from datamodules import TextDataModule
from dflows import acceleration, flows
from dflows.backbones import LSTM, Transformer
from dflows.bases import FactorizedBase
from dflows.errors import NonFiniteError, UserError
from dflows.flow import DiscreteFlow
from dflows.orderings import Strided
from lightning_modules import FlowModule, Optimization
from tests.training import trainer

K, D, STEPS, RATE = 68, 8, 6, 0.01


def data(batch_size=4):
    return TextDataModule(length=D, batch_size=batch_size, max_eval_characters=16 * D)


TRANSFORMER = partial(Transformer, width=8, heads=2, layers=2)


def module(backbone=TRANSFORMER, **settings):
    torch.manual_seed(0)
    flow = flows.language_model(K, D, backbone, ordering=Strided(4))
    found = FlowModule(flow, optimization=Optimization(RATE, schedule="linear", **settings))
    found.initialised.fill_(True)  # what a fit begins with is what it is given
    return found


def scaler(scale):
    return GradScaler("cpu", init_scale=scale, growth_interval=3)


def mixed(scale):
    return MixedPrecision("16-mixed", "cpu", scaler(scale))


def by_hand(model, *, accumulate=1, clip=None, dtype=None, scale=None):
    """Trains for as many steps, as PyTorch's own examples do."""
    model = copy.deepcopy(model).to(torch.float64 if dtype == torch.float64 else torch.float32)
    model._done = 0.0
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.99), weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    scaling = scaler(scale or 1.0)
    batches = iter(data().train_dataloader())
    for _ in range(STEPS):
        for y in islice(batches, accumulate):
            half = dtype in (torch.bfloat16, torch.half)
            with torch.autocast("cpu", dtype if half else torch.half, enabled=half):
                loss = -model.evaluate_objective(y).mean() / D / accumulate
            (scaling.scale(loss) if scale else loss).backward()
        if scale:
            scaling.unscale_(optimizer)
        if clip is not None:
            clip(parameters)
        if scale:
            scaling.step(optimizer)
            scaling.update()
        else:
            optimizer.step()
        optimizer.zero_grad()
        with warnings.catch_warnings():  # PyTorch's, of a first step that is skipped
            warnings.simplefilter("ignore")
            schedule.step()
    return model, scaling


def norm(parameters):
    nn.utils.clip_grad_norm_(parameters, 0.05)


def value(parameters):
    nn.utils.clip_grad_value_(parameters, 0.002)


BY_VALUE = {"gradient_clip_val": 0.002, "gradient_clip_algorithm": "value"}
KEYS = {
    "plain": ({}, {}),
    "accumulated": ({"accumulate_grad_batches": 3}, {"accumulate": 3}),
    "clipped by norm": ({"gradient_clip_val": 0.05}, {"clip": norm}),
    "clipped by value": (BY_VALUE, {"clip": value}),
    "bf16-mixed": ({"precision": "bf16-mixed"}, {"dtype": torch.bfloat16}),
    "bf16-mixed, clipped by value": (
        {"precision": "bf16-mixed", **BY_VALUE},
        {"dtype": torch.bfloat16, "clip": value},
    ),
    "64-true": ({"precision": "64-true"}, {"dtype": torch.float64}),
    "16-mixed": ({}, {"dtype": torch.half, "scale": 2.0**10}),
    # The scale is too large at first: the steps are skipped until it is not.
    "16-mixed, skipping": ({}, {"dtype": torch.half, "scale": 2.0**17}),
    "16-mixed, skipping, clipped by norm": (
        {"gradient_clip_val": 0.05},
        {"dtype": torch.half, "scale": 2.0**17, "clip": norm},
    ),
}


@pytest.mark.parametrize("name", KEYS)
def test_a_key_does_what_a_loop_by_hand_does(name, tmp_path):
    options, how = KEYS[name]
    model = module()
    untrained = copy.deepcopy(model)
    plugins = [mixed(how["scale"])] if "scale" in how else None
    run = trainer(tmp_path, STEPS, limit_val_batches=0, plugins=plugins, **options)
    run.fit(model, datamodule=data())
    expected, scaling = by_hand(untrained, **how)
    assert run.global_step == STEPS
    before = dict(untrained.named_parameters())
    for (key, weight), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(weight, before[key].to(weight), rtol=1e-3), key
    if "scale" in how:
        found = run.precision_plugin.scaler.state_dict()
        assert found == scaling.state_dict()
        assert ("skipping" in name) == (found["scale"] < how["scale"])


def test_a_training_in_float16_that_diverged_ends(tmp_path):
    model = module()
    parameter = next(model.parameters())
    parameter.register_hook(lambda gradient: gradient * float("nan"))
    run = trainer(tmp_path, 40, limit_val_batches=0, plugins=mixed(2.0**10))
    with pytest.raises(NonFiniteError, match="a gradient at step 10 is not finite"):
        run.fit(model, datamodule=data())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
class TestCompile:
    """What dynamo makes of backbones, and autograd of that, run without a compiler behind it."""

    @pytest.fixture
    def compiled(self, monkeypatch):
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return aot_eager(graph, inputs)

        monkeypatch.setattr(acceleration, "BACKEND", backend)
        return graphs

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_a_step_is_the_same(self, compiled, checkpointing, tmp_path):
        states = []
        for wanted in (False, True):
            model = module(compile=wanted, gradient_checkpointing=wanted and checkpointing)
            run = trainer(tmp_path, 3, limit_val_batches=1)
            run.fit(model, datamodule=data())
            number = len(compiled)
            assert (number > 0) == wanted
            run.test(model, datamodule=data(), verbose=False)
            assert len(compiled) == number  # what is judged is not compiled
            states.append(model.state_dict())
        assert states[0].keys() == states[1].keys()
        for name, weight in states[0].items():
            torch.testing.assert_close(states[1][name], weight, rtol=1e-4, atol=1e-5, msg=name)

    @pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
    def test_without_a_compiler_a_line_tells(self, monkeypatch, tmp_path):
        def backend(graph, inputs):
            raise InvalidCxxCompiler

        monkeypatch.setattr(acceleration, "BACKEND", backend)
        run = trainer(tmp_path, STEPS, limit_val_batches=0)
        with pytest.raises(
            UserError, match=r"compile is set, and there is no compiler \(No working"
        ):
            run.fit(module(compile=True), datamodule=data())


def alone():
    return FlowModule(DiscreteFlow(FactorizedBase(K, D)), optimization=Optimization(compile=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (alone, "compile is set, and the model has no backbone"),
        (
            lambda: module(partial(LSTM, width=8), gradient_checkpointing=True),
            r"gradient_checkpointing is set, and no backbone .* computed again \(LSTM\): leave it",
        ),
    ],
)
def test_what_would_do_nothing_is_refused(make, message, tmp_path):
    with pytest.raises(UserError, match=message):
        trainer(tmp_path, STEPS).fit(make(), datamodule=data())
