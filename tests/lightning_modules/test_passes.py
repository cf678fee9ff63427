"""One network in several numbers of passes: its curve, its certificates, and the choice."""

import math
from functools import partial

import pytest
import torch

from dflows import flows
from dflows.backbones import LSTM
from dflows.checks import CertificateError
from dflows.errors import UserError
from dflows.objectives import SampledPasses
from dflows.orderings import Strided
from lightning_modules import FlowModule, LatentFlowModule
from tests.training import trainer

PASSES = [2, 4, 8]


def lanes(text, backbone=LSTM):
    torch.manual_seed(0)
    network = partial(backbone, width=8, ahead=2)
    flow = flows.language_model(text.num_classes, text.length, network, ordering=Strided(4))
    return FlowModule(flow, SampledPasses(PASSES))


def test_testing_scores_every_number_of_passes(text, tmp_path):
    module = lanes(text)
    run = trainer(tmp_path, steps=3)
    run.fit(module, datamodule=text)
    (result,) = run.test(module, datamodule=text, verbose=False)
    curve = module.report_structure().metrics["passes_bpc"]
    assert [*curve] == ["2", "4", "8"]
    assert curve["4"] == pytest.approx(result["test_bpc"], rel=1e-6)
    total = count = 0
    for y in text.test_dataloader():
        total -= module.flow.with_passes(2).log_prob(y).detach().sum().item()
        count += y.numel()
    assert curve["2"] == pytest.approx(total / count / math.log(2), rel=1e-6)
    seconds = module.report_generation(text.length).metrics["passes_seconds_1"]
    assert [*seconds] == ["2", "4", "8"]
    assert all(value > 0 for value in seconds.values())


def test_resized_it_is_scored_in_other_passes(text, tmp_path):
    module = lanes(text)
    trainer(tmp_path, steps=1).fit(module, datamodule=text)
    (before,) = trainer(tmp_path).test(module, datamodule=text, verbose=False)
    curve = module.report_structure().metrics["passes_bpc"]
    module.resize(passes=8)
    assert module.passes == 8
    (after,) = trainer(tmp_path).test(module, datamodule=text, verbose=False)
    assert after["test_bpc"] == pytest.approx(curve["8"], rel=1e-6) != before["test_bpc"]
    assert len(module.level_bpc) == 8
    module.resize(length=3 * text.length, passes=2)
    assert module.sample(2).shape == (2, 3 * text.length)
    assert module.evaluations == 2


class Leaking(LSTM):
    """Sees its own content where whole events have two levels."""

    def forward(self, content, query=None, levels=None):
        features = super().forward(content, query, levels)
        leaks = len(levels) > 8 and int(levels.max()) == 1
        return features + content if leaks else features


def test_every_number_of_passes_is_certified(text, tmp_path):
    module = lanes(text, Leaking)
    with pytest.raises(CertificateError, match=r"Strided\(columns=2\)"):
        trainer(tmp_path).fit(module, datamodule=text)


def test_a_model_without_a_choice_refuses_it(text):
    network = partial(LSTM, width=4)
    module = FlowModule(flows.stack(3, 8, [Strided(4)], network))
    with pytest.raises(UserError, match="2 passes were asked for, and a base is fitted to"):
        module.resize(passes=2)
    with pytest.raises(UserError, match="length is 9, and a LatentFlowModule leaves no choice"):
        LatentFlowModule.resize(LatentFlowModule.__new__(LatentFlowModule), length=9)
