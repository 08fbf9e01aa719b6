"""Labels that cannot be right, seen before an epoch is spent on them."""

from __future__ import annotations

import numpy as np

from fd_scale.data import UNLABELLED, Source
from fd_scale.errors import UserError

_NUM_NAMED = 5


def doubts_of_labels(key: str, source: Source) -> list[str]:
    """Looks at the labels of a source, without reading an image.

    Args:
        key: setting that names it, for messages.
        source: its classes are 0 to `num_classes` - 1.

    Returns:
        Sentences about what is suspicious: classes without an image, and among them the first one, as where labels
        begin at 1.

    Raises:
        UserError: a label is none of the classes.
    """
    labels_N, num_classes = source.all_labels(), source.num_classes
    wrong_N = np.flatnonzero((labels_N < UNLABELLED) | (labels_N >= num_classes))
    if len(wrong_N):
        first = int(wrong_N[0])
        raise UserError(
            f"{key}: {source.name(first)} has label {labels_N[first]}, and {len(wrong_N) - 1} more are like it; "
            f"expected 0 to {num_classes - 1}, or {UNLABELLED} for none: its file numbers the classes otherwise"
        )
    images_K = np.bincount(labels_N[labels_N != UNLABELLED], minlength=num_classes)
    empty = np.flatnonzero(images_K == 0)
    if not len(empty):
        return []
    named = ", ".join(
        f"{label} ({source.class_names[label]})" if source.class_names else str(label)
        for label in empty[:_NUM_NAMED]
    )
    more = f" and {len(empty) - _NUM_NAMED} more" if len(empty) > _NUM_NAMED else ""
    shifted = "; are labels counted from 1?" if empty[0] == 0 and len(empty) == 1 else ""
    return [f"{key}: no image of {len(empty)} of {num_classes} classes: {named}{more}{shifted}"]
