"""Teachers, students, probes, fine-tuning: the chain of a miniature's runs."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from fd_scale import api
from fd_scale.errors import UserError
from fd_scale.launch import Launcher, concurrently, is_of
from fd_scale.log import console
from fd_scale.miniature.results import SCRATCH, TEACHER, Row, table, write
from fd_scale.miniature.studies import DROP_PATH, STUDIES, VARIANTS, Architecture, Model, Study, Variant
from fd_scale.verbs.compare import compare

TRAIN, FEWER, TEST = "train-*.parquet", "train-00000-*.parquet", "test-*.parquet"


@dataclass(frozen=True)
class Start:
    """Something that is probed and fine-tuned."""

    architecture: str
    teacher: str
    name: str
    model: Model
    weights: str | None

    @property
    def title(self) -> str:
        """Its name among all."""
        return " ".join(filter(None, (self.architecture, self.teacher, self.name)))

    def settings(self, **overrides: Any) -> list[str]:
        """Settings that make a recipe begin there."""
        return [*self.model.settings(**overrides), f"model.weights={self.weights or 'null'}"]


def miniature(
    study: str, data: str, run_dir: str, overrides: Sequence[str] = (), minutes: float | None = None
) -> list[Row]:
    """Trains teachers, distils each in several ways, probes and fine-tunes before and after.

    Args:
        study: a key of `STUDIES`.
        data: folder of the hub's parquet files of CIFAR-10.
        run_dir: folder of the runs; those that are complete are not repeated, others go on.
        overrides: settings of all runs, for a shorter one.
        minutes: after them runs are preempted; none: never.

    Returns:
        A row for each starting point, which results.json and results.png in `run_dir` hold too.

    Raises:
        OutOfTimeError: the minutes were not enough; the next call goes on.
        UserError: the files are not there, or a run failed.
    """
    for pattern in (FEWER, TEST):
        if not list(Path(data).glob(pattern)):
            raise UserError(
                f"--data {data}: no {pattern} there; expected the files of `uoft-cs/cifar10` on the Hugging Face hub"
            )
    if minutes is not None and minutes <= 0:
        raise UserError(f"--minutes: got {minutes:g}, expected more than 0")
    began = time.monotonic()
    end = inf if minutes is None else began + 60 * minutes
    rows = _Miniature(STUDIES[study], Path(data), Path(run_dir), overrides, Launcher(end=end)).run()
    console.print(table(rows))
    console.print(f"{run_dir}/results.json, results.png; took {(time.monotonic() - began) / 60:.1f} minutes.")
    return rows


class _Miniature:
    def __init__(
        self, study: Study, data: Path, root: Path, overrides: Sequence[str], launcher: Launcher
    ) -> None:
        self.study, self.root, self.overrides, self.launcher = study, root, overrides, launcher
        self.images = [f"data.train=parquet:{data / TRAIN}"]
        self.labelled = [*self.images, f"data.evaluation=parquet:{data / TEST}"]
        self.fewer = [f"data.train=parquet:{data / FEWER}", self.labelled[1]]

    def run(self) -> list[Row]:
        """Runs all that is not complete; writes and returns the rows."""
        architectures = self.study.architectures
        console.rule("1  Teachers")
        teachers = self._made(
            self._teacher, [(name, teacher) for name in architectures for teacher in self.study.teachers]
        )
        console.rule("2  Students")
        students = self._made(
            self._student,
            [
                (teacher, name, variant)
                for teacher in teachers
                for name, variant in self._variants(teacher).items()
            ],
        )  # fmt: skip
        starts = [*teachers, *students]
        console.rule("3  Linear probes")
        probes = self._compare("probe", starts, 1, self.study.of("probe"))
        scratch = [Start(name, "", SCRATCH, each.tuned, None) for name, each in architectures.items()]
        console.rule(f"4  Fine-tuning, {self.study.num_seeds} seeds of each")
        tuned = self._compare(
            "finetune", [*starts, *scratch], self.study.num_seeds, self.study.of("finetune"), **DROP_PATH
        )
        rows = [
            Row(
                start.architecture, start.teacher, start.name, tuned[start.title],
                probes[start.title][0] if start.weights else None,
            )
            for start in sorted([*starts, *scratch], key=self._place)
        ]  # fmt: skip
        write(self.root, rows)
        return rows

    def _variants(self, teacher: Start) -> dict[str, Variant]:
        """Those that every teacher has; of the first one, all."""
        more = self.study.architectures[teacher.architecture].ablations
        return VARIANTS | (dict(more) if teacher.teacher == next(iter(self.study.teachers)) else {})

    def _place(self, start: Start) -> tuple[int, int]:
        """Architecture by architecture, and there teacher by teacher, what has none at the end."""
        teachers = [*self.study.teachers, ""]
        return [*self.study.architectures].index(start.architecture), teachers.index(start.teacher)

    def _teacher(self, architecture: str, name: str) -> Start:
        of, teaching = self.study.architectures[architecture], self.study.teachers[name]
        recipe = f"teacher_{name}"
        model = of.teacher.settings(**of.teacher_init, **teaching.overrides)
        images = self.labelled if teaching.labelled else self.images
        weights = self._trained(teaching.verb, recipe, f"{architecture}-{recipe}", [*images, *model])
        return Start(architecture, name, TEACHER, of.teacher, weights)

    def _student(self, teacher: Start, name: str, variant: Variant) -> Start:
        of: Architecture = self.study.architectures[teacher.architecture]
        settings = [
            *self.labelled,
            *(variant.student or of.student).settings(**DROP_PATH),
            *teacher.model.settings("distill.teachers.0.model"),
            f"distill.teachers.0.model.weights={teacher.weights}",
            *variant.settings,
        ]
        folder = "-".join((teacher.architecture, teacher.teacher, name.replace(" ", "-")))
        weights = self._trained("distill", "distill", folder, settings)
        return Start(teacher.architecture, teacher.teacher, name, variant.student or of.tuned, weights)

    def _trained(self, verb: str, recipe: str, folder: str, settings: Sequence[str]) -> str:
        """Returns the exported weights of a run that is complete, or is now."""
        named = f"miniature/{recipe}"
        settings = [*settings, *self.study.of(recipe), *self.overrides]
        run, out = self.root / folder, self.root / f"{folder}-export"
        if not (out.exists() and is_of(run, named, settings)):
            shutil.rmtree(out, ignore_errors=True)  # it says that the run is complete
            self.launcher.run(verb, named, run, settings)
            api.export(run, out)
            console.print(f"{run}: trained", soft_wrap=True, highlight=False)
        return str(out)

    def _made(self, function: Callable[..., Start], arguments: Iterable[tuple[Any, ...]]) -> list[Start]:
        return list(concurrently(function, arguments, self.study.side_by_side))

    def _compare(
        self, recipe: str, starts: Sequence[Start], num_seeds: int, settings: Sequence[str], **overrides: Any
    ) -> dict[str, list[float]]:
        return compare(
            f"miniature/{recipe}", {start.title: start.settings(**overrides) for start in starts}, self.root / recipe,
            num_seeds, [*self.fewer, *settings, *self.overrides], launcher=self.launcher,
            side_by_side=self.study.side_by_side,
        ).values  # fmt: skip
