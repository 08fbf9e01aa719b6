"""Contrastive pre-training: two views of an image attract, all other images of the batch repel.

Shape legend: B = images on this rank, V = 2 views, L = tokens, D = channels, P = projection,
N = V * images on all ranks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fd_scale.config import ContrastiveConfig, ModelConfig, Recipe
from fd_scale.data import Batch, TrainLoader
from fd_scale.distributed import World
from fd_scale.evaluation import Forward
from fd_scale.models import build_model, drop_path_scale, dtype_of, normalize, set_up_training


class _GatherRanks(torch.autograd.Function):
    """Concatenates a tensor over ranks; the gradients of all ranks come back summed."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.num_rows = len(rows)
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        first = dist.get_rank() * ctx.num_rows
        return total[first : first + ctx.num_rows]


def nt_xent_sum(projected_VBP: Tensor, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross entropy between two views, against the images of all ranks.

    Args:
        projected_VBP: projections of this rank's images, (2, B, P).
        temperature: divides the cosine similarities.

    Returns:
        Sum over this rank's 2 * B views, in nats, fp32 scalar.

    Source: Chen et al. 2020 (arXiv 2002.05709), equation 1.
    """
    num_images = projected_VBP.shape[1]
    own_MP = F.normalize(projected_VBP.float(), dim=-1).flatten(0, 1)
    all_NP, first = own_MP, 0
    if dist.get_world_size() > 1:
        all_NP, first = _GatherRanks.apply(own_MP), dist.get_rank() * len(own_MP)
    logits_MN = own_MP @ all_NP.T / temperature
    rows = torch.arange(len(own_MP), device=own_MP.device)
    logits_MN = logits_MN.scatter(
        1, (first + rows)[:, None], float("-inf")
    )  # a view is not compared with itself
    other_view = first + (rows + num_images) % len(own_MP)
    return F.cross_entropy(logits_MN, other_view, reduction="sum")


class ContrastiveModule(nn.Module):
    """Backbone, mean over tokens, two-layer projection, loss."""

    def __init__(self, model: ModelConfig, config: ContrastiveConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.temperature = config.temperature
        self.dtype = dtype
        self.backbone = build_model(model)
        width = self.backbone.num_features
        self.projection = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, config.projection_dim)
        )

    def forward(self, images_BVCHW: Tensor, drop_path_scale_RN: Tensor | None = None) -> dict[str, Tensor]:
        """Compares the two views of each image.

        Args:
            images_BVCHW: uint8, two views an image.
            drop_path_scale_RN: for each residual branch and view (all first views, then all second ones).

        Returns:
            `loss`: sum over views, fp32 scalar.
        """
        views_BCHW = images_BVCHW.transpose(0, 1).flatten(0, 1)
        pixels_BCHW = normalize(views_BCHW, self.backbone.mean, self.backbone.std).to(self.dtype)
        tokens_BLD = self.backbone(pixels_BCHW, drop_path_scale_RN)
        pooled_BD = tokens_BLD[:, self.backbone.num_prefix_tokens :].mean(1)
        projected_VBP = self.projection(pooled_BD).unflatten(0, (2, len(images_BVCHW)))
        return {"loss": nt_xent_sum(projected_VBP, self.temperature)}


class ContrastiveTask:
    """What the trainer needs to know of contrastive pre-training; labels are never read."""

    best_metric = ("loss", -1)

    def __init__(self, recipe: Recipe) -> None:
        assert recipe.contrastive is not None, "a recipe of task contrastive has its section"
        self.seed = recipe.seed
        self.module = ContrastiveModule(recipe.model, recipe.contrastive, dtype_of(recipe.train.precision))
        self.undecayed, self.lr_scales = set_up_training(self.module, recipe)
        self.rates = self.module.backbone.drop_path_rates

    def prepare(self, world: World, loader: TrainLoader) -> None:
        """There is nothing beside the module."""

    def counts(self, batch: Batch) -> dict[str, float]:
        """The loss goes over views."""
        return {"loss": 2 * len(batch.labels)}

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Draws drop path, for each view its own."""
        positions = torch.cat([2 * batch.positions, 2 * batch.positions + 1])
        scale = drop_path_scale(self.rates, self.seed, positions, batch.images.device)
        return {"images_BVCHW": batch.images, "drop_path_scale_RN": scale}

    def evaluate(self, forward: Forward, world: World) -> dict[str, float]:
        """The loss depends on which images share a batch: it is no metric of a source."""
        return {}

    def pictures(self, batch: Batch, outputs: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """The two views of an image, side by side."""
        views_BHWC = torch.cat(batch.images[:8].unbind(1), dim=-1).permute(0, 2, 3, 1)
        return {"views": views_BHWC.cpu().numpy()}
