"""Objects in COCO's format: what is read equals pycocotools, and what is broken is one sentence."""

import json
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from fd_scale.benchmarks.annotations import bench_annotations, write_annotations
from fd_scale.config import SourceConfig
from fd_scale.data import Objects, object_source, open_source, require_targets, subset
from fd_scale.data.coco_index import CocoIndex, convert, index_of, pixels_of_runs
from fd_scale.data.decode import DecodeError
from fd_scale.data.json_lists import JsonLists
from fd_scale.data.objects import Window, box_around, mask_in, runs_of
from fd_scale.errors import UserError

WriteObjects = Callable[..., str]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def changed(folder: Path, change: Callable[[dict[str, Any]], object]) -> str:
    """Lets a function change the annotations of `write_objects`."""
    file = folder / "instances.json"
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))
    return f"instances:{folder}"


def whole(objects: Objects) -> Window:
    return Window(0, 0, objects.width, objects.height, objects.width, objects.height)


def same_as_pycocotools(file: Path, index: CocoIndex) -> int:
    """Compares every annotation, and its mask at the image's own size; returns how many there are."""
    theirs = COCO(file)
    assert [int(number) for number in index.columns["image_ids"]] == sorted(theirs.imgs)
    for sample_id in range(len(index)):
        objects = index.objects(sample_id)
        expected = theirs.imgToAnns[objects.image_id]
        assert objects.ids_N.tolist() == [each["id"] for each in expected]
        assert objects.boxes_N4.tolist() == [each["bbox"] for each in expected]
        assert objects.areas_N.tolist() == [each["area"] for each in expected]
        assert objects.crowd_N.tolist() == [bool(each["iscrowd"]) for each in expected]
        numbers = index.header["category_ids"]
        assert [numbers[label] for label in objects.labels_N] == [each["category_id"] for each in expected]
        for outline, each in zip(objects.outlines, expected, strict=True):
            mask_HW = theirs.annToMask(each)
            np.testing.assert_array_equal(mask_in(outline, objects, whole(objects)), mask_HW)
            runs = {"size": [objects.height, objects.width], "counts": runs_of(outline, objects)}
            np.testing.assert_array_equal(coco_mask.decode(runs), mask_HW)
    return len(theirs.anns)


def test_the_index_equals_pycocotools(tmp_path: Path) -> None:
    """Polygons with two decimals and crowds, annotations in no order of their images."""
    file = tmp_path / "generated.json"
    write_annotations(file, num_images=12, num_objects=180)
    convert(file, tmp_path / "index")
    index = CocoIndex(tmp_path / "index")
    assert same_as_pycocotools(file, index) == 180
    assert len(index) == 12
    assert index.columns["crowd"].sum() == 2


def test_a_folder_of_ones_own(tmp_path: Path, write_objects: WriteObjects) -> None:
    source = open_source(write_objects(tmp_path / "own"))
    assert (len(source), source.targets, source.num_classes) == (8, "instances", 2)
    assert source.class_names == ["square", "disc"], "by their ids, 3 and 7"
    assert object_source(source).category_ids == [3, 7]
    assert object_source(source).has_outlines
    assert (source.all_labels() == -1).all()
    image, objects = source.read(1)
    assert isinstance(objects, Objects)
    assert (image.size, objects.image_id) == ((objects.width, objects.height), 15)
    assert (
        same_as_pycocotools(tmp_path / "own/instances.json", index_of(tmp_path / "own/instances.json")) == 17
    )
    assert len(object_source(source).objects(7).ids_N) == 0
    assert (source.name(1), source.key(1)) == (str(tmp_path / "own/images/1.png"), "1.png")
    part = object_source(subset(source, [3, 1]))
    assert part.objects(1).image_id == 15
    assert (
        coco_mask.area({"size": [40, 50], "counts": runs_of(None, replace(objects, height=40, width=50))})
        == 0
    )
    assert (part.category_ids, part.has_outlines, part.is_annotated) == ([3, 7], True, True)
    assert not object_source(subset(source, [7])).is_annotated


def test_parts_of_coco_and_objects365(tmp_path: Path, write_objects: WriteObjects) -> None:
    write_objects(tmp_path / "own")
    values = json.loads((tmp_path / "own/instances.json").read_text())
    root = tmp_path / "coco"
    (root / "annotations/stuff_val2017_pixelmaps").mkdir(parents=True)
    for part in ("train", "val"):
        (root / f"{part}2017").symlink_to(tmp_path / "own/images")
        (root / f"annotations/instances_{part}2017.json").write_text(json.dumps(values))
    width, height = Image.open(tmp_path / "own/images/2.png").size
    stuff = np.full((height, width), 183, dtype=np.uint8)  # "other": what is no stuff
    stuff[:5], stuff[5:9] = 0, 92
    Image.fromarray(stuff).save(root / "annotations/stuff_val2017_pixelmaps/2.png")
    assert open_source(f"coco_train:{root}").read(2)[1].semantic is None  # type: ignore[union-attr]
    source = open_source(f"coco_val:{root}")
    assert object_source(source).num_semantic_classes == 183
    both = open_source([SourceConfig(source=f"coco_{part}:{root}") for part in ("train", "val")])
    assert object_source(both).num_semantic_classes == 0, "the training part has no maps"
    semantic = np.asarray(source.read(2)[1].semantic)  # type: ignore[union-attr]
    assert [semantic[row, 0] for row in (0, 5, 9)] == [255, 91, 182]
    with pytest.raises(DecodeError, match=r"pixel map .*pixelmaps/3.png cannot be read"):
        source.read(3)
    (root / "stuffthingmaps/val2017").mkdir(parents=True)
    # In these, which count from 0, things are classes of their own.
    Image.fromarray(stuff - np.uint8(1)).save(root / "stuffthingmaps/val2017/2.png")
    with_things = open_source(f"coco_val:{root}")
    assert np.array_equal(np.asarray(with_things.read(2)[1].semantic), semantic)  # type: ignore[union-attr]
    assert with_things.fingerprint != source.fingerprint
    things, alone = "stuffthingmaps/val2017", "annotations/stuff_val2017_pixelmaps"
    for maps, folder, first, none in ((with_things, things, 0, 255), (source, alone, 1, 0)):
        wrong = stuff - np.uint8(1 - first)
        wrong[0], wrong[1] = 200, 190
        Image.fromarray(wrong).save(root / folder / "2.png")
        expected = f"2.png has the value 190, expected {first} to {first + 182}, or {none} for no class"
        with pytest.raises(DecodeError, match=expected):
            maps.read(2)
    Image.fromarray(stuff[1:]).save(root / "annotations/stuff_val2017_pixelmaps/2.png")
    with pytest.raises(
        DecodeError, match=rf"2.png is {width} x {height - 1} px, and the image {width} x {height}"
    ):
        source.read(2)
    del values["annotations"]
    (root / "test2017").symlink_to(tmp_path / "own/images")
    (root / "annotations/image_info_test-dev2017.json").write_text(json.dumps(values))
    test = open_source(f"coco_test_dev:{root}")
    assert (len(test), test.num_classes, object_source(test).is_annotated) == (8, 2, False)
    with pytest.raises(
        UserError, match=r"data.train: .* has no annotations, of 8 images; expected at least one"
    ):
        require_targets("data.train", "coco_test_dev:x", test, "instances")
    require_targets("data.evaluation", "coco_test_dev:x", test, "instances", annotated=False)


def test_objects365_as_distributed_and_as_named(tmp_path: Path, write_objects: WriteObjects) -> None:
    write_objects(tmp_path / "own")
    values = json.loads((tmp_path / "own/instances.json").read_text())
    for image in values["images"]:
        image["file_name"] = f"images/v1/patch8/{image['file_name']}"
    for each in values["annotations"]:
        del each["segmentation"]
    for root, folder in (("a", "images/v1"), ("b", "train")):
        (tmp_path / root / folder).mkdir(parents=True)
        (tmp_path / root / folder / "patch8").symlink_to(tmp_path / "own/images")
        (tmp_path / root / "annotations").mkdir()
        (tmp_path / root / "annotations/zhiyuan_objv2_train.json").write_text(json.dumps(values))
        source = open_source(f"objects365_train:{tmp_path / root}")
        assert source.name(3) == str(tmp_path / root / folder / "patch8/3.png")
        assert source.read(3)[0].size
        assert not object_source(source).has_outlines
        assert object_source(source).objects(3).outlines == [None] * 3


def test_one_index_for_all(tmp_path: Path, write_objects: WriteObjects) -> None:
    spec = write_objects(tmp_path / "own")
    source = object_source(open_source(spec))
    [index] = (tmp_path / "cache/fd-scale").glob("*.index")
    before = index.stat().st_mtime_ns
    copied = pickle.dumps(source)
    assert len(copied) < 3000, "no arrays"
    copy = pickle.loads(copied)
    assert copy.objects(2).boxes_N4.tolist() == source.objects(2).boxes_N4.tolist()
    assert copy.fingerprint == source.fingerprint
    assert open_source(spec).fingerprint == source.fingerprint
    assert index.stat().st_mtime_ns == before, "made once"
    changed(tmp_path / "own", lambda values: values["annotations"].pop())
    assert open_source(spec).fingerprint != source.fingerprint
    assert len(list((tmp_path / "cache/fd-scale").glob("*.index"))) == 2
    assert not list((tmp_path / "cache/fd-scale").glob("*.tmp"))
    index.write_bytes(index.read_bytes()[:-100])
    with pytest.raises(
        UserError, match=r"own|instances-.*\.index: this index of annotations is not whole; remove it"
    ):
        CocoIndex(index)


def test_many_at_once(tmp_path: Path, write_objects: WriteObjects) -> None:
    write_objects(tmp_path / "own")
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda: found.append(len(index_of(tmp_path / "own/instances.json"))))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [8] * 8
    assert len(list((tmp_path / "cache/fd-scale").glob("*"))) == 2, "the index and its lock"


def test_a_cache_that_cannot_be_written(
    tmp_path: Path, write_objects: WriteObjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = write_objects(tmp_path / "own")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own/instances.json"))
    with pytest.raises(UserError, match=r"cannot be written .* set XDG_CACHE_HOME"):
        open_source(spec)


def first(values: dict[str, Any]) -> dict[str, Any]:
    return values["annotations"][0]


BROKEN: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (
        lambda v: first(v).update(category_id=4),
        "annotations, 1: its category_id is 4, and there is no such category",
    ),
    (lambda v: first(v).update(image_id=6), "annotations, 1: its image_id is 6, and there is no such image"),
    (lambda v: v["annotations"][3].update(id=1), "annotations, 1: this id is there twice"),
    (lambda v: v["images"][1].update(id=5), "images, 5: this id is there twice"),
    (
        lambda v: v["categories"][1].update(id=7),
        "categories, 7: two categories have its number or its name, 'square'",
    ),
    (lambda v: v["categories"][1].update(name="disc"), "categories, 3: two categories have"),
    (lambda v: first(v).pop("bbox"), "annotations, 1: 'bbox' is missing; expected COCO's format"),
    (
        lambda v: first(v).update(image_id="5"),
        "annotations, 1: its image_id is '5', not a whole number; expected COCO's format",
    ),
    (lambda v: first(v).update(bbox=[1, 2, 3]), "annotations, 1: not enough values"),
    (lambda v: first(v).update(bbox=[1, 2, float("nan"), 3]), "annotations, 1: its bbox is"),
    (
        lambda v: first(v).update(segmentation=[[1, 2, 3, 4, 5, 6, 7]]),
        "annotations, 1: a polygon of 7 numbers",
    ),
    (lambda v: first(v).update(segmentation=[["a"] * 6]), "annotations, 1: must be real number"),
    (
        lambda v: first(v).update(segmentation=[[0, 0, 9, 0, 9, -1e9]]),
        "annotations, 1: a polygon of 6 numbers; expected pairs of x and y, at most 1000000 px away",
    ),
    (lambda v: first(v).update(area=float("nan")), "annotations, 1: its area is nan"),
    (
        lambda v: v["annotations"][1]["segmentation"].update(counts=[1.5, 10**4 - 1.5]),
        "annotations, 2: its runs fill -1 pixels",
    ),
    (lambda v: v["categories"][0].update(name=None), "categories, 7: its id is 7 and its name None"),
    (lambda v: v["images"][0].update(file_name="."), "images, 5: its file_name is '.'"),
    (lambda v: v["images"][0].update(file_name="a\0b"), "images, 5: its file_name is 'a"),
    (
        lambda v: v["annotations"][1]["segmentation"]["counts"].append(3),
        r"annotations, 2: its runs fill \d+ pixels, and its size is",
    ),
    (
        lambda v: first(v).update(segmentation={"size": [2, 3], "counts": [6]}),
        "annotations, 1: its runs are 3 x 2 px, and image 5 is",
    ),
    (
        lambda v: first(v).update(segmentation={"size": [2, 3], "counts": "zz"}),
        "annotations, 1: its runs fill -1 pixels, and its size is 3 x 2",
    ),
    (lambda v: v["images"][0].pop("height"), "images, 5: 'height' is missing"),
    (lambda v: v["images"][0].update(width=0), "images, 5: its size is 0 x"),
    (lambda v: v["images"].clear(), "images: there are none"),
    (lambda v: v.pop("categories"), "categories: there are none"),
    (lambda v: v["images"][0].update(id="5"), "images, 5: "),
]


@pytest.mark.parametrize(("change", "words"), BROKEN)
def test_broken_annotations(
    tmp_path: Path, write_objects: WriteObjects, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    write_objects(tmp_path / "own")
    with pytest.raises(UserError, match=rf"own/instances.json: {words}"):
        open_source(changed(tmp_path / "own", change))
    assert not list((tmp_path / "cache/fd-scale").glob("*.tmp"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"images": [{"id": 1, "height"', "no JSON at character 12"),
        ("[1]", "no JSON at character 0 .*'\\[' in place of '{'"),
        ('{"images" [', "no JSON at character 10"),
        ("{{}: 2}", "in place of a name"),
        ('{"images": [' + "1" * 5000 + "]}", "no JSON at character 12"),
        ("", "the file ends"),
        ("\xff", "cannot be read"),
    ],
)
def test_what_is_no_json(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "file.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=rf"file.json:? {words}" if words.startswith("cannot") else words):
        list(JsonLists(tmp_path / "file.json"))


def test_json_that_changes_while_it_is_read(
    tmp_path: Path, write_objects: WriteObjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_objects(tmp_path / "set")
    file = tmp_path / "set/instances.json"

    class Slow(JsonLists):
        def __iter__(self) -> Iterator[tuple[str, Any]]:
            yield from super().__iter__()
            os.utime(file, (0, 0))  # as after a second copy to it

    monkeypatch.setattr("fd_scale.data.coco_index.JsonLists", Slow)
    with pytest.raises(UserError, match=r"instances\.json: has changed while it was read; start again"):
        index_of(file)
    monkeypatch.undo()
    assert len(index_of(file)) == 8


def test_json_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "info": {"a": [1, {"b": 2}]},
        "number": 12345,
        "images": [{"ä": "ü" * n} for n in range(9)],
        "last": [],
    }
    expected = [("info", values["info"]), ("number", 12345), *(("images", each) for each in values["images"])]  # type: ignore[attr-defined]
    (tmp_path / "file.json").write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n ")
    for size in (1, 2, 3, 7, 1000):
        monkeypatch.setattr("fd_scale.data.json_lists._CHUNK_BYTES", size)
        assert list(JsonLists(tmp_path / "file.json")) == expected


def test_images_that_do_not_fit(tmp_path: Path, write_objects: WriteObjects) -> None:
    source = open_source(write_objects(tmp_path / "own"))
    (tmp_path / "own/images/1.png").unlink()
    with pytest.raises(DecodeError, match="it cannot be read: No such file"):
        source.read(1)
    Image.new("RGB", (7, 9)).save(tmp_path / "own/images/2.png")
    with pytest.raises(DecodeError, match=r"it is 7 x 9 px, and image 25 of .*instances.json is \d+ x \d+"):
        source.read(2)
    with pytest.raises(UserError, match=r"instances:.*nowhere/images is not a folder"):
        open_source(f"instances:{tmp_path}/nowhere")
    (tmp_path / "own/instances.json").unlink()
    with pytest.raises(UserError, match=r"own/instances.json cannot be read \(No such file"):
        open_source(f"instances:{tmp_path}/own")


def test_what_is_not_learned_is_counted(tmp_path: Path, write_objects: WriteObjects) -> None:
    write_objects(tmp_path / "own")

    def change(values: dict[str, Any]) -> None:
        values["annotations"][0]["bbox"] = [-20, 3, 20, 5]  # outside
        values["annotations"][2]["bbox"] = [2, 3, 0, 5]  # of no area
        values["annotations"][2]["segmentation"] = [[1, 2, 3, 4]]
        values["annotations"][3]["segmentation"] = []

    source = object_source(open_source(changed(tmp_path / "own", change)))
    [index] = (tmp_path / "cache/fd-scale").glob("*.index")
    assert CocoIndex(index).header["left_out"] == {
        "boxes without area in the image": 2,
        "polygons of less than three points": 1,
        "objects without outline beside others that have one": 2,
    }
    assert len(source.objects(0).ids_N) == 2, "an evaluation has all of them"


@pytest.mark.parametrize(
    ("kind", "words"), [("corners", "out of their images"), ("shares", "within a pixel"), ("", "")]
)
def test_boxes_of_other_conventions(
    tmp_path: Path, write_objects: WriteObjects, caplog: pytest.LogCaptureFixture, kind: str, words: str
) -> None:
    write_objects(tmp_path / "own")

    def change(values: dict[str, Any]) -> None:
        for each in values["annotations"]:
            left, top, width, height = each["bbox"]
            corners = [left, top, left + width + 40, top + height + 40]
            shares = [left / 99, top / 99, width / 99, height / 99]
            each["bbox"] = {"corners": corners, "shares": shares, "": each["bbox"]}[kind]

    spec = changed(tmp_path / "own", change)
    for _ in range(2):  # when it is indexed, and when the index is there
        caplog.clear()
        open_source(spec)
        found = [record.message for record in caplog.records if record.levelname == "WARNING"]
        assert len(found) == bool(kind)
        assert not kind or words in found[0]


def test_sources_that_do_not_go_together(tmp_path: Path, write_objects: WriteObjects) -> None:
    spec, other = write_objects(tmp_path / "own"), write_objects(tmp_path / "other", seed=1)
    both = open_source([SourceConfig(source=spec, weight=2), SourceConfig(source=other)])
    assert (len(both), both.targets, object_source(both).has_outlines) == (24, "instances", True)
    theirs = object_source(open_source(other)).objects(2)
    assert object_source(both).objects(18).boxes_N4.tolist() == theirs.boxes_N4.tolist()
    changed(tmp_path / "other", lambda values: values["categories"][0].update(name="ring"))
    with pytest.raises(UserError, match="instances of 2 sources: their classes do not have the same names"):
        open_source([SourceConfig(source=spec), SourceConfig(source=other)])
    source = open_source(spec)
    with pytest.raises(UserError, match="has instances, which only task detection learns; name its images"):
        require_targets("data.train", spec, source, "labels")
    with pytest.raises(UserError, match="has no masks, which task segmentation learns"):
        require_targets("data.train", spec, source, "masks")
    with pytest.raises(
        UserError, match="has no instances, which task detection learns; expected coco_train:PATH"
    ):
        require_targets("data.train", "digits:train", open_source("digits:train"), "instances")


def test_pixels_of_compressed_runs() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        height, width = rng.integers(1, 90, 2)
        mask_HW = np.asfortranarray(rng.random((height, width)) < rng.random(), dtype=np.uint8)
        counts = coco_mask.encode(mask_HW)["counts"]
        assert pixels_of_runs(counts) == mask_HW.size
    large = coco_mask.encode(np.zeros((5000, 7000), dtype=np.uint8, order="F"))["counts"]
    assert pixels_of_runs(large) == 35_000_000
    assert pixels_of_runs(counts[:-1]) != mask_HW.size
    assert [pixels_of_runs(wrong) for wrong in (b"", b"\x00", b"P", b"oooooooooo0")] == [-1] * 4


def test_a_part_of_an_outline_is_that_part_of_its_mask() -> None:
    """At any size and place; corners outside the window round as those inside do."""
    rng = np.random.default_rng(0)
    different = 0
    for _ in range(400):
        height, width = (int(side) for side in rng.integers(20, 80, 2))
        polygons = [
            (rng.random((rng.integers(3, 9), 2)) * [width, height]).round(2).ravel() for _ in range(2)
        ]
        none = np.zeros(0)
        objects = Objects(
            image_id=0, height=height, width=width, ids_N=none.astype(np.int64), boxes_N4=none,
            labels_N=none.astype(np.int64), areas_N=none, crowd_N=none.astype(bool), outlines=[],
        )  # fmt: skip
        factor = rng.uniform(0.3, 2.5)
        size = (max(1, round(width * factor)), max(1, round(height * factor)))
        left, top = (int(rng.integers(0, side)) for side in size)
        width_seen, height_seen = (
            int(rng.integers(1, size[0] - left + 1)),
            int(rng.integers(1, size[1] - top + 1)),
        )
        all_of_it = mask_in(polygons, objects, Window(0, 0, *size, *size))
        scaled = [
            (polygon.reshape(-1, 2) * (np.array(size) / [width, height])).ravel() for polygon in polygons
        ]
        theirs = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(scaled, size[1], size[0])))
        np.testing.assert_array_equal(all_of_it, theirs)
        part = mask_in(polygons, objects, Window(left, top, width_seen, height_seen, *size))
        different += not np.array_equal(part, theirs[top : top + height_seen, left : left + width_seen])
        own_HW = mask_in(polygons, objects, whole(objects))
        runs = coco_mask.encode(np.asfortranarray(own_HW))["counts"]
        double = Window(
            left=5, top=2, width=width, height=height, image_width=2 * width, image_height=2 * height
        )
        doubled_HW = own_HW.repeat(2, axis=0).repeat(2, axis=1)[2 : 2 + height, 5 : 5 + width]
        np.testing.assert_array_equal(mask_in(runs, objects, double), doubled_HW)
    # Along an edge COCO rounds sums of doubles: where one is a half, its last bit depends on the corner's place.
    assert different <= 2
    empty = np.zeros((4, 5), dtype=np.uint8)
    assert box_around(empty) is None
    empty[1:3, 2:5] = 1
    assert box_around(empty) == (2, 1, 5, 3)


@pytest.mark.slow
def test_the_benchmark() -> None:
    found = bench_annotations(num_images=20, num_objects=90)
    assert (found["images"], found["objects"]) == (20, 90)
    assert min(found["convert_s"], found["peak_gib"], found["open_s"], found["index_mib"]) > 0
