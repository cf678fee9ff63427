"""Which devices have fast bfloat16, and a trainer with them: by both answers of all calls."""

import pytest
import torch

from dflows import precision
from dflows.precision import has_bfloat16, trainer_precision


def fake(monkeypatch, **capabilities):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"architecture": "x86_64", "amx_bf16": True, "avx512_bf16": True}, True),
        ({"architecture": "x86_64", "amx_bf16": False, "avx512_bf16": True}, False),
        ({"architecture": "arm64", "bf16": True}, False),
        ({}, False),
    ],
)
def test_a_processor_has_it_with_tiles(monkeypatch, capabilities, expected):
    fake(monkeypatch, **capabilities)
    assert has_bfloat16("cpu") is expected
    assert not has_bfloat16("mps")


def test_an_older_pytorch_says_nothing(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not has_bfloat16("cpu")


@pytest.mark.parametrize("expected", [True, False])
def test_a_gpu_has_it_where_it_is_not_emulated(monkeypatch, expected):
    fake(monkeypatch, amx_bf16=not expected)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: expected or including_emulation
    )
    assert has_bfloat16("cuda") is expected


@pytest.mark.parametrize("fast", [{"cpu"}, {"cuda"}, set()])
@pytest.mark.parametrize(
    ("accelerator", "found", "device_type"),
    [
        ("cpu", "cuda", "cpu"),
        ("cuda", None, "cuda"),
        ("auto", None, "cpu"),
        ("auto", "cuda", "cuda"),
        ("auto", "mps", "mps"),
        ("gpu", "cuda", "cuda"),
        (object(), "cuda", None),
    ],
)
def test_a_trainer_has_the_precision_of_its_device(
    monkeypatch, fast, accelerator, found, device_type
):
    monkeypatch.setattr(precision, "has_bfloat16", fast.__contains__)
    device = None if found is None else torch.device(found)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: device)
    expected = "bf16-mixed" if device_type in fast else "32-true"
    assert trainer_precision(accelerator) == expected
