"""Data sets of every kind, whole and damaged."""

import json
import multiprocessing
import os
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from shard_files import image_file, level

from fd_scale.data import parquet
from fd_scale.data.decode import DecodeError
from fd_scale.data.sources import Source, open_source
from fd_scale.errors import UserError


def write_parquet(path: Path, images: list, labels: list | None, names: list[str] | None = None) -> None:
    """Rows of (bytes or None) images in row groups of 3, as on the Hugging Face hub."""
    columns = {"image": [image and {"bytes": image, "path": None} for image in images]}
    if labels is not None:
        columns["label"] = pa.array(labels, pa.int64())
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(columns | {"image": pa.array(columns["image"], image_type)})
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        description = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": description})
    pq.write_table(table, path, row_group_size=3)


@pytest.fixture
def class_folders(tmp_path: Path) -> Path:
    """Class b: 3 images, one of them in a sub-folder; class a: 1; and things that are no images."""
    for number, name in enumerate(["b/0.png", "b/1.PNG", "b/deep/2.png", "a/3.png"]):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(image_file(number))
    (tmp_path / "set" / "a" / "notes.txt").write_text("no image")
    (tmp_path / "set" / "a" / ".hidden.png").write_bytes(b"")
    (tmp_path / "set" / ".cache").mkdir()
    return tmp_path / "set"


def test_digits_are_split_without_overlap() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is optional")
    train, test = open_source("digits:train"), open_source("digits:test")
    assert (len(train), len(test)) == (1497, 300)
    assert train.class_names == [str(digit) for digit in range(10)]
    assert train.num_classes == 10
    image, label = test.read(0)
    assert (image.pil().mode, image.size, label) == ("RGB", (8, 8), 0)
    assert max(np.asarray(train.read(i)[0].pil()).max() for i in range(20)) == 255
    # Every 6th: each digit has 174 to 183 images, so about 30 in the test part.
    assert min(np.bincount([test.read(i)[1] for i in range(300)])) > 20
    assert train.fingerprint != test.fingerprint


def test_digits_without_scikit_learn_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match="pip install scikit-learn"):
        open_source("digits:train")


def test_class_folders(class_folders: Path) -> None:
    source = open_source(f"imagefolder:{class_folders}")
    assert source.class_names == ["a", "b"]
    assert source.num_classes == 2
    assert [level(source, i) for i in range(len(source))] == [3, 0, 1, 2]
    assert [source.read(i)[1] for i in range(len(source))] == [0, 1, 1, 1]
    assert source.name(3) == str(class_folders / "b" / "deep" / "2.png")


def test_flat_folder_is_unlabelled(class_folders: Path) -> None:
    source = open_source(f"imagefolder:{class_folders / 'b' / 'deep'}")
    assert (len(source), source.class_names, source.num_classes) == (1, None, 0)
    assert source.read(0)[1] == -1


def test_empty_class_folder_keeps_its_label_and_is_reported(
    class_folders: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (class_folders / "aa").mkdir()
    source = open_source(f"imagefolder:{class_folders}")
    assert source.class_names == ["a", "aa", "b"]
    assert source.read(3)[1] == 2
    assert str(class_folders / "aa") in caplog.text


def test_links_are_followed_but_not_around(tmp_path: Path) -> None:
    for name in ("set/a/0.png", "elsewhere/1.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(image_file(0))
    for name, target in (("linked", "elsewhere"), ("around", "set")):
        (tmp_path / "set/a" / name).symlink_to(tmp_path / target)
    source = open_source(f"imagefolder:{tmp_path}/set")
    assert [source.key(index) for index in range(len(source))] == ["a/0.png", "a/linked/1.png"]


def test_file_name_that_is_no_utf8(tmp_path: Path) -> None:
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))).write_bytes(image_file(5))
    assert level(open_source(f"imagefolder:{tmp_path}"), 0) == 5


def test_folder_fingerprint_follows_the_content_not_the_place(class_folders: Path, tmp_path: Path) -> None:
    fingerprint = open_source(f"imagefolder:{class_folders}").fingerprint
    shutil.copytree(class_folders, tmp_path / "copy")
    assert open_source(f"imagefolder:{tmp_path / 'copy'}").fingerprint == fingerprint
    (tmp_path / "copy" / "b" / "0.png").write_bytes(image_file(0) + b"longer")
    assert open_source(f"imagefolder:{tmp_path / 'copy'}").fingerprint != fingerprint


def test_corrupt_file_in_a_folder(class_folders: Path) -> None:
    (class_folders / "a" / "3.png").write_bytes(image_file(3)[:40])
    source = open_source(f"imagefolder:{class_folders}")
    with pytest.raises(DecodeError):
        source.read(0)
    assert level(source, 1) == 0


@pytest.mark.parametrize("cache_bytes", [0, 10**6], ids=["row group by row group", "in memory"])
def test_parquet_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_bytes: int) -> None:
    monkeypatch.setattr(parquet, "CACHE_BYTES", cache_bytes)
    write_parquet(
        tmp_path / "train-00000-of-00002.parquet", [image_file(i) for i in range(8)], [0, 1] * 4, ["x", "y"]
    )
    write_parquet(tmp_path / "train-00001-of-00002.parquet", [image_file(i) for i in range(8, 13)], [1] * 5)
    source = open_source(f"parquet:{tmp_path}")
    assert (len(source), source.class_names, source.num_classes) == (13, ["x", "y"], 2)
    for sample_id in [12, 0, 7, 8, 3, 12, 2, 9]:
        assert level(source, sample_id) == sample_id
    assert [source.read(i)[1] for i in range(13)] == [0, 1] * 4 + [1] * 5
    assert source.name(9) == f"{tmp_path / 'train-00001-of-00002.parquet'}:1"


def test_fewer_parquet_files_are_open_than_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "MAX_OPEN_FILES", 3)
    monkeypatch.setattr(parquet, "CACHE_BYTES", 0)
    for number in range(8):
        write_parquet(
            tmp_path / f"{number}.parquet", [image_file(2 * number), image_file(2 * number + 1)], [0, 1]
        )
    num_open = len(os.listdir("/proc/self/fd"))
    source = open_source(f"parquet:{tmp_path}")
    assert [level(source, i) for i in [*range(16), 0, 15]] == [*range(16), 0, 15]
    assert len(os.listdir("/proc/self/fd")) - num_open <= 3
    assert [source.key(i) for i in (0, 7, 15)] == ["0.parquet:0", "3.parquet:1", "7.parquet:1"]


def test_parquet_without_labels_or_names(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [image_file(0)], None)
    write_parquet(tmp_path / "b.parquet", [image_file(0)] * 3, [4, None, 2])
    unlabelled, labelled = open_source(f"parquet:{tmp_path}/a.parquet"), open_source(f"parquet:{tmp_path}/b*")
    assert (unlabelled.read(0)[1], unlabelled.class_names, unlabelled.num_classes) == (-1, None, 0)
    assert ([labelled.read(i)[1] for i in range(3)], labelled.num_classes) == ([4, -1, 2], 5)


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint8(), pa.uint64()])
def test_parquet_labels_of_any_integers_may_be_missing(tmp_path: Path, kind: pa.DataType) -> None:
    images = [{"bytes": image_file(0), "path": None}] * 3
    pq.write_table(pa.table({"image": images, "label": pa.array([4, None, 2], kind)}), tmp_path / "a.parquet")
    assert open_source(f"parquet:{tmp_path}").all_labels().tolist() == [4, -1, 2]


def test_parquet_image_column_of_any_name(tmp_path: Path) -> None:
    rows = [{"bytes": image_file(6), "path": "six.png"}]
    pq.write_table(pa.table({"id": [1], "picture": rows, "fine_label": [3]}), tmp_path / "a.parquet")
    source = open_source(f"parquet:{tmp_path}")
    assert (level(source, 0), source.read(0)[1]) == (6, 3)


def test_corrupt_rows_in_a_parquet_file(tmp_path: Path) -> None:
    write_parquet(
        tmp_path / "a.parquet", [image_file(0), image_file(1)[:40], None, image_file(3)], [0, 0, 0, 0]
    )
    source = open_source(f"parquet:{tmp_path / 'a.parquet'}")
    for bad in (1, 2):
        with pytest.raises(DecodeError):
            source.read(bad)
        assert source.name(bad) == f"{tmp_path / 'a.parquet'}:{bad}"
    assert (level(source, 0), level(source, 3)) == (0, 3)


def read_level(source: Source, sample_id: int, result: "multiprocessing.SimpleQueue[int]") -> None:
    result.put(level(source, sample_id))


def test_parquet_in_other_processes(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [image_file(i) for i in range(6)], None)
    source = open_source(f"parquet:{tmp_path}")
    assert level(source, 1) == 1  # the file is open and a row group cached
    pickled = pickle.dumps(source)
    assert image_file(1) not in pickled
    assert level(pickle.loads(pickled), 5) == 5
    context = multiprocessing.get_context("fork")
    result = context.SimpleQueue()
    child = context.Process(target=read_level, args=(source, 4, result))
    child.start()
    assert result.get() == 4
    child.join()
    assert level(source, 2) == 2


def test_parquet_fingerprint_follows_the_content_not_the_place(tmp_path: Path) -> None:
    for folder, last in (("one", 2), ("two", 2), ("three", 200)):
        (tmp_path / folder).mkdir()
        rows = [image_file(i) for i in (0, 1, last)] + [b"longer"] * (last > 2)
        write_parquet(tmp_path / folder / "a.parquet", rows, None)
    one, two, three = (
        open_source(f"parquet:{tmp_path / name}").fingerprint for name in ("one", "two", "three")
    )
    assert one == two != three


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("parket:data", "nearest: 'parquet:...'"),
        ("digits", "nearest: 'digits:...'"),
        ("empty", "nearest: 'imagefolder:empty'"),
        ("digits:validation", "digits:train or digits:test"),
        ("imagefolder:missing", "is not a folder"),
        ("imagefolder:empty", "holds no images"),
        ("parquet:missing/*.parquet", "matches no file"),
        ("parquet:empty", "without \\*.parquet files"),
        ("parquet:no_rows.parquet", "holds no rows"),
        ("parquet:no_images.parquet", "no image column .* its columns are: label: int64, text: string"),
        ("parquet:garbage.parquet", "is no parquet file"),
        ("parquet:gone", "a.parquet is no parquet file that can be read .*No such file"),
        (
            "parquet:hashes.parquet",
            "hashes.parquet:1 has 1099511627776 in column 'label', expected the number of a cl",
        ),
        ("parquet:negative.parquet", "negative.parquet:0 has -4 in column 'label'"),
        ("parquet:mixed", "several parts \\(test, train\\).*\\*\\*/train\\*.parquet"),
        ("parquet:unlike", "b.parquet has no column 'label'"),
    ],
)
def test_wrong_data_set_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "mixed", "unlike"):
        Path(folder).mkdir()
    write_parquet(Path("no_rows.parquet"), [], [])
    pq.write_table(pa.table({"label": [1], "text": ["x"]}), "no_images.parquet")
    Path("garbage.parquet").write_bytes(b"garbage")
    Path("gone").mkdir()
    Path("gone/a.parquet").symlink_to("nothing")
    write_parquet(Path("hashes.parquet"), [image_file(0)] * 2, [1, 2**40])
    write_parquet(Path("negative.parquet"), [image_file(0)], [-4])
    for split in ("train", "test"):
        write_parquet(Path(f"mixed/{split}-00000-of-00001.parquet"), [image_file(0)], [0])
    write_parquet(Path("unlike/a.parquet"), [image_file(0)], [0])
    write_parquet(Path("unlike/b.parquet"), [image_file(0)], None)
    with pytest.raises(UserError, match=message):
        open_source(spec)


def test_a_link_to_nothing_is_a_bad_sample(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    source = open_source(f"imagefolder:{tmp_path}")
    assert len(source) == 2
    assert source.fingerprint
    with pytest.raises(DecodeError, match="cannot be read: No such file"):
        source.read(1)


def test_files_that_are_left_out_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cat" / "more").mkdir(parents=True)
    for name in (
        "cat/a.png",
        "cat/more/b.jfif",
        "cat/.hidden",
        "cat/noted.txt",
        "cat/other.txt",
        "loose.jpg",
        "plain",
    ):
        Image.new("RGB", (4, 4)).save(tmp_path / name, "PNG")
    assert len(open_source(f"imagefolder:{tmp_path}")) == 1
    [record] = caplog.records
    words = record.getMessage()
    assert "5 files are left out: 2 .txt" in words
    assert all(part in words for part in ("1 .jfif", "1 .jpg", "1 without a suffix", "class folders"))
