"""Which devices have fast bfloat16: with both answers of every library call."""

import pytest
import torch

from dflows.precision import has_bfloat16


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
