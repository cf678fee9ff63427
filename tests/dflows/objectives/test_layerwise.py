"""Layerwise training: one transform after the other, as by the local objective."""

import pytest
import torch

from dflows import DiscreteFlow, FactorizedBase, PermutationTransform
from dflows.backbones import DilatedConvolution
from dflows.errors import UserError
from dflows.objectives import Layerwise, Local
from dflows.orderings import Natural, Parity, Strided
from tests.dflows.objectives.references import local_loss
from tests.dflows.small import (
    assert_gradients_close,
    expectation,
    gradients,
    make_flow,
    make_transform,
    prepared,
)

STACK = [Strided(columns=3), Natural(), Parity(first=1)]


@pytest.mark.parametrize("where", [0, 1, 3])
@pytest.mark.parametrize("bijection", ["affine", "rank"])
@pytest.mark.parametrize("backbone", ["causal", "masked"])
def test_one_transform_learns_as_by_the_local_objective_and_the_base(
    monkeypatch, where, bijection, backbone
):
    y = torch.randint(4, (6, 5))
    flow = make_flow(4, 5, STACK, bijection, backbone)
    stack = list(flow.transforms)
    stack.insert(where, PermutationTransform([2, 0, 3, 1, 4]))
    flow = DiscreteFlow(flow.base, stack)
    objective, whole = prepared(Layerwise(), flow), prepared(Local(), flow)
    (-whole(flow, y).mean()).backward()
    expected = {"flow": gradients(flow), "objective": gradients(whole)}
    for progress, number in ((0.0, 2), (0.3, 2), (0.34, 1), (0.7, 0), (1.0, 0)):

        def run(progress=progress):
            value = objective(flow, y, progress=progress)
            (-value.mean()).backward()
            own = {f"targets.{name[8:]}": grad for name, grad in gradients(objective).items()}
            return {"value": value.detach()} | gradients(flow) | own

        mean = expectation(monkeypatch, run)  # of a masked backbone a level is sampled
        torch.testing.assert_close(mean.pop("value"), flow.log_prob(y).detach())
        learning = flow.conditional_transforms[number]
        place = next(f"{n}." for n, part in flow.named_modules() if part is learning)
        learns = ("base", place, f"targets.{number}")
        for name, grad in mean.items():
            if name.startswith(learns):
                one = expected["objective" if name.startswith("targets") else "flow"][name]
                torch.testing.assert_close(grad, one, rtol=1e-4, atol=1e-6)
            else:
                assert not grad.any(), name  # and there: distributed training awaits it


def test_equal_parts_of_the_training():
    flow = make_flow(4, 5, STACK)
    objective = prepared(Layerwise(), flow)
    assert objective.num_stages(flow) == 3
    for progress, stage in ((0.0, 0), (0.33, 0), (1 / 3, 1), (0.34, 1), (2 / 3, 2), (1.0, 2)):
        assert objective.stage(flow, progress) == stage
        learning = flow.conditional_transforms[2 - stage]
        frozen = {id(parameter) for parameter in objective.frozen(flow, progress)}
        free = {
            id(parameter) for part in (learning, flow.base) for parameter in part.parameters()
        } | {id(objective.targets[str(2 - stage)])}
        everything = {id(p) for module in (flow, objective) for p in module.parameters()}
        assert frozen == everything - free


@pytest.mark.parametrize("steps", [3, 7, 30, 999])
def test_every_stage_has_its_steps(steps):
    flow = make_flow(4, 5, STACK)
    stages = [Layerwise().stage(flow, step / steps) for step in range(steps)]
    assert stages == sorted(stages)
    counts = [stages.count(stage) for stage in range(3)]
    assert max(counts) - min(counts) <= 1


def test_one_transform_alone_is_trained_as_ever():
    y = torch.randint(4, (6, 5))
    flow = make_flow(4, 5, [Natural()], backbone="causal")
    objective = prepared(Layerwise(), flow)
    (-objective(flow, y).mean()).backward()  # and needs no progress
    actual = gradients(flow)
    (-local_loss(flow, objective, y).mean()).backward()
    assert_gradients_close(actual, gradients(flow), rtol=1e-4, atol=1e-6)
    assert objective.num_stages(flow) == 1
    assert objective.frozen(flow, None) == []


def test_a_shared_backbone_is_refused():
    shared = DilatedConvolution(8)
    transforms = [make_transform(3, 4, Parity(), "rank", shared) for _ in range(2)]
    with pytest.raises(UserError, match=r"share a backbone.*train with Local"):
        Layerwise().prepare(DiscreteFlow(FactorizedBase(3, 4), transforms))
