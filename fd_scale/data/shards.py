"""Tar shards as webdataset writes them, read at random: an index of headers, then one read an image."""

import collections
import io
import json
import os
import re
import tarfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from fd_scale.data.base import IMAGE_SUFFIXES, UNLABELLED, Targets, content_hash, data_files
from fd_scale.data.decode import DecodeError, decode
from fd_scale.errors import UserError

# Some, since a network disk answers late; few, since they compute one at a time.
_NUM_SCAN_THREADS = 4
# A thousand shards are usual, and a thousand open files are what a process may have.
_MAX_OPEN_SHARDS = 256
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
# As webdataset splits a member's path into the sample's key and the rest, at the first dot of the base name.
_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.[^/]*")


class _Member(NamedTuple):
    name: str
    offset: int
    size: int


class _Shard(NamedTuple):
    """Where the images of a shard lie: arrays, since a data set has millions."""

    num_bytes: int
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    members: npt.NDArray[np.bytes_]


class TarSource:
    """Uncompressed tar files; members of one key are a sample: an image, and `.cls` or `.json` with its label.

    Nothing is unpacked. A process opens the shards it reads from for itself.
    """

    targets: Targets = "labels"
    class_names: list[str] | None = None

    def __init__(self, path: str) -> None:
        self._files: collections.OrderedDict[int, io.FileIO] = collections.OrderedDict()
        self.paths = data_files("tar", path)
        with ThreadPoolExecutor(_NUM_SCAN_THREADS) as threads:
            shards = list(threads.map(_scan, self.paths))
        num_images = [len(shard.members) for shard in shards]
        if not sum(num_images):
            raise UserError(
                f"tar:{path} holds no images ({' '.join(sorted(IMAGE_SUFFIXES))}); check the path"
            )
        self._contents = [
            f"{os.path.basename(path)} {shard.num_bytes} {len(shard.members)}"
            for path, shard in zip(self.paths, shards, strict=True)
        ]
        self.shards_N = np.repeat(np.arange(len(shards), dtype=np.int32), num_images)
        self.offsets_N = np.concatenate([shard.offsets for shard in shards])
        self.sizes_N = np.concatenate([shard.sizes for shard in shards])
        self.labels_N = np.concatenate([shard.labels for shard in shards])
        self.members_N = np.concatenate([shard.members for shard in shards])
        self.num_classes = int(self.labels_N.max()) + 1

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what each process opens for itself."""
        return self.__dict__ | {"_files": collections.OrderedDict()}

    @property
    def fingerprint(self) -> str:
        """See `Source`: base name, bytes and images of each shard."""
        return content_hash(self._contents)

    def __len__(self) -> int:
        return len(self.members_N)

    def all_labels(self) -> npt.NDArray[np.int64]:
        """See `Source`."""
        return self.labels_N

    def name(self, sample_id: int) -> str:
        return f"{self.paths[self.shards_N[sample_id]]}:{os.fsdecode(self.members_N[sample_id])}"

    def key(self, sample_id: int) -> str:
        return _key(os.fsdecode(self.members_N[sample_id]))

    def read(self, sample_id: int) -> tuple[Image.Image, int]:
        shard, size = int(self.shards_N[sample_id]), int(self.sizes_N[sample_id])
        try:
            data = os.pread(self._file(shard).fileno(), size, int(self.offsets_N[sample_id]))
        except OSError as error:
            raise DecodeError(f"cannot be read: {error.strerror}") from error
        if len(data) != size:
            raise DecodeError(
                f"the shard gave {len(data)} of {size} bytes: it has been cut or changed since the start"
            )
        return decode(data), int(self.labels_N[sample_id])

    def _file(self, shard: int) -> io.FileIO:
        # Reads carry their own offset, so that a forked process can share the handle.
        if shard not in self._files:
            if len(self._files) == _MAX_OPEN_SHARDS:
                self._files.popitem(last=False)[1].close()
            self._files[shard] = io.FileIO(self.paths[shard])
        self._files.move_to_end(shard)
        return self._files[shard]


def _key(member: str) -> str:
    """The sample that a member belongs to; empty where it belongs to none, as a hidden file does."""
    match = _KEY.fullmatch(member)
    return match[1] if match else ""


def _scan(path: str) -> _Shard:
    """Reads the headers of a shard, and the labels."""
    try:
        with open(path, "rb") as file:
            images, labels = _samples(path, file, _members(path, file))
            num_bytes = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; check the path") from None
    return _Shard(
        num_bytes,
        np.array([image.offset for image in images], dtype=np.int64),
        np.array([image.size for image in images], dtype=np.int64),
        np.array(labels, dtype=np.int64),
        np.array([os.fsencode(image.name) for image in images], dtype=np.bytes_),
    )


def _members(path: str, file: io.BufferedReader) -> list[_Member]:
    """Reads the headers, from one to the next, of a shard that is a whole and harmless tar."""
    start = file.read(6)
    for magic, method in _COMPRESSED.items():
        if start.startswith(magic):
            raise UserError(
                f"{path}: is compressed ({method}), which cannot be read at random; unpack it to a plain .tar"
            )
    file_size = file.seek(0, os.SEEK_END)
    file.seek(0)
    members = []
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for info in archive:
                _refuse_unusual(path, info)
                if info.offset_data + info.size > file_size:
                    raise UserError(f"{path}: ends inside member {info.name!r}; download it again")
                if info.isfile():
                    members.append(_Member(info.name, info.offset_data, info.size))
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


def _samples(path: str, file: io.BufferedReader, members: list[_Member]) -> tuple[list[_Member], list[int]]:
    """Returns the image and the label of each key, wherever in the shard its members are."""
    images: dict[str, _Member] = {}
    labels: dict[str, dict[str, _Member]] = {".cls": {}, ".json": {}}
    for member in members:
        key, suffix = _key(member.name), os.path.splitext(member.name)[1].lower()
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
            numbers.append(_cls_label(path, file, labels[".cls"][key]))
        elif key in labels[".json"]:
            numbers.append(_json_label(path, file, labels[".json"][key]))
        else:
            numbers.append(UNLABELLED)
    return list(images.values()), numbers


def _cls_label(path: str, file: io.BufferedReader, member: _Member) -> int:
    text = _payload(file, member)
    if not re.fullmatch(rb"\s*(-1|\d{1,9})\s*", text):
        raise UserError(f"{path}: member {member.name!r} holds {text[:20]!r}, expected the number of a class")
    return int(text)


def _json_label(path: str, file: io.BufferedReader, member: _Member) -> int:
    try:
        values = json.loads(_payload(file, member))
    except ValueError as error:
        raise UserError(
            f"{path}: member {member.name!r} is no JSON ({error}); write the shard again"
        ) from None
    label = values.get("label") if isinstance(values, dict) else None
    if label is None:
        return UNLABELLED
    if type(label) is not int or not UNLABELLED <= label < 10**9:
        raise UserError(
            f"{path}: member {member.name!r} has the label {label!r}, expected the number of a class"
        )
    return label


def _payload(file: io.BufferedReader, member: _Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)
