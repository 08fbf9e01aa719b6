"""One cell in a process of its own: it builds, warms up, measures, and writes what it found as JSON.

python -m fd_scale.benchmarks.one_cell FILE RECIPE WAY STEPS key=value ...
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from fd_scale import api
from fd_scale.benchmarks.cells import FSDP2, PEERS, TIMM_COMPILED
from fd_scale.benchmarks.peers import TimmPair, shard_and_compile
from fd_scale.benchmarks.step import Bare, BareLoop, now
from fd_scale.checkpoint import write_atomically
from fd_scale.config import Recipe, load_recipe
from fd_scale.data import Batch, Picture, Targets, TrainLoader, training_transform
from fd_scale.data.base import UNLABELLED
from fd_scale.distill import DistillationTask
from fd_scale.distributed import World, micro_batch_of_a_rank
from fd_scale.models import choose_kernels, dtype_of, resolved
from fd_scale.randomness import hash64

WARM_UP_STEPS = 3
NUM_BATCHES = 2

Step = Callable[[list[Batch]], None]
Phases = Callable[[], dict[str, float]]
"""Seconds in each phase since the last call."""
Sent = Callable[[], float]
"""Bytes that this rank has sent so far."""


class Noise:
    """A source of images that are nowhere: noise, 224 px."""

    targets: Targets = "labels"
    class_names: list[str] | None = None
    num_classes = 0
    fingerprint = "noise"

    def __len__(self) -> int:
        return 2**20

    def name(self, sample_id: int) -> str:
        return f"noise:{sample_id}"

    def key(self, sample_id: int) -> str:
        return str(sample_id)

    def all_labels(self) -> npt.NDArray[np.int64]:
        return np.full(len(self), UNLABELLED)

    def read(self, sample_id: int) -> tuple[Picture, int]:
        words = hash64(0, "noise", sample_id, np.arange(224 * 224 * 3 // 8))
        return Picture.of(Image.fromarray(words.view(np.uint8).reshape(224, 224, 3))), UNLABELLED


def measured(recipe: Recipe, way: str, num_steps: int, world: World) -> dict[str, Any]:
    """Builds a cell and measures its steps.

    Returns:
        Fields of `fd_scale.benchmarks.records.Record`.
    """
    batches = _batches(recipe, world)
    began = now(world.device)
    step, phases, sent = _peer(recipe, way, world) if way in PEERS else _ours(recipe, world)
    built = now(world.device)
    times, sent_before = [], 0.0
    for index in range(WARM_UP_STEPS + num_steps):
        if index == WARM_UP_STEPS:
            phases()
            sent_before = sent()
            if world.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(world.device)
        start = now(world.device)
        step(batches[index % len(batches)])
        times.append(now(world.device) - start)
    p10, *_, p90 = statistics.quantiles(times[WARM_UP_STEPS:], n=10, method="inclusive")
    median = statistics.median(times[WARM_UP_STEPS:])
    return {
        "num_steps": num_steps, "median_ms": 1e3 * median, "p10_ms": 1e3 * p10, "p90_ms": 1e3 * p90,
        "images_per_s": recipe.train.global_batch / median, "build_s": built - began, "first_step_s": times[0],
        "phases_s": {name: seconds / num_steps for name, seconds in phases().items()},
        "sent_bytes": None if way in PEERS else (sent() - sent_before) / num_steps,
    } | _memory(world, graphs=recipe.train.cuda_graphs and way not in PEERS)  # fmt: skip


def _ours(recipe: Recipe, world: World) -> tuple[Step, Phases, Sent]:
    """The trainer's own step: teacher, loss, engine, agreement between ranks."""
    trainer = api.build_trainer(
        recipe, world, source=Noise(), must_fit=False, initialise_on=world.device
    )  # that the plan may be wrong is what is measured, and what the weights are does not matter
    trainer.close()
    trainer.engine.train()

    def step(micro_batches: list[Batch]) -> None:
        trainer.train_step(micro_batches, trainer.agree(micro_batches))
        if trainer.engine.skipped:
            raise RuntimeError("a step was skipped: a gradient is not finite")

    return step, trainer.phases.read, lambda: trainer.engine.sent_bytes


def _peer(recipe: Recipe, way: str, world: World) -> tuple[Step, Phases, Sent]:
    task: Bare
    if way == FSDP2:
        choose_kernels(recipe.train.kernels, world.device)
        with world.device:
            task = api.build_task(recipe, Noise())
        assert isinstance(task, DistillationTask), "the cells distil"
        for teacher in task.teachers:
            teacher.to(world.device)
        shard_and_compile(task.module, world, dtype_of(recipe.train.precision))
    else:
        task = TimmPair(recipe, world.device, compiled=way == TIMM_COMPILED)
    # FSDP2 casts by itself.
    return BareLoop(task, recipe, world, autocast=way != FSDP2).take_step, dict, float


def _batches(recipe: Recipe, world: World) -> list[list[Batch]]:
    source, train = Noise(), recipe.train
    loader = TrainLoader(
        source,
        training_transform(resolved(recipe), source),
        seed=recipe.seed,
        global_batch=train.global_batch,
        micro_batch=micro_batch_of_a_rank(
            train.global_batch, train.micro_batch, world.size, recipe.crops_together
        ),
        rank=world.rank,
        world_size=world.size,
        num_workers=0,
        max_bad_fraction=0,
        pin_memory=world.device.type == "cuda",
    )
    with closing(loader.iterate(0)) as stream:
        return [next(stream) for _ in range(NUM_BATCHES)]


def _memory(world: World, *, graphs: bool) -> dict[str, float]:
    if world.device.type != "cuda":
        return {}
    reserved = torch.cuda.max_memory_reserved(world.device)
    # What a graph writes in its replay is allocated to nobody, and no other code can have it.
    peak = reserved if graphs else torch.cuda.max_memory_allocated(world.device)
    return {"peak_gib": peak / 2**30, "reserved_gib": reserved / 2**30}


def main(file: str, name: str, way: str, num_steps: int, settings: list[str]) -> int:
    """Measures a cell, a recipe's; what goes wrong is written in the place of the measurement."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        run_dir.mkdir()  # each rank its own, since nodes may share no disk
        recipe = load_recipe(name, [*settings, f"run_dir={run_dir}"])
        world = api.join(recipe)
        found: dict[str, Any]
        try:
            found = measured(recipe, way, num_steps, world)
        except Exception as error:  # whatever it is, it is this cell's result
            traceback.print_exc()
            kind = "out of memory" if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
            found = {"error": f"{kind}: {' '.join(str(error).split())[:300]}"}
        write_atomically(Path(file), json.dumps(found))
    return int("error" in found)


if __name__ == "__main__":
    to, of, chosen_way, steps, *given = sys.argv[1:]
    sys.exit(main(to, of, chosen_way, int(steps), given))
