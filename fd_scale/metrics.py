"""What a run shows of itself: metrics.jsonl, TensorBoard, a progress bar or plain lines."""

from __future__ import annotations

import json
import logging
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from fd_scale.checkpoint import write_atomically
from fd_scale.distributed import World
from fd_scale.errors import UserError
from fd_scale.log import console

logger = logging.getLogger(__name__)


class Recorder:
    """Records the metrics of a run; all ranks call it, rank 0 writes.

    Args:
        run_dir: the run folder.
        world: ranks.
        title: what the progress bar is called.
    """

    def __init__(self, run_dir: Path, world: World, title: str) -> None:
        self.file = run_dir / "metrics.jsonl"
        self.tensorboard_dir = run_dir / "tensorboard"
        self.world = world
        self.title = title
        self.num_steps = 0
        self.tensorboard: SummaryWriter | None = None
        self.progress: Progress | None = None
        self.since = (0, 0.0)  # step and clock of the last line

    def start(self, step: int, num_steps: int, evaluated: bool) -> None:
        """Opens the records at `step`; lines that a resumed run will write again go.

        Args:
            step: optimizer steps taken.
            num_steps: optimizer steps of the run.
            evaluated: whether the evaluation of this step, if there is one, counts as done.
        """
        self.num_steps = num_steps
        self.since = (step, time.perf_counter())
        if not self.world.is_main:
            return
        if self.file.exists():
            kept = []
            for line in _whole_lines(self.file):
                entry = json.loads(line)
                if entry["step"] < step or (
                    entry["step"] == step and (evaluated or entry["kind"] == "train")
                ):
                    kept.append(line + "\n")
            self._told(lambda: write_atomically(self.file, "".join(kept)))
        self.tensorboard = SummaryWriter(str(self.tensorboard_dir), purge_step=step + 1)
        if console.is_terminal:
            self.progress = Progress(
                TextColumn(self.title), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[shown]}"),
                TimeElapsedColumn(), TimeRemainingColumn(), console=console,
            )  # fmt: skip
            self.progress.add_task("", total=num_steps, completed=step, shown="")
            self.progress.start()

    def advance(self, step: int) -> None:
        """Moves the progress bar."""
        if self.progress is not None:
            self.progress.update(self.progress.task_ids[0], completed=step)

    def log(
        self, step: int, losses: dict[str, Tensor], scalars: dict[str, float], images_per_step: int
    ) -> None:
        """Writes a line of training metrics: one collective for all that ranks share.

        Args:
            step: optimizer steps taken.
            losses: this rank's shares of each loss at this step, scalars on the device; they sum to the loss.
            scalars: values that are the same on all ranks.
            images_per_step: images of the global batch.
        """
        shares = torch.stack(
            [*losses.values(), torch.tensor(_memory_gib(self.world.device)).to(self.world.device)]
        )
        if self.world.size > 1:
            gathered = [torch.empty_like(shares) for _ in range(self.world.size)]
            dist.all_gather(gathered, shares)
        else:
            gathered = [shares]
        table = torch.stack(gathered).double().cpu()
        now = time.perf_counter()
        seconds = (now - self.since[1]) / max(step - self.since[0], 1)
        self.since = (step, now)
        found = dict(zip(losses, table[:, :-1].sum(0).tolist(), strict=True))
        values = {"loss": sum(found.values())} | found | scalars
        values["images_per_s"] = images_per_step / seconds
        values["step_time_s"] = seconds
        values["memory_peak_gib"] = float(table[:, -1].max())
        self._write(step, "train", values)
        self._show(step, f"loss {values['loss']:.4f}  {values['images_per_s']:.0f} images/s")

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Writes a line of evaluation metrics, which are the same on all ranks."""
        self._write(step, "evaluation", metrics)
        self._show(step, "  ".join(f"evaluation {name} {value:.4f}" for name, value in metrics.items()))
        self.since = (step, time.perf_counter())  # an evaluation is no part of the step time

    def pictures(self, step: int, pictures: dict[str, np.ndarray]) -> None:
        """Writes pictures to TensorBoard: name -> uint8 (N, H, W, 3). Rank 0 only."""
        assert self.tensorboard is not None, "pictures are written by rank 0, after start"
        for name, pixels_NHWC in pictures.items():
            one_below_the_other = np.concatenate(list(pixels_NHWC))
            self.tensorboard.add_image(name, one_below_the_other, step, dataformats="HWC")

    def finish(self) -> None:
        """Closes the records."""
        if self.progress is not None:
            self.progress.stop()
        if self.tensorboard is not None:
            self.tensorboard.close()

    def _write(self, step: int, kind: str, values: dict[str, Any]) -> None:
        if self.tensorboard is None:
            return
        self._told(lambda: self._append(json.dumps({"step": step, "kind": kind, **values}) + "\n"))
        for name, value in values.items():
            self.tensorboard.add_scalar(f"{kind}/{name}", value, step)

    def _append(self, line: str) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write(line)

    def _told(self, function: Callable[[], None]) -> None:
        """Runs `function`; what it cannot write becomes a sentence."""
        try:
            function()
        except OSError as error:
            raise UserError(
                f"{self.file}: cannot be written ({error.strerror}); free space there and start the same command again"
            ) from None

    def _show(self, step: int, text: str) -> None:
        if self.progress is not None:
            self.progress.update(self.progress.task_ids[0], shown=text)
        else:
            logger.info("%s step %d/%d  %s", self.title, step, self.num_steps, text)


def read_metrics(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """Returns the lines of one kind (`train`, `evaluation`) of a run's metrics, in step order."""
    file = run_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in _whole_lines(file)] if file.exists() else []
    return [line for line in lines if line["kind"] == kind]


def _whole_lines(path: Path) -> list[str]:
    """Lines that were written to their end; a killed run may leave half of one."""
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def _memory_gib(device: torch.device) -> float:
    """Peak memory of this rank: of the GPU, or resident on the host where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
