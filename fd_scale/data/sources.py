"""Sources of labelled images: anything that reads a sample by its number."""

import bisect
import collections
import difflib
import json
import logging
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from fd_scale.config import SourceConfig, as_list
from fd_scale.data.base import UNLABELLED, Source, Targets, content_hash, data_files, object_source
from fd_scale.data.coco import (
    coco_test_dev,
    coco_training,
    coco_validation,
    instances_folder,
    objects365_training,
    objects365_validation,
)
from fd_scale.data.decode import DecodeError, decode
from fd_scale.data.folders import ImageFolderSource, ImageNetValidation
from fd_scale.data.masks import ade20k_training, ade20k_validation, masks_folder
from fd_scale.data.mixture import Mixture, filtered
from fd_scale.data.shards import TarSource
from fd_scale.errors import UserError

logger = logging.getLogger(__name__)

LABEL_COLUMNS = ("label", "labels", "fine_label", "coarse_label")
# A parquet set whose images take less than this is kept in memory, in each process that reads it.
PARQUET_CACHE_BYTES = 256 * 2**20


def open_source(sources: str | list[SourceConfig]) -> Source:
    """Opens a data set.

    Args:
        sources: "KIND:REST", or a list of such with weights and filters:
            "digits:train" or "digits:test", the 8 x 8 digits that come with scikit-learn;
            "imagefolder:PATH", a folder for each class, or a flat folder without labels;
            "imagenet_val:PATH", ImageNet-1K's validation images as they are distributed, with the development kit;
            "parquet:PATH", files in the layout of the Hugging Face hub;
            "tar:PATH", shards in the layout of webdataset;
            "ade20k_train:PATH", "ade20k_val:PATH", a part of ADEChallengeData2016, with masks;
            "masks:PATH", folders `images` and `masks` with one tree of names, and the list `classes.txt`;
            "coco_train:PATH", "coco_val:PATH", "coco_test_dev:PATH", a part of COCO 2017, with instances;
            "objects365_train:PATH", "objects365_val:PATH", a part of Objects365 v2;
            "instances:PATH", a folder `images` and `instances.json` in COCO's format.
            parquet and tar take a file, a folder, a glob, a range in braces or hf://datasets/...

    Returns:
        The source; never empty.

    Raises:
        UserError: unknown kind, missing path, no images in it, or a filter that does not fit.
    """
    configs = as_list(sources)
    opened = [_open(config) for config in configs]
    weights = [config.weight for config in configs]
    return opened[0] if weights == [1] else Mixture(opened, weights)


# Of masks and instances: the task that learns them, and sources that have them.
_LEARNED = {
    "masks": ("segmentation", "ade20k_train:PATH, ade20k_val:PATH or masks:PATH"),
    "instances": ("detection", "coco_train:PATH, coco_val:PATH, objects365_train:PATH or instances:PATH"),
}


def require_targets(key: str, sources: str | list[SourceConfig], source: Source, wanted: Targets) -> None:
    """Refuses a source that has other targets than a task learns.

    Args:
        key: the setting, `data.train` or `data.evaluation`.
        sources: what it names.
        source: the same, opened.
        wanted: `Recipe.targets` of the task.

    Raises:
        UserError: it has another kind of target; or training images have no object.
    """
    if source.targets != wanted:
        if wanted != "labels":
            task, expected = _LEARNED[wanted]
            raise UserError(
                f"{key}: {sources} has no {wanted}, which task {task} learns; expected {expected}"
            )
        raise UserError(
            f"{key}: {sources} has {source.targets}, which only task {_LEARNED[source.targets][0]} learns; name its "
            "images, imagefolder:PATH/images, or another source"
        )
    if wanted == "instances" and key == "data.train" and not object_source(source).is_annotated:
        raise UserError(
            f"{key}: {sources} has no annotations, of {len(source)} images; expected at least one object"
        )


def _open(config: SourceConfig) -> Source:
    kind, colon, rest = config.source.partition(":")
    if kind not in _KINDS or not colon:
        nearest = difflib.get_close_matches(kind, _KINDS, n=1, cutoff=0)[0]
        raise UserError(
            f"data set {config.source!r} must be KIND:REST, KIND one of {', '.join(_KINDS)}; "
            f"nearest: '{nearest}:...'"
        )
    source = _KINDS[kind](rest)
    if config.only is None and config.without is None:
        return source
    return filtered(source, config.only, config.without)


class DigitsSource:
    """scikit-learn's digits, 1797 images of 8 x 8 pixels; every 6th image is in the test part."""

    targets: Targets = "labels"

    def __init__(self, split: str) -> None:
        if split not in ("train", "test"):
            raise UserError(
                f"digits has the parts train and test, got {split!r}; write digits:train or digits:test"
            )
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise UserError(
                f"digits:{split} needs scikit-learn, which is not installed; run: pip install scikit-learn"
            ) from error
        digits = load_digits()
        is_test = np.arange(len(digits.target)) % 6 == 0
        chosen = is_test if split == "test" else ~is_test
        self.split = split
        self.images_NHW = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
        self.labels_N = digits.target[chosen].astype(np.int64)
        self.class_names: list[str] | None = [str(digit) for digit in range(10)]
        self.num_classes = 10

    @property
    def fingerprint(self) -> str:
        return content_hash([f"digits:{self.split}", self.images_NHW.tobytes().hex()])

    def __len__(self) -> int:
        return len(self.labels_N)

    def all_labels(self) -> npt.NDArray[np.int64]:
        """See `Source`."""
        return self.labels_N

    def name(self, sample_id: int) -> str:
        return f"digits:{self.split}:{sample_id}"

    def key(self, sample_id: int) -> str:
        return str(sample_id)

    def read(self, sample_id: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images_NHW[sample_id]).convert("RGB"), int(self.labels_N[sample_id])


class ParquetSource:
    """Parquet files with a struct column {bytes, path} of encoded images and an integer label column.

    A set larger than `PARQUET_CACHE_BYTES` is read one row group at a time: random access then
    reads a whole row group for a sample.
    """

    targets: Targets = "labels"

    def __init__(self, path: str) -> None:
        self.paths = data_files("parquet", path)
        self._files: dict[int, pq.ParquetFile] = {}
        self._cache: collections.OrderedDict[int, pa.ChunkedArray] = collections.OrderedDict()
        schema = self._file(0).schema_arrow
        self._image_column = _image_column(schema, self.paths[0])
        label_column = next((name for name in LABEL_COLUMNS if _is_integer_column(schema, name)), None)
        self._row_groups: list[tuple[int, int]] = []  # (file, row group within the file)
        self._first_ids = [0]  # of each row group, and one past the last sample
        self._num_file_rows = []
        image_bytes = 0
        labels = []
        for file_id in range(len(self.paths)):
            metadata = self._check_schema(file_id, label_column)
            self._num_file_rows.append(metadata.num_rows)
            for group_id in range(metadata.num_row_groups):
                group = metadata.row_group(group_id)
                self._row_groups.append((file_id, group_id))
                self._first_ids.append(self._first_ids[-1] + group.num_rows)
                image_bytes += group.total_byte_size
            if label_column:
                column = self._file(file_id).read([label_column], use_threads=False).column(0)
                labels.append(column.fill_null(UNLABELLED).to_numpy().astype(np.int64))
        if len(self) == 0:
            raise UserError(f"parquet:{path} holds no rows; check the path")
        self.labels_N = np.concatenate(labels) if labels else np.full(len(self), UNLABELLED)
        self.class_names = _hub_class_names(schema, label_column)
        self.num_classes = len(self.class_names) if self.class_names else int(self.labels_N.max()) + 1
        self._max_cached = len(self._row_groups) if image_bytes <= PARQUET_CACHE_BYTES else 1
        if self._max_cached < len(self._row_groups):
            rows = len(self) / len(self._row_groups)
            mib = image_bytes / len(self._row_groups) / 2**20
            logger.info("parquet:%s: a random read takes a row group, %.0f images, %.1f MiB", path, rows, mib)

    def _check_schema(self, file_id: int, label_column: str | None) -> pq.FileMetaData:
        names = self._file(file_id).schema_arrow.names
        for column in filter(None, (self._image_column, label_column)):
            if column not in names:
                raise UserError(
                    f"{self.paths[file_id]} has no column {column!r}, which {self.paths[0]} has; "
                    "give files of one data set"
                )
        return self._file(file_id).metadata

    def _file(self, file_id: int) -> pq.ParquetFile:
        # Memory-mapped: reads carry their own offset, so that a forked process can share the handle.
        if file_id not in self._files:
            try:
                self._files[file_id] = pq.ParquetFile(self.paths[file_id], memory_map=True)
            except pa.ArrowInvalid as error:
                raise UserError(
                    f"{self.paths[file_id]} is no parquet file ({error}); download it again"
                ) from error
        return self._files[file_id]

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what each process opens for itself."""
        return self.__dict__ | {"_files": {}, "_cache": collections.OrderedDict()}

    @property
    def fingerprint(self) -> str:
        return content_hash(
            f"{os.path.basename(path)} {os.path.getsize(path)} {num_rows}"
            for path, num_rows in zip(self.paths, self._num_file_rows, strict=True)
        )

    def __len__(self) -> int:
        return self._first_ids[-1]

    def all_labels(self) -> npt.NDArray[np.int64]:
        """See `Source`."""
        return self.labels_N

    def name(self, sample_id: int) -> str:
        file_id, _ = self._row_groups[bisect.bisect_right(self._first_ids, sample_id) - 1]
        return f"{self.paths[file_id]}:{sample_id - sum(self._num_file_rows[:file_id])}"

    def key(self, sample_id: int) -> str:
        return os.path.basename(self.name(sample_id))

    def read(self, sample_id: int) -> tuple[Image.Image, int]:
        group = bisect.bisect_right(self._first_ids, sample_id) - 1
        struct = self._images(group)[sample_id - self._first_ids[group]].as_py()
        if struct is None or struct["bytes"] is None:
            raise DecodeError("the row holds no image bytes")
        return decode(struct["bytes"]), int(self.labels_N[sample_id])

    def _images(self, group: int) -> pa.ChunkedArray:
        if group not in self._cache:
            while len(self._cache) >= self._max_cached:
                self._cache.popitem(last=False)
            file_id, group_id = self._row_groups[group]
            columns = [f"{self._image_column}.bytes"]
            try:
                table = self._file(file_id).read_row_group(group_id, columns, use_threads=False)
            except (OSError, pa.ArrowException) as error:
                raise DecodeError(f"its row group cannot be read: {error}") from error
            self._cache[group] = table.column(0)
        return self._cache[group]


def _image_column(schema: pa.Schema, path: str) -> str:
    structs: list[str] = [
        field.name
        for field in schema
        if pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
    ]
    for name in ("image", "img", *structs):
        if name in structs:
            return name
    raise UserError(
        f"{path} has no image column (a struct with the field `bytes`, as on the Hugging Face hub); "
        f"its columns are: {', '.join(f'{field.name}: {field.type}' for field in schema)}"
    )


def _is_integer_column(schema: pa.Schema, name: str) -> bool:
    return name in schema.names and pa.types.is_integer(schema.field(name).type)


def _hub_class_names(schema: pa.Schema, label_column: str | None) -> list[str] | None:
    """Class names from the data set description that the Hugging Face hub puts into its files."""
    description = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = description.get("info", {}).get("features", {})
    names: list[str] | None = features.get(label_column, {}).get("names")
    return names


_KINDS: dict[str, Callable[[str], Source]] = {
    "ade20k_train": ade20k_training,
    "ade20k_val": ade20k_validation,
    "coco_test_dev": coco_test_dev,
    "coco_train": coco_training,
    "coco_val": coco_validation,
    "digits": DigitsSource,
    "imagefolder": ImageFolderSource,
    "imagenet_val": ImageNetValidation,
    "instances": instances_folder,
    "masks": masks_folder,
    "objects365_train": objects365_training,
    "objects365_val": objects365_validation,
    "parquet": ParquetSource,
    "tar": TarSource,
}
