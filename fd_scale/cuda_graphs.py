"""Forward and backward of a module as CUDA graphs: recorded once, replayed by one launch each.

A model of many small layers is launched more slowly than a GPU of today computes it: a step of SwinV2-B is 71 ms of
work for an H200, in some three thousand launches, for which Python takes 150 ms.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

from fd_scale.errors import UserError

WARM_UPS = 3
"""Forwards and backwards before the recording: compilation, libraries' workspaces, tables that are kept."""


def record(module: nn.Module, *samples: Tensor, name: str) -> None:
    """Makes a module replay its forward, and its backward where it is trained, for inputs like `samples`.

    It goes on to run as before for inputs of other shapes and in its other mode (training or evaluation). What it
    returns, and the gradients of its parameters, lie where the next replay writes. Its buffers are left as they were.

    Args:
        module: on a GPU, in the mode that is meant; its parameters stay where they are from now on, and their values
            may change. It draws no random numbers, and nothing in it waits for the device.
        samples: the inputs of its forward, of any values, in their order; those that are None are left out. They have
            no gradients.
        name: what to call it in an error.

    Raises:
        UserError: something in it cannot be recorded.
    """
    eager, training = module.forward, module.training
    shapes = [sample.shape for sample in samples]
    # BatchNorm's running statistics would count the samples in.
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    graphs = _Graphs(module, samples, name)
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    parameters = graphs.trained

    def forward(*inputs: Tensor | None) -> Any:
        given = [each for each in inputs if each is not None]
        if module.training != training or [each.shape for each in given] != shapes:
            return eager(*inputs)
        return tree_unflatten(list(_Replay.apply(graphs, *given, *parameters)), graphs.structure)

    module.forward = forward


class _Graphs:
    """The graphs of a module, and the memory that they read and write."""

    def __init__(self, module: nn.Module, samples: Sequence[Tensor], name: str) -> None:
        self.inputs = [sample.clone() for sample in samples]
        parameters = dict(module.named_parameters())
        self.trained = [parameter for parameter in parameters.values() if parameter.requires_grad]
        # In the same memory, but new to autograd: it ties a parameter to the stream where its gradient was first asked
        # for, by DeepSpeed, and that stream cannot be recorded.
        twins: dict[str, Tensor] = {
            place: nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
            for place, parameter in parameters.items()
        }
        wanted = [twin for twin in twins.values() if twin.requires_grad]

        def forward() -> Any:
            return functional_call(module, twins, tuple(self.inputs))

        def backward() -> Sequence[Tensor | None]:
            return torch.autograd.grad(self.outputs, wanted, self.gradients, allow_unused=True)

        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self.outputs, self.structure = tree_flatten(forward())
                self.gradients = [torch.zeros_like(output) for output in self.outputs]
                if wanted:
                    backward()
            self.outputs = []
        torch.cuda.synchronize()
        with _refusing(name), torch.cuda.graph(self.forward, stream=stream):
            self.outputs, _ = tree_flatten(forward())
        if wanted:
            with _refusing(name), torch.cuda.graph(self.backward, pool=self.forward.pool(), stream=stream):
                found = backward()
            # One that takes no part must have no place in the autograd graph, where it would be waited for.
            used = [
                (trained, each) for trained, each in zip(self.trained, found, strict=True) if each is not None
            ]
            self.trained, self.parameter_gradients = [list(column) for column in zip(*used, strict=True)]
        self.outputs = [output.detach() for output in self.outputs]


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        first = error.__context__ or error  # the end of a recording that broke is an error of its own
        reason = " ".join(str(first).split())[:300]
        raise UserError(f"train.cuda_graphs: {name} cannot be recorded: {reason}; set it to false") from None


class _Replay(torch.autograd.Function):
    """Inputs and parameters -> outputs; parameters are named for their gradients alone."""

    @staticmethod
    def forward(ctx: Any, graphs: _Graphs, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.graphs = graphs
        for static, given in zip(graphs.inputs, tensors, strict=False):
            static.copy_(given)
        graphs.forward.replay()
        return tuple(output.detach() for output in graphs.outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        graphs: _Graphs = ctx.graphs
        for static, given in zip(graphs.gradients, gradients, strict=True):
            static.copy_(given)
        graphs.backward.replay()
        return (None, *[None] * len(graphs.inputs), *(each.detach() for each in graphs.parameter_gradients))
