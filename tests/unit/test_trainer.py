"""The loop's surroundings; what it computes is proved in tests/distributed."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from fd_scale import api
from fd_scale.config import Recipe
from fd_scale.distill import DistillationTask
from fd_scale.trainer import Trainer


@pytest.mark.slow
def test_collections_pass_over_what_is_built(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen, pauses = [], []
    take_step = Trainer.train_step

    def train_step(trainer: Trainer, *arguments: Any) -> None:
        take_step(trainer, *arguments)
        frozen.append(gc.get_freeze_count())
        pauses.append(len(gc.get_objects()))  # what a full collection looks at

    monkeypatch.setattr(Trainer, "train_step", train_step)
    gc.collect()
    before = len(gc.get_objects())
    api.train(make_recipe(train__steps=2))
    assert min(frozen) >= before
    assert max(pauses) < before / 2
    assert gc.get_freeze_count() == 0, "what a run leaves can be collected"


@pytest.mark.parametrize("stage", ["zero1", "zero3"])
def test_a_run_leaves_no_model_in_memory(make_recipe: Callable[..., Recipe], stage: str) -> None:
    """A notebook trains one recipe after the other."""
    recipe = make_recipe(train__steps=1, train__ds_config=stage)
    [teacher] = recipe.distill.teachers  # type: ignore[union-attr]
    recipe = replace(recipe, distill=replace(recipe.distill, teachers=[replace(teacher, partitioned=True)]))
    trainer = api.start(recipe)
    trainer.train()
    assert isinstance(trainer.task, DistillationTask)
    models = [trainer.task.module, trainer.task.teachers[0].model, trainer.engine.optimizer]
    left = [weakref.ref(model) for model in models]
    del trainer, models
    gc.collect()
    assert [reference() for reference in left] == [None] * 3


def test_after_a_run_in_parts_torch_is_as_before(make_recipe: Callable[..., Recipe]) -> None:
    """DeepSpeed's linear layer stays in torch's place; of others' models it has no part."""
    api.train(make_recipe("classification", train__steps=1, train__ds_config="zero3"))
    layer, x_BC = nn.Linear(3, 2), torch.randn(4, 3)
    assert torch.allclose(torch.func.vmap(layer)(x_BC), x_BC @ layer.weight.T + layer.bias)
    assert "Addmm" in str(layer(x_BC).grad_fn)
