"""Runs a function on forked ranks: libraries are imported once, in a fork server, not once a rank."""

import multiprocessing
import os
import signal
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch.distributed as dist

TIMEOUT_S = 120

# Python 3.11's fork server does not get our sys.path, and would pass over what it cannot import.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [
        str(Path(__file__).parent),
        str(Path(__file__).parent.parent),
        *filter(None, [os.environ.get("PYTHONPATH")]),
    ]
)


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Calls `function(*args)` on every rank of a new world.

    Args:
        function: a function at the top of a module.
        world_size: number of ranks.
        args: picklable arguments, the same for all ranks.

    Returns:
        What each rank returned; the negative signal number of a rank that was killed. When one is
        killed, so are the others, as a launcher would do.

    Raises:
        AssertionError: a rank raised; its traceback is in the message.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ranks_preload"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    receivers, processes = [], []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        environment = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            # What a fixture has set since the fork server began.
            **{name: os.environ[name] for name in ("XDG_CACHE_HOME",) if name in os.environ},
        }  # fmt: skip
        process = context.Process(target=_child, args=(sender, environment, function, args))
        process.start()
        sender.close()
        receivers.append(receiver)
        processes.append(process)
    results: list[Any] = [None] * world_size
    waiting = dict(zip(receivers, range(world_size), strict=True))
    failures = []
    while waiting:
        ready = wait(list(waiting), timeout=TIMEOUT_S)
        if not ready:
            failures.append(f"ranks {sorted(waiting.values())} did not end in {TIMEOUT_S} s")
        for receiver in ready:
            rank = waiting.pop(receiver)
            try:
                succeeded, results[rank] = receiver.recv()
                # Who waits for a rank that was killed may say so sooner than that one's end is seen.
                if not succeeded and not _was_killed(processes):
                    failures.append(f"rank {rank}:\n{results[rank]}")
            except EOFError:  # killed before it could say anything
                processes[rank].join()
                results[rank] = processes[rank].exitcode
                ready = []
        if failures or not ready:
            for process in processes:
                if process.is_alive():
                    os.kill(process.pid, signal.SIGKILL)
            if failures:
                break
    for process in processes:
        process.join()
    assert not failures, "\n".join(failures)
    return results


def _was_killed(processes: list[Any]) -> bool:
    wait([process.sentinel for process in processes], timeout=1)
    return any(process.exitcode is not None and process.exitcode < 0 for process in processes)


def _child(
    sender: Connection, environment: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.update(environment)
    try:
        sender.send((True, function(*args)))
    except BaseException:
        sender.send((False, traceback.format_exc()))
    finally:
        sender.close()
        if dist.is_initialized():  # a forked process runs no atexit functions
            dist.destroy_process_group()
