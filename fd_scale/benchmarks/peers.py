"""What one would write without this package: timm's Swin V2 in a plain loop, and FSDP2 around our module.

Shape legend: B = images, H, W = pixels or token grid, D = channels of the output.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.swin_transformer_v2 import SwinTransformerV2 as TimmSwinV2
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from fd_scale.config import ModelConfig, Recipe
from fd_scale.data import Batch
from fd_scale.distributed import World
from fd_scale.models import SwinTransformerV2, build_model, dtype_of, normalize, resolved_model
from fd_scale.models.layers import ResidualBlock


def twin(config: ModelConfig) -> TimmSwinV2:
    """Returns timm's Swin V2 of the shape of one of ours, random weights, on torch's default device."""
    with torch.device("meta"):
        ours = build_model(config)
    assert isinstance(ours, SwinTransformerV2), "the cells are of Swin V2"
    return TimmSwinV2(
        img_size=resolved_model(config).size,
        patch_size=ours.patch_size,
        num_classes=0,
        embed_dim=ours.embed_dim,
        depths=ours.depths,
        num_heads=ours.num_heads,
        window_size=ours.window_size,
        drop_path_rate=ours.drop_path_rates[-1],
    )


class _Features(nn.Module):
    """The feature map of a timm model for uint8 images."""

    def __init__(self, model: nn.Module, config: ModelConfig) -> None:
        super().__init__()
        self.model = model
        config = resolved_model(config)
        assert config.mean is not None, "resolved"
        assert config.std is not None, "resolved"
        self.mean, self.std = config.mean, config.std

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Returns (B, H, W, D)."""
        pixels_BCHW = normalize(images_BCHW, self.mean, self.std)
        weight = next(self.model.parameters())
        return self.model.forward_features(pixels_BCHW.to(weight.dtype))  # type: ignore[operator]


class _Regression(nn.Module):
    """Student, linear projector, and smooth L1 to the whitened target."""

    def __init__(self, student: nn.Module, num_features: int, target_features: int, beta: float) -> None:
        super().__init__()
        self.student = student
        self.projector = nn.Linear(num_features, target_features)
        self.beta = beta

    def forward(self, images_BCHW: Tensor, target_BHWD: Tensor) -> dict[str, Tensor]:
        """Returns the mean loss."""
        pred_BHWD = self.projector(self.student(images_BCHW)).float()
        whitened_BHWD = F.layer_norm(target_BHWD.float(), target_BHWD.shape[-1:])
        return {"loss": F.smooth_l1_loss(pred_BHWD, whitened_BHWD, beta=self.beta)}


class TimmPair:
    """Student and teacher of timm's Swin V2: what a `fd_scale.benchmarks.step.Bare` loop trains.

    Args:
        recipe: a distillation with one teacher; its student and teacher are ours, the twins are of their shapes.
        device: where they are built.
        compiled: whether both run under torch.compile.
    """

    def __init__(self, recipe: Recipe, device: torch.device, compiled: bool) -> None:
        assert recipe.distill is not None, "the cells distil"
        model, teacher = recipe.model, recipe.distill.teachers[0].model
        with device:
            student, target = twin(model), twin(teacher)
            self.module = _Regression(
                _Features(student, model), student.num_features, target.num_features, recipe.distill.beta
            )
        self.teacher = _Features(target, teacher).to(dtype_of(recipe.train.precision)).eval()
        self.teacher.requires_grad_(False)
        if compiled:
            self.module.compile(dynamic=False)
            self.teacher.compile(dynamic=False)

    def counts(self, batch: Batch) -> dict[str, float]:
        """The loss is a mean already."""
        return {"loss": 1.0}

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Runs the teacher."""
        with torch.no_grad():
            return {"images_BCHW": batch.images, "target_BHWD": self.teacher(batch.images)}


def shard_and_compile(module: nn.Module, world: World, dtype: torch.dtype) -> None:
    """Makes FSDP2 hold a module of ours, each block compiled, in mixed precision.

    Args:
        module: fp32, on the device.
        world: ranks.
        dtype: of the forward and backward pass.
    """
    mesh = init_device_mesh(world.device.type, (world.size,))
    # What blocks are given has its dtype: a shared bias stays fp32.
    policy = MixedPrecisionPolicy(param_dtype=dtype, cast_forward_inputs=False)
    # Blocks of all stages, shifted or not, are one piece of code to Dynamo, with a graph for each shape.
    torch._dynamo.config.recompile_limit = 64
    for block in [each for each in module.modules() if isinstance(each, ResidualBlock)]:
        block.compile(dynamic=False)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)
