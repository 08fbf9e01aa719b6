"""Places where a step of DeepSpeed is Python for the most part: the same results in fewer calls.

The host, not the GPU, sets the pace of a step of many layers: at ZeRO-3 SwinV2-G, 64 images on an H200, waited for
Python a sixth of its time and more. The engine alone imports this.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import deepspeed
import deepspeed.utils.nvtx
import torch
import torch.nn.functional as F
from deepspeed.comm import comm
from deepspeed.runtime.zero import parameter_offload, partition_parameters, partitioned_param_coordinator
from deepspeed.runtime.zero.linear import LinearFunctionForZeroStage3, zero3_linear_wrap
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn
from torch.distributed import ProcessGroup

_TORCH_LINEAR = F.linear
_PRINT = partition_parameters.print_rank_0
_TO_TENSORS = parameter_offload.apply_to_tensors_only


def quicken_zero3() -> None:
    """Replaces what ZeRO-3 calls in every layer; after a `deepspeed.zero.Init`, which sets its own linear layer."""
    partitioned_param_coordinator.get_all_parameters = _parameters_of
    # Two calls of the accelerator for each of four thousand of its own.
    deepspeed.utils.nvtx.enable_nvtx = False
    deepspeed.comm.get_rank, deepspeed.comm.get_world_size = _rank, _world_size
    for module in (parameter_offload, partition_parameters, partitioned_param_coordinator):
        module.print_rank_0 = _printed
    parameter_offload.apply_to_tensors_only = _hooked
    if F.linear is zero3_linear_wrap:
        F.linear = _linear


def remember_modules(root: nn.Module) -> None:
    """Lists modules, which change no more: DeepSpeed walks over them before and after each forward pass."""
    root.modules = functools.partial(iter, list(root.modules()))  # type: ignore[method-assign]


def look_at_gradients_together(optimizer: DeepSpeedZeroOptimizer | DeepSpeedZeroOptimizer_Stage3) -> None:
    """Takes the norms of all gradients at once, and at ZeRO-1 and -2 from them whether one is not finite.

    DeepSpeed takes ten launches for each gradient, while the device waits for them: SwinV2-B has 365 gradients.
    """

    def norms(gradients: Iterable[Tensor | None]) -> list[Tensor]:
        present = [
            each for each in gradients if each is not None and not getattr(each, "_zero_padding", False)
        ]
        if not present:
            return [torch.zeros((), device=optimizer.device)]
        return list(torch._foreach_norm(present, 2, dtype=torch.float32))

    def has_overflow() -> Tensor:
        groups = range(len(optimizer.bit16_groups))
        of_all = [norm for group in groups for norm in norms(optimizer.averaged_gradients[group])]
        return torch.stack(of_all).isfinite().all().logical_not()[None]

    def norm_of_group(gradients: list[Tensor], parameters: list[Tensor], norm_type: int = 2) -> Tensor:
        total = torch.stack(norms(gradients)).double().square().sum().float()
        deepspeed.comm.all_reduce(total, group=optimizer.dp_process_group)
        norm = total.sqrt()
        return torch.where(norm.isfinite(), norm, -1.0)  # as DeepSpeed says it

    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        optimizer.has_overflow_partitioned_grads_serial = has_overflow
    optimizer.get_grad_norm_direct = norm_of_group


class _Linear(torch.autograd.Function):
    """DeepSpeed's linear layer of ZeRO-3: it keeps for the backward pass a parameter, not what was gathered of it.

    Its own forward has torch look at the signature of a function in every call, and to an input of more than two
    dimensions it adds the bias in a pass after the product: with drop path's factors 15% of what a GPU did in a step of
    SwinV2-G.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        LinearFunctionForZeroStage3.setup_context(ctx, (x, weight, bias), None)
        rows = _TORCH_LINEAR(x.flatten(0, -2) if x.dim() > 2 else x, weight, bias)
        # No view for autograd, which would not let others write into it.
        out: Tensor = torch.ops.aten._unsafe_view(rows, [*x.shape[:-1], len(weight)])
        return out

    backward = staticmethod(LinearFunctionForZeroStage3.backward)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Of ZeRO-3's parameters; models of others in this process, which outlive a run, get torch's own."""
    if not hasattr(weight, "ds_id"):
        out: Tensor = _TORCH_LINEAR(input, weight, bias)
    elif torch.compiler.is_compiling():
        out = zero3_linear_wrap(input, weight, bias)
    elif torch.is_grad_enabled():
        out = _Linear.apply(input, weight, bias)
    else:
        out = _TORCH_LINEAR(input, weight, bias)
    return out


def _rank(group: Any = None) -> int:
    """DeepSpeed's own goes through five functions, once and more for each parameter."""
    return group.rank() if isinstance(group, ProcessGroup) else comm.get_rank(group)


def _world_size(group: Any = None) -> int:
    return group.size() if isinstance(group, ProcessGroup) else comm.get_world_size(group)


def _printed(message: str, debug: bool = False, force: bool = False) -> None:
    """DeepSpeed's own asks for the rank before it looks whether anything is to be printed: 4,000 times a step."""
    if debug or force:
        _PRINT(message, debug, force)


def _hooked(
    function: Callable[[Tensor], Tensor], value: Any, warning_msg_fn: Callable[[Any], str] | None = None
) -> Any:
    """Puts a module's hook of the backward pass on tensors; where there will be none, nothing.

    Args:
        function: `apply` of an autograd function of the module's own.
        value: what goes into the module, or comes out of it.
        warning_msg_fn: as DeepSpeed's.
    """
    if not torch.is_grad_enabled():
        return value
    of_module: Any = function.__self__  # type: ignore[attr-defined]
    if "in_one" not in of_module.__dict__:
        of_module.in_one = _in_one(of_module)  # there it lives no longer than the module
    return _TO_TENSORS(of_module.in_one.apply, value, warning_msg_fn)


def _in_one(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """A hook whose forward takes the context: torch looks at the signature of any other in every call."""

    class InOne(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            function.setup_context(ctx, (x,), None)
            return x.detach()

        backward = function.backward

    return InOne


def _parameters_of(module: Any, recurse: bool = False) -> Iterator[tuple[str, nn.Parameter]]:
    """A module's parameters, which ZeRO-3 asks for five times in every forward and backward of it."""
    kept = module.__dict__.setdefault("listed_parameters", {})  # there it lives no longer than the module
    if recurse not in kept:
        kept[recurse] = list(module.named_parameters(recurse=recurse))
    return itertools.chain(kept[recurse], module.ds_external_parameters())
