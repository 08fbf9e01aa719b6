"""torchrun without SLURM on two hosts: two network namespaces, each with a card, an address and a name of its own."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

CARD = "fdcard"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Names of two network namespaces that see each other as 10.213.0.1 and 10.213.0.2."""
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip(
            "no network namespaces: `ip` or `unshare` is not installed (apt-get install iproute2 util-linux)"
        )
    names = [f"fd{os.getpid()}{letter}" for letter in "ab"]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            inside = ["type", "veth", "peer", "name", CARD, "netns", names[1]]
            ip("link", "add", CARD, "netns", names[0], *inside)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        for number, name in enumerate(names, start=1):
            ip("-n", name, "addr", "add", f"10.213.0.{number}/24", "dev", CARD)
            ip("-n", name, "link", "set", CARD, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.mark.slow
def test_torchrun_on_two_hosts(
    hosts: list[str], values_in: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(values_in(tmp_path / "two", train__ds_config="zero3")))
    launch = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--master-addr=10.213.0.1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    jobs = []
    for number, name in enumerate(hosts):
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$1"; shift; exec "$@"', "sh", name]
        command = [sys.executable, *launch, f"--node-rank={number}", "-m", "fd_scale", "distill", str(recipe)]
        jobs.append(
            subprocess.Popen(
                ["ip", "netns", "exec", name, *named, *command], env=environment | {"GLOO_SOCKET_IFNAME": CARD},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
        )  # fmt: skip
    try:
        said = [job.communicate(timeout=250)[0] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert [job.returncode for job in jobs] == [0, 0], said
    alone = [sys.executable, "-m", "fd_scale", "distill", str(recipe), f"run_dir={tmp_path}/one"]
    subprocess.run(alone, env=environment, check=True, capture_output=True, timeout=250)
    losses = []
    for name in ("two", "one"):
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        losses.append([line["loss"] for line in lines if line["kind"] == "train"])
    # Two ranks add in another order than one; six steps of AdamW lie between.
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    starts = json.loads((tmp_path / "two" / "environment.json").read_text())
    assert starts[0]["host"] == hosts[0]
