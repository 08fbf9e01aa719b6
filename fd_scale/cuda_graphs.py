"""Forward and backward of a module as CUDA graphs: recorded once, replayed by one launch each.

A model of many small layers is launched more slowly than a GPU of today computes it: SwinV2-B takes some three thousand
launches for a step's forward and backward, each from Python.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def record(module: nn.Module, *samples: Tensor) -> None:
    """Makes a module replay its forward, and its backward where it is trained, for inputs like `samples`.

    It goes on to run as before for inputs of other shapes and in its other mode (training or evaluation). What it
    returns, and the gradients of its parameters, lie where the next replay writes.

    Args:
        module: on a GPU, in the mode that is meant; its parameters stay where they are from now on, and their values
            may change. It draws no random numbers, and nothing in it waits for the device.
        samples: the inputs of its forward, of any values, in their order; those that are None are left out.
    """
    eager, training = module.forward, module.training
    shapes = [sample.shape for sample in samples]
    torch.cuda.make_graphed_callables(module, samples, allow_unused_input=True)
    replayed = module.forward

    def forward(*inputs: Tensor | None) -> Any:
        given = [each for each in inputs if each is not None]
        fits = module.training == training and [each.shape for each in given] == shapes
        return replayed(*given) if fits else eager(*inputs)

    module.forward = forward
