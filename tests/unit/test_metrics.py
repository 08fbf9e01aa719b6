"""Where the time of steps goes, and what a line of metrics makes of it."""

import logging
import time
from pathlib import Path

import pytest
import torch

from fd_scale import metrics
from fd_scale.distributed import ALONE
from fd_scale.log import results
from fd_scale.metrics import HostCopy, Phases, Recorder, read_metrics

CPU = torch.device("cpu")


def test_phases_are_added_up_until_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 10.0, 12.0, 20.0, 20.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    phases = Phases(CPU)
    for name in ("forward", "backward", "forward"):
        with phases(name):
            pass
    assert phases.read() == {"data": 0, "agree": 0, "forward": 1.5, "backward": 2.0, "optimizer": 0}
    assert set(phases.read().values()) == {0.0}


def test_a_line_holds_phases_and_utilisation_per_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(tmp_path, ALONE, "distill", peak_images_per_s=4000.0)
    phases = Phases(CPU)
    phases.spans = [("forward", 0.0, 3.0), ("agree", 0.0, 0.5)]
    clock = iter([100.0, 110.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    recorder.start(0, 20, evaluated=False)
    recorder.log(10, {"loss_a": torch.tensor(0.5)}, {}, 1000, phases, {"sent_gib": 5.0})
    recorder.finish()
    (line,) = read_metrics(tmp_path, "train")
    assert line["step_time_s"] == 1.0
    assert line["mfu"] == 0.25, "1,000 images/s of 4,000"
    assert line["sent_gib"] == 0.5
    assert line["forward_s"] == pytest.approx(0.3)
    assert line["agree_s"] == pytest.approx(0.05)
    assert line["rank_lag_s"] == 0.0, "one rank waits for none"


def test_without_a_known_peak_there_is_no_utilisation(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, ALONE, "distill")
    recorder.start(0, 20, evaluated=False)
    recorder.log(1, {"loss": torch.tensor(0.5)}, {}, 8, Phases(CPU), {})
    recorder.finish()
    assert "mfu" not in read_metrics(tmp_path, "train")[0]


def test_the_rank_that_waits_least_is_the_slow_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(tmp_path, ALONE, "distill")
    with caplog.at_level(logging.WARNING):
        assert recorder._lag(5, torch.tensor([0.31, 0.30, 0.05, 0.30]), 1.0) == pytest.approx(0.26)
        assert recorder._lag(6, torch.tensor([0.09, 0.0]), 1.0) == pytest.approx(0.09)
    assert caplog.messages == ["step 5: rank 2 is slow, the others wait 260 ms of a step of 1000 ms for it"]
    assert metrics.SLOW_SHARE == 0.1


def test_a_host_copy_is_the_value_of_its_moment() -> None:
    value = torch.tensor(2.5)
    copy = HostCopy(value)
    value.mul_(3)
    assert copy.read() == 2.5


def test_slow_steps_have_a_rate() -> None:
    assert [metrics._rate(per_s) for per_s in (0.44, 9.6, 12.3)] == ["0.44", "9.6", "12"]


def test_numbers_are_not_cut_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert (results().width, results(uncut=True).width) == (80, 150)
