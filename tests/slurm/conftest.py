"""A SLURM for all tests of this folder, and the jobs that they submit."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import INSTALL, Cluster, missing_programs, running_cluster
from slurm_jobs import Job, Submit, losses

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SCRIPTS = ROOT / "slurm"


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four nodes on this machine; the jobs of `limited` and `undisturbed` have n0 and n1."""
    if missing := missing_programs():
        problem = f"SLURM is not installed (no {', '.join(missing)}): {INSTALL}"
        if request.config.getoption("--require-slurm"):
            pytest.fail(problem)
        pytest.skip(problem)
    folder = tmp_path_factory.mktemp("slurm")
    with running_cluster(folder, ["n0", "n1", "n2", "n3"]) as found:
        yield found


@pytest.fixture(scope="session")
def site(cluster: Cluster) -> Path:
    """The cluster.env of this cluster."""
    file = cluster.folder / "cluster.env"
    file.write_text(
        f"FD_PYTHON={sys.executable}\n"
        "FD_RANKS_PER_NODE=1\n"
        'FD_SBATCH="--time=10"\n'
        "export GLOO_SOCKET_IFNAME=lo\n"
        f"export PYTHONPATH={HERE / 'hook'}\n"
    )
    cluster.environment["FD_CLUSTER_ENV"] = str(file)
    return file


@pytest.fixture(scope="session")
def submit_job(
    cluster: Cluster,
    site: Path,
    values_in: Callable[..., dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Submit:
    """Returns a function that submits slurm/distill.sbatch on the toy recipe: two nodes, eight steps."""
    folder = tmp_path_factory.mktemp("jobs")

    def submit(
        name: str,
        *options: str,
        settings: tuple[str, ...] = (),
        hold: list[dict[str, Any]] | None = None,
        **environment: str,
    ) -> Job:
        run_dir = folder / name
        values = values_in(run_dir, train__ds_config="zero3", train__steps=8)
        recipe = folder / f"{name}.yaml"
        recipe.write_text(json.dumps(values))
        if hold is not None:
            run_dir.mkdir()
            (run_dir / "hold").write_text(json.dumps(hold))
        output = folder / f"{name}.out"
        number = cluster.run(
            "sbatch", "--parsable", "--nodes=2", "--time=10", f"--output={output}", *options,
            str(SCRIPTS / "distill.sbatch"), str(recipe), *settings, cwd=folder,
            **environment,
        ).strip()  # fmt: skip
        return Job(cluster, number, run_dir, output)

    return submit


@pytest.fixture(scope="session")
def limited(submit_job: Submit) -> Job:
    """A job with a time limit, told 60 s before; it waits for that most of the time, beside the jobs of all tests.

    Its first start runs on until it is told; in its second one the ranks hang, whatever is told them.
    """
    hold = [{"start": 0, "step": 3, "until_preempt": True}, {"start": 1, "step": 0}]
    return submit_job("limited", "--time=2", "--signal=B:USR1@60", "--nodelist=n0,n1", hold=hold)


@pytest.fixture(scope="session")
def failing(submit_job: Submit) -> Job:
    """A job whose ranks crash in every start; between them it waits for SLURM, beside the others."""
    return submit_job("failing", "--nodes=1", "--nodelist=n2", FD_TEST_CRASH="1")


@pytest.fixture(scope="session")
def undisturbed(cluster: Cluster, limited: Job, failing: Job, submit_job: Submit) -> Job:
    """A job that nothing happened to, beside another one on its nodes; it checked the cluster before it trained."""
    job = submit_job("undisturbed", "--nodelist=n0,n1", FD_CHECK="1")
    both = (limited.number, job.number)
    cluster.wait(
        "two jobs at once", lambda: all(cluster.job(number)["JobState"] == "RUNNING" for number in both)
    )
    job.completed()
    assert job.restarts() == 0
    assert [step for step, _ in losses(job.run_dir)] == list(range(1, 9))
    return job
