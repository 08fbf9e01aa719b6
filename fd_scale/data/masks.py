"""Images with masks, a class for each pixel: ADE20K, or any folder of images and masks with a list of classes.

Shape legend: H, W = pixels.
"""

import functools
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from fd_scale.data.base import IGNORED, IMAGE_SUFFIXES, UNLABELLED, Targets, content_hash
from fd_scale.data.decode import DecodeError, decode_mask
from fd_scale.data.folders import file_size, walk_images
from fd_scale.data.picture import Picture
from fd_scale.errors import UserError

NO_CLASS = "-"
"""In place of a class's name: pixels of this value are ignored."""
_UNKNOWN = 254  # a value that stands for no class; of real classes there are at most 254


class MaskValues:
    """What the pixel values of masks mean.

    Args:
        kind: of the source, as the user writes it.
        values: for the values 0, 1, ... the name of the class, or `NO_CLASS`. 255 is always ignored.

    Raises:
        UserError: there are too few or too many classes.
    """

    def __init__(self, kind: str, values: Sequence[str]) -> None:
        self.class_names = [name for name in values if name != NO_CLASS]
        num_classes = len(self.class_names)
        if not 2 <= num_classes < _UNKNOWN or len(values) > IGNORED:
            raise UserError(f"{kind}: {num_classes} classes; expected 2 to {_UNKNOWN - 1}")
        self.class_of_value = np.full(256, _UNKNOWN, dtype=np.uint8)
        self.class_of_value[IGNORED] = IGNORED
        classes = iter(range(num_classes))
        for value, name in enumerate(values):
            self.class_of_value[value] = IGNORED if name == NO_CLASS else next(classes)

    @property
    def value_of_class(self) -> list[int]:
        """The pixel value of each class."""
        return [
            int(np.flatnonzero(self.class_of_value == label)[0]) for label in range(len(self.class_names))
        ]

    @property
    def identity(self) -> list[str]:
        """What tells them from others."""
        return [*self.class_names, self.class_of_value.tobytes().hex()]

    def mask(self, data: bytes, image: Picture, where: str) -> Image.Image:
        """Decodes a mask: 8-bit grey, the class of each pixel.

        Args:
            data: its file.
            image: whose mask it is.
            where: what a person needs to find it.

        Raises:
            DecodeError: as of `decode_mask`, or it does not fit the image or the classes.
        """
        try:
            mask_HW = decode_mask(data)
        except DecodeError as error:
            raise DecodeError(f"its mask {where}: {error}") from error
        if mask_HW.shape != (image.height, image.width):
            raise DecodeError(
                f"its mask {where} is {mask_HW.shape[1]} x {mask_HW.shape[0]} px, and the image "
                f"{image.width} x {image.height}"
            )
        classes_HW = self.class_of_value[mask_HW]
        if (classes_HW == _UNKNOWN).any():
            value = int(mask_HW[classes_HW == _UNKNOWN].min())
            raise DecodeError(
                f"its mask {where} has the value {value}, which is none of the {len(self.class_names)} classes, and "
                f"not {IGNORED}, ignored"
            )
        return Image.fromarray(classes_HW)


class MaskSource:
    """Image files below a folder and, below another one, their masks as PNG files of the same names.

    Args:
        kind: of the source, as the user writes it.
        images: folder of the images.
        masks: folder of the masks.
        values: what the pixel values of a mask mean, see `MaskValues`.

    Raises:
        UserError: there are no images, one has no mask, or there are too few or too many classes.
    """

    targets: Targets = "masks"

    def __init__(self, kind: str, images: Path, masks: Path, values: Sequence[str]) -> None:
        for folder in (images, masks):
            if not folder.is_dir():
                raise UserError(f"{kind}: {folder} is not a folder; check the path, or what is below it")
        self.values = MaskValues(kind, values)
        self.class_names = self.values.class_names
        self.num_classes = len(self.class_names)
        self.images, self.masks = images, masks
        self.mask_values = self.values.value_of_class
        names = sorted(walk_images(images))
        if not names:
            raise UserError(
                f"{kind}: {images} holds no images ({' '.join(sorted(IMAGE_SUFFIXES))}); check the path"
            )
        self.names_N = np.array([os.fsencode(name) for name in names])  # as in `FileSource`
        missing = [name for name in names if not self._mask_file(name).is_file()]
        if missing:
            raise UserError(
                f"{kind}: {len(missing)} of {len(names)} images have no mask, the first misses "
                f"{self._mask_file(missing[0])}; add the masks or remove the images"
            )

    def _mask_file(self, name: str) -> Path:
        return (self.masks / name).with_suffix(".png")

    @functools.cached_property
    def fingerprint(self) -> str:
        """See `Source`: names and sizes of images and masks, and what their values mean."""
        names = [self.key(sample_id) for sample_id in range(len(self))]
        sizes = [
            f"{name} {file_size(self.images / name)} {file_size(self._mask_file(name))}" for name in names
        ]
        return content_hash([*self.values.identity, *sizes])

    def __len__(self) -> int:
        return len(self.names_N)

    def all_labels(self) -> npt.NDArray[np.int64]:
        """See `Source`: an image as a whole has no label."""
        return np.full(len(self), UNLABELLED, dtype=np.int64)

    def name(self, sample_id: int) -> str:
        return str(self.images / self.key(sample_id))

    def key(self, sample_id: int) -> str:
        return os.fsdecode(self.names_N[sample_id])

    def read(self, sample_id: int) -> tuple[Picture, Image.Image]:
        """See `Source`. What is wrong with the mask names its file."""
        file = self._mask_file(self.key(sample_id))
        try:
            image_bytes, mask_bytes = Path(self.name(sample_id)).read_bytes(), file.read_bytes()
        except OSError as error:
            raise DecodeError(f"{error.filename} cannot be read: {error.strerror}") from error
        image = Picture(image_bytes)
        return image, self.values.mask(mask_bytes, image, str(file))


def ade20k(kind: str, part: str, path: str) -> MaskSource:
    """Opens a part of ADE20K (`ADEChallengeData2016`), 150 classes; 0 is ignored.

    Args:
        kind: of the source, as the user writes it.
        part: `training`, 20,210 images, or `validation`, 2,000.
        path: its folder.
    """
    root = Path(path)
    return MaskSource(
        f"{kind}:{root}", root / "images" / part, root / "annotations" / part, [NO_CLASS, *ade20k_names()]
    )


def ade20k_names() -> list[str]:
    """Returns the names of ADE20K's 150 classes, in the order of the benchmark's masks (1 to 150)."""
    file = resources.files("fd_scale") / "data" / "ade20k_classes.txt"
    return file.read_text(encoding="utf-8").split("\n")[:-1]


def masks_folder(path: str) -> MaskSource:
    """Opens a folder of one's own: `images`, `masks` and `classes.txt`.

    Raises:
        UserError: as of `MaskSource` and `listed_classes`.
    """
    root, kind = Path(path), f"masks:{path}"
    return MaskSource(kind, root / "images", root / "masks", listed_classes(kind, root / "classes.txt"))


def listed_classes(kind: str, file: Path) -> list[str]:
    """Reads the name of the class of each pixel value, the first one of value 0; `-`: the value is ignored.

    Raises:
        UserError: there is no such list, or it has an empty line or a class twice.
    """
    try:
        names = [name.strip() for name in file.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{kind}: {file} cannot be read ({error}); expected a class in each line, the first of pixel value 0"
        ) from None
    classes = [name for name in names if name != NO_CLASS]
    if "" in classes or len(set(classes)) < len(classes):
        twice = next((name for name in classes if name and classes.count(name) > 1), "")
        wrong = f"{twice!r} twice" if twice else "an empty line"
        raise UserError(
            f"{kind}: {file} has {wrong}; expected a class of its own in each line, or {NO_CLASS}"
        )
    return names
