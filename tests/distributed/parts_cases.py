"""What ranks do in the tests of models that are built and run in parts."""

import re
from pathlib import Path
from typing import Any

import cases
import deepspeed
import torch
from torch import nn

from fd_scale import api, distributed
from fd_scale.config import ModelConfig, build_recipe
from fd_scale.data import open_source
from fd_scale.engine import Engine, Partition
from fd_scale.engine.traffic import traffic_of
from fd_scale.models import build_model
from fd_scale.placement import WHOLE

MIB = 2**20


def partition() -> Partition:
    """Parts on the CPU."""
    return Partition({"zero_optimization": {"stage": 3}}, distributed.start("cpu", 60))


def values_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Returns a copy of the whole parameters and of the buffers, wherever they are."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    with torch.no_grad(), GatheredParameters(list(module.parameters())):
        return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def built_both_ways(sections: list[dict[str, Any]], dtype: torch.dtype) -> list[tuple[list[str], int, int]]:
    """Builds models whole and in parts: names of the values that differ, the number of values, elements left whole."""
    placement, found = partition(), []
    for section in sections:
        config = ModelConfig(**section)
        torch.manual_seed(7)
        whole = _cast(build_model(config), dtype).state_dict()
        next_drawn = torch.rand(1)
        torch.manual_seed(7)
        with placement.building(dtype):
            model = build_model(config)
        left = sum(parameter.numel() for parameter in model.parameters())
        parts = values_of(model) | {"the next number": torch.rand(1)}
        whole["the next number"] = next_drawn
        differing = [name for name in whole if not _same(parts[name], whole[name])]
        found.append((differing, len(whole), left))
    return found


def bytes_sent_by_building(section: dict[str, Any]) -> tuple[float, int]:
    """Builds a model in parts: bytes that the rank sent for it, and bytes of its parameters."""
    with partition().building(torch.float32):
        traffic = traffic_of(deepspeed.comm.comm.cdb)
        before = traffic.sent_bytes
        model = build_model(ModelConfig(**section))
        sent = traffic.sent_bytes - before
    return sent, 4 * sum(parameter.ds_numel for parameter in model.parameters())


def _cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def task_built_both_ways(values: dict[str, Any]) -> list[str]:
    """Builds a task whole and in parts; returns the names of the module's values that differ."""
    recipe, placement = build_recipe(values), partition()
    source = open_source(recipe.data.train)
    whole = api.build_task(recipe, source).module.state_dict()
    parts = values_of(api.build_task(recipe, source, placement, placement).module)
    assert len(whole) > 10
    return [name for name in whole | parts if not _same(parts[name], whole[name])]


def peak_of_building(section: dict[str, Any], in_parts: bool) -> tuple[float, float]:
    """Builds a model; returns by how many bytes the process grew at most, and the bytes of the whole weights."""
    placement = partition() if in_parts else WHOLE
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = peak_memory()
    with placement.building(torch.float32):
        model = build_model(ModelConfig(**section))
    grown = peak_memory() - before
    parameters: list[Any] = list(model.parameters())
    return grown, 4 * sum(p.ds_numel if in_parts else p.numel() for p in parameters)


def peak_memory() -> int:
    """Returns the most bytes that this process has held so far."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def train_and_measure_teacher(values: dict[str, Any]) -> list[int]:
    """Trains; returns the elements of the first teacher that this rank holds between steps."""
    held: list[int] = []
    build_task = api.build_task

    def noted(*args: Any) -> Any:
        task = build_task(*args)
        parameters = list(task.teachers[0].model.parameters())  # type: ignore[attr-defined]
        held.append(sum(p.ds_tensor.numel() if hasattr(p, "ds_tensor") else p.numel() for p in parameters))
        held.append(sum(p.numel() for p in parameters))
        return task

    api.build_task = noted  # type: ignore[assignment]
    cases.train(values)
    return held


def where_states_are(values: dict[str, Any]) -> list[str]:
    """Trains; returns whether DeepSpeed keeps optimizer states and parameters on the host."""
    found: list[str] = []
    init = Engine.__init__

    def noted(self: Engine, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        for name in ("offload_optimizer", "offload_param"):
            found.append(f"{name}={getattr(self.optimizer, name)}")

    Engine.__init__ = noted  # type: ignore[method-assign]
    cases.train(values)
    return found


def leaves(values: dict[str, Any]) -> list[str]:
    """Returns the names of the trained module's parts that ZeRO-3 gathers at once."""
    from deepspeed.utils import z3_leaf_module

    recipe = build_recipe(values)
    trainer = api.build_trainer(recipe, distributed.start("cpu", 60))
    return [name for name, module in trainer.task.module.named_modules() if z3_leaf_module(module)]


def decay_groups(values: dict[str, Any]) -> list[list[str]]:
    """Returns the names of the parameters that decay, and of those that do not."""
    return api.build_trainer(build_recipe(values), distributed.start("cpu", 60)).engine.group_names
