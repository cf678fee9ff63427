from functools import partial

import pytest
import torch

from dflows import flows
from dflows.backbones import LSTM, LevelConvolution
from dflows.errors import UserError
from dflows.objectives import SampledPasses
from dflows.orderings import Strided

LENGTH = 12


def lanes(backbone=LSTM, **options):
    torch.manual_seed(0)
    network = partial(backbone, width=8, **options)
    return flows.language_model(3, LENGTH, network, ordering=Strided(4))


def test_each_evaluation_is_the_likelihood_in_one_of_the_numbers_of_passes():
    flow, y = lanes(ahead=2), torch.randint(3, (5, LENGTH))
    objective = SampledPasses([3, 4, 4, 12])
    objective.prepare(flow)
    assert objective.choices == [3, 4, 12]
    expected = {passes: flow.with_passes(passes).log_prob(y) for passes in objective.choices}
    counts = dict.fromkeys(expected, 0)
    for _ in range(400):
        value = objective(flow, y)
        found = [passes for passes in expected if torch.allclose(value, expected[passes])]
        assert len(found) == 1
        counts[found[0]] += 1
    # One that is given twice is sampled twice as often.
    assert counts[4] > 150 > max(counts[3], counts[12]) > 60


def test_its_gradient_is_that_of_the_likelihood():
    flow, y = lanes(ahead=2), torch.randint(3, (5, LENGTH))
    SampledPasses([6])(flow, y).sum().backward()
    found = [parameter.grad for parameter in flow.parameters()]
    flow.zero_grad()
    flow.with_passes(6).log_prob(y).sum().backward()
    for one, parameter in zip(found, flow.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad)


@pytest.mark.parametrize(
    ("flow", "passes", "message"),
    [
        (lanes(), [], "passes is empty"),
        (lanes(), [4, 13], "13 levels were asked for: give 1 to 12"),
        (lanes(LevelConvolution), [4, 6], "an embedding for each of 4 levels, and 6"),
        (flows.strided(3, LENGTH, 4), [4], "4 passes were asked for, and a base is fitted"),
        (flows.bipartite(3, LENGTH), [1], "1 passes were asked for"),
    ],
)
def test_what_cannot_be_trained_is_refused(flow, passes, message):
    with pytest.raises(UserError, match=message):
        SampledPasses(passes).prepare(flow)
