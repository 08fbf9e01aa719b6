"""From a recipe's model section to a backbone with weights, and what every trained module does alike.

Shape legend: B = images, R = residual branches, H, W = pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from fd_kernels.dispatch import set_implementation
from torch import Tensor, nn

from fd_scale.config import ModelConfig, Recipe
from fd_scale.errors import UserError
from fd_scale.models.backbone import Backbone
from fd_scale.models.pretrained import hugging_face_folder, resolved_model, weights_path
from fd_scale.models.registry import HUGGING_FACE, create_model
from fd_scale.models.swin_v2 import SwinTransformerV2
from fd_scale.models.weights import load_weights
from fd_scale.randomness import uniform

BACKBONE = "backbone"
"""Attribute under which every trained module holds the model of the recipe's `model` section."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_of(precision: str) -> torch.dtype:
    """Returns the torch dtype of a recipe's precision."""
    return _DTYPES[precision]


def build_model(config: ModelConfig, target: str = "feature_map") -> Backbone:
    """Builds a backbone; initial weights come from torch's global generator, then from `config.weights`.

    Args:
        config: the recipe's section; what it leaves open is the model's own.
        target: what a teacher is asked for; `pooled` and `logits` keep the parts of a timm model for it.

    Raises:
        UserError: an unknown model or override, or weights that do not fit.
    """
    config = resolved_model(config)
    assert config.mean is not None, "resolved"
    assert config.std is not None, "resolved"
    if "img_size" in config.overrides:
        raise UserError("model.overrides.img_size: the input size is model.img_size; set it there")
    path = weights_path(config)  # before minutes are spent on a large model
    name = config.name
    if name.startswith(HUGGING_FACE):
        name = f"{HUGGING_FACE}{hugging_face_folder(name)}"
    model = create_model(name, img_size=config.size, target=target, **config.overrides)
    model.mean, model.std = config.mean, config.std
    if not all(0 <= rate < 1 for rate in model.drop_path_rates):
        raise UserError(
            f"model.overrides.drop_path_rate: got {max(model.drop_path_rates)}, expected 0 <= rate < 1"
        )
    if path is not None:
        load_weights(model, path)
    return model


def at_trained_scale(trained: ModelConfig, wanted: ModelConfig) -> ModelConfig:
    """Returns a Swin V2 of another size, in which a token to the left has the bias that it was trained with.

    A bias is learned over distances in windows; where the recipe does not say of which windows, they are its own, and
    smaller than wanted ones in stages that they cover. Other models are what is wanted.

    Raises:
        UserError: its windows are not square, and the distances of a bias have one scale.
    """
    if wanted == trained or not trained.name.startswith("swin_v2_"):
        return wanted
    with torch.device("meta"):
        model = create_model(trained.name, img_size=resolved_model(trained).size, **trained.overrides)
    assert isinstance(model, SwinTransformerV2), "by its name"
    rows, columns = model.window_size
    if rows != columns:
        raise UserError(
            f"model.overrides.window_size: windows of {rows} x {columns} are measured as they were trained; leave out "
            "what changes the size of images or of windows"
        )
    return replace(wanted, overrides=dict(wanted.overrides) | {"pretrained_window_size": model.bias_windows})


def choose_kernels(name: Literal["auto", "reference", "triton"], device: torch.device) -> None:
    """Chooses the path of all ops of `fd_kernels` in this process.

    Raises:
        UserError: Triton kernels are asked for where none can run.
    """
    if name == "triton" and device.type != "cuda":
        raise UserError(
            f"train.kernels: triton needs a CUDA device, the run is on {device.type}; set it to auto"
        )
    set_implementation(name)


def set_up_training(module: nn.Module, recipe: Recipe) -> tuple[set[str], dict[str, float]]:
    """Sets what the backward pass of a trained module's backbone computes again.

    Returns:
        Names of parameters that the backbone spares from weight decay, and `learning_rate_scales`.

    Raises:
        UserError: the model cannot recompute, or the order of its layers is not known.
    """
    backbone = _backbone_of(module)
    backbone.set_activation_checkpointing(
        recipe.train.activation_checkpointing, recipe.train.checkpointing_period
    )
    undecayed = {f"{BACKBONE}.{name}" for name in backbone.no_weight_decay_names()}
    return undecayed, learning_rate_scales(module, recipe.optim.layer_decay)


def learning_rate_scales(module: nn.Module, layer_decay: float) -> dict[str, float]:
    """Returns factors of the peak learning rate for parameters of a trained module's backbone; others have 1.

    Args:
        module: holds a backbone, heads and projectors behind it.
        layer_decay: factor from a layer to the one before it, in (0, 1].

    Raises:
        UserError: the order of the model's layers is not known.

    Source: Bao et al. 2021 (arXiv:2106.08254), appendix; layers as in the fine-tuning code of arXiv 2205.14141.
    """
    if layer_decay == 1:
        return {}
    ids = _backbone_of(module).layer_ids()
    behind = max(ids.values()) + 1
    return {f"{BACKBONE}.{name}": layer_decay ** (behind - layer) for name, layer in ids.items()}


def _backbone_of(module: nn.Module) -> Backbone:
    backbone = module.get_submodule(BACKBONE)
    assert isinstance(backbone, Backbone), "modules hold what build_model returned"
    return backbone


def normalize(images_BCHW: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Returns uint8 images as a model expects them: fp32, (x / 255 - mean) / std.

    Args:
        images_BCHW: RGB, uint8, or mixed ones in 0..255.
        mean: of the three channels, in 0..1.
        std: of the three channels, in 0..1.
    """
    # Made on the host: torch.tensor(..., device=...) would wait for all that the GPU still has to do, the teacher's
    # forward pass among it.
    shift, scale = (
        torch.tensor(values).view(3, 1, 1).to(images_BCHW.device, non_blocking=True) * 255
        for values in (mean, std)
    )
    return (images_BCHW.float() - shift) / scale


def drop_path_scale(
    rates: Sequence[float], seed: int, positions_B: Tensor, device: torch.device
) -> Tensor | None:
    """Draws drop path for a batch: a function of (seed, position in the run's stream, branch).

    Args:
        rates: probability that a residual branch is dropped, R numbers.
        seed: the run's seed.
        positions_B: position of each sample in the run's stream, int64 on the host.
        device: where the result goes.

    Returns:
        fp32 (R, B): 0 where the branch is dropped, else 1 / (1 - rate); none where no rate is above 0.
    """
    if not any(rates):
        return None
    rates_R1 = np.asarray(rates)[:, None]
    drawn_RB = uniform(seed, "drop_path", positions_B.numpy()[None, :], np.arange(len(rates))[:, None])
    scale_RB = np.where(drawn_RB < rates_R1, 0.0, 1.0 / (1.0 - rates_R1)).astype(np.float32)
    return torch.from_numpy(scale_RB).to(device, non_blocking=True)
