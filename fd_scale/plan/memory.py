"""Bytes on a GPU: what DeepSpeed holds for each ZeRO stage, and what a micro-batch adds to it.

As DeepSpeed 0.19.8 was seen to allocate (`fd-scale plan --measure` shows it beside what is predicted here).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fd_scale.ds_config import offload_device
from fd_scale.hardware import GPUS_PER_NODE
from fd_scale.plan.counts import Activations, Counts

HIERARCHICAL = "hierarchical"
"""ZeRO-3 within a replica of `train.mics_shard_size` GPUs, a node unless the recipe says another number."""
STAGES = ("0", "1", "2", "3", HIERARCHICAL)
Recorded = Literal["nothing", "teacher", "all"]
"""What runs as CUDA graphs; `all`: the teacher's pass, and the student's forward and backward."""

# What DeepSpeed takes where its JSON names no other number; in elements.
_ELEMENTS = {
    "reduce_bucket_size": 5e8, "allgather_bucket_size": 5e8, "sub_group_size": 1e9, "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9, "stage3_prefetch_bucket_size": 5e7, "stage3_param_persistence_threshold": 1e5,
}  # fmt: skip


@dataclass(frozen=True)
class Sharding:
    """How ZeRO spreads a job over its GPUs."""

    stage: str
    """One of `STAGES`."""
    num_gpus: int
    """Of the job, 8 in a node."""
    accumulation: int
    """Micro-batches a step."""
    zero: dict[str, Any]
    """Section `zero_optimization` of the DeepSpeed JSON."""
    replica: int = GPUS_PER_NODE
    """GPUs that hold the model among them, at stage `HIERARCHICAL`."""

    @property
    def in_parts(self) -> bool:
        """Whether a GPU holds a part of the parameters alone, and gathers the rest."""
        return self.stage in ("3", HIERARCHICAL)

    def elements(self, key: str) -> float:
        """Returns a size of the JSON, or what DeepSpeed takes for it."""
        return float(self.zero.get(key, _ELEMENTS[key]))

    def persistent(self, parameters: Sequence[int]) -> list[int]:
        """Returns the elements of those parameters, of these, that stage 3 leaves whole on each rank."""
        threshold = self.elements("stage3_param_persistence_threshold")
        return [count for count in parameters if count <= threshold]


@dataclass(frozen=True)
class State:
    """What a GPU holds whatever the micro-batch; bytes."""

    parameters: float
    gradients: float
    optimizer: float
    """fp32 master weights and AdamW's two moments."""
    teacher: float
    """And what else is frozen."""
    buffers: float
    """Of communication: buckets, and at stage 3 the parameters that are gathered at a time."""
    step: float
    """Of the optimizer step alone, when activations are gone: gradients in fp32."""

    @property
    def steady(self) -> float:
        """Parameters, gradients and optimizer states: what `--measure` counts."""
        return self.parameters + self.gradients + self.optimizer


def state(
    counts: Counts, sharding: Sharding, precision: str, recorded: Recorded = "nothing", *, state_bytes: int = 8,
    sums: str | None = None,
) -> State:  # fmt: skip
    """Predicts what a GPU holds.

    Args:
        counts: of the recipe.
        sharding: of the job.
        precision: fp32, bf16 or fp16.
        recorded: in the recipe's run.
        state_bytes: of the optimizer's states of a parameter (`OptimConfig.state_bytes`).
        sums: what gradients are summed in, as `ds_config.grad_accum_dtype` says.
    """
    stage, num_gpus, zero = sharding.stage, sharding.num_gpus, sharding.zero
    size = 4 if precision == "fp32" else 2
    summed = 4 if sums == "fp32" else size
    total = counts.num_parameters
    bucket = size * sharding.elements("reduce_bucket_size")
    ranks = min(num_gpus, sharding.replica) if stage == HIERARCHICAL else num_gpus
    in_parts = frozen_in_parts(counts, stage)
    whole = counts.teacher_bytes + counts.frozen_bytes + counts.partitioned_teacher_bytes - in_parts
    near = hpz_ranks(zero, ranks)
    teacher = whole + in_parts / ranks + (in_parts / near if near < ranks else 0)
    most_live = size * sharding.elements("stage3_max_live_parameters")
    teacher_live = min(in_parts, most_live) if num_gpus > 1 else 0
    if stage == "0":
        masters = 0 if size == 4 else 4  # in fp32 the parameters are the masters
        return State(
            parameters=size * total, gradients=size * total, optimizer=(state_bytes + masters) * total,
            teacher=teacher, buffers=teacher_live, step=max(masters * total, min(bucket, size * total)),
        )  # fmt: skip
    own = total / ranks
    # What is offloaded is on the host: the optimizer's states and the gradients that it reads, or the parameters.
    stays = offload_device({"zero_optimization": zero}, "offload_optimizer") == "none"
    if stage in ("1", "2"):
        # Stage 1 accumulates whole gradients; where it does not accumulate, they go as they are reduced. A graph writes
        # them where they stay.
        all_gradients = stage == "1" and sharding.accumulation > 1
        bucket *= summed / size if stage == "1" else 1
        written = size * total if recorded == "all" else 0
        return State(
            parameters=size * total,
            gradients=written + summed * (total if all_gradients else own * (stays or summed > size)),
            optimizer=(state_bytes + 4) * own * stays,
            teacher=teacher, buffers=bucket * (2 if zero.get("overlap_comm", False) else 1) + teacher_live,
            step=4 * own * stays,
        )  # fmt: skip
    # hpZ's second copy lives from the forward to the backward pass; of what is frozen for good.
    copied = total / near if near < ranks else 0
    persistent = sum(sharding.persistent(counts.parameters)) if ranks > 1 else 0
    parameters_stay = offload_device({"zero_optimization": zero}, "offload_param") == "none"
    live = min(most_live, size * (total - persistent)) if ranks > 1 or not parameters_stay else 0
    return State(
        parameters=size * (own * parameters_stay + persistent + copied), gradients=summed * own * stays,
        optimizer=(state_bytes + 4) * own * stays,
        teacher=teacher, buffers=bucket + max(live, teacher_live),  # teacher and student are gathered in turns
        step=4 * min(own, sharding.elements("sub_group_size")) * stays,
    )  # fmt: skip


def hpz_ranks(zero: dict[str, Any], ranks: int) -> int:
    """Returns among how many ranks hpZ keeps a second copy of the parameters of stage 3; as many as all: it does not.

    Source: Wang et al. 2023 (ZeRO++, arXiv:2306.10209).
    """
    size: int = zero.get("zero_hpz_partition_size", 1)
    return size if 1 < size < ranks else ranks


def frozen_in_parts(counts: Counts, stage: str) -> int:
    """Bytes of weights that are not trained, of which each GPU holds a part and gathers the rest."""
    return counts.partitioned_teacher_bytes + counts.frozen_bytes * (stage in ("3", HIERARCHICAL))


@dataclass(frozen=True)
class Memory:
    """A GPU's memory at the fullest moment of a step; bytes."""

    state: State
    kept: float
    """Activations that wait for the backward pass."""
    working: float
    """The rest that is needed at that moment: a block that is computed again, the teacher's pass, the step."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.state.steady + self.state.teacher + self.state.buffers + self.kept + self.working


def memory(
    counts: Counts, state: State, activations: Activations, micro_batch: int, recorded: Recorded = "nothing"
) -> Memory:
    """Predicts the fullest moment of a step: in the backward pass, the teachers' forward pass or the optimizer.

    What a graph works in belongs to it alone at any moment, so that a maximum over moments becomes a sum.
    """
    kept, working = activations.kept.at(micro_batch), activations.working.at(micro_batch)
    teacher = counts.teacher_working.at(micro_batch)
    if recorded == "all":
        working += teacher + state.step
    elif recorded == "teacher":
        working = teacher + max(working, state.step - kept)
    else:
        working = max(working, max(teacher, state.step) - kept)
    return Memory(state, kept, working)
