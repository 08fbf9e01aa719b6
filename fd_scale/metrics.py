"""What a run shows of itself: metrics.jsonl, TensorBoard, a progress bar or plain lines."""

from __future__ import annotations

import json
import logging
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


SLOW_SHARE = 0.1
"""A rank is called slow when the others wait for it so large a part of a step."""


class HostCopy:
    """A scalar on its way from the device to the host, which does not wait for it before `read`."""

    def __init__(self, value: Tensor) -> None:
        self.host = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        self.host.copy_(value, non_blocking=True)
        self.arrived = torch.cuda.current_stream(value.device).record_event() if value.is_cuda else None

    def read(self) -> float:
        """The value; waits until it is there."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return float(self.host)


class Phases:
    """Where the time of steps goes on this rank: seconds in each phase, on the device where there is one.

    Between a CUDA device's events lies what it did, and nobody waits for them before `read`. The reductions and
    gathers of ZeRO are in the phase that started them, as far as computation does not hide them.
    """

    NAMES = ("data", "agree", "forward", "backward", "optimizer")

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Counts what is done inside as the phase `name`; a profiler shows it under this name."""
        assert name in self.NAMES, name
        start = self._now()
        with torch.profiler.record_function(name):
            yield
        self.spans.append((name, start, self._now()))

    def read(self) -> dict[str, float]:
        """Returns the seconds of each phase since the last call."""
        seconds = dict.fromkeys(self.NAMES, 0.0)
        for name, start, end in self.spans:
            if self.device.type == "cuda":
                end.synchronize()
                seconds[name] += 1e-3 * start.elapsed_time(end)
            else:
                seconds[name] += end - start
        self.spans.clear()
        return seconds

    def _now(self) -> Any:
        if self.device.type == "cuda":
            return torch.cuda.current_stream(self.device).record_event(torch.cuda.Event(enable_timing=True))
        return time.perf_counter()


@contextmanager
def profiling(folder: Path | None, world: World) -> Iterator[Callable[[], None]]:
    """Writes a trace of steps 3 to 5 from now on into `folder`, where one is given; yields what ends a step.

    The trace opens in Perfetto (ui.perfetto.dev) and in TensorBoard's profiler plugin.
    """
    if folder is None:
        yield lambda: None
        return
    with torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=1, warmup=1, active=3, repeat=1),
        on_trace_ready=torch.profiler.tensorboard_trace_handler(str(folder), f"rank_{world.rank}"),
    ) as profiler:
        yield profiler.step


class Recorder:
    """Records the metrics of a run; all ranks call it, rank 0 writes.

    Args:
        run_dir: the run folder.
        world: ranks.
        title: what the progress bar is called.
        peak_images_per_s: images that the GPUs would train on at their datasheets' peak, where it is known.
    """

    def __init__(
        self, run_dir: Path, world: World, title: str, peak_images_per_s: float | None = None
    ) -> None:
        self.peak_images_per_s = peak_images_per_s
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
                    entry["step"] == step and (evaluated or entry["kind"] != "evaluation")
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
        self,
        step: int,
        losses: dict[str, Tensor],
        scalars: dict[str, float],
        images_per_step: int,
        phases: Phases,
        totals: dict[str, float],
    ) -> None:
        """Writes a line of training metrics: one collective for all that ranks share.

        Args:
            step: optimizer steps taken.
            losses: this rank's shares of each loss at this step, scalars on the device; they sum to the loss.
            scalars: values that are the same on all ranks.
            images_per_step: images of the global batch.
            phases: of this rank's steps since the last line.
            totals: values that are the same on all ranks, sums over the steps since the last line; written for a step.
        """
        spent_s = phases.read()
        own = torch.tensor([memory_gib(self.world.device), *spent_s.values()]).to(self.world.device)
        shares = torch.cat([torch.stack(list(losses.values())), own])
        if self.world.size > 1:
            gathered = [torch.empty_like(shares) for _ in range(self.world.size)]
            dist.all_gather(gathered, shares)
        else:
            gathered = [shares]
        table = torch.stack(gathered).double().cpu()
        now = time.perf_counter()
        before, then = self.since
        seconds = (now - then) / max(step - before, 1)
        self.since = (step, now)
        count = len(losses)
        found = dict(zip(losses, table[:, :count].sum(0).tolist(), strict=True))
        values = {"loss": sum(found.values())} | found | scalars
        values |= {name: total / max(step - before, 1) for name, total in totals.items()}
        values["images_per_s"] = images_per_step / seconds
        values["step_time_s"] = seconds
        values["memory_peak_gib"] = float(table[:, count].max())
        if self.peak_images_per_s is not None:
            values["mfu"] = values["images_per_s"] / self.peak_images_per_s
        phase_s = table[:, count + 1 :] / max(step - before, 1)
        values |= {f"{name}_s": float(mean) for name, mean in zip(spent_s, phase_s.mean(0), strict=True)}
        values["rank_lag_s"] = self._lag(step, phase_s[:, list(spent_s).index("agree")], seconds)
        self._write(step, "train", values)
        self._show(step, f"loss {values['loss']:.4f}  {_rate(values['images_per_s'])} images/s")

    def _lag(self, step: int, waits: Tensor, step_s: float) -> float:
        """Seconds a step that the rank which waits least keeps the others waiting; says so where that is much."""
        lag = float(waits.max() - waits.min())
        if lag > SLOW_SHARE * step_s:
            logger.warning(
                "step %d: rank %d is slow, the others wait %.0f ms of a step of %.0f ms for it",
                step, int(waits.argmin()), 1e3 * lag, 1e3 * step_s,
            )  # fmt: skip
        return lag

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Writes a line of evaluation metrics, which are the same on all ranks."""
        self._write(step, "evaluation", metrics)
        # A learning rate of a linear probe is less than four decimals show.
        shown = {
            name: f"{value:.4f}" if abs(value) >= 1e-3 or not value else f"{value:.3g}"
            for name, value in metrics.items()
        }
        self._show(step, "  ".join(f"evaluation {name} {value}" for name, value in shown.items()))
        self.since = (step, time.perf_counter())  # an evaluation is no part of the step time

    def checkpoint(self, took: dict[str, float]) -> None:
        """Writes what a checkpoint took, as `Checkpoints.complete` returns it."""
        self._write(int(took["step"]), "checkpoint", took)

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
                f"{self.file}: cannot be written ({error.strerror}); mend that and start the same command again"
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


def memory_gib(device: torch.device) -> float:
    """Returns the peak memory of this process: of the GPU, or resident on the host where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


def _rate(per_s: float) -> str:
    return f"{per_s:.0f}" if per_s >= 10 else f"{per_s:.2g}"
