"""Starts a verb as a user would: a process of its own, whose run folder is an ordinary one."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, TypeVar

from fd_scale.config import load_recipe
from fd_scale.errors import PREEMPTED, UserError
from fd_scale.metrics import read_metrics
from fd_scale.models import resolved
from fd_scale.run_folder import last_start, read_recipe, weights_of

_Found = TypeVar("_Found")

_STOPPED = (PREEMPTED, -signal.SIGTERM)
"""Codes of a run that was preempted: after a step, or before there was one."""


class OutOfTimeError(UserError):
    """Time was up before a run was complete."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Launcher:
    """How runs are started; each process has a core of its own."""

    num_ranks: int = 1
    """Processes of a run; more than one start under torchrun."""
    show: bool = False
    """Whether what a run says is shown."""
    end: float = inf
    """Of `time.monotonic`, when runs of one rank are preempted, and after which none begins."""

    def run(self, verb: str, recipe: str, run_dir: Path, settings: Sequence[str]) -> Path:
        """Runs a recipe to its end, from where it stood; returns its folder.

        Raises:
            OutOfTimeError: it was preempted, or did not begin.
            UserError: it failed; what it said is in the message where it was not shown.
        """
        late = OutOfTimeError(f"{run_dir}: not complete when the time was up; the same command goes on")
        if time.monotonic() >= self.end:
            raise late
        launcher = [sys.executable]
        if self.num_ranks > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.num_ranks}"]
        child = subprocess.Popen(
            [*launcher, "-m", "fd_scale", verb, recipe, f"run_dir={run_dir}", *settings],
            env={"OMP_NUM_THREADS": "1"} | os.environ,
            stderr=None if self.show else subprocess.PIPE,
            text=True,
        )
        try:
            _, said = child.communicate(timeout=None if self.end == inf else self.end - time.monotonic())
        except subprocess.TimeoutExpired:
            child.terminate()
            _, said = child.communicate()
        except BaseException:
            child.terminate()
            raise
        if child.returncode in _STOPPED:
            raise late
        if child.returncode:
            lines = (said or "see above").strip().splitlines()
            # Its own sentence, behind which torchrun has a report of each rank.
            shown = "; ".join([line for line in lines if line.startswith("fd-scale: ")][-1:] or lines[-3:])
            command = shlex.join(["fd-scale", verb, recipe, f"run_dir={run_dir}", *settings])
            raise UserError(f"`{command}` ended with code {child.returncode}: {shown}")
        return run_dir


def concurrently(
    function: Callable[..., _Found], arguments: Iterable[tuple[Any, ...]], at_a_time: int
) -> Iterator[_Found]:
    """Calls a function in threads and yields what it returns, in order; after an error no other call begins."""
    failed: list[BaseException] = []

    def call(each: tuple[Any, ...]) -> _Found:
        if failed:
            raise failed[0]  # it may be of a later call: what is seen is why this one did not begin
        try:
            return function(*each)
        except BaseException as error:
            failed.append(error)  # here: this thread would begin the next call before another sees the error
            raise

    with ThreadPoolExecutor(at_a_time) as pool:
        yield from pool.map(call, arguments)


def is_of(run_dir: Path, recipe: str, settings: Sequence[str]) -> bool:
    """True for the folder of a run of this very recipe with these settings and weights, complete or not."""
    wanted = resolved(load_recipe(recipe, [f"run_dir={run_dir}", *settings]))
    # Read and compared, not as text: a run of an earlier version may lack settings, which have their defaults.
    same = (run_dir / "recipe.yaml").is_file() and read_recipe(run_dir) == wanted
    # The file of a teacher that was trained again has the same name.
    return same and last_start(run_dir).get("weights") == weights_of(wanted)


def is_evaluated(run_dir: Path, recipe: str, settings: Sequence[str]) -> bool:
    """True for such a run, its length in steps, that was evaluated after the last one."""
    lines = read_metrics(run_dir, "evaluation")
    if (run_dir / "preempt").exists():  # a start clears it
        return False
    if not lines or lines[-1]["step"] != load_recipe(recipe, list(settings)).train.steps:
        return False
    return is_of(run_dir, recipe, settings)
