"""Heads: one for all dimensions, or one for each, in full precision."""

import pytest
import torch

from dflows.heads import Head, HeadPerDimension


def test_every_dimension_has_its_own_map():
    head = HeadPerDimension(length=4, width=3, num_logits=5)
    features, dimensions = torch.randn(2, 3, 3), torch.tensor([3, 0, 2])
    found = head(features, dimensions)
    for place, dimension in enumerate(dimensions.tolist()):
        expected = features[:, place] @ head.weight[dimension].T + head.bias[dimension]
        torch.testing.assert_close(found[:, place], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_logits_are_in_full_precision(dtype):
    own, alike = HeadPerDimension(2, 3, 4).to(dtype), Head(3, 4).to(dtype)
    features = torch.randn(5, 2, 3, dtype=dtype)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert own(features, torch.arange(2)).dtype == alike(features).dtype == expected
