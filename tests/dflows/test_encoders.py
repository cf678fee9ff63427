import pytest
import torch
from torch import nn

from dflows.conditioner import Context
from dflows.encoders import SequenceEncoder
from dflows.errors import UserError
from tests.dflows.small import make_flow, shaken

K, C, S = 5, 6, 4


def make(**options):
    torch.manual_seed(0)
    return shaken(SequenceEncoder(K, C, **options))


def seen(encoder, sequences):
    """Which features (position, of entry) move with the entry of a sequence (sequences, S)."""
    context = torch.randint(K, (3, sequences, S))
    features = encoder(context)
    moved = torch.zeros(sequences, S, S, dtype=torch.bool)
    for sequence in range(sequences):
        for entry in range(S):
            other = context.clone()
            other[:, sequence, entry] = (other[:, sequence, entry] + 1) % K
            moved[sequence, entry] = (encoder(other) - features).abs().amax((0, 2)) > 1e-6
    return moved


@pytest.mark.parametrize("sequences", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"hidden": 7, "layers": 2}], ids=str)
def test_a_position_knows_all_sequences_up_to_there(sequences, options):
    moved = seen(make(sequences=sequences, **options), sequences)
    assert torch.equal(moved, torch.ones(S, S).triu().bool().expand(sequences, -1, -1))


def test_both_ways_a_position_knows_everything():
    assert seen(make(bidirectional=True), 2).all()


def test_sequences_are_read_apart_and_told_apart():
    encoder, context = make(), torch.randint(K, (3, 2, S))
    assert encoder(context).shape == (3, S, C)
    assert not torch.allclose(encoder(context.flip(1)), encoder(context))
    torch.testing.assert_close(encoder(context[1:2]), encoder(context)[1:2])


def test_every_parameter_gets_a_gradient():
    encoder = make(bidirectional=True)
    encoder(torch.arange(K).expand(2, 2, -1)).square().sum().backward()
    assert all(parameter.grad.any() for parameter in encoder.parameters())


@pytest.mark.parametrize("aligned", [False, True])
def test_a_flow_is_conditioned_on_what_it_encodes(aligned):
    encoder: nn.Module = SequenceEncoder(K, 2, bidirectional=True)
    flow = make_flow(3, 4, encoder=encoder, context=Context(2, aligned=aligned))
    context = torch.randint(K, (6, 2, 4))
    y = torch.randint(3, (6, 4))
    flow.log_prob(y, context).sum().backward()
    assert encoder.embedding.weight.grad.any()
    assert flow.sample((2,), context).shape == (2, 6, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    encoder, context = make(), torch.randint(K, (3, 2, S))
    with torch.autocast("cpu", dtype):
        features = encoder(context)
    features.float().sum().backward()
    assert all(parameter.grad.any() for parameter in encoder.parameters())
    torch.testing.assert_close(features.float(), encoder(context), rtol=0.1, atol=0.1)


def test_errors():
    encoder = make()
    with pytest.raises(UserError, match=r"give 2 sequences an example, \(batch, 2, length\)"):
        encoder(torch.zeros(3, S, dtype=torch.long))
    with pytest.raises(UserError, match="give 2 sequences"):
        encoder(torch.zeros(3, S, 2, dtype=torch.long))
    with pytest.raises(UserError, match=r"holds torch\.float32: give classes"):
        encoder(torch.zeros(3, 2, S))
    with pytest.raises(UserError, match=r"class 5, outside of 0\.\.4"):
        encoder(torch.full((3, 2, S), K))
    with pytest.raises(UserError, match="features is 0: give at least 1"):
        SequenceEncoder(K, 0)
