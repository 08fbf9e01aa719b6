"""Masks of parquet files, and masks painted from annotations of objects."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pycocotools.coco import COCO

from fd_scale.config import SourceConfig
from fd_scale.data import open_source, pixel_source, spread
from fd_scale.data.decode import DecodeError
from fd_scale.data.masks import ade20k_names
from fd_scale.data.picture import Picture
from fd_scale.errors import UserError

Write = Callable[..., str]
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_rows(file: Path, rows: dict[str, list[bytes | None]], **others: list[int]) -> None:
    """Columns of files in bytes, in row groups of two."""
    columns = {
        name: pa.array([data and {"bytes": data, "path": None} for data in column], STRUCT)
        for name, column in rows.items()
    }
    labels = {name: pa.array(values) for name, values in others.items()}
    pq.write_table(pa.table(columns | labels), file, row_group_size=2)


@pytest.fixture
def shapes(tmp_path: Path, write_shapes: Write) -> Path:
    """Five images and masks as files, and the same as rows of two parquet files."""
    write_shapes(tmp_path / "shapes", count=5)
    root = tmp_path / "shapes"
    images = sorted((root / "images").iterdir())
    masks = [(root / "masks" / image.name).with_suffix(".png") for image in images]
    for part, rows in (("0", slice(0, 3)), ("1", slice(3, 5))):
        columns = {
            name: [file.read_bytes() for file in files[rows]]
            for name, files in (("image", images), ("mask", masks))
        }
        write_rows(tmp_path / f"train-{part}.parquet", columns, label=list(range(5))[rows])
    return root


def test_parquet_gives_what_the_files_give(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"classes\.txt cannot be read"):
        open_source(f"masks_parquet:{tmp_path}/train-*.parquet")
    (tmp_path / "classes.txt").write_bytes((shapes / "classes.txt").read_bytes())
    files = open_source(f"masks:{shapes}")
    rows = open_source(f"masks_parquet:{tmp_path}/train-*.parquet")
    assert (rows.targets, rows.class_names, rows.num_classes) == ("masks", files.class_names, 3)
    assert len(rows) == len(files) == 5
    for source in (rows, pickle.loads(pickle.dumps(rows))):
        for sample_id in range(5):
            for part, expected in zip(source.read(sample_id), files.read(sample_id), strict=True):
                images = [each.pil() if isinstance(each, Picture) else each for each in (part, expected)]
                np.testing.assert_array_equal(*images)
    assert rows.name(4) == f"{tmp_path}/train-1.parquet:1"
    before = rows.fingerprint
    (tmp_path / "classes.txt").write_text("-\ndisc\nsquare\n")
    assert open_source(f"masks_parquet:{tmp_path}/train-*.parquet").fingerprint != before
    # Of labels the same files tell, too.
    assert open_source(f"parquet:{tmp_path}/train-0.parquet").all_labels().tolist() == [0, 1, 2]


def test_values_of_classes(shapes: Path, tmp_path: Path, write_objects: Write) -> None:
    """Where some are no class; in a mixture, a part of a source, painted objects."""
    (shapes / "classes.txt").write_text("-\nground\n-\ndisc\nsquare\n")
    source = open_source(f"masks:{shapes}")
    mixed = open_source([SourceConfig(source=f"masks:{shapes}", weight=2)])
    for each in (source, mixed, spread(source, 2)):
        assert pixel_source(each).mask_values == [1, 3, 4]
    painted = open_source(f"painted:{write_objects(tmp_path / 'objects')}")
    assert pixel_source(painted).mask_values == [0, 1, 2]


def test_ade20k_as_on_the_hub(tmp_path: Path) -> None:
    def png(values: list[list[int]]) -> bytes:
        file = tmp_path / "one.png"
        Image.fromarray(np.array(values, dtype=np.uint8)).save(file)
        return file.read_bytes()

    image, mask, wide = png([[9, 9]]), png([[0, 150]]), png([[1, 1, 1]])
    file = tmp_path / "validation-0.parquet"
    write_rows(
        file,
        {"image": [image] * 4, "annotation": [mask, wide, None, png([[151, 0]])]},
        scene_category=[0] * 4,
    )
    source = open_source(f"ade20k_parquet:{tmp_path}")
    assert source.class_names == ade20k_names()
    np.testing.assert_array_equal(np.asarray(source.read(0)[1]), [[255, 149]])
    for sample_id, words in (
        (1, "its mask of the same row is 3 x 1 px, and the image 2 x 1"),
        (2, "holds no image bytes in column 'annotation'"),
        (3, "has the value 151, which is none of the 150 classes"),
    ):
        with pytest.raises(DecodeError, match=words):
            source.read(sample_id)
    write_rows(tmp_path / "validation-0.parquet", {"image": [image]})
    with pytest.raises(UserError, match=r"has no column of masks \(annotation, mask"):
        open_source(f"ade20k_parquet:{tmp_path}")


def test_objects_are_painted_the_smaller_over_the_larger(tmp_path: Path, write_objects: Write) -> None:
    kind, _, root = write_objects(tmp_path / "own").partition(":")
    source, objects = open_source(f"painted:{kind}:{root}"), open_source(f"{kind}:{root}")
    assert source.class_names == ["background", *(objects.class_names or [])]
    theirs = COCO(Path(root) / "instances.json")
    overlaps, crowds = 0, 0
    for sample_id, image_id in enumerate(sorted(theirs.imgs)):
        image, mask = source.read(sample_id)
        assert image.size == mask.size
        expected_HW = np.zeros(mask.size[::-1], dtype=np.uint8)
        annotations = sorted(theirs.imgToAnns[image_id], key=lambda each: -each["area"])
        for each in annotations:
            inside = theirs.annToMask(each) > 0
            overlaps += int((expected_HW[inside] > 0).sum())
            crowds += each["iscrowd"]
            expected_HW[inside] = (
                255 if each["iscrowd"] else 1 + sorted(theirs.cats).index(each["category_id"])
            )
        np.testing.assert_array_equal(np.asarray(mask), expected_HW)
    assert overlaps > 0, "the order shows"
    assert crowds > 0
    assert source.fingerprint != objects.fingerprint


def test_what_cannot_be_painted(tmp_path: Path, write_shapes: Write, write_objects: Write) -> None:
    with pytest.raises(UserError, match="expected a source of objects with outlines"):
        open_source(f"painted:{write_shapes(tmp_path / 'shapes')}")
    kind, _, root = write_objects(tmp_path / "own").partition(":")
    file = Path(root) / "instances.json"
    values = json.loads(file.read_text())
    named = json.loads(file.read_text())
    named["categories"][0]["name"] = "-"
    file.write_text(json.dumps(named))
    with pytest.raises(UserError, match="a category is called '-'"):
        open_source(f"painted:{kind}:{root}")
    for each in values["annotations"]:
        each.pop("segmentation", None)
        each["iscrowd"] = 0
    file.write_text(json.dumps(values))
    with pytest.raises(UserError, match="expected a source of objects with outlines"):
        open_source(f"painted:{kind}:{root}")
