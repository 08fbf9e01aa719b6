"""Crops of images and objects: together, as torchvision cuts them, a function of the generator alone."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as tv

from fd_scale.data import (
    Instances,
    Objects,
    TrainLoader,
    measuring_transform,
    object_source,
    open_source,
    training_transform,
)
from fd_scale.data.instance_transforms import CopyPaste, InstanceCrop, cut, pasted, whole_with_objects
from fd_scale.data.instances import packed, unpacked
from fd_scale.data.mask_transforms import padded
from fd_scale.data.objects import Window
from fd_scale.data.picture import Picture
from fd_scale.errors import UserError

WriteObjects = Callable[..., str]
PLAIN: dict[str, Any] = {
    "side": 64, "scale_range": (0.5, 2.0), "flip": 0.5, "distort": False, "fill": (10, 20, 30),
}  # fmt: skip
COLOURS = torch.tensor([[50, 70, 210], [220, 60, 40]])
"""Of squares and discs; the ground is (60, 120, 60), and all are up to 20 off."""


def some_objects(height: int, width: int, boxes: list[list[float]], **changes: Any) -> Objects:
    """Objects whose outline is the rectangle of their box."""
    boxes_N4 = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    corners = [(left, top, left + across, top + down) for left, top, across, down in boxes_N4]
    outlines = [[np.array([a, b, c, b, c, d, a, d])] for a, b, c, d in corners]
    count = len(boxes)
    values = {
        "image_id": 1, "height": height, "width": width, "ids_N": np.arange(count), "boxes_N4": boxes_N4,
        "labels_N": np.arange(count), "areas_N": np.ones(count), "crowd_N": np.zeros(count, dtype=bool),
        "outlines": outlines,
    }  # fmt: skip
    return Objects(**(values | changes))


def masks_of(instances: Instances, width: int) -> Tensor:
    return unpacked(instances.masks_NHw, width).bool()


def test_boxes_and_masks_lie_on_their_objects(tmp_path: Path, write_objects: WriteObjects) -> None:
    source = open_source(write_objects(tmp_path / "own"))
    crop = InstanceCrop(**PLAIN)
    seen = 0
    for seed in range(40):
        torch.manual_seed(seed)
        pixels, instances = crop(*source.read(seed % 8))  # type: ignore[arg-type]
        assert (pixels.shape, pixels.dtype) == ((3, 64, 64), torch.uint8)
        assert [values.dtype for values in instances] == [
            torch.float32, torch.int64, torch.bool, torch.uint8, torch.uint8
        ]  # fmt: skip
        assert instances.masks_NHw.shape == (len(instances.labels_N), 64, 8) or not len(instances.labels_N)
        masks = masks_of(instances, 64)
        for index, (label, box) in enumerate(zip(instances.labels_N, instances.boxes_N4, strict=True)):
            mask = masks[index]
            left, top, right, bottom = box.tolist()
            assert 0 <= left < right <= 64
            assert 0 <= top < bottom <= 64
            rows, columns = torch.nonzero(mask.any(1))[:, 0], torch.nonzero(mask.any(0))[:, 0]
            found = [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]
            assert np.abs(np.array(found) - box.numpy()).max() <= 1.5, (
                "pixels, of an outline and a box that are not"
            )
            uncovered = mask & ~masks[index + 1 :].any(0)
            inner = ~torch.nn.functional.max_pool2d(1 - uncovered[None].float(), 7, 1, 3)[0].bool()
            # Three pixels from edges, which a resize blurs, there is its colour; others are 150 away.
            assert not inner.any() or (pixels[:, inner] - COLOURS[label][:, None]).abs().max() <= 40
            seen += int(inner.any())
    assert seen > 30


@pytest.mark.parametrize("mirrored", [False, True])
def test_boxes_are_cut_as_torchvisions(mirrored: bool) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        boxes = np.concatenate([rng.uniform(-10, 80, (9, 2)), rng.uniform(0, 60, (9, 2))], axis=1).tolist()
        objects = replace(some_objects(90, 70, boxes), outlines=[None] * 9)
        factor = rng.uniform(0.3, 2)
        width, height = round(70 * factor), round(90 * factor)
        window = Window(
            int(rng.integers(width // 2)),
            int(rng.integers(height // 2)),
            width // 3,
            height // 3,
            width,
            height,
        )
        found = cut(objects, window, mirrored, side=200)
        theirs = tv_tensors.BoundingBoxes(boxes, format="XYWH", canvas_size=(90, 70), dtype=torch.float64)  # type: ignore[call-overload]
        theirs = tv.resize(tv.convert_bounding_box_format(theirs, new_format="XYXY"), [height, width])
        theirs = tv.crop(theirs, window.top, window.left, window.height, window.width)
        if mirrored:
            theirs = tv.horizontal_flip(theirs)
        theirs = tv.clamp_bounding_boxes(theirs)
        large = ((theirs[:, 2:] - theirs[:, :2]) >= 1).all(dim=1)
        assert found.labels_N.tolist() == torch.nonzero(large)[:, 0].tolist()
        # fp32 of numbers below 200
        torch.testing.assert_close(
            found.boxes_N4.double(), theirs[large].as_subclass(Tensor), rtol=0, atol=2e-5
        )
        assert found.masks_NHw.shape == (int(large.sum()), 0, 0)


@pytest.mark.parametrize("mirrored", [False, True])
def test_pixels_and_masks_are_those_of_the_whole_resized_image(mirrored: bool) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (50, 40, 3), dtype=np.uint8))
    objects = some_objects(50, 40, [[5, 5, 20, 30], [0, 40, 12, 8], [30, 2, 9, 9]])
    objects = replace(objects, semantic=Image.fromarray(rng.integers(0, 256, (50, 40), dtype=np.uint8)))
    different = []
    for seed in range(30):
        torch.manual_seed(seed)
        crop = InstanceCrop(**(PLAIN | {"side": 32, "flip": float(mirrored)}))
        pixels, instances = crop(Picture.of(image), objects)
        torch.manual_seed(seed)  # the same window
        factor = 32 * (0.5 + 1.5 * float(torch.rand(()))) / 50
        width, height = round(40 * factor), round(50 * factor)
        left, top = (int(torch.randint(max(side - 32, 0) + 1, ())) for side in (width, height))
        box = (left, top, min(left + 32, width), min(top + 32, height))

        def expected(resized: Image.Image, fill: Any, box: tuple[int, int, int, int] = box) -> Tensor:
            part = resized.crop(box)
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else part
            return tv.pil_to_tensor(padded(part, 32, fill))

        theirs = expected(image.resize((width, height), Image.Resampling.BILINEAR), (10, 20, 30))
        different.append(int((theirs.int() - pixels.int()).abs().max()))
        whole = cut(objects, Window(0, 0, width, height, width, height), False, side=128)
        semantic = Image.fromarray(whole.semantic_HW.numpy()[:height, :width])
        assert torch.equal(expected(semantic, 255)[0], instances.semantic_HW)
        for label, mask in zip(instances.labels_N, masks_of(instances, 32), strict=True):
            [row] = torch.nonzero(whole.labels_N == label)[:, 0]
            complete = Image.fromarray(masks_of(whole, 128)[row].numpy()[:height, :width].astype(np.uint8))
            assert torch.equal(expected(complete, 0)[0], mask.to(torch.uint8))
    # Pillow computes weights in fp32 from where the window begins, and rounds after each of its two passes.
    assert max(different) <= 2


def test_what_is_cut_has_a_box_around_its_rest() -> None:
    """A diamond whose lower corner alone is seen, and a part of which the box is seen and no pixel."""
    diamond = np.array([10, 0, 20, 10, 10, 20, 0, 10], dtype=np.float64)
    objects = some_objects(20, 20, [[0, 0, 20, 20]], outlines=[[diamond]])
    instances = cut(objects, Window(0, 15, 20, 5, 20, 20), False, side=20)
    left, top, right, bottom = instances.boxes_N4[0].tolist()
    assert (left, top, right, bottom) == pytest.approx((5, 0, 15, 5), abs=1)
    assert cut(objects, Window(0, 17, 3, 3, 20, 20), False, side=20).boxes_N4.shape == (0, 4)
    whole = cut(objects, Window(0, 0, 20, 20, 20, 20), False, side=20)
    assert whole.boxes_N4.tolist() == [[0, 0, 20, 20]], "as annotated where nothing is cut"
    alone = cut(replace(objects, outlines=[None]), Window(0, 15, 20, 5, 20, 20), False, side=20)
    assert alone.boxes_N4.tolist() == [[0, 0, 20, 5]]
    assert not alone.has_masks


def test_crowds_and_objects_without_outline() -> None:
    objects = some_objects(20, 20, [[2, 2, 9, 9]] * 4, crowd_N=np.array([False, True, True, False]))
    objects = replace(objects, outlines=[objects.outlines[0], objects.outlines[1], None, None])
    found = cut(objects, Window(0, 0, 20, 20, 20, 20), False, side=24)
    assert found.labels_N.tolist() == [0, 1, 2], (
        "of an image with outlines, an object without one is not learned"
    )
    assert found.crowd_N.tolist() == [False, True, True]
    assert masks_of(found, 24).sum((1, 2)).tolist() == [81, 81, 0]


def test_sizes_lie_between_their_limits() -> None:
    image = Picture.of(Image.new("RGB", (40, 20), (200, 0, 0)))
    objects = some_objects(20, 40, [[0, 0, 40, 20]])
    shares = []
    for seed in range(200):
        torch.manual_seed(seed)
        pixels, instances = InstanceCrop(**PLAIN)(image, objects)
        filled = (pixels == torch.tensor(PLAIN["fill"])[:, None, None]).all(0)
        assert torch.equal(~filled, masks_of(instances, 64)[0])
        shares.append(float((~filled).double().mean()))
    # Longer side 32 to 128, the shorter one half of it.
    assert min(shares) == pytest.approx(32 * 16 / 64**2, abs=0.02)
    assert max(shares) == pytest.approx(1, abs=0.03)


def test_photometric_distortion_is_the_images_alone() -> None:
    image = Picture.of(Image.new("RGB", (40, 40), (120, 60, 30)))
    objects = some_objects(40, 40, [[5, 5, 20, 20]])
    changed = 0
    for seed in range(20):
        found = []
        for distort in (False, True):
            torch.manual_seed(seed)
            found.append(InstanceCrop(**(PLAIN | {"distort": distort}))(image, objects))
        changed += not torch.equal(found[0][0], found[1][0])
        assert all(torch.equal(one, other) for one, other in zip(found[0][1], found[1][1], strict=True))
    assert changed > 10


def layer(*boxes: tuple[int, int, int, int], label: int) -> Instances:
    masks = torch.zeros(len(boxes), 20, 20, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = True
    return Instances(
        boxes_N4=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels_N=torch.full((len(boxes),), label),
        crowd_N=torch.zeros(len(boxes), dtype=torch.bool),
        masks_NHw=packed(masks),
        semantic_HW=torch.full((20, 20), label, dtype=torch.uint8),
    )


def test_pasted_objects_cover_what_is_below() -> None:
    below = layer((0, 0, 10, 10), (6, 6, 9, 9), (14, 14, 18, 18), label=1)
    above = layer((5, 5, 12, 12), label=2)
    black, white = torch.zeros(3, 20, 20, dtype=torch.uint8), torch.full((3, 20, 20), 255, dtype=torch.uint8)
    pixels, found = pasted(black, below, white, above)
    assert found.labels_N.tolist() == [1, 1, 2], "one is wholly covered"
    assert found.boxes_N4.tolist() == [[0, 0, 10, 10], [14, 14, 18, 18], [5, 5, 12, 12]]
    masks = masks_of(found, 20)
    assert masks.sum((1, 2)).tolist() == [75, 16, 49]
    assert int(masks.sum(0).max()) == 1, "no pixel has two objects"
    assert torch.equal(pixels[0] == 255, masks[2])
    assert torch.equal(found.semantic_HW == 2, masks[2])
    _, cut_away = pasted(black, layer((0, 5, 10, 12), label=1), white, above)
    assert cut_away.boxes_N4.tolist() == [[0, 5, 5, 12], [5, 5, 12, 12]], "a box around what is left"
    _, onto_nothing = pasted(black, layer(label=1), white, above)
    assert onto_nothing.labels_N.tolist() == [2]
    for other in (
        layer(label=2),
        above._replace(crowd_N=torch.tensor([True])),
        above._replace(masks_NHw=torch.zeros(1, 0, 0, dtype=torch.uint8)),
    ):
        pixels, same = pasted(black, below, white, other)
        assert same is below
        assert not pixels.any()
    boxes_alone = below._replace(masks_NHw=torch.zeros(3, 0, 0, dtype=torch.uint8))
    assert pasted(black, boxes_alone, white, above)[1] is boxes_alone


def test_any_number_of_objects_is_pasted() -> None:
    many = layer(*((4 * i, 0, 4 * i + 3, 3) for i in range(5)), label=2)
    pixels = torch.zeros(3, 20, 20, dtype=torch.uint8)
    counts, chosen = set(), set()
    for seed in range(60):
        torch.manual_seed(seed)
        found = pasted(pixels, layer(label=1), pixels, many)[1]
        counts.add(len(found.labels_N))
        chosen |= {int(left) for left in found.boxes_N4[:, 0]}
    assert (counts, chosen) == ({1, 2, 3, 4, 5}, {0, 4, 8, 12, 16})


def test_copy_paste_is_a_function_of_the_sample(
    tmp_path: Path, write_objects: WriteObjects, make_recipe: Callable[..., Any]
) -> None:
    """The same pixels in a worker, which has a pickled copy, on any rank, and after a resume."""
    spec = write_objects(tmp_path / "own")
    source = open_source(spec)
    recipe = make_recipe("detection", data__train=spec, model__mean=[0.5] * 3, model__std=[0.25] * 3,
                         detection__copy_paste=0.5, detection__photometric=True)  # fmt: skip

    def batches(rank: int, ranks: int, copy: bool, first: int = 0) -> list[Any]:
        transform = training_transform(recipe, source)
        assert isinstance(transform, CopyPaste)
        transform = pickle.loads(pickle.dumps(transform)) if copy else transform
        loader = TrainLoader(source, transform, seed=3, global_batch=4, micro_batch=4 // ranks, rank=rank,
                             world_size=ranks, num_workers=0)  # fmt: skip
        steps = loader.iterate(first)
        found = [next(steps)[0] for _ in range(4 - first)]
        steps.close()
        return found

    whole = batches(0, 1, False)
    assert all(len(batch.instances) == 4 for batch in whole)
    for other in (batches(0, 1, True), [None, None, *batches(0, 1, False, first=2)]):
        for mine, theirs in zip(whole, other, strict=True):
            if theirs is not None:
                assert torch.equal(mine.images, theirs.images)
                for one, two in zip(mine.instances, theirs.instances, strict=True):
                    assert all(torch.equal(left, right) for left, right in zip(one, two, strict=True))
    second = batches(1, 2, False)
    assert torch.equal(whole[1].images[2:], second[1].images)
    storages = {values.untyped_storage().data_ptr() for each in whole[0].instances for values in each}
    assert len(storages) == 5, "a worker sends an open file for each, and not for each image"
    moved = whole[0].to("meta")
    assert moved.instances[0].boxes_N4.device.type == "meta"


def test_copy_paste_needs_masks_and_passes_over_bad_images(
    tmp_path: Path, write_objects: WriteObjects, make_recipe: Callable[..., Any]
) -> None:
    spec = write_objects(tmp_path / "own")
    source = object_source(open_source(spec))
    recipe = make_recipe("detection", data__train=spec, model__mean=[0.5] * 3, model__std=[0.25] * 3)
    crop = training_transform(recipe, source)
    assert isinstance(crop, InstanceCrop)
    assert measuring_transform(recipe) is whole_with_objects
    image, objects = source.read(1)
    for file in (tmp_path / "own/images").iterdir():
        file.unlink()
    torch.manual_seed(0)
    plain = crop(image, objects)
    torch.manual_seed(0)
    alone = CopyPaste(crop=crop, source=source, probability=1.0)(image, objects)  # type: ignore[arg-type]
    assert torch.equal(plain[0], alone[0])
    source.has_outlines = False  # type: ignore[misc]
    pasting = replace(recipe, detection=replace(recipe.detection, copy_paste=0.5))
    with pytest.raises(
        UserError, match=r"detection.copy_paste: got 0.5, and the objects of .* have boxes alone"
    ):
        training_transform(pasting, source)


def test_an_evaluation_sees_all_of_an_image() -> None:
    image = Picture.of(Image.new("RGB", (40, 20)))
    objects = some_objects(20, 40, [[-5, 2, 10, 10], [30, 10, 10.01, 10], [50, 0, 5, 5], [3, 3, 0, 5]])
    pixels, found = whole_with_objects(image, objects)
    assert pixels.shape == (3, 20, 40)
    torch.testing.assert_close(found.boxes_N4, torch.tensor([[0.0, 2, 5, 12], [30, 10, 40, 20]]))
    assert found.masks_NHw.shape == (2, 0, 0)
