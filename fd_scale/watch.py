"""What watches a run: a clock that ends a job that hangs, and a judge of its losses."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import math
import os
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

logger = logging.getLogger(__name__)

GRACE_S = 10.0
"""Seconds between a hung rank's last words and its end: the ranks that wait for it get to theirs."""


class Watchdog:
    """Ends this process when nothing has happened for too long, with the stacks of all its threads in a file.

    Every rank has its own. A rank that hangs stops all others within a step, so all of them write their stacks.

    Args:
        timeout_s: seconds between two beats after which the process ends with exit code 1.
        stacks: file that is written then.
        in_a_job: whether a launcher ends this process when another rank fails; it then writes its stacks too.
    """

    def __init__(self, timeout_s: float, stacks: Path, in_a_job: bool) -> None:
        self.timeout_s = timeout_s
        self.stacks = stacks
        self.in_a_job = in_a_job
        self.last = (time.monotonic(), "the start")
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self.file = self.stacks.open("w")
        if self.in_a_job:
            faulthandler.register(signal.SIGTERM, file=self.file, chain=True)
        self.beat("the start")
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop.set()
        self.thread.join()
        faulthandler.cancel_dump_traceback_later()
        if self.in_a_job:
            faulthandler.unregister(signal.SIGTERM)
        self.file.close()
        with contextlib.suppress(OSError):  # of a folder that is gone or locked, what led here tells
            if not self.stacks.stat().st_size:
                self.stacks.unlink()

    def beat(self, what: str) -> None:
        """Says that `what` has just been done."""
        self.last = (time.monotonic(), what)
        # A call that never gives back Python's lock stops our thread too; this timer runs without it.
        faulthandler.dump_traceback_later(self.timeout_s + 2 * GRACE_S, exit=True, file=self.file)

    def _watch(self) -> None:
        while not self.stop.wait(min(1.0, self.timeout_s / 4)):
            when, what = self.last
            if time.monotonic() - when > self.timeout_s:
                faulthandler.dump_traceback(file=self.file)
                logger.error(
                    "nothing has happened for %.0f s since %s (train.timeout_s); the stacks of this rank are in %s; "
                    "the same command resumes from the newest checkpoint", self.timeout_s, what, self.stacks,
                )  # fmt: skip
                if self.in_a_job:
                    time.sleep(GRACE_S)
                os._exit(1)  # the thread that hangs would never see an exception


class LossWatch:
    """Says which losses are out of line with those before.

    Args:
        spike_factor: a loss above so many times the mean of the last ones is a spike; 0: none is.
        losses: the last ones, of a run that goes on.
    """

    NUM_LOSSES = 50
    NUM_NEEDED = 20

    def __init__(self, spike_factor: float, losses: Sequence[float] = ()) -> None:
        self.spike_factor = spike_factor
        self.losses: deque[float] = deque(losses, maxlen=self.NUM_LOSSES)

    def is_spike(self, loss: float) -> bool:
        """Judges the loss of a step, finite or not; one that is no spike counts for the next ones."""
        if not math.isfinite(loss):
            return True
        judged = self.spike_factor > 0 and len(self.losses) >= self.NUM_NEEDED
        if judged and loss > self.spike_factor * statistics.fmean(self.losses):
            return True
        self.losses.append(loss)
        return False
