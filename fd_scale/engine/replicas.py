"""ZeRO-3 within groups of ranks that are replicas of one another: MiCS, as DeepSpeed had it and has it no more.

Source: Zhang et al. 2022 (arXiv:2205.00119). The engine alone imports this.
"""

from __future__ import annotations

import functools
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.utils import groups
from torch import Tensor, nn

from fd_scale.distributed import World


class Replicas:
    """Ranks in a row that hold a model among them, a replica, and those in all replicas that hold the same part of it.

    To DeepSpeed the replica is all there is: it asks this as it would ask Megatron's model parallel unit. All ranks
    make it, in the same order.

    Args:
        world: ranks.
        size: ranks of a replica, a divisor of all.
    """

    def __init__(self, world: World, size: int) -> None:
        self.size, self.rank = size, world.rank % size
        self.index, self.count = world.rank // size, world.size // size
        first = self.index * size
        # Only members meet: at thousands of ranks each would wait for hundreds of groups of others.
        self.within, self.across = (
            dist.new_group(list(members), use_local_synchronization=True)
            for members in (range(first, first + size), range(self.rank, world.size, size))
        )

    @property
    def writes(self) -> bool:
        """Whether this rank's part of a checkpoint is written here: replicas hold the same, and share the writing."""
        return self.rank % self.count == self.index

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """The ranks of this replica."""
        return self.within

    def get_data_parallel_world_size(self) -> int:
        """How many they are."""
        return self.size

    def get_data_parallel_rank(self) -> int:
        """Which of them this one is."""
        return self.rank

    def get_model_parallel_group(self) -> None:
        """None: parameters are in parts by ZeRO alone."""

    def get_model_parallel_world_size(self) -> int:
        """See `get_model_parallel_group`."""
        return 1

    def get_model_parallel_rank(self) -> int:
        """See `get_model_parallel_group`."""
        return 0


def replicas_of(ds_config: dict[str, Any], world: World) -> tuple[dict[str, Any], Replicas | None]:
    """Returns a configuration as DeepSpeed reads it, and the replicas that it asks for; none: there is but one.

    DeepSpeed keeps groups in globals, and would stay with those of the engine before: they are set here, those of hpZ
    too, which it would form whenever a module is partitioned, and refuse the second time.

    Args:
        ds_config: resolved (`fd_scale.ds_config.resolve`).
        world: ranks, which all call it.
    """
    zero = dict(ds_config.get("zero_optimization", {}))
    size = zero.pop("mics_shard_size", None)
    ds_config = ds_config | {"zero_optimization": zero}
    found = _replicas(world, size) if size is not None else None
    if found is not None:
        ds_config["train_batch_size"] //= found.count
    near = zero.get("zero_hpz_partition_size", 1)
    if 1 < near >= world.size:  # a second copy of each part beside the first
        near = zero["zero_hpz_partition_size"] = 1
    groups.mpu = found
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = _replicas(world, near).within if near > 1 else None
    return ds_config, found


@functools.cache
def _replicas(world: World, size: int) -> Replicas:
    return Replicas(world, size)


def average_over(replicas: Replicas, optimizer: DeepSpeedZeroOptimizer_Stage3) -> None:
    """Makes the gradients of a step those of all replicas, a bucket at a time, while the backward pass goes on.

    DeepSpeed has averaged them over the ranks of one. What is not finite in one is so in all, and all skip the step.

    Args:
        replicas: of which this rank is in one.
        optimizer: DeepSpeed's, of that one.

    Source: Zhang et al. 2022 (arXiv:2205.00119), "2-hop gradient synchronization".
    """
    partition = optimizer.partition_grads

    def partition_and_average(parameters: list[nn.Parameter], gradients: list[Tensor]) -> list[Tensor]:
        parts: list[Tensor] = partition(parameters, gradients)
        if parts and optimizer.is_gradient_accumulation_boundary():
            flat = torch.cat(parts).to(optimizer.communication_data_type).div_(replicas.count)
            deepspeed.comm.all_reduce(flat, group=replicas.across)
            torch._foreach_copy_(parts, flat.split([part.numel() for part in parts]))
        return parts

    optimizer.partition_grads = partition_and_average
