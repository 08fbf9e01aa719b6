"""Student, projectors and losses inside one forward, so that ZeRO-3's hooks gather every parameter.

Shape legend: B = images, L = tokens, D = channels of a target, R = residual branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fd_scale.distill.losses import Loss
from fd_scale.models import Backbone, cls_and_patches, normalize


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A target and how the student meets it."""

    loss: str = "loss"
    """Name of the loss sum that it adds to: one for each teacher."""
    num_features: int
    """D."""
    is_map: bool = True
    """Whether it has a token for each of the student's patches, or one an image."""
    cls_weight: float = 0.0
    """Weight of a CLS token before the patches; 0: there is none."""
    weight: float = 1.0
    """Factor of its loss."""
    projector: str = "linear"
    """`linear` or `mlp`."""


class DistillationModule(nn.Module):
    """The trained side of feature distillation.

    Args:
        student: the student, with its initial weights.
        objectives: the targets that it predicts.
        loss: distance to each of them.
        dtype: dtype of the forward pass.

    Source: arXiv 2205.14141; the linear projector is there also where the widths are equal, as in the
    authors' code.
    """

    def __init__(
        self, student: Backbone, objectives: Sequence[Objective], loss: Loss, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.objectives = tuple(objectives)
        self.loss = loss
        self.dtype = dtype
        self.backbone = student
        self.projectors = nn.ModuleList(
            _projector(objective.projector, self.backbone.num_features, objective.num_features)
            for objective in objectives
        )

    def forward(
        self,
        images_BCHW: Tensor,
        targets: Sequence[Tensor],
        rows: Sequence[Tensor | None],
        drop_path_scale_RB: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compares the student's projected tokens with the teachers'.

        Args:
            images_BCHW: uint8 views.
            targets: for each objective (images of `rows`, L, D), any float dtype; empty: no loss is wanted.
            rows: for each objective the images that its teacher saw, int64; None: all.
            drop_path_scale_RB: 0 or 1 / keep probability for each residual branch; none: nothing is dropped.

        Returns:
            For each loss name the weighted sum over images and tokens of the channel mean, fp32 scalar;
            `tokens`, `target`: the projected tokens and the target of the first objective, without gradient.
            Without targets `features` alone, the mean of the student's patch tokens, (B, D).
        """
        pixels_BCHW = normalize(images_BCHW, self.backbone.mean, self.backbone.std).to(self.dtype)
        tokens_BLD = self.backbone(pixels_BCHW, drop_path_scale_RB)
        if not targets:
            return {"features": tokens_BLD[:, self.backbone.num_prefix_tokens :].mean(1)}
        outputs: dict[str, Tensor] = {}
        for objective, projector, target, chosen in zip(
            self.objectives, self.projectors, targets, rows, strict=True
        ):
            own_BLD = self._tokens_for(objective, tokens_BLD)
            projected_BLD = projector(own_BLD if chosen is None else own_BLD[chosen])
            token_weight_BL = None
            if objective.cls_weight not in (0.0, 1.0):
                token_weight_BL = torch.ones(projected_BLD.shape[:2], device=projected_BLD.device)
                token_weight_BL[:, 0] = objective.cls_weight
            loss = objective.weight * self.loss(projected_BLD, target, token_weight_BL=token_weight_BL)
            outputs[objective.loss] = outputs[objective.loss] + loss if objective.loss in outputs else loss
            outputs.setdefault("tokens", projected_BLD.detach())
            outputs.setdefault("target", target)
        return outputs

    def _tokens_for(self, objective: Objective, tokens_BLD: Tensor) -> Tensor:
        if objective.is_map:
            return cls_and_patches(tokens_BLD, self.backbone.num_prefix_tokens, objective.cls_weight > 0)
        if self.backbone.has_cls:
            return tokens_BLD[:, :1]
        return tokens_BLD[:, self.backbone.num_prefix_tokens :].mean(1, keepdim=True)


def _projector(kind: str, width: int, target_width: int) -> nn.Module:
    layers = [nn.Linear(width, target_width)]
    if kind == "mlp":
        layers.append(nn.Linear(target_width, target_width))
    for layer in layers:
        nn.init.trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
    return layers[0] if kind == "linear" else nn.Sequential(layers[0], nn.GELU(), layers[1])
