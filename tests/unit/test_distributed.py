"""Ranks, devices and the preemption flag, in one process."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fd_scale.distributed import ALONE, Preemption, choose_device
from fd_scale.errors import UserError


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_raises_the_flag_and_its_handler_comes_back(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    preemption = Preemption(tmp_path, ALONE)
    try:
        assert not preemption.raised
        os.kill(os.getpid(), number)
        assert preemption.raised
    finally:
        preemption.close()
    assert signal.getsignal(number) == before


def test_the_file_of_an_earlier_preemption_does_not_stop_the_next_run(tmp_path: Path) -> None:
    (tmp_path / "preempt").touch()
    preemption = Preemption(tmp_path, ALONE)
    try:
        assert not preemption.raised
        (tmp_path / "preempt").touch()
        assert preemption.raised
    finally:
        preemption.close()


def test_the_file_that_a_batch_script_writes_is_of_one_start_of_its_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    file = tmp_path / "preempt"
    file.write_text("slurm 12.1\n")  # while libraries were being imported
    preemption = Preemption(tmp_path, ALONE)
    try:
        assert preemption.raised
        file.write_text("slurm 12.0\n")
        assert not preemption.raised, "the last start's"
        file.write_text("slurm 13.1\n")
        assert not preemption.raised, "another job's, which was refused"
        file.write_text("please\n")
        assert preemption.raised, "a person's"
        preemption.done()
        assert not file.exists()
    finally:
        preemption.close()
    file.write_text("slurm 12.0\n")
    Preemption(tmp_path, ALONE).close()
    assert not file.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this host has a GPU: asking for one is no error")
def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"train\.device: got cuda, but torch sees no GPU here"):
        choose_device("cuda")
    assert choose_device("auto") == torch.device("cpu")


def test_who_leaves_the_process_group_before_the_end_hears_nothing() -> None:
    program = (
        "import torch.distributed as dist\n"
        "from fd_scale import distributed\n"
        "distributed.start('cpu', 60)\n"
        "dist.destroy_process_group()\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert ended.stderr == ""
