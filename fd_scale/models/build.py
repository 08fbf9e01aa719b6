"""From a recipe's model section to a backbone with weights, and what every trained module does alike.

Shape legend: B = images, R = residual branches, H, W = pixels.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from fd_scale.config import ModelConfig
from fd_scale.errors import UserError
from fd_scale.models.registry import create_model
from fd_scale.models.swin_v2 import SwinTransformerV2
from fd_scale.randomness import uniform

BACKBONE = "backbone"
"""Attribute under which every trained module holds the model of the recipe's `model` section."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_of(precision: str) -> torch.dtype:
    """Returns the torch dtype of a recipe's precision."""
    return _DTYPES[precision]


def build_model(config: ModelConfig) -> SwinTransformerV2:
    """Builds a backbone; initial weights come from torch's global generator, then from `config.weights`.

    Raises:
        UserError: an unknown model or override, or weights that do not fit.
    """
    if "img_size" in config.overrides:
        raise UserError("model.overrides.img_size: the input size is model.img_size; set it there")
    _check_types(config.overrides)
    model = create_model(config.name, img_size=config.img_size, **config.overrides)
    if config.weights is not None:
        load_weights(model, config.weights)
    return model


def _check_types(overrides: dict[str, Any]) -> None:
    hints = get_type_hints(SwinTransformerV2.__init__)
    for name, value in overrides.items():
        if not _is_a(value, hints.get(name, Any)):  # an unknown name is for create_model to say
            formatted = inspect.formatannotation(hints[name]).replace("collections.abc.", "")
            raise UserError(f"model.overrides.{name}: got {value!r}, expected {formatted}")


def _is_a(value: Any, hint: Any) -> bool:
    if isinstance(hint, UnionType):
        return any(_is_a(value, part) for part in get_args(hint))
    if get_origin(hint) is Sequence:
        return isinstance(value, list | tuple) and all(_is_a(item, get_args(hint)[0]) for item in value)
    if isinstance(value, bool) or hint is Any:
        return hint in (bool, Any)
    return isinstance(value, int | float if hint is float else hint)


def weights_file(path: str) -> Path:
    """Returns the .safetensors file that `model.weights` names: itself, or the one in an exported folder.

    Raises:
        UserError: there is none.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "model.safetensors"
    if not file.is_file():
        raise UserError(
            f"model.weights: {file} does not exist; give a .safetensors file or a folder of `fd-scale export`"
        )
    return file


def load_weights(model: nn.Module, path: str) -> None:
    """Loads weights strictly; into a model on the meta device nothing is loaded, only the header is compared.

    Args:
        model: a backbone.
        path: a folder written by `fd-scale export`, or a .safetensors file.

    Raises:
        UserError: no such file, not safetensors, or weights of another architecture (which keys, which shapes).
    """
    file = weights_file(path)
    try:
        with safe_open(file, framework="pt") as header:
            found = {name: tuple(header.get_slice(name).get_shape()) for name in header.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"model.weights: {file} is not a whole safetensors file: {error}") from None
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unknown" for name in found if name not in expected]
    problems += [
        f"{name} is {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"model.weights: {file} is of another architecture: {'; '.join(problems[:3])}{more}")
    if not next(model.parameters()).is_meta:
        model.load_state_dict(load_file(file))


def weights_sha256(path: str) -> str:
    """Returns the SHA-256 of the file that `model.weights` names, in hexadecimal."""
    with weights_file(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def undecayed_parameters(module: nn.Module) -> set[str]:
    """Returns the names of a trained module's parameters that its backbone spares from weight decay."""
    backbone = module.get_submodule(BACKBONE)
    assert isinstance(backbone, SwinTransformerV2), "modules hold what build_model returned"
    return {f"{BACKBONE}.{name}" for name in backbone.no_weight_decay_names()}


def normalize(images_BCHW: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Returns uint8 images as a model expects them: fp32, (x / 255 - mean) / std.

    Args:
        images_BCHW: uint8, RGB.
        mean: of the three channels, in 0..1.
        std: of the three channels, in 0..1.
    """
    shift = torch.tensor(mean, device=images_BCHW.device).view(3, 1, 1) * 255
    scale = torch.tensor(std, device=images_BCHW.device).view(3, 1, 1) * 255
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
