"""Student, projector and loss inside one forward, so that ZeRO-3's hooks gather every parameter.

Shape legend: B = images, L = tokens, D = channels of the teacher, R = residual branches.
"""

from __future__ import annotations

import torch
from fd_kernels import whitened_smooth_l1
from torch import Tensor, nn

from fd_scale.config import ModelConfig
from fd_scale.models import build_model, normalize


class DistillationModule(nn.Module):
    """The trained side of feature distillation.

    Args:
        student: shape, normalisation and initial weights of the student.
        teacher_features: channels D of the teacher.
        beta: switch point of smooth L1, in standard deviations of the target.
        dtype: dtype of the forward pass.

    Source: arXiv 2205.14141; the linear projector is there also where the widths are equal, as in the
    authors' code.
    """

    def __init__(self, student: ModelConfig, teacher_features: int, beta: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.mean, self.std = student.mean, student.std
        self.beta = beta
        self.dtype = dtype
        self.backbone = build_model(student)
        self.projector = nn.Linear(self.backbone.num_features, teacher_features)
        nn.init.trunc_normal_(self.projector.weight, std=0.02)
        nn.init.zeros_(self.projector.bias)

    def forward(
        self, images_BCHW: Tensor, target_BLD: Tensor, drop_path_scale_RB: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Compares the student's projected tokens with the teacher's.

        Args:
            images_BCHW: uint8 views.
            target_BLD: the teacher's tokens, any float dtype.
            drop_path_scale_RB: 0 or 1 / keep probability for each residual branch; none: nothing is dropped.

        Returns:
            `loss`: sum over images and tokens of the channel mean, fp32 scalar; `tokens`: the student's
            projected tokens, without gradient.
        """
        pixels_BCHW = normalize(images_BCHW, self.mean, self.std).to(self.dtype)
        tokens_BLD = self.projector(self.backbone(pixels_BCHW, drop_path_scale_RB))
        loss = whitened_smooth_l1(tokens_BLD, target_BLD, beta=self.beta)
        return {"loss": loss, "tokens": tokens_BLD.detach()}
