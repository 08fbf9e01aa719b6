"""How an image is looked at to find its objects.

Shape legend: C = channels of an image, H, W = pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from fd_scale.config import Recipe
from fd_scale.data import fill_colour
from fd_scale.errors import UserError
from fd_scale.finetune.detection.module import View
from fd_scale.models import Backbone


class Viewer:
    """Makes the views of an image that a recipe wants.

    Args:
        recipe: resolved, of task detection.
        backbone: its model.

    Raises:
        UserError: views are wanted that the model does not take.
    """

    def __init__(self, recipe: Recipe, backbone: Backbone) -> None:
        section, mean = recipe.detection, recipe.model.mean
        assert section is not None, "a recipe of task detection has its section"
        assert mean is not None, "the recipe is resolved"
        self.side = recipe.model.size
        self.scales, self.flip_too = section.scales, section.flip_too
        self.fill = fill_colour(mean)
        self.multiple = backbone.layer_shapes()[-1][1] if backbone.takes_any_size else None
        if self.multiple is None and max(self.scales) > 1:
            raise UserError(
                f"detection.scales: {recipe.model.name} takes images of {self.side} px alone; expected numbers up to 1"
            )

    def __call__(self, image_CHW: Tensor) -> Sequence[View]:
        """Returns as many views of any image: each size, and each mirrored where that is wanted.

        Args:
            image_CHW: uint8.
        """
        views = []
        height, width = image_CHW.shape[1:]
        for scale in self.scales:
            factor = self.side * scale / max(height, width)
            new_height, new_width = (max(1, round(length * factor)) for length in (height, width))
            pixels_CHW = image_CHW.float()
            if (new_height, new_width) != (height, width):
                pixels_CHW = F.interpolate(
                    pixels_CHW[None], size=(new_height, new_width), mode="bilinear", antialias=True
                )[0]
            for mirrored in (False, True) if self.flip_too else (False,):
                seen_CHW = pixels_CHW.flip(-1) if mirrored else pixels_CHW
                ratios = (new_width / width, new_height / height)
                views.append(View(self._filled(seen_CHW), new_height, new_width, ratios, mirrored))
        return views

    def _filled(self, pixels_CHW: Tensor) -> Tensor:
        """With the model's mean colour at its right and lower edges, up to a size that the model takes."""
        height, width = pixels_CHW.shape[1:]
        full = (self.side, self.side)
        if self.multiple is not None:
            full = (-(-height // self.multiple) * self.multiple, -(-width // self.multiple) * self.multiple)
        colour = pixels_CHW.new_tensor(self.fill)[:, None, None]
        filled_CHW = colour.expand(-1, *full).clone()
        filled_CHW[:, :height, :width] = pixels_CHW
        return filled_CHW
