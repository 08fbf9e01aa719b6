"""`fd-scale report`: one page of one run, or of several side by side; it needs no network and no script."""

from __future__ import annotations

import html
import io
import json
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fd_scale import run_folder
from fd_scale.checkpoint import write_atomically
from fd_scale.config import to_dict
from fd_scale.errors import UserError
from fd_scale.metrics import read_metrics
from fd_scale.report.page import document, grid, picture, table

SMOOTHED_LINES = 10
"""Lines of metrics, at most, over which a training curve's mean goes: a tenth of all."""
_TRAINING = {
    "loss": "training loss", "grad_norm": "norm of the gradient", "learning_rate": "learning rate",
    "images_per_s": "images/s", "memory_peak_gib": "peak of memory, GiB",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run's folder says of it."""

    name: str
    folder: Path
    recipe: dict[str, str]
    """Setting -> value."""
    environment: dict[str, str]
    """Of its last start."""
    train: list[dict[str, Any]]
    evaluation: list[dict[str, Any]]
    checkpoints: list[dict[str, Any]]
    """Lines of metrics.jsonl, by kind."""
    kernels: list[str]
    """Which path each op took, as the log says it."""

    @property
    def final(self) -> dict[str, float]:
        """The last evaluation's metrics."""
        last = self.evaluation[-1] if self.evaluation else {}
        return {name: value for name, value in last.items() if name != "kind"}


def report(run_dirs: Sequence[str], out: str | Path | None) -> Path:
    """Writes a page and, beside it, its numbers as JSON.

    Args:
        run_dirs: folders of runs.
        out: the page, a name that ends in .html; none: report.html in the first run's folder.

    Returns:
        The page.

    Raises:
        UserError: a folder is no run, or nothing can be written.
    """
    page = Path(run_dirs[0]) / "report.html" if out is None else Path(out)
    if page.suffix != ".html":
        raise UserError(f"--out {out}: expected a name that ends in .html")
    runs = [_read(Path(folder), run_dirs) for folder in run_dirs]
    body = [
        f"<h1>{html.escape(', '.join(run.name for run in runs))}</h1>",
        "<h2>Results</h2>", table(_results(runs)),
        "<h2>Curves</h2>", grid(_curves(runs)),
        *_pictures(runs),
        "<h2>Settings</h2>", *["<p>Those in which the runs differ.</p>"] * (len(runs) > 1), table(_settings(runs)),
        "<h2>Where it ran</h2>", table(_side_by_side(runs, [run.environment for run in runs])),
        "<h2>Kernels</h2>", table([["run", "path"], *([run.name, line] for run in runs for line in run.kernels)]),
        "<h2>Checkpoints</h2>", table(_checkpoints(runs)),
    ]  # fmt: skip
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(page, document(runs[0].name, body))
        numbers = [
            {"run": str(run.folder), "final": run.final, "recipe": run.recipe, "environment": run.environment}
            for run in runs
        ]
        write_atomically(page.with_suffix(".json"), json.dumps(numbers, indent=1))
    except OSError as error:
        raise UserError(
            f"{page}: cannot be written ({error.strerror}); choose another with --out FILE"
        ) from None
    return page


def _read(folder: Path, all_folders: Sequence[str]) -> Run:
    recipe = run_folder.read_recipe(folder)
    name = folder.resolve().name  # `.` has none
    same = [other for other in all_folders if Path(other).resolve().name == name]
    logs = [path.read_text(encoding="utf-8", errors="replace") for path in folder.glob("logs/rank_0.log")]
    return Run(
        name=name if len(same) == 1 else str(folder),
        folder=folder,
        recipe=dict(_flat(to_dict(recipe))),
        environment=dict(_flat(run_folder.last_start(folder))),
        train=read_metrics(folder, "train"),
        evaluation=read_metrics(folder, "evaluation"),
        checkpoints=read_metrics(folder, "checkpoint"),
        kernels=sorted({found for text in logs for found in re.findall(r"dispatch: (.* runs the .*)", text)}),
    )


def _flat(values: Any, prefix: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(values, dict) and values:
        for name, value in values.items():
            yield from _flat(value, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, str(values)


def _results(runs: Sequence[Run]) -> list[list[str]]:
    names = list(dict.fromkeys(name for run in runs for name in run.final))
    speeds = [
        f"{np.median([line['images_per_s'] for line in run.train]):.4g}" if run.train else "" for run in runs
    ]
    rows = [["", *(run.name for run in runs)], ["task", *(run.recipe["task"] for run in runs)]]
    for name in names:
        values = [run.final.get(name) for run in runs]
        rows.append([name, *("" if value is None else f"{value:.5g}" for value in values)])
    return [*rows, ["images/s, median", *speeds]]


def _curves(runs: Sequence[Run]) -> list[tuple[str, str]]:
    found = []
    for name, title in _TRAINING.items():
        series = [(run.name, run.train, name) for run in runs if any(name in line for line in run.train)]
        if series:
            found.append((title, _curve(series, smooth=name == "loss")))
    # What each run measured once stands among the results.
    measured = dict.fromkeys(
        name
        for run in runs
        if len({line["step"] for line in run.evaluation}) > 1
        for line in run.evaluation
        for name in line
        if name not in ("step", "kind")
    )
    for name in measured:
        series = [(run.name, run.evaluation, name) for run in runs]
        found.append((f"evaluation: {name}", _curve(series, smooth=False)))
    return found


def _curve(series: Sequence[tuple[str, list[dict[str, Any]], str]], smooth: bool) -> str:
    figure = Figure(figsize=(5, 3), layout="constrained")
    axis = figure.subplots()
    for index, (label, lines, name) in enumerate(series):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if not points:
            continue
        steps, values = (np.array(part, dtype=float) for part in zip(*points, strict=True))
        colour = f"C{index}"
        axis.plot(steps, values, color=colour, alpha=0.3 if smooth else 1.0, label=None if smooth else label,
                  marker="o" if len(steps) < 3 else None)  # fmt: skip
        if smooth:
            width = max(1, min(SMOOTHED_LINES, len(values) // 10))
            means = np.convolve(values, np.full(width, 1 / width), mode="valid")
            axis.plot(steps[width - 1 :], means, color=colour, label=label)
    axis.set_xlabel("optimizer step")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    text = io.StringIO()
    figure.savefig(text, format="svg")
    # As a picture of its own: the names inside one SVG would clash with those of the next.
    return picture(text.getvalue().encode(), "svg+xml")


def _pictures(runs: Sequence[Run]) -> list[str]:
    """The last pictures of each run, and those of its diagnosis."""
    found = []
    for run in runs:
        shown = []
        events = EventAccumulator(str(run.folder / "tensorboard"), size_guidance={"images": 1})
        # A resumed run repeats steps, and TensorBoard would warn of them.
        logging.getLogger("tensorboard").setLevel(logging.ERROR)
        events.Reload()
        for tag in events.Tags()["images"]:
            event = events.Images(tag)[-1]
            shown.append((f"{tag}, step {event.step}", picture(event.encoded_image_string)))
        for path in sorted((run.folder / "diagnosis").glob("*.png")):
            shown.append((f"diagnosis: {path.stem}", picture(path.read_bytes())))
        if shown:
            found += [f"<h2>Pictures of {html.escape(run.name)}</h2>", grid(shown)]
    return found


def _settings(runs: Sequence[Run]) -> list[list[str]]:
    rows = _side_by_side(runs, [run.recipe for run in runs])
    return rows if len(runs) == 1 else [rows[0], *(row for row in rows[1:] if len(set(row[1:])) > 1)]


def _side_by_side(runs: Sequence[Run], values: Sequence[dict[str, str]]) -> list[list[str]]:
    names = dict.fromkeys(name for each in values for name in each)
    return [
        ["", *(run.name for run in runs)],
        *([name, *(each.get(name, "") for each in values)] for name in names),
    ]


_NEWEST = 10
"""Checkpoints of a run that are listed; the JSON has all."""


def _checkpoints(runs: Sequence[Run]) -> list[list[str]]:
    rows = [["run", "step", "MB", "training waited, s", "written in, s"]]
    for run in runs:
        if (earlier := len(run.checkpoints) - _NEWEST) > 0:
            rows.append([run.name, f"{earlier} earlier ones", "", "", ""])
        for line in run.checkpoints[-_NEWEST:]:
            sizes = (f"{line['bytes'] / 1e6:.1f}", f"{line['stall_s']:.2f}", f"{line['write_s']:.2f}")
            rows.append([run.name, str(line["step"]), *sizes])
    return rows
