"""Shards in stores: the same samples as from files, a bounded cache, and each fault is survived or named."""

import errno
import os
import pickle
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_store import FakeStore, failing, serve
from shard_files import image_file, level, numbered, write_tar

from fd_scale import api
from fd_scale.cli import main
from fd_scale.config import Recipe, SourceConfig
from fd_scale.data import ImageAlone, TrainLoader, evaluation_transform, open_source, remote_shards, store
from fd_scale.data.order import ShardOrder
from fd_scale.data.remote_shards import RemoteShards
from fd_scale.data.shards import TarSource
from fd_scale.distill import DistillationTask
from fd_scale.errors import UserError

COUNTS = (5, 3, 6, 4)
LEVELS = [40 * shard + number for shard, count in enumerate(COUNTS) for number in range(count)]


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(store, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(store, "CHUNK_BYTES", 8192)
    store._counts.clear()


@pytest.fixture
def local(tmp_path: Path) -> str:
    for shard, count in enumerate(COUNTS):
        write_tar(tmp_path / f"set/{shard}.tar", numbered(40 * shard, 40 * shard + count))
    return f"tar:{tmp_path}/set/{{0..3}}.tar"


@pytest.fixture
def remote(local: str, tmp_path: Path) -> Iterator[FakeStore]:
    with serve() as fake:
        fake.files = {f"/set/{file.name}": file.read_bytes() for file in (tmp_path / "set").iterdir()}
        yield fake


@pytest.fixture
def memory(remote: FakeStore) -> Iterator[Any]:
    """The same files in fsspec's store in memory."""
    import fsspec

    found = fsspec.filesystem("memory")
    for path, data in remote.files.items():
        found.pipe_file(path, data)
    yield found
    found.rm("/set", recursive=True)


def opened(fake: FakeStore) -> TarSource:
    source = open_source(f"tar:{fake.url}/set/{{0..3}}.tar")
    assert isinstance(source, TarSource)
    return source


def levels(source: TarSource) -> list[int]:
    found = [level(source, sample_id) for sample_id in range(len(source))]
    assert found == [source.read(sample_id)[1] for sample_id in range(len(source))]
    return found


def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FD_SHARD_CACHE_GIB", "0")


@pytest.fixture(params=["kept", "one by one"])
def kept_or_one_by_one(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "one by one":
        one_by_one(monkeypatch)


def loader_of(source: Any, global_batch: int, **options: Any) -> TrainLoader:
    given = {"micro_batch": global_batch, "num_workers": 0} | options
    return TrainLoader(
        source, ImageAlone(evaluation_transform(4)), seed=0, global_batch=global_batch, rank=0, world_size=1, **given
    )  # fmt: skip


def impatient(monkeypatch: pytest.MonkeyPatch, fault: str | int) -> None:
    """Elsewhere a slow machine should not look like a slow store."""
    if fault in ("hang", "drip"):
        monkeypatch.setattr(store, "TIMEOUT_S", 0.4)


def shards_kept(tmp_path: Path) -> list[Path]:
    return sorted(tmp_path.glob("cache/fd-scale/shards/*.tar"))


@pytest.mark.usefixtures("memory")
def test_the_same_samples_as_from_files(remote: FakeStore, local: str) -> None:
    files = open_source(local)
    for spec in (
        "memory://set/{0..3}.tar",
        "memory://set/*.tar",
        f"{remote.url}/set/*.tar",
        "memory://set/",
        f"{remote.url}/set/{{0..3}}.tar",
    ):
        source = open_source(f"tar:{spec}")
        assert isinstance(source, TarSource)
        assert levels(source) == LEVELS
        assert source.fingerprint == files.fingerprint, "a run may move"
        assert source.name(5).endswith("/set/1.tar:0040.png")
        assert level(pickle.loads(pickle.dumps(source)), 17) == LEVELS[17]


def test_files_of_a_range_need_no_list(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise PermissionError("Access Denied")

    listed = store.states([f"memory://set/{number}.tar" for number in range(4)])
    monkeypatch.setattr(type(memory), "ls", forbidden)
    assert store.states([f"memory://set/{number}.tar" for number in range(4)]) == listed
    with pytest.raises(UserError, match=r"memory://set/4.tar: is not there, as 1 of 5 files"):
        store.states([f"memory://set/{number}.tar" for number in range(5)])
    monkeypatch.undo()


def test_headers_and_shards_are_read_once(remote: FakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "CHUNK_BYTES", 2**20)  # as usual, more than from one header to the next
    source = opened(remote)
    size = sum(map(len, remote.files.values()))
    assert remote.sent.total() == size, "the index takes all of a shard, with its labels, once"
    remote.forget()
    assert levels(source) == LEVELS
    assert levels(pickle.loads(pickle.dumps(source))) == LEVELS
    assert remote.sent.total() == size, "a whole shard each"
    remote.forget()
    assert levels(opened(remote)) == LEVELS
    assert remote.num_reads() == 0, "a later start asks for versions alone"


def test_one_request_an_image_where_shards_do_not_fit(
    remote: FakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(map(len, remote.files.values()))
    monkeypatch.setenv("FD_SHARD_CACHE_GIB", str((size - 1) / 2**30))
    source = opened(remote)
    remote.forget()
    assert [level(source, sample_id) for sample_id in range(18)] == LEVELS
    assert remote.num_reads() == 18
    assert remote.sent.total() == sum(source.index.sizes_N)
    assert sum(remote.asked.values()) == 18 + 4, "a version of each shard"
    assert not shards_kept(tmp_path)


def test_the_cache_is_bounded_and_keeps_what_is_used(
    remote: FakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = max(map(len, remote.files.values()))
    monkeypatch.setenv("FD_SHARD_CACHE_GIB", str(2 * largest / 2**30))
    source = opened(remote)
    source.keep_shards(2)
    remote.forget()
    first = source.index.first_S.tolist()
    left = tmp_path / "cache/fd-scale/shards/killed.tmp"
    left.parent.mkdir()
    left.write_bytes(bytes(largest))
    os.utime(left, (0, 0))
    before = len(os.listdir("/proc/self/fd"))

    def read(shard: int) -> None:
        assert level(source, first[shard]) == 40 * shard
        held = shards_kept(tmp_path)
        assert sum(file.stat().st_size for file in held) <= 2 * largest
        for age, file in enumerate(sorted(held, key=lambda file: file.stat().st_mtime)):
            os.utime(file, (time.time() - 1000 + age, time.time() - 1000 + age))

    for shard in (0, 1, 0, 2, 0, 3, 0):  # 0 is used again and again
        read(shard)
    sizes = {path: len(data) for path, data in remote.files.items()}
    assert remote.sent == sizes
    read(1)
    assert remote.sent == sizes | {"/set/1.tar": 2 * sizes["/set/1.tar"]}, "was thrown out"
    assert len(os.listdir("/proc/self/fd")) - before <= 2, "connections; no shard stays open: it would stay"
    assert not left.exists(), "what a killed process left counts, and goes first"
    source.keep_shards(3)
    assert source.shards.whole, "never less than was said before"


def test_a_micro_batch_is_asked_for_at_once(remote: FakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    one_by_one(monkeypatch)
    twice = open_source([SourceConfig(source=f"tar:{remote.url}/set/{{0..3}}.tar", weight=2)])
    remote.delay_s, remote.most_at_once = 0.1, 0
    remote.forget()
    loader = loader_of(twice, 36, micro_batch=18)
    batches = next(loader.iterate(0))
    assert sorted(torch.cat([batch.images[:, 0, 0, 0] for batch in batches]).tolist()) == sorted(LEVELS * 2)
    assert remote.num_reads() == 36
    assert remote.most_at_once >= 8
    remote.fault = failing(404, times=-1)
    with pytest.raises(UserError, match="is not there any more"):
        next(loader.iterate(1))


def test_the_shard_that_comes_is_fetched_meanwhile(remote: FakeStore) -> None:
    source = opened(remote)
    loader = loader_of(source, 2, shard_window=1)
    order = ShardOrder(source.index.first_S, 1)
    shards = [source.index.shard(int(order(0, 0, position))) for position in range(18)]
    first, second = [*dict.fromkeys(shards)][:2]
    remote.forget()
    next(loader.iterate(0))
    for _ in range(200):
        if f"/set/{second}.tar" in remote.sent:
            break
        time.sleep(0.02)
    assert set(remote.sent) == {f"/set/{first}.tar", f"/set/{second}.tar"}
    assert order.coming(0, 0, 17) is None


def test_a_window_that_does_not_fit_is_said(
    remote: FakeStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FD_SHARD_CACHE_GIB", str(2 * max(map(len, remote.files.values())) / 2**30))
    source = opened(remote)
    source.keep_shards(3)
    assert "3 shards at a time take 0.0: images are read one by one; set FD_SHARD_CACHE_GIB" in caplog.text
    assert levels(source) == LEVELS


def test_images_spread_over_all_shards_are_requests_beside_a_window(
    remote: FakeStore,
    local: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_recipe: Callable[..., Recipe],
) -> None:
    """As those of `distill.knn_images`: else each evaluation would download the whole set."""
    size = sum(map(len, remote.files.values()))
    monkeypatch.setenv("FD_SHARD_CACHE_GIB", str((size - 1) / 2**30))
    source = opened(remote)
    recipe = make_recipe(
        data__train=f"tar:{remote.url}/set/{{0..3}}.tar",
        data__evaluation=local,
        data__shard_window=1,
        distill__knn_images=9,
    )
    source.keep_shards(2)  # as the training's loader does
    task = api.build_task(recipe, source)
    assert isinstance(task, DistillationTask)
    assert task.bank is not None
    remote.forget()
    assert [level(task.bank.source, number) for number in range(9)] == LEVELS[::2]
    assert remote.num_reads() == 9
    assert not shards_kept(tmp_path)
    source.read(0)
    assert len(shards_kept(tmp_path)) == 1


def test_sources_of_a_list_share_the_cache(
    remote: FakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would fit alone; a random order over both would throw out shards before they are used up."""
    first, *others = sorted(remote.files)
    size = sum(map(len, remote.files.values()))
    (tmp_path / "kept.txt").write_text("0000\n0003\n")
    configs = [
        SourceConfig(source=f"tar:{remote.url}{first}", only=str(tmp_path / "kept.txt"), weight=2),
        SourceConfig(source=f"tar:{remote.url}/set/{{1..3}}.tar"),
    ]
    for configured, kept in ((size - 1, 0), (size, len(others) + 1)):
        monkeypatch.setenv("FD_SHARD_CACHE_GIB", str(configured / 2**30))
        # A shard that is in two sources takes its room once.
        source = open_source([*configs, configs[0]])
        assert [level(source, number) for number in (0, 1, 4, 7, 13)] == [0, 3, 40, 80, 120]
        assert len(shards_kept(tmp_path)) == kept


def test_few_shards_are_fetched_at_once(remote: FakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a slow network has no answer in time for any of them."""
    monkeypatch.setattr(remote_shards, "_NUM_FETCHED_AT_ONCE", 1)
    monkeypatch.setattr(store, "_NUM_CHUNKS_AT_ONCE", 2)
    source = opened(remote)
    remote.delay_s, remote.most_at_once = 0.02, 0
    workers = [pickle.loads(pickle.dumps(source)) for _ in range(2)]
    for worker in workers:
        worker.expect(range(18), None)
    assert [levels(worker) for worker in workers] == [LEVELS, LEVELS]
    assert remote.most_at_once <= 2


def test_several_at_once_download_a_shard_once(remote: FakeStore) -> None:
    """The lock is one between opened files: threads with sources of their own wait as processes do."""
    sources = [pickle.loads(pickle.dumps(opened(remote))) for _ in range(4)]
    remote.forget()
    remote.delay_s = 0.05
    with ThreadPoolExecutor(4) as executor:
        assert [*executor.map(lambda source: level(source, 0), sources)] == [0, 0, 0, 0]
    assert remote.sent == {"/set/0.tar": len(remote.files["/set/0.tar"])}


@pytest.mark.parametrize("fault", [503, 429, "reset", "cut", "short", "drip"])
@pytest.mark.usefixtures("kept_or_one_by_one")
def test_a_fault_that_passes(
    remote: FakeStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str | int
) -> None:
    source = opened(remote)
    impatient(monkeypatch, fault)
    # aiohttp itself asks again after a reset, of each of three ranges that are asked for at once.
    remote.fault = failing(fault, times=4 if fault == "reset" else 2)
    assert levels(source) == LEVELS
    assert f"{remote.url}/set/0.tar: " in caplog.text
    assert re.search(r"tries of a store that failed: [124] until now", caplog.text)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (503, "cannot be read: .* 503.*, tried 5 times; check the store"),
        ("reset", "cannot be read: .*, tried 5 times"),
        ("cut", "cannot be read: .*, tried 5 times"),
        ("short", r"cannot be read: EOFError: it gave \d+ of \d+ bytes from \d+ on, tried 5 times"),
        ("hang", "cannot be read: no answer within 0.4 s, tried 5 times"),
        (400, "cannot be read: .* 400.*, tried 1 times"),
        (403, "may not be read .* 403.* check this host's credentials"),
        (404, "is not there any more"),
        ("whole", "the store gives whole files, not ranges of them"),
    ],
)
@pytest.mark.usefixtures("kept_or_one_by_one")
def test_a_fault_that_stays(
    remote: FakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str | int, message: str
) -> None:
    source = opened(remote)
    impatient(monkeypatch, fault)
    remote.fault = failing(fault, times=-1)
    began = time.monotonic()
    with pytest.raises(UserError, match=f"^{re.escape(remote.url)}/set/0.tar: {message}"):
        source.read(0)
    assert time.monotonic() - began < 20
    remote.fault = lambda method, path: None
    assert levels(source) == LEVELS, "what was begun is no hindrance"
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (404, "/set/0.tar: is not there, as 4 of 4 files; check the address"),
        (500, "/set/.*.tar: cannot be read: .* 500"),
        ("hang", "/set/.*.tar: cannot be read: no answer within"),
        ("no size", "/set/.*.tar: the store does not tell its size"),
    ],
)
def test_a_store_that_fails_at_the_start(
    remote: FakeStore, monkeypatch: pytest.MonkeyPatch, fault: str | int, message: str
) -> None:
    impatient(monkeypatch, fault)
    remote.fault = lambda method, path: fault
    with pytest.raises(UserError, match=message):
        opened(remote)


@pytest.mark.usefixtures("kept_or_one_by_one")
@pytest.mark.parametrize("num_images", [5, 12], ids=["another version", "another size"])
def test_a_shard_that_changes(remote: FakeStore, tmp_path: Path, num_images: int) -> None:
    source = opened(remote)
    changed = write_tar(tmp_path / "changed.tar", numbered(200, 200 + num_images)).read_bytes()
    assert (len(changed) == len(remote.files["/set/0.tar"])) == (num_images == 5)
    remote.files["/set/0.tar"] = changed
    with pytest.raises(
        UserError, match=r"/set/0.tar: has changed since its index was made, and has \d+ bytes now"
    ):
        source.read(0)
    assert level(source, 5) == 40, "the others have not"
    assert levels(opened(remote)) == [*range(200, 200 + num_images), *LEVELS[5:]]


def test_a_shard_that_changes_later(remote: FakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    one_by_one(monkeypatch)
    source = opened(remote)
    assert levels(source) == LEVELS
    remote.files["/set/0.tar"] = remote.files["/set/1.tar"]
    assert level(source, 5) == 40
    monkeypatch.setattr(remote_shards, "_BELIEVED_S", 0.0)
    with pytest.raises(UserError, match=r"/set/0.tar: has changed"):
        source.read(0)


def test_a_shard_that_changes_while_it_is_indexed(remote: FakeStore) -> None:
    def changes(method: str, path: str) -> None:
        if method == "GET":
            remote.files["/set/3.tar"] = remote.files["/set/2.tar"]

    remote.fault = changes
    with pytest.raises(UserError, match=r"/set/3.tar: "):
        opened(remote)


def test_no_more_is_kept_than_half_of_what_the_disk_has_left(
    remote: FakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(map(len, remote.files.values()))
    for held, free, whole in ((0, 2 * size, True), (0, 2 * size - 2, False), (100, 2 * size - 100, True)):
        (tmp_path / "cache/fd-scale/shards").mkdir(parents=True, exist_ok=True)
        (tmp_path / "cache/fd-scale/shards/other.tar").write_bytes(bytes(held))
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr(remote_shards.shutil, "disk_usage", lambda path, usage=usage: usage)
        assert opened(remote).shards.whole == whole, (held, free)

    def unreadable(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(remote_shards.shutil, "disk_usage", unreadable)
    assert opened(remote).shards.whole, "what cannot be kept is seen when it is fetched"


@pytest.mark.parametrize("fault", ["full", "unwritable"])
def test_a_cache_that_cannot_be_written(
    remote: FakeStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: str,
) -> None:
    def full(*arguments: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if fault == "full":
        monkeypatch.setattr(os, "posix_fallocate", full)
    else:
        monkeypatch.setenv("FD_SHARD_CACHE", str(tmp_path / "set/0.tar/shards"))
    source = opened(remote)
    remote.forget()
    assert [level(source, sample_id) for sample_id in range(18)] == LEVELS
    assert remote.num_reads() == 18
    assert caplog.text.count("its images are read one by one; make room, or set FD_SHARD_CACHE") == 1
    assert "shards that could not be kept: 1 until now" in caplog.text
    assert not list(tmp_path.rglob("*.tmp"))


def test_without_any_cache(
    remote: FakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "set/0.tar"))
    remote.files["/set/fd-scale.index"] = b"x"
    source = opened(remote)
    assert "each process reads all headers now" in caplog.text
    assert levels(source) == LEVELS
    assert level(pickle.loads(pickle.dumps(source)), 17) == LEVELS[17]


def test_a_kept_shard_that_is_damaged_is_read_from_the_store(remote: FakeStore, tmp_path: Path) -> None:
    source = opened(remote)
    assert level(source, 0) == 0
    os.truncate(shards_kept(tmp_path)[0], 100)
    assert levels(source) == LEVELS


def test_a_bad_member_and_evil_names(remote: FakeStore, tmp_path: Path) -> None:
    bad = write_tar(tmp_path / "bad.tar", [("0.png", image_file(0)[:40]), ("1.png", image_file(7))])
    remote.files["/set/0.tar"] = bad.read_bytes()
    loader = loader_of(opened(remote), 15, max_bad_fraction=0.1)
    assert next(loader.iterate(0))[0].num_bad == 1, "counted, and replaced"
    for name in ("../evil.png", "/etc/evil.png"):
        evil = write_tar(tmp_path / "evil.tar", [(name, b"")])
        remote.files["/set/0.tar"] = evil.read_bytes()
        with pytest.raises(
            UserError, match=r"/set/0.tar: member '.*evil.png' is refused, its path leads out"
        ):
            opened(remote)


@pytest.mark.slow
def test_a_fault_in_a_worker_is_its_sentence(remote: FakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    one_by_one(monkeypatch)
    source = opened(remote)
    del remote.files["/set/2.tar"]
    loader = loader_of(source, 18, micro_batch=6, num_workers=1)
    with pytest.raises(
        UserError, match=r"^http\S+/set/2.tar: is not there any more; put it back, or start again.*$"
    ):
        next(loader.iterate(0))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tar:s3://bucket/0.tar", "s3://: needs s3fs, which is not installed; run: pip install s3fs"),
        ("tar:gs://bucket/0.tar", "gs://: needs gcsfs, which is not installed"),
        ("tar:nosuch://bucket/0.tar", "nosuch://: no store is known by this name; expected one of http,"),
        ("tar:memory://bucket/{3..1}.tar", "the range in braces is empty"),
        ("tar:memory://bucket/*.tar", r"bucket/\*.tar: matches no file that the store lists"),
        ("tar:memory://bucket/0.tar", "bucket/0.tar: is not there"),
        ("parquet:memory://bucket/0.parquet", "from a store only tar shards are read"),
    ],
)
def test_wrong_addresses(monkeypatch: pytest.MonkeyPatch, spec: str, message: str) -> None:
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(UserError, match=message):
        open_source(spec)


def test_a_missing_file_that_has_a_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    """As clients of S3 raise it."""

    def gone(url: str, method: str, **options: object) -> None:
        raise FileNotFoundError(url) from ValueError("NoSuchKey")

    monkeypatch.setattr(store, "_asked_once", gone)
    assert store.state("s3://bucket/0.tar") is None
    with pytest.raises(UserError, match=r"s3://bucket/0\.tar: is not there any more"):
        store.read("s3://bucket/0.tar", 0, 10)
    assert not store._counts, "nothing was tried again"


@pytest.mark.parametrize("given", ["much", "inf", "nan"])
def test_a_size_of_the_cache_that_is_none(
    remote: FakeStore, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setenv("FD_SHARD_CACHE_GIB", given)
    with pytest.raises(UserError, match=f"FD_SHARD_CACHE_GIB: got '{given}', expected a number of GiB"):
        opened(remote)


def test_what_a_worker_gets_is_small(remote: FakeStore) -> None:
    source = opened(remote)
    assert isinstance(source.shards, RemoteShards)
    assert levels(source) == LEVELS
    assert len(pickle.dumps(source)) < 1500, "no arrays"


def test_an_index_beside_the_shards(
    remote: FakeStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "copy.index"
    spec = f"tar:{remote.url}/set/{{0..3}}.tar"
    main(["index", spec, "--out", str(out)])
    printed = capsys.readouterr().out
    assert f"{spec}: 18 images, 124 classes, 4 shards of" in printed
    assert f"{out}: a copy; beside shards in a store, as fd-scale.index" in printed
    remote.files["/set/fd-scale.index"] = out.read_bytes()
    fresh_cache(tmp_path)
    remote.forget()
    source = opened(remote)
    assert remote.sent.total() == len(out.read_bytes()), "no headers"
    assert levels(source) == LEVELS
    remote.files["/set/2.tar"] = write_tar(tmp_path / "2.tar", numbered(7, 9)).read_bytes()
    fresh_cache(tmp_path)
    changed = [*LEVELS[:8], 7, 8, *LEVELS[14:]]
    assert levels(opened(remote)) == changed, "what has changed is read"
    for damaged in (out.read_bytes()[:-20], b"", b"x" * 1000):
        remote.files["/set/fd-scale.index"] = damaged
        fresh_cache(tmp_path)
        assert levels(opened(remote)) == changed, "a damaged one spares nothing"
    # As a store answers for what is not there, to those who may not list it; and one that fails.
    for status in (403, 500):
        remote.fault = lambda _, path, status=status: status if path.endswith(".index") else None
        fresh_cache(tmp_path)
        assert levels(opened(remote)) == changed, "nor does one that may not be read"
    remote.fault = lambda *_: None
    with pytest.raises(SystemExit, match="2"):
        main(["index", spec, "--out", str(tmp_path)])
    assert f"--out: {tmp_path} cannot be written (Is a directory)" in capsys.readouterr().err


def fresh_cache(tmp_path: Path) -> None:
    for file in tmp_path.glob("cache/fd-scale/*.index"):
        file.unlink()


def test_check_says_that_shards_will_be_fetched(
    remote: FakeStore,
    recipe_values: Callable[..., dict[str, Any]],
    saved: Callable[[dict[str, Any]], str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    shards = f"{remote.url}/set/{{0..3}}.tar"
    values = recipe_values(
        "contrastive", data__train=f"tar:{shards}", data__shard_window=2, train__micro_batch=16
    )
    main(["check", saved(values)])
    printed = capsys.readouterr().out
    assert f"the recipe names nothing on the hub; but shards will, as they are read: {shards}" in printed
    assert f"tar:{shards}: 18 images, 124 classes, one of 4x3 px" in printed
    assert "1 steps an epoch" in printed
