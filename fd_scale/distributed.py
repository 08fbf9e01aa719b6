"""Ranks: how a process learns which one it is, and the few things that ranks agree on."""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from fd_scale.errors import CommonError, UserError
from fd_scale.lock import slurm_start
from fd_scale.watch import GRACE_S

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """The ranks of this run, as seen from one of them."""

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on rank 0, which alone writes what the run shows."""
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Returns `values` summed over ranks, on the host, in fp64."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Returns the picklable `value` of every rank, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def common_error(self, problem: str) -> CommonError:
        """Returns what is wrong on the first rank that has a problem (else empty); all ranks know that one has."""
        mine = f"rank {self.rank}: {problem}" if problem and self.rank else problem
        return CommonError(next(filter(None, self.gather(mine))))

    def from_main(self, value: Any) -> Any:
        """Returns rank 0's `value` on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def on_main(self, function: Callable[[], T]) -> T:
        """Runs `function` on rank 0; all ranks get what it returned, or the UserError that it raised."""
        outcome: tuple[Any, str | None] = (None, None)
        if self.is_main:
            try:
                outcome = (function(), None)
            except UserError as error:
                outcome = (None, str(error))
        value, problem = self.from_main(outcome)
        if problem is not None:
            raise UserError(problem)
        return value

    def barrier(self) -> None:
        """Waits until every rank is here."""
        self.sum([0.0])


ALONE = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
"""Of a process that asks nobody: it reads files, and needs no process group."""


def choose_device(wanted: Literal["auto", "cpu", "cuda"], local_rank: int = 0) -> torch.device:
    """Returns the device of this rank.

    Raises:
        UserError: CUDA is asked for and absent, or there are more ranks on this host than GPUs.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            "train.device: got cuda, but torch sees no GPU here "
            f"(torch {torch.__version__}, CUDA {torch.version.cuda}); run on a GPU host or set train.device=cpu"
        )
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"rank {local_rank} of this host has no GPU: {torch.cuda.device_count()} visible; start fewer ranks"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def start(device: Literal["auto", "cpu", "cuda"], timeout_s: int) -> World:
    """Joins the ranks that torchrun started; a process started alone is a world of one.

    CPU tensors travel over gloo and CUDA tensors over NCCL, so that ranks can agree on host values
    without waiting for the GPU. The process group stands until the process ends, and a second run in
    it uses the same one (DeepSpeed keeps hold of its first groups).

    Args:
        device: where to run.
        timeout_s: `train.timeout_s`; a rank waits a little longer for the others. The first call decides.

    Raises:
        UserError: the device is not there.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed wants it, also in a world of one
    chosen = choose_device(device, local_rank)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        timeout = timedelta(seconds=timeout_s + 3 * GRACE_S)  # each rank's watchdog speaks first
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            alone = dist.HashStore()  # type: ignore[attr-defined]  # opens no port
            dist.init_process_group(backend, timeout=timeout, store=alone, rank=0, world_size=1)
        atexit.register(_leave)
    return World(rank=dist.get_rank(), local_rank=local_rank, size=dist.get_world_size(), device=chosen)


def _leave() -> None:
    if dist.is_initialized():  # a notebook may have left by itself
        dist.destroy_process_group()


class Preemption:
    """A flag that says: save and stop after the next step.

    It is raised by a file `preempt` in the run folder (what a batch script writes), or by SIGTERM
    or SIGUSR1 sent to a process that runs alone (under torchrun a signal would end the workers).

    A batch script writes `slurm JOB.RESTARTS` into it, as `slurm_start` says: the file of this very start counts from
    the first step on, even if it was written while libraries were still being imported; another job's does not.
    """

    def __init__(self, run_dir: Path, world: World) -> None:
        self.file = run_dir / "preempt"
        self.world = world
        self.signalled = False
        self.previous: dict[int, Any] = {}
        self.start = slurm_start()
        if world.is_main and (self.start is None or self._written_by() != self.start):
            self.file.unlink(missing_ok=True)  # it stopped an earlier start
        if world.size == 1 and threading.current_thread() is threading.main_thread():  # Python's rule
            for number in (signal.SIGTERM, signal.SIGUSR1):
                self.previous[number] = signal.signal(number, self._raise_flag)

    def _raise_flag(self, number: int, frame: FrameType | None) -> None:
        self.signalled = True

    def _written_by(self) -> str | None:
        """The start of a SLURM job whose batch script wrote the file; none where it was a person, or is not there."""
        try:
            words = self.file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return None
        return words if words.startswith("slurm ") else None

    def done(self) -> None:
        """Says that the run is complete: there is nothing left to stop, nor to requeue."""
        if self.world.is_main:
            self.file.unlink(missing_ok=True)

    def close(self) -> None:
        """Gives the signals back to whoever handled them before."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    @property
    def raised(self) -> bool:
        """Whether this rank knows that the run is to stop; ranks agree on it at the start of a step."""
        if self.signalled or not self.world.is_main or not self.file.exists():
            return self.signalled
        return self._written_by() in (None, self.start)


def micro_batch_of_a_rank(
    global_batch: int, largest_micro_batch: int, world_size: int, together: int = 1
) -> int:
    """Returns the images in one forward pass: the largest that fits and divides a rank's share.

    Args:
        global_batch: images in one optimizer step over all ranks.
        largest_micro_batch: most images that a device may hold.
        world_size: number of ranks.
        together: images that stay together (`Recipe.crops_together`).

    Raises:
        UserError: the global batch is no multiple of the world size, or those that stay together do not divide it.
    """
    if global_batch % world_size:
        nearest = max(1, round(global_batch / world_size)) * world_size
        raise UserError(
            f"train.global_batch: {global_batch} images do not divide over {world_size} ranks; "
            f"set train.global_batch={nearest} or start another number of ranks"
        )
    share = global_batch // world_size
    for size in range(min(largest_micro_batch, share), 0, -1):
        if share % size == size % together == 0:
            return size
    raise UserError(
        f"train.micro_batch: the {share} images of a rank are not cut into micro-batches of at most "
        f"{largest_micro_batch} that are multiples of {together}, the crops that stay together: those of an image "
        "(data.crops), with Mixup or CutMix those of a pair; take another train.micro_batch, train.global_batch or "
        "number of ranks"
    )
