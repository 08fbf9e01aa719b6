"""A class for each pixel of a whole image, by windows, in several sizes and mirrored, in bounded memory.

An image is predicted in bands of rows. What is held of a view is its image, the logits of the windows that a later
band still needs, at the head's own resolution, and the scores of one band, of which a tensor takes at most
`BAND_BYTES`: nothing grows with classes times pixels, whatever the size of the image.

Shape legend: H, W = pixels of the image, h, w = places of a map, n = rows of a band, K = classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BAND_BYTES = 256 * 2**20
"""Of a band's scores, fp32 (K, n, W). Some four tensors of this size live at a time."""

Segment = Callable[[Tensor], Tensor]
"""images_BCHW in 0..255 -> logits_BKhw, fp32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Predictor:
    """How an image is predicted."""

    num_classes: int
    side: int
    """Of the square windows, in pixels."""
    stride: float
    """Step of the windows, as a share of their side."""
    whole: bool
    """One window, the whole image, in place of square ones."""
    multiple: int
    """A whole image is padded to sides that are multiples of this."""
    short_side: int
    """Shorter side of the resized image; 0: it keeps its size."""
    scales: tuple[float, ...]
    """Factors of that size."""
    flip_too: bool
    """Whether each size is predicted mirrored, too."""
    fill: tuple[int, int, int]
    """Colour of what a smaller image is padded with."""
    batch_size: int
    """Windows at a time."""
    band_bytes: int = BAND_BYTES

    def __call__(self, image_CHW: Tensor, segment: Segment) -> Tensor:
        """Predicts an image at its own size.

        Args:
            image_CHW: uint8 RGB.
            segment: called `num_calls` times.

        Returns:
            classes_HW, uint8: where the mean of the views' probabilities is largest.
        """
        height, width = image_CHW.shape[1:]
        views = [
            _View(self, image_CHW, size, flipped, segment) for size, flipped in self._views(height, width)
        ]
        widest = max(width, *(-(-view.width * view.height // height) for view in views))
        rows = max(1, self.band_bytes // (4 * self.num_classes * widest))
        bands = []
        for first in range(0, height, rows):
            last = min(first + rows, height)
            total_KnW = views[0].probabilities(first, last, height, width)
            for view in views[1:]:
                total_KnW += view.probabilities(first, last, height, width)
            bands.append(total_KnW.argmax(0).to(torch.uint8))
        return torch.cat(bands)

    def num_calls(self, height: int, width: int) -> int:
        """Returns how often an image of this size calls its `segment`."""
        return sum(rows * -(-columns // self.batch_size) for rows, columns in self._windows(height, width))

    def num_windows(self, height: int, width: int) -> int:
        """Returns in how many windows an image of this size is predicted."""
        return sum(rows * columns for rows, columns in self._windows(height, width))

    def _windows(self, height: int, width: int) -> Iterator[tuple[int, int]]:
        """Rows and columns of windows of each view."""
        for size, _ in self._views(height, width):
            rows, columns = (
                len(offsets(length, window, self.stride))
                for length, window in zip(size, self.window(*size), strict=True)
            )
            yield rows, columns

    def _views(self, height: int, width: int) -> Iterator[tuple[tuple[int, int], bool]]:
        """Height and width of each view, and whether it is mirrored."""
        for scale in self.scales:
            factor = scale * (self.short_side / min(height, width) if self.short_side else 1.0)
            size = (max(1, round(height * factor)), max(1, round(width * factor)))
            yield size, False
            if self.flip_too:
                yield size, True

    def window(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the windows on a resized image."""
        if not self.whole:
            return self.side, self.side
        return -(-height // self.multiple) * self.multiple, -(-width // self.multiple) * self.multiple


class _View:
    """One size of an image, perhaps mirrored; asked for bands from the top to the bottom."""

    def __init__(
        self, predictor: Predictor, image_CHW: Tensor, size: tuple[int, int], flipped: bool, segment: Segment
    ) -> None:
        self.height, self.width = size
        self.flipped = flipped
        self.segment = segment
        self.batch_size = predictor.batch_size
        self.window = predictor.window(*size)
        self.tops = offsets(self.height, self.window[0], predictor.stride)
        self.lefts = offsets(self.width, self.window[1], predictor.stride)
        pixels_CHW = image_CHW.float()
        if pixels_CHW.shape[1:] != size:
            pixels_CHW = F.interpolate(pixels_CHW[None], size=size, mode="bilinear", antialias=True)[0]
        if flipped:
            pixels_CHW = pixels_CHW.flip(-1)
        padded = tuple(max(have, need) for have, need in zip(size, self.window, strict=True))
        fill_C11 = torch.tensor(predictor.fill, dtype=torch.float32, device=image_CHW.device)[:, None, None]
        self.pixels_CHW = fill_C11.repeat(1, *padded)
        self.pixels_CHW[:, : self.height, : self.width] = pixels_CHW
        self.logits: dict[int, list[Tensor]] = {}
        """Top of a row of windows -> their logits, (K, h, w) each."""

    def probabilities(self, first: int, last: int, height: int, width: int) -> Tensor:
        """Class probabilities of rows `first` to `last` of the image, which is `height` x `width`: fp32 (K, n, W)."""
        low, high = _rows_below(first, last, height, self.height)
        sums, counts_nW = None, torch.zeros(high - low, self.width, device=self.pixels_CHW.device)
        for top in self.tops:
            start, end = max(top, low), min(top + self.window[0], high)
            if start >= end:
                continue
            for left, logits_Khw in zip(self.lefts, self._row(top), strict=True):
                right = min(left + self.window[1], self.width)
                part_KnW = _resized_rows(
                    logits_Khw, 0, logits_Khw.shape[1], start - top, end - top, *self.window
                )
                if sums is None:
                    sums = part_KnW.new_zeros(len(part_KnW), high - low, self.width)
                sums[:, start - low : end - low, left:right] += part_KnW[:, :, : right - left]
                counts_nW[start - low : end - low, left:right] += 1
        assert sums is not None, "windows cover the image"
        self._forget(_rows_below(last, last + 1, height, self.height)[0] if last < height else self.height)
        sums /= counts_nW
        logits_KnW = _resized_rows(sums, low, self.height, first, last, height, width)
        probabilities_KnW = logits_KnW.softmax(0)
        return probabilities_KnW.flip(-1) if self.flipped else probabilities_KnW

    def _row(self, top: int) -> list[Tensor]:
        """Logits of the windows whose upper edge is at `top`; each is computed once."""
        if top not in self.logits:
            rows = self.pixels_CHW[:, top : top + self.window[0]]
            windows = [rows[:, :, left : left + self.window[1]] for left in self.lefts]
            batches = [windows[at : at + self.batch_size] for at in range(0, len(windows), self.batch_size)]
            self.logits[top] = [logits for batch in batches for logits in self.segment(torch.stack(batch))]
        return self.logits[top]

    def _forget(self, row: int) -> None:
        """Drops what no band from `row` on needs."""
        self.logits = {top: row_of for top, row_of in self.logits.items() if top + self.window[0] > row}


def offsets(length: int, window: int, stride: float) -> list[int]:
    """Returns where windows begin so that they cover a length: a stride apart, the last one at its end.

    Args:
        length: in pixels.
        window: in pixels.
        stride: as a share of the window, above 0, at most 1.
    """
    step = max(1, int(window * stride))
    last = max(length - window, 0)
    return [*range(0, last, step), last]


def _rows_below(first: int, last: int, height: int, source_height: int) -> tuple[int, int]:
    """Rows of a map, from and to, that the rows `first` to `last` of its resize to `height` lie between."""
    positions = _positions(torch.tensor([first, last - 1]), height, source_height)
    return int(positions[0].floor()), min(int(positions[1].floor()) + 2, source_height)


def _positions(rows_n: Tensor, height: int, source_height: int) -> Tensor:
    """Where rows of a resize lie in its source, fp64: pixels are areas, as in `F.interpolate` without align_corners."""
    return ((rows_n.double() + 0.5) * source_height / height - 0.5).clamp(0, source_height - 1)


def _resized_rows(
    map_Khw: Tensor, low: int, source_height: int, first: int, last: int, height: int, width: int
) -> Tensor:
    """Rows of the bilinear resize of a map, (K, n, width), of which only some rows are there.

    Args:
        map_Khw: rows `low` and on of a map with `source_height` rows, all its columns.
        low: see above.
        source_height: see above.
        first: first row of the resize that is wanted.
        last: the one behind the last.
        height: of the whole resize.
        width: likewise.
    """
    positions_n = _positions(torch.arange(first, last, device=map_Khw.device), height, source_height)
    above_n = positions_n.floor().long()
    below_n = (above_n + 1).clamp(max=source_height - 1)
    weight_n1 = (positions_n - above_n).to(map_Khw.dtype)[:, None]
    rows_Knw = torch.lerp(map_Khw[:, above_n - low], map_Khw[:, below_n - low], weight_n1)
    if rows_Knw.shape[2] == width:
        return rows_Knw
    return F.interpolate(rows_Knw[None], size=(last - first, width), mode="bilinear")[0]
