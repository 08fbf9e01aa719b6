"""`fd-scale demo`: the whole story as a chain of packaged recipes, measured and told as it came out."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from matplotlib.figure import Figure

from fd_scale import api
from fd_scale.errors import UserError
from fd_scale.launch import Launcher
from fd_scale.log import console
from fd_scale.metrics import read_metrics
from fd_scale.verbs.compare import Comparison, compare

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
    root, launcher = Path(run_dir), Launcher(num_ranks=NUM_RANKS, show=True)
    console.rule("1  Pre-training a teacher: contrastive, labels unused")
    teacher_run = launcher.run("pretrain", "digits/teacher", root / "teacher", [])
    teacher = str(api.export(teacher_run, root / "teacher-export"))
    console.rule(f"2  Distilling it into a student: ZeRO-3 on {NUM_RANKS} processes")
    weights = f"distill.teachers.0.model.weights={teacher}"
    student_run = launcher.run("distill", "digits/distill", root / "distill", [weights])
    student = str(api.export(student_run, root / "student-export"))
    console.rule(f"3  Fine-tuning on labels: three starting points, {num_seeds} seeds each")
    starts = {
        "teacher, directly": [f"model.weights={teacher}"],
        "distilled student": [f"model.weights={student}"],
        "from scratch": ["model.weights=null"],
    }
    found = compare("digits/finetune", starts, root / "finetune", num_seeds, side_by_side=NUM_RANKS)
    picture = _plot(root / "curves.png", teacher_run, student_run)
    _report(found, root, picture, time.perf_counter() - began)
    return found.values


def _plot(path: Path, teacher_run: Path, student_run: Path) -> Path:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    titles = ("pre-training: NT-Xent (nats)", "distillation: smooth L1")
    for axis, title, run in zip(axes, titles, (teacher_run, student_run), strict=True):
        lines = read_metrics(run, "train")
        axis.plot([line["step"] for line in lines], [line["loss"] for line in lines])
        axis.set(title=title, xlabel="optimizer step")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return path


def _report(found: Comparison, root: Path, picture: Path, seconds: float) -> None:
    console.print("Top-1 on 300 test digits after equal fine-tuning:")
    console.print(found.table())
    teacher, student, scratch = (statistics.mean(values) for values in found.values.values())
    console.print(
        f"The distilled student is {100 * (student - teacher):+.1f} points from its teacher and "
        f"{100 * (student - scratch):+.1f} points from a student that starts from scratch.",
        highlight=False,
    )
    console.print(f"Runs:         {root}/teacher, {root}/distill, {root}/finetune/*", soft_wrap=True)
    console.print(f"Curves:       {picture}, {root}/finetune/compare.png", soft_wrap=True)
    console.print(f"TensorBoard:  tensorboard --logdir {root}", soft_wrap=True)
    console.print(f"Took {seconds / 60:.1f} minutes.")
