"""Jobs that are disturbed, on a real SLURM: each ends with the losses of one that was not."""

import os
import signal
from pathlib import Path

import pytest
from slurm_cluster import Cluster
from slurm_jobs import Job, Submit, losses

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

MAX_FAILURES = 3


def test_two_jobs_on_the_same_nodes(limited: Job, undisturbed: Job) -> None:
    """They ran at the same time: with one port for all jobs, one of them would not have started."""
    assert not limited.failed_starts()
    said = undisturbed.said()
    assert "nothing found that would fail: 7 checks" in said, "of the cluster, before the training"
    assert "2 ranks on n0, n1" in said
    assert "all-reduce" in said
    logs = undisturbed.run_dir / "logs"
    streams = sorted(path.relative_to(logs).parts[1] for path in logs.glob("job_*/**/stderr.log"))
    assert streams == ["node_0", "node_0", "node_1", "node_1"], "a file a rank, of check and training"


def test_requeued_killed_and_without_power(cluster: Cluster, submit_job: Submit, undisturbed: Job) -> None:
    hold = [{"start": start, "step": step} for start, step in ((0, 3), (1, 3), (2, 5))]
    job = submit_job("disturbed", "--exclude=n0,n1", hold=hold)

    job.wait_held(start=0)
    second = submit_job("second", "--nodes=1", "--nodelist=n1", settings=(f"run_dir={job.run_dir}",))
    assert cluster.ended(second.number)["JobState"] == "FAILED"
    assert f"{job.run_dir}/lock: held by process" in second.said()
    assert f"of slurm {job.number}.0 on" in second.said()
    assert "not requeued, the same would happen again" in second.said()
    assert second.restarts() == 0

    cluster.run("scontrol", "requeue", job.number)
    job.wait_held(start=1)
    assert "resumed" in job.said()
    assert f"of slurm {job.number}.0 on" in job.said(), "the same job takes its old lock over at once"

    [rank] = job.rank_processes("n3")
    os.kill(rank, signal.SIGKILL)
    job.wait_held(start=2)
    assert "failed with exit code" in job.said()

    cluster.cut_power("n3")
    try:
        job.wait_restart(3)
        cluster.run("scontrol", "update", f"jobid={job.number}", "excnodelist=")
        job.completed()
    finally:
        cluster.start_node("n3")
    assert losses(job.run_dir) == losses(undisturbed.run_dir)


def test_a_job_that_fails_at_once_stays_down_and_says_why(cluster: Cluster, failing: Job) -> None:
    job, state = failing, cluster.ended(failing.number)
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
