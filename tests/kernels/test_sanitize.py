"""Running under compute-sanitizer, without a GPU: a script stands in for it; the calls are served by the references."""

import os
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed on this platform")

from fd_kernels import sanitize


def fake_sanitizer(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    """Writes its arguments to a file, then runs a line of shell; the only one on PATH."""
    folder.mkdir(exist_ok=True)
    tool = folder / "compute-sanitizer"
    tool.write_text(f'#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $@" >> {folder}/calls\n{script}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder / "calls"


def test_sanitizer_runs_each_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_sanitizer(tmp_path, monkeypatch, "exit 0")
    assert sanitize.main([]) == 0
    command = f"--error-exitcode 9 {sys.executable} -m fd_kernels.sanitize --calls"
    assert calls.read_text().splitlines() == [f"1 --tool memcheck {command}", f"1 --tool racecheck {command}"]


def test_sanitizer_findings_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    fake_sanitizer(tmp_path, monkeypatch, 'test "$2" = memcheck || exit 9')
    assert sanitize.main([]) == 1
    assert "memcheck: nothing found" in caplog.text
    assert "racecheck: exit code 9" in caplog.text


def test_sanitizer_that_hangs_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(sanitize, "TIMEOUT_S", 0.2)
    fake_sanitizer(tmp_path, monkeypatch, "sleep 30")
    began = time.monotonic()
    assert sanitize.main([]) == 1
    assert time.monotonic() - began < 10
    assert "not done after 0.2 s" in caplog.text


def test_sanitizer_is_found_in_the_toolkit_or_said_to_be_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    if sanitize._sanitizer() is None:
        assert sanitize.main([]) == 0
        assert caplog.text.count("\n") == 1
        assert "neither on PATH nor in CUDA_HOME/bin" in caplog.text
        path = os.environ["PATH"]
        fake_sanitizer(tmp_path / "bin", monkeypatch, "exit 0")
        monkeypatch.setenv("PATH", path)
        assert sanitize._sanitizer() == str(tmp_path / "bin" / "compute-sanitizer")


def test_sanitized_calls_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, by the references: the calls themselves are right, and each has its gradients taken."""
    taken: list[int] = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args: taken.append(len(grad(*args))))
    sanitize.run_calls(torch.device("cpu"))
    assert taken == [3, 3, 3, 3, 2, 1, 1], "window attention four times, the ViT's, the loss twice"
