"""Teachers' features on disk: a record of one size for each image and view, in files that are whole or not there.

    FOLDER/manifest.json, FOLDER/view_0/000000.features, ...

A record is followed by the number of the image that it is of, 8 bytes, which is another one where an image could not be
decoded and was replaced, and by the CRC-32 of both. A file holds the records of as many images as make 256 MiB, in the
source's order.

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

from fd_scale.data.mapped_file import written_whole
from fd_scale.errors import UserError

_FILE_BYTES = 2**28
_ID_BYTES = 8
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
        self._stride = record_bytes + _ID_BYTES + _CHECKSUM_BYTES
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
                with written_whole(manifest) as out:
                    out.write(json.dumps(ours, indent=1).encode())
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
                    f"{json.dumps(ours.get(key))}; restore it, give distill.features.folder another one, or remove "
                    f"{self.folder}: `fd-scale features` makes what is not there"
                )
        if not make and (missing := self.missing()):
            of = self.num_views * self._files_per_view
            raise UserError(
                f"{self.folder}: {len(missing)} of {of} files are not there, or cut off, as "
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
        """Returns view and number of each file that is not there, or not as long as it was written."""
        found: list[tuple[int, int]] = []
        for view in range(self.num_views):
            folder = self._view(view)
            here = (
                {entry.name: entry.stat().st_size for entry in os.scandir(folder)} if folder.is_dir() else {}
            )
            found += [
                (view, number)
                for number in range(self._files_per_view)
                if here.get(self._path(view, number).name) != len(self.samples(number)) * self._stride
            ]
        return found

    def samples(self, number: int) -> range:
        """Returns the images of a file."""
        first = number * self.samples_per_file
        return range(first, min(first + self.samples_per_file, self.num_samples))

    def write(
        self, view: int, number: int, records_NR: npt.NDArray[np.uint8], read_ids_N: npt.NDArray[np.int64]
    ) -> None:
        """Writes a file that is seen whole or not at all, and stays after a power cut.

        Args:
            view: which.
            number: of the file.
            records_NR: of its images.
            read_ids_N: the images that were really read for them.

        Raises:
            UserError: it cannot be written.
        """
        assert records_NR.shape == (len(self.samples(number)), self.record_bytes), records_NR.shape
        ids = read_ids_N.astype("<i8").view(np.uint8).reshape(-1, _ID_BYTES)
        named = np.concatenate([records_NR, ids], axis=1)
        checksums_N = np.array([zlib.crc32(row) for row in named], dtype="<u4")
        checked = np.concatenate([named, checksums_N.view(np.uint8).reshape(-1, _CHECKSUM_BYTES)], axis=1)
        try:
            self._view(view).mkdir(exist_ok=True)
            with written_whole(self._path(view, number)) as out:
                out.write(checked.tobytes())
        except OSError as error:
            raise self._unwritable(error) from None

    def read(self, view: int, sample_ids: Sequence[int], read_ids: Sequence[int]) -> npt.NDArray[np.uint8]:
        """Returns the records of some images, uint8 (B, R).

        Args:
            view: which.
            sample_ids: the images.
            read_ids: those that were really read for them.

        Raises:
            UserError: a file cannot be read, a record is not what was written, or is of another image than was read.
        """
        records_BR = np.empty((len(sample_ids), self.record_bytes), dtype=np.uint8)
        for record_R, sample_id, read_id in zip(records_BR, sample_ids, read_ids, strict=True):
            number, place = divmod(sample_id, self.samples_per_file)
            path = self._path(view, number)
            named = self._named_record(path, place)
            if named is None:
                raise UserError(
                    f"{path}: the features of image {sample_id} are damaged; remove the file, "
                    "`fd-scale features` makes it again"
                )
            known_id = int.from_bytes(named[self.record_bytes :], "little")
            if known_id != read_id:
                raise UserError(
                    f"{path}: the features of image {sample_id} are of image {known_id}, and image {read_id} was read "
                    "now: not the same images could be decoded; mend the data, remove the file, run "
                    "`fd-scale features` again"
                )
            record_R[:] = np.frombuffer(named, dtype=np.uint8, count=self.record_bytes)
        return records_BR

    def _named_record(self, path: Path, place: int) -> bytes | None:
        """A record and the number of its image; none where that is not what was written."""
        try:
            # Opened anew: of thousands of files in random order, none is worth keeping.
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                data = os.pread(file, self._stride, place * self._stride)
            finally:
                os.close(file)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        named, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
        whole = (
            len(data) == self._stride and zlib.crc32(named).to_bytes(_CHECKSUM_BYTES, "little") == checksum
        )
        return named if whole else None

    def _view(self, view: int) -> Path:
        return self.folder / f"view_{view}"

    def _path(self, view: int, number: int) -> Path:
        return self._view(view) / f"{number:06d}.features"

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"distill.features.folder: {self.folder} cannot be written ({error.strerror})")
