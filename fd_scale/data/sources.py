"""Sources of labelled images: anything that reads a sample by its number."""

import difflib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from fd_scale.config import SourceConfig, as_list
from fd_scale.data.base import Source, Targets, content_hash, object_source
from fd_scale.data.coco import coco, coco_test_dev, instances_folder, objects365
from fd_scale.data.folders import ImageFolderSource, ImageNetValidation
from fd_scale.data.masks import ade20k, masks_folder
from fd_scale.data.mixture import Mixture, filtered
from fd_scale.data.painted import PaintedSource
from fd_scale.data.parquet import ParquetSource, ade20k_parquet, masks_parquet
from fd_scale.data.picture import Picture
from fd_scale.data.shards import TarSource
from fd_scale.errors import UserError


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
            "ade20k_parquet:PATH", the same in the layout of the Hugging Face hub;
            "masks:PATH", folders `images` and `masks` with one tree of names, and the list `classes.txt`;
            "masks_parquet:PATH", columns of images and masks, and `classes.txt` beside the first file;
            "coco_train:PATH", "coco_val:PATH", "coco_test_dev:PATH", a part of COCO 2017, with instances;
            "objects365_train:PATH", "objects365_val:PATH", a part of Objects365 v2;
            "instances:PATH", a folder `images` and `instances.json` in COCO's format;
            "painted:coco_train:PATH" and so on: instances as masks, with the class `background`.
            parquet and tar take a file, a folder, a glob, a range in braces or hf://datasets/...; tar also what lies in
            a store, https://..., s3://... or gs://...

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
    "masks": ("segmentation", "ade20k_train:PATH, ade20k_val:PATH, masks:PATH or painted:coco_train:PATH"),
    "instances": ("detection", "coco_train:PATH, coco_val:PATH, objects365_train:PATH or instances:PATH"),
}


def require_targets(
    key: str, sources: str | list[SourceConfig], source: Source, wanted: Targets, annotated: bool = True
) -> None:
    """Refuses a source that has other targets than a task learns.

    Args:
        key: the setting, `data.train` or `data.evaluation`.
        sources: what it names.
        source: the same, opened.
        wanted: `Recipe.targets` of the task.
        annotated: whether images without any object are refused, as those of COCO's test parts are.

    Raises:
        UserError: it has another kind of target, or no object.
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
    if wanted == "instances" and annotated and not object_source(source).is_annotated:
        raise UserError(
            f"{key}: {sources} has no annotations, of {len(source)} images; expected at least one object"
        )


def _open(config: SourceConfig) -> Source:
    kind, colon, rest = config.source.partition(":")
    if kind not in _KINDS or not colon:
        nearest = difflib.get_close_matches(kind, _KINDS, n=1, cutoff=0)[0] + ":..."
        if not colon and Path(kind).is_dir():
            nearest = f"imagefolder:{kind}"
        raise UserError(
            f"data set {config.source!r} must be KIND:REST, KIND one of {', '.join(_KINDS)}; "
            f"nearest: '{nearest}'"
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

    def read(self, sample_id: int) -> tuple[Picture, int]:
        image = Image.fromarray(self.images_NHW[sample_id]).convert("RGB")
        return Picture.of(image), int(self.labels_N[sample_id])


def _painted(rest: str) -> Source:
    return PaintedSource(f"painted:{rest}", _open(SourceConfig(source=rest)))


_KINDS: dict[str, Callable[[str], Source]] = {
    "ade20k_parquet": ade20k_parquet,
    "ade20k_train": partial(ade20k, "ade20k_train", "training"),
    "ade20k_val": partial(ade20k, "ade20k_val", "validation"),
    "coco_test_dev": coco_test_dev,
    "coco_train": partial(coco, "coco_train", "train2017"),
    "coco_val": partial(coco, "coco_val", "val2017"),
    "digits": DigitsSource,
    "imagefolder": ImageFolderSource,
    "imagenet_val": ImageNetValidation,
    "instances": instances_folder,
    "masks": masks_folder,
    "masks_parquet": masks_parquet,
    "objects365_train": partial(objects365, "objects365_train", "train"),
    "objects365_val": partial(objects365, "objects365_val", "val"),
    "painted": _painted,
    "parquet": ParquetSource,
    "tar": TarSource,
}
