"""An index of tar shards: where their images lie, and their labels, in a `MappedFile`.

Names of members come first, shard by shard, then a column for each property of a shard or of an image. Of an image 20
bytes may come to lie in memory, when all of its properties but the name have been asked for: offset 8, size 4, label 4,
end of the name 4. Its shard is found by the first image of each.

The file is one for a set of shards, named by all their names, sizes and times: to open it is to map one file, of
whatever size, and workers and ranks share its pages. A set that has changed gets a new file, into which unchanged
shards are copied from the files before.

Shape legend: S = shards, N = images.
"""

from __future__ import annotations

import contextlib
import glob
import io
import itertools
import json
import logging
import multiprocessing
import os
import re
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fd_scale.data import store
from fd_scale.data.base import IMAGE_SUFFIXES, MAX_CLASSES, UNLABELLED, content_hash
from fd_scale.data.mapped_file import Columns, MappedFile, cache_file, make_once, unwritable, written_whole
from fd_scale.data.store import State
from fd_scale.errors import UserError

logger = logging.getLogger(__name__)

VERSION = 1
PUBLISHED = "fd-scale.index"
"""Name of an index that lies beside shards in a store."""
# Some, since a network disk answers late; few, since they compute one at a time.
_NUM_SCAN_THREADS = 4
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
# As webdataset splits a member's path into the sample's key and the rest, at the first dot of the base name.
_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.[^/]*")
_LABELS = (".cls", ".json")
# Linux gives 2 GiB a read at most: an image of more is a bad sample, whatever its size.
_MAX_SIZE = 2**32 - 1
# Of older indexes of the same folder, so many are searched for shards that have not changed.
_NUM_OLDER = 4
_CLOCK_REALTIME_COARSE = 5
"""Linux's clock of a file's time, which moves every few milliseconds."""
_CLOCKS_AGREE_NS = 10**8


class _Member(NamedTuple):
    name: str
    offset: int
    size: int
    label: bytes = b""
    """All of it, where it may hold a label."""


class Shard(NamedTuple):
    """Where the images of a shard lie."""

    num_bytes: int
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.uint32]
    labels: npt.NDArray[np.int32]
    name_ends: npt.NDArray[np.uint32]
    """Where in `names` the name of each ends."""
    names: bytes
    """Of the members, one behind the other."""


class ShardSet(NamedTuple):
    """Files, and what tells them from what they were before."""

    folder: str
    """What they all lie in."""
    stem: str
    """What the names of all indexes of the folder begin with."""
    states: list[State]
    identities: list[str]
    """As `identity_of` has them."""
    file: Path
    """Where the index lies."""


class TarIndex(MappedFile):
    """What is known of the images of all shards, one shard after the other."""

    MAGIC = b"FDTARS1\n"
    CONTENT, ORIGIN = "shards", "the tar files"

    def _open(self) -> None:
        super()._open()
        columns = self.columns
        self.identities_S: npt.NDArray[np.bytes_] = columns["identities"]
        self.num_bytes_S: npt.NDArray[np.int64] = columns["num_bytes"]
        self.num_images_S: npt.NDArray[np.int64] = columns["num_images"]
        self.first_S: npt.NDArray[np.int64] = columns["first"]
        """First image of each shard; and one past the last image."""
        self.first_name_byte_S: npt.NDArray[np.int64] = columns["first_name_byte"]
        self.offsets_N: npt.NDArray[np.int64] = columns["offsets"]
        self.sizes_N: npt.NDArray[np.uint32] = columns["sizes"]
        self.labels_N: npt.NDArray[np.int32] = columns["labels"]
        self.name_ends_N: npt.NDArray[np.uint32] = columns["name_ends"]

    def __len__(self) -> int:
        return len(self.offsets_N)

    def shard(self, sample_id: int) -> int:
        """Returns the number of the shard that an image lies in."""
        return int(np.searchsorted(self.first_S, sample_id, side="right")) - 1

    def member(self, sample_id: int) -> str:
        """Returns the path of an image in its shard."""
        shard = self.shard(sample_id)
        first = int(self.first_name_byte_S[shard])
        start = first + (int(self.name_ends_N[sample_id - 1]) if sample_id > self.first_S[shard] else 0)
        return os.fsdecode(self.bytes[start : first + int(self.name_ends_N[sample_id])].tobytes())

    def part(self, shard: int) -> Shard:
        """Returns what it holds of a shard, mapped."""
        own = slice(*self.first_S[shard : shard + 2].tolist())
        first, ends = int(self.first_name_byte_S[shard]), self.name_ends_N[own]
        return Shard(
            num_bytes=int(self.num_bytes_S[shard]),
            offsets=self.offsets_N[own], sizes=self.sizes_N[own], labels=self.labels_N[own], name_ends=ends,
            names=self.bytes[first : first + (int(ends[-1]) if len(ends) else 0)].tobytes(),
        )  # fmt: skip


def write_shards(
    out: IO[bytes], identities: Iterable[str], shards: Iterable[Shard]
) -> tuple[Columns, dict[str, Any]]:
    """Fills a `TarIndex`: names are written as the shards come, 20 bytes of an image are held until all have come.

    Args:
        out: the file.
        identities: what changes when a shard does, hexadecimal.
        shards: what is in them.
    """
    parts, first_name_bytes = [], []
    for shard in shards:
        first_name_bytes.append(out.tell())
        out.write(shard.names)
        parts.append(shard._replace(names=b""))
    counts = [len(part.offsets) for part in parts]
    labels = [int(part.labels.max()) for part in parts if len(part.labels)]
    columns: Columns = {
        "identities": np.array([identity.encode() for identity in identities]),
        "num_bytes": np.array([part.num_bytes for part in parts], dtype=np.int64),
        "num_images": np.array(counts, dtype=np.int64),
        "first": np.cumsum([0, *counts], dtype=np.int64),
        "first_name_byte": np.array(first_name_bytes, dtype=np.int64),
        **{name: [getattr(part, name) for part in parts] for name in ("offsets", "sizes", "labels", "name_ends")},
    }  # fmt: skip
    return columns, {"num_classes": max(labels, default=UNLABELLED) + 1}


def identified(paths: list[str]) -> ShardSet:
    """Looks at the sizes and times of shards.

    Raises:
        UserError: one is gone.
    """
    folders = {os.path.dirname(_whole(path)) for path in paths}
    folder = os.path.commonpath(folders)
    folder = folder.replace(":/", "://", 1) if store.is_remote(paths[0]) else os.path.realpath(folder)
    stem = f"{os.path.basename(folder)[:40] or 'root'}-{content_hash([folder, str(VERSION)])[:16]}"
    states = _states(paths)
    identities = [identity_of(path, state) for path, state in zip(paths, states, strict=True)]
    return ShardSet(folder, stem, states, identities, cache_file(stem, identities))


def identity_of(path: str, state: State) -> str:
    """Returns what changes when a shard does: a hash of its path or URL, its size, and its time or version."""
    return content_hash([_whole(path), *map(str, state)])


def index_of(
    paths: list[str],
    *,
    processes: int = 0,
    told: Callable[[int, int], None] | None = None,
    in_memory: bool = True,
) -> TarIndex:
    """Opens the index of shards; the first call makes it, and others wait for that one.

    Args:
        paths: the shards.
        processes: so many read headers; 0: threads of this one do.
        told: is called with how many shards have been read, and of how many, as they come.
        in_memory: whether a cache that cannot be written is a warning, and each process has an index in its memory.

    Raises:
        UserError: a shard is refused; or the cache cannot be written, and must be.
    """
    shard_set = identified(paths)
    file, states, identities = shard_set.file, shard_set.states, shard_set.identities

    def fill(out: IO[bytes]) -> tuple[Columns, dict[str, Any]]:
        began = time.monotonic()
        known = _known(shard_set)
        if store.is_remote(paths[0]) and not known.keys() >= set(identities):
            _fetch_published(shard_set)
            known = _known(shard_set)
        unknown = [path for path, identity in zip(paths, identities, strict=True) if identity not in known]
        logger.info(
            "%s: an index of %d shards is made, once; %d are new", shard_set.folder, len(paths), len(unknown)
        )
        if not store.is_remote(paths[0]):
            _let_clock_pass(max(int(state.version) for state in states))
        with _executor(min(processes, len(unknown))) as executor:
            scanned = _counted(executor.map(_scan, unknown), len(unknown), told)
            shards = (
                known[identity][0].part(known[identity][1]) if identity in known else next(scanned)
                for identity in identities
            )
            filled = write_shards(out, identities, shards)
        for path, state, now in zip(paths, states, _states(paths), strict=True):
            if now != state:
                raise UserError(f"{path}: has changed while it was read; start again when it is written")
        logger.info("%s: indexed in %.0f s", shard_set.folder, time.monotonic() - began)
        return filled

    try:
        make_once(file, lambda: TarIndex.create(file, fill))
    except OSError as error:
        if not in_memory:
            raise unwritable(file, error) from None
        logger.warning(
            "%s; each process reads all headers now, and holds what is in them", unwritable(file, error)
        )
        buffer = io.BytesIO()
        TarIndex.write(buffer, fill)
        return TarIndex(buffer.getvalue())
    return TarIndex(file)


def _whole(path: str) -> str:
    return path if store.is_remote(path) else os.path.abspath(path)


def _states(paths: list[str]) -> list[State]:
    """Sizes of shards, and their times or versions."""
    return store.states(paths) if store.is_remote(paths[0]) else [_state(path) for path in paths]


def _state(path: str) -> State:
    try:
        found = os.stat(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; check the path") from None
    return State(found.st_size, str(found.st_mtime_ns))


def _let_clock_pass(newest_ns: int) -> None:
    """Waits, some milliseconds, until what is written to a file from now on gives it another time."""
    while 0 <= newest_ns - time.clock_gettime_ns(_CLOCK_REALTIME_COARSE) < _CLOCKS_AGREE_NS:
        time.sleep(0.001)


def _known(shards: ShardSet) -> dict[str, tuple[TarIndex, int]]:
    """Finds shards in older indexes of their folder: of each identity, the index and the shard's number in it."""
    files = shards.file.parent.glob(f"{glob.escape(shards.stem)}-*.index")
    indexes = []
    # They only spare work: one that is damaged, or that somebody removes now, spares none.
    with contextlib.suppress(OSError):
        for file in sorted(files, key=lambda file: file.stat().st_mtime_ns)[-_NUM_OLDER:]:
            with contextlib.suppress(OSError, UserError):
                indexes.append(TarIndex(file))
    return {
        identity.decode(): (index, shard)
        for index in indexes
        for shard, identity in enumerate(index.identities_S.tolist())
    }


def _fetch_published(shards: ShardSet) -> None:
    """Lays the index that somebody put beside shards in a store among the older ones here, if there is one."""
    url = f"{shards.folder}/{PUBLISHED}"

    def fetched(file: Path, size: int) -> None:
        with written_whole(file) as out:
            store.fetch(url, size, out)

    # It only spares work: where there is no place for it, or the store fails, it spares none. Of a file that is not
    # there, stores say to those who may not list them that it may not be read.
    try:
        state = store.state(url)
        if state is None:
            logger.info("%s: is not there; with it no headers would be read", url)
            return
        file = cache_file(shards.stem, [url, *map(str, state)])
        make_once(file, lambda: fetched(file, state.size))
        os.utime(file)  # among the newest
    except (OSError, UserError) as error:
        logger.info("no index beside the shards is used: %s", error)


def _executor(processes: int) -> Executor:
    if processes < 2:
        return ThreadPoolExecutor(_NUM_SCAN_THREADS)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return ProcessPoolExecutor(processes, mp_context=context)


def _counted(shards: Iterable[Shard], total: int, told: Callable[[int, int], None] | None) -> Iterator[Shard]:
    for number, shard in enumerate(shards, start=1):
        if told is not None:
            told(number, total)
        yield shard


def key_of(member: str) -> str:
    """The sample that a member belongs to; empty where it belongs to none, as a hidden file does."""
    match = _KEY.fullmatch(member)
    return match[1] if match else ""


def _scan(path: str) -> Shard:
    """Reads the headers of a shard, and the labels; all of one in a store passes by, once."""
    try:
        with store.opened(path) if store.is_remote(path) else open(path, "rb") as file:
            images, labels = _samples(path, _members(path, file))
            num_bytes = file.seek(0, os.SEEK_END)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; check the path") from None
    names = [os.fsencode(image.name) for image in images]
    return Shard(
        num_bytes=num_bytes,
        offsets=np.array([image.offset for image in images], dtype=np.int64),
        sizes=np.array([min(image.size, _MAX_SIZE) for image in images], dtype=np.uint32),
        labels=np.array(labels, dtype=np.int32),
        name_ends=np.array(list(itertools.accumulate(map(len, names))), dtype=np.uint32),
        names=b"".join(names),
    )


def _members(path: str, file: io.BufferedReader) -> list[_Member]:
    """Reads the headers, from one to the next, of a shard that is a whole and harmless tar."""
    file_size = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = file.read(6)
    for magic, method in _COMPRESSED.items():
        if start.startswith(magic):
            raise UserError(
                f"{path}: is compressed ({method}), which cannot be read at random; unpack it to a plain .tar"
            )
    file.seek(0)
    members = []
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for info in archive:
                _refuse_unusual(path, info)
                if info.offset_data + info.size > file_size:
                    raise UserError(f"{path}: ends inside member {info.name!r}; download it again")
                if info.isfile():
                    label = b""
                    if info.name.lower().endswith(_LABELS):
                        file.seek(info.offset_data)
                        label = file.read(info.size)
                    members.append(_Member(info.name, info.offset_data, info.size, label))
            end = archive.offset  # tarfile itself stops at damage as at the end
    except tarfile.TarError as error:
        raise UserError(f"{path}: is no tar file, or a damaged one ({error}); download it again") from None
    file.seek(end)
    # The end is marked by two blocks of zeros, and filled up with zeros to the size of a tape record.
    rest = file.read(2**20)
    if len(rest) < 2 * tarfile.BLOCKSIZE or rest.strip(b"\0"):
        last = f"after member {members[-1].name!r}" if members else "at its start"
        raise UserError(f"{path}: is cut off or damaged {last}, it has no end mark there; download it again")
    return members


def _refuse_unusual(path: str, info: tarfile.TarInfo) -> None:
    """Refuses what no writer of data shards makes: a sign of a wrong or a hostile file."""
    if info.name.startswith("/") or ".." in info.name.split("/"):
        reason = "its path leads out of the shard"
    elif info.issym() or info.islnk():
        reason = f"it is a link to {info.linkname!r}"
    elif not (info.isfile() or info.isdir()):
        reason = "it is a device or a pipe"
    elif info.issparse():
        reason = "it is a sparse file"
    elif info.size < 0:
        reason = "its size is negative"
    else:
        return
    raise UserError(
        f"{path}: member {info.name!r} is refused, {reason}; expected plain files of a data set, check where the "
        "shard comes from"
    )


def _samples(path: str, members: list[_Member]) -> tuple[list[_Member], list[int]]:
    """Returns the image and the label of each key, wherever in the shard its members are."""
    images: dict[str, _Member] = {}
    labels: dict[str, dict[str, _Member]] = {suffix: {} for suffix in _LABELS}
    for member in members:
        key, suffix = key_of(member.name), os.path.splitext(member.name)[1].lower()
        if not key:
            continue
        if suffix in labels:
            labels[suffix][key] = member
        elif suffix in IMAGE_SUFFIXES:
            if key in images:
                raise UserError(
                    f"{path}: sample {key!r} has two images, {images[key].name!r} and {member.name!r}; a key ends at "
                    "the first dot of a file's name, write the shard with one image a key"
                )
            images[key] = member
    numbers = []
    for key in images:
        if key in labels[".cls"]:
            numbers.append(_cls_label(path, labels[".cls"][key]))
        elif key in labels[".json"]:
            numbers.append(_json_label(path, labels[".json"][key]))
        else:
            numbers.append(UNLABELLED)
    return list(images.values()), numbers


def _cls_label(path: str, member: _Member) -> int:
    text = member.label
    if not re.fullmatch(rb"\s*(-1|\d{1,9})\s*", text):
        raise UserError(f"{path}: member {member.name!r} holds {text[:20]!r}, expected the number of a class")
    return int(text)


def _json_label(path: str, member: _Member) -> int:
    try:
        values = json.loads(member.label)
    except ValueError as error:
        raise UserError(
            f"{path}: member {member.name!r} is no JSON ({error}); write the shard again"
        ) from None
    label = values.get("label") if isinstance(values, dict) else None
    if label is None:
        return UNLABELLED
    if type(label) is not int or not UNLABELLED <= label < MAX_CLASSES:
        raise UserError(
            f"{path}: member {member.name!r} has the label {label!r}, expected the number of a class"
        )
    return label
