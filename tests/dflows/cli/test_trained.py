"""One call in Python loads a checkpoint with its vocabulary, samples and scores."""

import math
import subprocess
import sys

import pytest
import torch

import dflows
from dflows.errors import UserError
from dflows.records import read_record
from lightning_modules import BaseModule, FlowModule, LanguageModel
from tests.commands import ODD, environment, finished_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def model(run):
    return dflows.load(run)


def test_samples_are_those_of_the_record(run, model):
    assert model.sample(4, seed=1) == read_record(run / "small-1.json").metrics["samples"]
    assert [len(text) for text in model.sample(2, length=40)] == [40, 40]
    assert model.sample_indices(3).shape == (3, 16)


def test_the_test_split_scores_as_in_the_record(run, model):
    text = (run.parents[2] / "odd.txt").read_bytes().decode("utf-8")
    expected = read_record(run / "small-1.json").metrics["test_bpc"]
    assert model.bits_per_character(text[-300:]) == pytest.approx(expected, rel=1e-6)


def test_each_text_has_a_likelihood_of_its_own(model):
    texts = [ODD[:5], ODD[:16], ODD[:16] + ODD[:5]]
    found = model.log_prob(texts)
    assert found.shape == (3,)
    assert found.dtype == torch.double
    assert found[2] == pytest.approx(float(found[0] + found[1]))
    assert model.log_prob(texts[0]) == pytest.approx(float(found[0]))
    rows = torch.stack([model.encode(texts[1])] * 2)
    assert torch.equal(model.log_prob(rows), found[1].expand(2))
    bits = -float(found.sum()) / math.log(2) / sum(map(len, texts))
    assert model.bits_per_character(texts) == pytest.approx(bits)


def test_its_parts_can_be_had(model):
    assert isinstance(model.module, FlowModule)
    assert model.flow is model.module.flow
    assert not model.module.training
    assert model.vocabulary.num_classes == model.flow.num_classes
    assert model.decode(model.encode("Ça").unsqueeze(0)) == ["Ça"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.log_prob("#"), "'#' (U+0023) is not among"),
        (lambda model: model.log_prob([]), "nothing to score"),
        (lambda model: model.log_prob(""), "nothing to score"),
        (lambda model: model.log_prob(ODD, torch.zeros(1, 2)), "leave context away"),
        (lambda model: model.sample(prompt=ODD[:3]), "cannot be conditioned on exactly"),
        (lambda model: model.sample(prompt=ODD[:3], length=2), "the prompt has 3 characters"),
    ],
)
def test_what_cannot_be_done_is_refused(model, call, message):
    with pytest.raises(UserError) as refused:
        call(model)
    assert message in str(refused.value)


@pytest.mark.parametrize("cls", [BaseModule, FlowModule])
def test_lightnings_own_call_loads_the_module(run, model, cls):
    found = cls.load_from_checkpoint(run / "best.ckpt")
    assert isinstance(found, FlowModule)
    assert found.training
    y = model.encode(ODD[:16]).unsqueeze(0)
    assert torch.equal(found.eval().log_prob(y), model.module.log_prob(y))


def test_lightnings_own_call_takes_a_flow_that_was_made_in_python(run, model):
    import copy

    flow = copy.deepcopy(model.flow)
    for parameter in flow.parameters():
        torch.nn.init.zeros_(parameter)
    found = FlowModule.load_from_checkpoint(run / "best.ckpt", flow=flow)
    assert found.flow is flow
    y = model.encode(ODD[:16]).unsqueeze(0)
    assert torch.equal(found.eval().log_prob(y), model.module.log_prob(y))


def test_the_wrong_class_is_named(run):
    with pytest.raises(UserError, match=r"holds a FlowModule, and a LanguageModel was asked for"):
        LanguageModel.load_from_checkpoint(run / "best.ckpt")


def test_foreign_packages_are_not_imported(run, tmp_path):
    content = torch.load(run / "best.ckpt", weights_only=True)
    content["dflows"]["config"]["model"]["class_path"] = "evil.Module"
    torch.save(content, tmp_path / "evil.ckpt")
    for load in (dflows.load, FlowModule.load_from_checkpoint):
        with pytest.raises(UserError, match=r"evil\.ckpt names the class evil\.Module"):
            load(tmp_path / "evil.ckpt")


def test_the_core_stays_light():
    code = (
        "import sys, dflows; print([m for m in sys.modules if m.startswith(('pytorch_l', 'rich'))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_a_text_comes_back_from_its_archive(model):
    text = ODD.encode() * 9 + b"\xff"
    archive = model.compress(text, batch_size=4)
    assert model.decompress(archive) == text
    with pytest.raises(UserError, match="damaged"):
        model.decompress(archive[:-1] + b"\0")


def test_a_text_is_scored_character_by_character(model):
    scored = model.score(ODD)
    assert scored.text == ODD
    assert scored.bits_per_character == pytest.approx(model.bits_per_character(ODD))
