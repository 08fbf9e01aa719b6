"""Our step beside another loop's on the same batches in memory, in turns and in one process."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fd_scale import api
from fd_scale.benchmarks.step import WARM_UP_STEPS, BareLoop, TakingTurns, settings_alone
from fd_scale.config import Recipe, load_recipe
from fd_scale.data import Batch, open_source
from fd_scale.errors import UserError
from fd_scale.run_folder import environment
from fd_scale.trainer import Task


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """Another implementation of what a recipe trains."""

    name: str
    refuse: Callable[[Recipe], None]
    """Raises `UserError` where it has no such thing."""
    module: Callable[[Any], nn.Module]
    """Of a task of ours, of whose module it takes parts or weights."""
    settings: Sequence[str] = ()
    """Of the recipe, which both loops take, because the peer has nothing else."""
    also: Callable[[Task, list[list[Batch]], int], dict[str, list[float]]] | None = None
    """Measures more of what has been trained, given the batches and the number of steps; none: nothing."""


class _Bare:
    """A task of ours with the module of a peer, as `BareLoop` takes it."""

    def __init__(self, task: Task, module: nn.Module) -> None:
        self.task, self.module = task, module

    def counts(self, batch: Batch) -> dict[str, float]:
        return self.task.counts(batch)

    def inputs(self, batch: Batch) -> dict[str, Any]:
        return self.task.inputs(batch)


def beside(recipe_name: str, overrides: Sequence[str], num_steps: int, peer: Peer) -> dict[str, Any]:
    """Measures steps of both loops.

    Args:
        recipe_name: nothing is evaluated.
        overrides: settings that replace the recipe's.
        num_steps: measured steps of each loop, after a warm-up.
        peer: the other loop.

    Returns:
        `ours_ms` and PEER_ms, times of steps, and what the peer measures beside them; `environment`, `recipe`,
        `overrides`, `images` of a step.

    Raises:
        UserError: too few steps, or the peer refuses the recipe.
    """
    if num_steps < 2:
        raise UserError(f"--steps: got {num_steps}, expected at least 2")
    total = num_steps + WARM_UP_STEPS + 1  # the last step ends in a checkpoint and is not measured
    with tempfile.TemporaryDirectory() as folder:
        alone = settings_alone(folder, total)
        peer.refuse(load_recipe(recipe_name, [*overrides, *alone]))
        recipe = load_recipe(recipe_name, [*overrides, *alone, *peer.settings])
        world = api.join(recipe)
        trainer = api.build_trainer(recipe, world)
        task = api.build_task(recipe, open_source(recipe.data.train))
        bare = BareLoop(_Bare(task, peer.module(task)), recipe, world)
        turns = TakingTurns(trainer.loader, bare, min(num_steps, 16))
        trainer.loader = turns  # type: ignore[assignment]
        trainer.train()
        more = peer.also(trainer.task, turns.batches, num_steps) if peer.also is not None else {}
    return {
        "environment": environment(), "recipe": recipe_name, "overrides": list(overrides),
        "images": recipe.train.global_batch, "ours_ms": turns.ours_ms[WARM_UP_STEPS:],
        f"{peer.name}_ms": turns.bare_ms[WARM_UP_STEPS:],
    } | more  # fmt: skip
