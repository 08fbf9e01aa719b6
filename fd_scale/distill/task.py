"""The distillation task: what the trainer needs to know of feature distillation.

Shape legend: B = images, L = tokens, D = channels of a target, R = residual branches.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fd_scale.config import TEACHER, Recipe, TeacherConfig
from fd_scale.data import Batch, TrainLoader
from fd_scale.distill.features import FeatureCodec
from fd_scale.distill.losses import choose_loss
from fd_scale.distill.module import DistillationModule, Objective
from fd_scale.distill.phi_s import PhiS
from fd_scale.distill.pictures import side_by_side
from fd_scale.distributed import World
from fd_scale.errors import UserError
from fd_scale.evaluation import EvaluationSet, Forward, mean_over_source, nearest_neighbours
from fd_scale.models import (
    Backbone,
    build_model,
    drop_path_scale,
    dtype_of,
    load_tensors,
    resolved,
    set_up_training,
)
from fd_scale.placement import WHOLE, Placement
from fd_scale.randomness import hash64, uniform
from fd_scale.teachers import Target, Teacher, targets_of

logger = logging.getLogger(__name__)

NUM_PICTURES = 8


class DistillationTask:
    """Frozen teachers' features, regressed by a student; the teachers' own, or those that batches bring along.

    Args:
        recipe: with its section `distill`.
        evaluation: images on which the loss is measured.
        bank: images and labels among which those of `evaluation` have their nearest neighbours; none: no such metric.
        placement: where the student's parameters are.
        in_parts: where those of teachers are that the recipe wants partitioned.
    """

    best_metric = ("loss", -1)

    def __init__(
        self,
        recipe: Recipe,
        evaluation: EvaluationSet | None,
        bank: EvaluationSet | None = None,
        placement: Placement = WHOLE,
        in_parts: Placement = WHOLE,
    ) -> None:
        recipe = resolved(recipe)
        assert recipe.distill is not None, "a recipe of task distill has its section"
        self.config = config = recipe.distill
        self.seed = recipe.seed
        self.evaluation = evaluation
        self.bank = bank
        self.teachers: list[Teacher] = []
        if config.features is None:
            self.teachers = built_teachers(recipe, in_parts)
            self.targets = [teacher.targets for teacher in self.teachers]
        else:
            self.codec = codec_of(recipe)
            self.targets = [targets_of(teacher) for teacher in config.teachers]
        dtype = dtype_of(recipe.train.precision)
        with placement.building(dtype):
            student = build_model(recipe.model)
            if recipe.model.weights == TEACHER:
                first = (self.teachers or built_teachers(recipe, in_parts))[0]
                with first.placement.building(first.dtype):
                    weights = first.model.state_dict(keep_vars=True)
                    load_tensors(student, weights, f"teacher {first.config.model.name}")
        self.grid = student.grid_size(recipe.model.size, recipe.model.size)
        # Teacher and target of each objective.
        self.places = [
            (index, number) for index, targets in enumerate(self.targets) for number in range(len(targets))
        ]
        objectives = [self._objective(student, *place) for place in self.places]
        self.items_per_image = {
            objective.loss: self.grid[0] * self.grid[1] + objective.cls_weight if objective.is_map else 1.0
            for objective in objectives
        }
        self.phi_s: list[PhiS] = []
        if config.loss == "phi_s":
            self.phi_s = [PhiS(objective.num_features) for objective in objectives]
        with placement.building(dtype):
            self.module = DistillationModule(student, objectives, choose_loss(config), dtype)
        self.undecayed, self.lr_scales = set_up_training(self.module, recipe)
        self.rates = student.drop_path_rates

    def _objective(self, student: Backbone, index: int, number: int) -> Objective:
        teacher = self.config.teachers[index]
        target = self.targets[index][number]
        if target.grid is not None and target.grid != self.grid:
            logger.info(
                "%s gives %d x %d tokens, the student %d x %d: they are interpolated",
                teacher.model.name, *target.grid, *self.grid,
            )  # fmt: skip
        return Objective(
            loss="loss" if len(self.targets) == 1 else f"loss_{index}",
            num_features=target.num_features,
            is_map=target.grid is not None,
            cls_weight=_cls_weight(teacher, target, student),
            weight=teacher.weight / len(self.targets[index]),
            projector=teacher.projector,
        )

    def prepare(self, world: World, loader: TrainLoader) -> None:
        """Moves the teachers to the device; for PHI-S, measures their statistics over the first images."""
        for teacher in self.teachers:
            teacher.to(world.device)
        if not self.phi_s:
            return
        for statistics in self.phi_s:
            statistics.to(world.device)
        num_steps = -(-self.config.phi_s_images // loader.global_batch)
        logger.info("PHI-S: measuring the teachers over %d images", num_steps * loader.global_batch)
        stream: Iterator[list[Batch]] = loader.iterate(0)
        for batch in itertools.chain.from_iterable(itertools.islice(stream, num_steps)):
            targets = self._targets(batch.to(world.device))
            for statistics, target_BLD in zip(self.phi_s, targets, strict=True):
                statistics.add(target_BLD)
        for statistics in self.phi_s:
            statistics.finish(world)

    def counts(self, batch: Batch) -> dict[str, float]:
        """A teacher's loss goes over the tokens of the images that it sees."""
        counts = {}
        for (index, _), objective in zip(self.places, self.module.objectives, strict=True):
            rows = self._rows(index, batch)
            num_images = len(batch.labels) if rows is None else len(rows)
            counts[objective.loss] = num_images * self.items_per_image[objective.loss]
        return counts

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Runs the teachers; draws the student's drop path."""
        device = batch.images.device
        rows = [self._rows(index, batch) for index in range(len(self.targets))]
        rows = [chosen if chosen is None else chosen.to(device) for chosen in rows]
        return {
            "images_BCHW": batch.images,
            "targets": self._standardised(self._targets(batch, rows, self._teachers_scales(batch))),
            "rows": [rows[index] for index, _ in self.places],
            "drop_path_scale_RB": drop_path_scale(self.rates, self.seed, batch.positions, device),
        }

    def evaluation_inputs(self, batch: Batch) -> dict[str, Any]:
        """As `inputs`, with nothing drawn: no drop path, and every teacher sees every image."""
        targets = self._standardised(self._targets(batch))
        return {"images_BCHW": batch.images, "targets": targets, "rows": [None] * len(self.places)}

    def evaluation_counts(self, batch: Batch) -> dict[str, float]:
        """As `counts`, of `evaluation_inputs`."""
        return {name: items * len(batch.labels) for name, items in self.items_per_image.items()}

    def evaluate(self, forward: Forward, world: World) -> dict[str, float]:
        """Measures the loss over the evaluation source, without drop path; every teacher sees every image.

        With a bank also how well the student's features classify.
        """
        if self.evaluation is None:
            return {}

        def sums(batch: Batch) -> tuple[dict[str, float], int]:
            outputs = forward(**self.evaluation_inputs(batch))
            losses = {name: float(outputs[name]) / items for name, items in self.items_per_image.items()}
            return {"loss": sum(losses.values())} | losses, len(batch.labels)

        metrics = mean_over_source(self.evaluation, world, sums)
        if self.bank is not None:
            metrics |= nearest_neighbours(
                self.bank,
                self.evaluation,
                lambda batch: forward(images_BCHW=batch.images, targets=[], rows=[])["features"],
                world,
            )
        return metrics

    def pictures(self, batch: Batch, outputs: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """Image, the first teacher's features and the student's, side by side."""
        objective = self.module.objectives[0]
        rows = self._rows(0, batch)
        images = batch.images if rows is None else batch.images[rows.to(batch.images.device)]
        images = images[:NUM_PICTURES]
        if not objective.is_map or not len(images):
            return {}
        with_cls = objective.cls_weight > 0
        target_BLD, tokens_BLD = (outputs[name][:NUM_PICTURES] for name in ("target", "tokens"))
        return {
            "features": side_by_side(images, target_BLD[:, with_cls:], tokens_BLD[:, with_cls:], self.grid)
        }

    def _rows(self, index: int, batch: Batch) -> Tensor | None:
        """Which images of a batch a teacher sees, None for all: a function of seed and position."""
        share = self.config.teachers[index].share
        if share == 1:
            return None
        drawn_B = uniform(self.seed, "teacher", index, batch.positions.numpy())
        return torch.from_numpy(np.flatnonzero(drawn_B < share))

    def _teachers_scales(self, batch: Batch) -> list[Tensor | None]:
        """Draws drop path for each teacher, apart from the student's and each other's: (R, B) or none."""
        return [
            drop_path_scale(
                teacher.drop_path_rates, int(hash64(self.seed, "teacher's drop path", index)), batch.positions,
                batch.images.device,
            )
            for index, teacher in enumerate(self.teachers)
        ]  # fmt: skip

    def _targets(
        self, batch: Batch, rows: list[Tensor | None] | None = None, scales: list[Tensor | None] | None = None
    ) -> list[Tensor]:
        """The targets of all objectives, on the student's grid, for the images that each teacher sees."""
        rows = rows or [None] * len(self.targets)
        features: list[list[Tensor]] = []
        if batch.features is None:
            for index, teacher in enumerate(self.teachers):
                features.append(
                    self._seen(teacher, batch.images, rows[index], scales[index] if scales else None)
                )
        else:
            stored = iter(self.codec.decode(batch.features))
            for targets, chosen in zip(self.targets, rows, strict=True):
                own = [next(stored) for _ in targets]
                features.append(own if chosen is None else [tokens_BLD[chosen] for tokens_BLD in own])
        return [
            to_grid(features[index][number], self.targets[index][number], self.grid, objective.cls_weight > 0)
            for (index, number), objective in zip(self.places, self.module.objectives, strict=True)
        ]

    def _seen(
        self, teacher: Teacher, images_BCHW: Tensor, chosen: Tensor | None, scale_RB: Tensor | None
    ) -> list[Tensor]:
        """What a teacher gives for the images that it sees."""
        images = images_BCHW if chosen is None else images_BCHW[chosen]
        if len(images):
            if scale_RB is not None and chosen is not None:
                scale_RB = scale_RB[:, chosen]
            return teacher.features(images, scale_RB)
        if teacher.config.partitioned:  # the other ranks wait for this one's part
            return [tokens_BLD[:0] for tokens_BLD in teacher.features(images_BCHW[:1])]
        return [
            torch.empty(0, target.num_tokens, target.num_features, device=images.device)
            for target in teacher.targets
        ]

    def _standardised(self, targets: list[Tensor]) -> list[Tensor]:
        if not self.phi_s:
            return targets
        return [phi_s.standardise(target) for phi_s, target in zip(self.phi_s, targets, strict=True)]


def built_teachers(recipe: Recipe, in_parts: Placement = WHOLE) -> list[Teacher]:
    """Returns the teachers of a recipe, with their weights, on the host.

    Args:
        recipe: with its section `distill`.
        in_parts: where the parameters of those are that the recipe wants partitioned.
    """
    assert recipe.distill is not None, "a recipe of task distill has its section"
    return [
        Teacher(
            teacher,
            dtype_of(teacher.precision or recipe.train.precision),
            in_parts if teacher.partitioned else WHOLE,
        )
        for teacher in recipe.distill.teachers
    ]


def codec_of(recipe: Recipe) -> FeatureCodec:
    """Returns how the features of a recipe's teachers are kept on disk."""
    assert recipe.distill is not None, "a recipe of task distill has its section"
    assert recipe.distill.features is not None, "the recipe keeps features"
    targets = [target for teacher in recipe.distill.teachers for target in targets_of(teacher)]
    return FeatureCodec(targets, recipe.distill.features.precision)


def _cls_weight(teacher: TeacherConfig, target: Target, student: Backbone) -> float:
    if target.grid is None:
        return 0.0
    both = target.has_cls and student.has_cls
    if teacher.cls_weight and not both:
        lacking = "the student" if target.has_cls else f"the teacher {teacher.model.name}"
        raise UserError(
            f"distill.teachers.cls_weight: got {teacher.cls_weight}, but {lacking} has no CLS token; leave it out"
        )
    if teacher.cls_weight is None:
        return 1.0 if both else 0.0
    return teacher.cls_weight


def to_grid(tokens_BLD: Tensor, target: Target, grid: tuple[int, int], with_cls: bool) -> Tensor:
    """Returns a teacher's tokens on the student's grid: bilinear interpolation where the grids differ.

    Args:
        tokens_BLD: CLS first, where the target has one.
        target: their shape.
        grid: rows and columns of the student's patch tokens.
        with_cls: whether the CLS token is kept.
    """
    if target.grid is None:
        return tokens_BLD
    patches_BLD = tokens_BLD[:, int(target.has_cls) :]
    if target.grid != grid and len(patches_BLD):
        maps = patches_BLD.transpose(1, 2).unflatten(2, target.grid).float()
        maps = F.interpolate(maps, size=grid, mode="bilinear", align_corners=False, antialias=True)
        patches_BLD = maps.flatten(2).transpose(1, 2).to(tokens_BLD.dtype)
    elif target.grid != grid:
        patches_BLD = patches_BLD.new_empty(0, grid[0] * grid[1], patches_BLD.shape[2])
    return torch.cat([tokens_BLD[:, :1], patches_BLD], dim=1) if with_cls else patches_BLD
