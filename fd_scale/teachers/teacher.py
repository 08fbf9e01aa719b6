"""A teacher: a model, frozen, with its own normalisation, input size and targets.

Shape legend: B = images, L = tokens, D = channels of a target, H, W = pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fd_scale.config import TeacherConfig
from fd_scale.cuda_graphs import record
from fd_scale.errors import UserError
from fd_scale.models import Backbone, build_model, cls_and_patches, normalize, resolved_model
from fd_scale.models.position_bias import ContinuousPositionBias
from fd_scale.placement import WHOLE, Placement


@dataclass(frozen=True)
class Target:
    """One thing that a teacher gives: its shape."""

    num_features: int
    """D."""
    grid: tuple[int, int] | None
    """Rows and columns of its patch tokens; None for one feature an image."""
    has_cls: bool
    """Whether a CLS token comes before the patch tokens."""

    @property
    def num_tokens(self) -> int:
        """L."""
        return 1 if self.grid is None else self.grid[0] * self.grid[1] + self.has_cls


class Teacher:
    """A frozen backbone outside the trained module: in no checkpoint, seen by no optimizer.

    Args:
        config: the model, its weights, and which of its features are targets.
        dtype: dtype of its forward pass.
        placement: where its parameters are.

    Attributes:
        targets: what `features` gives, in order.
        drop_path_rates: of its residual branches that can be dropped; empty where none are.

    Raises:
        UserError: the model does not give such a target.
    """

    def __init__(self, config: TeacherConfig, dtype: torch.dtype, placement: Placement = WHOLE) -> None:
        self.config = config
        self.dtype = dtype
        self.img_size = resolved_model(config.model).size
        self.targets = targets_of(config)  # before minutes are spent on a large model
        # eval() for good: DeepSpeed's coordinator also mistakes a teacher in train mode under no_grad.
        self.placement = placement
        with placement.building(dtype):
            self.model = build_model(config.model, config.target)
        self.model.to(dtype).eval().requires_grad_(False)
        self.drop_path_rates = self.model.drop_path_rates if config.drop_path else ()
        if config.drop_path and not any(self.drop_path_rates):
            raise UserError(
                f"distill.teachers.drop_path: {config.model.name} has no branch that can be dropped; set its "
                "model.overrides.drop_path_rate, or drop_path to false"
            )
        self.run: Callable[..., list[Tensor]] = _Targets(self.model, config)

    def to(self, device: torch.device) -> None:
        """Moves the teacher to a device, for good; all ranks call it."""
        for module in self.model.modules():
            # ZeRO-3 wants each forward to gather what the one before did.
            if isinstance(module, ContinuousPositionBias) and self.placement is WHOLE:
                module.constant = True
        self.run = self.placement.frozen(_Targets(self.model, self.config), device, self.dtype)

    @torch.no_grad()
    def record(self, num_images: int, device: torch.device) -> None:
        """Makes `features` of so many images replay a CUDA graph; the teacher is whole, and on the device."""
        assert isinstance(self.run, nn.Module), "a teacher that is whole"
        pixels_BCHW = torch.zeros(
            num_images, 3, self.img_size, self.img_size, dtype=self.dtype, device=device
        )
        scales = [torch.ones(len(self.drop_path_rates), num_images, device=device)]
        name = f"teacher {self.config.model.name}"
        record(self.run, pixels_BCHW, *(scales if self.drop_path_rates else []), name=name)

    @torch.no_grad()
    def features(self, images_BCHW: Tensor, drop_path_scale_RB: Tensor | None = None) -> list[Tensor]:
        """Returns the targets for a batch of views; where it is partitioned, all ranks call it equally often.

        Args:
            images_BCHW: uint8 views, as the student gets them; resized (bilinear) to the teacher's input
                size where it differs.
            drop_path_scale_RB: 0 or 1 / keep probability for each of `drop_path_rates`; none: nothing is dropped.

        Returns:
            For each of `targets` a tensor (B, L, D) in the teacher's dtype: the feature map after the teacher's
            own final norm, CLS first where it has one and registers dropped; or L = 1, one feature an image.

        Source: arXiv 2205.14141, section 3.1.
        """
        pixels_BCHW = normalize(images_BCHW, self.model.mean, self.model.std)
        size = (self.img_size, self.img_size)
        if pixels_BCHW.shape[-2:] != size:
            pixels_BCHW = F.interpolate(pixels_BCHW, size=size, mode="bilinear", align_corners=False)
        return self.run(pixels_BCHW.to(self.dtype), drop_path_scale_RB)


class _Targets(nn.Module):
    """All that a teacher computes in one forward, at which ZeRO-3 gathers."""

    def __init__(self, model: Backbone, config: TeacherConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config

    def forward(self, pixels_BCHW: Tensor, drop_path_scale_RB: Tensor | None = None) -> list[Tensor]:
        model, layers = self.model, self.config.layers
        if self.config.target == "pooled":
            return [model.pooled(pixels_BCHW)[:, None]]
        if self.config.target == "logits":
            return [model.logits(pixels_BCHW)[:, None]]
        maps = (
            [model(pixels_BCHW, drop_path_scale_RB)]
            if layers is None
            else model.intermediates(pixels_BCHW, layers)
        )
        return [cls_and_patches(tokens_BLD, model.num_prefix_tokens, model.has_cls) for tokens_BLD in maps]


@torch.no_grad()
def targets_of(config: TeacherConfig) -> tuple[Target, ...]:
    """Returns what a teacher gives, from a forward of the same model without weights, on the meta device."""
    img_size = resolved_model(config.model).size
    with torch.device("meta"):
        model = build_model(replace(config.model, weights=None), config.target).eval()
        targets = _Targets(model, config)(torch.zeros(1, 3, img_size, img_size))
    if config.target != "feature_map":
        return tuple(Target(tokens_BLD.shape[2], None, has_cls=False) for tokens_BLD in targets)
    found = []
    for tokens_BLD in targets:
        num_patches = tokens_BLD.shape[1] - model.has_cls
        side = math.isqrt(num_patches)  # images are square; earlier stages have larger grids
        if side * side != num_patches:
            raise UserError(
                f"distill.teachers: {config.model.name} gives {num_patches} patches of {img_size} px images, no square "
                "grid; leave out `layers`, or choose another model"
            )
        found.append(Target(tokens_BLD.shape[2], (side, side), model.has_cls))
    return tuple(found)
