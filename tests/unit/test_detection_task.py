"""What a detection tells the trainer: over how much its losses go, what is drawn for it, what it shows."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fd_scale import api
from fd_scale.config import Recipe
from fd_scale.data import Batch, TrainLoader, open_source, training_transform
from fd_scale.data.instances import Instances
from fd_scale.finetune import DetectionTask
from fd_scale.finetune.detection.pictures import with_truth
from fd_scale.models import resolved


@pytest.fixture
def built(
    make_recipe: Callable[..., Recipe], write_objects: Callable[..., str], tmp_path: Path
) -> tuple[DetectionTask, Batch]:
    """Eight images, of which the last has no object."""
    source = write_objects(tmp_path / "objects")
    section = {"channels": 16, "rois_per_image": 16, "head": "htc", "scale_range": [1.0, 1.0]}
    recipe = make_recipe("detection", data__train=source, model__img_size=64, detection=section)
    opened = open_source(source)
    task = api.build_task(recipe, opened)
    assert isinstance(task, DetectionTask)
    loader = TrainLoader(
        opened, training_transform(resolved(recipe), opened), seed=0, global_batch=8, micro_batch=8, rank=0,
        world_size=1, num_workers=0,
    )  # fmt: skip
    batches = loader.iterate(0)
    [batch] = next(batches)
    batches.close()
    return task, batch


def test_losses_are_counted_over_images_with_something_to_learn(built: tuple[DetectionTask, Batch]) -> None:
    task, batch = built
    counts = task.counts(batch)
    assert set(counts) == {
        "rpn_class", "rpn_box", *(f"{kind}_{stage}" for kind in ("class", "box", "mask") for stage in (1, 2, 3)),
    }  # fmt: skip
    assert {value for key, value in counts.items() if not key.startswith("mask")} == {8}
    assert counts["mask_1"] == counts["mask_3"] == 7
    outputs = task.module(**task.inputs(batch))
    assert set(counts) == {key for key, value in outputs.items() if value.requires_grad}
    crowds = [each._replace(crowd_N=torch.ones_like(each.crowd_N)) for each in batch.instances]
    bare = [each._replace(masks_NHw=each.masks_NHw[:, :0, :0]) for each in batch.instances]
    for nothing in (crowds, bare):
        assert task.counts(batch._replace(labels=nothing))["mask_1"] == 0
        assert float(task.module(**task.inputs(batch._replace(labels=nothing)))["mask_1"].detach()) == 0


def test_places_with_a_class_are_counted_as_the_loss_counts_them(built: tuple[DetectionTask, Batch]) -> None:
    task, batch = built
    task.config = replace(task.config, semantic_classes=3)
    rows, columns = task.module.semantic_size(64, 64)
    places = torch.full((64, 64), 255, dtype=torch.uint8)
    places[:32] = 1
    maps = [each._replace(semantic_HW=places) for each in batch.instances[:2]]
    counts = task.counts(batch._replace(labels=[*maps, *batch.instances[2:]]))
    assert counts["semantic"] == 2 * (rows // 2) * columns


def test_what_is_sampled_follows_the_stream(built: tuple[DetectionTask, Batch]) -> None:
    task, batch = built
    keys = task.inputs(batch)["keys_B"]
    later = task.inputs(batch._replace(positions=batch.positions + 1))["keys_B"]
    assert torch.equal(keys[1:], later[:-1]), "a position has its key, in whatever batch it is"
    assert len(set(keys.tolist())) == 8


def test_pictures_show_truth_and_detections(built: tuple[DetectionTask, Batch]) -> None:
    task, batch = built
    with torch.no_grad():
        outputs = task.module(**task.inputs(batch))
    pictures = task.pictures(batch, outputs)["truth_prediction"]
    assert pictures.shape == (4, 64, 128, 3)
    sure = outputs | {"scores": torch.ones_like(outputs["scores"])}
    assert (task.pictures(batch, sure)["truth_prediction"] != pictures).any()


def test_masks_are_painted_where_they_are() -> None:
    image = torch.zeros(3, 40, 48, dtype=torch.uint8)
    mask = torch.zeros(1, 40, 6, dtype=torch.uint8)
    mask[0, 20:30, 2] = 0b11110000  # columns 16 to 19
    objects = Instances(
        torch.tensor([[16.0, 20, 20, 30]]), torch.tensor([364]), torch.tensor([True]), mask,
        torch.zeros(0, 0, dtype=torch.uint8),
    )  # fmt: skip
    painted = with_truth(image, objects, None)
    assert painted[25, 18].any()
    assert not painted[25, 30].any()
    assert not painted[36].any()
