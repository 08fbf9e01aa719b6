"""Teachers' features on disk: a record of one size for each image and view, in files that are whole or not there.

    FOLDER/manifest.json, FOLDER/view_0/000000.features, ...

A record is followed by its CRC-32. A file holds the records of as many images as make 256 MiB, in the source's order.

Shape legend: B = images of a batch, N = images of a file, R = bytes of a record.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fd_scale.errors import UserError

_FILE_BYTES = 2**28
_CHECKSUM_BYTES = 4


class FeatureFiles:
    """Where the records of a source's images lie; a copy is cheap, and for a worker.

    Args:
        folder: theirs.
        record_bytes: R.
        num_samples: images of the source.
        num_views: of each image; the training views of epoch e are those of view e modulo this number.
        file_bytes: how large a file becomes.
    """

    def __init__(
        self,
        folder: Path,
        record_bytes: int,
        num_samples: int,
        num_views: int = 1,
        file_bytes: int = _FILE_BYTES,
    ) -> None:
        self.folder, self.record_bytes = folder, record_bytes
        self.num_samples, self.num_views = num_samples, num_views
        self._stride = record_bytes + _CHECKSUM_BYTES
        self.samples_per_file = max(1, file_bytes // self._stride)

    def open(self, identity: dict[str, Any], *, make: bool) -> None:
        """Compares what the files were made from with what is wanted; all of it is in the manifest.

        Args:
            identity: JSON values.
            make: whether a folder without a manifest becomes one of this identity; else all files must be there.

        Raises:
            UserError: the files are other ones, some are missing, or the folder cannot be written.
        """
        ours = json.loads(json.dumps(identity | {"record_bytes": self.record_bytes}))
        manifest = self.folder / "manifest.json"
        how = "run `fd-scale features` with this recipe"
        if make and not manifest.exists():
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                _write_whole(manifest, json.dumps(ours, indent=1).encode())
            except OSError as error:
                raise self._unwritable(error) from None
        try:
            theirs = dict(json.loads(manifest.read_bytes()))
        except FileNotFoundError:
            raise UserError(f"{self.folder}: holds no features; {how}") from None
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{manifest}: cannot be read ({error}); remove the folder, and {how}") from None
        for key in sorted(ours.keys() | theirs.keys()):
            if ours.get(key) != theirs.get(key):
                raise UserError(
                    f"{self.folder}: its features were made with {key}={json.dumps(theirs.get(key))}, this recipe has "
                    f"{json.dumps(ours.get(key))}; restore it, or give distill.features.folder another one"
                )
        if not make and (missing := self.missing()):
            raise UserError(
                f"{self.folder}: {len(missing)} of {self.num_views * self._files_per_view} files are not there, as "
                f"{self._path(*missing[0])}; {how}, it makes them"
            )

    @property
    def _files_per_view(self) -> int:
        return -(-self.num_samples // self.samples_per_file)

    @property
    def file_bytes(self) -> int:
        """Of all files but the last of each view."""
        return min(self.samples_per_file, self.num_samples) * self._stride

    def missing(self) -> list[tuple[int, int]]:
        """Returns view and number of each file that is not there."""
        found: list[tuple[int, int]] = []
        for view in range(self.num_views):
            here = (
                {entry.name for entry in os.scandir(folder)}
                if (folder := self._view(view)).is_dir()
                else set()
            )
            found += [(view, n) for n in range(self._files_per_view) if self._path(view, n).name not in here]
        return found

    def samples(self, number: int) -> range:
        """Returns the images of a file."""
        first = number * self.samples_per_file
        return range(first, min(first + self.samples_per_file, self.num_samples))

    def write(self, view: int, number: int, records_NR: npt.NDArray[np.uint8]) -> None:
        """Writes a file that is seen whole or not at all, and stays after a power cut.

        Raises:
            UserError: it cannot be written.
        """
        assert records_NR.shape == (len(self.samples(number)), self.record_bytes), records_NR.shape
        checksums_N = np.array([zlib.crc32(record_R) for record_R in records_NR], dtype="<u4")
        checked = np.concatenate(
            [records_NR, checksums_N.view(np.uint8).reshape(-1, _CHECKSUM_BYTES)], axis=1
        )
        try:
            self._view(view).mkdir(exist_ok=True)
            _write_whole(self._path(view, number), checked.tobytes())
        except OSError as error:
            raise self._unwritable(error) from None

    def read(self, view: int, sample_ids: Sequence[int]) -> npt.NDArray[np.uint8]:
        """Returns the records of some images, uint8 (B, R).

        Raises:
            UserError: a file cannot be read, or a record is not what was written.
        """
        records_BR = np.empty((len(sample_ids), self.record_bytes), dtype=np.uint8)
        for record_R, sample_id in zip(records_BR, sample_ids, strict=True):
            number, place = divmod(sample_id, self.samples_per_file)
            path = self._path(view, number)
            try:
                # Opened anew: of thousands of files in random order, none is worth keeping.
                file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    data = os.pread(file, self._stride, place * self._stride)
                finally:
                    os.close(file)
            except OSError as error:
                raise UserError(f"{path}: cannot be read: {error.strerror}") from None
            record, checksum = data[: self.record_bytes], data[self.record_bytes :]
            if (
                len(data) != self._stride
                or zlib.crc32(record).to_bytes(_CHECKSUM_BYTES, "little") != checksum
            ):
                raise UserError(
                    f"{path}: the features of image {sample_id} are damaged; remove the file, "
                    "`fd-scale features` makes it again"
                )
            record_R[:] = np.frombuffer(record, dtype=np.uint8)
        return records_BR

    def _view(self, view: int) -> Path:
        return self.folder / f"view_{view}"

    def _path(self, view: int, number: int) -> Path:
        return self._view(view) / f"{number:06d}.features"

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"distill.features.folder: {self.folder} cannot be written ({error.strerror})")


def _write_whole(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
