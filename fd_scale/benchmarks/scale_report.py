"""The table of `bench scale`: predicted beside measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich.table import Table

from fd_scale.benchmarks.records import Record
from fd_scale.benchmarks.report import NOT_MEASURED
from fd_scale.config import load_recipe
from fd_scale.hardware import Gpu, find_gpu, named_like
from fd_scale.log import results
from fd_scale.plan import count, plan
from fd_scale.plan.scaling import Assumptions, Point, expected_maximum, predict

_STAND_IN = "a100-40g"


def show(name: str, records: Sequence[Record], assumed: Assumptions) -> None:
    """Prints the records of a recipe, smallest size first, beside what `plan --scaling` predicts for their sizes."""
    console = results(uncut=True)
    whole = [record for record in records if record.median_ms is not None]
    table = Table(
        "ranks", "micro", "predicted s", "measured", "predicted images/s", "measured", "predicted share",
        "measured", "predicted MB sent", "measured", title=f"{name}: a step on more and more ranks",
    )  # fmt: skip
    points, assumed = predictions(whole, assumed)
    for record in records:
        if record.median_ms is None:
            table.add_row(str(record.num_ranks), str(record.micro_batch), "", record.error)
    for record, point in zip(whole, points, strict=True):
        table.add_row(*_row(record, point, whole[0], points[0]))
    if not records:
        console.print(f"{name}: {NOT_MEASURED}")
        return
    console.print(table)
    if whole:
        for line in _notes(whole[0], assumed):
            console.print(line, soft_wrap=True, highlight=False)


def predictions(records: Sequence[Record], assumed: Assumptions) -> tuple[list[Point], Assumptions]:
    """Predicts the steps of measured sizes.

    The first size says how quickly these devices compute and, where it outran the assumed host, how quickly theirs
    launches, so that what is compared is the scaling.

    Returns:
        A point for each record, and the assumptions with the utilisation and host time of the first one.
    """
    if not records:
        return [], assumed
    recipes = [load_recipe(record.recipe, record.settings) for record in records]
    counts = count(recipes[0])

    def points(assumed: Assumptions) -> list[Point]:
        plans = (
            plan(
                record.recipe, recipe, _gpu(record), record.num_ranks, images=0, utilisation=assumed.utilisation,
                counts=counts,
            )
            for record, recipe in zip(records, recipes, strict=True)
        )  # fmt: skip
        return [predict(planned, assumed) for planned in plans]

    busy_s = _seconds(records[0]) / (1 + assumed.jitter * expected_maximum(records[0].num_ranks))
    first = points(assumed)[0]
    found = replace(
        assumed,
        utilisation=min(1.0, assumed.utilisation * first.flops_s / busy_s),
        launch_us=assumed.launch_us * busy_s / max(busy_s, first.launch_s),
    )
    return points(found), found


def _row(record: Record, point: Point, first: Record, first_point: Point) -> list[str]:
    assert record.images_per_s is not None, "it is whole"
    assert first.images_per_s is not None, "it is whole"
    predicted = point.global_batch / point.training_s
    alone = first_point.global_batch / first_point.training_s / first.num_ranks
    share = record.images_per_s / record.num_ranks / (first.images_per_s / first.num_ranks)
    sent = point.choice.traffic.gathered + point.choice.traffic.reduced
    return [
        str(record.num_ranks), f"{point.choice.accumulation} x {record.micro_batch}", f"{point.training_s:.4f}",
        f"{_seconds(record):.4f}", f"{predicted:.1f}",
        f"{record.images_per_s:.1f}", f"{predicted / record.num_ranks / alone:.1%}", f"{share:.1%}",
        f"{sent / 1e6:.3f}", "" if record.sent_bytes is None else f"{record.sent_bytes / 1e6:.3f}",
    ]  # fmt: skip


def _notes(first: Record, assumed: Assumptions) -> list[str]:
    gpu = _gpu(first)
    known = bool(named_like(first.environment.gpu))
    return [
        f"measured on {first.environment.gpu}, commit {first.environment.commit}, {first.num_steps} steps: medians; "
        "images are noise in memory, and nothing is saved",
        f"predicted with the links of {gpu.name}{'' if known else ', which stand in for those that are here'}, and "
        f"utilisation = {assumed.utilisation:.3g} and launch_us = {assumed.launch_us:.3g}, which the fewest ranks "
        "allow; the rest as `fd-scale plan --scaling` prints",
        "share: images/s a rank over those on the fewest; MB sent: by a rank, a step",
    ]


def _gpu(record: Record) -> Gpu:
    return next(iter(named_like(record.environment.gpu)), find_gpu(_STAND_IN))


def _seconds(record: Record) -> float:
    assert record.median_ms is not None, "it is whole"
    return record.median_ms / 1e3
