"""One run folder, one job: the lock that a running job holds, `RUN/lock`.

The file says who holds it; its time of change is the holder's heartbeat. Whoever wants the folder watches that time
instead of comparing clocks: hosts and file servers do not agree on one.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fd_scale.errors import UserError

logger = logging.getLogger(__name__)

HEARTBEAT_S = 5.0
STALE_S = 60.0
"""A lock without a heartbeat for so long is taken over: longer than a file server's cache keeps an old time."""
SETTLE_S = 1.0
"""Of two that take a stale lock over, the later one wins; after this time both know."""


_held: dict[Path, RunLock] = {}
"""The locks of this process, which may run one job after the other in the same folder."""


def slurm_start(environment: Mapping[str, str] = os.environ) -> str | None:
    """Returns the start of the SLURM job that this process belongs to, as `slurm JOB.RESTARTS`; none outside one.

    `slurm/common.sh` writes the same words into `RUN/preempt`.
    """
    job = environment.get("SLURM_JOB_ID")
    return None if job is None else f"slurm {job}.{environment.get('SLURM_RESTART_COUNT') or 0}"


class RunLock:
    """The lock of a run folder.

    Args:
        run_dir: the run folder.
    """

    def __init__(self, run_dir: Path) -> None:
        self.file = run_dir.absolute() / "lock"
        self.token = uuid.uuid4().hex
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._beat, name="lock", daemon=True)

    def acquire(self) -> None:
        """Takes the folder; waits for at most `STALE_S` where it is not sure that the holder lives.

        Raises:
            UserError: a living job holds it, or the folder cannot be written.
        """
        if self.file in _held:
            _held[self.file].release()
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            if not self._create():
                self._take_over()
        except OSError as error:
            raise UserError(
                f"run_dir: {self.file.parent} cannot be written ({error.strerror}); choose another with run_dir=PATH"
            ) from None
        _held[self.file] = self
        atexit.register(self.release)
        self.thread.start()

    def release(self) -> None:
        """Gives the folder free, if it is still ours."""
        self.stop.set()
        atexit.unregister(self.release)
        if _held.get(self.file) is self:
            del _held[self.file]
        if self._read()[0].get("token") == self.token:
            with contextlib.suppress(OSError):  # of a folder that was locked since, what led here tells
                self.file.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Makes the lock where there is none: a hard link is made once, also on NFS."""
        own = self._write()
        try:
            os.link(own, self.file)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            return self._create_exclusively(own.read_text(encoding="utf-8"))
        finally:
            own.unlink()
        return True

    def _create_exclusively(self, text: str) -> bool:
        try:
            with self.file.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            return False
        return True

    def _take_over(self) -> None:
        holder, beat = self._read()
        if not _is_gone(holder):
            deadline = time.monotonic() + STALE_S
            logger.info("%s: %s; waiting for a sign of life", self.file, _described(holder))
            while time.monotonic() < deadline:
                time.sleep(HEARTBEAT_S / 5)
                now, now_beat = self._read()
                if not now and self._create():
                    return  # it was given free
                if now.get("token") != holder.get("token") or now_beat != beat:
                    raise UserError(self._refusal(now or holder))
        logger.warning("%s: %s, and is gone: taken over", self.file, _described(holder))
        self._write().replace(self.file)
        time.sleep(SETTLE_S)
        winner, _ = self._read()
        if winner.get("token") != self.token:
            raise UserError(self._refusal(winner))

    def _refusal(self, holder: dict[str, Any]) -> str:
        return (
            f"{self.file}: {_described(holder)}, and it lives; end that job first (scancel, or touch "
            f"{self.file.with_name('preempt')}), or give this run a run_dir of its own"
        )

    def _write(self) -> Path:
        """Writes what this process is into a file of its own."""
        own = self.file.with_name(f"lock.{self.token}")
        me = {
            "token": self.token,
            "host": platform.node(),
            "job": slurm_start(),
            "pid": os.getpid(),
            "process": _process(os.getpid()),
            "machine": _machine(),
        }
        own.write_text(json.dumps(me), encoding="utf-8")
        return own

    def _read(self) -> tuple[dict[str, Any], int]:
        """Who holds the lock, and its heartbeat; empty where nobody does."""
        try:
            with self.file.open(encoding="utf-8") as file:  # opening asks the file server, `stat` its cache
                return json.load(file), os.fstat(file.fileno()).st_mtime_ns
        except (FileNotFoundError, json.JSONDecodeError):
            return {}, 0

    def _beat(self) -> None:
        while not self.stop.wait(HEARTBEAT_S):
            with contextlib.suppress(OSError):  # a full disk or a slow server is no reason to end a job
                holder, _ = self._read()
                if holder.get("token") == self.token:
                    os.utime(self.file)
                elif holder and not self.stop.is_set():
                    # Two jobs in one folder would ruin its checkpoints, and the other one believes that we are gone.
                    logger.error(
                        "%s: %s: it took the folder over, this job ends", self.file, _described(holder)
                    )
                    os._exit(1)
                elif not holder and not self.stop.is_set() and self.file.parent.is_dir():
                    self._create()  # somebody has removed it


def _described(holder: dict[str, Any]) -> str:
    job = f" of {holder['job']}" if holder.get("job") else ""
    return f"held by process {holder.get('pid')}{job} on {holder.get('host')}"


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether the holder is known to have ended, without waiting for its heartbeat."""
    job, number = (str(holder.get("job")).partition(".")[0], slurm_start())
    if number is not None and job == number.partition(".")[0] and holder["job"] != number:
        return True  # SLURM starts a job again only when its last start has ended
    if holder.get("machine") != _machine():
        return False
    return bool(holder["process"] != _process(holder["pid"]))


def _machine() -> str:
    """Where process numbers mean the same: one boot of one host, one container."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()}"


def _process(number: int) -> str | None:
    """The time at which a process started, which tells it from a later one of the same number; none if it has ended."""
    try:
        state, *rest = Path(f"/proc/{number}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state == "Z" else rest[18]
