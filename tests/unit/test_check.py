"""`fd-scale check`: each row finds what it is for, the others go on, and nothing stays behind."""

import ctypes
import json
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fd_scale import cli, run_folder
from fd_scale.checkpoint import Checkpoints, TrainState
from fd_scale.config import ModelConfig, build_recipe
from fd_scale.data import open_source
from fd_scale.distributed import ALONE
from fd_scale.finetune import ClassificationTask
from fd_scale.models import build_model, weights
from fd_scale.verbs import check as check_module

Values = Callable[..., dict[str, Any]]
Check = Callable[..., dict[str, tuple[str, str]]]


@pytest.fixture
def check(
    saved: Callable[[dict[str, Any]], str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Check:
    """Runs the verb; returns verdict and detail of each row. It must fail where a row does, and only there."""
    monkeypatch.setenv("COLUMNS", "400")  # no row of the table is broken

    def run(values: dict[str, Any], *arguments: str) -> dict[str, tuple[str, str]]:
        code = 0
        try:
            cli.main(["check", saved(values), *arguments])
        except SystemExit as ended:
            code = int(ended.code or 0)
        out = capsys.readouterr().out
        cells = [line.strip("│").split("│") for line in out.splitlines() if line.startswith("│")]
        rows = {name.strip(): (verdict.strip(), detail.strip()) for name, verdict, detail in cells}
        fails = any(verdict == "fails" for verdict, _ in rows.values())
        assert code == (2 if fails else 0)
        last = out.splitlines()[-1]
        assert last.startswith("would fail: " if fails else "nothing found that would fail: ")
        assert all(name in last for name, (verdict, _) in rows.items() if verdict == "fails")
        return rows

    return run


def test_a_good_recipe(recipe_values: Values, check: Check, tmp_path: Path) -> None:
    rows = check(recipe_values(data__evaluation="digits:test", train__global_batch=48), "--ranks", "2")
    assert {verdict for verdict, _ in rows.values()} <= {"ok", "warning"}
    assert "48 images a step = 2 ranks x 3 micro-batches x 8" in rows["DeepSpeed JSON"][1]
    assert "ZeRO-0" in rows["DeepSpeed JSON"][1]
    assert rows["training data"] == ("ok", "digits:train: 1497 images, 10 classes, one of 8x8 px")
    assert "300 images, 10 classes" in rows["evaluation data"][1]
    assert rows["epoch"] == ("ok", "31 steps an epoch")
    assert "24 px make 3x3 tokens" in rows["student"][1]
    assert rows["teacher"][0] == "warning"
    assert "it teaches noise" in rows["teacher"][1]
    assert "no checkpoint to resume" in rows["run folder"][1]
    assert f"torch {torch.__version__.split('+')[0]}, deepspeed " in rows["versions"][1]
    assert "PyPI's `apex` is another thing" in rows["Apex"][1] or "FusedAdam" in rows["Apex"][1]
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"], "nothing stays behind"


@pytest.mark.parametrize("task", ["contrastive", "masked", "classification", "segmentation", "detection"])
def test_other_tasks(
    recipe_values: Values, check: Check, write_shapes: Callable[..., str], write_objects: Callable[..., str],
    tmp_path: Path, task: str,
) -> None:  # fmt: skip
    data, writers = {}, {"segmentation": write_shapes, "detection": write_objects}
    if task in writers:
        source = writers[task](tmp_path / "images", count=17)
        data = {"data__train": source, "data__evaluation": source}
    rows = check(recipe_values(task, train__micro_batch=16, **data))
    assert rows["teacher"] == ("ok", f"none in task {task}")
    assert rows["task"][0] == "ok"


def test_an_average_beside_running_statistics(
    recipe_values: Values, check: Check, write_shapes: Callable[..., str], tmp_path: Path
) -> None:
    values = recipe_values(
        "segmentation", data__train=write_shapes(tmp_path / "images", count=17), optim__ema_decay=0.9
    )
    assert check(values)["task"][0] == "ok"
    verdict, detail = check(values, "segmentation.norm=batch")["task"]
    assert verdict == "fails"
    assert "optim.ema_decay: got 0.9, and the model has BatchNorm layers" in detail


def test_failures_do_not_hide_each_other(recipe_values: Values, check: Check, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    rows = check(
        recipe_values(data__evaluation="digits:tset", train__ds_config="zero7", run_dir=str(tmp_path / "file" / "run")),
        "model.name=swin_v2_tny", "data.train=imagefolder:/nowhere",
    )  # fmt: skip
    assert {name: verdict for name, (verdict, _) in rows.items() if name not in ("teacher", "driver")} == {
        "recipe": "ok", "DeepSpeed JSON": "fails", "network": "ok", "training data": "fails",
        "evaluation data": "fails",
        "epoch": "skipped", "student": "fails", "task": "skipped", "memory": "skipped",
        "run folder": "fails", "resume": "skipped", "disk": "skipped",
        "device": "ok", "Apex": "ok", "versions": "ok",
    }  # fmt: skip
    assert "one of the shipped configs: zero0, zero1" in rows["DeepSpeed JSON"][1]
    assert "imagefolder:/nowhere is not a folder" in rows["training data"][1]
    assert "write digits:train or digits:test" in rows["evaluation data"][1]
    assert "did you mean swin_v2_tiny" in rows["student"][1]
    assert "cannot be written (Not a directory)" in rows["run folder"][1]
    assert rows["disk"][1] == "needs: task, run folder"


def test_evaluation_images_of_other_classes(recipe_values: Values, check: Check, tmp_path: Path) -> None:
    for folder, names in (("train", "abc"), ("val", "ab")):
        for name in names:
            (tmp_path / folder / name).mkdir(parents=True)
            Image.new("RGB", (16, 16)).save(tmp_path / folder / name / "1.png")
    rows = check(
        recipe_values("classification", train__global_batch=2, train__micro_batch=2),
        f"data.train=imagefolder:{tmp_path}/train", f"data.evaluation=imagefolder:{tmp_path}/val",
    )  # fmt: skip
    assert rows["task"][0] == "fails"
    assert "has 2 classes and" in rows["task"][1]


def test_memory_is_planned_without_weights_and_data(recipe_values: Values, check: Check) -> None:
    values = recipe_values(data__train="imagefolder:/nowhere", model__weights="/nowhere/else")
    rows = check(values, "--gpus", "2", "--gpu", "h100")
    assert rows["student"][0] == rows["training data"][0] == "fails"
    assert rows["memory"][0] == "ok"
    assert "GiB of h100, x 2" in rows["memory"][1]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": -5}},
            r"reduce_bucket_size=-5: Input should be greater",
        ),
        ({"zero_optimization": {"stage": 3, "foo_bar": 1}}, "foo_bar=1: Extra inputs are not permitted"),
        ({"communication_data_type": "float8"}, "Got: float8"),
        ({"flops_profiler": {"enabled": "maybe"}}, "DeepSpeed refuses it: unsupported operand"),
        ({"wandb": {"enabled": True}}, "needs the package wandb, which is not here; install it"),
        ({"bfloat16": {"enabled": True}}, "bf16.enabled is true in .*, but train.precision=fp32"),
    ],
)
def test_a_json_that_deepspeed_will_refuse(
    recipe_values: Values, check: Check, tmp_path: Path, config: dict[str, Any], words: str
) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(config))
    verdict, detail = check(recipe_values(train__ds_config=str(tmp_path / "ds.json")))["DeepSpeed JSON"]
    assert verdict == "fails"
    assert re.search(words, detail)


def test_a_recipe_that_cannot_be_read(recipe_values: Values, check: Check) -> None:
    rows = check(recipe_values(), "train.global_bach=4")
    assert rows["recipe"][0] == "fails"
    assert "Did you mean: 'global_batch'" in rows["recipe"][1]
    assert rows["versions"][0] == "ok"
    assert {rows[name][0] for name in rows.keys() - {"recipe", "versions", "Apex"}} == {"skipped"}


def test_ranks_must_share_the_batch(recipe_values: Values, check: Check) -> None:
    rows = check(recipe_values(), "--ranks", "3")
    assert "16 images do not divide over 3 ranks" in rows["DeepSpeed JSON"][1]
    assert rows["epoch"] == ("skipped", "needs: DeepSpeed JSON")


def test_a_step_larger_than_the_data(recipe_values: Values, check: Check) -> None:
    rows = check(recipe_values(train__global_batch=1504))
    assert rows["epoch"][0] == "fails"
    assert "1504 is larger than the data set of 1497 samples" in rows["epoch"][1]


def test_a_pair_that_cannot_be_matched(recipe_values: Values, check: Check) -> None:
    rows = check(recipe_values(), "distill.teachers.0.cls_weight=1")
    assert (rows["student"][0], rows["teacher"][0], rows["task"][0]) == ("ok", "warning", "fails")
    assert "swin_v2_tiny has no CLS token" in rows["task"][1]
    rows = check(recipe_values(), "distill.teachers.0.target=logits")
    assert rows["teacher"][0] == "fails"
    assert "has no classifier" in rows["teacher"][1]


def test_labels_are_wanted_where_they_are_learned(
    recipe_values: Values, check: Check, tmp_path: Path
) -> None:
    (tmp_path / "flat").mkdir()
    for index in range(16):
        Image.new("RGB", (8, 8)).save(tmp_path / "flat" / f"{index}.png")
    rows = check(recipe_values("classification"), f"data.train=imagefolder:{tmp_path / 'flat'}")
    assert "has 0 classes; classification needs labels" in rows["task"][1]


def test_images_that_do_not_decode(recipe_values: Values, check: Check, tmp_path: Path) -> None:
    folder = tmp_path / "images" / "one"
    folder.mkdir(parents=True)
    for index in range(16):
        Image.new("RGB", (8, 8)).save(folder / f"{index:02d}.png")
    (folder / "00.png").write_bytes(b"no image")
    spec = f"imagefolder:{tmp_path / 'images'}"
    rows = check(recipe_values(), f"data.train={spec}", f"data.evaluation={spec}")
    assert rows["training data"][0] == "warning", "training replaces it"
    assert "1 of 16 that were read would be replaced: " in rows["training data"][1]
    assert "00.png: it is no image file" in rows["training data"][1]
    assert rows["evaluation data"][0] == "fails", "an evaluation does not"
    assert "00.png cannot be decoded" in rows["evaluation data"][1]


def test_masks_of_one_class_are_doubted(
    recipe_values: Values, check: Check, tmp_path: Path, write_shapes: Callable[..., str]
) -> None:
    """As masks of 0 and 255 are, 255 being ignored."""
    spec = write_shapes(tmp_path / "shapes", count=3)
    values = recipe_values("segmentation", data__train=spec)
    assert check(values)["training data"][0] == "ok"
    for file in (tmp_path / "shapes/masks").iterdir():
        mask_HW = np.asarray(Image.open(file))
        Image.fromarray(np.where(mask_HW == 1, 255, 0).astype(np.uint8)).save(file)
    verdict, detail = check(values)["training data"]
    assert verdict == "warning"
    assert "all pixels of 3 masks are ground or ignored: classes count from 0, and 255 is ignored" in detail
    for file in (tmp_path / "shapes/images").iterdir():
        file.write_bytes(b"no image")
    verdict, detail = check(values)["training data"]
    assert verdict == "fails"
    assert "of 3 that were read none is whole" in detail


def test_weights_are_compared_by_their_header_alone(
    recipe_values: Values, check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = recipe_values()
    file = tmp_path / "teacher.safetensors"
    teacher = build_model(ModelConfig(**values["distill"]["teachers"][0]["model"]))
    save_file(teacher.state_dict(), file)
    read = []
    monkeypatch.setattr(weights, "load_file", lambda path: read.append(path))
    rows = check(values, f"distill.teachers.0.model.weights={file}", f"model.weights={file}")
    assert rows["teacher"][0] == "ok"
    assert f"{file} fits" in rows["teacher"][1]
    assert rows["student"][0] == "fails"
    assert "patch_embed.proj.weight is (24, 3, 4, 4), expected (16, 3, 4, 4)" in rows["student"][1]
    assert read == []


def test_biases_of_other_windows_are_doubted(recipe_values: Values, check: Check, tmp_path: Path) -> None:
    """At 24 px, exported, the windows have 4 and 3 tokens a side; at 64 px two times 4 of the same, or of 8."""
    values = recipe_values("classification")
    model = values["model"]
    save_file(build_model(ModelConfig(**model)).state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model": model}))
    start = f"model.weights={tmp_path}"
    assert check(values, start)["student"][0] == "ok"
    verdict, detail = check(values, start, "model.img_size=64", "model.overrides.window_size=8")["student"]
    assert verdict == "warning"
    assert "trained over windows of [4, 3] tokens a side, by stage, and are stretched over [8, 8]" in detail
    told = re.search(r"set (model\.overrides\.pretrained_window_size=\[4,3\])", detail)
    assert told, detail
    assert check(values, start, "model.img_size=64", told[1])["student"][0] == "ok"


def test_three_billion_parameters_take_no_memory(recipe_values: Values, check: Check) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = check(
        recipe_values("classification"),
        "model.name=swin_v2_giant",
        "model.img_size=192",
        "model.overrides={}",
    )
    # The weights alone would be 11 GiB; Linux counts KiB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20
    millions = float(rows["student"][1].split()[1])
    assert 2950 < millions < 3050, "Liu et al. 2022 give 3.0 B for SwinV2-G"
    gib = float(rows["disk"][1].split("takes about ")[1].split()[0])
    # 16 bytes a parameter; the head adds 0.1 M parameters, the row rounds to 0.01 GiB
    assert gib == pytest.approx(millions * 1e6 * 16 / 2**30, abs=0.02)


def test_a_run_to_resume(recipe_values: Values, check: Check) -> None:
    values = recipe_values()
    root = Path(values["run_dir"]) / "checkpoints"
    (root / "step_00000004").mkdir(parents=True)
    (root / "latest").write_text("step_00000004\n")
    rows = check(values)
    assert rows["run folder"][0] == "warning"
    assert "names step_00000004, which is not whole" in rows["run folder"][1]
    recipe = build_recipe(values)
    identity = run_folder.identity(recipe, open_source(recipe.data.train).fingerprint, 0, 1)
    engine: Any = SimpleNamespace(snapshot=lambda folder: {"weights.pt": {"weight": torch.zeros(3)}})
    checkpoints = Checkpoints(root.parent, 2, identity, ALONE)
    for step in (4, 6):
        checkpoints.save(engine, TrainState(step=step))
        checkpoints.complete()
    assert "resumes at step 6 (step_00000006)" in check(values)["run folder"][1]
    for step, verdict, words in ((6, "warning", "resumes at step 4"), (4, "fails", "no whole checkpoint")):
        file = root / f"step_0000000{step}/weights.pt"
        file.write_bytes(file.read_bytes()[:-1])
        found = check(values)["run folder"]
        assert found[0] == verdict
        assert words in found[1]


@pytest.mark.parametrize(("checkpoints_free", "verdict"), [(0.9, "fails"), (1.1, "warning"), (4.1, "ok")])
def test_free_disk(
    recipe_values: Values,
    check: Check,
    monkeypatch: pytest.MonkeyPatch,
    checkpoints_free: float,
    verdict: str,
) -> None:
    values = recipe_values("classification", checkpoint__keep_last=2)  # with the best and a new one: 4
    module = ClassificationTask(build_recipe(values), None, open_source("digits:train")).module
    free = checkpoints_free * 16 * sum(parameter.numel() for parameter in module.parameters())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    assert check(values)["disk"][0] == verdict


@pytest.mark.parametrize(
    ("built", "driver", "device", "verdict", "facts"),
    [
        (None, None, "cpu", "ok", ["built without CUDA"]),
        ("13.0", (13, 0), "cpu", "ok", ["CUDA 13.0", "up to 13.0"]),
        ("12.8", (12, 4), "cpu", "ok", ["CUDA 12.8", "up to 12.4"]),
        ("12.8", (13, 1), "auto", "ok", ["CUDA 12.8", "up to 13.1"]),
        ("13.0", (12, 4), "cpu", "warning", ["CUDA 13.0", "up to 12.4"]),
        (
            "13.0",
            (12, 4),
            "auto",
            "fails",
            ["CUDA 13.0", "up to 12.4", "update the NVIDIA driver", "for CUDA 12"],
        ),
        ("13.0", None, "cpu", "warning", ["CUDA 13.0", "no NVIDIA driver", "the CPU"]),
        ("13.0", None, "auto", "warning", ["CUDA 13.0", "no NVIDIA driver", "the CPU"]),
        ("13.0", None, "cuda", "fails", ["CUDA 13.0", "no NVIDIA driver", "set train.device=cpu"]),
    ],
)
def test_driver_against_torch(
    recipe_values: Values,
    check: Check,
    monkeypatch: pytest.MonkeyPatch,
    built: str | None,
    driver: tuple[int, int] | None,
    device: str,
    verdict: str,
    facts: list[str],
) -> None:
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(check_module, "driver_cuda_version", lambda: driver)
    found = check(recipe_values(train__device=device))["driver"]
    assert found[0] == verdict
    assert all(fact in found[1] for fact in facts), found


def test_graphs_on_a_gpu_that_is_not_here(recipe_values: Values, check: Check) -> None:
    values = recipe_values(train__device="auto", train__cuda_graphs=True, train__micro_batch=16)
    assert check(values)["DeepSpeed JSON"][0] == "fails"
    assert check(values, "--gpu", "h200")["DeepSpeed JSON"][0] == "ok"


def test_driver_version(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        def __init__(self, code: int) -> None:
            self.code = code

        def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
            version._obj.value = 12040
            return self.code

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(0))
    assert check_module.driver_cuda_version() == (12, 4)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(999))
    assert check_module.driver_cuda_version() is None

    def absent(name: str) -> Driver:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert check_module.driver_cuda_version() is None


def test_no_ranks_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["check", "digits/distill", "--ranks", "0"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "fd-scale: --ranks: got 0, expected at least 1\n"


@pytest.mark.slow
def test_it_does_not_import_deepspeed() -> None:
    code = "import sys, fd_scale.verbs.check; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
