"""What `fd-scale submit` makes of recipes, on a real SLURM."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import Cluster
from slurm_jobs import Job, losses

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
TRAIN_HERE = """
import json, sys
from fd_scale import api
for file, settings, export in json.loads(sys.argv[1]):
    recipe = api.load_recipe(file, settings)
    api.train(recipe)
    if export:
        api.export(recipe.run_dir, export)
"""


def submitted(cluster: Cluster, *arguments: str, cwd: Path) -> tuple[list[str], str]:
    """Submits; returns job ids, and what was said."""
    said = cluster.run(sys.executable, "-m", "fd_scale", "submit", *arguments, cwd=cwd)
    return re.findall(r"^job (\d+):", said, re.MULTILINE), said


def test_chain_and_array(
    cluster: Cluster, site: Path, values_in: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Both run at the same time, on one node each; beside them the same runs without SLURM."""
    quick = {"train__steps": 4, "train__ds_config": "zero0"}
    files = {}
    tasks = (("student", "distill"), ("tuned", "classification"), ("swept", "distill"), ("here", "distill"))
    for name, task in tasks:
        files[name] = str(tmp_path / f"{name}.yaml")
        measured = {"data__evaluation": "digits:test"} if task == "classification" else {}
        Path(files[name]).write_text(json.dumps(values_in(tmp_path / name, task, **quick, **measured)))
    ds_config = tmp_path / "mine.json"
    shutil.copy(ROOT / "ds_configs" / "zero0.json", ds_config)
    then = (f"train.ds_config={ds_config}", "--sbatch=--hold", "--then", files["tuned"])
    then += ("--then", "evaluate", "--then", "diagnose")
    chain, said = submitted(cluster, files["student"], "--nodes=1", *then, cwd=tmp_path)
    assert f"follow:  tail -F {tmp_path}/student/slurm-{chain[0]}.out" in said
    # The job runs the copy: what is changed in it shows, and what becomes of recipe and JSON does not.
    [copy] = (tmp_path / "student" / "submitted").iterdir()
    (copy / "COMMIT").write_text("the copy\n")
    Path(files["student"]).write_text("nonsense")
    ds_config.write_text("nonsense")
    cluster.run("scontrol", "release", *chain)
    held = tmp_path / "swept-seed-1"
    held.mkdir()
    (held / "hold").write_text(json.dumps([{"start": 0, "step": 1, "until_preempt": True}]))
    [array], said = submitted(cluster, files["swept"], "--nodes=1", "--array", "seed=0,1", cwd=tmp_path)
    assert f"0: seed=0 run_dir={tmp_path}/swept-seed-0" in said

    export = tmp_path / "here-export"
    tuned_here = [f"run_dir={tmp_path}/tuned-here", f"model.weights={export}"]
    runs = [
        (files["here"], [], str(export)),
        (files["tuned"], tuned_here, ""),
        (files["swept"], ["seed=1", f"run_dir={tmp_path}/seed-1-here"], ""),
    ]
    subprocess.run(
        [sys.executable, "-c", TRAIN_HERE, json.dumps(runs)], check=True, capture_output=True, timeout=300
    )

    second = Job(cluster, f"{array}_1", held, tmp_path / "swept" / f"slurm-{array}_1.out")
    second.wait_held(start=0, ranks=1)
    cluster.run("scancel", "--signal=USR1", "--batch", second.number)
    for number, name in (
        (chain[0], "student"),
        (chain[1], "tuned"),
        (chain[2], "tuned"),
        (chain[3], "tuned"),
        (f"{array}_0", "swept"),
        (f"{array}_1", "swept"),
    ):
        Job(cluster, number, tmp_path / name, tmp_path / name / f"slurm-{number}.out").completed()
    assert second.restarts() == 1, "preempted, and resumed"
    assert cluster.job(f"{array}_0")["Restarts"] == "0", "alone"
    starts = json.loads((tmp_path / "student" / "environment.json").read_text())
    assert [start["commit"] for start in starts] == ["the copy"]
    assert losses(tmp_path / "student") == losses(tmp_path / "here")
    assert losses(tmp_path / "tuned") == losses(tmp_path / "tuned-here")
    evaluation = json.loads((tmp_path / "tuned/evaluations/step_00000004.json").read_text())
    lines = map(json.loads, (tmp_path / "tuned/metrics.jsonl").read_text().splitlines())
    assert [line["top1"] for line in lines if line["kind"] == "evaluation"] == [evaluation["top1"]]
    looked = json.loads((tmp_path / "tuned/diagnosis/diagnosis.json").read_text())
    assert [len(model["layers"]) for model in looked["models"]] == [3]
    assert losses(tmp_path / "swept-seed-0") == losses(tmp_path / "here")
    assert losses(tmp_path / "swept-seed-1") == losses(tmp_path / "seed-1-here")
    assert losses(tmp_path / "seed-1-here") != losses(tmp_path / "here")
