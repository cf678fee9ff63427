import torch
from torch import nn

from dflows.views import view


def test_a_view_shares_parameters_and_has_its_own_parts():
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    part = nn.Linear(3, 1)
    other = view(module, **{"1": part}, note=5)
    assert other[0] is module[0]
    assert other[1] is part
    assert module[1] is not part
    assert other.note == 5
    assert not hasattr(module, "note")
    other(torch.ones(1, 2)).sum().backward()
    assert module[0].weight.grad is not None
    assert module[1].weight.grad is None
