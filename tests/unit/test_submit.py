"""`fd-scale submit` without a SLURM: what it shows, what it copies, what it refuses."""

import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fd_scale import cli
from fd_scale.cluster import job, pinned
from fd_scale.cluster.submit import _seconds
from fd_scale.errors import UserError


@pytest.fixture
def show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs submit --dry-run in an empty folder; returns what it prints, or the sentence that refuses it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "site.env").write_text("")
    monkeypatch.setenv("FD_CLUSTER_ENV", str(tmp_path / "site.env"))

    def run(*arguments: str, refused: bool = False) -> str:
        if not refused:
            cli.main(["submit", *arguments, "--dry-run"])
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as ended:
            cli.main(["submit", *arguments, "--dry-run"])
        assert ended.value.code == 2
        return capsys.readouterr().err

    return run


def commands(shown: str) -> list[list[str]]:
    return [shlex.split(line) for line in shown.splitlines() if line.startswith("sbatch ")]


def test_one_job(show: Callable[..., str], tmp_path: Path) -> None:
    shown = show("digits/distill", "run_dir=mine", "--nodes", "4", "--time", "2:00:00", "--sbatch=--qos=high")
    [command] = commands(shown)
    assert command[:3] == ["sbatch", "--parsable", "--nodes=4"]
    for option in (
        "--time=2:00:00",
        "--qos=high",
        "--signal=B:USR1@300",
        f"--output={tmp_path}/mine/slurm-%j.out",
    ):
        assert option in command
    script, recipe, setting = command[-3:]
    assert script.startswith(f"{tmp_path}/mine/submitted/")
    assert script.endswith("/fd_slurm/distill.sbatch")
    assert (recipe, setting) == ("digits/distill", "run_dir=mine")
    assert "    #SBATCH --requeue" in shown, "the script itself"
    assert "    FD_VERB=distill" in shown
    assert not (tmp_path / "mine").exists()


def test_the_lead_is_three_times_the_last_save(show: Callable[..., str], tmp_path: Path) -> None:
    lines = [
        {"step": 1, "kind": "train", "step_time_s": 10.0},
        {"step": 1, "kind": "checkpoint", "stall_s": 900.0, "write_s": 900.0, "checksum_s": 900.0},
        {"step": 2, "kind": "train", "step_time_s": 20.0},
        {"step": 2, "kind": "checkpoint", "stall_s": 50.0, "write_s": 100.0, "checksum_s": 0.5},
    ]
    (tmp_path / "mine").mkdir()
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "ki'  # killed while it wrote
    (tmp_path / "mine" / "metrics.jsonl").write_text(text)
    [command] = commands(show("digits/distill", "run_dir=mine", "--nodes", "1"))
    assert "--signal=B:USR1@492" in command, "3 x 150.5 s, and two steps of 20 s"


def test_a_chain_hands_weights_on(show: Callable[..., str], tmp_path: Path) -> None:
    after = ("--then", "digits/distill", "--then", "digits/finetune", "optim.lr=1e-3")
    shown = show("digits/teacher", "--nodes", "2", *after)
    teacher, student, tuned = commands(shown)
    runs = tmp_path / "runs" / "digits"
    assert not any(word.startswith("--dependency") for word in teacher)
    assert "--dependency=afterok:JOB1" in student
    assert student[-1] == f"distill.teachers.0.model.weights={runs}/teacher/export"
    assert "--dependency=afterok:JOB2" in tuned
    assert tuned[-2:] == ["optim.lr=1e-3", f"model.weights={runs}/distill/export"]
    assert teacher[-2].endswith("distill.sbatch")
    assert "    FD_VERB=pretrain" in shown
    assert f"    FD_EXPORT={runs}/teacher/export" in shown
    assert f"#   starts from distill.teachers.0.model.weights={runs}/teacher/export" in shown
    shown = show("digits/distill", "--nodes", "1", "--then", "digits/finetune", "model.weights=/mine")
    assert commands(shown)[1][-1] == "model.weights=/mine", "what the user gives stays"
    assert "starts from model.weights=/mine, not from the run before" in shown
    assert "FD_EXPORT=''" in shown


def test_a_chain_goes_on_from_its_own_runs_whatever_recipes_name(
    show: Callable[..., str], tmp_path: Path
) -> None:
    after = ("--then", "imagenet/finetune_clip_vit_base", "--then", "imagenet/clip_vit_large")
    _, tuned, other = commands(
        shown := show("imagenet/clip_vit_base", "run_dir=mine", "--nodes", "1", *after)
    )
    assert tuned[-1] == f"model.weights={tmp_path}/mine/export", "the recipe names another place"
    assert not any("weights" in word for word in other)
    assert "starts from distill.teachers.0.model.weights=pretrained, not from the run before" in shown
    measured = ("--then", "evaluate", "--then", "digits/finetune")
    _, _, tuned = commands(shown := show("digits/distill", "--nodes", "1", *measured))
    assert tuned[-1] == f"model.weights={tmp_path}/runs/digits/distill/export", "behind an evaluation too"
    assert f"FD_EXPORT={tmp_path}/runs/digits/distill/export" in shown


def test_an_array(show: Callable[..., str], tmp_path: Path) -> None:
    shown = show("digits/distill", "--nodes", "1", "--array", "optim.betas=[0.9,0.99],[0.8,0.9]")
    [command] = commands(shown)
    assert "--array=0-1" in command
    assert f"--output={tmp_path}/runs/digits/distill/slurm-%A_%a.out" in command
    elements = [shlex.split(line.split("element:")[1]) for line in shown.splitlines() if "element:" in line]
    assert [settings[0] for settings in elements] == ["optim.betas=[0.9,0.99]", "optim.betas=[0.8,0.9]"]
    assert len({settings[1] for settings in elements}) == 2


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["--nodes", "0"], ["--nodes: got 0"]),
        (["--nodes", "1", "--time", "banana"], ["--time: got banana", "HH:MM:SS"]),
        (["--nodes", "1", "--time", "9:59"], ["9:59 is 599 s, and 300 s before", "give 10 minutes or more"]),
        (["--nodes", "1", "--gpu", "h10"], ["--gpu: got h10", "did you mean h100"]),
        (["--nodes", "1", "--gpu", "a100"], ["--gpu: got a100", "did you mean a100-40g or a100-80g"]),
        (["--nodes", "1", "train.global_bach=1"], ["Did you mean: 'global_batch'"]),
        (["--nodes", "1", "--then", "digits/finetune", "model.depth=1"], ["model", "depth"]),
        (["--nodes", "1", "--then", "digits/distill"], ["two jobs would work in", "run_dir=PATH"]),
        (["--nodes", "1", "run_dir=a b"], ["has a blank"]),
        (["--nodes", "1", "--array", "optim.lr"], ["key=a,b,c"]),
        (["--nodes", "1", "--array", "optim.lr=1,1"], ["same run folder"]),
        (["--nodes", "1", "--array", "optim.lr=1,-1"], ["optim.lr: got -1"]),
        (["--nodes", "1", "--array", "run_dir=a,b"], ["a run_dir of its own already"]),
        (
            ["--nodes", "1", "--array", "optim.lr=1,2", "--then", "digits/finetune"],
            ["cannot be one with --then"],
        ),
    ],
)
def test_what_is_refused(show: Callable[..., str], arguments: list[str], facts: list[str]) -> None:
    sentence = show("digits/distill", *arguments, refused=True)
    assert all(fact in sentence for fact in facts), sentence


def test_time_limits_are_read_as_sbatch_reads_them() -> None:
    seconds = {"90": 5400, "9:30": 570, "2:00:01": 7201, "1-0": 86400, "1-2:30": 95400, "1-0:0:5": 86405}
    assert {text: _seconds(text) for text in seconds} == seconds
    assert _seconds("UNLIMITED") == _seconds("0") == math.inf


def test_a_verb_of_a_run_follows_one(show: Callable[..., str], tmp_path: Path) -> None:
    _, measured = commands(show("digits/finetune", "--nodes", "4", "--then", "evaluate"))
    assert "--nodes=1" in measured
    assert measured[-2].endswith("/fd_slurm/evaluate.sbatch")
    assert measured[-1] == f"{tmp_path}/runs/digits/finetune"
    assert "follows one" in show("evaluate", "--nodes", "1", refused=True)


def test_the_site_gives_its_options(
    show: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = tmp_path / "cluster.env"
    example.write_text((pinned.scripts() / "cluster.env.example").read_text())
    monkeypatch.setenv("FD_CLUSTER_ENV", str(example))
    assert "CHANGE_ME; fill in your account" in show("digits/distill", "--nodes", "1", refused=True)
    example.write_text(example.read_text().replace("CHANGE_ME", "lab"))
    [command] = commands(show("digits/distill", "--nodes", "1", "--gpu", "a100-80g"))
    assert {"--partition=a100", "--account=lab", "--gpus-per-node=8"} <= set(command)
    [command] = commands(show("digits/distill", "--nodes", "1", "--gpu", "h200"))
    assert "--partition=h200" in command
    sentence = show("digits/distill", "--nodes", "3", "--gpu", "h200", refused=True)
    assert "256 images do not divide over 24 ranks" in sentence, "as many GPUs as the options ask for"
    (tmp_path / "ds.json").write_text('{"train_batch_size": 512}')
    given = f"train.ds_config={tmp_path}/ds.json"
    assert "train_batch_size is 512" in show(
        "digits/distill", given, "--nodes", "1", "--gpu", "h200", refused=True
    )
    own = ("--sbatch=--gpus-per-node=4", "train.global_batch=12", "train.micro_batch=12")
    assert commands(show("digits/teacher", *own, "--nodes", "1", "--gpu", "h200")), (
        "the user's own options win"
    )
    each = ("digits/teacher", "train.global_batch=12", "--nodes", "1", "--gpu", "h200", "--array")
    assert commands(show(*each, "train.global_batch=64,128")), (
        "each element is looked at, and not what none of them is"
    )
    assert "12 images do not divide" in show(*each, "train.global_batch=64,12", refused=True)
    example.write_text("echo loading modules\n" + example.read_text() + "FD_RANKS_PER_NODE=1\n")
    assert commands(show("digits/distill", "--nodes", "4", "--gpu", "h200")), "or as it says"
    example.write_text("FD_RANKS_PER_NODE=auto\n")
    assert "FD_RANKS_PER_NODE is auto, expected a number" in show(
        "digits/distill", "--nodes", "1", refused=True
    )
    example.write_text("if")
    assert "bash cannot read it" in show("digits/distill", "--nodes", "1", refused=True)
    monkeypatch.setenv("FD_CLUSTER_ENV", str(tmp_path / "none"))
    assert "is no file" in show("digits/distill", "--nodes", "1", refused=True)


def test_without_slurm_it_says_where_to_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit):
        cli.main(["submit", "digits/distill", "--nodes", "1", f"run_dir={tmp_path}/run"])
    assert "sbatch is not on this machine; submit on a login node" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_sbatch_refuses_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bin").mkdir()
    stub = tmp_path / "bin" / "sbatch"
    stub.write_text("#!/bin/sh\necho 'sbatch: error: invalid account' >&2\nexit 1\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stub.parent}:{os.environ['PATH']}")
    with pytest.raises(SystemExit):
        cli.main(["submit", "digits/distill", "--nodes", "1", f"run_dir={tmp_path}/run"])
    assert "sbatch refuses: sbatch: error: invalid account; the command is: sbatch" in capsys.readouterr().err
    assert list((tmp_path / "run" / "submitted").iterdir()) == []


def test_a_copy_runs_whatever_becomes_of_the_code(
    tmp_path: Path, recipe_values: Callable[..., dict[str, Any]]
) -> None:
    copy = pinned.place(tmp_path / "run")
    pinned.pin(copy)
    assert pinned.place(tmp_path / "run") != copy
    code = (
        "from importlib.util import find_spec as find; from fd_scale.cluster import pinned;"
        "print(*(find(name).origin for name in ('fd_scale', 'fd_kernels', 'fd_ds_configs')), pinned.commit(),"
        "pinned.scripts())"
    )
    (copy / "COMMIT").write_text("abc\n")
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(copy), "PYTHONSAFEPATH": "1"},
        capture_output=True, text=True, check=True, cwd=pinned.scripts().parent,
    )  # fmt: skip
    *files, commit, scripts = done.stdout.split()
    assert all(file.startswith(f"{copy}/") for file in [*files, scripts])
    assert commit == "abc", "not that of the repository around it"
    assert {"common.sh", "distill.sbatch", "cluster.env.example"} <= {
        path.name for path in (copy / "fd_slurm").iterdir()
    }
    assert (copy / "fd_scale" / "recipes" / "digits" / "distill.yaml").is_file()


def test_what_a_batch_script_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    job.main(["distill", "digits/distill", "optim.lr=1", "run_dir=mine"])
    run_dir, port = capsys.readouterr().out.splitlines()
    assert run_dir == f"{tmp_path}/mine"
    assert 1024 < int(port) < 65536
    for wrong, words in (["distill", "digits/distil"], "neither a file"), (["distil", "x"], "invalid choice"):
        with pytest.raises(SystemExit) as ended:
            job.main(wrong)
        assert ended.value.code == 2
        assert words in capsys.readouterr().err
    monkeypatch.setattr(job, "lead_s", lambda run_dir: 400)
    job.main(["distill", "digits/distill"])
    assert "told 400 s before its end, and is told 300 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["evaluate", "RUN"], "RUN"),
        (["diagnose", "teacher:RUN", "vit_tiny_patch16_224@none"], "RUN"),
        (["diagnose", "vit_tiny_patch16_224@none", "--out", "RUN/looked", "--images", "digits:test"], "RUN/looked"),
    ],
)  # fmt: skip
def test_the_folder_that_a_command_works_in(arguments: list[str], expected: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    given = [argument.replace("RUN", str(tmp_path / "run")) for argument in arguments]
    assert str(job.run_dir_of(given)) == expected.replace("RUN", str(tmp_path / "run"))
    with pytest.raises(UserError, match="give --out DIR"):
        job.run_dir_of(["diagnose", "vit_tiny_patch16_224@none"])
