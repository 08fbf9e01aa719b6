"""Every packaged distillation at its full size: it builds, and a step gives every parameter a gradient."""

from dataclasses import replace

import pytest
import torch

from fd_scale.config import Recipe, load_recipe, packaged_recipes
from fd_scale.data import Batch
from fd_scale.distill import DistillationTask
from fd_scale.models import resolved

IMAGENET = sorted(name for name in packaged_recipes() if name.startswith("imagenet/"))


def without_weights(recipe: Recipe) -> Recipe:
    assert recipe.distill is not None
    teachers = [
        replace(teacher, model=replace(teacher.model, weights=None)) for teacher in recipe.distill.teachers
    ]
    return resolved(replace(recipe, distill=replace(recipe.distill, teachers=teachers)))


@pytest.mark.parametrize("name", IMAGENET)
def test_a_step_of_shapes(name: str) -> None:
    """On the meta device: all shapes and dtypes of a step, no arithmetic, up to the 3 billion parameters."""
    recipe = without_weights(load_recipe(name))
    size = recipe.model.size
    with torch.device("meta"):
        task = DistillationTask(recipe, None)
        task.module.to(torch.bfloat16)
        images = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    batch = Batch(images, torch.zeros(2), torch.arange(2), 0)
    outputs = task.module(**task.inputs(batch))
    outputs["loss"].backward()
    assert all(parameter.grad is not None for parameter in task.module.parameters())
    [target] = task.teachers[0].targets
    assert target.grid == task.grid, "teacher and student of a packaged recipe have one grid"
    with_cls = "vit" in recipe.model.name and "siglip" not in name
    assert task.counts(batch) == {"loss": 2 * (task.grid[0] * task.grid[1] + with_cls)}


def test_the_published_values() -> None:
    """Learning rates and drop path of the table in the authors' code."""
    published = {
        "clip_vit_base": (1.2e-3, 2e-6, 2e-5, 0.2), "clip_vit_large": (1.2e-3, 2e-6, 2e-5, 0.3),
        "dino_vit_base": (1.2e-3, 2e-6, 2e-5, 0.3), "deit_vit_base": (1.2e-3, 2e-6, 2e-5, 0.3),
        "esvit_swin_base": (8e-4, 4e-6, 4e-5, 0.3),
    }  # fmt: skip
    for name, values in published.items():
        recipe = load_recipe(f"imagenet/{name}")
        optim = recipe.optim
        rate = recipe.model.overrides["drop_path_rate"]
        assert (optim.lr, optim.warmup_lr, optim.min_lr, rate) == values
        assert (recipe.train.global_batch, recipe.train.epochs, optim.warmup_epochs) == (2048, 300, 10)
        assert (optim.weight_decay, optim.grad_clip, optim.betas, optim.eps) == (
            0.05,
            3.0,
            (0.9, 0.999),
            1e-8,
        )
        assert recipe.distill is not None
        assert (recipe.distill.loss, recipe.distill.beta) == ("whitened_smooth_l1", 2.0)


def test_headers_say_what_is_known() -> None:
    for name in IMAGENET:
        header = packaged_recipes()[name].read_text().split("task:")[0]
        for word in ("Command:", "Hardware:", "Expected:", "Source:", "Status:   unreproduced"):
            assert word in header, (name, word)
