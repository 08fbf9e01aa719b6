"""Labels that cannot be right, seen before an epoch is spent on them."""

from __future__ import annotations

import numpy as np

from fd_scale.data import UNLABELLED, Source
from fd_scale.errors import UserError

_NUM_NAMED = 5
_NUM_AT_ONCE = 2**20


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
    first, num_wrong, images_K = 0, 0, np.zeros(num_classes, dtype=np.int64)
    for start in range(0, len(labels_N), _NUM_AT_ONCE):  # a copy of a hundred million would not be small
        part_n = labels_N[start : start + _NUM_AT_ONCE]
        wrong = np.flatnonzero((part_n < UNLABELLED) | (part_n >= num_classes))
        if num_wrong == 0 and len(wrong):
            first = start + int(wrong[0])
        num_wrong += len(wrong)
        if num_wrong == 0:
            images_K += np.bincount(part_n[part_n != UNLABELLED], minlength=num_classes)
    if num_wrong:
        raise UserError(
            f"{key}: {source.name(first)} has label {labels_N[first]}, and {num_wrong - 1} more are like it; "
            f"expected 0 to {num_classes - 1}, or {UNLABELLED} for none: its file numbers the classes otherwise"
        )
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
