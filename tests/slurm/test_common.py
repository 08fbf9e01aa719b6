"""slurm/common.sh without a SLURM: what it would call."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

COMMON = Path(__file__).parents[2] / "slurm" / "common.sh"
JOB = {"SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n3", "SLURM_CPUS_ON_NODE": "8", "SLURM_JOB_NUM_NODES": "2",
       "SLURM_JOB_NODELIST": "n[3-4]"}  # fmt: skip
SHOWN = '#!/bin/sh\nfor word; do echo "$word"; done\n'
RUN_HERE = '#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"\n'


def bash(
    tmp_path: Path, code: str, env: str, srun: str = SHOWN, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs code after common.sh, where srun is a stub."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    (tmp_path / "bin" / "srun").write_text(srun)
    (tmp_path / "bin" / "srun").chmod(0o755)
    (tmp_path / "cluster.env").write_text(env)
    given = {key: value for key, value in os.environ.items() if not key.startswith(("FD_", "SLURM_", "OMP_"))}
    return subprocess.run(
        ["bash", "-c", f". {COMMON}; {code}"],
        env=given | JOB | environment | {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "FD_CLUSTER_ENV": str(tmp_path / "cluster.env"),
        },
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip


def test_one_task_a_node_with_all_its_cpus(tmp_path: Path) -> None:
    said = bash(
        tmp_path, "on_first_node hello 'a b'; echo $OMP_NUM_THREADS $PYTHONSAFEPATH", "FD_RANKS_PER_NODE=4\n"
    )
    words = said.stdout.splitlines()
    for option in ("--ntasks-per-node=1", "--cpus-per-task=8", "--nodes=1", "--nodelist=n3"):
        assert option in words
    assert words[-3:] == ["hello", "a b", "2 1"]


@pytest.mark.parametrize(
    ("env", "before"),
    [
        (
            "FD_CONTAINER=x.sqsh FD_MOUNTS=/d:/d\n",
            ["--container-image=x.sqsh", "--container-mounts=/d:/d,HERE:HERE,CODE:CODE"],
        ),
        (
            "FD_CONTAINER=x.sif FD_CONTAINER_KIND=apptainer\n",
            ["apptainer", "exec", "--nv", "--pwd", "HERE", "--bind", "HERE:HERE,CODE:CODE", "x.sif", "hello"],
        ),
    ],
)  # fmt: skip
def test_containers(tmp_path: Path, env: str, before: list[str]) -> None:
    words = bash(tmp_path, "on_nodes -- hello", f"FD_RANKS_PER_NODE=1\n{env}").stdout.splitlines()
    wanted = [word.replace("HERE", str(tmp_path)).replace("CODE", str(COMMON.parents[1])) for word in before]
    assert [word for word in words if word in wanted] == wanted
    assert words[-1] == "hello"


def test_an_unknown_container(tmp_path: Path) -> None:
    said = bash(tmp_path, "true", "FD_CONTAINER=x FD_CONTAINER_KIND=docker\n")
    assert said.returncode == 2
    assert "FD_CONTAINER_KIND: got docker, expected pyxis or apptainer" in said.stderr


def test_outside_a_job(tmp_path: Path) -> None:
    said = bash(tmp_path, "true", "", SLURM_JOB_ID="")
    assert said.returncode == 2
    assert "runs inside a job; start it with: sbatch" in said.stderr


@pytest.mark.slow
def test_a_wheelhouse(tmp_path: Path) -> None:
    """A node's own Python gets the wheels, and nothing from elsewhere."""
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "fd_tiny-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("fd_tiny.py", "VALUE = 5\n")
        wheel.writestr(
            "fd_tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: fd-tiny\nVersion: 1.0\n"
        )
        wheel.writestr(
            "fd_tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("fd_tiny-1.0.dist-info/RECORD", "")
    env = f"FD_PYTHON={sys.executable} FD_RANKS_PER_NODE=1 FD_WHEELHOUSE={tmp_path}/wheels FD_LOCAL_DISK={tmp_path}\n"
    code = "install; $FD_PYTHON -c 'import fd_tiny, sys; print(fd_tiny.VALUE, sys.prefix)'"
    said = bash(tmp_path, code, env, RUN_HERE)
    assert said.stdout.split() == ["5", f"{tmp_path}/fd-scale-7"], said.stderr
    said = bash(tmp_path, "install", env.replace("/wheels", "/nothing"), RUN_HERE)
    assert said.returncode == 1
    assert f"{tmp_path}/nothing could not be installed on every node" in said.stderr


SRUN = """#!/bin/sh
case "$*" in
  *fd_scale.cluster.job*) echo "$RUN"; echo 1234 ;;
  *"fd_scale export"*) echo exports ;;
  *) eval "$RANKS" ;;
esac
"""


@pytest.mark.parametrize(
    ("ranks", "state", "code", "facts"),
    [
        ("true", "RUNNING", 0, ["slurm: done"]),
        ("echo slurm 7.0 >$RUN/preempt", "RUNNING", 99, ["preempted, saved: requeued", "scontrol requeue 7"]),
        ("exit 75", "RUNNING", 99, ["preempted, saved: requeued"]),
        ("touch $RUN/preempt", "RUNNING", 75, ["stopped by", "not requeued, the same command resumes"]),
        ("echo wrong >$FD_ERROR_FILE; exit 1", "RUNNING", 2, ["not requeued, the same would happen again: wrong"]),
        ("exit 1", "RUNNING", 99, ["failed with exit code 1, 1 of at most 3 times", "scontrol requeue 7"]),
        ("exit 1", "COMPLETING", 1, ["SLURM is ending the job (its state: ", "not requeued"]),
        ("exit 143", "", 1, ["SLURM is ending the job (its state: ", "not requeued"]),
    ],
)  # fmt: skip
def test_what_is_requeued(tmp_path: Path, ranks: str, state: str, code: int, facts: list[str]) -> None:
    """Stubs of srun, squeue and scontrol; SLURM's ending of the script is exit code 99 here."""
    run = tmp_path / "run"
    run.mkdir()
    stubs = f"squeue() {{ echo {state}; }}; scontrol() {{ echo scontrol $* >&2; [ $1 = show ] || exit 99; }};"
    said = bash(
        tmp_path, f"{stubs} train_and_requeue distill x.yaml", "FD_RANKS_PER_NODE=1\nFD_EXPORT=e\n", SRUN,
        RUN=str(run), RANKS=ranks,
    )  # fmt: skip
    assert said.returncode == code, said.stderr
    assert all(fact in said.stderr for fact in facts), said.stderr
    assert ("exports" in said.stdout) == (code == 0), "the weights of a run that is complete alone"


def test_failures_count_as_long_as_there_is_no_new_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "logs").mkdir()

    def failed(job: str = "7") -> str:
        code = f"run_dir={run}; count_failure; echo $failures"
        return bash(tmp_path, code, "FD_RANKS_PER_NODE=1\n", SLURM_JOB_ID=job).stdout.strip()

    assert [failed(), failed()] == ["1", "2"]
    (run / "checkpoints" / "latest").write_text("step_00000002\n")
    assert [failed(), failed(), failed("8"), failed("8")] == ["1", "2", "1", "2"]
