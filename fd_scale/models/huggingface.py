"""Vision models of Hugging Face Transformers as backbones."""

# Shape suffix legend: B = images, H, W = pixels, L = tokens, D = channels, R = residual branches

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fd_scale import hub
from fd_scale.config import ModelConfig
from fd_scale.errors import UserError
from fd_scale.models.backbone import Backbone, resolve_layers

logger = logging.getLogger(__name__)

# Final norms that these models leave to their pooler.
_NORMS_BEHIND_POOLING = {
    "clip_vision_model": "post_layernorm",
    "chinese_clip_vision_model": "post_layernorm",
    "mlcd_vision_model": "post_layernorm",
    "convnext": "layernorm",
    "convnextv2": "layernorm",
    "beit": "pooler.layernorm",
    "data2vec-vision": "pooler.layernorm",
}
# Position embeddings that are smoothed where they are resampled for fewer patches.
_ANTIALIASED = {"dinov2_with_registers"}


class HuggingFaceBackbone(Backbone):
    """The vision part of a Transformers model.

    It trains without its dropout and drop path, which would draw from a global generator.

    Args:
        folder: local folder with a `config.json`.
        img_size: side of the images in pixels.
        overrides: settings that differ from the `config.json`.

    Raises:
        UserError: Transformers is not installed, or does not build a vision model from the folder.
    """

    inner_layout = "hf"
    pools = True
    """Whether a pooler, where it has one, is trained."""

    def __init__(self, folder: Path, img_size: int, overrides: dict[str, Any]) -> None:
        super().__init__()
        transformers = _transformers()
        config = read_config(folder)
        unknown = [name for name in overrides if not hasattr(config, name)]
        if unknown:
            raise UserError(f"model.overrides: {folder}/config.json has no setting {', '.join(unknown)}")
        in_a_list = isinstance(getattr(config, "image_size", None), list | tuple)
        self.config = config
        known_errors: tuple[type[Exception], ...] = hub.settings_errors()
        known_errors += (ValueError, KeyError, AttributeError, TypeError, RuntimeError)
        try:
            config.update({"image_size": [img_size, img_size] if in_a_list else img_size, **overrides})
            self.model = transformers.AutoModel.from_config(config).eval()
            norm_name = _NORMS_BEHIND_POOLING.get(config.model_type)
            norm = dict(self.model.named_modules()).get(norm_name)
            self.norm_name = None if norm is None or isinstance(norm, nn.Identity) else norm_name
            self.num_features, self.grid, num_tokens = self._probe(img_size)
        except UserError:
            raise
        except known_errors as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"hf:{folder}: Transformers makes no features of {img_size} px images with it: {reason}; "
                "choose a vision model, or other settings"
            ) from None
        self.num_prefix_tokens = num_tokens - self.grid[0] * self.grid[1]
        self.has_cls = self.num_prefix_tokens > 0
        self.reduction = img_size // self.grid[0]

    def train(self, mode: bool = True) -> HuggingFaceBackbone:
        """Sets the mode of the wrapper alone, see the class."""
        self.training = mode
        return self

    def forward(self, images_BCHW: Tensor, drop_path_scale_RB: Tensor | None = None) -> Tensor:
        """See `Backbone.forward`."""
        return self._tokens(self._outputs(images_BCHW).last_hidden_state, normalise=True)

    def pooled(self, images_BCHW: Tensor) -> Tensor:
        """The model's own pooled feature, (B, D), or the mean of its patch tokens where it has none."""
        pooled: Tensor | None = None
        if self.pools:
            pooled = getattr(self._outputs(images_BCHW), "pooler_output", None)
        return super().pooled(images_BCHW) if pooled is None else pooled.flatten(1)

    def intermediates(
        self, images_BCHW: Tensor, layers: Sequence[int], drop_path_scale_RB: Tensor | None = None
    ) -> list[Tensor]:
        """See `Backbone.intermediates`."""
        assert drop_path_scale_RB is None, "its drop path is not handed in"
        hidden = self._outputs(images_BCHW, output_hidden_states=True).hidden_states[1:]
        found = [
            self._tokens(hidden[index], normalise=False) for index in resolve_layers(layers, len(hidden))
        ]
        for tokens_BLD in found:
            num_patches = tokens_BLD.shape[1] - self.num_prefix_tokens
            if num_patches < 1 or math.isqrt(num_patches) ** 2 != num_patches:
                raise UserError(
                    f"{type(self.model).__name__} gives {tokens_BLD.shape[1]} tokens between its layers, no grid with "
                    f"{self.num_prefix_tokens} prefix tokens; remove `layers`"
                )
        return found

    def list_blocks(self) -> list[nn.Module]:
        """The innermost layers that Transformers can recompute apart, see `Backbone.list_blocks`."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        layers = [module for module in self.modules() if isinstance(module, GradientCheckpointingLayer)]
        return [
            layer
            for layer in layers
            if not any(inner is not layer and inner in layers for inner in layer.modules())
        ]

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """See `Backbone.grid_size`."""
        return -(-height // self.reduction), -(-width // self.reduction)

    def no_weight_decay_names(self) -> set[str]:
        """Embeddings and learnt scales."""
        kept = (
            "cls_token",
            "class_embedding",
            "position_embedding",
            "register_tokens",
            "logit_scale",
            "bias_mlp",
        )
        return {name for name, _ in self.named_parameters() if any(part in name for part in kept)}

    def translate(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Knows our names and those of the model itself; position embeddings of another grid are resampled."""
        own = self.state_dict(keep_vars=True)
        found = {}
        for name, tensor in state.items():
            # Of theirs some begin so, too: DINOv3's `model.layer.0`.
            if not name.startswith("model.") or f"model.{name}" in own:
                name = f"model.{name}"
            if "position_embedding" in name and name in own and tensor.shape != own[name].shape:
                before = tuple(tensor.shape)
                tensor = self._resampled(tensor, own[name].shape)
                if tensor.shape != before:
                    logger.warning(
                        "weights: %s is resampled from %s to %s", name, before, tuple(tensor.shape)
                    )
            found[name] = tensor
        return found

    def _resampled(self, table: Tensor, wanted: torch.Size) -> Tensor:
        """Position embeddings of a square grid, (L, D) or (1, L, D), for the grid here.

        Those of prefix tokens stay. A table of no such grid, or of another D, comes back as it is: the caller names its
        shape.

        Source: what Transformers' models do for images of another size.
        """
        if table.dim() != len(wanted) or table.shape[-1] != wanted[-1]:
            return table
        rows_LD = table.flatten(0, -2)
        num_prefix = wanted[-2] - self.grid[0] * self.grid[1]  # registers have no position
        side = math.isqrt(max(len(rows_LD) - num_prefix, 0))
        if num_prefix < 0 or side == 0 or num_prefix + side**2 != len(rows_LD):
            return table
        old_1Drc = rows_LD[num_prefix:].T.unflatten(1, (side, side))[None].float()
        new_1Drc = F.interpolate(
            old_1Drc, size=self.grid, mode="bicubic", antialias=self.config.model_type in _ANTIALIASED
        )
        rows_LD = torch.cat([rows_LD[:num_prefix], new_1Drc[0].flatten(1).T.to(table.dtype)])
        return rows_LD.view(*table.shape[:-2], *rows_LD.shape)

    def layout_config(self, layout: str, config: ModelConfig) -> dict[str, Any]:
        """`config.json` of layout `hf`."""
        return self.config.to_dict() if layout == "hf" else {}

    def load_published(self, folder: Path) -> None:
        """Loads a folder's weights, as `published` reads them; nothing on the meta device.

        Raises:
            UserError: as `published`.
        """
        if not next(self.model.parameters()).is_meta:
            self.load_state_dict(self.published(folder))

    def published(self, folder: Path) -> dict[str, Tensor]:
        """Reads a folder's weights by Transformers' own rules (renamed keys, shards, parts that are not ours).

        A pooler of which there are no weights, as beside a classifier, stays random and is not asked.

        Raises:
            UserError: weights are missing or of other shapes.
        """
        config = copy.copy(self.config)
        config.image_size = getattr(read_config(folder), "image_size", config.image_size)
        try:
            model, report = type(self.model).from_pretrained(
                folder,
                config=config,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                use_safetensors=True,
            )
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(f"hf:{folder}: cannot be loaded: {' '.join(str(error).split())[:300]}") from None
        state, own = self.translate(model.state_dict()), self.state_dict(keep_vars=True)
        mismatched = list(report["mismatched_keys"])
        mismatched += [
            (name, state[name].shape, own[name].shape) for name in own if state[name].shape != own[name].shape
        ]
        for name, found, expected in sorted(mismatched):
            raise UserError(
                f"hf:{folder}: {name} has shape {tuple(found)}, and {tuple(expected)} at model.img_size "
                f"{self.config.image_size}; leave img_size and overrides out: they are the folder's then"
            )
        missing = sorted(str(name) for name in report["missing_keys"])
        of_pooler = [name for name in missing if name.startswith("pooler.")]
        if of_pooler and not (self.norm_name or "").startswith("pooler."):
            self.pools = False
            missing = [name for name in missing if name not in of_pooler]
        if missing:
            raise UserError(
                f"hf:{folder}: weights of another architecture: {', '.join(missing[:3])} missing"
                f"{f' and {len(missing) - 3} more' if len(missing) > 3 else ''}"
            )
        return state

    def _outputs(self, images_BCHW: Tensor, **options: Any) -> Any:
        weight = next(self.model.parameters())
        return self.model(pixel_values=images_BCHW.to(weight.dtype), **options)

    def _tokens(self, hidden: Tensor, normalise: bool) -> Tensor:
        tokens_BLD = hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden
        if normalise and self.norm_name is not None:
            tokens_BLD = self.model.get_submodule(self.norm_name)(tokens_BLD)
        return tokens_BLD

    def _probe(self, img_size: int) -> tuple[int, tuple[int, int], int]:
        """Channels, patch grid and number of tokens: no setting of Transformers names them for all models."""
        device = next(self.model.parameters()).device
        with torch.no_grad():
            hidden = self._outputs(torch.zeros(1, 3, img_size, img_size, device=device)).last_hidden_state
        if hidden.dim() == 4:
            return hidden.shape[1], (hidden.shape[2], hidden.shape[3]), hidden.shape[2] * hidden.shape[3]
        num_tokens = hidden.shape[1]
        patch_size = getattr(self.config, "patch_size", 1)
        side = img_size // patch_size if isinstance(patch_size, int) else img_size
        if side * side > num_tokens:  # a hierarchical model: no prefix tokens
            side = math.isqrt(num_tokens)
            if side * side != num_tokens:
                raise UserError(
                    f"hf: {type(self.model).__name__} makes {num_tokens} tokens of {img_size} px, no token grid; "
                    "choose another model (one that masks patches at random is none)"
                )
        return hidden.shape[2], (side, side), num_tokens


def is_published(path: Path) -> bool:
    """Whether it is a folder of Transformers' own, and not one of `fd-scale export`."""
    config = path / "config.json"
    return config.is_file() and "model_type" in json.loads(config.read_text(encoding="utf-8"))


def read_config(folder: Path) -> Any:
    """Returns the configuration of the vision part that a folder describes."""
    transformers = _transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"hf:{folder}: no configuration that Transformers knows: {' '.join(str(error).split())[:300]}"
        ) from None
    return getattr(config, "vision_config", config)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise UserError(
            "hf: needs Transformers, which is not installed; run: pip install 'fd-scale[hf]'"
        ) from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers
