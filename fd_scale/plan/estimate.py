"""The plan: memory, step time and cost of every way to run a recipe, and the one that fits best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from fd_scale import ds_config
from fd_scale.config import Recipe
from fd_scale.data import Source, open_source
from fd_scale.distributed import micro_batch_of_a_rank
from fd_scale.errors import UserError
from fd_scale.hardware import GPUS, GPUS_PER_NODE, Gpu, mfu, model_flops, named_like
from fd_scale.plan.counts import Counts, Policy, count
from fd_scale.plan.memory import (
    HIERARCHICAL,
    STAGES,
    Memory,
    Recorded,
    Sharding,
    frozen_in_parts,
    hpz_ranks,
    memory,
    state,
)

UTILISATION = 0.4
"""Assumed unless a measured one is given."""
LAUNCH_US = 450.0
"""Microseconds of Python for each trained parameter tensor and micro-batch; measured, see `launch_seconds`."""
IMAGES_PER_CORE = 350.0
"""Crops of 224 px a second, of photos of 108 KB and 500 x 375 px: `fd-scale bench data`, see docs/loading.md."""

_GRADIENT_SIZES = {"fp32": 4, "fp16": 2, "bf16": 2}
"""Bytes, by the JSON's `communication_data_type`."""


@dataclass(frozen=True)
class Traffic:
    """What a GPU sends in an optimizer step; bytes."""

    gathered: float
    """Parameters, all-gathered."""
    reduced: float
    """Gradients, reduce-scattered (an all-reduce is both: it adds to `gathered` too)."""
    seconds: float
    """Over the slower of NVLink and InfiniBand."""
    settling: float
    """Share of it that follows the optimizer step, where nothing is left to hide it behind, 0..1."""
    behind: Literal["step", "backward", "last backward", "nothing"]
    """Which computation the rest may hide behind; `last`: of the step's micro-batches."""
    passes: int
    """Collectives before the optimizer step; an all-reduce counts as two, as it goes around a ring twice."""
    settling_passes: int
    """Those behind it; at stage 3 one for each of the small parameters that stay whole."""
    exchanges: int = 0
    """All-reduces between replicas, before the optimizer step, behind the last backward pass alone."""
    exchange_seconds: float = 0.0
    """What they take of `seconds`, or beside the rest over other links."""


@dataclass(frozen=True)
class Choice:
    """One way to run the recipe."""

    stage: str
    replica: int
    """GPUs that hold the model among them, at stage `HIERARCHICAL`."""
    policy: Policy
    micro_batch: int
    accumulation: int
    memory: Memory
    compute_seconds: float
    launch_seconds: float
    """Least that the host takes to launch it."""
    traffic: Traffic

    @property
    def way(self) -> tuple[str, Policy, int]:
        """In what choices differ: stage, policy and micro-batch."""
        return self.stage, self.policy, self.micro_batch

    @property
    def step_seconds(self) -> float:
        """Communication and the host's work hide behind computation as far as they can."""
        return max(self.compute_seconds, self.launch_seconds, self.traffic.seconds)


@dataclass(frozen=True)
class Plan:
    """A recipe on a number of GPUs."""

    name: str
    recipe: Recipe
    counts: Counts
    gpu: Gpu
    num_gpus: int
    choices: tuple[Choice, ...]
    """All combinations of stage, policy and micro-batch."""
    own: Choice
    """The recipe's."""
    utilisation: float
    """Share of the GPUs' peak that a step is assumed to reach, recomputation counted as work."""
    launch_us: float
    """As of `launch_seconds`."""
    num_steps: int | None
    """Of the run; none where the images of an epoch are not known."""
    images_per_core: float
    """Crops that a core decodes and cuts in a second."""

    def fits(self, choice: Choice) -> bool:
        """Whether a choice fits into a GPU's memory."""
        return choice.memory.total <= self.gpu.memory

    @property
    def fitting(self) -> list[Choice]:
        """Those that fit; of replicas, where there are several whole ones."""
        return [
            choice
            for choice in self.choices
            if self.fits(choice)
            and (
                choice.stage != HIERARCHICAL
                or self.num_gpus % choice.replica == 0 < self.num_gpus - choice.replica
            )
        ]

    @property
    def best(self) -> Choice | None:
        """The quickest that fits; of equals what sends least, then computes least, in the largest micro-batch."""
        return min(
            self.fitting,
            key=lambda choice: (
                choice.step_seconds,
                choice.traffic.seconds,
                choice.compute_seconds,
                -choice.micro_batch,
                choice.memory.total,
            ),
            default=None,
        )

    @property
    def nearest(self) -> Choice | None:
        """What fits with the fewest changes to the recipe: first a smaller micro-batch, then a policy, then a stage."""
        own = self.own
        return min(
            self.fitting,
            key=lambda choice: (
                choice.stage != own.stage,
                choice.policy != own.policy,
                choice.micro_batch > own.micro_batch,
                abs(STAGES.index(choice.stage) - STAGES.index(own.stage)),
                choice.policy.mode == "block",
                -choice.micro_batch,
            ),
            default=None,
        )

    def mfu(self, choice: Choice) -> float:
        """Model FLOPs utilisation that the assumed step time means."""
        flops = self.recipe.train.global_batch * _model_flops(self.counts)
        return mfu(flops, choice.step_seconds, self.num_gpus, self.gpu.peak_flops)

    @property
    def peak_images_per_s(self) -> float | None:
        """Images a second at an MFU of 1; none where the GPU is not in the table, whose peak is then a stand-in."""
        if not named_like(self.gpu.name):
            return None
        return self.num_gpus * self.gpu.peak_flops / _model_flops(self.counts)

    def images_per_s_of_a_node(self, choice: Choice) -> float:
        """What the GPUs of a node train on."""
        share = min(self.num_gpus, GPUS_PER_NODE) / self.num_gpus
        return share * self.recipe.train.global_batch / choice.step_seconds

    def cores_of_a_node(self, choice: Choice) -> int:
        """Cores that decode and cut that many."""
        return math.ceil(self.images_per_s_of_a_node(choice) / self.images_per_core)

    def gpu_hours(self, choice: Choice) -> float | None:
        """GPU-hours of the whole run."""
        return None if self.num_steps is None else self.num_steps * choice.step_seconds * self.num_gpus / 3600


def plan(
    name: str,
    recipe: Recipe,
    gpu: Gpu,
    num_gpus: int,
    *,
    source: Source | None = None,
    images: int | None = None,
    utilisation: float = UTILISATION,
    launch_us: float = LAUNCH_US,
    images_per_core: float = IMAGES_PER_CORE,
    counts: Counts | None = None,
) -> Plan:
    """Plans a run.

    Args:
        name: of the recipe, for titles.
        recipe: any task; neither its weights nor, where `images` is given, its data are needed.
        gpu: what to run on.
        num_gpus: how many of them.
        source: training images; none: the recipe's, where they can be opened here.
        images: how many they are; none: as many as are in `source`.
        utilisation: share of the GPUs' peak that a step is assumed to reach.
        launch_us: as of `launch_seconds`.
        images_per_core: crops that a core decodes and cuts in a second.
        counts: those of the recipe where they are known, which its batch and its engine do not change.

    Raises:
        UserError: the recipe does not allow it.
    """
    if num_gpus < 1:
        raise UserError(f"--gpus: got {num_gpus}, expected at least 1")
    train = recipe.train
    largest = micro_batch_of_a_rank(train.global_batch, train.micro_batch, num_gpus, recipe.crops_together)
    zero = ds_config.read(train.ds_config)
    ds_config.require_replicas(zero, recipe, num_gpus)
    if source is None and (images is None or recipe.task in ("classification", "segmentation", "detection")):
        source = _source(recipe)
    counts = counts or count(recipe, source)
    share = train.global_batch // num_gpus
    sizes = [size for size in range(1, share + 1) if share % size == size % recipe.crops_together == 0]
    own_policy = Policy(train.activation_checkpointing, train.checkpointing_period)
    own_stage = str(ds_config.zero_stage(zero))
    if own_stage == "3" and ds_config.shard_size(train, num_gpus) < num_gpus:
        own_stage = HIERARCHICAL
    replica = train.mics_shard_size or GPUS_PER_NODE
    choices = tuple(
        _choice(
            recipe, counts, gpu, Sharding(stage, num_gpus, share // size, given["zero_optimization"], replica), policy,
            given=given, utilisation=utilisation, launch_us=launch_us,
        )
        for stage, given in {stage: _of_stage(stage, zero) for stage in STAGES}.items()
        for policy in counts.activations
        for size in sizes
    )  # fmt: skip
    own = next(choice for choice in choices if choice.way == (own_stage, own_policy, largest))
    if images is None and source is not None:
        images = len(source)
    return Plan(
        name=name, recipe=recipe, counts=counts, gpu=gpu, num_gpus=num_gpus, choices=choices, own=own,
        utilisation=utilisation, launch_us=launch_us, num_steps=_num_steps(recipe, images),
        images_per_core=images_per_core,
    )  # fmt: skip


def present_gpu(device: torch.device) -> Gpu:
    """Returns the CUDA device of this machine: its own memory, and the rates of the nearest one in the table."""
    found = torch.cuda.get_device_properties(device)
    nearest = min(
        named_like(found.name) or GPUS.values(), key=lambda gpu: abs(gpu.memory - found.total_memory)
    )
    return replace(nearest, name=found.name, memory=found.total_memory)


def _of_stage(stage: str, given: dict[str, Any]) -> dict[str, Any]:
    """The recipe's JSON; its `zero_optimization` where it is of this stage, else that of the shipped one."""
    section: dict[str, Any] = given.get("zero_optimization", {})
    other = stage == HIERARCHICAL and ds_config.against_replicas(section)
    stage = "3" if stage == HIERARCHICAL else stage
    if other or stage != str(ds_config.zero_stage(given)):
        section = ds_config.read(f"zero{stage}").get("zero_optimization", {})
    return {**given, "zero_optimization": {key: value for key, value in section.items() if value != "auto"}}


def _choice(
    recipe: Recipe, counts: Counts, gpu: Gpu, sharding: Sharding, policy: Policy, *,
    given: dict[str, Any], utilisation: float, launch_us: float,
) -> Choice:  # fmt: skip
    train, stage, accumulation = recipe.train, sharding.stage, sharding.accumulation
    micro_batch = train.global_batch // (sharding.num_gpus * accumulation)
    recorded = recorded_by(recipe, stage, accumulation)
    held = state(
        counts, sharding, train.precision, recorded, state_bytes=recipe.optim.state_bytes,
        sums=ds_config.grad_accum_dtype(given, train.precision, accumulation),
    )  # fmt: skip
    activations = counts.activations[policy]
    flops = train.global_batch * (_model_flops(counts) + activations.recomputed_flops)
    size = 4 if train.precision == "fp32" else 2
    return Choice(
        stage=stage,
        replica=sharding.replica,
        policy=policy,
        micro_batch=micro_batch,
        accumulation=accumulation,
        memory=memory(counts, held, activations, micro_batch, recorded),
        compute_seconds=flops / (sharding.num_gpus * gpu.peak_flops * utilisation),
        launch_seconds=launch_seconds(recipe, counts, stage, accumulation, launch_us),
        traffic=traffic(
            counts.parameters, size, sharding, gpu, teacher_bytes=frozen_in_parts(counts, stage),
            gradient_size=_GRADIENT_SIZES.get(given.get("communication_data_type") or "", size),
        ),
    )  # fmt: skip


def launch_seconds(recipe: Recipe, counts: Counts, stage: str, accumulation: int, launch_us: float) -> float:
    """Least seconds that the host takes for a step: Python, DeepSpeed and launches go with the number of tensors.

    Args:
        recipe: with or without CUDA graphs.
        counts: of its models.
        stage: of `memory.STAGES`.
        accumulation: micro-batches of a step.
        launch_us: microseconds for each trained tensor and micro-batch at ZeRO 0 to 2.

    Source: docs/measurements.md, the hosts of H200s: SwinV2-B at ZeRO-1, 365 tensors, 160 and 176 ms, with graphs 69 at
        most; SwinV2-G at ZeRO-3, 743 tensors, 606 and 699 ms, of which the GPU worked 506.
    """
    in_parts = stage in ("3", HIERARCHICAL)
    factor = 1.9 if in_parts else 0.4 if recorded_by(recipe, stage, accumulation) == "all" else 1.0
    return 1e-6 * launch_us * factor * len(counts.parameters) * accumulation


def recorded_by(recipe: Recipe, stage: str, accumulation: int) -> Recorded:
    """Returns what runs as CUDA graphs, at a stage of `memory.STAGES` and so many micro-batches a step."""
    if not recipe.train.cuda_graphs:
        return "nothing"
    if stage in ("3", HIERARCHICAL):
        return "teacher"
    # Below stage 2 graphs are refused where a step is several micro-batches.
    return "all" if accumulation == 1 or stage == "2" else "nothing"


@dataclass(frozen=True)
class _Moved:
    """Elements that collectives bring to each GPU in a step, before what it has itself is taken off."""

    gathered: float
    reduced: float
    settling: float
    """Parameters that are gathered after the optimizer step."""
    gather_bucket: float
    """Most that go at once."""
    reduce_bucket: float
    settling_passes: int
    nearby: float = 0.0
    """Of `gathered`, from the ranks of hpZ's groups alone."""

    def passes(self, rounds: int) -> int:
        """Collectives before the optimizer step, in which gathers and reductions come `rounds` times."""
        gathers = math.ceil(self.gathered / rounds / self.gather_bucket)
        return rounds * (gathers + math.ceil(self.reduced / rounds / self.reduce_bucket))


def _moved(parameters: Sequence[int], sharding: Sharding) -> _Moved:
    total, stage, accumulation = sum(parameters), sharding.stage, sharding.accumulation
    reduce_bucket = sharding.elements("reduce_bucket_size")
    if sharding.in_parts:
        whole = sharding.persistent(parameters)
        moving = total - sum(whole)
        kept = min(moving, sharding.elements("stage3_max_reuse_distance") / 2)
        gathered = accumulation * (2 * moving - kept)
        # Only the first forward pass of a step must gather what the optimizer has changed.
        nearby = gathered - moving if hpz_ranks(sharding.zero, sharding.num_gpus) < sharding.num_gpus else 0.0
        prefetched = sharding.elements("stage3_prefetch_bucket_size")
        return _Moved(
            gathered, accumulation * total, sum(whole), prefetched, reduce_bucket, len(whole), nearby
        )
    reduced = total * (accumulation if stage == "2" else 1)
    # Stages 1 and 2 reduce a bucket that lies on several ranks for all of them: an all-reduce.
    all_reduced = stage == "0" or sharding.zero.get("use_multi_rank_bucket_allreduce", True)
    settling = 0 if stage == "0" else total
    return _Moved(
        reduced if all_reduced else 0, reduced, settling, reduce_bucket, reduce_bucket,
        math.ceil(settling / sharding.elements("allgather_bucket_size")),
    )  # fmt: skip


def _behind(sharding: Sharding) -> Literal["step", "backward", "last backward", "nothing"]:
    if sharding.stage == "0" or not sharding.zero.get("overlap_comm", sharding.in_parts):
        return "nothing"
    if sharding.in_parts:
        return "step"
    return "backward" if sharding.stage == "2" else "last backward"


def traffic(
    parameters: Sequence[int], size: int, sharding: Sharding, gpu: Gpu, *, teacher_bytes: float = 0,
    gradient_size: int = 0,
) -> Traffic:  # fmt: skip
    """What a GPU sends in a step, and the time that it takes.

    Stages 0 and 1 reduce gradients once a step, the others once a micro-batch. Stage 3 gathers parameters for the
    forward and for the backward pass of each micro-batch, but does not let go in between of those that are read
    again within `stage3_max_reuse_distance` elements; the others gather them after the step. Recomputation gathers
    nothing more: DeepSpeed keeps what the backward pass is about to read. A teacher in parts is gathered once a
    micro-batch, at any stage. With hpZ all but the first pass of a step gather from few ranks. Replicas do all that
    each by itself; then the GPUs that hold the same part of each all-reduce its gradients. Tests count what gloo ranks
    send.

    Args:
        parameters: elements of each trained parameter.
        size: bytes of an element as it travels.
        sharding: of the job.
        gpu: whose links they are.
        teacher_bytes: weights of the teachers that are in parts.
        gradient_size: bytes of an element of a gradient as it travels; 0: `size`.

    Source: volumes: Rajbhandari et al. 2020 (arXiv:1910.02054), section 7; a ring over n moves (n - 1) / n of the
    whole through each member.
    """
    gradient_size = gradient_size or size
    num_gpus, replica = sharding.num_gpus, sharding.replica
    if sharding.stage == HIERARCHICAL and num_gpus > replica:
        within = traffic(
            parameters, size, replace(sharding, stage="3", num_gpus=replica), gpu,
            teacher_bytes=teacher_bytes, gradient_size=gradient_size,
        )  # fmt: skip
        num_buckets = math.ceil(sum(parameters) / sharding.elements("reduce_bucket_size"))
        return _with_exchange(within, gradient_size * sum(parameters), num_buckets, gpu, num_gpus, replica)
    moved = _moved(parameters, sharding)
    teacher = sharding.accumulation * teacher_bytes
    # Stages 0 to 2 gather gradients, the second half of an all-reduce, and after the step parameters.
    gathered = (size if sharding.in_parts else gradient_size) * moved.gathered
    gathered, reduced = gathered + size * moved.settling + teacher, gradient_size * moved.reduced
    num_nodes, near = -(-num_gpus // GPUS_PER_NODE), hpz_ranks(sharding.zero, num_gpus)
    # With hpZ what is frozen is gathered from all ranks once in a run.
    whole, nearby = gathered + reduced, size * moved.nearby + (teacher if near < num_gpus else 0)
    # Between nodes: a node takes in what its cards bring, and its GPUs share it.
    far = whole if near > GPUS_PER_NODE else whole - nearby
    between = far * (num_nodes - 1) / num_nodes / min(num_gpus, GPUS_PER_NODE)
    gathered = (gathered - nearby) * (num_gpus - 1) / num_gpus + nearby * (near - 1) / near
    reduced *= (num_gpus - 1) / num_gpus
    prefetched = sharding.elements("stage3_prefetch_bucket_size")
    teacher_passes = sharding.accumulation * math.ceil(teacher_bytes / size / prefetched)
    return Traffic(
        gathered, reduced, max((gathered + reduced) / gpu.nvlink, between / gpu.infiniband),
        settling=size * moved.settling / whole,
        behind=_behind(sharding),
        passes=moved.passes(1 if sharding.stage in ("0", "1") else sharding.accumulation) + teacher_passes,
        settling_passes=moved.settling_passes,
    )  # fmt: skip


def _with_exchange(
    within: Traffic, gradient_bytes: float, num_buckets: int, gpu: Gpu, num_gpus: int, replica: int
) -> Traffic:
    """Adds to a replica's traffic the all-reduce of its parts of the gradients with the other replicas, once a step."""
    exchanged = 2 * gradient_bytes * (num_gpus - replica) / num_gpus / replica
    exchange_s = exchanged / (gpu.nvlink if num_gpus <= GPUS_PER_NODE else gpu.infiniband)
    other_links = replica <= GPUS_PER_NODE < num_gpus
    return replace(
        within,
        gathered=within.gathered + exchanged / 2,
        reduced=within.reduced + exchanged / 2,
        seconds=max(within.seconds, exchange_s) if other_links else within.seconds + exchange_s,
        exchanges=num_buckets,
        exchange_seconds=exchange_s,
    )


def _model_flops(counts: Counts) -> float:
    return model_flops(counts.student_flops, counts.teacher_flops)


def _num_steps(recipe: Recipe, images: int | None) -> int | None:
    if recipe.train.steps is not None or images is None:
        return recipe.train.steps
    assert recipe.train.epochs is not None, "a recipe has steps or epochs"
    return round(recipe.train.epochs * (images * recipe.data.crops // recipe.train.global_batch))


def _source(recipe: Recipe) -> Source | None:
    try:
        return open_source(recipe.data.train)
    except UserError:
        return None  # it is on the cluster
