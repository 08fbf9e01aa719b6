"""One folder, one job."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fd_scale import lock
from fd_scale.errors import UserError
from fd_scale.lock import RunLock, slurm_start

HOLD = """
import sys, time
from pathlib import Path
from fd_scale import lock
lock.HEARTBEAT_S = 0.1
lock.RunLock(Path(sys.argv[1])).acquire()
print("held", flush=True)
time.sleep(100)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("HEARTBEAT_S", 0.1), ("STALE_S", 1.0), ("SETTLE_S", 0.1)):
        monkeypatch.setattr(lock, name, seconds)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, which holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def seen_from_elsewhere(folder: Path, **changes: object) -> None:
    """Makes the lock one of another host, where its process cannot be looked up."""
    file = folder / "lock"
    before = file.stat()
    file.write_text(json.dumps(json.loads(file.read_text()) | {"machine": "another"} | changes))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_it_is_free_before_and_after(tmp_path: Path) -> None:
    first = RunLock(tmp_path / "run")
    first.acquire()
    assert json.loads((tmp_path / "run" / "lock").read_text())["pid"] == os.getpid()
    first.release()
    assert list((tmp_path / "run").iterdir()) == []
    first.release()
    second = RunLock(tmp_path / "run")
    second.acquire()
    RunLock(tmp_path / "run").acquire()  # the same process, one job after the other
    lock._held[tmp_path / "run" / "lock"].release()


def test_a_file_system_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holder: subprocess.Popen[str]
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(UserError, match="and it lives"):
        RunLock(tmp_path).acquire()
    mine = RunLock(tmp_path / "other")
    mine.acquire()
    assert json.loads((tmp_path / "other" / "lock").read_text())["token"] == mine.token
    mine.release()
    assert list((tmp_path / "other").iterdir()) == []


def test_a_living_holder_is_named(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    start = time.monotonic()
    with pytest.raises(
        UserError, match=rf"lock: held by process {holder.pid} on .*, and it lives; end that job first"
    ):
        RunLock(tmp_path).acquire()
    seen_from_elsewhere(tmp_path, job="slurm 7.0", host="n7")
    with pytest.raises(UserError, match=r"of slurm 7\.0 on n7, and it lives"):
        RunLock(tmp_path).acquire()
    assert time.monotonic() - start < lock.STALE_S, "a heartbeat settles it"
    assert holder.poll() is None


def test_a_dead_holder_on_this_machine_is_known_at_once(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    holder.kill()
    holder.wait()
    mine = RunLock(tmp_path)
    start = time.monotonic()
    mine.acquire()
    assert time.monotonic() - start < lock.STALE_S / 2
    mine.release()


def test_without_a_heartbeat_it_is_taken_over(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    os.kill(holder.pid, signal.SIGSTOP)
    seen_from_elsewhere(tmp_path)
    mine = RunLock(tmp_path)
    start = time.monotonic()
    mine.acquire()
    assert time.monotonic() - start > lock.STALE_S
    os.kill(holder.pid, signal.SIGCONT)  # it was not dead: it sees whose the folder is now, and ends
    assert holder.wait(10) == 1
    assert json.loads((tmp_path / "lock").read_text())["token"] == mine.token
    mine.release()


def test_a_requeued_job_takes_its_own_at_once(
    tmp_path: Path, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    seen_from_elsewhere(tmp_path, job="slurm 12.1")
    with pytest.raises(UserError, match=r"held by .* of slurm 12\.1"):
        RunLock(tmp_path).acquire()  # two steps of one start
    seen_from_elsewhere(tmp_path, job="slurm 12.0")
    mine = RunLock(tmp_path)
    mine.acquire()
    assert json.loads((tmp_path / "lock").read_text())["job"] == "slurm 12.1"
    mine.release()


def test_a_lock_that_somebody_removed_comes_back(tmp_path: Path) -> None:
    mine = RunLock(tmp_path)
    mine.acquire()
    (tmp_path / "lock").unlink()
    deadline = time.monotonic() + 5
    while not (tmp_path / "lock").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    mine.release()
    assert not (tmp_path / "lock").exists()


def test_a_damaged_lock_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("{")
    mine = RunLock(tmp_path)
    mine.acquire()
    mine.release()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"run_dir: .* cannot be written \(Not a directory\)"):
        RunLock(tmp_path / "file" / "run").acquire()


def test_the_start_of_a_slurm_job() -> None:
    assert slurm_start({}) is None
    assert slurm_start({"SLURM_JOB_ID": "3"}) == "slurm 3.0"
    assert slurm_start({"SLURM_JOB_ID": "3", "SLURM_RESTART_COUNT": "2"}) == "slurm 3.2"


def test_a_folder_that_was_locked_since_is_given_free_without_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = RunLock(tmp_path)
    held.acquire()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    with monkeypatch.context() as locked:
        locked.setattr(Path, "unlink", refuse)
        held.release()
    assert held.stop.is_set()
