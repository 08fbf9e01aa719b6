"""Images as files in folders: a folder for each class, one flat folder, or ImageNet's validation as distributed."""

import functools
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.io import loadmat

from fd_scale.data.base import IMAGE_SUFFIXES, UNLABELLED, Targets, content_hash
from fd_scale.data.decode import DecodeError
from fd_scale.data.picture import Picture
from fd_scale.errors import UserError

logger = logging.getLogger(__name__)


class FileSource:
    """Image files below a folder.

    Args:
        root: the folder.
        names: of the files, relative to it, in their order.
        labels: of the files, or `UNLABELLED`.
        classes: their names; empty: there are no labels.
    """

    targets: Targets = "labels"

    def __init__(self, root: Path, names: Sequence[str], labels: Sequence[int], classes: list[str]) -> None:
        self.root = root
        # Arrays of bytes: a million file names as str would cost 100 MB in every worker.
        self.names_N = np.array([os.fsencode(name) for name in names])
        self.labels_N = np.array(labels, dtype=np.int64)
        self.class_names = classes or None
        self.num_classes = len(classes)

    @functools.cached_property
    def fingerprint(self) -> str:
        """See `Source`. Asks the file system for the size of every file, so it is computed when asked for."""
        names = map(os.fsdecode, self.names_N)
        return content_hash(f"{name} {file_size(os.path.join(self.root, name))}" for name in names)

    def __len__(self) -> int:
        return len(self.names_N)

    def all_labels(self) -> npt.NDArray[np.int64]:
        """See `Source`."""
        return self.labels_N

    def name(self, sample_id: int) -> str:
        return str(self.root / self.key(sample_id))

    def key(self, sample_id: int) -> str:
        return os.fsdecode(self.names_N[sample_id])

    def read(self, sample_id: int) -> tuple[Picture, int]:
        try:
            data = Path(self.name(sample_id)).read_bytes()
        except OSError as error:
            raise DecodeError(f"cannot be read: {error.strerror}") from error
        return Picture(data), int(self.labels_N[sample_id])


class ImageFolderSource(FileSource):
    """A folder with a sub-folder for each class (sorted by name), or a flat folder of unlabelled images."""

    def __init__(self, path: str) -> None:
        root = Path(path)
        if not root.is_dir():
            raise UserError(
                f"imagefolder:{path} is not a folder; give the folder that holds the class folders"
            )
        classes = _sorted_classes(
            e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith(".")
        )
        names, labels, others = [], [], Counter[str]()
        for label, class_name in enumerate(classes):
            found = sorted(walk_images(root / class_name, others))
            if not found:
                logger.warning("class folder %s holds no images", root / class_name)
            names += [f"{class_name}/{name}" for name in found]
            labels += [label] * len(found)
        if not classes:
            names = sorted(walk_images(root, others))
            labels = [UNLABELLED] * len(names)
        else:
            others.update(_suffix(entry.name) for entry in os.scandir(root) if entry.is_file())
        if others:
            counts = ", ".join(
                f"{count} {suffix or 'without a suffix'}" for suffix, count in others.most_common(5)
            )
            known = " ".join(sorted(IMAGE_SUFFIXES))
            logger.warning(
                "imagefolder:%s: %d files are left out: %s; images lie in class folders and end in %s",
                path, others.total(), counts, known,
            )  # fmt: skip
        if not names:
            raise UserError(
                f"imagefolder:{path} holds no images ({' '.join(sorted(IMAGE_SUFFIXES))}); check the path"
            )
        super().__init__(root, names, labels, classes)


class ImageNetValidation(FileSource):
    """ImageNet-1K's validation images as they are distributed: numbered, in one folder, with labels in the devkit.

    Below the folder lie images `ILSVRC2012_val_00000001.JPEG` ... (any of them), and of the development kit
    `ILSVRC2012_validation_ground_truth.txt` and `meta.mat`. A class is the place of its WordNet ID among all, sorted,
    as in folders named by them; the kit's own numbers are in another order.
    """

    def __init__(self, path: str) -> None:
        root = Path(path)
        numbers = {
            name: int(found[1])
            for name in sorted(walk_images(root))
            if (found := re.fullmatch(r"ILSVRC2012_val_(\d{8})\.JPEG", Path(name).name))
        }
        if not numbers:
            raise UserError(
                f"imagenet_val:{path} holds no images ILSVRC2012_val_00000001.JPEG, ...; check the path"
            )
        truths = _kit_file(root, "ILSVRC2012_validation_ground_truth.txt").read_text(encoding="ascii").split()
        last = max(numbers.values())
        if last > len(truths):
            raise UserError(
                f"imagenet_val:{path}: there is an image number {last}, and labels of {len(truths)}; "
                "expected the devkit of the same release"
            )
        wordnet_ids = _wordnet_ids(_kit_file(root, "meta.mat"))
        classes = sorted(wordnet_ids.values())
        label_of = {number: classes.index(wordnet_id) for number, wordnet_id in wordnet_ids.items()}
        strange = {truth for truth in truths if int(truth) not in label_of}
        if strange:
            raise UserError(
                f"imagenet_val:{path}: the ground truth names classes that meta.mat does not, as {min(strange)}; "
                "expected the devkit of the same release"
            )
        labels = [label_of[int(truths[number - 1])] for number in numbers.values()]
        super().__init__(root, list(numbers), labels, classes)


def _kit_file(root: Path, name: str) -> Path:
    found = next(root.rglob(name), None)
    if found is None:
        raise UserError(
            f"imagenet_val:{root}: no {name} below it; unpack ILSVRC2012_devkit_t12.tar.gz there, or name the folder "
            "that holds both it and the images"
        )
    return found


def _wordnet_ids(path: Path) -> dict[int, str]:
    """WordNet ID of each of the devkit's class numbers; its inner nodes, which have children, are no classes."""
    synsets: Any = loadmat(path, squeeze_me=True)["synsets"]
    return {
        int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets if synset["num_children"] == 0
    }


def _sorted_classes(names: Iterable[str]) -> list[str]:
    """By name; numbers, as ImageNet-V2 has them, by value."""
    classes = list(names)
    numbers = all(name.isdecimal() for name in classes)
    return sorted(classes, key=lambda name: (int(name) if numbers else 0, name))


def file_size(path: str | Path) -> int:
    """Bytes of a file; -1 where it is not there: a link to nothing is a bad sample, no end of the run."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def walk_images(folder: Path, others: Counter[str] | None = None) -> Iterator[str]:
    """Paths of the images below a folder, relative to it, unsorted; links are followed, but not to a folder above them.

    Args:
        folder: where they are.
        others: counts the suffixes of what is no image; hidden files are nothing.
    """
    for parent, folders, names in os.walk(folder, followlinks=True):
        # Around such a link each image would be found anew until the path is too long.
        folders[:] = [name for name in folders if not _leads_up(os.path.join(parent, name))]
        within = os.path.relpath(
            parent, folder
        )  # once: for each of millions of files it would be half of the time
        for name in names:
            if name.startswith("."):
                continue
            if _suffix(name) in IMAGE_SUFFIXES:
                yield name if within == "." else os.path.join(within, name)
            elif others is not None:
                others[_suffix(name)] += 1


def _leads_up(path: str) -> bool:
    """Whether it is a link to a folder that it lies in."""
    if not os.path.islink(path):
        return False
    return Path(os.path.realpath(os.path.dirname(path))).is_relative_to(os.path.realpath(path))


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()
