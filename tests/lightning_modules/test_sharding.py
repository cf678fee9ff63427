"""FSDP2: what is shared out over processes trains as what is whole."""

import pytest
import pytorch_lightning as pl
import torch
from torch.distributed.tensor import DTensor

from dflows.cli.noise import quiet
from dflows.errors import UserError
from lightning_modules import FullySharded
from lightning_modules.sharding import full, part_like, whole
from tests.lightning_modules.sharded import DRAWS, KINDS, fitted
from tests.processes import together
from tests.training import trainer

EXACT = {"precision": "64-true"}
TOLERANCE = {"64-true": 1e-10, "bf16-mixed": 1e-4, "16-mixed": 1e-4}


def compared(kinds, options):
    """What runs of some kinds find, by ddp and by fsdp."""
    quiet()
    return {
        kind: {strategy: fitted(kind, strategy, **options) for strategy in ("ddp", "fsdp")}
        for kind in kinds
    }


def assert_equal(found, expected, tolerance=1e-10):
    assert found["state"].keys() == expected["state"].keys()
    for name, value in expected["state"].items():
        torch.testing.assert_close(found["state"][name], value, rtol=tolerance, atol=tolerance)
    (groups, others) = (run["optimizer"]["param_groups"] for run in (found, expected))
    assert groups == others, "learning rates, too"
    states, others = (run["optimizer"]["state"] for run in (found, expected))
    assert states.keys() == others.keys()
    for key, state in others.items():
        for name, value in state.items():
            torch.testing.assert_close(states[key][name], value, rtol=tolerance, atol=tolerance)
    for part in ("logged", "tested"):
        assert found[part] == pytest.approx(expected[part], rel=max(tolerance, 1e-6))
    assert torch.equal(found["sample"], expected["sample"])


def assert_shared_out(runs, processes):
    for part in ("parameters", "optimizer"):
        alone = runs[0]["ddp"]["bytes"][part]
        held = [run["fsdp"]["bytes"][part] for run in runs]
        assert sum(held) == alone
        # Tensors are shared out by rows, which need not be a multiple.
        assert max(held) < 1.25 * alone / processes


def test_processes_train_as_one_does_and_hold_a_part_each(tmp_path):
    kinds = ["language model", "refitted base"]
    runs = together(compared, kinds, EXACT, folder=tmp_path)
    for kind in kinds:
        found = [run[kind] for run in runs]
        assert_equal(found[0]["fsdp"], found[0]["ddp"])
        assert_equal(
            found[1]["fsdp"] | {"optimizer": found[0]["fsdp"]["optimizer"]}, found[0]["ddp"]
        )
        assert_shared_out(found, 2)
    quiet()
    assert_equal(runs[0]["language model"]["fsdp"], fitted("language model", "auto", **EXACT))


@pytest.mark.slow
class TestEveryKind:
    @pytest.mark.parametrize("processes", [2, 3])
    def test_trains_as_one_process(self, tmp_path, processes):
        runs = together(compared, list(KINDS), EXACT, folder=tmp_path, processes=processes)
        quiet()
        for kind in KINDS:
            found = [run[kind] for run in runs]
            assert_equal(found[0]["fsdp"], found[0]["ddp"])
            if kind != "base alone":  # it has one row, which one process holds
                assert_shared_out(found, processes)
            if kind not in DRAWS:
                assert_equal(found[0]["fsdp"], fitted(kind, "auto", **EXACT))

    @pytest.mark.parametrize(
        "options",
        [
            {"accumulate_grad_batches": 2, **EXACT},
            {"gradient_clip_val": 0.001, "gradient_clip_algorithm": "value", **EXACT},
            {"precision": "bf16-mixed", "accumulate_grad_batches": 2},
            {"precision": "bf16-mixed", "gradient_clip_val": 0},
            {"precision": "16-mixed"},
        ],
        ids=lambda options: " ".join(map(str, options.values())),
    )
    def test_trains_as_by_ddp_under(self, tmp_path, options):
        kinds = ["end to end", "language model", "layerwise", "lanes"]
        first, _ = together(compared, kinds, options, folder=tmp_path)
        for kind in kinds:
            tolerance = TOLERANCE[options["precision"]]
            assert_equal(first[kind]["fsdp"], first[kind]["ddp"], tolerance)


def layer_by_layer(kind):
    """What a run finds that gathers layer by layer; and in each, which were whole as it ended."""
    quiet()
    whole_layers = []

    def watched():
        module = KINDS[kind]()
        layers = module.conditioner.backbone.blocks

        def look(layer, *_):
            if layer.training and torch.is_grad_enabled():
                first = [next(other.parameters()) for other in layers]
                whole_layers.append([not isinstance(value, DTensor) for value in first])

        for layer in layers:
            layer.register_forward_hook(look)
        return module

    KINDS["watched"] = watched
    return fitted("watched", FullySharded(blocks=True), **EXACT), whole_layers


@pytest.mark.slow
def test_layers_are_gathered_one_by_one(tmp_path):
    (found, layers), _ = together(layer_by_layer, "language model", folder=tmp_path)
    quiet()
    assert_equal(found, fitted("language model", "auto", **EXACT))
    assert layers[-3:] == torch.eye(3, dtype=torch.bool).tolist()


def skips_layers(kind):
    quiet()
    with pytest.raises(UserError, match="that it does not call: unset blocks"):
        fitted(kind, FullySharded(blocks=True), **EXACT)
    return True


@pytest.mark.slow
def test_layers_that_a_step_does_not_call_are_said(tmp_path):
    assert all(together(skips_layers, "masked layers", folder=tmp_path, processes=1))


WAITING = {"accumulate_grad_batches": 2, **EXACT}
"""After 5 batches gradients wait for those of the sixth."""


def stopped_and_resumed(folder):
    """What runs find that are resumed, by the strategies before and after."""
    quiet()
    runs = {}
    for first in ("ddp", "fsdp"):
        path = folder / f"{first}.ckpt"
        runs[first] = fitted("end to end", first, save=path, **WAITING)
        for second in ("ddp", "fsdp"):
            runs[first, second] = fitted("end to end", second, resume=path, **WAITING)
    return runs


@pytest.mark.slow
def test_a_checkpoint_goes_on_in_any_way(tmp_path):
    runs, _ = together(stopped_and_resumed, tmp_path, folder=tmp_path)
    for key in (key for key in runs if isinstance(key, tuple)):
        assert_equal(runs[key], runs[key[0]], 0.0 if key[0] == key[1] else 1e-10)


def resumed_together(path):
    quiet()
    saved = path.with_name("together.ckpt")
    return fitted("layerwise", "fsdp", save=saved, **WAITING), fitted(
        "layerwise", "fsdp", resume=path, **WAITING
    )


@pytest.mark.slow
def test_a_checkpoint_goes_on_in_another_number_of_processes(tmp_path):
    quiet()
    alone = tmp_path / "alone.ckpt"
    expected = fitted("layerwise", "auto", save=alone, **WAITING)
    (_, found), _ = together(resumed_together, alone, folder=tmp_path)
    assert_equal(found, expected)
    saved = tmp_path / "together.ckpt"
    assert_equal(fitted("layerwise", "auto", resume=saved, **WAITING), expected)


class TestRefused:
    @pytest.fixture
    def module(self, tmp_path):
        module = KINDS["language model"]()
        module._trainer = trainer(tmp_path, strategy=FullySharded())
        module.trainer.strategy.connect(module)
        return module

    @pytest.mark.parametrize("name", ["LearningRateFinder", "StochasticWeightAveraging"])
    def test_callbacks_that_know_of_no_parts(self, module, name):
        options = {"swa_lrs": 0.1} if name.startswith("Stochastic") else {}
        module.trainer.callbacks.append(getattr(pl.callbacks, name)(**options))
        with pytest.raises(UserError, match=f"and a {name} needs whole weights .*: leave it away"):
            module.trainer.strategy.configure_ddp()

    def test_a_parameter_of_a_single_number(self, module):
        module.temperature = torch.nn.Parameter(torch.tensor(1.0))
        with pytest.raises(UserError, match=r"temperature is a single number, .* a vector of one"):
            module.trainer.strategy.configure_ddp()


def test_what_is_whole_stays_so(tmp_path):
    module = KINDS["language model"]()
    weight = torch.rand(3, 2)
    assert full(weight) is weight
    assert torch.equal(part_like(weight, torch.nn.Parameter(weight)), weight)
    with whole(module):
        assert module.flow.base.log_prob(torch.zeros(2, 16, dtype=torch.long)).shape == (2, 16)
