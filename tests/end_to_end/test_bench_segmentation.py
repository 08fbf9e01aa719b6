"""`fd-scale bench segmentation`: the peer is what Transformers has, and both loops take steps."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fd_scale import api, cli
from fd_scale.benchmarks.segmentation import TransformersUPerNet
from fd_scale.data import open_source
from fd_scale.finetune import SegmentationTask

pytestmark = pytest.mark.slow


@pytest.fixture
def recipe(
    recipe_values: Callable[..., dict[str, Any]], write_shapes: Callable[..., str],
    saved: Callable[[dict[str, Any]], str], tmp_path: Path,
) -> str:  # fmt: skip
    source = write_shapes(tmp_path / "shapes")
    return saved(
        recipe_values("segmentation", data__train=source, train__global_batch=4, train__micro_batch=4)
    )


def test_both_loops_are_measured(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason="needs the extra [hf]")
    out = tmp_path / "out.json"
    cli.main(["bench", "segmentation", recipe, "--steps", "2", "--json", str(out)])
    found = json.loads(out.read_text())
    for loop in ("ours_ms", "transformers_ms"):
        assert len(found[loop]) == 2
        assert min(found[loop]) > 0
    assert "transformers" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "segmentation", "digits/distill"])
    assert ended.value.code == 2
    assert "expects task segmentation" in capsys.readouterr().err


def test_prediction_is_measured_by_size(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    settings = ["segmentation.num_classes=3", "segmentation.short_side=24"]
    sides = ["--sides", "60", "24", "--repeats", "2"]
    cli.main(["bench", "prediction", recipe, *settings, *sides, "--json", str(out)])
    found = json.loads(out.read_text())
    assert list(found["sides"]) == ["24", "60"]
    assert all(len(each["seconds"]) == 2 and each["peak_gib"] > 0 for each in found["sides"].values())
    # At their own size: windows of 24 px, 16 apart, the last one at the end.
    assert [each["windows"] for each in found["sides"].values()] == [1, 4 * 4]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main(["bench", "prediction", recipe])
    assert "segmentation.num_classes" in capsys.readouterr().err


def test_the_peer_has_as_many_parameters_and_trains_them(recipe: str) -> None:
    pytest.importorskip("transformers", reason="needs the extra [hf]")
    loaded = api.load_recipe(recipe, ["segmentation.norm=batch", "model.overrides.drop_path_rate=0.0"])
    task = api.build_task(loaded, open_source(loaded.data.train))
    assert isinstance(task, SegmentationTask)
    ours = {name: parameter.numel() for name, parameter in task.module.named_parameters()}
    peer = TransformersUPerNet(task)
    theirs = {name: parameter.numel() for name, parameter in peer.named_parameters()}
    assert sum(theirs.values()) == sum(ours.values())
    images = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8)
    masks = torch.randint(0, 3, (2, 24, 24), dtype=torch.uint8)
    outputs = peer(images_BCHW=images, masks_BHW=masks)
    (outputs["loss"] + outputs["auxiliary"]).backward()
    assert [name for name, parameter in peer.named_parameters() if parameter.grad is None] == []
