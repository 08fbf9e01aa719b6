"""`fd-scale bench features`: a distillation's step beside its teachers, and with their features read from disk.

Shape legend: B = images, L = tokens, D = channels of a target.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from fd_scale import api
from fd_scale.benchmarks.finetune import WARM_UP_STEPS, show
from fd_scale.benchmarks.step import now, settings_alone
from fd_scale.config import FeaturesConfig, load_recipe
from fd_scale.data import open_source
from fd_scale.distill import DistillationTask
from fd_scale.distill.features import FeatureCodec
from fd_scale.errors import UserError
from fd_scale.log import console
from fd_scale.models import resolved
from fd_scale.run_folder import environment
from fd_scale.trainer import Trainer
from fd_scale.verbs import features as teacher_features

PRECISIONS = ("bf16", "int8")


def bench_features(recipe_name: str, overrides: Sequence[str], num_steps: int) -> dict[str, Any]:
    """Computes one view of all training images, then measures whole steps of both kinds in turns; prints tables.

    Args:
        recipe_name: recipe of a distillation; nothing is evaluated.
        overrides: settings that replace the recipe's.
        num_steps: measured steps of each loop, after a warm-up.

    Returns:
        The measurements: times in ms, `precisions` with bytes and errors, `features_s` to compute them.

    Raises:
        UserError: the recipe is of another task, or too few steps.
    """
    if num_steps < 2:
        raise UserError(f"--steps: got {num_steps}, expected at least 2")
    with tempfile.TemporaryDirectory() as folder:
        alone = settings_alone(folder, num_steps + WARM_UP_STEPS)
        recipe = resolved(load_recipe(recipe_name, [*overrides, *alone]))
        if recipe.distill is None:
            raise UserError(
                f"{recipe_name}: its task is {recipe.task}; bench features expects a distillation"
            )
        recipe = replace(recipe, distill=replace(recipe.distill, features=None))
        assert recipe.distill is not None, "checked above"
        world = api.join(recipe)
        keeping = replace(
            recipe,
            run_dir=f"{folder}/keeping",
            distill=replace(
                recipe.distill,
                features=FeaturesConfig(folder=f"{folder}/features", views=1, precision="int8"),
            ),
        )
        if world.size > 1:
            raise UserError(f"bench features: {world.size} ranks, expected one process, without torchrun")
        began = time.perf_counter()
        source = open_source(recipe.data.train)
        teacher_features.compute(keeping, teacher_features.train_part(keeping, source), world)
        features_s = time.perf_counter() - began
        trainers = {
            "features": api.build_trainer(keeping, world),
            "teachers": api.build_trainer(recipe, world),
        }
        try:
            times = _in_turns(trainers, num_steps, world.device)
            precisions = _errors(trainers["teachers"])
        finally:
            for trainer in trainers.values():
                trainer.close()
    result = {
        "environment": environment(), "recipe": recipe_name, "overrides": list(overrides), "precisions": precisions,
        "features_s": features_s, "features_images": len(source),
    } | {f"{name}_ms": values for name, values in times.items()}  # fmt: skip
    show(result, "teachers", recipe.train.global_batch, "features")
    _show(result)
    return result


def _in_turns(trainers: dict[str, Trainer], num_steps: int, device: torch.device) -> dict[str, list[float]]:
    """Times of whole steps, images and all, of trainers that take turns."""
    batches = {name: trainer.loader.iterate(0) for name, trainer in trainers.items()}
    times: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(num_steps + WARM_UP_STEPS):
        for name, trainer in trainers.items():
            began = now(device)
            micro_batches = next(batches[name])
            trainer.train_step(micro_batches, trainer.agree(micro_batches))
            times[name].append(1e3 * (now(device) - began))
    return {name: values[WARM_UP_STEPS:] for name, values in times.items()}


def _errors(trainer: Trainer) -> dict[str, dict[str, float]]:
    """What is lost of the first images' features, as the loss sees them: whitened, where a channel's deviation is 1."""
    task = trainer.task
    assert isinstance(task, DistillationTask), "the recipe's task"
    [batch, *_] = next(trainer.loader.iterate(0))
    images = batch.images.to(trainer.world.device)
    features = [tokens_BLD for teacher in task.teachers for tokens_BLD in teacher.features(images)]
    targets = [target for targets in task.targets for target in targets]
    found = {}
    for precision in PRECISIONS:
        codec = FeatureCodec(targets, precision)
        kept = codec.decode(codec.encode(features))
        errors = torch.cat(
            [(_whitened(ours) - _whitened(own)).flatten() for ours, own in zip(kept, features, strict=True)]
        )
        found[precision] = {
            "bytes": codec.record_bytes,
            "rms": float(errors.square().mean().sqrt()), "largest": float(errors.abs().max()),
        }  # fmt: skip
    return found


def _whitened(tokens_BLD: Tensor) -> Tensor:
    return F.layer_norm(tokens_BLD.float(), tokens_BLD.shape[-1:])


def _show(result: dict[str, Any]) -> None:
    table = Table(
        "precision", "KiB an image and view", "error, r.m.s.", "largest", title="Whitened features from disk"
    )
    for precision, facts in result["precisions"].items():
        table.add_row(
            precision, f"{facts['bytes'] / 1024:.1f}", f"{facts['rms']:.1e}", f"{facts['largest']:.1e}"
        )
    console.print(table)
    rate = result["features_images"] / result["features_s"]
    console.print(f"computed at {rate:.1f} images/s, once", highlight=False)
