"""The distillation task: what the trainer needs to know of feature distillation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fd_scale.config import Recipe
from fd_scale.data import Batch
from fd_scale.distill.module import DistillationModule
from fd_scale.distill.pictures import side_by_side
from fd_scale.distributed import World
from fd_scale.errors import UserError
from fd_scale.evaluation import EvaluationSet, Forward, mean_over_source
from fd_scale.models import drop_path_scale, dtype_of, undecayed_parameters
from fd_scale.teachers import Teacher

NUM_PICTURES = 8


class DistillationTask:
    """A frozen teacher's whitened features, regressed by a student."""

    best_metric = ("loss", -1)

    def __init__(self, recipe: Recipe, evaluation: EvaluationSet | None) -> None:
        assert recipe.distill is not None, "a recipe of task distill has its section"
        dtype = dtype_of(recipe.train.precision)
        teacher = recipe.distill.teachers[0]
        self.seed = recipe.seed
        self.evaluation = evaluation
        self.teacher = Teacher(teacher, dtype_of(teacher.precision or recipe.train.precision))
        self.module = DistillationModule(recipe.model, self.teacher.num_features, recipe.distill.beta, dtype)
        student = self.module.backbone
        student.activation_checkpointing = recipe.train.activation_checkpointing
        self.undecayed = undecayed_parameters(self.module)
        self.rates = student.drop_path_rates
        self.grid = student.grid_size(recipe.model.img_size, recipe.model.img_size)
        teacher_size = teacher.model.img_size
        teacher_grid = self.teacher.model.grid_size(teacher_size, teacher_size)
        if self.grid != teacher_grid:
            raise UserError(
                f"distill: the student's {recipe.model.img_size} px make {self.grid[0]}x{self.grid[1]} tokens, the "
                f"teacher's {teacher_size} px {teacher_grid[0]}x{teacher_grid[1]}; choose img_size so that they agree"
            )

    def to(self, device: torch.device) -> None:
        """Moves the teacher to the device."""
        self.teacher.to(device)

    def counts(self, batch: Batch) -> dict[str, float]:
        """The loss goes over tokens."""
        return {"loss": len(batch.labels) * self.grid[0] * self.grid[1]}

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Runs the teacher; draws the student's drop path."""
        return {
            "images_BCHW": batch.images,
            "target_BLD": self.teacher.features(batch.images),
            "drop_path_scale_RB": drop_path_scale(
                self.rates, self.seed, batch.positions, batch.images.device
            ),
        }

    def evaluate(self, forward: Forward, world: World) -> dict[str, float]:
        """Measures the loss over the evaluation source, without drop path."""
        if self.evaluation is None:
            return {}

        def sums(batch: Batch) -> tuple[dict[str, float], int]:
            target = self.teacher.features(batch.images)
            loss = forward(images_BCHW=batch.images, target_BLD=target)["loss"]
            return {"loss": float(loss)}, len(batch.labels) * self.grid[0] * self.grid[1]

        return mean_over_source(self.evaluation, world, sums)

    def pictures(self, batch: Batch, outputs: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """Image, teacher's features and student's features, side by side."""
        shown = slice(NUM_PICTURES)
        target_BLD = self.teacher.features(batch.images[shown])
        return {
            "features": side_by_side(batch.images[shown], target_BLD, outputs["tokens"][shown], self.grid)
        }
