"""Parquet files in the layout of the Hugging Face hub: images with labels, or with masks."""

import bisect
import collections
import itertools
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from fd_scale.data.base import MAX_CLASSES, MAX_OPEN_FILES, UNLABELLED, Targets, content_hash, data_files
from fd_scale.data.decode import DecodeError
from fd_scale.data.masks import NO_CLASS, MaskValues, ade20k_names, listed_classes
from fd_scale.data.picture import Picture
from fd_scale.errors import UserError

logger = logging.getLogger(__name__)

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label", "coarse_label")
MASK_COLUMNS = ("annotation", "mask", "label", "labels", "segmentation_mask")
# A set whose images take less than this is kept in memory, in each process that reads it.
CACHE_BYTES = 256 * 2**20


class Rows:
    """Random access to struct columns {bytes, path} of parquet files.

    A set larger than `CACHE_BYTES` is read one row group at a time: random access then reads a whole row group for a
    sample.

    Args:
        path: as `data_files` takes it.
        columns: for each wanted column its usual names, of which the first that is there is taken; for the first
            column any struct with bytes will do.

    Raises:
        UserError: no files, no such columns, or not in all files.
    """

    def __init__(self, path: str, columns: Sequence[Sequence[str]]) -> None:
        self.paths = data_files("parquet", path)
        self._files: collections.OrderedDict[int, pq.ParquetFile] = collections.OrderedDict()
        self._cache: collections.OrderedDict[int, pa.Table] = collections.OrderedDict()
        self.schema = self._file(0).schema_arrow
        self._columns = _struct_columns(self.schema, self.paths[0], columns)
        self._row_groups: list[tuple[int, int]] = []  # (file, row group within the file)
        self._first_ids = [0]  # of each row group, and one past the last sample
        self._num_file_rows = []
        image_bytes = 0
        for file_id in range(len(self.paths)):
            self._require(file_id, self._columns)
            metadata = self._file(file_id).metadata
            self._num_file_rows.append(metadata.num_rows)
            for group_id in range(metadata.num_row_groups):
                group = metadata.row_group(group_id)
                self._row_groups.append((file_id, group_id))
                self._first_ids.append(self._first_ids[-1] + group.num_rows)
                image_bytes += group.total_byte_size
        self._first_of_files = list(itertools.accumulate(self._num_file_rows, initial=0))
        if len(self) == 0:
            raise UserError(f"parquet:{path} holds no rows; check the path")
        self._max_cached = len(self._row_groups) if image_bytes <= CACHE_BYTES else 1
        if self._max_cached < len(self._row_groups):
            rows = len(self) / len(self._row_groups)
            mib = image_bytes / len(self._row_groups) / 2**20
            logger.info("parquet:%s: a random read takes a row group, %.0f images, %.1f MiB", path, rows, mib)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what each process opens for itself."""
        return self.__dict__ | {
            "_files": collections.OrderedDict(),
            "_cache": collections.OrderedDict(),
        }

    def __len__(self) -> int:
        return self._first_ids[-1]

    @property
    def fingerprint(self) -> str:
        """See `Source`."""
        return content_hash(
            f"{os.path.basename(path)} {os.path.getsize(path)} {num_rows}"
            for path, num_rows in zip(self.paths, self._num_file_rows, strict=True)
        )

    def first_of_shards(self) -> npt.NDArray[np.int64]:
        """See `Sharded`: of each row group."""
        return np.array(self._first_ids)

    def keep_shards(self, count: int) -> None:
        """See `Sharded`: in the memory of each process."""
        self._max_cached = max(self._max_cached, count)

    def name(self, sample_id: int) -> str:
        """File and row."""
        file_id, _ = self._row_groups[bisect.bisect_right(self._first_ids, sample_id) - 1]
        return f"{self.paths[file_id]}:{sample_id - self._first_of_files[file_id]}"

    def integers(self, column: str) -> npt.NDArray[np.int64]:
        """Reads a whole column of integers; null is `UNLABELLED`."""
        parts = []
        for file_id in range(len(self.paths)):
            self._require(file_id, [column])
            read = self._file(file_id).read([column], use_threads=False).column(0)
            # Cast first: unsigned columns have no number for null.
            parts.append(read.cast(pa.int64(), safe=False).fill_null(UNLABELLED).to_numpy())
        return np.concatenate(parts)

    def read(self, sample_id: int) -> list[bytes]:
        """Returns the bytes of each column.

        Raises:
            DecodeError: there are none.
        """
        group = bisect.bisect_right(self._first_ids, sample_id) - 1
        found = []
        for column, name in zip(self._table(group).columns, self._columns, strict=True):
            data = column[sample_id - self._first_ids[group]].as_py()
            if data is None:
                raise DecodeError(f"the row holds no image bytes in column {name!r}")
            found.append(data)
        return found

    def _require(self, file_id: int, columns: Sequence[str]) -> None:
        names = self._file(file_id).schema_arrow.names
        for column in columns:
            if column not in names:
                raise UserError(
                    f"{self.paths[file_id]} has no column {column!r}, which {self.paths[0]} has; "
                    "give files of one data set"
                )

    def _file(self, file_id: int) -> pq.ParquetFile:
        # Memory-mapped: reads carry their own offset, so that a forked process can share the handle.
        if file_id not in self._files:
            if len(self._files) == MAX_OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            try:
                self._files[file_id] = pq.ParquetFile(self.paths[file_id], memory_map=True)
            except (OSError, pa.ArrowInvalid) as error:
                raise UserError(
                    f"{self.paths[file_id]} is no parquet file that can be read ({error}); download it again"
                ) from error
        self._files.move_to_end(file_id)
        return self._files[file_id]

    def _table(self, group: int) -> pa.Table:
        if group not in self._cache:
            while len(self._cache) >= self._max_cached:
                self._cache.popitem(last=False)
            file_id, group_id = self._row_groups[group]
            columns = [f"{column}.bytes" for column in self._columns]
            try:
                table = self._file(file_id).read_row_group(group_id, columns, use_threads=False)
            except (OSError, pa.ArrowException) as error:
                raise DecodeError(f"its row group cannot be read: {error}") from error
            self._cache[group] = table.flatten().select(columns)
        return self._cache[group]


class ParquetSource:
    """A struct column of encoded images and an integer label column."""

    targets: Targets = "labels"

    def __init__(self, path: str) -> None:
        self.rows = Rows(path, [IMAGE_COLUMNS])
        label_column = next(
            (name for name in LABEL_COLUMNS if _is_integer_column(self.rows.schema, name)), None
        )
        self.labels_N = np.full(len(self.rows), UNLABELLED)
        if label_column is not None:
            self.labels_N = self.rows.integers(label_column)
            wrong = np.flatnonzero((self.labels_N < UNLABELLED) | (self.labels_N >= MAX_CLASSES))
            if len(wrong):
                raise UserError(
                    f"{self.name(wrong[0])} has {self.labels_N[wrong[0]]} in column {label_column!r}, expected the "
                    f"number of a class, or {UNLABELLED} for none"
                )
        self.class_names = _hub_class_names(self.rows.schema, label_column)
        self.num_classes = len(self.class_names) if self.class_names else int(self.labels_N.max()) + 1

    @property
    def fingerprint(self) -> str:
        return self.rows.fingerprint

    def __len__(self) -> int:
        return len(self.rows)

    def all_labels(self) -> npt.NDArray[np.int64]:
        """See `Source`."""
        return self.labels_N

    def first_of_shards(self) -> npt.NDArray[np.int64]:
        """See `Sharded`."""
        return self.rows.first_of_shards()

    def keep_shards(self, count: int) -> None:
        """See `Sharded`."""
        self.rows.keep_shards(count)

    def name(self, sample_id: int) -> str:
        return self.rows.name(sample_id)

    def key(self, sample_id: int) -> str:
        return os.path.basename(self.name(sample_id))

    def read(self, sample_id: int) -> tuple[Picture, int]:
        [image] = self.rows.read(sample_id)
        return Picture(image), int(self.labels_N[sample_id])


class ParquetMaskSource:
    """A struct column of encoded images and one of their masks.

    Args:
        path: as `data_files` takes it.
        values: what the values of a mask mean.
    """

    targets: Targets = "masks"

    def __init__(self, path: str, values: MaskValues) -> None:
        self.rows, self.values = Rows(path, [IMAGE_COLUMNS, MASK_COLUMNS]), values
        self.class_names: list[str] | None = values.class_names
        self.num_classes = len(values.class_names)
        self.mask_values = values.value_of_class

    @property
    def fingerprint(self) -> str:
        """See `Source`: that of the files, and what the values mean."""
        return content_hash([self.rows.fingerprint, *self.values.identity])

    def __len__(self) -> int:
        return len(self.rows)

    def all_labels(self) -> npt.NDArray[np.int64]:
        """See `Source`: an image as a whole has no label."""
        return np.full(len(self), UNLABELLED, dtype=np.int64)

    def name(self, sample_id: int) -> str:
        return self.rows.name(sample_id)

    def key(self, sample_id: int) -> str:
        return os.path.basename(self.name(sample_id))

    def read(self, sample_id: int) -> tuple[Picture, Image.Image]:
        image_bytes, mask_bytes = self.rows.read(sample_id)
        image = Picture(image_bytes)
        return image, self.values.mask(mask_bytes, image, "of the same row")


def ade20k_parquet(path: str) -> ParquetMaskSource:
    """Opens ADE20K's 150 classes as parquet, as `zhoubolei/scene_parse_150` on the hub; 0 is ignored."""
    return ParquetMaskSource(path, MaskValues(f"ade20k_parquet:{path}", [NO_CLASS, *ade20k_names()]))


def masks_parquet(path: str) -> ParquetMaskSource:
    """Opens parquet files with masks; `classes.txt`, as `masks_folder` reads it, lies in the folder of the first."""
    kind = f"masks_parquet:{path}"
    file = Path(data_files("parquet", path)[0]).parent / "classes.txt"
    return ParquetMaskSource(path, MaskValues(kind, listed_classes(kind, file)))


def _struct_columns(schema: pa.Schema, path: str, wanted: Sequence[Sequence[str]]) -> list[str]:
    structs: list[str] = [
        field.name
        for field in schema
        if pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
    ]
    found: list[str] = []
    for index, names in enumerate(wanted):
        usual = [name for name in names if name in structs]
        anything = structs if len(wanted) == 1 else []
        if not (chosen := [*usual, *anything]):
            what = "image column" if index == 0 else f"column of masks ({', '.join(names)})"
            raise UserError(
                f"{path} has no {what} (a struct with the field `bytes`, as on the Hugging Face hub); "
                f"its columns are: {', '.join(f'{field.name}: {field.type}' for field in schema)}"
            )
        found.append(chosen[0])
    return found


def _is_integer_column(schema: pa.Schema, name: str) -> bool:
    return name in schema.names and pa.types.is_integer(schema.field(name).type)


def _hub_class_names(schema: pa.Schema, label_column: str | None) -> list[str] | None:
    """Class names from the data set description that the Hugging Face hub puts into its files."""
    description = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = description.get("info", {}).get("features", {})
    names: list[str] | None = features.get(label_column, {}).get("names")
    return names
