import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dflows.codec.tables import AT_ONCE, ComputedOtherwise, Decoder, Encoder, frequencies, uniform
from dflows.errors import NonFiniteError

TOTAL = 1 << 24


@given(
    num_classes=st.sampled_from([2, 3, 7, 50, 256, 5000]),
    scale=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float, torch.double]),
    seed=st.integers(0, 1000),
)
def test_frequencies_are_positive_and_sum_to_a_power_of_two(num_classes, scale, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(4, num_classes, generator=generator)).clamp(-6e4, 6e4).to(dtype)
    found = frequencies(logits)
    assert found.dtype == torch.long
    assert (found >= 1).all()
    assert (found.sum(-1) == TOTAL).all()
    # As near to the probabilities as integers are; the likeliest class takes what is left.
    probs = logits.double().softmax(-1)
    excess = (found - TOTAL * probs).abs()
    others = excess.scatter(-1, found.argmax(-1, keepdim=True), 0)
    assert (others <= 1 + num_classes * probs).all()
    assert (excess <= 2 * num_classes).all()


def test_a_class_of_no_probability_can_be_coded():
    logits = torch.tensor([[0.0, -torch.inf, 0.0]])
    assert frequencies(logits).tolist() == [[TOTAL // 2, 1, TOTAL // 2 - 1]]
    encoder = Encoder()
    encoder.encode(torch.tensor([1]), logits)
    assert Decoder(encoder.payload()).decode(logits).tolist() == [1]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_distribution_is_refused(bad):
    with pytest.raises(NonFiniteError, match="no finite logits"):
        frequencies(torch.full((2, 3), bad))


@pytest.mark.parametrize("num_classes", [2, 3, 50, 1000])
def test_values_come_back_and_take_their_code_length(num_classes):
    logits = 3 * torch.randn(40, 50, num_classes)
    values = torch.distributions.Categorical(logits=logits).sample()
    bits = -logits.log_softmax(-1).gather(-1, values.unsqueeze(-1)).sum().item() / math.log(2)
    encoder = Encoder()
    for part, given_logits in zip(values.split(9), logits.split(9), strict=True):
        encoder.encode(part, given_logits)
    payload = encoder.payload()
    assert bits <= 8 * len(payload) <= bits * 1.001 + 96
    decoder = Decoder(payload)
    decoded = [decoder.decode(given_logits) for given_logits in logits.split(9)]
    assert torch.equal(torch.cat(decoded), values)


def test_many_distributions_are_tabulated_in_parts():
    number = 2 * AT_ONCE // 4 + 3
    values = torch.randint(4, (1, number))
    encoder = Encoder()
    encoder.encode(values, uniform(1, number, 4))
    assert torch.equal(Decoder(encoder.payload()).decode(uniform(1, number, 4)), values)


def test_other_logits_give_other_values_or_are_noticed():
    logits = torch.randn(100, 5)
    values = torch.randint(5, (100,))
    encoder = Encoder()
    encoder.encode(values, logits)
    try:
        decoded = Decoder(encoder.payload()).decode(logits.flip(-1))
    except ComputedOtherwise:
        return
    assert not torch.equal(decoded, values)


def test_what_cannot_have_been_encoded_is_noticed():
    likely = torch.tensor([[20.0, -20.0]]).expand(100, 2)
    decoder = Decoder(b"\xff" * 64)
    with pytest.raises(ComputedOtherwise):
        decoder.decode(likely)


def test_nothing_takes_nothing():
    encoder = Encoder()
    encoder.encode(torch.zeros(0, 3, dtype=torch.long), torch.zeros(0, 3, 4))
    assert Decoder(encoder.payload()).decode(torch.zeros(0, 3, 4)).shape == (0, 3)
