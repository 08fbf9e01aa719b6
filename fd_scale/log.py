"""Logging set-up: rank 0 speaks on the console, every rank writes a file of its own in the run folder."""

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_EVERY_S = 10.0

console = Console(stderr=True)
"""The one console: progress bars and log lines share it, so that neither tears the other."""
_ours: dict[str, logging.Handler] = {}
"""The root logger's handlers that are of `set_up`: "console" and "file"."""


def results(width: int = 150, *, uncut: bool = False) -> Console:
    """Returns a console on stdout, for what a verb found; this wide in a file or a pipe, unless $COLUMNS says more.

    Args:
        width: in characters.
        uncut: at least this wide on a terminal too, which then wraps lines: for numbers, which mean nothing when cut.
    """
    if "COLUMNS" in os.environ or sys.stdout.isatty():
        return Console(width=max(Console().width, width) if uncut else None)
    return Console(width=width)


def quiet_libraries() -> None:
    """Keeps libraries' start-up chatter off the console; must run before deepspeed is imported."""
    for name in ("DeepSpeed", "faster_coco_eval"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")


def set_up(rank: int = 0, run_dir: Path | None = None) -> None:
    """Shows what this package says: on the console, and in a run's log.

    What a notebook or a program has set up itself stays as it is: its handlers, which get these lines too, and levels.
    Where one of them writes to the console, no other does.

    Args:
        rank: global rank; only rank 0 writes to the console, the others only errors.
        run_dir: the run folder; its `logs/rank_N.log` gets every line of rank N, until `close_file`.
    """
    _remove("console")
    close_file()
    for name in ("fd_scale", "fd_kernels"):
        if (package := logging.getLogger(name)).level == logging.NOTSET:
            package.setLevel(logging.INFO)
    if not any(_is_console(handler) for handler in logging.getLogger().handlers):
        to_console: logging.Handler
        if console.is_terminal:
            to_console = RichHandler(console=console, show_path=False)
        else:
            to_console = logging.StreamHandler(sys.stderr)
            to_console.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        to_console.setLevel(logging.INFO if rank == 0 else logging.ERROR)
        _add("console", to_console)
    if run_dir is not None:
        folder = run_dir / "logs"
        folder.mkdir(exist_ok=True)
        to_file = logging.FileHandler(folder / f"rank_{rank}.log")
        to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        _add("file", to_file)
    quiet_libraries()


def close_file() -> None:
    """Ends the log of a run, if one is open."""
    _remove("file")


def _is_console(handler: logging.Handler) -> bool:
    return isinstance(handler, RichHandler) or getattr(handler, "stream", None) in (sys.stdout, sys.stderr)


def _add(kind: str, handler: logging.Handler) -> None:
    _ours[kind] = handler
    logging.getLogger().addHandler(handler)


def _remove(kind: str) -> None:
    if kind in _ours:
        logging.getLogger().removeHandler(handler := _ours.pop(kind))
        handler.close()


@contextlib.contextmanager
def counting(what: str, shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Shows how many things are done, and of how many: as a bar on a terminal, else by a line now and then.

    Args:
        what: things, as they are counted.
        shown: False on all ranks but one.
    """
    if not shown:
        yield lambda done, total: None
        return
    if console.is_terminal:
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("")
            yield lambda done, total: progress.update(task, completed=done, total=total)
        return
    last = time.monotonic()

    def told(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > _LINE_EVERY_S:
            console.print(f"{done:,} of {total:,} {what}", highlight=False)
            last = time.monotonic()

    yield told
