"""`fd-scale bench finetune`: our fine-tuning step, images and all, beside a bare loop of timm's parts.

Shape legend: B = images, R = residual branches, K = classes.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import torch
from rich.table import Table
from timm.data import Mixup, create_loader
from timm.data.auto_augment import RandAugment
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import dispatch_clip_grad
from torch import Tensor
from torch.utils.data import Dataset

from fd_scale import api
from fd_scale.benchmarks.step import now, settings_alone
from fd_scale.config import Recipe, load_recipe
from fd_scale.data import Batch, Source, TrainLoader, open_source
from fd_scale.data.transforms import mend_posterize
from fd_scale.errors import UserError
from fd_scale.finetune import ClassificationTask
from fd_scale.log import console
from fd_scale.models import dtype_of, resolved_model
from fd_scale.optim import parameter_groups
from fd_scale.run_folder import environment

WARM_UP_STEPS = 3


class _Images(Dataset[tuple[Any, Any]]):
    """A source as timm's loader takes it."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, sample_id: int) -> tuple[Any, Any]:
        picture, label = self.source.read(sample_id)
        return self.transform(picture.pil()), label


class TimmLoop:
    """timm's loader, Mixup, loss, clipping and optimizer around the module of a classification.

    Args:
        recipe: what is trained and how.
        device: where.
    """

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        config, data = recipe.classification, recipe.data
        assert config is not None, "checked before"
        source = open_source(data.train)
        task = api.build_task(recipe, source)
        assert isinstance(task, ClassificationTask), "the recipe's task"
        self.recipe, self.device = recipe, device
        self.module = task.module.to(device)
        model = resolved_model(recipe.model)
        augment = f"rand-{data.rand_augment}" if data.rand_augment else None
        self.loader = create_loader(
            _Images(source), (3, model.size, model.size), recipe.train.micro_batch, is_training=True,
            re_prob=data.erasing, re_mode="pixel", scale=data.crop_scale, ratio=data.crop_ratio, hflip=data.flip,
            auto_augment=augment, interpolation=data.interpolation, mean=model.mean, std=model.std,
            num_workers=data.num_workers, persistent_workers=data.num_workers > 0, device=device,
        )  # fmt: skip
        for step in self.loader.dataset.transform.transforms:
            if isinstance(step, RandAugment):
                mend_posterize(step)
        self.mixup, self.loss = None, LabelSmoothingCrossEntropy(config.label_smoothing)
        if config.mixup or config.cutmix:
            self.mixup = Mixup(
                config.mixup, config.cutmix, switch_prob=config.cutmix_share, label_smoothing=config.label_smoothing,
                num_classes=source.num_classes,
            )  # fmt: skip
            self.loss = SoftTargetCrossEntropy()
        groups = parameter_groups(
            task.module, recipe.optim.weight_decay, task.undecayed, lr_scales=task.lr_scales
        )
        self.optimizer = create_optimizer_v2(groups, opt="adamw", lr=recipe.optim.lr)
        self.keep_R1 = 1 - torch.tensor(task.rates, device=device)[:, None]
        self.batches = self._forever()

    def _forever(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from self.loader

    def take_step(self) -> None:
        """Loads, mixes and trains on one global batch."""
        train, module = self.recipe.train, self.module
        dtype, accumulated = dtype_of(train.precision), train.global_batch // train.micro_batch
        for _ in range(accumulated):
            images_BCHW, labels = next(self.batches)
            if self.mixup is not None:
                images_BCHW, labels = self.mixup(images_BCHW, labels)
            scale_RB = torch.bernoulli(self.keep_R1.expand(-1, len(images_BCHW))) / self.keep_R1
            with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
                tokens_BLD = module.backbone(images_BCHW, scale_RB)
                pooled_BD = tokens_BLD[:, module.backbone.num_prefix_tokens :].mean(1)
                logits_BK = module.head(module.normed(pooled_BD))
            (self.loss(logits_BK.float(), labels) / accumulated).backward()
        dispatch_clip_grad(module.parameters(), self.recipe.optim.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()


class _TakingTurns:
    """Stands in for the loader: what it hands out is the loader's own, and after each of our steps timm's takes one."""

    def __init__(self, loader: TrainLoader, peer: TimmLoop) -> None:
        self.steps_per_epoch = loader.steps_per_epoch
        self.loader, self.peer = loader, peer
        self.ours_ms: list[float] = []
        self.timm_ms: list[float] = []

    @property
    def problem(self) -> str:
        return self.loader.problem

    def iterate(self, start_step: int, reordered: int = 0) -> Generator[list[Batch], None, None]:
        batches = self.loader.iterate(start_step, reordered)
        try:
            while True:
                began = now(self.peer.device)
                yield next(batches)
                self.ours_ms.append(1e3 * (now(self.peer.device) - began))
                began = now(self.peer.device)
                self.peer.take_step()
                self.timm_ms.append(1e3 * (now(self.peer.device) - began))
        finally:
            batches.close()


def bench_finetune(recipe_name: str, overrides: Sequence[str], num_steps: int) -> dict[str, Any]:
    """Measures whole fine-tuning steps in this process, the two loops in turns, and prints a table.

    Args:
        recipe_name: recipe of task classification; nothing is evaluated.
        overrides: settings that replace the recipe's.
        num_steps: measured steps of each loop, after a warm-up.

    Returns:
        The measurements: times in ms.

    Raises:
        UserError: the recipe is of another task.
    """
    if num_steps < 2:
        raise UserError(f"--steps: got {num_steps}, expected at least 2")
    total = num_steps + WARM_UP_STEPS + 1  # the last step ends in a checkpoint and is not measured
    with tempfile.TemporaryDirectory() as folder:
        alone = settings_alone(folder, total)
        recipe = load_recipe(recipe_name, [*overrides, *alone])
        if recipe.task != "classification":
            raise UserError(
                f"{recipe_name}: its task is {recipe.task}; bench finetune expects classification"
            )
        world = api.join(recipe)
        trainer = api.build_trainer(recipe, world)
        turns = _TakingTurns(trainer.loader, TimmLoop(recipe, world.device))
        trainer.loader = turns  # type: ignore[assignment]
        trainer.train()
    result = {
        "environment": environment(), "recipe": recipe_name, "overrides": list(overrides),
        "ours_ms": turns.ours_ms[WARM_UP_STEPS:], "timm_ms": turns.timm_ms[WARM_UP_STEPS:],
    }  # fmt: skip
    show(result, "timm", recipe.train.global_batch)
    return result


def show(result: dict[str, Any], peer: str, images: int, own: str = "ours") -> None:
    """Prints the times of two loops that took turns.

    Args:
        result: OWN_ms, and PEER_ms.
        peer: name of the other loop.
        images: of a step.
        own: name of ours.
    """
    table = Table("loop", "ms a step, median (deciles)", "images/s", "ratio")
    medians = {name: statistics.median(result[f"{name}_ms"]) for name in (own, peer)}
    for name, median in medians.items():
        p10, *_, p90 = statistics.quantiles(result[f"{name}_ms"], n=10, method="inclusive")
        table.add_row(
            name, f"{median:.1f} ({p10:.1f} to {p90:.1f})", f"{1e3 * images / median:.0f}",
            f"{median / medians[peer]:.3f}" if name == own else "",
        )  # fmt: skip
    console.print(table)
