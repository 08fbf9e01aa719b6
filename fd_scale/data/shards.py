"""Tar shards as webdataset writes them, read at random: an index of headers, then one read an image."""

import collections
import functools
import io
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fd_scale.data import store
from fd_scale.data.base import IMAGE_SUFFIXES, MAX_OPEN_FILES, Labels, Targets, content_hash, data_files
from fd_scale.data.decode import DecodeError
from fd_scale.data.picture import Picture
from fd_scale.data.remote_shards import Range, RemoteShards
from fd_scale.data.tar_index import TarIndex, index_of, key_of
from fd_scale.errors import UserError

logger = logging.getLogger(__name__)


class LocalShards:
    """Reads images of shards that are files; a process opens those it reads from for itself."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths
        self._files: collections.OrderedDict[int, io.FileIO] = collections.OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what each process opens for itself."""
        return self.__dict__ | {"_files": collections.OrderedDict()}

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Returns bytes of a shard.

        Raises:
            DecodeError: it is gone, or shorter than it was.
        """
        try:
            data = os.pread(self._file(shard).fileno(), size, offset)
        except OSError as error:
            raise DecodeError(f"cannot be read: {error.strerror}") from error
        if len(data) != size:
            raise DecodeError(
                f"the shard gave {len(data)} of {size} bytes: it has been cut or changed since the start"
            )
        return data

    def keep(self, count: int) -> None:
        """Files are at hand."""

    def cached_bytes(self) -> dict[bytes, int]:
        """They are in no cache."""
        return {}

    def share_cache(self, num_bytes: int) -> None:
        """Others may have it."""

    def expect(self, ranges: Iterable[Range], coming: Range | None) -> None:
        """So are their bytes, soon enough."""

    def _file(self, shard: int) -> io.FileIO:
        # Reads carry their own offset, so that a forked process can share the handle.
        if shard not in self._files:
            if len(self._files) == MAX_OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            self._files[shard] = io.FileIO(self.paths[shard])
        self._files.move_to_end(shard)
        return self._files[shard]


class TarSource:
    """Uncompressed tar files; members of one key are a sample: an image, and `.cls` or `.json` with its label.

    Nothing is unpacked. A file `classes.txt` beside them on a disk, as `fd-scale shard` writes it, names the classes.
    """

    targets: Targets = "labels"

    def __init__(self, path: str, index: Callable[[list[str]], TarIndex] = index_of) -> None:
        """Opens a set of shards: as `data_files` takes it, and what gives their index."""
        self.paths = data_files("tar", path)
        self.index = index(self.paths)
        if not len(self.index):
            raise UserError(
                f"tar:{path} holds no images ({' '.join(sorted(IMAGE_SUFFIXES))}); check the path"
            )
        self.num_classes: int = self.index.header["num_classes"]
        self.class_names = None if store.is_remote(path) else _class_names(self.paths, self.num_classes)
        if self.class_names is not None:
            self.num_classes = len(self.class_names)
        self.shards = (
            RemoteShards(self.paths, self.index) if store.is_remote(path) else LocalShards(self.paths)
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """See `Source`: base name, bytes and images of each shard."""
        counts = zip(
            self.paths, self.index.num_bytes_S.tolist(), self.index.num_images_S.tolist(), strict=True
        )
        return content_hash(f"{os.path.basename(path)} {size} {count}" for path, size, count in counts)

    def __len__(self) -> int:
        return len(self.index)

    def all_labels(self) -> Labels:
        """See `Source`: int32, mapped."""
        return self.index.labels_N

    def name(self, sample_id: int) -> str:
        return f"{self.paths[self.index.shard(sample_id)]}:{self.index.member(sample_id)}"

    def key(self, sample_id: int) -> str:
        return key_of(self.index.member(sample_id))

    def first_of_shards(self) -> npt.NDArray[np.int64]:
        """See `Sharded`."""
        return self.index.first_S

    def keep_shards(self, count: int) -> None:
        """See `Sharded`."""
        self.shards.keep(count)

    def cached_bytes(self) -> dict[bytes, int]:
        """See `Caching`."""
        return self.shards.cached_bytes()

    def share_cache(self, num_bytes: int) -> None:
        """See `Caching`."""
        self.shards.share_cache(num_bytes)

    def expect(self, sample_ids: Iterable[int], coming: int | None) -> None:
        """See `Expecting`."""
        self.shards.expect(map(self._range, sample_ids), None if coming is None else self._range(coming))

    def read(self, sample_id: int) -> tuple[Picture, int]:
        data = self.shards.read(*self._range(sample_id))
        return Picture(data), int(self.index.labels_N[sample_id])

    def _range(self, sample_id: int) -> Range:
        index = self.index
        return index.shard(sample_id), int(index.offsets_N[sample_id]), int(index.sizes_N[sample_id])


def _class_names(paths: list[str], num_classes: int) -> list[str] | None:
    """A name a line; none where there is no such file beside all shards."""
    folders = {os.path.dirname(path) for path in paths}
    file = Path(min(folders)) / "classes.txt"
    if not num_classes or len(folders) > 1 or not file.is_file():
        return None
    try:
        names = file.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        logger.warning("%s cannot be read (%s): classes have numbers", file, error)
        return None
    if len(names) < num_classes or not all(names):
        count = len([name for name in names if name])
        logger.warning(
            "%s names %d classes, the shards there have %d: it is not read", file, count, num_classes
        )
        return None
    return names
