"""`fd-scale shard`: any source of labelled images as tar shards."""

from __future__ import annotations

import io
import logging
import os
import re
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from fd_scale import log
from fd_scale.data import Source, open_source
from fd_scale.data.base import IMAGE_SUFFIXES, UNFINISHED, UNLABELLED, Sharded
from fd_scale.data.decode import FORMATS, DecodeError
from fd_scale.data.mapped_file import written_whole
from fd_scale.data.order import ShardOrder, order
from fd_scale.data.shards import TarSource
from fd_scale.data.store import is_remote
from fd_scale.errors import UserError

logger = logging.getLogger(__name__)

_UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}
_NUM_ORDERED_AT_ONCE = 4096
# Of row groups, and of shards in a store, so many are read at a time.
_WINDOW = 8
# Where Pillow's name of a format is not that of its files.
_SUFFIXES = {"tiff": "tif", "jpeg2000": "jp2"}


class _Sample(NamedTuple):
    key: str
    members: list[tuple[str, bytes]]
    """Suffix and content of each."""
    label: int


def shard(source: str, out: str, size: str, decode: bool = False) -> Iterator[str]:
    """Writes the files of a source's images as they are, with their labels, into shards, in a random order.

    A sample is KEY.jpg (or whatever its file is) and, if it has a label, KEY.cls with the number of its class. KEY is
    the source's key without the suffix of an image and without dots. Yields lines that say what was written.

    Args:
        source: one source as in `data.train`.
        out: folder to write, empty or not there.
        size: of a shard at most, as `512MB`; a larger image has a shard of its own.
        decode: whether images are decoded, and left out where that fails; else their headers are read.

    Raises:
        UserError: a source without labels or files, a folder that is not empty or cannot be written, or shards that do
            not hold what was written.
    """
    max_bytes, folder = _bytes_of(size), Path(out)
    if "://" in out:
        raise UserError(f"shard: {out} is no folder; write to one on a disk, then upload what is in it")
    opened = open_source(source)
    if opened.targets != "labels":
        raise UserError(
            f"shard: {source} has {opened.targets}; expected a source of images with labels or none"
        )
    began, labels = time.monotonic(), Counter[int]()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"shard: {out} is not empty; give a folder of its own, or remove what is in it")
        with log.counting("images") as told:
            unnamed = _write(folder, _samples(opened, labels, told, decode), max_bytes)
        if opened.class_names is not None:
            names = "".join(f"{name}\n" for name in opened.class_names)
            (folder / "classes.txt").write_text(names, encoding="utf-8")
        elif opened.num_classes:
            logger.info("%s names no classes: there is no %s", source, folder / "classes.txt")
        for file in unnamed:
            file.rename(file.with_suffix(""))
    except OSError as error:
        raise UserError(
            f"shard: {out} cannot be written ({error.strerror}); make room, or give another folder"
        ) from None
    written = TarSource(out)
    if Counter(written.all_labels().tolist()) != labels:
        raise UserError(
            f"shard: {out} does not hold the labels that were written; check the disk, write again"
        )
    yield (
        f"tar:{out}: {len(written):,} of {len(opened):,} images, {written.num_classes:,} classes, "
        f"{len(written.paths):,} shards, {time.monotonic() - began:.1f} s; read again, count and labels agree"
    )


def _bytes_of(size: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(MB|GB|MiB|GiB)", size)
    if match is None or float(match[1]) == 0:
        raise UserError(f"--size: got {size!r}, expected a number of {', '.join(_UNITS)}, as 512MB")
    return int(float(match[1]) * _UNITS[match[2]])


def _samples(
    source: Source, labels: Counter[int], told: Callable[[int, int], None], decode: bool
) -> Iterator[_Sample]:
    """Reads a source in a random order, and counts labels; what is no image is left out with a warning."""
    by_shards = None
    files = isinstance(source, TarSource) and not is_remote(source.paths[0])
    if isinstance(source, Sharded) and not files:
        by_shards = ShardOrder(source.first_of_shards(), _WINDOW)
        source.keep_shards(_WINDOW + 1)
    for first in range(0, len(source), _NUM_ORDERED_AT_ONCE):
        positions = np.arange(first, min(first + _NUM_ORDERED_AT_ONCE, len(source)))
        ids = order(0, 0, positions, len(source)) if by_shards is None else by_shards(0, 0, positions)
        for done, sample_id in enumerate(ids.tolist(), start=first + 1):
            try:
                picture, label = source.read(sample_id)
                if decode:
                    picture.pil()
            except DecodeError as error:
                logger.warning("%s is left out, it cannot be decoded: %s", source.name(sample_id), error)
                continue
            if picture.encoded is None:
                raise UserError(
                    "shard: these images are in no files; expected imagefolder:, parquet: or tar:"
                )
            assert isinstance(label, int), "a source of labels"
            labels[label] += 1
            yield _sample(source.key(sample_id), picture.encoded, label)
            told(done, len(source))


def _sample(key: str, encoded: bytes, label: int) -> _Sample:
    stem, suffix = os.path.splitext(key)
    if suffix.lower() not in IMAGE_SUFFIXES:
        stem, suffix = key, ".jpg"
        if not encoded.startswith(b"\xff\xd8"):
            name = (Image.open(io.BytesIO(encoded), formats=FORMATS).format or "").lower()
            suffix = f".{_SUFFIXES.get(name, name)}"
    folder, base = os.path.split(stem)
    members = [(suffix.lower(), encoded)]
    if label != UNLABELLED:
        members.append((".cls", b"%d" % label))
    return _Sample(os.path.join(folder, base.replace(".", "_")), members, label)


def _write(folder: Path, samples: Iterator[_Sample], max_bytes: int) -> list[Path]:
    """Writes shards by names that no source reads: of a call that is killed, the first ones would be taken for all."""
    files: list[Path] = []
    following = next(samples, None)
    while following is not None:
        files.append(folder / f"{len(files):06d}.tar{UNFINISHED}")
        keys: set[str] = set()
        with written_whole(files[-1]) as out, tarfile.open(fileobj=out, mode="w") as archive:
            os.fchmod(out.fileno(), 0o644)  # a temporary file is its owner's alone
            while following is not None and (not keys or out.tell() + _size(following) <= max_bytes):
                if following.key in keys:
                    raise UserError(f"shard: two samples have the key {following.key!r}; rename one")
                keys.add(following.key)
                for suffix, content in following.members:
                    info = tarfile.TarInfo(following.key + suffix)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
                following = next(samples, None)
    return files


def _size(sample: _Sample) -> int:
    """Of its members with their headers, and the end mark of a tar."""
    blocks = sum(1 + -(-len(content) // tarfile.BLOCKSIZE) for _, content in sample.members)
    return blocks * tarfile.BLOCKSIZE + tarfile.RECORDSIZE
