"""`fd-scale miniature`: the paper's experiment on CIFAR-10, as a chain of packaged recipes; told as it came out."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.table import Table

from fd_scale import api
from fd_scale.checkpoint import write_atomically
from fd_scale.compare import compare, launch
from fd_scale.errors import UserError
from fd_scale.log import console
from fd_scale.run_folder import environment, not_writable

NUM_SEEDS = 2
SIDE_BY_SIDE = 2
"""Runs at a time, a core each."""
TEACHERS = {"contrastive": "pretrain", "supervised": "finetune"}
"""Teacher -> the verb that trains it, of recipe miniature/teacher_NAME."""
VARIANTS = {"whitened": "whitened_smooth_l1", "raw": "smooth_l1"}
"""What a student learns from -> `distill.loss`."""
SCRATCH = "scratch"


@dataclass(frozen=True)
class Row:
    """A starting point: top-1 on the test images, in 0..1."""

    teacher: str
    """Empty: there is none."""
    start: str
    """`teacher` itself, a key of `VARIANTS`, or `SCRATCH`."""
    finetune: list[float]
    """One a seed."""
    probe: float | None
    """None: random features are not probed."""


def miniature(data: str, run_dir: str, overrides: Sequence[str] = ()) -> list[Row]:
    """Trains teachers, distils each with and without whitening, fine-tunes and probes before and after.

    Args:
        data: folder of the hub's parquet files of CIFAR-10.
        run_dir: folder of the runs; those that are complete are not repeated, others go on.
        overrides: settings of all runs, for a shorter one.

    Returns:
        A row for each starting point, which results.json, results.md and results.png in `run_dir` hold too.

    Raises:
        UserError: the files are not there, or a run failed.
    """
    began, root, folder = time.perf_counter(), Path(run_dir), Path(data)
    for pattern in ("train-00000-*.parquet", "test-*.parquet"):
        if not list(folder.glob(pattern)):
            raise UserError(
                f"--data {data}: no {pattern} there; expected the files of `uoft-cs/cifar10` on the Hugging Face hub"
            )
    unlabelled = [f"data.train=parquet:{folder}/train-*.parquet", *overrides]
    labelled = [*unlabelled, f"data.evaluation=parquet:{folder}/test-*.parquet"]
    fewer = [f"data.train=parquet:{folder}/train-00000-*.parquet", *labelled[1:]]

    def trained(verb: str, recipe: str, name: str, settings: Sequence[str]) -> str:
        run = launch(verb, f"miniature/{recipe}", root / name, 1, settings, show=False)
        console.print(f"{run}: trained", soft_wrap=True, highlight=False)
        return str(api.export(run, root / f"{name}-export"))

    console.rule("1  Teachers")
    weights: dict[tuple[str, str], str] = {}
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        given = {"pretrain": unlabelled, "finetune": [*labelled, "model.weights=null"]}
        recipes = {name: f"teacher_{name}" for name in TEACHERS}
        paths = pool.map(
            lambda name: trained(TEACHERS[name], recipes[name], recipes[name], given[TEACHERS[name]]),
            TEACHERS,
        )
        weights |= {(name, "teacher"): path for name, path in zip(TEACHERS, paths, strict=True)}
        console.rule("2  Students, each from one teacher, with and without whitening")
        pairs = [(teacher, variant) for teacher in TEACHERS for variant in VARIANTS]

        def distilled(pair: tuple[str, str]) -> str:
            taught = f"distill.teachers.0.model.weights={weights[pair[0], 'teacher']}"
            return trained(
                "distill", "distill", "-".join(pair), [*labelled, taught, f"distill.loss={VARIANTS[pair[1]]}"]
            )

        weights |= dict(zip(pairs, pool.map(distilled, pairs), strict=True))
    starts = {f"{teacher} {start}": [f"model.weights={path}"] for (teacher, start), path in weights.items()}
    console.rule("3  Linear probes")
    probed = compare("miniature/probe", starts, root / "probe", 1, fewer, side_by_side=SIDE_BY_SIDE).top1
    console.rule(f"4  Fine-tuning, {NUM_SEEDS} seeds of each")
    starts |= {SCRATCH: ["model.weights=null"]}
    tuned = compare(
        "miniature/finetune", starts, root / "finetune", NUM_SEEDS, fewer, side_by_side=SIDE_BY_SIDE
    ).top1
    rows = [
        Row(teacher, start, tuned[f"{teacher} {start}"], probed[f"{teacher} {start}"][0])
        for teacher in TEACHERS
        for start in ("teacher", *VARIANTS)
    ]
    rows.append(Row("", SCRATCH, tuned[SCRATCH], None))
    _write(root, rows)
    console.print(table(rows))
    console.print(f"{root}/results.json, results.png; took {(time.perf_counter() - began) / 60:.1f} minutes.")
    return rows


def table(rows: Sequence[Row]) -> Table:
    """Means over seeds, spread, and what a student has over its teacher, in points, seed by seed."""
    shown = Table("teacher", "start", "fine-tuned", "each seed", "over its teacher", "probe")
    own = {row.teacher: row.finetune for row in rows if row.start == "teacher"}
    for row in rows:
        gains = [
            100 * (value - other)
            for value, other in zip(row.finetune, own.get(row.teacher, []), strict=False)
        ]
        shown.add_row(
            row.teacher, row.start, f"{statistics.mean(row.finetune):.1%}",
            ", ".join(f"{value:.1%}" for value in row.finetune),
            ", ".join(f"{gain:+.1f}" for gain in gains) if row.start in VARIANTS else "",
            "" if row.probe is None else f"{row.probe:.1%}",
        )  # fmt: skip
    return shown


def _write(root: Path, rows: Sequence[Row]) -> None:
    found = environment()
    kept = {name: found[name] for name in ("commit", "time", "versions", "gpus")}
    values = [
        {"teacher": row.teacher, "start": row.start, "finetune": row.finetune, "probe": row.probe}
        for row in rows
    ]
    try:
        write_atomically(root / "results.json", json.dumps({"environment": kept, "rows": values}, indent=1))
        _plot(root / "results.png", rows)
    except OSError as error:
        raise not_writable(root, error) from None


def _plot(path: Path, rows: Sequence[Row]) -> None:
    figure, axis = plt.subplots(figsize=(8, 3.8), constrained_layout=True)
    for place, row in enumerate(rows):
        axis.scatter([place] * len(row.finetune), [100 * value for value in row.finetune], color="C0")
        axis.hlines(100 * statistics.mean(row.finetune), place - 0.2, place + 0.2, color="C0")
        if row.probe is not None:
            axis.scatter([place], [100 * row.probe], color="C1", marker="x")
    axis.scatter([], [], color="C0", label="fine-tuned, a point each seed")
    axis.scatter([], [], color="C1", marker="x", label="linear probe")
    axis.set(ylabel="top-1 on CIFAR-10 (%)", xticks=range(len(rows)))
    axis.set_xticklabels([f"{row.teacher}\n{row.start}".strip() for row in rows])
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
