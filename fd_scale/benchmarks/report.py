"""The table of what was measured, and the goals that whole steps are held to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich.table import Table

from fd_scale.benchmarks.cells import PEERS, TIMM_COMPILED
from fd_scale.benchmarks.records import Record, Records
from fd_scale.log import results

NOT_MEASURED = "not measured"
LEAST_MFU = 0.45
LEAST_RATIO = 1.5
MOST_OFF_BY = 0.1


@dataclass(frozen=True, slots=True)
class Goal:
    """A number that should be reached, and what was measured."""

    meaning: str
    found: str | None
    """None: not measured."""
    met: bool = False

    def __str__(self) -> str:
        found = NOT_MEASURED if self.found is None else f"{self.found}, {'met' if self.met else 'missed'}"
        return f"{self.meaning}: {found}"


def goals(records: Iterable[Record]) -> list[Goal]:
    """The goals: MFU of G, B beside timm compiled, the plan of memory."""
    whole = [record for record in records if record.median_ms is not None]
    ours = [record for record in whole if _way(record) not in PEERS and "reference" not in _way(record)]
    utilised = max((record.mfu for record in ours if _model(record) == "G" and record.mfu), default=None)
    ratios = [
        ratio
        for record in ours
        if _model(record) == "B" and (ratio := _ratios(record, whole).get(TIMM_COMPILED))
    ]
    ratio = max(ratios, default=None)
    worst = max(
        (record.plan_off_by for record in ours if record.plan_off_by is not None), key=abs, default=None
    )
    return [
        Goal(
            f"MFU of SwinV2-G >= {LEAST_MFU:.0%}",
            None if utilised is None else f"{utilised:.1%}", (utilised or 0) >= LEAST_MFU,
        ),
        Goal(
            f"SwinV2-B, images/s over timm compiled >= {LEAST_RATIO:g}",
            None if ratio is None else f"{ratio:.2f}", (ratio or 0) >= LEAST_RATIO,
        ),
        Goal(
            f"plan within {MOST_OFF_BY:.0%} of the peak of memory",
            None if worst is None else f"{worst:+.1%} at the worst", worst is not None and abs(worst) <= MOST_OFF_BY,
        ),
    ]  # fmt: skip


def table(records: Records) -> Table:
    """One row a cell, in the order in which they were measured first."""
    shown = Table(
        "cell", "ms a step, median (deciles)", "images/s", "MFU", "peak GiB", "reserved", "plan GiB", "off by",
        "forward / backward / optimizer", "over peers",
        title=f"Whole distillation steps on {records.latest.gpu}",
    )  # fmt: skip
    for record in records.by_cell.values():
        if record.error is not None:
            shown.add_row(record.cell, record.error)
            continue
        ratios = _ratios(record, records.by_cell.values()).items()
        shown.add_row(
            record.cell,
            f"{record.median_ms:.1f} ({record.p10_ms:.1f} to {record.p90_ms:.1f})",
            f"{record.images_per_s:.1f}",
            _cell(record.mfu, "{:.1%}"),
            *(_cell(value, "{:.2f}") for value in (record.peak_gib, record.reserved_gib, record.plan_gib)),
            _cell(record.plan_off_by, "{:+.1%}"),
            " / ".join(
                f"{record.phases_s[name]:.3f}"
                for name in ("forward", "backward", "optimizer")
                if name in record.phases_s
            ),
            ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios),
        )
    return shown


def show(records: Records | None) -> None:
    """Prints the table, what it was measured with, and the goals."""
    console = results(200)
    if records is None or not records.by_cell:
        console.print(f"Whole steps on one GPU: {NOT_MEASURED}")
    else:
        console.print(table(records))
        for environment in dict.fromkeys(
            f"{', '.join(f'{name} {version}' for name, version in record.environment.versions.items())}; "
            f"commit {record.environment.commit}, source {record.environment.source}"
            for record in records.by_cell.values()
        ):
            console.print(environment, soft_wrap=True, highlight=False)
    for goal in goals([] if records is None else records.by_cell.values()):
        console.print(f"goal: {goal}", soft_wrap=True, highlight=False)


def _ratios(record: Record, others: Iterable[Record]) -> dict[str, float]:
    """Images/s of one of ours over those of each peer with the same model and micro-batch."""
    if record.images_per_s is None or _way(record) in PEERS:
        return {}
    return {
        _way(other): record.images_per_s / other.images_per_s
        for other in others
        if _way(other) in PEERS
        and (_model(other), other.micro_batch) == (_model(record), record.micro_batch)
        and other.images_per_s is not None
    }


def _model(record: Record) -> str:
    return record.cell.split()[0]


def _way(record: Record) -> str:
    return record.cell.split()[-1]


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
