"""`fd-scale demo`: the whole story as a chain of packaged recipes, measured and told as it came out."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.table import Table

from fd_scale import api
from fd_scale.errors import UserError
from fd_scale.log import console
from fd_scale.metrics import read_metrics

NUM_RANKS = 2


def demo(run_dir: str, num_seeds: int) -> dict[str, list[float]]:
    """Pre-trains, distils on two processes, fine-tunes from three starting points, reports.

    Args:
        run_dir: folder of the runs; runs that are complete there are not repeated.
        num_seeds: fine-tunings of each starting point.

    Returns:
        Top-1 on the test digits, one value a seed, by starting point.
    """
    if num_seeds < 1:
        raise UserError(f"--seeds: got {num_seeds}, expected at least 1")
    began = time.perf_counter()
    root = Path(run_dir)
    console.rule("1  Pre-training a teacher: contrastive, labels unused")
    teacher_run = _launch("pretrain", "digits/teacher", root / "teacher", NUM_RANKS, [])
    teacher = str(api.export(teacher_run, root / "teacher-export"))
    console.rule(f"2  Distilling it into a student: ZeRO-3 on {NUM_RANKS} processes")
    weights = f"distill.teachers.0.model.weights={teacher}"
    student_run = _launch("distill", "digits/distill", root / "distill", NUM_RANKS, [weights])
    student = str(api.export(student_run, root / "student-export"))
    console.rule(f"3  Fine-tuning on labels: three starting points, {num_seeds} seeds each")
    starts = {"teacher, directly": teacher, "distilled student": student, "from scratch": "null"}
    runs = {
        name: [
            root / f"finetune-{name.replace(', ', '-').replace(' ', '-')}-{seed}" for seed in range(num_seeds)
        ]
        for name in starts
    }
    jobs = [
        (run, [f"model.weights={starts[name]}", f"seed={seed}"])
        for name, of_start in runs.items()
        for seed, run in enumerate(of_start)
    ]
    _finetune(jobs)
    top1 = {name: [_last(run)["top1"] for run in of_start] for name, of_start in runs.items()}
    picture = _plot(root / "curves.png", teacher_run, student_run, runs)
    _report(top1, root, picture, time.perf_counter() - began)
    return top1


def _launch(
    verb: str, recipe: str, run_dir: Path, num_ranks: int, settings: list[str], show: bool = True
) -> Path:
    """Runs a verb as a user would: alone, or under torchrun; each process has a core of its own."""
    arguments = ["-m", "fd_scale", verb, recipe, f"run_dir={run_dir}", *settings]
    launcher = [sys.executable]
    if num_ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    done = subprocess.run(
        [*launcher, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
        stderr=None if show else subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise UserError(
            f"demo: `fd-scale {verb} {recipe}` ended with code {done.returncode}: "
            f"{'see above' if show else done.stderr.strip()}"
        )
    return run_dir


def _finetune(jobs: list[tuple[Path, list[str]]]) -> None:
    """Runs fine-tunings side by side, as many as there were ranks before."""
    with ThreadPoolExecutor(NUM_RANKS) as pool:
        started = [
            pool.submit(_launch, "finetune", "digits/finetune", run, 1, settings, show=False)
            for run, settings in jobs
        ]
        for done in as_completed(started):
            run = done.result()
            console.print(f"{run}: top-1 {_last(run)['top1']:.1%}", soft_wrap=True, highlight=False)


def _last(run: Path) -> dict[str, Any]:
    return read_metrics(run, "evaluation")[-1]


def _plot(path: Path, teacher_run: Path, student_run: Path, runs: dict[str, list[Path]]) -> Path:
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), constrained_layout=True)
    titles = ("pre-training: NT-Xent (nats)", "distillation: smooth L1", "fine-tuning: cross entropy (nats)")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="optimizer step")
        axis.grid(alpha=0.3)
    for axis, run in zip(axes, (teacher_run, student_run), strict=False):
        lines = read_metrics(run, "train")
        axis.plot([line["step"] for line in lines], [line["loss"] for line in lines])
    for index, (name, of_start) in enumerate(runs.items()):
        for run in of_start:
            lines = read_metrics(run, "train")
            axes[2].plot(
                [line["step"] for line in lines], [line["loss"] for line in lines], color=f"C{index}",
                alpha=0.7, label=name if run is of_start[0] else None,
            )  # fmt: skip
    axes[2].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _report(top1: dict[str, list[float]], root: Path, picture: Path, seconds: float) -> None:
    table = Table(title="Top-1 on 300 test digits after equal fine-tuning")
    for column in ("start", "mean", "s.d. over seeds", "each seed"):
        table.add_column(column)
    for name, values in top1.items():
        spread = f"{statistics.stdev(values):.1%}" if len(values) > 1 else "one seed"
        table.add_row(
            name, f"{statistics.mean(values):.1%}", spread, "  ".join(f"{value:.1%}" for value in values)
        )
    console.print(table)
    teacher, student, scratch = (statistics.mean(values) for values in top1.values())
    console.print(
        f"The distilled student is {100 * (student - teacher):+.1f} points from its teacher and "
        f"{100 * (student - scratch):+.1f} points from a student that starts from scratch.",
        highlight=False,
    )
    console.print(f"Runs:         {root}/teacher, {root}/distill, {root}/finetune-*", soft_wrap=True)
    console.print(f"Curves:       {picture}", soft_wrap=True)
    console.print(f"TensorBoard:  tensorboard --logdir {root}", soft_wrap=True)
    console.print(f"Took {seconds / 60:.1f} minutes.")
