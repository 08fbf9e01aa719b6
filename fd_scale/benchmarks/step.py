"""`fd-scale bench step`: our step beside a bare PyTorch loop of the same models, taking turns in one run."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.table import Table
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fd_scale import api, distributed
from fd_scale.checkpoint import write_atomically
from fd_scale.config import Recipe, load_recipe
from fd_scale.data import Batch, TrainLoader, open_source
from fd_scale.errors import UserError
from fd_scale.log import console
from fd_scale.models import dtype_of
from fd_scale.run_folder import environment

VARIANTS = (("zero0", 1), ("zero3", 2))
WARM_UP_STEPS = 5


def bench_step(recipe: str, overrides: list[str], num_steps: int) -> dict[str, Any]:
    """Measures one optimizer step at ZeRO 0 on one process and at ZeRO 3 on two; prints a table.

    Args:
        recipe: recipe of a distillation.
        overrides: settings that replace the recipe's.
        num_steps: measured steps of each loop, after a warm-up.

    Returns:
        The measurements: times in ms.
    """
    if num_steps < 2:
        raise UserError(f"--steps: got {num_steps}, expected at least 2")
    load_recipe(recipe, overrides)  # its faults are told here, not by a child
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for ds_config, num_ranks in VARIANTS:
            # The last step ends in a checkpoint and is not measured.
            alone = settings_alone(f"{folder}/{ds_config}", num_steps + WARM_UP_STEPS + 1)
            settings = [*overrides, f"train.ds_config={ds_config}", *alone]
            rows.append(
                _in_ranks(num_ranks, [recipe, str(num_steps), f"{folder}/{ds_config}.json", *settings])
            )
    result = {"environment": environment(), "recipe": recipe, "overrides": overrides, "rows": rows}
    _show(result)
    return result


def _in_ranks(num_ranks: int, arguments: list[str]) -> dict[str, Any]:
    threads = max(1, (os.cpu_count() or 1) // num_ranks)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "fd_scale.benchmarks.step", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        check=False,
    )
    if done.returncode:
        raise UserError(f"bench: {num_ranks} ranks ended with code {done.returncode}; their words are above")
    row: dict[str, Any] = json.loads(Path(arguments[2]).read_text(encoding="utf-8"))
    return row


def settings_alone(folder: str, num_steps: int) -> list[str]:
    """Returns settings of a run that takes steps and does nothing besides.

    Args:
        folder: of the run.
        num_steps: of the run, which ends in a checkpoint.
    """
    return [
        f"run_dir={folder}/run", "data.evaluation=null", "train.epochs=null", f"train.steps={num_steps}",
        "optim.warmup_epochs=0", "optim.warmup_steps=0", "checkpoint.save_every_steps=1000000",
        "log.images_every_steps=0", "log.every_steps=10",
    ]  # fmt: skip


def now(device: torch.device) -> float:
    """Returns the clock's seconds, once a GPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class TakingTurns:
    """Stands in for the loader: hands out batches from memory, and runs a bare step after each of ours.

    The time between a batch and the next one is that of the whole loop, with its log lines.
    """

    def __init__(self, loader: TrainLoader, bare: BareLoop, num_batches: int) -> None:
        self.steps_per_epoch = loader.steps_per_epoch
        self.bare = bare
        batches = loader.iterate(0)
        began = time.perf_counter()
        self.batches = [next(batches) for _ in range(num_batches)]
        self.loader_ms = 1e3 * (time.perf_counter() - began) / num_batches
        self.problem = loader.problem
        batches.close()
        self.ours_ms: list[float] = []
        self.bare_ms: list[float] = []

    def iterate(self, start_step: int, reordered: int = 0) -> Generator[list[Batch], None, None]:
        step = start_step
        while True:
            batches = self.batches[step % len(self.batches)]
            began = now(self.bare.device)
            yield batches
            self.ours_ms.append(1e3 * (now(self.bare.device) - began))
            began = now(self.bare.device)
            self.bare.take_step(batches)
            self.bare_ms.append(1e3 * (now(self.bare.device) - began))
            step += 1


class Bare(Protocol):
    """What a bare loop asks of a task; each as of `fd_scale.trainer.Task`."""

    @property
    def module(self) -> nn.Module: ...

    def counts(self, batch: Batch) -> dict[str, float]: ...

    def inputs(self, batch: Batch) -> dict[str, Any]: ...


class BareLoop:
    """What one would write without this package: DDP on many ranks, torch's fused AdamW, clipping.

    Args:
        task: what is trained.
        recipe: learning rate, clipping and precision.
        world: ranks.
        autocast: whether the precision is autocast's; else it is the module's own.
    """

    def __init__(self, task: Bare, recipe: Recipe, world: distributed.World, autocast: bool = True) -> None:
        self.task = task
        self.autocast = autocast
        self.recipe = recipe
        self.device = world.device
        module = task.module.to(world.device)
        self.module = DistributedDataParallel(module) if world.size > 1 else module
        self.num_ranks = world.size
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=recipe.optim.lr, fused=True)

    def take_step(self, micro_batches: list[Batch]) -> None:
        dtype = dtype_of(self.recipe.train.precision)
        optimizer = self.optimizer
        for batch in micro_batches:
            on_device = batch.to(self.device)
            with torch.autocast(self.device.type, dtype, enabled=self.autocast and dtype != torch.float32):
                outputs = self.module(**self.task.inputs(on_device))
            # DDP averages over ranks.
            terms = [outputs[name] / count for name, count in self.task.counts(batch).items()]
            (torch.stack(terms).sum() / len(micro_batches)).backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.recipe.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad()


def _measure(recipe: Recipe, num_steps: int, json_file: str) -> None:
    """Runs on every rank; rank 0 writes the measurements."""
    world = api.join(recipe)
    trainer = api.build_trainer(recipe, world)
    bare_task = api.build_task(recipe, open_source(recipe.data.train))
    bare_task.prepare(world, trainer.loader)
    turns = TakingTurns(trainer.loader, BareLoop(bare_task, recipe, world), min(num_steps, 16))
    trainer.loader = turns  # type: ignore[assignment]
    trainer.train()
    if world.is_main:
        times = {
            "loader_ms": turns.loader_ms,
            "ours_ms": turns.ours_ms[WARM_UP_STEPS:],
            "bare_ms": turns.bare_ms[WARM_UP_STEPS:],
        }
        row = {"ds_config": recipe.train.ds_config, "ranks": world.size, "device": world.device.type} | times
        write_atomically(Path(json_file), json.dumps(row))


def _show(result: dict[str, Any]) -> None:
    table = Table(title=f"One optimizer step of {result['recipe']}: mean ± s.d.; ratios of means")
    for column in ("engine", "ours", "bare loop", "ours / bare", "loader alone", "loader / ours"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        ours, bare = statistics.mean(row["ours_ms"]), statistics.mean(row["bare_ms"])
        table.add_row(
            f"{row['ds_config']}, {row['ranks']} {row['device']} rank{'s' if row['ranks'] > 1 else ''}",
            f"{ours:.1f} ± {statistics.stdev(row['ours_ms']):.1f} ms",
            f"{bare:.1f} ± {statistics.stdev(row['bare_ms']):.1f} ms",
            f"{ours / bare:.3f}",
            f"{row['loader_ms']:.1f} ms",
            f"{row['loader_ms'] / ours:.3f}",
        )
    console.print(table)


if __name__ == "__main__":
    name, steps, file, *settings = sys.argv[1:]
    _measure(load_recipe(name, settings), int(steps), file)
