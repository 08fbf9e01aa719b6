"""A tiny detector learns generated objects by heart; its run is measured, goes on, is shown, reported and exported."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from fd_scale import api, cli
from fd_scale.config import build_recipe
from fd_scale.data import object_source, open_source
from fd_scale.diagnose.run import Options, diagnose
from fd_scale.errors import UserError
from fd_scale.metrics import read_metrics

pytestmark = pytest.mark.slow


def test_it_learns_objects_by_heart_and_shows_them(
    recipe_values: Callable[..., dict[str, Any]], write_objects: Callable[..., str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    source = write_objects(tmp_path / "objects", count=4)
    run, images = tmp_path / "run", tmp_path / "objects/images"
    values = recipe_values(
        "detection", run_dir=str(run), data__train=source, data__evaluation=source, train__global_batch=4,
        train__micro_batch=4, train__steps=80, optim__lr=4e-3, optim__grad_clip=1.0, checkpoint__save_every_steps=80,
        log__every_steps=10, log__images_every_steps=80, model__img_size=64,
        detection={"channels": 32, "rois_per_image": 32, "scale_range": [1.0, 1.0]},
    )  # fmt: skip
    values["model"]["overrides"] |= {
        "depths": [1, 1, 1],
        "num_heads": [1, 2, 4],
        "drop_path_rate": 0.0,
        "post_norm_gain_init": 1.0,
    }
    api.train(build_recipe(values))
    losses = [line["loss"] for line in read_metrics(run, "train")]
    [logged] = read_metrics(run, "evaluation")
    assert losses[-1] < 0.6 * losses[0]
    assert logged["box_ap"] > 0.5
    assert logged["mask_ap"] > 0.5

    found = api.evaluate(run)
    assert {name: found[name] for name in ("box_ap", "mask_ap")} == {
        name: logged[name] for name in ("box_ap", "mask_ap")
    }
    assert [entry["name"] for entry in found["classes"]] == ["square", "disc"]
    written = sorted(path.name for path in (run / "evaluations").iterdir())
    assert written == ["step_00000080.detections.json", "step_00000080.json"]
    results = json.loads((run / "evaluations/step_00000080.detections.json").read_text())
    assert {result["image_id"] for result in results} <= {5, 15, 25, 35}
    assert {result["category_id"] for result in results} == {3, 7}, "numbers of the data set"
    more = api.evaluate(
        run, ["detection.scales=[0.75,1.0]", "detection.flip_too=true", "detection.soft_nms=linear"]
    )
    assert more["box_ap"] > 0.4
    assert len(list((run / "evaluations").iterdir())) == 4, "a file for each way"
    assert len(diagnose([str(run)], tmp_path / "looked", Options(num_images=2, batch_size=2))["models"]) == 1
    with pytest.raises(UserError, match="its model is what it was trained as"):
        api.evaluate(run, ["detection.head=htc"])

    # As test-dev is: images alone, for a server that measures.
    known = json.loads((tmp_path / "objects/instances.json").read_text())
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "images").symlink_to(images)
    (bare / "instances.json").write_text(json.dumps(known | {"annotations": []}))
    without = api.evaluate(run, [f"data.evaluation=instances:{bare}"])
    assert without["images"] == 4
    assert "box_ap" not in without
    [written_too] = (run / "evaluations").glob("*bare*.detections.json")
    assert json.loads(written_too.read_text()) == results

    cli.main(["predict", str(run), str(images), "--out", str(tmp_path / "out")])
    for name in ("0.png", "3.png"):
        before, after = (
            np.asarray(Image.open(folder / name)).astype(int) for folder in (images, tmp_path / "out")
        )
        assert before.shape == after.shape
        changed = (before != after).any(-1).mean()
        assert (changed > 0.05) == (name == "0.png"), "the last image has no object"
    same_as_evaluated(tmp_path / "out/detections.json", known, results, images)
    with pytest.raises(UserError, match="--masks: a class for each pixel is what a segmentation predicts"):
        api.predict(run, images, tmp_path / "masks", masks=True)
    cli.main(["report", str(run)])
    page = (run / "report.html").read_text()
    assert "box_ap" in page
    assert "truth_prediction" in page
    monkeypatch.chdir(tmp_path)
    cli.main(["export", str(run), "exported"])
    assert (tmp_path / "exported/model.safetensors").exists()
    assert "evaluation mask_ap" in (tmp_path / "exported/README.md").read_text()


def same_as_evaluated(file: Path, known: dict[str, Any], results: list[dict[str, Any]], images: Path) -> None:
    """What `predict` writes is a data set in COCO's format, of what `evaluate` finds in the same images."""
    predicted = COCO(str(file))
    ids = {image["file_name"]: image["id"] for image in known["images"]}
    numbers = {category["name"]: category["id"] for category in known["categories"]}
    assert [image["file_name"] for image in predicted.imgs.values()] == sorted(ids)
    assert results == [
        {
            "image_id": ids[predicted.imgs[each["image_id"]]["file_name"]],
            "category_id": numbers[predicted.cats[each["category_id"]]["name"]],
            **{key: each[key] for key in ("bbox", "score", "segmentation")},
        }
        for each in predicted.anns.values()
    ]
    assert all(predicted.annToMask(each).sum() == each["area"] for each in predicted.anns.values())
    own = file.parent / "own"
    own.mkdir()
    (own / "images").symlink_to(images)
    (own / "instances.json").symlink_to(file)
    assert object_source(open_source(f"instances:{own}")).class_names == ["square", "disc"]
