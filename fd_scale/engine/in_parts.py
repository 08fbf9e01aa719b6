"""A model in parts over the ranks, by ZeRO-3: built so, and, where it is frozen, run so."""

from __future__ import annotations

import ctypes
import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus, is_zero_param
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import groups as deepspeed_groups
from deepspeed.utils import set_z3_leaf_modules
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fd_scale.distributed import World
from fd_scale.engine.quicker_deepspeed import quicken_zero3, remember_modules
from fd_scale.engine.refusals import naming_refusals
from fd_scale.engine.replicas import replicas_of
from fd_scale.models import Backbone

_TRIM_BYTES = 32 * 2**20
_SHAPE = torch.Tensor.shape.__get__  # type: ignore[attr-defined]


class _BuildInParts(TorchFunctionMode):
    """Builds modules of which DeepSpeed's ZeRO-3 holds a part on each rank, with the values of a plain build.

    A parameter is partitioned as soon as one of another module is made or touched, and gathered again when it is
    touched, to torch's default device, where it was made. So code that initialises, in whatever order, draws the same
    numbers as where all is whole; and the parameters of one module, or of those that one call of torch touches, are all
    that is whole there at a time.

    Args:
        init: DeepSpeed's, which partitions and gathers.
        dtype: of the parts in the end; until then they are as they were made, so that nothing is rounded twice.
    """

    def __init__(self, init: deepspeed.zero.Init, dtype: torch.dtype) -> None:
        super().__init__()
        self.init = init
        self.dtype = dtype
        self.made: list[weakref.ref[nn.Parameter]] = []
        self.owners: dict[int, weakref.ref[nn.Module]] = {}
        self.whole: list[Any] = []
        self.freed = 0

    def __enter__(self) -> _BuildInParts:
        self.home = torch.get_default_device()
        self.hook = register_module_parameter_registration_hook(self._take)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.hook.remove()
        self._partition([])
        for reference in self.made:
            parameter: Any = reference()
            if parameter is not None and parameter.is_floating_point():
                parameter.ds_tensor.data = parameter.ds_tensor.to(self.dtype)
                parameter.data = parameter.data.to(self.dtype)
                parameter.ds_secondary_tensor = None  # hpZ's copy, which a forward pass makes anew

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        touched = [leaf for leaf in tree_leaves((args, kwargs)) if _in_parts(leaf)]
        if touched and function == _SHAPE:
            return touched[0].ds_shape
        if touched:
            self._partition([self._owner(parameter) for parameter in touched])
            for parameter in touched:
                if parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE:
                    parameter.all_gather()
                    parameter.data = parameter.data.to(self.home)  # another device draws other numbers
                    self.whole.append(parameter)
        return function(*args, **kwargs)

    def _take(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is None or parameter.is_meta or is_zero_param(parameter):
            return
        with torch._C.DisableTorchFunction():  # called by a constructor, not by way of this mode
            self._partition([module])
            self.init._convert_to_deepspeed_param(parameter)
        self.made.append(weakref.ref(parameter))
        self.owners[id(parameter)] = weakref.ref(module)
        self.whole.append(parameter)

    def _owner(self, parameter: nn.Parameter) -> nn.Module | None:
        return self.owners.get(id(parameter), lambda: None)()

    def _partition(self, kept: list[nn.Module | None]) -> None:
        """Partitions what is whole, but for the parameters of modules that are `kept`.

        They are to be initialised still, perhaps, and a gather would bring back what was never set.
        """
        still_whole = []
        for parameter in self.whole:
            owner = self._owner(parameter)
            if any(owner is other for other in kept):
                still_whole.append(parameter)
            else:
                self.freed += parameter.data.nbytes
                parameter.data = parameter.data.to(self.init.local_device)
                parameter.partition(has_been_updated=True)
        if self.freed > _TRIM_BYTES:
            # What is freed lies between the parts, and glibc would keep it: more than the whole model, in the end.
            ctypes.CDLL(None).malloc_trim(0)
            self.freed = 0
        self.whole = still_whole


class Partition:
    """A `Placement`: parameters in parts over the ranks, by ZeRO-3.

    Args:
        ds_config: resolved DeepSpeed configuration of the run.
        world: ranks.
    """

    def __init__(self, ds_config: dict[str, Any], world: World) -> None:
        choose_accelerator(world)
        ds_config, self.replicas = replicas_of(ds_config, world)
        zero = ds_config.get("zero_optimization", {}) | {"stage": 3}
        zero.pop("offload_optimizer", None)
        # Nothing is trained here: batch sizes, which DeepSpeed would check, are of no concern.
        self.config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}

    def building(self, dtype: torch.dtype) -> _BuildInParts:
        """See `Placement`."""
        with naming_refusals():
            # A module of its own, without parameters: DeepSpeed's hooks into constructors are not wanted.
            init = deepspeed.zero.Init(
                module=nn.Module(),
                config_dict_or_path=self.config,
                data_parallel_group=self.replicas and self.replicas.within,
                zero_param_parallel_group=deepspeed_groups._get_zero_param_intra_parallel_group(),
            )
        quicken_zero3()
        return _BuildInParts(init, dtype)

    def frozen(self, module: nn.Module, device: torch.device, dtype: torch.dtype) -> Callable[..., Any]:
        """See `Placement`: an engine without an optimizer, whose hooks gather what the forward reads."""
        precision = {
            "bf16": {"enabled": dtype == torch.bfloat16},
            "fp16": {"enabled": dtype == torch.float16},
        }
        move_buffers(module, device)
        gather_by_block(module)
        engine, *_ = deepspeed.initialize(
            model=module, config=self.config | precision, mpu=self.replicas, dist_init_required=False
        )
        remember_modules(module)
        engine.eval()  # in train mode without gradients it takes parameters for those of a backward pass
        run = functools.partial(engine)
        let_go_with(run, engine)
        return run


def let_go_with(owner: object, engine: DeepSpeedEngine) -> None:
    """Frees a model and its optimizer once `owner` is gone: DeepSpeed alone would keep them as long as the process."""
    weakref.finalize(owner, _let_go, engine).atexit = False


def _let_go(engine: DeepSpeedEngine) -> None:
    engine.destroy()  # hooks of the autograd graph, into which Python's collector does not look
    of_model = set(engine.module.modules())
    parameter_offload.FWD_MODULE_STACK[:] = [
        module for module in parameter_offload.FWD_MODULE_STACK if module not in of_model
    ]
    cached: Any = vars(PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]
    inspect.getclosurevars(cached).nonlocals["func"].cache_clear()  # below a decorator


def choose_accelerator(world: World) -> None:
    """Tells DeepSpeed the recipe's device; it would take a GPU wherever there is one."""
    set_accelerator(CPU_Accelerator() if world.device.type == "cpu" else CUDA_Accelerator())


def _in_parts(value: Any) -> bool:
    return isinstance(value, nn.Parameter) and is_zero_param(value)


def whole_shape(parameter: Any) -> torch.Size:
    """Shape of a parameter, which may be in parts."""
    shape: torch.Size = parameter.ds_shape if is_zero_param(parameter) else parameter.shape
    return shape


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Moves what DeepSpeed leaves where it is, where parameters came partitioned."""
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)


def gather_by_block(module: nn.Module) -> None:
    """Makes ZeRO-3 gather a block at once: its many small gathers, a layer each, are what makes it slow."""
    for backbone in module.modules():
        if isinstance(backbone, Backbone) and (classes := backbone.block_classes()):
            set_z3_leaf_modules(backbone, list(classes))
