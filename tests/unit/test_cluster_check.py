"""`fd-scale check --cluster`: how nodes are judged, and the whole of it on one rank."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fd_scale.cluster import check, pinned
from fd_scale.config import Recipe
from fd_scale.distributed import ALONE, World

Make = Callable[..., Recipe]
H100 = ("NVIDIA H100 80GB HBM3",) * 2


@pytest.fixture
def nodes() -> list[check._Node]:
    """Two nodes of two GPUs."""
    versions = (("python", "3.11.7"), ("torch", "2.13.0"), ("deepspeed", "0.19.8"))
    return [
        check._Node(
            rank=rank, host=f"n{rank // 2}", local_rank=rank % 2, gpus=H100, cuda=("12.8", (12, 8)), versions=versions,
            weights="",
        )
        for rank in range(4)
    ]  # fmt: skip


def test_nodes_that_are_alike(nodes: list[check._Node], make_recipe: Make) -> None:
    recipe = make_recipe(train__device="auto")
    rows = [
        check._gpus(recipe, nodes),
        check._driver(recipe, nodes),
        check._versions(nodes),
        check._weights(nodes),
    ]
    assert [row.verdict for row in rows] == ["ok"] * 4
    assert rows[0].detail == "4 x NVIDIA H100 80GB HBM3, 2 visible on each rank"


@pytest.mark.parametrize(
    ("changes", "judge", "facts"),
    [
        ({"gpus": H100[:1]}, "gpus", ["no GPU of its own: rank 3 on n1"]),
        ({"gpus": ("NVIDIA A100-SXM4-80GB",) * 2}, "gpus", ["n1 has", "A100", "most have", "--exclude=HOST"]),
        ({"cuda": ("12.8", (11, 8))}, "driver", ["CUDA 12.8, too new for the driver on n1"]),
        ({"cuda": ("12.8", None)}, "driver", ["too new for the driver on n1"]),
        ({"weights": "/w does not exist"}, "weights", ["on n1: /w does not exist"]),
        (
            {"versions": (("python", "3.11.7"), ("torch", "2.12.0"), ("deepspeed", "0.19.8"))},
            "versions",
            ["torch: n1 has 2.12.0, most have 2.13.0", "FD_PYTHON"],
        ),
    ],
)
def test_a_node_that_differs_is_named(
    nodes: list[check._Node], make_recipe: Make, changes: dict[str, Any], judge: str, facts: list[str]
) -> None:
    nodes[3] = replace(nodes[3], **changes)
    recipe = make_recipe(train__device="auto")
    row = {
        "gpus": lambda: check._gpus(recipe, nodes), "driver": lambda: check._driver(recipe, nodes),
        "versions": lambda: check._versions(nodes), "weights": lambda: check._weights(nodes),
    }[judge]()  # fmt: skip
    assert row.verdict == "fails"
    assert all(fact in row.detail for fact in facts), row.detail


def test_a_gpu_that_nobody_has(nodes: list[check._Node], make_recipe: Make) -> None:
    bare = [replace(node, gpus=()) for node in nodes]
    assert check._gpus(make_recipe(train__device="cuda"), bare).verdict == "fails"
    assert check._gpus(make_recipe(train__device="auto"), bare).verdict == "ok"


def test_the_run_folder_is_left_as_it_was(tmp_path: Path) -> None:
    row = check._run_folder(tmp_path / "a" / "b", ALONE)
    assert row.verdict == "ok"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    row = check._run_folder(tmp_path / "file" / "run", ALONE)
    assert row.verdict == "fails"
    assert "cannot be written on" in row.detail


def test_a_run_folder_that_is_not_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 of two does not see what rank 1 says it has written."""
    two = World(rank=0, local_rank=0, size=2, device=torch.device("cpu"))
    monkeypatch.setattr(World, "barrier", lambda self: None)
    monkeypatch.setattr(World, "gather", lambda self, mine: [("n0", *mine[1:]), ("n1", "", [])])
    row = check._run_folder(tmp_path / "run", two)
    assert row.verdict == "fails"
    assert "n0 does not see what n1 writes; it must be shared" in row.detail


def test_what_links_allow() -> None:
    """By nccl-tests' count: NVLink's rate in a node, that of all its network cards between nodes."""
    h100, a100 = H100[0], "NVIDIA A100-SXM4-80GB"
    assert check.expected_rate(h100, ["n0"] * 8) == 450e9
    assert check.expected_rate(h100, ["n0"] * 8 + ["n1"] * 8) == 400e9
    assert check.expected_rate(a100, ["n0"] * 8 + ["n1"] * 8) == 200e9
    assert check.expected_rate(h100, ["n0", "n0", "n1"]) == 50e9
    assert check.expected_rate("NVIDIA L40S", ["n0"] * 8) is None


def test_a_gpu_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError(
            "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be"
        )

    monkeypatch.setattr(torch, "ones", fail)
    monkeypatch.setattr(World, "gather", lambda self, mine: [mine, ""])
    monkeypatch.setattr(World, "barrier", lambda self: None)
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    row = check._network(replace(ALONE, size=2))
    assert row.verdict == "fails"
    assert row.detail == "on n7: CUDA error: an illegal memory access was encountered"
    monkeypatch.setattr(torch.cuda, "get_device_name", fail)
    assert check._gpu_name(3) == "GPU 3: CUDA error: an illegal memory access was encountered"


def test_the_whole_of_it(
    make_recipe: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "READ_S", 0.1)
    for name in ("SLURM_JOB_ID", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    check.check_cluster(make_recipe(), [])
    said = capsys.readouterr().out
    assert "nothing found that would fail: 7 checks, 0 warn" in said
    with pytest.raises(SystemExit) as ended:
        check.check_cluster(make_recipe(data__train="imagefolder:/nowhere"), [])
    assert ended.value.code == 2
    said = capsys.readouterr().out
    assert "/nowhere is not a folder" in said
    assert "would fail: 1 of 7 checks fail" in said


def test_inside_an_allocation_it_starts_its_ranks(make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    class Done:
        returncode = 137

    def run(command: list[str], check: bool) -> Done:
        ran.append(command)
        return Done()

    monkeypatch.setattr(check.subprocess, "run", run)
    with pytest.raises(SystemExit) as ended:
        check.check_cluster(make_recipe(), ["my.yaml", "seed=1"])
    assert ended.value.code == 2
    assert ran == [["bash", str(pinned.scripts() / "check.sh"), "my.yaml", "seed=1"]]
