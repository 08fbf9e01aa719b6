"""Objects as classes of pixels: what a segmentation learns from the annotations of a detection."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from fd_scale.data.base import IGNORED, Labels, Source, Targets, content_hash
from fd_scale.data.masks import NO_CLASS, MaskValues
from fd_scale.data.objects import Objects, Window, mask_in
from fd_scale.data.picture import Picture
from fd_scale.errors import UserError

BACKGROUND = "background"


class PaintedSource:
    """Images of a source of objects, each pixel of an object with its class, all others of the class `background`.

    Where objects overlap, the smaller one is seen. Crowds are ignored.

    Args:
        kind: of the source, as the user writes it.
        source: with objects that have outlines.

    Raises:
        UserError: it has none, or too many classes.
    """

    targets: Targets = "masks"

    def __init__(self, kind: str, source: Source) -> None:
        if source.targets != "instances" or not getattr(source, "has_outlines", False):
            raise UserError(
                f"{kind}: expected a source of objects with outlines behind `painted:`, coco_train:PATH, coco_val:PATH "
                "or instances:PATH"
            )
        self.source = source
        names: Sequence[str] = source.class_names or []
        if NO_CLASS in names:
            raise UserError(f"{kind}: a category is called {NO_CLASS!r}, which means no class; rename it")
        values = MaskValues(kind, [BACKGROUND, *names])
        self.class_names, self.mask_values = values.class_names, values.value_of_class
        self.num_classes = len(self.class_names)

    @property
    def fingerprint(self) -> str:
        """See `Source`."""
        return content_hash(["painted", self.source.fingerprint])

    def __len__(self) -> int:
        return len(self.source)

    def all_labels(self) -> Labels:
        """See `Source`: an image as a whole has no label."""
        return self.source.all_labels()

    def name(self, sample_id: int) -> str:
        return self.source.name(sample_id)

    def key(self, sample_id: int) -> str:
        return self.source.key(sample_id)

    def read(self, sample_id: int) -> tuple[Picture, Image.Image]:
        """See `Source`."""
        image, objects = self.source.read(sample_id)
        assert isinstance(objects, Objects), "a source of objects"
        whole = Window(0, 0, objects.width, objects.height, objects.width, objects.height)
        classes_HW = np.zeros((objects.height, objects.width), dtype=np.uint8)
        for index in np.argsort(-objects.areas_N, kind="stable"):
            mask_HW = mask_in(objects.outlines[index], objects, whole) > 0
            classes_HW[mask_HW] = IGNORED if objects.crowd_N[index] else objects.labels_N[index] + 1
        return image, Image.fromarray(classes_HW)
