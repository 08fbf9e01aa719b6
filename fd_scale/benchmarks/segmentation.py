"""`fd-scale bench segmentation`: our step beside one with Transformers' UPerNet on the same backbone, in turns.

Shape legend: B = images, H, W = pixels, K = classes, h, w = places of a map, R = residual branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fd_scale.benchmarks.beside import Peer, beside
from fd_scale.benchmarks.finetune import show
from fd_scale.config import Recipe
from fd_scale.errors import UserError
from fd_scale.finetune import SegmentationTask
from fd_scale.finetune.segmentation.module import cross_entropy_sum
from fd_scale.models import normalize

PEER = "transformers"


class TransformersUPerNet(nn.Module):
    """The backbone and pyramid of a segmentation of ours, with the heads of Transformers' UPerNet.

    Args:
        task: whose module's parts are taken, with `segmentation.norm=batch`, which Transformers has.

    Raises:
        UserError: Transformers is not installed.
    """

    def __init__(self, task: SegmentationTask) -> None:
        super().__init__()
        try:
            from transformers import UperNetConfig
            from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead
        except ImportError as error:
            raise UserError(f"bench segmentation: {error}; install the extra [hf]") from None
        self.dtype, self.auxiliary_weight = task.module.dtype, task.module.auxiliary_weight
        self.backbone, self.pyramid = task.module.backbone, task.module.pyramid
        settings: dict[str, Any] = {
            "hidden_size": task.config.channels, "num_labels": task.num_classes, "use_auxiliary_head": True,
            "auxiliary_channels": task.config.channels // 2, "auxiliary_num_convs": 1,
        }  # fmt: skip
        self.head = UperNetHead(UperNetConfig(**settings), self.pyramid.channels)
        last_but_one = max(len(self.pyramid.channels) - 2, 0)
        self.auxiliary = UperNetFCNHead(
            UperNetConfig(**settings), self.pyramid.channels, in_index=last_but_one
        )

    def forward(
        self, images_BCHW: Tensor, masks_BHW: Tensor, drop_path_scale_RB: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Returns sums of both losses, as `SegmentationModule` does."""
        pixels_BCHW = normalize(images_BCHW, self.backbone.mean, self.backbone.std).to(self.dtype)
        layers = self.backbone.intermediates(pixels_BCHW, self.pyramid.layers, drop_path_scale_RB)
        layers[-1] = self.backbone.final_norm()(layers[-1])
        maps = self.pyramid(layers, *images_BCHW.shape[2:])
        auxiliary = self.auxiliary_weight * cross_entropy_sum(self.auxiliary(maps), masks_BHW)
        return {"loss": cross_entropy_sum(self.head(maps), masks_BHW), "auxiliary": auxiliary}


def bench_segmentation(recipe_name: str, overrides: Sequence[str], num_steps: int) -> dict[str, Any]:
    """Measures steps on batches in memory in this process, the two loops in turns, and prints a table.

    Args:
        recipe_name: recipe of task segmentation with UPerNet; nothing is evaluated.
        overrides: settings that replace the recipe's.
        num_steps: measured steps of each loop, after a warm-up.

    Returns:
        The measurements: times in ms.

    Raises:
        UserError: the recipe is of another task or head, or Transformers is not installed.
    """
    result = beside(
        recipe_name, overrides, num_steps,
        Peer(name=PEER, refuse=_refuse, module=TransformersUPerNet, settings=["segmentation.norm=batch"]),
    )  # fmt: skip
    show(result, PEER, result["images"])
    return result


def _refuse(recipe: Recipe) -> None:
    section = recipe.segmentation
    if section is None or section.head != "upernet" or not section.auxiliary_weight:
        raise UserError(
            f"task {recipe.task}: bench segmentation expects task segmentation, with segmentation.head=upernet and an "
            "auxiliary head"
        )
