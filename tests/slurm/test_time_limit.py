"""The time limit; in the last file, since the job waits for it while those of the others run."""

import pytest
from slurm_jobs import Job, losses

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_the_time_limit(limited: Job, undisturbed: Job) -> None:
    limited.completed()
    said = limited.said()
    told = said.index("USR1: the ranks save after this step")
    saved = said.index("preempted, saved: requeued")
    hung = said.index("no save within the lead before the time limit: requeued")
    assert told < saved < hung
    assert losses(limited.run_dir) == losses(undisturbed.run_dir)
    assert not (limited.run_dir / "preempt").exists()
