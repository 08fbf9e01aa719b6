"""`fd-scale compare`: one fine-tuning from several starting points, over seeds; each run is an ordinary run folder."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from fd_scale.checkpoint import write_atomically
from fd_scale.config import load_recipe
from fd_scale.errors import UserError
from fd_scale.launch import Launcher, concurrently, is_evaluated
from fd_scale.log import console
from fd_scale.metrics import read_metrics
from fd_scale.run_folder import not_writable

METRICS = {"classification": "top1", "linear_probe": "top1", "segmentation": "miou", "detection": "box_ap"}
"""Of each task that can be compared."""
NAMES = {"top1": "top-1", "miou": "mIoU", "box_ap": "box AP"}
"""Of the metrics, as people write them."""
DEFAULT = Launcher()


@dataclass(frozen=True)
class Comparison:
    """A metric of each starting point, in 0..1, one value a seed."""

    values: dict[str, list[float]]
    metric: str = "top1"

    @property
    def reference(self) -> str:
        """The starting point that the others are compared with: the first."""
        return next(iter(self.values))

    def differences(self, name: str) -> list[float]:
        """The metric of a starting point less the reference's, seed by seed: both saw the same order and crops."""
        return [
            own - other for own, other in zip(self.values[name], self.values[self.reference], strict=True)
        ]

    def to_json(self) -> dict[str, object]:
        """Returns plain values."""
        return {
            name: {
                self.metric: values, "mean": statistics.mean(values), "sd": _spread(values),
                "difference": statistics.mean(self.differences(name)), "difference_sd": _spread(self.differences(name)),
            }
            for name, values in self.values.items()
        }  # fmt: skip

    def table(self) -> Table:
        """Means, spread, and paired differences, in points."""
        table = Table(
            "start",
            f"{NAMES[self.metric]}, mean",
            "s.d. over seeds",
            f"less {self.reference}, paired",
            "each seed",
        )
        for name, values in self.values.items():
            spread, pairs = _spread(values), self.differences(name)
            paired = f"{100 * statistics.mean(pairs):+.1f}" + (
                "" if _spread(pairs) is None else f" (s.d. {100 * (_spread(pairs) or 0):.1f})"
            )
            table.add_row(
                name, f"{statistics.mean(values):.1%}", "one seed" if spread is None else f"{spread:.1%}",
                "" if name == self.reference else paired, "  ".join(f"{value:.1%}" for value in values),
            )  # fmt: skip
        return table


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def compare(
    recipe: str,
    starts: Mapping[str, Sequence[str]],
    run_dir: str | Path,
    num_seeds: int,
    overrides: Sequence[str] = (),
    *,
    launcher: Launcher = DEFAULT,
    side_by_side: int = 1,
) -> Comparison:
    """Fine-tunes from each starting point with each seed; runs that are complete are not repeated, others go on.

    Args:
        recipe: of a task of `METRICS`, with images to evaluate on.
        starts: name -> settings, such as `model.weights=PATH`; the first is what the others are compared with.
        run_dir: folder of the runs, NAME-SEED each, and of compare.json and compare.png.
        num_seeds: seeds 0 to `num_seeds` - 1.
        overrides: settings of all runs.
        launcher: how each run is started.
        side_by_side: runs at a time.

    Raises:
        UserError: the recipe does not allow it, or a run failed.
    """
    if num_seeds < 1:
        raise UserError(f"--seeds: got {num_seeds}, expected at least 1")
    for option, value in (("--ranks", launcher.num_ranks), ("--side-by-side", side_by_side)):
        if value < 1:
            raise UserError(f"{option}: got {value}, expected at least 1")
    if len(starts) < 2:
        raise UserError(f"--start: got {len(starts)}, expected two starting points or more to compare")
    root = Path(run_dir)
    jobs = _jobs(recipe, starts, root, num_seeds, overrides)
    metric = METRICS[load_recipe(recipe, list(overrides)).task]
    missing = {
        folder: settings for folder, settings in jobs.items() if not is_evaluated(folder, recipe, settings)
    }
    run = partial(launcher.run, "finetune", recipe)
    for folder in concurrently(run, missing.items(), side_by_side):
        console.print(
            f"{folder}: {NAMES[metric]} {_metric(folder, metric):.1%}", soft_wrap=True, highlight=False
        )
    result = Comparison(
        {name: [_metric(_folder(root, name, seed), metric) for seed in range(num_seeds)] for name in starts},
        metric,
    )
    try:
        write_atomically(root / "compare.json", json.dumps(result.to_json(), indent=1))
        _plot(root / "compare.png", root, result)
    except OSError as error:
        raise not_writable(root, error, "--run-dir") from None
    return result


def _jobs(
    recipe: str, starts: Mapping[str, Sequence[str]], root: Path, num_seeds: int, overrides: Sequence[str]
) -> dict[Path, list[str]]:
    """Returns run folder -> settings of every run, all of them checked before the first begins."""
    jobs: dict[Path, list[str]] = {}
    for name in starts:
        if not re.fullmatch(r"[\w.+ ,-]+", name):
            raise UserError(
                f"--start {name}: a name becomes part of a folder's; expected letters, digits, - and _"
            )
    for seed in range(num_seeds):  # all starting points with the first one first
        for name, settings in starts.items():
            jobs[_folder(root, name, seed)] = [*overrides, *settings, f"seed={seed}"]
    if len(jobs) < len(starts) * num_seeds:
        raise UserError(f"--start: {', '.join(starts)} do not make different folders; choose other names")
    for settings in jobs.values():
        found = load_recipe(recipe, settings)
        if found.task not in METRICS or found.data.evaluation is None:
            raise UserError(f"{recipe}: expected a task of {', '.join(METRICS)}, with data.evaluation")
    return jobs


def _folder(root: Path, name: str, seed: int) -> Path:
    return root / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"


def _metric(folder: Path, metric: str) -> float:
    lines = read_metrics(folder, "evaluation")
    if not lines or (folder / "preempt").exists():  # a run that is complete removes it
        raise UserError(f"{folder}: the run was stopped before its last step; the same command goes on")
    return float(lines[-1][metric])


def _plot(path: Path, root: Path, result: Comparison) -> None:
    """Training losses, and beside them the metric, where each name stands in the colour of its losses."""
    height = max(3.6, 1 + 0.26 * len(result.values))
    figure = Figure(figsize=(11, height), layout="constrained")
    curves, points = figure.subplots(1, 2)
    for index, (name, values) in enumerate(result.values.items()):
        for seed in range(len(values)):
            lines = read_metrics(_folder(root, name, seed), "train")
            curves.plot(
                [line["step"] for line in lines],
                [line["loss"] for line in lines],
                color=f"C{index}",
                alpha=0.7,
                marker="." if len(lines) == 1 else None,
            )
        points.scatter([100 * value for value in values], [index] * len(values), color=f"C{index}")
        points.vlines(100 * statistics.mean(values), index - 0.3, index + 0.3, color=f"C{index}")
    curves.set(title="training loss (nats)", xlabel="optimizer step")
    points.set(title=f"{NAMES[result.metric]} (%), a point each seed", yticks=range(len(result.values)))
    for index, label in enumerate(points.set_yticklabels(list(result.values))):
        label.set_color(f"C{index}")
    points.invert_yaxis()
    for axis in (curves, points):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
