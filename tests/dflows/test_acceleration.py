"""Samples computed quicker, which stay the same; and nothing in a level that waits for a device."""

import copy
import pickle
import shutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dflows import AutoregressiveBase, DiscreteFlow, acceleration
from dflows.backbones import LSTM, MADE, DilatedConvolution, LevelConvolution, Masked, Transformer
from dflows.errors import UserError
from dflows.orderings import Blocks, Halves, Natural, Parity, Strided
from tests.dflows.small import WIDTH, make_conditioner, make_flow, shaken

CLASSES, LENGTH, BATCH = 5, 12, 6


def over_levels(backbone, ordering):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        conditioner = make_conditioner(CLASSES, LENGTH, ordering, backbone())
    return shaken(DiscreteFlow(AutoregressiveBase(conditioner))).eval()


def flow_of(backbone, bijection, orderings):
    flow = make_flow(CLASSES, LENGTH, orderings, bijection, backbone=backbone)
    return flow.eval()


FLOWS = {
    "transformer": lambda: over_levels(lambda: Transformer(WIDTH, layers=2, heads=2), Strided(4)),
    "transformer, both ways": lambda: over_levels(
        lambda: Transformer(WIDTH, layers=2, heads=2, attention="full"), Strided(3)
    ),
    "transformer over lanes": lambda: over_levels(
        lambda: Transformer(WIDTH, heads=2, positions="lanes"), Strided(4)
    ),
    "local transformer": lambda: over_levels(
        lambda: Transformer(WIDTH, length=LENGTH, locality="distance", positions="none"), Blocks(3)
    ),
    "causal convolution": lambda: over_levels(
        lambda: LevelConvolution(WIDTH, layers=2, window=2), Strided(4)
    ),
    "convolution": lambda: over_levels(lambda: DilatedConvolution(WIDTH, layers=2), Strided(3)),
    "made": lambda: over_levels(lambda: MADE(WIDTH, LENGTH, hidden=32), Strided(3)),
    "lstm": lambda: over_levels(lambda: LSTM(WIDTH, layers=2), Natural()),
    "lstm over lanes": lambda: over_levels(lambda: LSTM(WIDTH, ahead=2), Strided(4)),
    "lstm, both ways": lambda: over_levels(lambda: LSTM(WIDTH, bidirectional=True), Strided(3)),
    "own network": lambda: over_levels(
        lambda: Masked(torch.nn.Linear(WIDTH, WIDTH), WIDTH), Strided(3)
    ),
    "rank flows": lambda: flow_of("causal", "rank", (Parity(), Parity(first=1))),
    "affine flows": lambda: flow_of("masked", "affine", (Halves(), Strided(3))),
    "shift flows": lambda: flow_of("causal-convolution", "shift", (Strided(4), Natural())),
}

every = pytest.mark.parametrize("name", FLOWS)


def draw(flow, number=BATCH, **options):
    return flow.sample((number,), generator=torch.Generator().manual_seed(1), **options)


class Spy(TorchDispatchMode):
    """Notes operations that read values, and results with as many entries a dimension as classes.

    Of those the logits are one, and no more of them may be held than a level has dimensions.
    """

    READING = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique", "is_nonzero")

    def __init__(self, most):
        super().__init__()
        self.most, self.waits, self.wide = most, [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        booleans = name in ("index", "index_put_", "index_put") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if booleans or any(name.startswith(reading) for reading in self.READING):
            self.waits.append(name)
        result = function(*args, **(kwargs or {}))
        shape = tuple(result.shape) if isinstance(result, torch.Tensor) else ()
        of_classes = len(shape) > 1 and (shape[0], shape[-1]) == (BATCH, CLASSES)
        if of_classes and result.numel() > self.most * CLASSES:
            self.wide.append((name, shape))
        return result


@every
def test_no_level_waits_for_the_device_or_holds_classes_of_other_levels(name, monkeypatch):
    flow = FLOWS[name]()
    draw(flow)  # what orderings make of the dimensions is worked out once
    # On a CPU, where it costs no wait, scales are looked at.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    parts = [flow.base, *flow.transforms]
    orderings = [part.conditioner.ordering for part in parts if hasattr(part, "conditioner")]
    most = max(int(ordering.levels(LENGTH).bincount().max()) for ordering in orderings)
    with Spy(BATCH * most) as spy:
        draw(flow)
    assert not spy.waits
    assert not spy.wide


@pytest.mark.parametrize("name", ["transformer", "causal convolution", "convolution", "lstm"])
def test_compiled_samples_are_the_same(name, monkeypatch):
    # What dynamo makes of the parts, run without a compiler behind it.
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    monkeypatch.setattr(acceleration, "BACKEND", backend)
    flow = FLOWS[name]()
    plain = draw(flow), draw(flow, 3, length=7)
    assert not compiled
    flow.accelerate(compile=True)
    assert torch.equal(draw(flow), plain[0])
    number = len(compiled)
    assert (number > 0) == (name != "lstm")
    assert torch.equal(draw(flow, 3, length=7), plain[1])
    draw(flow)
    assert len(compiled) <= number + 2  # not for every level and length anew
    flow.accelerate()
    assert torch.equal(draw(flow), plain[0])


@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "cl"))), reason="there is no C++ compiler"
)
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_a_compiler_gives_the_same_samples():
    flow = FLOWS["convolution"]()
    plain = draw(flow)
    flow.accelerate(compile=True)
    assert torch.equal(draw(flow), plain)


@every
@pytest.mark.device
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_replayed_graph_gives_the_same_samples(name, compiled):
    flow = FLOWS[name]().cuda()

    def draw(seed, number=BATCH, **options):
        generator = torch.Generator("cuda").manual_seed(seed)
        return flow.sample((number,), generator=generator, **options)

    seeds = range(3)
    plain, one = [draw(seed) for seed in seeds], draw(0, 1)
    flow.accelerate(compile=compiled, cuda_graph=True)
    for _ in range(2):
        for seed in seeds:
            assert torch.equal(draw(seed), plain[seed])
    assert torch.equal(draw(0, 1), one)
    with torch.no_grad():  # trained in place, and then moved
        for parameter in flow.parameters():
            parameter.mul_(0.5)
    replayed = draw(0)
    flow.accelerate()
    assert torch.equal(draw(0), replayed)


def test_a_graph_needs_a_cuda_device_and_levels():
    flow = FLOWS["transformer"]()
    flow.accelerate(cuda_graph=True)
    with pytest.raises(UserError, match="the model is on cpu: a CUDA graph needs a CUDA device"):
        draw(flow)
    with pytest.raises(UserError, match="whose number of iterations depends on the values"):
        draw(flow, method="fixed_point")


def test_an_accelerated_flow_is_copied_and_pickled():
    flow = FLOWS["rank flows"]()
    flow.accelerate(compile=True, cuda_graph=True)
    for same in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        assert repr(same._acceleration) == "Acceleration(compile=True, cuda_graph=True)"
        same.accelerate()
        assert torch.equal(draw(same), draw(FLOWS["rank flows"]()))
