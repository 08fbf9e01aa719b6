"""A job whose steps run in an Apptainer container, whose image is links and empty folders for what is mounted."""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from slurm_cluster import Cluster
from slurm_jobs import Job, Submit, losses

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("apptainer") is None, reason="needs Apptainer, apptainer.org"),
]

ROOT = Path(__file__).parents[2]


def mounted() -> list[str]:
    """Folders of this machine that a Python of it needs; where one lies in another, that one alone."""
    folders = {"/usr", "/etc", sys.prefix, sys.base_prefix, str(ROOT)}
    return sorted(one for one in folders if not any(one.startswith(f"{other}/") for other in folders))


def make_image(image: Path) -> Path:
    """Makes a folder that Apptainer takes for an image, with a Python that is nowhere else; returns its place there."""
    for folder in [*mounted(), "/dev", "/proc", "/sys", "/tmp", "/root", "/run", "/var/tmp", "/inside"]:
        (image / folder[1:]).mkdir(parents=True, exist_ok=True)
    for name in ("bin", "lib", "lib64", "sbin"):
        (image / name).symlink_to(f"usr/{name}")
    python = image / "inside/python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return Path("/inside/python")


def test_two_nodes_in_containers(
    cluster: Cluster, site: Path, submit_job: Submit, undisturbed: Job, tmp_path: Path
) -> None:
    """They are told to make room, then a rank is killed, and they end as those outside."""
    assert Path("/bin").is_symlink(), "as on all but old systems"
    image = tmp_path / "image"
    python = make_image(image)
    own_site = tmp_path / "cluster.env"
    own_site.write_text(
        f"{site.read_text()}FD_PYTHON={python}\nFD_CONTAINER_KIND=apptainer FD_CONTAINER={image}\n"
        f"FD_MOUNTS={','.join([*mounted(), str(tmp_path)])}\n"
    )
    hold = [{"start": 0, "step": 3, "until_preempt": True}, {"start": 1, "step": 5}]
    job = submit_job("contained", "--nodelist=n0,n1", hold=hold, FD_CLUSTER_ENV=str(own_site))
    job.wait_held(start=0)
    assert not python.exists(), "it is the image's"
    cluster.run("scancel", "--signal=USR1", "--batch", job.number)
    job.wait_held(start=1)
    [rank] = job.rank_processes("n1")
    assert f"APPTAINER_CONTAINER={image}".encode() in Path(f"/proc/{rank}/environ").read_bytes().split(b"\0")
    os.kill(rank, signal.SIGKILL)
    job.completed()
    assert job.restarts() == 2
    assert losses(job.run_dir) == losses(undisturbed.run_dir)
