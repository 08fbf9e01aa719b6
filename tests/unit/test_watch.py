"""What watches a run: the judge of losses, the clock that ends a job that hangs."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fd_scale.errors import UserError
from fd_scale.watch import LossWatch, Watchdog


def test_a_spike_is_many_times_the_mean_of_the_losses_before() -> None:
    watch = LossWatch(3.0)
    assert not any(watch.is_spike(loss) for loss in [100.0] * 19 + [1000.0]), "too few to judge by"
    watch = LossWatch(3.0)
    assert not any(watch.is_spike(2.0) for _ in range(20))
    assert not watch.is_spike(6.0)
    assert watch.is_spike(6.7), "three times the mean, 2.19, is 6.57"
    assert watch.is_spike(6.7), "a spike does not move the mean"
    assert watch.is_spike(math.nan)
    assert watch.is_spike(6.7), "nor does that move it"
    assert LossWatch(3.0, list(watch.losses)).is_spike(6.7), "a run that goes on judges by the same losses"
    for _ in range(50):
        watch.is_spike(4.0)
    assert not watch.is_spike(11.9), "only the last 50 count"


def test_zero_means_that_nothing_is_a_spike() -> None:
    watch = LossWatch(0.0)
    assert not any(watch.is_spike(10.0**power) for power in range(40))
    assert watch.is_spike(math.inf), "but what is not finite is"


def test_the_end_in_a_folder_that_is_gone_hides_no_error(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()

    def fail() -> None:
        with Watchdog(5, tmp_path / "logs/rank_0.stacks", in_a_job=False):
            shutil.rmtree(tmp_path / "logs")
            raise UserError("the cause")

    with pytest.raises(UserError, match="the cause"):
        fail()


def test_a_run_that_beats_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "stacks"
    with Watchdog(0.2, file, in_a_job=True) as watchdog:
        for _ in range(4):
            watchdog.stop.wait(0.1)
            watchdog.beat("a step")
    assert not watchdog.thread.is_alive()
    assert not file.exists(), "nothing to say, no file"


HANG = """
import logging, sys, time
from pathlib import Path
from fd_scale import watch
logging.basicConfig(format="%(message)s")
watch.GRACE_S = 0.5
def the_function_that_hangs():
    {hang}
with watch.Watchdog({timeout}, Path(sys.argv[1]), in_a_job=False) as watchdog:
    watchdog.beat("step 7")
    the_function_that_hangs()
print("went on")
"""


@pytest.mark.parametrize(
    ("hang", "timeout", "words"),
    [
        ("time.sleep(60)", 0.3, "nothing has happened for 0 s since step 7 (train.timeout_s)"),
        # Never gives back Python's lock, so that no thread of ours can speak: the timer alone ends it.
        ("sum(range(10**12))", 0.3, ""),
    ],
    ids=["waiting", "holding the lock"],
)
def test_a_process_that_hangs_ends_with_its_stacks(
    hang: str, timeout: float, words: str, tmp_path: Path
) -> None:
    file = tmp_path / "stacks"
    done = subprocess.run(
        [sys.executable, "-c", HANG.format(hang=hang, timeout=timeout), str(file)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "went on" not in done.stdout
    assert "the_function_that_hangs" in file.read_text()
    assert words in done.stderr
