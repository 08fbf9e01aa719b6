"""What the rest of the house knows of a model, whoever wrote it."""

# Shape suffix legend
#   B = images, L = tokens (prefix tokens first, CLS first of them, then patches row by row), D = channels,
#   K = classes, R = residual branches

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from fd_scale.config import ModelConfig
from fd_scale.errors import UserError
from fd_scale.models.layers import CheckpointingMode, PooledNorm, ResidualBlock


class Backbone(nn.Module, ABC):
    """A model without the parts that a task adds.

    Attributes:
        num_features: D, channels of the output tokens.
        num_prefix_tokens: tokens before those of the patches: CLS, registers, distillation token.
        has_cls: whether the first prefix token is a CLS token.
        drop_path_rates: rate of each residual branch that can be dropped, R entries. The caller draws the masks.
        takes_any_size: whether images may have another size than the one it was built for, and need not be square.
        activation_checkpointing: what the backward pass computes again, see `set_activation_checkpointing`.
        checkpointing_period: in one block of each so many.
        mean: mean of the RGB channels that it expects, in 0..1.
        std: standard deviation of the RGB channels that it expects, in 0..1.
    """

    num_features: int
    inner_layout: str = ""
    """Layout of a wrapped model (our names without `model.`)."""
    formats: tuple[str, ...] = ()
    """Layouts that `to_layout` knows besides ours and that one."""
    num_prefix_tokens: int = 0
    has_cls: bool = False
    drop_path_rates: tuple[float, ...] = ()
    activation_checkpointing: CheckpointingMode = "none"
    checkpointing_period: int = 1
    takes_any_size: bool = False
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @abstractmethod
    def forward(self, images_BCHW: Tensor, drop_path_scale_RB: Tensor | None = None) -> Tensor:
        """Tokens after the final norm.

        Args:
            images_BCHW: normalised images, floating point.
            drop_path_scale_RB: factor of each residual branch and image, (len(drop_path_rates), B): 0 to
                drop it, 1 / (1 - rate) to keep it. None keeps all as they are.

        Returns:
            tokens_BLD, L = num_prefix_tokens + rows * columns of `grid_size`.
        """

    @abstractmethod
    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the patch tokens for images of `height` x `width` pixels."""

    @abstractmethod
    def no_weight_decay_names(self) -> set[str]:
        """Names of parameters without weight decay, besides those with one dimension."""

    def layer_ids(self) -> dict[str, int]:
        """Depth of each parameter, for learning rates that fall with it: 0 before the first block, then one a block.

        Returns:
            Name -> depth; the parameters that are missing (the final norm) lie one deeper than all others.

        Raises:
            UserError: the order of its layers is not known.
        """
        raise UserError(
            f"optim.layer_decay: the order of {type(self).__name__}'s layers is not known; set it to 1"
        )

    def block_classes(self) -> set[type[nn.Module]]:
        """Classes of its blocks: what ZeRO-3 gathers, and lets go, at a time."""
        return {type(module) for module in self.modules() if isinstance(module, ResidualBlock)}

    def list_blocks(self) -> list[nn.Module]:
        """Its blocks, in order; none where they are not known."""
        classes = self.block_classes()
        return [module for module in self.modules() if type(module) in classes]

    def set_activation_checkpointing(self, mode: CheckpointingMode, period: int = 1) -> None:
        """Chooses what the backward pass computes again.

        Args:
            mode: as of `fd_scale.models.layers.ResidualBlock`, for every block that it concerns.
            period: it concerns the last block of each so many, counted over the whole model; 1: all.

        Raises:
            UserError: an unknown mode, or one that the model does not have.
        """
        if mode not in get_args(CheckpointingMode):
            raise UserError(
                f"activation_checkpointing is {mode!r}; expected one of {', '.join(get_args(CheckpointingMode))}"
            )
        self._checkpoint_blocks(mode, period)
        self.activation_checkpointing, self.checkpointing_period = mode, period

    def _checkpoint_blocks(self, mode: CheckpointingMode, period: int) -> None:
        blocks = [module for module in self.modules() if isinstance(module, ResidualBlock)]
        if not blocks and mode != "none":
            raise UserError(
                f"train.activation_checkpointing: {type(self).__name__} cannot recompute its blocks; set it to none"
            )
        for count, block in enumerate(blocks, start=1):
            block.checkpointing = "none" if count % period else mode

    def compile_blocks(self) -> int:
        """Compiles the parts of each block that is a `ResidualBlock`; returns how many blocks these are."""
        blocks = [module for module in self.modules() if isinstance(module, ResidualBlock)]
        for block in blocks:
            block.compile_parts()
        # One block's code serves all stages, shifts, drop path and none, training and evaluation.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        return len(blocks)

    def pooled(self, images_BCHW: Tensor) -> Tensor:
        """One feature for each image, (B, D): the mean of its patch tokens, where the model says nothing else."""
        return self(images_BCHW)[:, self.num_prefix_tokens :].mean(1)

    def logits(self, images_BCHW: Tensor) -> Tensor:
        """Class scores, (B, K).

        Raises:
            UserError: the model has no classifier.
        """
        raise UserError(f"{type(self).__name__} has no classifier; choose target feature_map or pooled")

    def intermediates(
        self, images_BCHW: Tensor, layers: Sequence[int], drop_path_scale_RB: Tensor | None = None
    ) -> list[Tensor]:
        """Tokens after chosen blocks (of hierarchical models: stages), in the order of `layers`, before any final norm.

        Args:
            images_BCHW: as of `forward`.
            layers: from 0, or from -1 backwards.
            drop_path_scale_RB: as of `forward`.

        Returns:
            For each layer (B, L, D of that layer); prefix tokens as in `forward`.

        Raises:
            UserError: there is no such layer.
        """
        raise UserError(f"{type(self).__name__} gives no intermediate layers; remove `layers`")

    def layer_shapes(self) -> list[tuple[int, int]]:
        """Channels, and pixels of a token's side, after each layer that `intermediates` knows.

        Raises:
            UserError: the model is not known to give maps of its layers.
        """
        raise UserError(
            f"{type(self).__name__} gives no maps of its layers; take a swin_v2_*, fd_vit_* or timm model"
        )

    def final_norm(self) -> nn.LayerNorm:
        """The norm that `forward` ends with, for who reads the last layer by `intermediates`.

        Raises:
            UserError: it has none that tokens can be given to.
        """
        raise UserError(
            f"{type(self).__name__} has no LayerNorm at its end that can be given tokens; take a swin_v2_* or fd_vit_* "
            "model, or a ViT or Swin of timm; to classify, classification.norm=own does without"
        )

    def norm_behind_pooling(self) -> None:
        """Puts a fresh norm in the place of `final_norm`, under its name, that means of tokens can be given to.

        `forward` then gives tokens before any final norm.

        Raises:
            UserError: as `final_norm`.
        """
        own = self.final_norm()
        name = next(name for name, module in self.named_modules() if module is own)
        parent, _, child = name.rpartition(".")
        setattr(self.get_submodule(parent), child, PooledNorm(self.num_features, eps=own.eps))

    @abstractmethod
    def translate(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the weights of any layout that the model knows, by the model's own names."""

    def to_layout(self, state: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
        """Returns weights by the model's own names in a published layout.

        Raises:
            UserError: an unknown layout, or one that has no place for some of them.
        """
        if layout == "ours":
            return dict(state)
        if layout == self.inner_layout:
            return {name.removeprefix("model."): tensor for name, tensor in state.items()}
        raise UserError(
            f"--format {layout}: this model has the formats {', '.join(('ours', self.inner_layout, *self.formats))}"
        )

    def layout_config(self, layout: str, config: ModelConfig) -> dict[str, Any]:
        """Returns what a published layout's `config.json` says of the model, where it has one.

        Args:
            layout: of the weights beside it.
            config: what the model was built from, resolved.

        Raises:
            UserError: it cannot say what this model is.
        """
        return {}


def cls_and_patches(tokens_BLD: Tensor, num_prefix_tokens: int, with_cls: bool) -> Tensor:
    """Drops the prefix tokens, but the first where `with_cls` is set."""
    patches_BLD = tokens_BLD[:, num_prefix_tokens:]
    return torch.cat([tokens_BLD[:, :1], patches_BLD], dim=1) if with_cls else patches_BLD


def resolve_layers(layers: Sequence[int], num_layers: int) -> list[int]:
    """Returns layer numbers from 0, for numbers that may count from the end.

    Raises:
        UserError: there is no such layer.
    """
    for layer in layers:
        if not -num_layers <= layer < num_layers:
            raise UserError(
                f"layer {layer} is none of the model's {num_layers}; give 0 to {num_layers - 1}, or -1 and below"
            )
    return [layer % num_layers for layer in layers]
