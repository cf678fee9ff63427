"""Faster ways to compute the same: compiled functions, and replayed CUDA graphs.

A level of generation is many small operations. ``torch.compile`` fuses those of the parts that run
again and again, such as a block of a Transformer, each compiled once for all levels, flows and
layers. A CUDA graph launches all operations of all levels at once. In a training step it is the
evaluations of backbones that are compiled, with their gradients.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from itertools import chain
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from dflows.errors import UserError, chain_of

__all__ = ["Acceleration", "accelerated", "compiling"]

P = ParamSpec("P")
R = TypeVar("R")

BACKEND = "inductor"
MOST_SHAPES = 64
MOST_GRAPHS = 16

_compiles: ContextVar[bool] = ContextVar("compiles", default=False)


@cache
def _compiled(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True, backend=backend)


def accelerated(function: Callable[P, R]) -> Callable[P, R]:
    """Returns a part of what is computed, compiled within :func:`compiling`.

    Args:
        function: A function of modules, tensors and numbers, the same object at every call.
    """
    return _compiled(function, BACKEND) if _compiles.get() else function


@contextmanager
def compiling(wanted: bool = True) -> Iterator[None]:
    """Compiles the parts that run within, or leaves them as they are.

    Args:
        wanted: Whether to compile.

    Raises:
        UserError: If there is no compiler.
    """
    if not wanted:
        yield
        return
    import torch._dynamo
    import torch._inductor.exc as broken

    token = _compiles.set(True)
    try:
        # Beyond the limit a function would silently run as it stands. What several processes
        # train is cut into no parts: the cuts cannot handle layers that are computed again.
        with torch._dynamo.config.patch(recompile_limit=MOST_SHAPES, optimize_ddp=False):
            yield
    except Exception as error:
        for cause in chain_of(error):
            if isinstance(cause, broken.InvalidCxxCompiler | broken.TritonMissing):
                raise UserError(
                    f"compile is set, and there is no compiler ({str(cause).splitlines()[0]}): "
                    "install one, such as g++, or leave compile away"
                ) from error
        raise
    finally:
        _compiles.reset(token)


class _Graph(NamedTuple):
    """A captured computation, the tensors that it reads, and what it returns."""

    graph: Any
    inputs: Sequence[Tensor | None]
    output: Tensor
    evaluations: list[int]


class Acceleration:
    """Creates the way to turn noise into samples.

    Args:
        compile: Whether ``torch.compile`` compiles parts.
        cuda_graph: Whether to capture the whole as a CUDA graph, one for every shape, and replay
            it.
    """

    def __init__(self, *, compile: bool = False, cuda_graph: bool = False) -> None:  # noqa: A002
        self.compile = compile
        self.cuda_graph = cuda_graph
        self._graphs: dict[object, _Graph] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}(compile={self.compile}, cuda_graph={self.cuda_graph})"

    def __getstate__(self) -> dict[str, Any]:
        # A graph is bound to the tensors that it was captured with.
        return {**self.__dict__, "_graphs": {}}

    def __call__(
        self,
        function: Callable[..., tuple[Tensor, list[int]]],
        module: nn.Module,
        inputs: Sequence[Tensor | None],
        **options: Any,
    ) -> tuple[Tensor, list[int]]:
        """Computes a function of tensors.

        Args:
            function: The function; one to be captured reads no value of a tensor.
            module: The module whose parameters it uses.
            inputs: The tensors, or None.
            options: Further arguments.

        Raises:
            UserError: If a graph is asked for and there is no CUDA device.
        """
        if self.compile:
            with compiling():
                return self._compute(function, module, inputs, options)
        return self._compute(function, module, inputs, options)

    def _compute(
        self,
        function: Callable[..., tuple[Tensor, list[int]]],
        module: nn.Module,
        inputs: Sequence[Tensor | None],
        options: dict[str, Any],
    ) -> tuple[Tensor, list[int]]:
        if not self.cuda_graph:
            return function(*inputs, **options)
        device = next(tensor.device for tensor in inputs if tensor is not None)
        if device.type != "cuda":
            raise UserError(
                f"cuda_graph is set, and the model is on {device}: a CUDA graph needs a CUDA "
                "device, so move the model to one, or leave cuda_graph away"
            )
        # Parameters may be trained between two replays, but not be moved.
        places = tuple(tensor.data_ptr() for tensor in chain(module.parameters(), module.buffers()))
        shapes = tuple(
            None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype)
            for tensor in inputs
        )
        key = (shapes, tuple(options.items()), places, module.training)
        with torch.cuda.device(device):
            if key not in self._graphs:
                while len(self._graphs) >= MOST_GRAPHS:
                    del self._graphs[next(iter(self._graphs))]
                self._graphs[key] = _capture(function, inputs, options)
            captured = self._graphs[key]
            for place, value in zip(captured.inputs, inputs, strict=True):
                if place is not None and value is not None:
                    place.copy_(value)
            captured.graph.replay()
            return captured.output.clone(), captured.evaluations


def _capture(
    function: Callable[..., tuple[Tensor, list[int]]],
    inputs: Sequence[Tensor | None],
    options: dict[str, Any],
) -> _Graph:
    held = [None if tensor is None else tensor.clone() for tensor in inputs]
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):  # compiles, and fills tables that are worked out once
            function(*held, **options)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, evaluations = function(*held, **options)
    return _Graph(graph, held, output, evaluations)
