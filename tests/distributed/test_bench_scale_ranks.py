"""`bench scale`: which ranks measure when, and what becomes of one that fails; then whole, under torchrun."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_cases
import pytest
from ranks import run_ranks

from fd_scale.benchmarks.records import Records
from fd_scale.benchmarks.scale import Job

FOUND = {"num_steps": 10, "median_ms": 100.0, "p10_ms": 99.0, "p90_ms": 103.0, "images_per_s": 160.0}
# In the place of a measuring process: says which rank of which world it is; of three ranks the second fails, of two one
# takes too long where it is told to.
PROGRAM = """
import os, sys, time, json
file, recipe, way, steps, *settings = sys.argv[1:]
rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
assert os.environ["LOCAL_WORLD_SIZE"] == size and "TORCHELASTIC_USE_AGENT_STORE" not in os.environ
with open(LOG, "a") as log:
    log.write(f"ranks {size}:{rank}:{os.environ['MASTER_PORT']}:{settings[-1]}\\n")
def write(found):  # whole or not at all, as a measuring process does: the waiting rank reads meanwhile
    with open(file + ".part", "w") as part:
        part.write(json.dumps(found))
    os.rename(file + ".part", file)
while open(LOG).read().count(f"ranks {size}:") < int(size):
    time.sleep(0.01)
if size == "3" and rank == "1":
    write({"error": "out of memory"})
    print("its last words")
    sys.exit(1)
if size == "3" and rank == "0":
    time.sleep(0.05)
    write({"error": "connection lost"})
    sys.exit(1)
if size == "3" or (size == "2" and SLOW):
    time.sleep(600)
if size == "4" and rank == "3":
    sys.exit(9)
write(FOUND)
"""


def program(log: Path, slow: bool = False) -> str:
    return f"LOG, SLOW, FOUND = {str(log)!r}, {slow}, {FOUND}\n{PROGRAM}"


@pytest.fixture
def job(recipe_values: Callable[..., dict[str, Any]], tmp_path: Path) -> Job:
    # No divisor of a rank's share: what a rank takes at once is fewer than the most.
    values = recipe_values(train__ds_config="zero3", train__global_batch=48, train__micro_batch=32)
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))  # JSON is YAML
    return Job(recipe=str(tmp_path / "recipe.yaml"), num_steps=2)


@pytest.mark.slow
def test_sizes_take_turns_and_failures_are_recorded(job: Job, tmp_path: Path) -> None:
    log, out = tmp_path / "log", tmp_path / "out"
    calls = ["1,2", None, "1,2,3"]
    shown, *others = run_ranks(bench_cases.scale, 4, job, str(out), program(log), calls, 300.0)
    assert others == [[]] * 3, "the main rank alone speaks"
    assert shown == [(1, None), (2, None), (3, "rank 1: out of memory"), (4, "rank 3: ended with code 9")]
    started = [line.removeprefix("ranks ").split(":") for line in log.read_text().splitlines()]
    # 1 and 2 are not measured again; 4 is by default, and failed; 3 killed the ranks that waited.
    assert sorted((size, rank) for size, rank, *_ in started) == [
        (size, rank) for size in "1234" for rank in "0123"[: int(size)]
    ]
    ports = {size: {port for other, _, port, _ in started if other == size} for size in "1234"}
    assert all(len(found) == 1 for found in ports.values())
    assert len(set.union(*ports.values())) > 1, "a port that is free, not torchrun's"
    assert {setting for *_, setting in started} == {"distill.teachers.0.model.weights=null"}, (
        "the recipe's batch"
    )


@pytest.mark.slow
def test_a_size_that_takes_too_long(job: Job, tmp_path: Path) -> None:
    log = tmp_path / "log"
    weak = Job(recipe=job.recipe, weak=True)
    [shown, _] = run_ranks(
        bench_cases.scale, 2, weak, str(tmp_path / "out"), program(log, slow=True), ["2", "1"], 1.0
    )
    assert shown == [(1, None), (2, "rank 0: time-out: not done after 1 s")]
    assert {line.split(":")[-1] for line in log.read_text().splitlines()} == {
        "train.global_batch=64",
        "train.global_batch=32",
    }


@pytest.mark.slow
def test_one_and_two_ranks_under_torchrun(job: Job, tmp_path: Path) -> None:
    command = "-m torch.distributed.run --standalone --nproc-per-node=2 -m fd_scale bench scale"
    # As in a pipe: pytest-xdist's workers have a width of 80 in theirs.
    env = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    done = subprocess.run(
        [sys.executable, *command.split(), job.recipe, "--steps", "2", "--out", str(tmp_path / "out")],
        env=env | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    records = Records.newest(tmp_path / "out")
    assert records is not None
    one, two = records.by_cell.values()
    assert (one.num_ranks, one.error, one.sent_bytes) == (1, None, 0)
    assert (two.num_ranks, two.error) == (2, None)
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "│" in line
    ]
    assert [row[:2] for row in rows] == [["1", "2 x 24"], ["2", "1 x 24"]]
    for record, row in zip((one, two), rows, strict=True):
        predicted, measured = float(row[-2]), float(row[-1])
        assert measured == pytest.approx(predicted, rel=0.02)
        assert record.sent_bytes == pytest.approx(1e6 * measured, abs=500)
        assert record.images_per_s == pytest.approx(48e3 / (record.median_ms or 0))
    assert float(rows[0][2]) == pytest.approx(float(rows[0][3]), abs=2e-4), (
        "the first size says how quick the ranks are"
    )
    assert float(rows[1][2]) < float(rows[0][2])
