"""Tar shards as webdataset writes them, read at random: an index of headers, then one read an image."""

import collections
import functools
import io
import os
from collections.abc import Callable
from typing import Any

from fd_scale.data.base import IMAGE_SUFFIXES, Labels, Targets, content_hash, data_files
from fd_scale.data.decode import DecodeError
from fd_scale.data.picture import Picture
from fd_scale.data.tar_index import TarIndex, index_of, key_of
from fd_scale.errors import UserError

# A thousand shards are usual, and a thousand open files are what a process may have.
_MAX_OPEN_SHARDS = 256


class TarSource:
    """Uncompressed tar files; members of one key are a sample: an image, and `.cls` or `.json` with its label.

    Nothing is unpacked. A process opens the shards it reads from for itself.
    """

    targets: Targets = "labels"
    class_names: list[str] | None = None

    def __init__(self, path: str, index: Callable[[list[str]], TarIndex] = index_of) -> None:
        """Opens a set of shards: as `data_files` takes it, and what gives their index."""
        self._files: collections.OrderedDict[int, io.FileIO] = collections.OrderedDict()
        self.paths = data_files("tar", path)
        self.index = index(self.paths)
        if not len(self.index):
            raise UserError(
                f"tar:{path} holds no images ({' '.join(sorted(IMAGE_SUFFIXES))}); check the path"
            )
        self.num_classes: int = self.index.header["num_classes"]

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what each process opens for itself."""
        return self.__dict__ | {"_files": collections.OrderedDict()}

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

    def read(self, sample_id: int) -> tuple[Picture, int]:
        size = int(self.index.sizes_N[sample_id])
        try:
            file = self._file(self.index.shard(sample_id))
            data = os.pread(file.fileno(), size, int(self.index.offsets_N[sample_id]))
        except OSError as error:
            raise DecodeError(f"cannot be read: {error.strerror}") from error
        if len(data) != size:
            raise DecodeError(
                f"the shard gave {len(data)} of {size} bytes: it has been cut or changed since the start"
            )
        return Picture(data), int(self.index.labels_N[sample_id])

    def _file(self, shard: int) -> io.FileIO:
        # Reads carry their own offset, so that a forked process can share the handle.
        if shard not in self._files:
            if len(self._files) == _MAX_OPEN_SHARDS:
                self._files.popitem(last=False)[1].close()
            self._files[shard] = io.FileIO(self.paths[shard])
        self._files.move_to_end(shard)
        return self._files[shard]
