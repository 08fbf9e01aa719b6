"""The loop's surroundings; what it computes is proved in tests/distributed."""

import gc
from collections.abc import Callable
from typing import Any

import pytest

from fd_scale import api
from fd_scale.config import Recipe
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
