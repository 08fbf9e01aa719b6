"""The index of tar shards: what it holds is what a scan finds, it follows the files, and is shared, not copied."""

import multiprocessing
import os
import pickle
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from shard_files import level, numbered, write_tar

from fd_scale import api
from fd_scale.benchmarks.tar_index import bench_index
from fd_scale.cli import main
from fd_scale.data import open_source, tar_index
from fd_scale.data.shards import TarSource
from fd_scale.data.tar_index import TarIndex, index_of
from fd_scale.errors import UserError
from fd_scale.verbs import index as index_verb


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/fd-scale"


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards whose headers have been read."""
    names: list[str] = []
    scan = tar_index._scan

    def noted(path: str) -> tar_index.Shard:
        names.append(os.path.basename(path))
        return scan(path)

    monkeypatch.setattr(tar_index, "_scan", noted)
    return names


def write_set(folder: Path, counts: tuple[int, ...] = (3, 0, 5, 1)) -> str:
    """Shards whose images have levels of 40 times the shard, and on."""
    for shard, count in enumerate(counts):
        others = [(f"long/{'x' * 150}/a.txt", b"no image"), ("größe.txt", b"")]
        write_tar(folder / f"{shard}.tar", [*others, *numbered(40 * shard, 40 * shard + count)])
    return f"tar:{folder}"


def levels(spec: str) -> list[int]:
    source = open_source(spec)
    assert [source.read(i)[1] for i in range(len(source))] == source.all_labels().tolist()
    assert [int(source.key(i)) for i in range(len(source))] == source.all_labels().tolist()
    return [level(source, i) for i in range(len(source))]


def test_the_index_is_what_the_scan_finds(tmp_path: Path, cache: Path, scanned: list[str]) -> None:
    spec = write_set(tmp_path / "set")
    index = index_of([str(tmp_path / f"set/{shard}.tar") for shard in range(4)])
    for shard in range(4):
        found = tar_index._scan(str(tmp_path / f"set/{shard}.tar"))
        for ours, expected in zip(index.part(shard), found, strict=True):
            assert np.array_equal(ours, expected), shard
    source = open_source(spec)
    assert [source.name(i) for i in (0, 2, 3, 8)] == [
        f"{tmp_path}/set/{name}"
        for name in ("0.tar:0000.png", "0.tar:0002.png", "2.tar:0080.png", "3.tar:0120.png")
    ]
    assert levels(spec) == [0, 1, 2, 80, 81, 82, 83, 84, 120]
    assert source.num_classes == 121
    assert source.fingerprint == "0a94bcf0917fb2d6e26a7caed89c24ad", (
        "that of the runs before there was an index"
    )
    # Threads share the first four.
    assert sorted(scanned[:4]) == scanned[4:] == ["0.tar", "1.tar", "2.tar", "3.tar"], (
        "by the index, and above"
    )
    assert len(list(cache.glob("*.index"))) == 1


def test_changed_shards_alone_are_read_again(tmp_path: Path, cache: Path, scanned: list[str]) -> None:
    folder = tmp_path / "set"
    spec = write_set(folder, (3, 2, 2))
    before = open_source(spec)
    scanned.clear()
    write_tar(folder / "3.tar", numbered(7, 9))
    assert levels(spec) == [0, 1, 2, 40, 41, 80, 81, 7, 8]
    assert scanned == ["3.tar"], "added"
    scanned.clear()
    write_tar(folder / "1.tar", numbered(90, 91))
    assert levels(spec) == [0, 1, 2, 90, 80, 81, 7, 8]
    assert scanned == ["1.tar"], "changed"
    scanned.clear()
    (folder / "0.tar").unlink()
    assert levels(spec) == [90, 80, 81, 7, 8]
    assert levels(f"tar:{folder}/[13].tar") == [90, 7, 8]
    assert scanned == [], "removed, and a part"
    same_size = (folder / "2.tar").read_bytes()
    write_tar(folder / "2.tar", numbered(81, 83))
    assert len(same_size) == (folder / "2.tar").stat().st_size
    assert levels(spec) == [90, 81, 82, 7, 8]
    assert scanned == ["2.tar"], "changed at once, of the same size"
    scanned.clear()
    times = (folder / "2.tar").stat().st_mtime_ns
    write_tar(folder / "2.tar", numbered(90, 99))
    os.utime(folder / "2.tar", ns=(times, times))
    assert levels(spec) == [90, *range(90, 99), 7, 8]
    assert scanned == ["2.tar"], "changed, with the time it had"
    for old in {*cache.glob("*.index")} - {before.index.file}:
        os.truncate(old, 100)
    assert levels(f"tar:{folder}/[12].tar") == [90, *range(90, 99)], (
        "damaged ones spare no work, and are no hindrance"
    )
    os.truncate(folder / "3.tar", 1000)
    with pytest.raises(UserError, match=r"3.tar: .*; download it again"):
        open_source(spec)
    assert pickle.loads(pickle.dumps(before)).key(3) == "0040", "a run before goes on with what it found"


def test_a_shard_that_is_being_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, scan = write_set(tmp_path / "set"), tar_index._scan

    def appended(path: str) -> tar_index.Shard:
        shard = scan(path)
        if path.endswith("2.tar"):
            os.utime(path)
        return shard

    monkeypatch.setattr(tar_index, "_scan", appended)
    with pytest.raises(UserError, match=r"2.tar: has changed while it was read"):
        open_source(spec)


@pytest.mark.parametrize("cut", [1, 8, 100, -20])
def test_an_index_that_is_not_whole_is_refused(tmp_path: Path, cache: Path, cut: int) -> None:
    spec = write_set(tmp_path / "set")
    open_source(spec)
    (file,) = cache.glob("*.index")
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(UserError, match=rf"{file}: this index of shards is not whole; remove it, it is made"):
        open_source(spec)
    file.unlink()
    assert len(open_source(spec)) == 9


def opened_at(start: float, spec: str) -> tuple[int, str]:
    time.sleep(max(0.0, start - time.time()))
    return os.getpid(), open_source(spec).fingerprint


def test_two_processes_at_once(tmp_path: Path, cache: Path) -> None:
    spec = write_set(tmp_path / "set", (300, 300))
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.starmap(opened_at, [(time.time() + 0.2, spec)] * 2, chunksize=1)
    assert len({fingerprint for _, fingerprint in found}) == 1
    assert sorted(file.suffix for file in cache.iterdir()) == [".index", ".lock"]


def test_a_cache_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A run that needed no cache before goes on without one; the verb, which is for the cache alone, does not."""
    spec = write_set(tmp_path / "set")
    expected = open_source(spec).fingerprint
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "set/0.tar"))
    source = open_source(spec)
    assert "cannot be written" in caplog.text
    assert "set XDG_CACHE_HOME to a folder that can; each process reads all headers now" in caplog.text
    assert source.fingerprint == expected
    assert [level(pickle.loads(pickle.dumps(source)), i) for i in (0, 8)] == [0, 120]
    with pytest.raises(UserError, match=r"\.index cannot be written .* set XDG_CACHE_HOME"):
        list(index_verb.index(spec, 0))


def test_what_is_resident_and_what_is_copied(tmp_path: Path) -> None:
    source = TarSource(str(write_tar(tmp_path / "a.tar", numbered(0, 250))))
    columns = source.index.columns
    of_images = {name: column for name, column in columns.items() if len(column) == len(source)}
    assert set(of_images) == {"offsets", "sizes", "labels", "name_ends"}
    assert sum(column.itemsize for column in of_images.values()) == 20
    assert not any(column.flags.owndata for column in columns.values()), "mapped"
    assert np.shares_memory(source.all_labels(), source.index.bytes)
    assert level(source, 7) == 7
    assert len(pickle.dumps(source)) < 1000, "no arrays"
    assert level(pickle.loads(pickle.dumps(source)), 249) == 249


def test_processes_find_the_same(tmp_path: Path, cache: Path) -> None:
    spec = write_set(tmp_path / "set")
    index_of([str(tmp_path / f"set/{shard}.tar") for shard in range(4)])
    (by_threads,) = cache.glob("*.index")
    expected = by_threads.read_bytes()
    by_threads.unlink()
    told: list[tuple[int, int]] = []
    source = TarSource(
        spec.removeprefix("tar:"), partial(index_of, processes=2, told=lambda *now: told.append(now))
    )
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert by_threads.read_bytes() == expected
    assert len(source) == 9
    write_tar(tmp_path / "set/4.tar", [("../evil.png", b"")])
    write_tar(tmp_path / "set/5.tar", numbered(0, 1))
    with pytest.raises(UserError, match=r"4.tar: member '../evil.png' is refused"):
        TarSource(spec.removeprefix("tar:"), partial(index_of, processes=2))


def test_the_verb(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str], scanned: list[str]
) -> None:
    spec = write_set(tmp_path / "set")
    main(["index", spec])
    out, err = capsys.readouterr()
    size = sum(file.stat().st_size for file in (tmp_path / "set").iterdir())
    (file,) = cache.glob("*.index")
    assert f"{spec}: 9 images, 121 classes, 4 shards of {size:,} bytes, " in out
    assert f"{file}: {file.stat().st_size:,} bytes" in out
    assert "4 of 4 shards" in err
    main(["index", spec])
    assert "9 images" in capsys.readouterr().out
    open_source(spec)
    assert len(scanned) == 4, "once"
    for arguments, message in (
        (["digits:train"], "'digits:train' is no set of tar shards; expected tar:PATH"),
        ([spec, "--processes", "-1"], "--processes: got -1"),
        ([f"tar:{tmp_path}/none"], "matches no file"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["index", *arguments])
        assert message in capsys.readouterr().err


def test_an_index_of_another_kind_is_refused(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "a.index"
    file.write_bytes(b"FDCOCO1\n" + b"{}" + (2).to_bytes(8, "little") + b"FDCOCO1\n")
    with pytest.raises(UserError, match="this index of shards is not whole"):
        TarIndex(file)
    file.write_bytes(b"")
    with pytest.raises(UserError, match="no index of shards"):
        TarIndex(file)


@pytest.mark.slow
def test_the_benchmark() -> None:
    assert bench_index(num_images=1000, num_shards=7, num_tars=2)["images_in_tars"] == 1000


def test_from_python_it_is_there_after_the_call(tmp_path: Path, cache: Path) -> None:
    lines = api.index(write_set(tmp_path / "set"), out=tmp_path / "copy.index")
    assert len(lines) == 3
    [file] = cache.glob("*.index")
    assert (tmp_path / "copy.index").read_bytes() == file.read_bytes()
