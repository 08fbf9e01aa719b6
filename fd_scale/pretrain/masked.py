"""Masked image modelling: cells of an image are hidden, and their pixels are to be told from the rest.

A cell is the square of pixels that one output token covers: a patch of a ViT, a patch of the last stage of a Swin.

Shape legend: B = images, L = cells, one for each output token, D = channels, P = values of a cell (3 x side x side),
H, W = pixels, R = residual branches.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fd_scale.config import ModelConfig, Recipe
from fd_scale.data import Batch, TrainLoader
from fd_scale.distributed import World
from fd_scale.errors import UserError
from fd_scale.evaluation import EvaluationSet, Forward, mean_over_source
from fd_scale.models import build_model, drop_path_scale, dtype_of, normalize, set_up_training
from fd_scale.randomness import uniform

NUM_PICTURES = 8


class MaskedModule(nn.Module):
    """Backbone, a linear layer to pixels, loss.

    What stands in a hidden cell is learned, as SimMIM's mask token is: in pixels, so that any backbone takes it.

    Source: Xie et al. 2022 (arXiv:2111.09886), sections 3.2 to 3.5: linear head, L1 on hidden pixels.
    """

    def __init__(self, model: ModelConfig, img_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.backbone = build_model(model)
        _, self.side = self.backbone.layer_shapes()[-1]
        if img_size % self.side:
            raise UserError(
                f"model.img_size: {img_size} px are not a whole number of cells of {self.side} px, what an output "
                f"token covers; choose a multiple of {self.side}"
            )
        self.grid = (img_size // self.side, img_size // self.side)
        self.mask_cell = nn.Parameter(torch.zeros(3, self.side, self.side))
        self.to_pixels = nn.Linear(self.backbone.num_features, 3 * self.side**2)

    def forward(
        self, images_BCHW: Tensor, hidden_BL: Tensor, drop_path_scale_RB: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Tells the hidden pixels.

        Args:
            images_BCHW: uint8.
            hidden_BL: bool, which cells are hidden.
            drop_path_scale_RB: 0 or 1 / keep probability for each residual branch.

        Returns:
            `loss`: absolute error of normalised pixels, summed over hidden ones, fp32 scalar; `told`: (B, L, P), fp32,
            without gradient.
        """
        pixels_BCHW = normalize(images_BCHW, self.backbone.mean, self.backbone.std)
        hidden_B1HW = self._whole(hidden_BL[..., None])
        mask_CHW = self.mask_cell.tile(1, *self.grid).to(pixels_BCHW.dtype)
        seen_BCHW = torch.where(hidden_B1HW, mask_CHW, pixels_BCHW).to(self.dtype)
        tokens_BLD = self.backbone(seen_BCHW, drop_path_scale_RB)[:, self.backbone.num_prefix_tokens :]
        told_BLP = self.to_pixels(tokens_BLD).float()
        error_BLP = (told_BLP - F.pixel_unshuffle(pixels_BCHW, self.side).flatten(2).transpose(1, 2)).abs()
        return {"loss": (error_BLP * hidden_BL[..., None]).sum(), "told": told_BLP.detach()}

    def pictures(self, images_BCHW: Tensor, hidden_BL: Tensor, told_BLP: Tensor) -> Tensor:
        """Image, what the model saw (black where hidden), what it told; side by side, uint8 (B, H, 3 W, 3)."""
        hidden_B1HW = self._whole(hidden_BL[..., None])
        mean, std = (
            torch.tensor(values, device=told_BLP.device).view(3, 1, 1)
            for values in (self.backbone.mean, self.backbone.std)
        )
        told_BCHW = F.pixel_shuffle(told_BLP.transpose(1, 2).unflatten(2, self.grid), self.side)
        told_BCHW = (255 * (told_BCHW * std + mean)).round().clamp(0, 255).to(torch.uint8)
        shown = [images_BCHW, images_BCHW * ~hidden_B1HW, torch.where(hidden_B1HW, told_BCHW, images_BCHW)]
        return torch.cat(shown, dim=3).permute(0, 2, 3, 1)

    def _whole(self, values_BL1: Tensor) -> Tensor:
        """Values of cells as values of their pixels, (B, 1, H, W)."""
        values_B1HW = values_BL1.transpose(1, 2).unflatten(2, self.grid)
        return values_B1HW.repeat_interleave(self.side, 2).repeat_interleave(self.side, 3)


class MaskedTask:
    """What the trainer needs to know of masked image modelling; labels are never read.

    Args:
        recipe: with its section `masked`.
        evaluation: images on which the loss is measured.
    """

    best_metric = ("loss", -1)

    def __init__(self, recipe: Recipe, evaluation: EvaluationSet | None) -> None:
        assert recipe.masked is not None, "a recipe of task masked has its section"
        self.seed = recipe.seed
        self.evaluation = evaluation
        self.module = MaskedModule(recipe.model, recipe.model.size, dtype_of(recipe.train.precision))
        self.num_cells = self.module.grid[0] * self.module.grid[1]
        self.num_hidden = round(recipe.masked.ratio * self.num_cells)
        if not 0 < self.num_hidden < self.num_cells:
            raise UserError(
                f"masked.ratio: {recipe.masked.ratio} of {self.num_cells} cells are {self.num_hidden}; expected at "
                "least one that is hidden and one that is seen"
            )
        self.undecayed, self.lr_scales = set_up_training(self.module, recipe)
        self.undecayed.add("mask_cell")
        self.rates = self.module.backbone.drop_path_rates

    def prepare(self, world: World, loader: TrainLoader) -> None:
        """There is nothing beside the module."""

    def counts(self, batch: Batch) -> dict[str, float]:
        """The loss goes over the values of hidden pixels."""
        return {"loss": float(len(batch.labels) * self.num_hidden * 3 * self.module.side**2)}

    evaluation_counts = counts

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Draws what is hidden, and drop path."""
        scale = drop_path_scale(self.rates, self.seed, batch.positions, batch.images.device)
        return self.evaluation_inputs(batch) | {"drop_path_scale_RB": scale}

    def evaluation_inputs(self, batch: Batch) -> dict[str, Any]:
        """As `inputs`, without drop path; an image of an evaluation always has the same cells hidden."""
        return {"images_BCHW": batch.images, "hidden_BL": self._hidden(batch)}

    def evaluate(self, forward: Forward, world: World) -> dict[str, float]:
        """Measures the loss over the evaluation source."""
        if self.evaluation is None:
            return {}

        def sums(batch: Batch) -> tuple[dict[str, float], int]:
            loss = float(forward(**self.evaluation_inputs(batch))["loss"])
            return {"loss": loss}, int(self.counts(batch)["loss"])

        return mean_over_source(self.evaluation, world, sums)

    def pictures(self, batch: Batch, outputs: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """Image, what the model saw, what it told."""
        images_BCHW = batch.images[:NUM_PICTURES]
        hidden_BL, told_BLP = self._hidden(batch)[:NUM_PICTURES], outputs["told"][:NUM_PICTURES]
        return {"hidden": self.module.pictures(images_BCHW, hidden_BL, told_BLP).cpu().numpy()}

    def _hidden(self, batch: Batch) -> Tensor:
        """Equally many cells of each image, (B, L): a function of seed and position."""
        drawn_BL = uniform(self.seed, "mask", batch.positions.numpy()[:, None], np.arange(self.num_cells))
        rank_BL = drawn_BL.argsort(1).argsort(1)
        return torch.from_numpy(rank_BL < self.num_hidden).to(batch.images.device, non_blocking=True)
