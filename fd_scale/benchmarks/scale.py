"""`fd-scale bench scale`: a recipe's step on more and more of the ranks of one job.

The ranks that torchrun started measure nothing themselves: for each size the first of them start a process each, which
form a world of their own, while the others wait. DeepSpeed keeps its first process group for as long as a process
lives, and what goes wrong on one size (memory, most often) leaves nothing behind for the next.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fd_scale import distributed, log
from fd_scale.benchmarks.cells import STEPS_ALONE
from fd_scale.benchmarks.records import Environment, Record, Records
from fd_scale.benchmarks.scale_report import show
from fd_scale.cluster.job import free_port
from fd_scale.config import load_recipe
from fd_scale.distributed import World, micro_batch_of_a_rank
from fd_scale.errors import UserError
from fd_scale.plan.scaling import Assumptions

logger = logging.getLogger(__name__)

PROGRAM = (sys.executable, "-m", "fd_scale.benchmarks.one_cell")
SIZE_TIMEOUT_S = 900.0
POLL_S = 0.5
LAST_WORDS = 30
"""Lines of a rank that failed, as they are shown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What is measured on each size."""

    recipe: str
    """A distillation."""
    overrides: tuple[str, ...] = ()
    weak: bool = False
    """Whether each rank keeps the recipe's micro-batch, and the global batch grows."""
    num_steps: int = 10

    def settings(self, size: int) -> list[str]:
        """Of the recipe, on so many ranks."""
        given = list(self.overrides)
        recipe = load_recipe(self.recipe, given)
        if recipe.distill is None:
            raise UserError(f"bench scale: the task of {self.recipe} is {recipe.task}, expected distill")
        teachers = range(len(recipe.distill.teachers))
        weights = ["model.weights=null", *(f"distill.teachers.{n}.model.weights=null" for n in teachers)]
        batch = [f"train.global_batch={recipe.train.micro_batch * size}"] if self.weak else []
        return [*given, *STEPS_ALONE, *weights, *batch]

    @property
    def name(self) -> str:
        """Of what is shown."""
        return f"{self.recipe} {'weak' if self.weak else 'strong'}"

    def cell(self, size: int) -> str:
        """Name of a size's record."""
        return f"{self.name} {size}"

    def has(self, records: Records, size: int, here: Environment) -> bool:
        """Whether a size needs no measurement: it has one of this code and these settings, without an error."""
        if not records.has(self.cell(size), here.source):
            return False
        record = records.by_cell[self.cell(size)]
        return record.error is None and record.settings == self.settings(size)

    def rows(self, records: Records | None) -> list[Record]:
        """Records with these settings, by size."""
        found = records.by_cell.values() if records is not None else ()
        own = [
            record
            for record in found
            if record.cell == self.cell(record.num_ranks)
            and record.settings == self.settings(record.num_ranks)
        ]
        return sorted(own, key=lambda record: record.num_ranks)

    def micro_batch(self, size: int) -> int:
        """Images that a rank of so many takes at once.

        Raises:
            UserError: the global batch is no multiple of the ranks.
        """
        recipe = load_recipe(self.recipe, self.settings(size))
        train = recipe.train
        return micro_batch_of_a_rank(train.global_batch, train.micro_batch, size, recipe.crops_together)


def bench_scale(
    job: Job, out: Path, sizes: str | None, assumed: Assumptions, *, report: bool = False
) -> None:
    """Measures the sizes that have no record of this code yet, and prints predicted beside measured; all ranks call it.

    Args:
        job: what is measured.
        out: folder of the JSON files.
        sizes: numbers of ranks, separated by commas; none: `default_sizes`.
        assumed: what the prediction takes on trust.
        report: whether nothing is measured, only printed.

    Raises:
        UserError: a wrong argument.
    """
    if job.num_steps < 2:
        raise UserError(f"--steps: got {job.num_steps}, expected at least 2")
    job.settings(1)  # a recipe of another task ends here
    if report:
        show(job.name, job.rows(Records.newest(out)), assumed)
        return
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = default_sizes(num_ranks) if sizes is None else _parsed(sizes, num_ranks)
    for size in chosen:
        job.micro_batch(size)  # a size that cannot be is told before any is measured
    world = distributed.start("cpu", int(SIZE_TIMEOUT_S))
    log.set_up(world.rank)
    # torchrun ends a job so: what was started here is to end too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    here, records = world.on_main(lambda: _opened(out))
    for size in [size for size in chosen if not job.has(records, size, here)]:
        logger.info("%s: measuring", job.cell(size))
        found = _measured(job, size, world)
        if world.is_main:
            record = Record(
                cell=job.cell(size), recipe=job.recipe, settings=job.settings(size), environment=here,
                num_ranks=size, micro_batch=job.micro_batch(size), **found,
            )  # fmt: skip
            records.add(record)
    if world.is_main:
        logger.info("results: %s", records.path)
        show(job.name, job.rows(records), assumed)


def default_sizes(num_ranks: int) -> list[int]:
    """A rank, or where there are several nodes a node, twice as many, and so on; all in the end."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    size = local if num_ranks > local else 1
    sizes = [size << doubled for doubled in range((num_ranks // size).bit_length())]
    return sizes if sizes[-1] == num_ranks else [*sizes, num_ranks]


def _parsed(text: str, num_ranks: int) -> list[int]:
    parts = text.split(",")
    if not all(part.isdigit() and 1 <= int(part) <= num_ranks for part in parts):
        raise UserError(
            f"--sizes: got {text}, expected numbers of ranks from 1 to {num_ranks}, those of this job, as 1,2,4; "
            "torchrun starts more"
        )
    return sorted({int(part) for part in parts})


def _opened(out: Path) -> tuple[Environment, Records]:
    here = Environment.here()
    return here, Records.read(out / here.file_name)


def _measured(job: Job, size: int, world: World) -> dict[str, Any]:
    """Runs a size on the first ranks; returns fields of a `Record`, on the main rank those that count."""
    port = world.from_main(free_port())
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/words", "w+", encoding="utf-8") as words:
        result = Path(folder) / "result.json"
        child = None
        if world.rank < size:
            command = [*PROGRAM, str(result), job.recipe, "ours", str(job.num_steps), *job.settings(size)]
            child = subprocess.Popen(command, stdout=words, stderr=words, env=_environment(size, port))
        try:
            ended = _awaited(child, result, world)
        finally:
            if child is not None:
                child.kill()  # nothing where it has ended
                child.wait()
        found: dict[str, Any] = {}
        if child is not None:
            found = _read(result) or {"error": ended or f"ended with code {child.returncode}"}
        words.seek(0)
        last = words.readlines()[-LAST_WORDS:] if "error" in found else []
        # A rank that was killed is why others failed; one that was stopped is not; of the rest, the first.
        when = result.stat().st_mtime if result.exists() else math.inf if ended else 0.0
    everyone = world.gather((when, found.get("error"), last))
    wrong = [(when, rank, error, said) for rank, (when, error, said) in enumerate(everyone) if error]
    if world.is_main and wrong:
        _, rank, error, said = min(wrong)
        logger.error("%s: rank %d: %s; its last words:", job.cell(size), rank, error)
        sys.stderr.writelines(said)
        return {"error": f"rank {rank}: {error}"}
    return found


def _awaited(child: subprocess.Popen[bytes] | None, result: Path, world: World) -> str | None:
    """Waits until all have ended, one has failed, or it has taken too long; returns what stopped those still running.

    Ranks agree on it at each poll, so that none waits for one that is no more.
    """
    end = time.monotonic() + SIZE_TIMEOUT_S
    while True:
        running = child is not None and child.poll() is None
        failed = child is not None and (bool(child.returncode) or "error" in (_read(result) or {}))
        num_running, num_failed, late = world.sum([running, failed, time.monotonic() > end])
        if num_running == 0 or num_failed or late:
            break
        time.sleep(POLL_S)
    if not running:
        return None
    return (
        "stopped, as another rank had failed"
        if num_failed
        else f"time-out: not done after {SIZE_TIMEOUT_S:g} s"
    )


def _environment(size: int, port: int) -> dict[str, str]:
    """Of a process that is a rank of a smaller world: its own store, not that of torchrun."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
    if "WORLD_SIZE" in environment:
        local = min(size, int(environment.get("LOCAL_WORLD_SIZE", "1")))
        environment |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(local), "MASTER_PORT": str(port)}
    return environment


def _read(result: Path) -> dict[str, Any] | None:
    """What a rank has written, whole or not at all."""
    if not result.exists():
        return None
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found
