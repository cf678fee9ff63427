"""From noise to samples: what each part is handed, and which options are refused."""

import pytest
import torch

from dflows.acceleration import Acceleration
from dflows.bases import FactorizedBase
from dflows.errors import UserError
from dflows.generation import check_sampling, expand_prompt, generate
from dflows.orderings import Natural, Parity, Strided
from dflows.transforms import PermutationTransform
from tests.dflows.small import make_flow, shaken

CLASSES, LENGTH = 3, 4


@pytest.mark.parametrize(
    ("temperature", "method", "message"),
    [
        (0, "levels", "temperature is 0: give a positive number"),
        (float("nan"), "levels", "temperature is nan"),
        (float("inf"), "levels", "temperature is inf"),
        (1.0, "guess", "method is 'guess': give 'levels' or 'fixed_point'"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(temperature, method, message):
    with pytest.raises(UserError, match=message):
        check_sampling(temperature, method, Acceleration())


def test_a_graph_cannot_look_whether_values_have_settled():
    check_sampling(1.0, "levels", Acceleration(cuda_graph=True))
    check_sampling(1.0, "fixed_point", Acceleration(compile=True))
    with pytest.raises(UserError, match="use method 'levels', or unset cuda_graph"):
        check_sampling(1.0, "fixed_point", Acceleration(cuda_graph=True))


class TestPrompt:
    parts = (FactorizedBase(CLASSES, LENGTH),)

    @pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,)])
    def test_it_is_repeated_for_every_sample(self, shape):
        shape, prompt = torch.Size(shape), torch.tensor([2, 1])
        expanded = expand_prompt(prompt, shape, LENGTH, self.parts)
        assert torch.equal(expanded, prompt.expand(shape.numel(), 2))
        own = torch.randint(CLASSES, (*shape, 2))
        assert torch.equal(expand_prompt(own, shape, LENGTH, self.parts), own.reshape(-1, 2))

    def test_every_part_must_support_it(self):
        parts = [*self.parts, *make_flow(CLASSES, LENGTH, [Natural(), Parity()]).transforms]
        prompt = torch.tensor([2, 1])
        with pytest.raises(UserError, match=r"ConditionalTransform over Parity\(first=0\) they"):
            expand_prompt(prompt, torch.Size((2,)), LENGTH, parts)
        expand_prompt(prompt, torch.Size((2,)), LENGTH, parts[:2])


class TestGenerate:
    @pytest.mark.parametrize("fixed_point", [False, True])
    def test_parts_work_one_after_the_other(self, fixed_point):
        flow = make_flow(CLASSES, LENGTH, [Natural(), Strided(columns=3)], "rank")
        transforms = [flow.transforms[0], PermutationTransform([1, 0, 3, 2]), flow.transforms[1]]
        noise = flow.base.noise(50, LENGTH)
        with torch.no_grad():
            value, evaluations = generate(
                flow.base, transforms, noise, None, None, temperature=0.7, fixed_point=fixed_point
            )
            expected = flow.base.from_noise(noise, temperature=0.7)[0]
            for transform in transforms:
                expected = transform(expected)
        assert torch.equal(value, expected)
        assert len(evaluations) == 4
        assert evaluations[0] == evaluations[2] == 0
        if fixed_point:
            assert all(1 <= count <= 4 for count in (evaluations[1], evaluations[3]))
        else:
            assert evaluations == [0, 3, 0, 2]

    def test_of_a_prefix_every_part_is_given_its_own(self):
        flow = make_flow(CLASSES, LENGTH, [Natural(), Natural()], "affine")
        noise, prompt = flow.base.noise(50, LENGTH), torch.randint(CLASSES, (50, 2))
        options = {"temperature": 1.0, "fixed_point": False}
        with torch.no_grad():
            y, _ = generate(flow.base, flow.transforms, noise, None, prompt, **options)
            x = flow.residuals(y)[-1]
        assert torch.equal(y[:, :2], prompt)
        # The rest is what the noise says of x.
        assert torch.equal(x[:, 2:], flow.base.from_noise(noise)[0][:, 2:])


def test_noise_is_all_the_randomness():
    base = shaken(FactorizedBase(CLASSES, LENGTH))
    noise = base.noise(20, LENGTH, torch.Generator().manual_seed(0))
    assert noise.shape == (20, LENGTH)
    state = torch.get_rng_state()
    with torch.no_grad():
        generate(base, [], noise, None, None, temperature=1.0, fixed_point=False)
    assert torch.equal(torch.get_rng_state(), state)
