"""What came of a miniature: rows as JSON, a table and a plot."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from fd_scale.checkpoint import write_atomically
from fd_scale.run_folder import environment, not_writable

TEACHER, SCRATCH = "teacher", "scratch"


@dataclass(frozen=True)
class Row:
    """A starting point: top-1 on the test images, in 0..1."""

    architecture: str
    teacher: str
    """Empty: there is none."""
    start: str
    """`TEACHER`: itself; `SCRATCH`; or the variant of a student."""
    finetune: list[float]
    """One a seed."""
    probe: float | None
    """None: random features are not probed."""


def table(rows: Sequence[Row]) -> Table:
    """Means over seeds, each seed, and what a student has over its teacher, in points, seed by seed."""
    shown = Table("model", "teacher", "start", "fine-tuned", "each seed", "over its teacher", "probe")
    own = {(row.architecture, row.teacher): row.finetune for row in rows if row.start == TEACHER}
    for row in rows:
        reference = own.get((row.architecture, row.teacher), [])
        gains = [100 * (value - other) for value, other in zip(row.finetune, reference, strict=False)]
        shown.add_row(
            row.architecture, row.teacher, row.start, f"{statistics.mean(row.finetune):.1%}",
            ", ".join(f"{value:.1%}" for value in row.finetune),
            "" if row.start == TEACHER else ", ".join(f"{gain:+.1f}" for gain in gains),
            "" if row.probe is None else f"{row.probe:.1%}",
        )  # fmt: skip
    return shown


def write(root: Path, rows: Sequence[Row]) -> None:
    """Writes results.json and results.png.

    Raises:
        UserError: the folder cannot be written.
    """
    found = environment()
    kept = {name: found[name] for name in ("commit", "time", "versions", "gpus")}
    values = {"environment": kept, "rows": [asdict(row) for row in rows]}
    try:
        write_atomically(root / "results.json", json.dumps(values, indent=1))
        _plot(root / "results.png", rows)
    except OSError as error:
        raise not_writable(root, error, "--run-dir") from None


def _plot(path: Path, rows: Sequence[Row]) -> None:
    names = list(dict.fromkeys(row.architecture for row in rows))
    parts = [[row for row in rows if row.architecture == name] for name in names]
    figure = Figure(figsize=(2 + 0.55 * len(rows), 4.2), layout="constrained")
    widths = [len(part) for part in parts]
    axes = figure.subplots(1, len(parts), squeeze=False, sharey=True, width_ratios=widths)
    for axis, name, part in zip(axes[0], names, parts, strict=True):
        _panel(axis, name, part)
    axes[0, 0].set_ylabel("top-1 on CIFAR-10 (%)")
    axes[0, 0].legend()
    figure.savefig(path, dpi=120)


def _panel(axis: Axes, name: str, rows: Sequence[Row]) -> None:
    for place, row in enumerate(rows):
        axis.scatter([place] * len(row.finetune), [100 * value for value in row.finetune], color="C0")
        axis.hlines(100 * statistics.mean(row.finetune), place - 0.2, place + 0.2, color="C0")
        if row.probe is not None:
            axis.scatter([place], [100 * row.probe], color="C1", marker="x")
    axis.scatter([], [], color="C0", label="fine-tuned, a point each seed")
    axis.scatter([], [], color="C1", marker="x", label="linear probe")
    axis.set(title=name, xticks=range(len(rows)))
    axis.set_xticklabels([f"{row.teacher} {row.start}".strip() for row in rows], rotation=60, ha="right")
    axis.grid(alpha=0.3)
