"""The one training loop. Read this file first.

A `Task` says what is trained: a module whose forward returns sums of losses, the inputs of that
forward, and how its result is evaluated. The `Trainer` does the rest, alike for distillation,
pre-training and fine-tuning.

Shape legend: B = images of a micro-batch on this rank.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fd_scale.checkpoint import Checkpoints, TrainState
from fd_scale.config import Recipe
from fd_scale.data import Batch, TrainLoader
from fd_scale.distributed import Preemption, World
from fd_scale.engine import Engine
from fd_scale.errors import UserError
from fd_scale.evaluation import Forward
from fd_scale.metrics import Recorder

logger = logging.getLogger(__name__)


class Task(Protocol):
    """What is trained."""

    @property
    def module(self) -> nn.Module:
        """Its forward takes `inputs(batch)` and returns a dict: loss sums (scalars), outputs to look at."""

    undecayed: set[str]
    """Names of parameters without weight decay, besides 1-D ones."""
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
        self.world = world
        self.num_steps = len(learning_rates)
        self.state = TrainState()
        self.losses: dict[str, Tensor] = {}
        self.preempted = False

    def train(self) -> TrainState:
        """Trains from the newest whole checkpoint to the last step, or until preempted."""
        try:
            self.state = self.checkpoints.resume(self.engine)
            self.recorder.start(self.state.step, self.num_steps, self._evaluated())
            self._loop()
        finally:
            self.recorder.finish()
            self.preemption.close()
        return self.state

    def _loop(self) -> None:
        if self.state.step == self.num_steps:
            logger.info("the run is complete at step %d", self.num_steps)
        if self.state.step > 0 and self._evaluation_due() and not self._evaluated():
            self.evaluate()  # the run was killed between a save and its evaluation
        self.engine.train()
        for micro_batches in self._steps():
            self.train_step(micro_batches)
            self.recorder.advance(self.state.step)
            if self._last() or self._due(self.recipe.log.every_steps):
                self.log_step()
            if self._save_due():
                self.checkpoints.save(self.engine, self.state)
            if self._evaluation_due():  # after the save: what fails here has lost nothing
                self.evaluate()
            if self.preempted and not self._last():
                logger.warning(
                    "preempted after step %d of %d; the same command resumes", self.state.step, self.num_steps
                )
                return

    def train_step(self, micro_batches: list[Batch]) -> None:
        """Takes one optimizer step over the global batch."""
        self.engine.set_learning_rate(self.learning_rates[self.state.step])
        counts = self._agree(micro_batches)
        self.losses = {name: torch.zeros((), device=self.world.device) for name in counts}
        with_pictures = self.world.is_main and self._due(
            self.recipe.log.images_every_steps, self.state.step + 1
        )
        for batch in micro_batches:
            on_device = batch.to(self.world.device)
            outputs = self.engine.forward(**self.task.inputs(on_device))
            shares = {name: outputs[name] / count for name, count in counts.items()}
            self.engine.backward_and_step(torch.stack(list(shares.values())).sum())
            for name, share in shares.items():
                self.losses[name] += share.detach()
            if with_pictures and batch is micro_batches[0]:
                self.recorder.pictures(self.state.step + 1, self.task.pictures(on_device, outputs))
        self.state.step += 1
        self._watch_skips()

    def log_step(self) -> None:
        """Writes one line of metrics; apart from DeepSpeed's overflow check, the only wait for the device."""
        step = self.state.step
        self.recorder.log(
            step,
            losses=self.losses,
            scalars={
                "learning_rate": float(self.learning_rates[step - 1]),
                "grad_norm": self.engine.grad_norm,
                "epoch": step / self.loader.steps_per_epoch,
            },
            images_per_step=self.recipe.train.global_batch,
        )

    def evaluate(self) -> None:
        """Measures the task's metrics; the best so far are kept as a checkpoint."""
        self.engine.train(False)
        with torch.no_grad():
            metrics = self.task.evaluate(self.engine.forward, self.world)
        self.engine.train()
        if not metrics:
            return
        self.recorder.evaluation(self.state.step, metrics)
        self.state.evaluated_step = self.state.step
        name, sign = self.task.best_metric
        value, best = metrics[name], self.state.best_value
        if math.isfinite(value) and (best is None or sign * value > sign * best):
            self.state.best_value, self.state.best_step = value, self.state.step
            if not self._save_due():
                self.checkpoints.save(self.engine, self.state)
                return
        self.checkpoints.update(self.state)

    def _evaluation_due(self) -> bool:
        return self._last() or self._due(self.recipe.log.evaluate_every_steps)

    def _evaluated(self) -> bool:
        return self.state.evaluated_step == self.state.step

    def _save_due(self) -> bool:
        return self._last() or self.preempted or self._due(self.recipe.checkpoint.save_every_steps)

    def _last(self) -> bool:
        return self.state.step == self.num_steps

    def _steps(self) -> Iterator[list[Batch]]:
        batches = self.loader.iterate(self.state.step)
        try:
            for _ in range(self.state.step, self.num_steps):
                yield next(batches)
        finally:
            batches.close()

    def _agree(self, micro_batches: list[Batch]) -> dict[str, float]:
        """Sums counts over micro-batches and ranks, and learns whether any rank is to stop: one collective.

        The loss is a mean over all items of the step; a mean of means is wrong where counts differ.
        """
        counted = [self.task.counts(batch) for batch in micro_batches]
        names = list(counted[0])
        mine = [sum(counts[name] for counts in counted) for name in names]
        *totals, preempted = self.world.sum([*mine, float(self.preemption.raised)])
        self.preempted = preempted > 0
        # A step without a single item (no image of it has a label) has loss 0, not 0 / 0.
        return {name: max(total, 1.0) for name, total in zip(names, totals, strict=True)}

    def _due(self, every: int, step: int | None = None) -> bool:
        return every > 0 and (self.state.step if step is None else step) % every == 0

    def _watch_skips(self) -> None:
        if not self.engine.skipped:
            self.state.skipped_in_a_row = 0
            return
        self.state.skipped_in_a_row += 1
        logger.warning("step %d: skipped, the gradient is not finite on some rank", self.state.step)
        if self.state.skipped_in_a_row >= self.recipe.train.max_skipped_steps:
            raise UserError(
                f"{self.state.skipped_in_a_row} steps in a row had a gradient that is not finite "
                "(train.max_skipped_steps); lower optim.lr or check the data, and resume from the checkpoint before"
            )
