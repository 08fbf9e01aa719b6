"""What an index of tar shards costs at the start of a run: seconds and memory, on generated shards and indexes."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import tarfile
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from rich.table import Table

from fd_scale.data.order import order
from fd_scale.data.shards import TarSource
from fd_scale.data.tar_index import Shard, TarIndex, identified, index_of, write_shards
from fd_scale.errors import UserError
from fd_scale.finetune.labels import doubts_of_labels
from fd_scale.log import console

NUM_CLASSES = 21_841
_IMAGE_BYTES = 100 * 2**10
_NUM_READ = 10_000
_BATCH = 4096
_NUM_REPEATS = 20
_SHARD_NUMBER = b"#####"


def bench_index(num_images: int, num_shards: int, num_tars: int) -> dict[str, float]:
    """Measures a large index that is generated, and the reading of small tar files beside the opening of theirs.

    Args:
        num_images: of the generated index.
        num_shards: that it has.
        num_tars: real shards of 500 images with labels.
    """
    if min(num_images, num_shards, num_tars) < 1:
        raise UserError("--images, --shards, --tars: expected at least 1 of each")
    with tempfile.TemporaryDirectory() as folder, _cache_in(Path(folder) / "cache"):
        found = _large(Path(folder) / "large", num_images, num_shards) | _real(
            Path(folder) / "real", num_tars
        )
    table = Table("what", "value")
    for name, value in found.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else f"{value:,}")
    console.print(table)
    return found


@contextlib.contextmanager
def _cache_in(folder: Path) -> Iterator[None]:
    before = os.environ.get("XDG_CACHE_HOME")
    folder.mkdir()
    os.environ["XDG_CACHE_HOME"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("XDG_CACHE_HOME")
        if before is not None:
            os.environ["XDG_CACHE_HOME"] = before


def _large(folder: Path, num_images: int, num_shards: int) -> dict[str, float]:
    """An index as that of so many images would be; its shards are empty files, which are not read."""
    folder.mkdir()
    for shard in range(num_shards):
        (folder / f"train-{shard:05d}.tar").touch()
    shard_set = identified(sorted(str(file) for file in folder.iterdir()))
    shard_set.file.parent.mkdir(exist_ok=True)
    began = time.monotonic()
    shards = _generated(num_images, num_shards)
    TarIndex.create(shard_set.file, lambda out: write_shards(out, shard_set.identities, shards))
    written = time.monotonic() - began
    with shard_set.file.open("rb") as file:  # out of the page cache
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    found: dict[str, float] = {}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with context.Pool(1) as pool:
        for state in ("cold", "warm"):
            opened = pool.apply(_opened, (os.environ["XDG_CACHE_HOME"], f"{folder}/*.tar"))
            found |= {f"{name}_{state}": value for name, value in opened.items()}
    return {
        "images": num_images, "shards": num_shards, "index_mib": shard_set.file.stat().st_size / 2**20,
        "write_s": written, **found,
    }  # fmt: skip


def _generated(num_images: int, num_shards: int) -> Iterator[Shard]:
    rng = np.random.default_rng(0)
    name = b"n01440764/" + _SHARD_NUMBER + b"_%07d.JPEG"
    names = b"".join(name % number for number in range(-(-num_images // num_shards)))
    for shard in range(num_shards):
        count = (shard + 1) * num_images // num_shards - shard * num_images // num_shards
        sizes = rng.integers(_IMAGE_BYTES // 2, 3 * _IMAGE_BYTES // 2, count, dtype=np.uint32)
        blocks = (sizes.astype(np.int64) + 1023) // 512 * 512  # with its header
        ends = (np.arange(1, count + 1) * len(name % 0)).astype(np.uint32)
        yield Shard(
            num_bytes=int(blocks.sum()) + 1024, offsets=np.cumsum(blocks) - blocks + 512, sizes=sizes,
            labels=rng.integers(0, NUM_CLASSES, count, dtype=np.int32), name_ends=ends,
            names=names.replace(_SHARD_NUMBER, b"%05d" % shard)[: count * len(name % 0)],
        )  # fmt: skip


def _opened(cache: str, path: str) -> dict[str, float]:
    """What a process does before its first step, and what it then holds."""
    os.environ["XDG_CACHE_HOME"] = cache  # a fork server has that of when it began
    before = _resident_bytes()
    began = time.monotonic()
    source = TarSource(path)
    assert source.fingerprint
    opened = time.monotonic() - began
    index = source.index
    began = time.monotonic()
    for sample_id in np.random.default_rng(0).integers(0, len(source), _NUM_READ).tolist():
        assert index.offsets_N[sample_id] + index.sizes_N[sample_id] + index.labels_N[sample_id] > 0
        assert index.shard(sample_id) >= 0
    read = time.monotonic() - began
    after = _resident_bytes()
    began = time.monotonic()
    doubts_of_labels("data.train", source)
    labels_seen = time.monotonic() - began
    times = []
    for step in range(_NUM_REPEATS):
        began = time.monotonic()
        order(0, 0, np.arange(step * _BATCH, (step + 1) * _BATCH) % len(source), len(source))
        times.append(time.monotonic() - began)
    return {
        "open_s": opened,
        f"{_NUM_READ}_images_found_s": read,
        "mapped_bytes_per_image": (after[0] - before[0]) / len(source),
        "own_bytes_per_image": (after[1] - before[1]) / len(source),
        "labels_checked_s": labels_seen,
        f"order_of_{_BATCH}_ms": 1000 * float(np.median(times)),
    }


def _resident_bytes() -> tuple[int, int]:
    """What of this process is in memory: of mapped files, which others share, and of its own."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    mapped, own = (1024 * int(lines[name].split()[0]) for name in ("RssFile", "RssAnon"))
    return mapped, own


def _real(folder: Path, num_tars: int) -> dict[str, float]:
    folder.mkdir()
    for shard in range(num_tars):
        with tarfile.open(folder / f"train-{shard:05d}.tar", "w") as archive:
            for number in range(500):
                for suffix, data in ((".jpg", bytes(1000)), (".cls", b"%d" % number)):
                    info = tarfile.TarInfo(f"{shard:05d}_{number:07d}{suffix}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    path = f"{folder}/*.tar"
    found: dict[str, float] = {"tars": num_tars, "images_in_tars": 500 * num_tars}
    times = {}
    for name in ("scan", "open"):
        began = time.monotonic()
        TarSource(path)
        times[f"{name}_tars_s"] = time.monotonic() - began
    extra = folder / "train-99999.tar"
    extra.write_bytes((folder / "train-00000.tar").read_bytes())
    began = time.monotonic()
    TarSource(path)
    times["one_new_tar_s"] = time.monotonic() - began
    for file in Path(os.environ["XDG_CACHE_HOME"], "fd-scale").glob("real-*"):
        file.unlink()
    began = time.monotonic()
    TarSource(path, partial(index_of, processes=2))
    times["scan_by_two_processes_s"] = time.monotonic() - began
    return found | times
