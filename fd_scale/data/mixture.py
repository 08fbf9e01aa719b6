"""Sources made of sources: some images of one, and several with weights."""

import codecs
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fd_scale.data.base import (
    UNLABELLED,
    Caching,
    Labels,
    Source,
    Target,
    content_hash,
    expect,
    object_source,
    pixel_source,
    sharded,
)
from fd_scale.data.objects import Objects
from fd_scale.data.picture import Picture
from fd_scale.errors import UserError

logger = logging.getLogger(__name__)


class Subset:
    """Some images of a source, in an order of their own.

    Args:
        source: where the images are.
        sample_ids_N: which of them, int64.
    """

    def __init__(self, source: Source, sample_ids_N: npt.NDArray[np.int64]) -> None:
        self.source = source
        self.sample_ids_N = sample_ids_N
        self.class_names = source.class_names
        self.num_classes = source.num_classes
        self.targets = source.targets

    def all_labels(self) -> Labels:
        """See `Source`."""
        return self.source.all_labels()[self.sample_ids_N]

    def first_of_shards(self) -> npt.NDArray[np.int64]:
        """See `Sharded`: those of the whole source, each with what is left of it."""
        assert (np.diff(self.sample_ids_N) > 0).all(), "lists of images keep their order"
        return np.searchsorted(self.sample_ids_N, sharded(self.source).first_of_shards())

    def keep_shards(self, count: int) -> None:
        """See `Sharded`."""
        sharded(self.source).keep_shards(count)

    def cached_bytes(self) -> dict[bytes, int]:
        """See `Caching`: whole shards, however few of their images are in."""
        return self.source.cached_bytes() if isinstance(self.source, Caching) else {}

    def share_cache(self, num_bytes: int) -> None:
        """See `Caching`."""
        if isinstance(self.source, Caching):
            self.source.share_cache(num_bytes)

    def expect(self, sample_ids: Iterable[int], coming: int | None) -> None:
        """See `Expecting`."""
        inner_ids = [int(self.sample_ids_N[sample_id]) for sample_id in sample_ids]
        expect(self.source, inner_ids, None if coming is None else int(self.sample_ids_N[coming]))

    @property
    def fingerprint(self) -> str:
        """See `Source`: that of the whole source, and which images are in."""
        return content_hash([self.source.fingerprint, self.sample_ids_N.tobytes().hex()])

    def __len__(self) -> int:
        return len(self.sample_ids_N)

    def name(self, sample_id: int) -> str:
        return self.source.name(int(self.sample_ids_N[sample_id]))

    def key(self, sample_id: int) -> str:
        return self.source.key(int(self.sample_ids_N[sample_id]))

    def read(self, sample_id: int) -> tuple[Picture, Target]:
        return self.source.read(int(self.sample_ids_N[sample_id]))

    @property
    def mask_values(self) -> list[int]:
        """See `PixelSource`."""
        return pixel_source(self.source).mask_values

    @property
    def category_ids(self) -> list[int]:
        """See `ObjectSource`."""
        return object_source(self.source).category_ids

    @property
    def is_annotated(self) -> bool:
        """See `ObjectSource`."""
        return any(len(self.objects(sample_id).ids_N) for sample_id in range(len(self)))

    @property
    def has_outlines(self) -> bool:
        """See `ObjectSource`."""
        return object_source(self.source).has_outlines

    @property
    def num_semantic_classes(self) -> int:
        """See `ObjectSource`."""
        return object_source(self.source).num_semantic_classes

    def objects(self, sample_id: int) -> Objects:
        """See `ObjectSource`."""
        return object_source(self.source).objects(int(self.sample_ids_N[sample_id]))


def subset(source: Source, sample_ids: Sequence[int]) -> Source:
    """Returns some images of a source, in the order of their numbers."""
    return Subset(source, np.array(sample_ids, dtype=np.int64))


def spread(source: Source, count: int) -> Source:
    """Returns so many images of a source, evenly spread over it and so over classes that lie in a row; or all."""
    if count >= len(source):
        return source
    return Subset(source, np.arange(count, dtype=np.int64) * len(source) // count)


def filtered(source: Source, only: str | None, without: str | None) -> Subset:
    """Returns those images of a source that lists keep; where several have one key, a list means all of them.

    Args:
        source: where the images are.
        only: text file, a key a line: images to keep; none: all.
        without: text file, a key a line: images to leave out; none: none.

    Raises:
        UserError: a list cannot be read, names an image that is not there, or leaves no image.
    """
    kept_N = np.ones(len(source), dtype=bool)
    for file, keeps in ((only, True), (without, False)):
        if file is not None:
            kept_N &= _listed(file, source) == keeps
    sample_ids_N = np.flatnonzero(kept_N)
    if not len(sample_ids_N):
        lists = ", ".join(filter(None, (only, without)))
        raise UserError(f"{lists}: no image is left of {len(source)}; check the lists of images")
    return Subset(source, sample_ids_N)


class Mixture:
    """Several sources one after the other, each image as often as its source weighs.

    Labels keep their meaning where all sources name the same classes; else no image has a label.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[int]) -> None:
        """Takes sources and, for each, how often its images appear in an epoch (1 or more)."""
        assert len(sources) == len(weights) >= 1, weights
        assert min(weights) >= 1, weights
        self.sources = list(sources)
        self.weights = list(weights)
        self._ends = np.cumsum(
            [len(source) * weight for source, weight in zip(sources, weights, strict=True)]
        )
        names = sources[0].class_names
        self.labels_agree = len(sources) == 1 or (
            names is not None and all(source.class_names == names for source in sources)
        )
        if not self.labels_agree:
            logger.info("labels are not used: the %d sources do not name the same classes", len(sources))
        self.class_names = names if self.labels_agree else None
        self.targets = sources[0].targets
        if kinds := {source.targets for source in sources} - {self.targets}:
            raise UserError(
                f"{len(sources)} sources, of which one has {self.targets} and one {kinds.pop()}; expected one kind"
            )
        if self.targets != "labels" and not self.labels_agree:
            raise UserError(
                f"{self.targets} of {len(sources)} sources: their classes do not have the same names in the same "
                "order; expected sources of one list of classes"
            )
        self.num_classes = sources[0].num_classes if self.labels_agree else 0
        self._share_cache()

    def _share_cache(self) -> None:
        """Tells sources with shards in stores of each other: each alone may fit into the cache, and all not."""
        caching = [source for source in self.sources if isinstance(source, Caching)]
        sizes: dict[bytes, int] = {}
        for source in caching:
            sizes |= source.cached_bytes()
        for source in caching:
            source.share_cache(sum(sizes.values()))

    def all_labels(self) -> Labels:
        """See `Source`."""
        if not self.labels_agree:
            return np.full(len(self), UNLABELLED)
        return np.concatenate(
            [
                np.tile(source.all_labels(), weight)
                for source, weight in zip(self.sources, self.weights, strict=True)
            ]
        )

    def first_of_shards(self) -> npt.NDArray[np.int64]:
        """See `Sharded`: those of each source, as often as it weighs."""
        sizes = [
            np.tile(np.diff(sharded(source).first_of_shards()), weight)
            for source, weight in zip(self.sources, self.weights, strict=True)
        ]
        return np.cumsum(np.concatenate([[0], *sizes]))

    def keep_shards(self, count: int) -> None:
        """See `Sharded`: all of them may be of one source."""
        for source in self.sources:
            sharded(source).keep_shards(count)

    def expect(self, sample_ids: Iterable[int], coming: int | None) -> None:
        """See `Expecting`."""
        found = [self._find(sample_id) for sample_id in sample_ids]
        later = None if coming is None else self._find(coming)
        for source in self.sources:
            inner_ids = [inner_id for its, inner_id in found if its is source]
            expect(source, inner_ids, later[1] if later is not None and later[0] is source else None)

    @property
    def fingerprint(self) -> str:
        """See `Source`: those of the sources, and their weights."""
        return content_hash(
            f"{weight} {source.fingerprint}"
            for source, weight in zip(self.sources, self.weights, strict=True)
        )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def name(self, sample_id: int) -> str:
        source, inner_id = self._find(sample_id)
        return source.name(inner_id)

    def key(self, sample_id: int) -> str:
        source, inner_id = self._find(sample_id)
        return source.key(inner_id)

    def read(self, sample_id: int) -> tuple[Picture, Target]:
        source, inner_id = self._find(sample_id)
        image, label = source.read(inner_id)
        return image, label if self.labels_agree else UNLABELLED

    @property
    def mask_values(self) -> list[int]:
        """See `PixelSource`: those of the first source."""
        return pixel_source(self.sources[0]).mask_values

    @property
    def category_ids(self) -> list[int]:
        """See `ObjectSource`: those of the first source."""
        return object_source(self.sources[0]).category_ids

    @property
    def is_annotated(self) -> bool:
        """See `ObjectSource`."""
        return any(object_source(source).is_annotated for source in self.sources)

    @property
    def has_outlines(self) -> bool:
        """See `ObjectSource`: whether all of them have."""
        return all(object_source(source).has_outlines for source in self.sources)

    @property
    def num_semantic_classes(self) -> int:
        """See `ObjectSource`: 0 where one of them has no maps."""
        return min(object_source(source).num_semantic_classes for source in self.sources)

    def objects(self, sample_id: int) -> Objects:
        """See `ObjectSource`."""
        source, inner_id = self._find(sample_id)
        return object_source(source).objects(inner_id)

    def _find(self, sample_id: int) -> tuple[Source, int]:
        index = int(np.searchsorted(self._ends, sample_id, side="right"))
        first = int(self._ends[index - 1]) if index else 0
        source = self.sources[index]
        return source, (sample_id - first) % len(source)


def _listed(file: str, source: Source) -> npt.NDArray[np.bool_]:
    """Whether a list names each image, whose keys are not held: of a hundred million they take 9 GiB."""
    try:
        lines = os.fsdecode(Path(file).read_bytes().removeprefix(codecs.BOM_UTF8)).splitlines()
    except OSError as error:
        raise UserError(
            f"{file}: the list of images cannot be read: {error.strerror}; check the path"
        ) from None
    found = dict.fromkeys(filter(None, lines), False)
    listed_N = np.zeros(len(source), dtype=bool)
    for sample_id in range(len(source)):
        if (key := source.key(sample_id)) in found:
            listed_N[sample_id] = found[key] = True
    unknown = sorted(key for key, is_there in found.items() if not is_there)
    if unknown:
        raise UserError(
            f"{file}: {len(unknown)} of {len(found)} keys name no image: {', '.join(unknown[:3])}; a key is, for "
            f"example, {source.key(0)}"
        )
    return listed_N
