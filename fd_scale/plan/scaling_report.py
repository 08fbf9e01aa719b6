"""Curves of scaling as tables, as JSON and as a plot."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console
from rich.table import Table

from fd_scale.hardware import GPUS_PER_NODE
from fd_scale.plan.memory import HIERARCHICAL
from fd_scale.plan.report import written
from fd_scale.plan.scaling import Curve, Point, Scaling

MODELLED = "modelled, not measured"


def show(found: Scaling, console: Console) -> None:
    """Prints a table for each curve, how far each reaches, and what is assumed."""
    counts, first = found.counts, found.curves[0].points[0]
    console.print(
        f"{found.name} on {found.gpu.name}, {MODELLED}\n"
        f"trained parameters {counts.num_parameters / 1e6:.2f} M; checkpointing {first.choice.policy}; "
        f"{counts.kernels}",
        soft_wrap=True, highlight=False,
    )  # fmt: skip
    for curve in found.curves:
        console.print(_table(curve))
    for line in (*reach(found), *assumptions(found)):
        console.print(line, soft_wrap=True, highlight=False)


def _table(curve: Curve) -> Table:
    table = Table(
        "GPUs", "batch", "micro", "compute s", "links s", "hops s", "exposed s", "waits s", "input s", "saves s",
        "step s", "images/s", "share", "bound by", title=curve.name,
    )  # fmt: skip
    for column in table.columns[:-1]:
        column.justify = "right"
    for point in curve.points:
        micro = f"{point.choice.accumulation} x {point.choice.micro_batch}"
        seconds = (
            point.compute_s, point.links_s, point.latency_s, point.exposed_s, point.waiting_s, point.input_s,
            point.checkpoint_s, point.step_s,
        )  # fmt: skip
        table.add_row(
            str(point.num_gpus), str(point.global_batch), micro, *(f"{value:.4f}" for value in seconds),
            f"{point.images_per_s:.0f}", f"{curve.efficiency(point):.1%}",
            point.bound if point.fits else f"{point.bound}; does not fit",
        )  # fmt: skip
    return table


def reach(found: Scaling) -> list[str]:
    """How far each curve goes before it breaks, or ends."""
    largest = max(curve.points[-1].num_gpus for curve in found.curves)
    lines = []
    for curve in found.curves:
        batch, last = curve.points[-1].global_batch, curve.points[-1].num_gpus
        lines.append(
            f"{curve.name}: efficiency of 80% up to {curve.reaches(0.8)} GPUs, of 50% up to {curve.reaches(0.5)}; most "
            f"images/s on {max(curve.points, key=lambda point: point.images_per_s).num_gpus}"
        )
        if last < largest:
            lines[-1] += f"; ends at {last}: a batch of {batch} has no image for each of {2 * last}"
    return lines


def assumptions(found: Scaling) -> list[str]:
    """What stands behind the numbers."""
    gpu, first = found.gpu, found.curves[0].points[0]
    layered = (
        f"{HIERARCHICAL}: ZeRO-3 with train.mics_shard_size={first.choice.replica}, replicas side by side"
    )
    return [
        "step s = the larger of (compute + exposed + waits) and input, and saves; exposed: of links and hops, what "
        f"hides behind nothing; waits: for the slowest GPU; share: images/s a GPU over those on {first.num_gpus}",
        f"rates: {gpu.peak_flops / 1e12:.0f} TFLOP/s dense bf16, NVLink {gpu.nvlink / 1e9:.0f} GB/s, InfiniBand "
        f"{gpu.infiniband / 1e9:.0f} GB/s a GPU, one direction (NVIDIA's datasheets), {GPUS_PER_NODE} GPUs a node",
        *[layered] * any(curve.stage == HIERARCHICAL for curve in found.curves),
        *found.assumed.lines(),
    ]


def to_json(found: Scaling) -> dict[str, Any]:
    """Returns all numbers; seconds and bytes."""

    def row(curve: Curve, point: Point) -> dict[str, Any]:
        sent = point.choice.traffic
        named = ("num_gpus", "global_batch", "fits", "flops_s", "launch_s", "links_s", "latency_s", "exposed_s",
                 "waiting_s", "input_s", "checkpoint_s", "step_s", "images_per_s", "bound")  # fmt: skip
        return {name: getattr(point, name) for name in named} | {
            "micro_batch": point.choice.micro_batch, "accumulation": point.choice.accumulation,
            "gathered": sent.gathered, "reduced": sent.reduced, "efficiency": curve.efficiency(point),
        }  # fmt: skip

    return {
        "recipe": found.name, "gpu": dataclasses.asdict(found.gpu), "what": MODELLED,
        "assumptions": dataclasses.asdict(found.assumed),
        "curves": [
            {"kind": curve.kind, "stage": curve.stage, "points": [row(curve, point) for point in curve.points]}
            for curve in found.curves
        ],
    }  # fmt: skip


def plot(found: Scaling, file: str) -> None:
    """Writes a PNG: images a second against GPUs, and the efficiency."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    speed, share = figure.subplots(1, 2)
    first = found.curves[0].points[0]
    sizes = sorted({point.num_gpus for curve in found.curves for point in curve.points})
    ideal = [first.images_per_s / first.num_gpus * size for size in sizes]
    speed.plot(sizes, ideal, color="black", linestyle=":", label="as on the fewest, each")
    for curve in found.curves:
        gpus = [point.num_gpus for point in curve.points]
        line = "-" if curve.kind == "strong" else "--"
        speed.plot(gpus, [point.images_per_s for point in curve.points], line, marker=".", label=curve.name)
        share.plot(gpus, [100 * curve.efficiency(point) for point in curve.points], line, marker=".")
    for axes in (speed, share):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes], rotation=45)
        axes.set_xlabel(f"{found.gpu.name} GPUs")
        axes.grid(alpha=0.3)
    speed.set_yscale("log")
    speed.set_ylabel("images/s")
    speed.legend(fontsize="small")
    share.set_ylabel("efficiency, %")
    share.set_ylim(0, 105)
    figure.suptitle(f"{found.name}: {MODELLED}")
    written(file, lambda: figure.savefig(file, format="png", dpi=110))
