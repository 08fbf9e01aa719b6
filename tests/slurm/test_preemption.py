"""Jobs that are disturbed, on a real SLURM: each ends with the losses of one that was not."""

import os
import signal
from pathlib import Path

import pytest
from slurm_cluster import Cluster
from slurm_jobs import Job, Submit, losses

pytestmark = pytest.mark.slow

MAX_FAILURES = 3


@pytest.fixture(scope="module")
def limited(cluster: Cluster, submit_job: Submit) -> Job:
    """A job with a time limit of a minute, told 10 s before; it waits for that most of the time, beside the others."""
    return submit_job("limited", "--time=1", "--signal=B:USR1@10", hold="3 until preempt")


@pytest.fixture(scope="module")
def undisturbed(limited: Job, submit_job: Submit) -> list[tuple[int, float]]:
    """Losses of a job that nothing happened to."""
    job = submit_job("undisturbed")
    job.completed()
    assert job.restarts() == 0
    found = losses(job.run_dir)
    assert [step for step, _ in found] == list(range(1, 9))
    streams = sorted(
        path.relative_to(job.run_dir / "logs") for path in job.run_dir.glob("logs/job_*/**/std*.log")
    )
    assert [path.parts[1] for path in streams] == ["node_0"] * 2 + ["node_1"] * 2, "a file a rank and stream"
    return found


def test_requeued_killed_and_without_power(
    cluster: Cluster, submit_job: Submit, undisturbed: list[tuple[int, float]]
) -> None:
    job = submit_job("disturbed", "--nodelist=n0,n1", hold="3")

    job.wait_held(start=0)
    second = submit_job("second", "--nodes=1", "--nodelist=n2", settings=(f"run_dir={job.run_dir}",))
    assert cluster.ended(second.number)["JobState"] == "FAILED"
    assert f"{job.run_dir}/lock: held by process" in second.said()
    assert f"of slurm {job.number}.0 on" in second.said()
    assert "not requeued, the same would happen again" in second.said()
    assert second.restarts() == 0

    cluster.run("scontrol", "requeue", job.number)
    job.wait_held(start=1)
    assert "resumed" in job.said()
    assert f"of slurm {job.number}.0 on" in job.said(), "the same job takes its old lock over at once"

    [rank] = job.rank_processes("n1")
    job.hold(5)
    os.kill(rank, signal.SIGKILL)
    job.wait_held(start=2)
    assert "failed with exit code" in job.said()

    cluster.run("scontrol", "update", f"jobid={job.number}", "nodelist=")
    cluster.cut_power("n1")
    try:
        job.wait_restart(3)
        job.release()
        job.completed()
    finally:
        cluster.start_node("n1")
    assert losses(job.run_dir) == undisturbed


def test_the_time_limit(cluster: Cluster, limited: Job, undisturbed: list[tuple[int, float]]) -> None:
    limited.wait_said("preempted, saved: requeued")
    assert "USR1: the ranks save after this step" in limited.said()
    limited.hold(0)  # whatever is told them: as ranks that hang
    limited.wait_said("no save within the lead before the time limit: requeued")
    limited.release()
    limited.completed()
    assert losses(limited.run_dir) == undisturbed
    assert not (limited.run_dir / "preempt").exists()


def test_a_job_that_fails_at_once_stays_down_and_says_why(cluster: Cluster, submit_job: Submit) -> None:
    job = submit_job("failing", "--nodes=1", crash=True)
    state = cluster.ended(job.number)
    assert (state["JobState"], state["Restarts"]) == ("FAILED", str(MAX_FAILURES - 1))
    assert (
        "failed 3 times in a row with no checkpoint newer than none: not requeued; exit code 1" in job.said()
    )
    assert "a rank that crashes, as the test wants" in job.said()


def test_a_wrong_recipe_is_not_tried_again(cluster: Cluster, submit_job: Submit) -> None:
    wrong = submit_job("wrong", "--nodes=1", settings=("train.global_bach=1",))
    assert cluster.ended(wrong.number)["Restarts"] == "0"
    assert "Did you mean: 'global_batch'" in wrong.said()
    assert "not started, and not requeued" in wrong.said()
    assert not Path(wrong.run_dir).exists()
