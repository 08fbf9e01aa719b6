"""`fd-scale bench prediction`: images a second and peak memory of a segmentation's prediction, by size.

Shape legend: C = 3 colours, H, W = pixels.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from fd_scale import api
from fd_scale.config import load_recipe
from fd_scale.errors import UserError
from fd_scale.finetune import SegmentationTask
from fd_scale.log import console
from fd_scale.metrics import memory_gib
from fd_scale.models import dtype_of, resolved
from fd_scale.run_folder import environment


def bench_prediction(
    recipe_name: str, overrides: Sequence[str], sides: Sequence[int], repeats: int
) -> dict[str, Any]:
    """Predicts square images of noise, as they are and as the recipe says, with random weights; prints a table.

    Args:
        recipe_name: recipe of task segmentation; its data are not read, and `segmentation.num_classes` is needed.
        overrides: settings that replace the recipe's.
        sides: of the images in pixels.
        repeats: images of each side that are measured, after one that is not.

    Returns:
        The measurements; of each side, `windows`, `seconds` of each image and `peak_gib` of the process, or of the GPU,
        so far.

    Raises:
        UserError: the recipe is of another task, or does not say how many classes there are.
    """
    if min(sides) < 1 or repeats < 1:
        raise UserError(f"--sides, --repeats: got {list(sides)} and {repeats}, expected 1 or more")
    recipe = load_recipe(recipe_name, [*overrides, "model.weights=null", "data.evaluation=null"])
    if recipe.segmentation is None or recipe.segmentation.num_classes is None:
        raise UserError(
            f"{recipe_name}: bench prediction expects task segmentation with segmentation.num_classes set"
        )
    # As it is: a benchmark of a size that is resized to another one would be that of the other one.
    recipe = resolved(replace(recipe, segmentation=replace(recipe.segmentation, short_side=0)))
    world = api.join(recipe)
    task = api.build_task(recipe, None)
    assert isinstance(task, SegmentationTask), "the recipe's task"
    module = task.module.to(world.device, dtype_of(recipe.train.precision)).eval()

    def segment(images_BCHW: Tensor) -> Tensor:
        return module(images_BCHW=images_BCHW)["logits"]

    result: dict[str, Any] = {
        "environment": environment(), "recipe": recipe_name, "overrides": list(overrides),
        "model_gib": memory_gib(world.device), "sides": {},
    }  # fmt: skip
    table = Table("side, px", "windows", "s an image (all)", "images/s", "peak of the process or GPU, GiB")
    table.add_row("the model alone", "", "", "", f"{result['model_gib']:.2f}")
    generator = torch.Generator().manual_seed(0)
    for side in sorted(sides):  # the peak never falls
        image_CHW = torch.randint(0, 256, (3, side, side), dtype=torch.uint8, generator=generator)
        image_CHW = image_CHW.to(world.device)
        seconds = []
        with torch.no_grad():
            for _ in range(repeats + 1):
                start = time.perf_counter()
                task.predictor(image_CHW, segment).cpu()  # waits for the device
                seconds.append(time.perf_counter() - start)
        peak_gib = memory_gib(world.device)
        windows = task.predictor.num_windows(side, side)
        result["sides"][str(side)] = {"windows": windows, "seconds": seconds[1:], "peak_gib": peak_gib}
        mean = sum(seconds[1:]) / repeats
        table.add_row(
            str(side), str(windows),
            f"{mean:.2f} ({', '.join(f'{each:.2f}' for each in seconds[1:])})", f"{1 / mean:.3g}", f"{peak_gib:.2f}",
        )  # fmt: skip
    console.print(table)
    return result
