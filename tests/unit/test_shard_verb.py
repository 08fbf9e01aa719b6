"""`fd-scale shard`: the same files and labels in tars, as tarfile reads them, in an order that mixes them."""

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from shard_files import image_file, numbered, write_tar

from fd_scale.cli import main
from fd_scale.data import Source, open_source
from fd_scale.data.decode import FORMATS
from fd_scale.errors import UserError
from fd_scale.verbs.shard import _sample, shard


def members(folder: Path) -> dict[str, bytes]:
    """All members of all shards, in their order, by Python's own reader."""
    found = {}
    for file in sorted(folder.glob("*.tar")):
        with tarfile.open(file) as archive:
            for info in archive:
                stream = archive.extractfile(info)
                assert stream is not None
                assert info.name not in found
                found[info.name] = stream.read()
    return found


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes: files of several formats, one with dots in its name."""
    for name, content in {
        "cat/one.JPEG": image_file(1, "JPEG"), "cat/two.v2.png": image_file(2), "dog/one.webp": image_file(3, "WEBP"),
        "dog/deep/four.JPG": image_file(4, "JPEG", "L"),
    }.items():  # fmt: skip
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(content)
    return tmp_path / "images"


def test_what_cannot_be_decoded_is_left_out_where_that_is_asked_for(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    file = images / "cat/one.JPEG"
    file.write_bytes(image_file(1, "JPEG", size=(400, 300))[:-100])
    main(["shard", f"imagefolder:{images}", str(tmp_path / "headers")])
    main(["shard", f"imagefolder:{images}", str(tmp_path / "decoded"), "--decode"])
    first, second = capsys.readouterr().out.splitlines()
    assert "4 of 4 images" in first
    assert "3 of 4 images" in second
    assert "cat/one.JPEG is left out, it cannot be decoded" in caplog.text
    assert members(tmp_path / "headers").keys() - members(tmp_path / "decoded").keys() == {
        "cat/one.jpeg",
        "cat/one.cls",
    }


def test_files_as_they_are_with_labels(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    main(["shard", f"imagefolder:{images}", str(out)])
    printed = capsys.readouterr()
    assert f"tar:{out}: 4 of 4 images, 2 classes, 1 shards, " in printed.out
    assert "read again, count and labels agree" in printed.out
    assert "4 of 4 images" in printed.err
    files = {str(file.relative_to(images)): file.read_bytes() for file in images.rglob("*.*")}
    assert members(out) == {
        "cat/one.jpeg": files["cat/one.JPEG"], "cat/one.cls": b"0",
        "cat/two_v2.png": files["cat/two.v2.png"], "cat/two_v2.cls": b"0",
        "dog/one.webp": files["dog/one.webp"], "dog/one.cls": b"1",
        "dog/deep/four.jpg": files["dog/deep/four.JPG"], "dog/deep/four.cls": b"1",
    }  # fmt: skip
    assert (out / "classes.txt").read_text() == "cat\ndog\n"
    assert (out / "000000.tar").stat().st_mode & 0o777 == 0o644


def as_parquet(folder: Path) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"bytes": image_file(number), "path": None} for number in range(200)]
    pq.write_table(pa.table({"image": rows, "label": range(200)}), folder / "a.parquet", row_group_size=20)
    return f"parquet:{folder}/a.parquet"


def as_tars(folder: Path) -> str:
    for number in range(10):
        write_tar(folder / f"in/{number}.tar", numbered(20 * number, 20 * number + 20))
    return f"tar:{folder}/in"


def as_files(folder: Path) -> str:
    for number in range(200):
        (folder / f"in/{number:03}").mkdir(parents=True)
        (folder / f"in/{number:03}/{number:03}.png").write_bytes(image_file(number))
    return f"imagefolder:{folder}/in"


@pytest.mark.parametrize("make", [as_parquet, as_tars, as_files])
def test_every_source_in_shards_of_a_size(make: Callable[[Path], str], tmp_path: Path) -> None:
    spec = make(tmp_path)
    for name in ("one", "two"):
        list(shard(spec, str(tmp_path / name), "0.05MB"))
    shards = sorted((tmp_path / "one").glob("*.tar"))
    sizes = [file.stat().st_size for file in shards]
    assert len(sizes) > 8
    assert max(sizes) <= 50_000
    assert min(sizes[:-1]) > 50_000 - 20_480, "as full as their record of 10,240 bytes allows"
    assert [file.read_bytes() for file in shards] == [
        (tmp_path / "two" / file.name).read_bytes() for file in shards
    ]
    before, after = open_source(spec), open_source(f"tar:{tmp_path}/one")
    assert after.num_classes == 200
    assert sorted(after.all_labels().tolist()) == [*range(200)]
    by_label = {before.read(i)[1]: before.read(i)[0].encoded for i in range(200)}
    assert all(by_label[after.read(i)[1]] == after.read(i)[0].encoded for i in range(200))
    first = after.all_labels()[:20]
    assert first.max() - first.min() > 100, "a shard mixes what lay far apart"


def test_unlabelled_and_damaged_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "in").mkdir()
    for number in range(5):
        (tmp_path / f"in/{number}.png").write_bytes(image_file(number)[: 30 if number == 3 else None])
    [line] = shard(f"imagefolder:{tmp_path}/in", str(tmp_path / "out"), "1MiB")
    assert "4 of 5 images, 0 classes" in line
    assert "in/3.png is left out, it cannot be decoded" in caplog.text
    assert sorted(members(tmp_path / "out")) == ["0.png", "1.png", "2.png", "4.png"]


@pytest.mark.parametrize("kind", FORMATS)
def test_the_suffix_of_every_format_is_read_again(tmp_path: Path, kind: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = {"bytes": image_file(9, kind, size=(20, 20)), "path": None}
    pq.write_table(pa.table({"image": [row]}), tmp_path / "a.parquet")
    list(shard(f"parquet:{tmp_path}/a.parquet", str(tmp_path / "out"), "1MB"))
    assert [*members(tmp_path / "out").values()] == [row["bytes"]]


def test_a_call_that_is_killed_leaves_no_shards(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first ones would be taken for all."""
    left, out = [2], tmp_path / "out"

    def made(*arguments: Any) -> Any:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return _sample(*arguments)

    monkeypatch.setattr("fd_scale.verbs.shard._sample", made)
    with pytest.raises(KeyboardInterrupt):
        list(shard(f"imagefolder:{images}", str(out), "0.01MB"))
    assert len(list(out.iterdir())) == 1, "of the second it was told that it would not fit"
    with pytest.raises(UserError, match=r"a folder without \*\.tar files"):
        open_source(f"tar:{out}")
    with pytest.raises(UserError, match="is not empty; give a folder of its own"):
        list(shard(f"imagefolder:{images}", str(out), "1MB"))


def test_shards_of_a_call_that_was_killed_while_it_named_them_are_not_taken_for_all(
    images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    list(shard(f"imagefolder:{images}", str(out), "0.01MB"))
    [*_, last] = sorted(out.glob("*.tar"))
    last.rename(f"{last}.unfinished")
    for path in (out, out / "*.tar", out / "000000.tar"):
        with pytest.raises(
            UserError, match=f"{last.name}.unfinished is of a call of `fd-scale shard` that has not"
        ):
            open_source(f"tar:{path}")


def test_what_is_refused(
    images: Path, tmp_path: Path, write_shapes: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, out = f"imagefolder:{images}", tmp_path / "out"

    def refused(source: str, folder: Path, size: str, message: str) -> None:
        with pytest.raises(UserError, match=message):
            list(shard(source, str(folder), size))
        assert not list(tmp_path.rglob("*.tmp"))

    refused(spec, images, "1MB", "is not empty; give a folder of its own")
    refused(spec, images / "cat/one.JPEG", "1MB", "cannot be written")
    for size in ("1", "0MB", "-1MB", "1TB"):
        refused(spec, out, size, f"--size: got '{size}', expected a number of MB")
    refused("digits:train", out, "1MB", "these images are in no files")
    refused(write_shapes(tmp_path / "shapes"), tmp_path / "other", "1MB", "has masks; expected")
    (images / "cat/one.png").write_bytes(image_file(5))
    refused(spec, tmp_path / "twice", "1MB", "two samples have the key 'cat/one'; rename one")
    (images / "cat/one.png").unlink()

    class Fewer:
        paths: list[str] = []

        def __init__(self, path: str) -> None:
            self.opened: Source = open_source(f"tar:{path}")

        def all_labels(self) -> object:
            return self.opened.all_labels()[1:]

    monkeypatch.setattr("fd_scale.verbs.shard.TarSource", Fewer)
    refused(spec, tmp_path / "lost", "1MB", "does not hold the labels that were written")


def test_a_store_is_no_folder(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else all of it would lie in a folder `s3:` here when the store is asked for it."""
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    with pytest.raises(UserError, match="s3://bucket/out is no folder; write to one on a disk"):
        next(shard(f"imagefolder:{images}", "s3://bucket/out", "1MB"))
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (b"cat\ndog\n", ["cat", "dog"]),
        ("\ufeffcat\ndog\nfox\n\n\n".encode(), ["cat", "dog", "fox"]),  # the last has no image
        (b"cat\n", None),
        (b"cat\n\ndog\n", None),
        ("größe\ndog\n".encode("latin-1"), None),
    ],
)
def test_names_beside_shards(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, text: bytes, names: list[str] | None
) -> None:
    list(shard(f"imagefolder:{images}", str(tmp_path / "out"), "1MB"))
    num_classes = open_source(f"tar:{tmp_path / 'out'}").num_classes
    assert num_classes == 2
    (tmp_path / "out/classes.txt").write_bytes(text)
    source = open_source(f"tar:{tmp_path / 'out'}")
    assert source.class_names == names
    assert source.num_classes == len(names or "ab")
    assert ("classes.txt" in caplog.text) == (names is None)
