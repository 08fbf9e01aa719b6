"""`fd-scale bench detection`: the peer is torchvision's, and both loops take steps and detect."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fd_scale import api, cli
from fd_scale.benchmarks.detection import TorchvisionMaskRCNN
from fd_scale.data import open_source
from fd_scale.finetune import DetectionTask

pytestmark = pytest.mark.slow


def test_both_are_measured(
    recipe_values: Callable[..., dict[str, Any]], write_objects: Callable[..., str],
    saved: Callable[[dict[str, Any]], str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    source = write_objects(tmp_path / "objects")
    values = recipe_values("detection", data__train=source, train__global_batch=4, train__micro_batch=4)
    recipe, out = saved(values), tmp_path / "out.json"
    cli.main(["bench", "detection", recipe, "--steps", "2", "--json", str(out)])
    found = json.loads(out.read_text())
    for times in ("ours_ms", "torchvision_ms", "ours_detection_ms", "torchvision_detection_ms"):
        assert len(found[times]) == 2
        assert min(found[times]) > 0
    assert "torchvision" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "detection", "coco/clip_vit_base"])
    assert ended.value.code == 2
    assert "expects task detection, with detection.head=mask_rcnn" in capsys.readouterr().err

    task = api.build_task(api.load_recipe(recipe), open_source(source))
    assert isinstance(task, DetectionTask)
    ours = sum(parameter.numel() for parameter in task.module.parameters())
    theirs = sum(parameter.numel() for parameter in TorchvisionMaskRCNN(task).parameters())
    channels = task.config.channels
    # Deltas and masks of the background.
    assert theirs - ours == 4 * (4 * channels + 1) + channels + 1
