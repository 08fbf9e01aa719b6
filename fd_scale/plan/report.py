"""A plan as tables, as JSON and as a plot."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fd_scale.checkpoint import write_atomically
from fd_scale.errors import UserError
from fd_scale.hardware import GPUS_PER_NODE
from fd_scale.plan.counts import Policy
from fd_scale.plan.estimate import Choice, Plan
from fd_scale.plan.memory import HIERARCHICAL, STAGES, Memory

PARTS = ("parameters", "gradients", "optimizer", "teacher", "buffers", "activations", "working")


def gib(num_bytes: float) -> str:
    """Bytes as GiB, two digits."""
    return f"{num_bytes / 2**30:.2f}"


def parts(memory: Memory) -> dict[str, float]:
    """Bytes of each part of a GPU's memory, `PARTS`."""
    held = memory.state
    sizes = [held.parameters, held.gradients, held.optimizer, held.teacher, held.buffers]
    return dict(zip(PARTS, [*sizes, memory.kept, memory.working], strict=True))


def show(plan: Plan, console: Console) -> None:
    """Prints a plan: models, memory, the choices, the verdict, and what all of it assumes."""
    counts = plan.counts
    console.print(
        f"{plan.name} on {plan.num_gpus} x {plan.gpu.name}, {gib(plan.gpu.memory)} GiB each\n"
        f"trained parameters {counts.num_parameters / 1e6:.2f} M; FLOPs an image: student forward "
        f"{counts.student_flops / 1e9:.2f} G, teachers {counts.teacher_flops / 1e9:.2f} G; {counts.kernels}",
        soft_wrap=True, highlight=False,
    )  # fmt: skip
    console.print(memory_table(plan))
    console.print(_activation_table(plan))
    console.print(_choice_table(plan))
    for line in (*verdict(plan), *assumptions(plan)):
        console.print(line, soft_wrap=True, highlight=False)


def memory_table(plan: Plan) -> Table:
    """What a GPU holds, stage by stage, at the recipe's micro-batch and policy."""
    own = plan.own
    table = Table(
        "ZeRO stage", *PARTS, "all", "fits",
        title=f"GiB a GPU, micro-batch {own.micro_batch}, checkpointing {own.policy}",
    )  # fmt: skip
    for choice in plan.choices:
        if (choice.policy, choice.micro_batch) == (own.policy, own.micro_batch):
            sizes = [gib(size) for size in parts(choice.memory).values()]
            verdict = "yes" if plan.fits(choice) else "no"
            table.add_row(
                f"{choice.stage}{' (recipe)' if choice == plan.own else ''}", *sizes, gib(choice.memory.total), verdict
            )  # fmt: skip
    return table


def _activation_table(plan: Plan) -> Table:
    table = Table(
        "checkpointing", "kept, constant", "kept, an image", "working, constant", "working, an image",
        "recomputed, of a forward", title="Activations, MiB",
    )  # fmt: skip
    for policy, cost in plan.counts.activations.items():
        sizes = (cost.kept.constant, cost.kept.an_image, cost.working.constant, cost.working.an_image)
        share = cost.recomputed_flops / plan.counts.student_flops
        table.add_row(str(policy), *(f"{size / 2**20:.2f}" for size in sizes), f"{share:.0%}")
    for policy, reason in plan.counts.refused.items():
        table.add_row(str(policy), reason)
    return table


def _choice_table(plan: Plan) -> Table:
    table = Table(
        "ZeRO stage", "checkpointing", "largest micro-batch", "GiB", "compute s", "host s", "gather GB", "reduce GB",
        "network s", "step s", "MFU", "days", "GPU-hours", title="What fits",
    )  # fmt: skip
    for stage in STAGES:
        for policy in plan.counts.activations:
            fitting = [
                choice
                for choice in plan.choices
                if (choice.stage, choice.policy) == (stage, policy) and plan.fits(choice)
            ]
            if not fitting:
                table.add_row(stage, str(policy), "none")
                continue
            choice = max(fitting, key=lambda choice: choice.micro_batch)
            table.add_row(
                stage, str(policy), str(choice.micro_batch), gib(choice.memory.total), *_costs(plan, choice)
            )
    return table


def _costs(plan: Plan, choice: Choice) -> list[str]:
    hours = plan.gpu_hours(choice)
    cost = ["with --images"] * 2 if hours is None else [f"{hours / 24 / plan.num_gpus:.2f}", f"{hours:.0f}"]
    return [
        f"{choice.compute_seconds:.3f}", f"{choice.launch_seconds:.3f}",
        f"{choice.traffic.gathered / 1e9:.2f}", f"{choice.traffic.reduced / 1e9:.2f}",
        f"{choice.traffic.seconds:.3f}", f"{choice.step_seconds:.3f}", f"{plan.mfu(choice):.1%}", *cost,
    ]  # fmt: skip


def described(plan: Plan, choice: Choice) -> str:
    """A choice as settings of a recipe."""
    policy: Policy = choice.policy
    period = "" if policy.period == 1 else f" train.checkpointing_period={policy.period}"
    replica = choice.replica if choice.stage == HIERARCHICAL else 0
    shards = f" train.mics_shard_size={replica}" if replica or plan.recipe.train.mics_shard_size else ""
    stage = "3" if replica else choice.stage
    return (
        f"train.ds_config=zero{stage}{shards} train.micro_batch={choice.micro_batch} "
        f"train.activation_checkpointing={policy.mode}{period}"
    )


def verdict(plan: Plan) -> list[str]:
    """Whether the recipe fits as it is, and the choice that fits best."""
    own, best = plan.own, plan.best
    does = "fits" if plan.fits(own) else "does not fit"
    lines = [
        f"recipe as it is: {does} ({gib(own.memory.total)} of {gib(plan.gpu.memory)} GiB): {described(plan, own)}"
    ]
    if best is None:
        lines.append(f"best: nothing fits into {plan.gpu.name} on {plan.num_gpus}; take more or larger GPUs")
    else:
        hours = plan.gpu_hours(best)
        cost = "" if hours is None else f", {hours / 24 / plan.num_gpus:.2f} days, {hours:.0f} GPU-hours"
        lines.append(
            f"best: {described(plan, best)}: {gib(best.memory.total)} GiB, {best.step_seconds:.3f} s a step{cost}"
        )
    return [*lines, *input_needed(plan)]


def input_needed(plan: Plan) -> list[str]:
    """What the loader of a node must give, where an image is one crop: the cores for it, and the workers of a rank."""
    if plan.recipe.task not in ("distill", "masked", "classification"):
        return []
    choice = plan.best or plan.own
    cores, ranks = plan.cores_of_a_node(choice), min(plan.num_gpus, GPUS_PER_NODE)
    return [
        f"input: {plan.images_per_s_of_a_node(choice):.0f} images/s a node, which take {cores} of its cores at "
        f"{plan.images_per_core:.0f} images/s a core (--images-per-core; measure yours: fd-scale bench data): "
        f"data.num_workers={math.ceil(cores / ranks)} on each of {ranks} ranks"
    ]


def require_fit(plan: Plan) -> Choice:
    """Returns the recipe's own choice where it fits.

    Raises:
        UserError: it does not; the sentence names the nearest that does.
    """
    own, nearest = plan.own, plan.nearest
    if plan.fits(own):
        return own
    way_out = (
        "nothing does on so many GPUs: take more or larger ones"
        if nearest is None
        else f"the nearest that does ({gib(nearest.memory.total)} GiB): {described(plan, nearest)}"
    )
    raise UserError(
        f"train: {described(plan, own)} needs {gib(own.memory.total)} GiB a GPU and does not fit into the "
        f"{gib(plan.gpu.memory)} GiB of {plan.gpu.name} on {plan.num_gpus} GPUs; {way_out}"
    )


def assumptions(plan: Plan) -> list[str]:
    """What stands behind the numbers."""
    gpu = plan.gpu
    return [
        f"compute: {plan.utilisation:.0%} of {gpu.peak_flops / 1e12:.0f} TFLOP/s (dense bf16, NVIDIA's datasheet) is "
        "assumed (while it worked, an H200 reached 38% with SwinV2-G, 17% with SwinV2-B: docs/measurements.md); FLOPs "
        "are exact: student 3 x forward, teachers that run 1 x, and what is recomputed; MFU leaves that out",
        f"host: {plan.launch_us:g} us of Python for each of {len(plan.counts.parameters)} trained tensors and "
        "micro-batch, 1.9 times that at ZeRO-3, at most 0.4 times with train.cuda_graphs below; measured on the "
        "hosts of H200s",
        f"network: NVLink {gpu.nvlink / 1e9:.0f} GB/s and InfiniBand {gpu.infiniband / 1e9:.0f} GB/s a GPU, one "
        f"direction (datasheets of the GPU and of NVIDIA's DGX machine), {GPUS_PER_NODE} GPUs a node; hidden behind "
        "computation as far as it can be",
        "memory: states as DeepSpeed allocates them, activations counted on the models' shapes; no fragmentation, "
        "no workspace of cuBLAS, cuDNN or NCCL",
        f"{HIERARCHICAL}: ZeRO-3 with train.mics_shard_size={plan.own.replica}; each so many GPUs hold a replica, and "
        "replicas exchange gradients once a step",
    ]


def to_json(plan: Plan) -> dict[str, Any]:
    """Returns all numbers of a plan; bytes, FLOPs, seconds."""

    def row(choice: Choice) -> dict[str, Any]:
        return {
            "stage": choice.stage, "policy": str(choice.policy), "micro_batch": choice.micro_batch,
            "accumulation": choice.accumulation, "fits": plan.fits(choice), "memory": parts(choice.memory),
            "memory_total": choice.memory.total, "compute_seconds": choice.compute_seconds,
            "launch_seconds": choice.launch_seconds,
            "gathered": choice.traffic.gathered, "reduced": choice.traffic.reduced,
            "network_seconds": choice.traffic.seconds, "step_seconds": choice.step_seconds,
            "mfu": plan.mfu(choice), "gpu_hours": plan.gpu_hours(choice),
            "images_per_s_of_a_node": plan.images_per_s_of_a_node(choice),
            "cores_of_a_node": plan.cores_of_a_node(choice),
        }  # fmt: skip

    counts = plan.counts
    return {
        "recipe": plan.name, "gpu": dataclasses.asdict(plan.gpu), "num_gpus": plan.num_gpus,
        "num_parameters": counts.num_parameters, "student_flops": counts.student_flops,
        "teacher_flops": counts.teacher_flops, "teacher_bytes": counts.teacher_bytes, "kernels": counts.kernels,
        "activations": {str(policy): dataclasses.asdict(cost) for policy, cost in counts.activations.items()},
        "refused": {str(policy): reason for policy, reason in counts.refused.items()},
        "num_steps": plan.num_steps, "images_per_core": plan.images_per_core, "own": row(plan.own),
        "best": None if plan.best is None else row(plan.best), "choices": [row(choice) for choice in plan.choices],
        "assumptions": assumptions(plan),
    }  # fmt: skip


def write_json(values: dict[str, Any], file: str) -> None:
    """Writes a plan's numbers."""
    written(file, lambda: write_atomically(Path(file), json.dumps(values, indent=1)))


def plot(plan: Plan, file: str) -> None:
    """Writes a PNG: a bar of a GPU's memory for each stage and policy, against what the GPU has."""
    from matplotlib.figure import Figure

    own = plan.own
    shown = [choice for choice in plan.choices if choice.micro_batch == own.micro_batch]
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(shown))
    below = [0.0] * len(shown)
    for part in PARTS:
        heights = [parts(choice.memory)[part] / 2**30 for choice in shown]
        axes.bar(places, heights, bottom=below, label=part)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    axes.axhline(plan.gpu.memory / 2**30, color="black", linestyle="--", label=plan.gpu.name)
    axes.set_xticks(places, [f"{choice.stage}\n{choice.policy}" for choice in shown], rotation=45)
    axes.set_ylabel("GiB a GPU")
    axes.set_title(f"{plan.name}, {plan.num_gpus} x {plan.gpu.name}, micro-batch {own.micro_batch}")
    axes.legend(fontsize="small")
    written(file, lambda: figure.savefig(file, format="png", dpi=120))


def written(file: str, write: Callable[[], object]) -> None:
    """Calls what writes a file; a file that cannot be written is a sentence."""
    try:
        write()
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror}); choose another place") from None
