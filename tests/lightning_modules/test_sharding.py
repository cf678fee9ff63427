"""FSDP2: what is shared out over processes trains as what is whole."""

import pytest
import torch

from dflows.cli.noise import quiet
from dflows.errors import UserError
from lightning_modules import FullySharded
from lightning_modules.sharding import full, part_like, whole
from tests.lightning_modules.sharded import DRAWS, KINDS, fitted
from tests.processes import together

EXACT = {"precision": "64-true"}
TOLERANCE = {"64-true": 1e-10, "bf16-mixed": 1e-4}


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
        assert_equal(found[1]["fsdp"] | {"optimizer": found[0]["fsdp"]["optimizer"]}, found[0]["ddp"])
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
    """What a run finds whose layers are gathered one by one, and which layers were whole."""
    quiet()
    seen = []

    def look(module):
        for layer in module.conditioner.backbone.blocks:
            layer.register_forward_hook(
                lambda layer, *_: seen.append(
                    [
                        not hasattr(next(other.parameters()), "full_tensor")
                        for other in module.conditioner.backbone.blocks
                    ]
                )
            )
        return module

    plain = KINDS[kind]
    KINDS["watched"] = lambda: look(plain())
    return fitted("watched", FullySharded(blocks=True), **EXACT), seen[-3:]


@pytest.mark.slow
def test_layers_are_gathered_one_by_one(tmp_path):
    (found, seen), _ = together(layer_by_layer, "language model", folder=tmp_path)
    quiet()
    assert_equal(found, fitted("language model", "auto", **EXACT))
    assert seen
