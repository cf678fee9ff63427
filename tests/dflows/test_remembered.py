"""What was worked out once, and when it is worked out again."""

import torch

from dflows.remembered import MOST_REMEMBERED, Remembered


def counting():
    calls = []

    def function(levels):
        calls.append(levels)
        return levels * 1.0

    return Remembered(function), calls


def test_the_same_tensor_is_worked_out_once():
    remembered, calls = counting()
    levels = torch.arange(3)
    assert remembered(levels) is remembered(levels)
    assert len(calls) == 1
    assert remembered(torch.arange(3)) is not remembered(levels)
    assert len(calls) == 2


def test_a_changed_tensor_is_worked_out_again():
    remembered, calls = counting()
    levels = torch.arange(3)
    remembered(levels)
    levels[0] = 5
    assert remembered(levels)[0] == 5
    assert len(calls) == 2


def test_the_oldest_are_forgotten():
    remembered, calls = counting()
    many = [torch.arange(3) for _ in range(MOST_REMEMBERED + 1)]
    for levels in many:
        remembered(levels)
    remembered(many[-1])
    assert len(calls) == MOST_REMEMBERED + 1
    remembered(many[0])
    assert len(calls) == MOST_REMEMBERED + 2


def test_inference_leaves_what_can_be_trained_with():
    remembered, calls = counting()
    weight = torch.ones(3, requires_grad=True)
    with torch.inference_mode():
        assert not remembered(torch.arange(3)).is_inference()
    levels = torch.arange(3)
    with torch.inference_mode():
        remembered(levels)
    (remembered(levels) * weight).sum().backward()
    assert len(calls) == 2
