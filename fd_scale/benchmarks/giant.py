"""`fd-scale bench giant`: a process for each cell, and a record of it before the next one begins."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from fd_scale import log
from fd_scale.benchmarks.cells import CELLS, RECIPE, Cell
from fd_scale.benchmarks.records import Environment, Record, Records
from fd_scale.benchmarks.report import show
from fd_scale.config import Recipe, load_recipe
from fd_scale.errors import UserError
from fd_scale.hardware import Gpu, find_gpu
from fd_scale.plan import Counts, count, plan, present_gpu

logger = logging.getLogger(__name__)

PROGRAM = (sys.executable, "-m", "fd_scale.benchmarks.one_cell")
CELL_TIMEOUT_S = 300.0
NUM_STEPS = 10
LAST_WORDS = 30
"""Lines of a cell that failed, as they are shown."""


def bench_giant(
    out: Path,
    match: str = "",
    minutes: float = 8.5,
    *,
    report: bool = False,
    device: Literal["cpu", "cuda"] = "cuda",
    cells: Sequence[Cell] = CELLS,
) -> None:
    """Measures the cells that have no record of this code yet, and prints a table of all records.

    Args:
        out: folder of the JSON files.
        match: regular expression on the names of cells; the others wait.
        minutes: nothing new is started after them.
        report: whether nothing is measured, only printed.
        device: where steps are taken. What is measured on the CPU has no MFU and no peak of memory.
        cells: what is to be measured, most wanted first.

    Raises:
        UserError: a wrong argument, or there is no GPU.
    """
    end = time.monotonic() + 60 * minutes
    try:
        wanted = re.compile(match)
    except re.error as error:
        raise UserError(f"--match: {match!r} is no regular expression: {error}") from None
    if report:
        show(Records.newest(out))
        return
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "bench giant: torch sees no CUDA device, so nothing is measured and the table says 'not measured'; "
            "--report prints it"
        )
    log.set_up()
    here = Environment.here()
    records = Records.read(out / here.file_name)
    left = [cell for cell in cells if wanted.search(cell.name) and not records.has(cell.name, here.source)]
    planner = _Planner(present_gpu(torch.device("cuda")) if device == "cuda" else None)
    while left and time.monotonic() < end:
        cell = left.pop(0)
        logger.info("%s: measuring", cell.name)
        records.add(_measured(cell, device, planner))
    logger.info("%d cells left for the next call; results: %s", len(left), records.path)
    show(records)


class _Planner:
    """Plans cells, and counts each model once.

    Args:
        gpu: the GPU that is here; none: there is none, and the plan is of another.
    """

    def __init__(self, gpu: Gpu | None) -> None:
        self.gpu = gpu
        self.counts: dict[tuple[str, ...], Counts] = {}

    def numbers(self, cell: Cell, recipe: Recipe) -> tuple[float | None, float | None]:
        """Returns the images/s at an MFU of 1 and the GiB that the plan predicts, where they are known."""
        key = (cell.model, recipe.train.kernels, *cell.settings)
        try:
            counts = self.counts.get(key) or count(recipe)
        except UserError as error:
            logger.warning("%s has no plan: %s", cell.name, error)
            return None, None
        self.counts[key] = counts
        gpu = self.gpu or find_gpu("a100-40g")
        planned = plan(cell.name, recipe, gpu, 1, images=0, counts=counts)
        peak_images_per_s = planned.peak_images_per_s if self.gpu else None
        return peak_images_per_s, planned.own.memory.total / 2**30 if cell.is_ours else None


def _measured(cell: Cell, device: str, planner: _Planner) -> Record:
    """Runs a cell; its plan is made while it runs, on the processor that waits."""
    settings = [*cell.overrides, f"train.device={device}"]
    recipe = load_recipe(RECIPE, settings)
    environment = Environment.here()
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/words", "w+", encoding="utf-8") as words:
        result = Path(folder) / "result.json"
        command = [str(result), RECIPE, cell.way, str(NUM_STEPS), *settings]
        child = subprocess.Popen([*PROGRAM, *command], stdout=words, stderr=words)
        began = time.monotonic()
        try:
            peak_images_per_s, plan_gib = planner.numbers(cell, recipe)
            found = _awaited(child, result, began + CELL_TIMEOUT_S - time.monotonic())
        finally:
            child.kill()  # nothing where it has ended
            child.wait()
        if "error" in found:
            words.seek(0)
            logger.error("%s: %s; its last words:", cell.name, found["error"])
            sys.stderr.writelines(words.readlines()[-LAST_WORDS:])
    mfu = found["images_per_s"] / peak_images_per_s if peak_images_per_s and "images_per_s" in found else None
    return Record(
        cell=cell.name, recipe=RECIPE, settings=settings, environment=environment, micro_batch=cell.micro_batch,
        mfu=mfu, plan_gib=plan_gib, **found,
    )  # fmt: skip


def _awaited(child: subprocess.Popen[bytes], result: Path, timeout_s: float) -> dict[str, Any]:
    """Returns what a cell has written, or the error that stands for it."""
    try:
        ended = f"its process ended with code {child.wait(max(timeout_s, 0.0))}"
    except subprocess.TimeoutExpired:
        ended = f"time-out: not done after {CELL_TIMEOUT_S:g} s"
    if not result.exists():
        return {"error": ended}
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found
