"""A job whose steps run in a container, whose image is links and empty folders for what is mounted."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_cluster import Cluster, missing_pyxis
from slurm_jobs import Job, Submit, losses

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
IN_IMAGE = "inside/python"
"""A Python that is nowhere else."""
IMAGE_SETS = "PYTORCH_VERSION=2\nPYTHONPATH=/image\nOMP_NUM_THREADS=99\n"
"""What an image for pyxis may set, and what must not win over the job's own; NVIDIA's set the first."""


def mounted() -> list[str]:
    """Folders of this machine that a Python of it needs; where one lies in another, that one alone."""
    folders = {"/usr", "/etc", sys.prefix, sys.base_prefix, str(ROOT)}
    return sorted(one for one in folders if not any(one.startswith(f"{other}/") for other in folders))


def make_folder(folder: Path) -> Path:
    """Makes a folder that Apptainer takes for an image."""
    for name in [*mounted(), "/dev", "/proc", "/sys", "/tmp", "/root", "/run", "/var/tmp", "/inside"]:
        (folder / name[1:]).mkdir(parents=True, exist_ok=True)
    for name in ("bin", "lib", "lib64", "sbin"):
        (folder / name).symlink_to(f"usr/{name}")
    (folder / "etc/environment").write_text(IMAGE_SETS)
    python = folder / IN_IMAGE
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return folder


def make_image(kind: str, folder: Path) -> Path:
    """Makes an image as `kind` wants it."""
    if kind == "apptainer":
        return make_folder(folder)
    image = folder.with_suffix(".sqsh")
    subprocess.run(
        ["mksquashfs", str(make_folder(folder)), str(image), "-quiet", "-no-progress"], check=True, timeout=60
    )
    return image


def missing(kind: str) -> str:
    """What is not installed here of a kind of container."""
    if kind == "apptainer":
        return "" if shutil.which("apptainer") else "no apptainer, apptainer.org"
    return missing_pyxis() or ("" if shutil.which("mksquashfs") else "no mksquashfs, squashfs-tools")


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(
            kind, marks=pytest.mark.skipif(bool(missing(kind)), reason=f"needs {kind}: {missing(kind)}")
        )
        for kind in ("apptainer", "pyxis")
    ],
)
def test_two_nodes_in_containers(
    kind: str, cluster: Cluster, site: Path, submit_job: Submit, undisturbed: Job, tmp_path: Path
) -> None:
    """They are told to make room, then a rank is killed, and they end as those outside."""
    assert Path("/bin").is_symlink(), "as on all but old systems"
    image = make_image(kind, tmp_path / "image")
    own_site = tmp_path / "cluster.env"
    own_site.write_text(
        f"{site.read_text()}FD_PYTHON=/{IN_IMAGE}\nFD_CONTAINER_KIND={kind} FD_CONTAINER={image}\n"
        f"FD_MOUNTS={','.join([*mounted(), str(tmp_path)])}\n"
    )
    hold = [{"start": 0, "step": 3, "until_preempt": True}, {"start": 1, "step": 5}]
    job = submit_job(f"in_{kind}", "--nodelist=n0,n1", hold=hold, FD_CLUSTER_ENV=str(own_site))
    job.wait_held(start=0)
    assert not Path(f"/{IN_IMAGE}").exists(), "it is the image's"
    cluster.run("scancel", "--signal=USR1", "--batch", job.number)
    job.wait_held(start=1)
    [rank] = job.rank_processes("n1")
    assert Path(f"/proc/{rank}/root/{IN_IMAGE}").exists(), "the rank is in the container"
    assert b"OMP_NUM_THREADS=99" not in Path(f"/proc/{rank}/environ").read_bytes().split(b"\0")
    os.kill(rank, signal.SIGKILL)
    job.completed()
    assert job.restarts() == 2
    assert losses(job.run_dir) == losses(undisturbed.run_dir)
