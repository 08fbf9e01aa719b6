"""What every source of images has in common."""

import glob
import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Protocol, cast, runtime_checkable

import numpy as np
import numpy.typing as npt
from PIL import Image

from fd_scale import hub
from fd_scale.data import store
from fd_scale.data.objects import Objects
from fd_scale.data.picture import Picture
from fd_scale.errors import UserError

UNLABELLED = -1
"""Label of an image without one."""
MAX_CLASSES = 10**9
"""More than any data set has: a larger number is a date, a hash or an identity of something else."""
UNFINISHED = ".unfinished"
"""Ends the name of a shard while others of its set are still to be written."""
MAX_OPEN_FILES = 256
"""Of a set's, in a process: a thousand are usual, and a thousand open files are what a process may have."""
IGNORED = 255
"""Class of a pixel without one."""
Targets = Literal["labels", "masks", "instances"]
"""What is known of an image: one label, a class for each pixel, or the objects in it."""
Labels = npt.NDArray[np.signedinteger[Any]]
"""A label of each image: int64, or int32 where they are many."""
Target = int | Image.Image | Objects
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif"}
)

# What distinguishes the files of one part of a data set: 7 in train-7.tar, 7-of-9 in train-7-of-9.parquet.
_NUMBER = re.compile(r"([-_.]?\d+(-of-\d+.*)?)?\.\w+$")
_PARTS = re.compile(r"(?<![a-z])(train|test|val|validation)(?![a-z])")


class Source(Protocol):
    """A data set with random access. It must be picklable: loader workers get a copy."""

    @property
    def class_names(self) -> list[str] | None:
        """Name of each label, or None where the data set does not tell."""

    @property
    def targets(self) -> Targets:
        """What the target of every sample is."""

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 where nothing is labelled."""

    def all_labels(self) -> Labels:
        """Label of each sample, -1 where it has none; known without reading images."""

    @property
    def fingerprint(self) -> str:
        """Hash of what identifies the content cheaply: file names, sizes, counts; no absolute path."""

    def __len__(self) -> int: ...

    def name(self, sample_id: int) -> str:
        """What a person needs to find the sample: a path, or a file and its row."""

    def key(self, sample_id: int) -> str:
        """Name of the sample within its source, wherever that lies: what lists of samples hold, a line each."""

    def read(self, sample_id: int) -> tuple[Picture, Target]:
        """Returns the image and its target.

        That is its label, `UNLABELLED` (-1) where it has none; or a mask of the image's size, 8-bit grey, of classes
        and `IGNORED` (255); or its objects.

        Raises:
            DecodeError: the image cannot be read, or its mask or its objects do not fit it.
        """


class PixelSource(Source, Protocol):
    """A source whose targets are masks."""

    @property
    def mask_values(self) -> list[int]:
        """Of each label, the value of its pixels in the data set's own files."""


class ObjectSource(Source, Protocol):
    """A source whose targets are instances."""

    @property
    def category_ids(self) -> list[int]:
        """Of each label, the number that the data set's own files give it."""

    @property
    def is_annotated(self) -> bool:
        """Whether any image has an object."""

    @property
    def has_outlines(self) -> bool:
        """Whether objects have outlines, polygons or masks, and not boxes alone."""

    @property
    def num_semantic_classes(self) -> int:
        """Classes of the maps of pixels that images have beside their objects; 0: they have none."""

    def objects(self, sample_id: int) -> Objects:
        """Returns what `read` does beside the image, without reading that."""


@runtime_checkable
class Sharded(Protocol):
    """A source whose samples lie in shards, which are better read a few at a time."""

    def first_of_shards(self) -> npt.NDArray[np.int64]:
        """Returns the first sample of each shard, rising from 0, and one past the last sample."""

    def keep_shards(self, count: int) -> None:
        """Is told that from now on so many shards are read at a time, and then no more: it keeps them at hand."""


@runtime_checkable
class Expecting(Protocol):
    """A source that reads sooner what it is told of."""

    def expect(self, sample_ids: Iterable[int], coming: int | None) -> None:
        """Is told what will be read next; and a sample of a shard that is read from after that."""


@runtime_checkable
class Caching(Protocol):
    """A source whose shards a cache of this node may hold."""

    def cached_bytes(self) -> dict[bytes, int]:
        """Returns of each shard that may lie there what identifies it, and its size."""

    def share_cache(self, num_bytes: int) -> None:
        """Is told how much all sources have that are read at the same time."""


def expect(source: object, sample_ids: Iterable[int], coming: int | None = None) -> None:
    """Tells a source what will be read next, if it wants to know."""
    if isinstance(source, Expecting):
        source.expect(sample_ids, coming)


def sharded(source: object) -> Sharded:
    """Returns a source that has shards, by its own type.

    Raises:
        UserError: it has none.
    """
    if not isinstance(source, Sharded):
        raise UserError(
            "data.shard_window: an order by shards is for sources tar: and parquet:, alone or in a list, and one of "
            "data.train is another; set data.shard_window=0"
        )
    return source


def pixel_source(source: Source) -> PixelSource:
    """Returns a source of masks, or of parts of such, by its own type."""
    assert source.targets == "masks", source.targets
    return cast(PixelSource, source)


def object_source(source: Source) -> ObjectSource:
    """Returns a source of instances, or of parts of such, by its own type."""
    assert source.targets == "instances", source.targets
    return cast(ObjectSource, source)


def data_files(kind: str, path: str) -> list[str]:
    """Finds the files of a data set, sorted.

    Args:
        kind: "parquet" or "tar", which is the files' suffix as well.
        path: a file, a folder, a glob, each with braces or not, or `hf://datasets/ORG/NAME/PATTERN`; for "tar" also
            URLs of a store, with braces or `*`, or of a folder, with its `/` at the end.

    Raises:
        UserError: there are none, one of a range is missing, or a folder holds several parts.
    """
    if store.is_remote(path):
        if kind != "tar":
            raise UserError(
                f"{kind}:{path}: from a store only tar shards are read; write these images as such: fd-scale shard"
            )
        return store.files(f"{path}*.{kind}" if path.endswith("/") else path)
    if path.startswith(hub.PREFIX):
        return [str(file) for file in hub.cached(hub.dataset_files(path))]
    if not os.path.isdir(path):
        found = set()
        for pattern in hub.expand_braces(path):
            matches = glob.glob(pattern, recursive=True)
            if not matches:
                raise UserError(
                    f"{kind}:{path}: {pattern} matches no file; give a file, a folder or a quoted glob"
                )
            found.update(matches)
        return _finished(kind, path, sorted(found))
    files = sorted(str(file) for file in Path(path).rglob(f"*.{kind}"))
    if not files:
        raise UserError(f"{kind}:{path} is a folder without *.{kind} files; check the path")
    parts = sorted({_NUMBER.sub("", os.path.basename(file)) for file in files})
    if len(parts) > 1 and any(_PARTS.search(part) for part in parts):
        raise UserError(
            f"{kind}:{path} holds several parts ({', '.join(parts)}), which must not be mixed; "
            f"choose one, like {kind}:{path.rstrip('/')}/**/{parts[-1]}*.{kind}"
        )
    return _finished(kind, path, files)


def _finished(kind: str, path: str, files: list[str]) -> list[str]:
    """Refuses files beside which others wait for their names: `fd-scale shard` was killed while it gave them."""
    for folder in sorted({os.path.dirname(file) for file in files}):
        left = next(Path(folder).glob(f"*.{kind}{UNFINISHED}"), None)
        if left is not None:
            raise UserError(
                f"{kind}:{path}: {left} is of a call of `fd-scale shard` that has not ended; wait for it, or, if it "
                "was killed, remove the folder and call it again"
            )
    return files


def content_hash(items: Iterable[str]) -> str:
    """Returns a hash of strings, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for item in items:
        digest.update(os.fsencode(item) + b"\0")
    return digest.hexdigest()
