"""Any timm model as a backbone: one token layout, drop path without a generator, weights by timm's names."""

# Shape suffix legend
#   B = images, H, W = pixels or token grid, C, D = channels, L = tokens, K = classes, R = residual branches

from __future__ import annotations

import contextlib
import difflib
import inspect
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from timm.layers import DropPath, to_2tuple
from timm.models import group_parameters
from torch import Tensor, nn

from fd_scale.config import ModelConfig
from fd_scale.data.transforms import CROP_FRACTION
from fd_scale.errors import UserError
from fd_scale.models.backbone import Backbone, resolve_layers
from fd_scale.models.layers import CheckpointingMode, ResidualBlock

logger = logging.getLogger(__name__)

# Names under which timm keeps the norm of models that pool before they normalise.
_NORMS_BEHIND_POOLING = ("fc_norm", "head.norm")
# What published files hold besides the backbone.
_NOT_BACKBONE = ("decoder", "feature_model.", "ln_tgt.", "projection_head.")
# And what timm's filters see before it goes: by a mask token they tell DINOv2 and EVA.
_HEADS = ("head.", "head_dist.", "lm_head.", "fc.", "classifier.", "fc_norm.", "attn_pool.", "mask_token")
# Arguments of timm that would change what a backbone is, or draw from a global generator.
_NOT_OVERRIDES = frozenset(
    {"in_chans", "num_classes", "global_pool", "features_only", "scriptable", "exportable", "no_jit", "cache_dir"}
    | {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "checkpoint_path"}
    | {"drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate"}
)  # fmt: skip
_POSITIONS = re.compile("pos_embed|rel_pos|relative_position")
_BUFFERS = ("relative_position_index", "attn_mask", "relative_coords_table")


def is_timm_model(name: str) -> bool:
    """True for the name of a timm model, with or without the tag of its weights."""
    return timm.is_model(name)


def takes_img_size(name: str) -> bool:
    """True where a timm model is built for one input size (its positions, its windows); others take any."""
    published = timm.get_pretrained_cfg(name)
    return published is not None and bool(published.fixed_input_size)


def nearest_timm_names(name: str) -> list[str]:
    """Returns names of timm models, with tags where `name` has one, that resemble it."""
    known = timm.list_pretrained() if "." in name else timm.list_models()
    return difflib.get_close_matches(name, known)


class DropPathByScale(nn.Module):
    """Stands in for timm's DropPath, which draws from a global generator: the factors are handed in."""

    def __init__(self) -> None:
        super().__init__()
        self.scale_B: Tensor | None = None

    def forward(self, residual: Tensor) -> Tensor:
        """Multiplies each image's residual, (B, ...), by its factor."""
        if self.scale_B is None:
            return residual
        # Some models fold windows or patches into the batch: then an image has several rows, one after the other.
        scale = self.scale_B.repeat_interleave(len(residual) // len(self.scale_B))
        return residual * scale.to(residual.dtype).view(-1, *[1] * (residual.dim() - 1))


class TimmBackbone(Backbone):
    """A timm model as far as a target of `config.TeacherConfig` needs it: with pooling, or with its classifier.

    Args:
        model: a model built by timm. Its DropPath modules are replaced and its dropout is switched off.
        target: `feature_map` drops pooling and classifier, `pooled` the classifier alone, `logits` nothing.

    Raises:
        UserError: the model cannot do without its pooling.

    Source: layouts of tokens and heads as in timm 1.0.
    """

    inner_layout = "timm"

    def __init__(self, model: nn.Module, target: str = "feature_map") -> None:
        super().__init__()
        timm_model: Any = model
        self.target = target
        pools = getattr(timm_model, "attn_pool", None) is not None
        try:
            if target == "feature_map":
                timm_model.reset_classifier(0, "")
            elif target == "pooled":
                timm_model.reset_classifier(0)
        except (AssertionError, NotImplementedError, TypeError, ValueError) as error:
            raise UserError(
                f"timm's {type(model).__name__} cannot do without its pooling ({error}): it has no token grid; "
                "as a teacher it can give target pooled"
            ) from None
        # Attention pooling has weights, which timm would miss.
        self.lost_pool = pools and getattr(timm_model, "attn_pool", None) is None
        self.model = timm_model
        self.num_features = timm_model.num_features
        self.has_cls = (
            getattr(timm_model, "cls_token", None) is not None
        )  # not all models have the attributes
        self.num_prefix_tokens = getattr(timm_model, "num_prefix_tokens", 0)
        self.reduction = to_2tuple(timm_model.feature_info[-1]["reduction"])
        self.norm_name = _norm_behind_pooling(timm_model)
        for module in timm_model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.p = 0.0  # it would draw from a global generator, and some models have it unasked
        self.drop_paths, self.drop_path_rates = _replace_drop_paths(timm_model)

    def layout_config(self, layout: str, config: ModelConfig) -> dict[str, Any]:
        """`config.json` of layout `timm`."""
        if layout != "timm":
            return {}
        size = {"img_size": config.size} if takes_img_size(config.name) else {}
        pool = {"global_pool": ""} if self.lost_pool else {}
        return timm_config(config, config.name.partition(".")[0], config.overrides | size | pool)

    def layer_ids(self) -> dict[str, int]:
        """See `Backbone.layer_ids`; the groups are timm's."""
        timm_model: Any = self.model
        try:
            ids = group_parameters(timm_model, timm_model.group_matcher(coarse=False), reverse=True)
        except AttributeError:  # a model without groups
            return super().layer_ids()
        behind = tuple(f"{name}." for name in ("norm", *_NORMS_BEHIND_POOLING))
        return {f"model.{name}": layer for name, layer in ids.items() if not name.startswith(behind)}

    def block_classes(self) -> set[type[nn.Module]]:
        """See `Backbone`: what timm's models keep in a list `blocks`."""
        lists = [module for name, module in self.named_modules() if name.endswith(".blocks")]
        found = super().block_classes()
        while lists:  # of some models they are lists of stages
            children = [child for blocks in lists for child in blocks.children()]
            lists = [child for child in children if type(child) in (nn.ModuleList, nn.Sequential)]
            found |= {type(child) for child in children} - {nn.ModuleList, nn.Sequential}
        return found

    def _checkpoint_blocks(self, mode: CheckpointingMode, period: int) -> None:
        if any(isinstance(module, ResidualBlock) for module in self.modules()):
            super()._checkpoint_blocks(mode, period)
            return
        if mode == "selective" or (mode == "block" and period > 1):
            raise UserError(
                f"train.activation_checkpointing: timm's {type(self.model).__name__} can recompute all of each block "
                f"alone, got {mode} with period {period}; set it to block with checkpointing_period=1, or to none"
            )
        try:
            self.model.set_grad_checkpointing(mode == "block")
        except AssertionError:
            raise UserError(
                f"train.activation_checkpointing: timm's {type(self.model).__name__} cannot recompute its blocks; "
                "set it to none"
            ) from None

    def forward(self, images_BCHW: Tensor, drop_path_scale_RB: Tensor | None = None) -> Tensor:
        """See `Backbone.forward`."""
        self._hand_in(drop_path_scale_RB)
        features = self._features(images_BCHW)
        if not isinstance(features, Tensor):
            raise UserError(
                f"timm's {type(self.model).__name__} gives several feature maps; as a teacher it can give target pooled"
            )
        if self.norm_name is not None:
            features = self.model.get_submodule(self.norm_name)(features)
        rows, columns = self.grid_size(*images_BCHW.shape[-2:])
        tokens_BLD = self._as_tokens(features)
        if tokens_BLD.shape[1] != self.num_prefix_tokens + rows * columns:
            raise UserError(
                f"timm's {type(self.model).__name__} makes {tokens_BLD.shape[1]} tokens of "
                f"{tuple(images_BCHW.shape[-2:])} px; expected {self.num_prefix_tokens} + {rows} x {columns}; "
                "choose another img_size, or, for a teacher without a token grid, target pooled"
            )
        return tokens_BLD

    def _hand_in(self, drop_path_scale_RB: Tensor | None) -> None:
        scales = [None] * len(self.drop_paths) if drop_path_scale_RB is None else drop_path_scale_RB.unbind()
        for drop_path, scale_B in zip(self.drop_paths, scales, strict=True):
            drop_path.scale_B = scale_B

    def _features(self, images_BCHW: Tensor) -> Any:
        weight = next(self.model.parameters())
        return self.model.forward_features(images_BCHW.to(weight.dtype))

    def _as_tokens(self, features: Tensor) -> Tensor:
        if features.dim() == 4:
            channels_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
            features = features.flatten(1, 2) if channels_last else features.flatten(2).transpose(1, 2)
        elif features.dim() != 3:
            raise UserError(
                f"timm's {type(self.model).__name__} gives features of shape {tuple(features.shape)}, no token grid; "
                "as a teacher it can give target pooled"
            )
        return features

    def pooled(self, images_BCHW: Tensor) -> Tensor:
        """The feature that timm's classifier reads, (B, D)."""
        if self.target == "feature_map":
            return super().pooled(images_BCHW)
        return self.model.forward_head(self._features(images_BCHW), pre_logits=True)

    def logits(self, images_BCHW: Tensor) -> Tensor:
        """See `Backbone.logits`."""
        assert self.target == "logits", "a teacher whose logits are wanted keeps its head"
        if self.model.num_classes < 1:
            raise UserError(
                f"timm's {type(self.model).__name__} of this name has no classifier; "
                "choose target feature_map or pooled, or a name whose weights have one"
            )
        return self.model.forward_head(self._features(images_BCHW))

    def intermediates(
        self, images_BCHW: Tensor, layers: Sequence[int], drop_path_scale_RB: Tensor | None = None
    ) -> list[Tensor]:
        """See `Backbone.intermediates`."""
        self._hand_in(drop_path_scale_RB)
        indices = resolve_layers(layers, len(self.model.feature_info))
        method = getattr(self.model, "forward_intermediates", None)
        known = inspect.signature(method).parameters if method is not None else {}
        options: dict[str, Any] = {"output_fmt": "NCHW", "intermediates_only": True}
        if self.num_prefix_tokens:
            options["return_prefix_tokens"] = True
        if method is None or not set(options) <= set(known):
            raise UserError(
                f"timm's {type(self.model).__name__} gives no intermediate layers; remove `layers`"
            )
        weight = next(self.model.parameters())
        found = method(images_BCHW.to(weight.dtype), indices=sorted(set(indices)), **options)
        by_index = dict(zip(sorted(set(indices)), found, strict=True))
        return [self._layer_tokens(by_index[index]) for index in indices]

    def layer_shapes(self) -> list[tuple[int, int]]:
        """See `Backbone.layer_shapes`."""
        return [(layer["num_chs"], to_2tuple(layer["reduction"])[0]) for layer in self.model.feature_info]

    def final_norm(self) -> nn.LayerNorm:
        """See `Backbone.final_norm`."""
        norm = dict(self.model.named_modules()).get(self.norm_name or "norm")
        # LayerNorm2d and others of timm are subclasses that take maps.
        takes_tokens = not type(norm).__name__.endswith("2d")
        if takes_tokens and isinstance(norm, nn.LayerNorm) and norm.normalized_shape == (self.num_features,):
            return norm
        return super().final_norm()

    def _layer_tokens(self, layer: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        map_BDHW, prefix_BPD = layer if isinstance(layer, tuple) else (layer, None)
        patches_BLD = map_BDHW.flatten(2).transpose(1, 2)
        return patches_BLD if prefix_BPD is None else torch.cat([prefix_BPD, patches_BLD], dim=1)

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """See `Backbone.grid_size`."""
        return -(-height // self.reduction[0]), -(-width // self.reduction[1])

    def no_weight_decay_names(self) -> set[str]:
        """What timm spares: embeddings, CLS token, tables of relative position."""
        timm_names = (
            self.model.no_weight_decay() if callable(getattr(self.model, "no_weight_decay", None)) else ()
        )
        names = {name for name, _ in self.named_parameters()}
        return {f"model.{name}" for name in timm_names} & names

    def translate(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Knows our names, timm's, and the published layouts that timm's own filter knows; heads are dropped."""
        found = dict(state)
        for prefix in ("backbone.", "encoder.", "model."):
            if any(name.startswith(prefix) for name in found):
                found = {name.removeprefix(prefix): found[name] for name in found if name.startswith(prefix)}
        found = {
            name: tensor
            for name, tensor in found.items()
            if not name.startswith(_NOT_BACKBONE) and not name.endswith(_BUFFERS)
        }
        filter_fn = getattr(sys.modules[type(self.model).__module__], "checkpoint_filter_fn", None)
        if filter_fn is not None:
            # The filters trip over keys that their model has not; the caller names those.
            with contextlib.suppress(AttributeError, KeyError, RuntimeError):
                fitted = filter_fn(found, self.model)
                for name in fitted.keys() & found.keys():
                    # Others have changed names: what was Swin's `layers.0.downsample` is that of layer 1 in timm.
                    if _POSITIONS.search(name) and fitted[name].shape != found[name].shape:
                        before, after = tuple(found[name].shape), tuple(fitted[name].shape)
                        logger.warning("weights: %s is resampled from %s to %s", name, before, after)
                found = fitted
        own = set(self.model.state_dict())
        for part in ("weight", "bias"):  # of a classifier whose final norm stood behind the pooling
            if (
                f"norm.{part}" in own - found.keys()
                and f"fc_norm.{part}" not in own
                and f"fc_norm.{part}" in found
            ):
                found[f"norm.{part}"] = found.pop(f"fc_norm.{part}")
        return {
            f"model.{name}": tensor
            for name, tensor in found.items()
            if name in own or not name.startswith(_HEADS)
        }


def timm_config(config: ModelConfig, architecture: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns what `timm.create_model("local-dir:FOLDER", pretrained=True)` reads beside weights without a classifier.

    Args:
        config: resolved; its mean and standard deviation are the images'.
        architecture: name of timm's function that builds the model.
        arguments: of that function.
    """
    theirs = timm.get_pretrained_cfg(architecture)
    return {
        "architecture": architecture,
        "num_classes": 0,
        "model_args": arguments,
        "pretrained_cfg": {
            "num_classes": 0, "input_size": [3, config.size, config.size], "mean": config.mean, "std": config.std,
            "interpolation": "bicubic", "crop_mode": "center", "crop_pct": CROP_FRACTION,
            # Whose weights timm leaves out where a user wants classes.
            "first_conv": theirs.first_conv, "classifier": theirs.classifier,
        },
    }  # fmt: skip


def create_timm_model(name: str, img_size: int | None, overrides: dict[str, Any]) -> nn.Module:
    """Builds a timm model with fresh weights.

    Raises:
        UserError: an unknown tag, or an argument that the model does not take or that is not for a backbone.
    """
    refused = sorted(set(overrides) & _NOT_OVERRIDES)
    if refused:
        raise UserError(
            f"model.overrides.{refused[0]}: not for a backbone here: images have three channels, heads belong to "
            "tasks, weights to model.weights, and of the random layers there is drop_path_rate alone"
        )
    if img_size is not None and takes_img_size(name):
        overrides = overrides | {"img_size": img_size}
    try:
        model = timm.create_model(name, pretrained=False, **overrides)
    except (TypeError, RuntimeError, AssertionError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"timm does not build {name} with {overrides or 'its own settings'}: {reason}; "
            f"names like it: {', '.join(nearest_timm_names(name)) or 'none'}"
        ) from None
    patch_size = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if "img_size" in overrides and patch_size is not None:
        patch = to_2tuple(patch_size)[0]
        if overrides["img_size"] % patch:
            low = max(overrides["img_size"] // patch, 1) * patch
            raise UserError(
                f"model.img_size: {overrides['img_size']} is not a multiple of the patch size {patch} of {name}; "
                f"the nearest are {low} and {low + patch}"
            )
    return model


def _norm_behind_pooling(model: Any) -> str | None:
    """Name of the final norm, where `forward_features` of a timm model leaves it to the head."""
    norms = {name for name, module in model.named_modules() if not isinstance(module, nn.Identity)}
    if "norm" in norms:
        return None
    return next((name for name in _NORMS_BEHIND_POOLING if name in norms), None)


def _replace_drop_paths(model: nn.Module) -> tuple[list[DropPathByScale], tuple[float, ...]]:
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, DropPath)]
    replacements = []
    for name, _ in found:
        parent, _, child = name.rpartition(".")
        replacements.append(DropPathByScale())
        setattr(model.get_submodule(parent), child, replacements[-1])
    return replacements, tuple(float(module.drop_prob) for _, module in found)
