"""A teacher: a model, frozen, with its own normalisation and input size.

Shape legend: B = images, L = tokens, D = channels of the teacher, H, W = pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fd_scale.config import TeacherConfig
from fd_scale.models import build_model, normalize


class Teacher:
    """A frozen backbone outside the trained module: in no checkpoint, seen by no optimizer.

    Args:
        config: the model and its weights.
        dtype: dtype of its forward pass.
    """

    def __init__(self, config: TeacherConfig, dtype: torch.dtype) -> None:
        self.config = config.model
        self.dtype = dtype
        # eval() for good: DeepSpeed's coordinator also mistakes a teacher in train mode under no_grad.
        self.model = build_model(config.model).to(dtype).eval().requires_grad_(False)
        self.num_features: int = self.model.num_features

    def to(self, device: torch.device) -> None:
        """Moves the teacher to a device."""
        self.model.to(device)

    @torch.no_grad()
    def features(self, images_BCHW: Tensor) -> Tensor:
        """Returns the feature map after the teacher's own final norm.

        Args:
            images_BCHW: uint8 views, as the student gets them; resized (bilinear) to the teacher's input
                size where it differs.

        Returns:
            tokens_BLD in the teacher's dtype, row-major.

        Source: arXiv 2205.14141, section 3.1.
        """
        pixels_BCHW = normalize(images_BCHW, self.config.mean, self.config.std)
        size = (self.config.img_size, self.config.img_size)
        if pixels_BCHW.shape[-2:] != size:
            pixels_BCHW = F.interpolate(pixels_BCHW, size=size, mode="bilinear", align_corners=False)
        return self.model.forward_features(pixels_BCHW.to(self.dtype))
