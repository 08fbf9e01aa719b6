"""The one training loop. Read this file first.

A `Task` says what is trained: a module whose forward returns sums of losses, the inputs of that
forward, and how its result is evaluated. The `Trainer` does the rest, alike for distillation,
pre-training and fine-tuning.

Shape legend: B = images of a micro-batch on this rank.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fd_scale import log
from fd_scale.checkpoint import Checkpoints, TrainState
from fd_scale.config import Recipe
from fd_scale.data import Batch, TrainLoader
from fd_scale.distributed import Preemption, World
from fd_scale.engine import Engine
from fd_scale.errors import UserError
from fd_scale.evaluation import Forward
from fd_scale.lock import RunLock
from fd_scale.metrics import HostCopy, Phases, Recorder, profiling
from fd_scale.torch_state import as_in_a_new_process
from fd_scale.watch import LossWatch, Watchdog

logger = logging.getLogger(__name__)


class Task(Protocol):
    """What is trained."""

    @property
    def module(self) -> nn.Module:
        """Its forward takes `inputs(batch)` and returns a dict: loss sums (scalars), outputs to look at."""

    undecayed: set[str]
    """Names of parameters without weight decay, besides 1-D ones."""
    lr_scales: dict[str, float]
    """Factor of the peak learning rate of some parameters, by name; the others have 1."""
    best_metric: tuple[str, int]
    """The evaluation metric that picks the best checkpoint, and +1 where larger is better, else -1."""

    def prepare(self, world: World, loader: TrainLoader) -> None:
        """Moves what is not in the module (a teacher) to the device; measures what the first step needs."""

    def counts(self, batch: Batch) -> dict[str, float]:
        """Returns, for every loss sum, over how many items it goes; known from the batch alone."""

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Returns the arguments of the module's forward for a batch on the device."""

    def evaluate(self, forward: Forward, world: World) -> dict[str, float]:
        """Returns metrics over the evaluation source, the same on all ranks; empty where there is none."""

    def pictures(self, batch: Batch, outputs: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """Returns pictures of a batch: name -> uint8 (N, H, W, 3)."""


class Trainer:
    """Runs a task to its last step, saving and resuming on the way."""

    def __init__(
        self,
        recipe: Recipe,
        task: Task,
        engine: Engine,
        loader: TrainLoader,
        learning_rates: np.ndarray,
        checkpoints: Checkpoints,
        recorder: Recorder,
        preemption: Preemption,
        lock: RunLock,
        world: World,
    ) -> None:
        self.recipe = recipe
        self.task = task
        self.engine = engine
        self.loader = loader
        self.learning_rates = learning_rates
        self.checkpoints = checkpoints
        self.recorder = recorder
        self.preemption = preemption
        self.lock = lock
        self.world = world
        self.num_steps = len(learning_rates)
        self.state = TrainState()
        self.losses: dict[str, Tensor] = {}
        self.loss: HostCopy | None = None
        """This rank's share of the last step's loss, until it is judged."""
        self.loss_watch = LossWatch(recipe.watch.spike_factor)
        self.watchdog = Watchdog(
            recipe.train.timeout_s, Path(recipe.run_dir) / f"logs/rank_{world.rank}.stacks", world.size > 1
        )
        self.phases = Phases(world.device)
        self.sent_bytes = engine.sent_bytes
        """At the last line of metrics."""
        self.preempted = False
        self.save_owed = False
        """Whether a checkpoint was due at a step that went wrong."""
        self.written = False
        """Whether all ranks have written the checkpoint in hand."""

    @as_in_a_new_process()
    def train(self) -> TrainState:
        """Trains from the newest whole checkpoint to the last step, or until preempted."""
        try:
            self.state = self.checkpoints.resume(self.engine)
            self.loss_watch = LossWatch(self.recipe.watch.spike_factor, self.state.recent_losses)
            self.recorder.start(self.state.step, self.num_steps, self._evaluated())
            folder = Path(self.recipe.run_dir) / "profile" if self.recipe.log.profile else None
            with (
                self.watchdog,
                _spared_collections(),
                profiling(folder, self.world) as self.end_profiled_step,
            ):
                self._loop()
            if self._last():
                self.preemption.done()
        finally:
            self.close()
        return self.state

    def close(self) -> None:
        """Gives back records, signals, the log and the run folder."""
        self.recorder.finish()
        self.preemption.close()
        log.close_file()
        if self.world.is_main:
            self.lock.release()

    @property
    def stopped_early(self) -> bool:
        """Whether the run was preempted before its last step."""
        return self.preempted and not self._last()

    def _loop(self) -> None:
        if self.state.step == self.num_steps:
            logger.info("the run is complete at step %d", self.num_steps)
        if self.state.step > 0 and self._evaluation_due() and not self._evaluated():
            self.evaluate()  # the run was killed between a save and its evaluation
        self.engine.train()
        while not self._take_steps():
            self._roll_back()

    def _take_steps(self) -> bool:
        """Trains to the last step or until preempted; returns False where the run has to go back."""
        for micro_batches in self._steps():
            counts = self.agree(micro_batches)
            if self.state.bad_in_a_row >= self.recipe.watch.max_bad_steps:
                return False
            if self.written:
                self.complete_checkpoint()
            self.train_step(micro_batches, counts)
            self.recorder.advance(self.state.step)
            if self._last() or self._due(self.recipe.log.every_steps):
                self.log_step()
            if self._save_due() or self._evaluation_due():
                self._judge(*self.world.sum([self._unjudged()]))  # before anything is kept of this step
            if self._save_due():
                self.save()
            if self._evaluation_due():
                self.evaluate()
            self.watchdog.beat(f"step {self.state.step}")
            self.end_profiled_step()
            if self.stopped_early:
                self.complete_checkpoint()
                logger.warning(
                    "preempted after step %d of %d; the same command resumes", self.state.step, self.num_steps
                )
                return True
        return True

    def train_step(self, micro_batches: list[Batch], counts: dict[str, float]) -> None:
        """Takes one optimizer step over the global batch, whose items of each loss are `counts`."""
        self.engine.set_learning_rates(self.learning_rates[self.state.step].tolist())
        self.losses = {name: torch.zeros((), device=self.world.device) for name in counts}
        with_pictures = self.world.is_main and self._due(
            self.recipe.log.images_every_steps, self.state.step + 1
        )
        for batch in micro_batches:
            on_device = batch.to(self.world.device)
            with self.phases("forward"):
                outputs = self.engine.forward(**self.task.inputs(on_device))
            shares = {name: outputs[name] / count for name, count in counts.items()}
            for name, share in shares.items():
                self.losses[name] += share.detach()
            if batch is micro_batches[-1]:
                self.loss = HostCopy(torch.stack(list(self.losses.values())).sum())
            with self.phases("backward"):
                self.engine.backward(torch.stack(list(shares.values())).sum())
            with self.phases("optimizer"):
                self.engine.step()
            if with_pictures and batch is micro_batches[0]:
                self.recorder.pictures(self.state.step + 1, self.task.pictures(on_device, outputs))
        self.state.step += 1
        if self.engine.skipped:
            self._report_skip(micro_batches)

    def log_step(self) -> None:
        """Writes one line of metrics; apart from DeepSpeed's overflow check, the only wait for the device."""
        step = self.state.step
        self.recorder.log(
            step,
            losses=self.losses,
            scalars={
                "learning_rate": float(self.learning_rates[step - 1].max()),
                "grad_norm": self.engine.grad_norm,
                "epoch": step / self.loader.steps_per_epoch,
            },
            images_per_step=self.recipe.train.global_batch,
            phases=self.phases,
            totals={"sent_gib": (self.engine.sent_bytes - self.sent_bytes) / 2**30},
        )
        self.sent_bytes = self.engine.sent_bytes

    def save(self) -> None:
        """Begins a checkpoint, which is written while training goes on; where the last losses go wrong, later."""
        self.save_owed = self.state.bad_in_a_row > 0 and not self._last() and not self.preempted
        if not self.save_owed:
            self.complete_checkpoint()  # the one before
            self.checkpoints.save(self.engine, self.state)

    def complete_checkpoint(self) -> None:
        """Waits for the checkpoint in writing, if there is one, and makes it whole."""
        took = self.checkpoints.complete(lambda: self.watchdog.beat("a checkpoint grew"))
        if took:
            self.recorder.checkpoint(took)

    def evaluate(self) -> None:
        """Measures the task's metrics; the best so far are kept as a checkpoint."""
        self.complete_checkpoint()  # what fails here has lost nothing
        self.engine.train(False)
        with torch.no_grad(), self.engine.averaged():
            metrics = self.task.evaluate(self._evaluation_forward, self.world)
        self.engine.train()
        if not metrics:
            return
        self.recorder.evaluation(self.state.step, metrics)
        self.state.evaluated_step = self.state.step
        name, sign = self.task.best_metric
        value, best = metrics[name], self.state.best_value
        better = math.isfinite(value) and (best is None or sign * value > sign * best)
        better = better and self.state.bad_in_a_row == 0
        if better:
            self.state.best_value, self.state.best_step = value, self.state.step
        if not self.checkpoints.update(self.state) and better:
            self.save()

    def _evaluation_forward(self, **inputs: Any) -> dict[str, Tensor]:
        self.watchdog.beat(f"a batch of the evaluation at step {self.state.step}")
        return self.engine.forward(**inputs)

    def _evaluation_due(self) -> bool:
        return self._last() or self._due(self.recipe.log.evaluate_every_steps)

    def _evaluated(self) -> bool:
        return self.state.evaluated_step == self.state.step

    def _save_due(self) -> bool:
        due = self._due(self.recipe.checkpoint.save_every_steps)
        return self._last() or self.preempted or self.save_owed or due

    def _last(self) -> bool:
        return self.state.step == self.num_steps

    def _steps(self) -> Iterator[list[Batch]]:
        batches = self.loader.iterate(self.state.step, self.state.rollbacks)
        try:
            for _ in range(self.state.step, self.num_steps):
                with self.phases("data"):
                    micro_batches = next(batches)
                yield micro_batches
        finally:
            batches.close()

    def agree(self, micro_batches: list[Batch]) -> dict[str, float]:
        """Sums counts over micro-batches and ranks, and learns what all ranks know: one collective.

        That is whether any rank is to stop, whether all have written the checkpoint in hand, and whether the loader of
        any has met too much that cannot be decoded.

        The loss is a mean over all items of the step; a mean of means is wrong where counts differ.
        """
        counted = [self.task.counts(batch) for batch in micro_batches]
        names = list(counted[0])
        mine = [sum(counts[name] for counts in counted) for name in names]
        flags = [float(self.preemption.raised), float(self.checkpoints.written), self._unjudged()]
        with self.phases("agree"):
            *totals, refused, preempted, written, loss = self.world.sum(
                [*mine, float(self.loader.problem != ""), *flags]
            )
        if refused:
            raise self.world.common_error(self.loader.problem)
        self.preempted = preempted > 0
        self.written = written == self.world.size
        self._judge(loss)
        # A step without a single item (no image of it has a label) has loss 0, not 0 / 0.
        return {name: max(total, 1.0) for name, total in zip(names, totals, strict=True)}

    def _due(self, every: int, step: int | None = None) -> bool:
        return every > 0 and (self.state.step if step is None else step) % every == 0

    def _unjudged(self) -> float:
        return 0.0 if self.loss is None else self.loss.read()

    def _judge(self, loss: float) -> None:
        """Counts the last step as good or bad, once."""
        if self.loss is None:
            return
        self.loss = None
        spike = self.loss_watch.is_spike(loss)
        if spike and not self.engine.skipped:
            logger.warning("step %d: the loss spikes, %.4g", self.state.step, loss)
        # In fp16 a finite loss may be scaled too high; DeepSpeed lowers the scale, and stops at its least.
        skipped = self.engine.skipped and self.recipe.train.precision != "fp16"
        self.state.bad_in_a_row = self.state.bad_in_a_row + 1 if spike or skipped else 0
        self.state.recent_losses = list(self.loss_watch.losses)

    def _report_skip(self, micro_batches: list[Batch]) -> None:
        """Says on which ranks the loss itself was not finite, and there, of which samples."""
        finite = math.isfinite(self._unjudged())
        ranks = [str(rank) for rank, ok in enumerate(self.world.gather(finite)) if not ok]
        where = f"the loss is not finite on rank {', '.join(ranks)}" if ranks else "all losses are finite"
        logger.warning("step %d: skipped, a gradient is not finite; %s", self.state.step, where)
        if not finite:
            positions = torch.cat([batch.positions for batch in micro_batches])
            logger.warning(
                "step %d: samples %d to %d of the stream", self.state.step, positions[0], positions[-1]
            )

    def _roll_back(self) -> None:
        """Goes back to the newest checkpoint, and on from there with other samples."""
        bad, times = self.state.bad_in_a_row, self.state.rollbacks
        problem = f"{bad} steps in a row had a loss that spikes or a gradient that is not finite (watch.max_bad_steps)"
        advice = "check the data, or take a lower optim.lr in a run_dir of its own"
        self.complete_checkpoint()
        if times == self.recipe.watch.max_rollbacks:
            raise UserError(
                f"{problem}, after going back {times} times (watch.max_rollbacks); {advice}; a higher "
                "watch.max_rollbacks goes on from the newest checkpoint"
            )
        restored = self.checkpoints.resume(self.engine, lambda state: state.bad_in_a_row == 0)
        if restored.step == 0:
            raise UserError(f"{problem}, and there is no checkpoint to go back to; {advice}")
        logger.warning("%s: back to step %d, and on with other samples", problem, restored.step)
        self.state = replace(restored, rollbacks=times + 1, bad_in_a_row=0)
        self.checkpoints.update(self.state)
        self.save_owed = False
        self.loss_watch = LossWatch(self.recipe.watch.spike_factor, self.state.recent_losses)
        self.recorder.finish()
        self.recorder.start(self.state.step, self.num_steps, self._evaluated())


@contextmanager
def _spared_collections() -> Iterator[None]:
    """Keeps what is built out of Python's collections of garbage.

    A full one looks at every object there is: 0.33 s for a toy of SwinV2-G, in one of a hundred steps, for which a rank
    lets all others wait; afterwards 1 ms.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()  # a process may train again
