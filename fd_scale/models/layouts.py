"""Key layouts of Swin V2 weights: one table each, read from left to right on loading, back on export.

In a name, {i} stands for a stage, {next} for the stage after it, {j} for a block, {rest} and {any} for anything.
"""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fd_scale.errors import UserError

_BLOCK = "layers.{i}.blocks.{j}."
_STAGE_BIAS = "layers.{i}.position_bias.{rest}"
_BLOCK_BIAS = _BLOCK + "attn.position_bias.{rest}"
_LOGIT_SCALE = _BLOCK + "attn.logit_scale"
_QKV = _BLOCK + "attn.qkv.weight"
_QKV_PARTS = tuple(_BLOCK + f"attn.qkv.{part}_weight" for part in "qkv")
"""Hugging Face keeps three matrices; on the way they have these names."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one project names the tensors of a Swin V2."""

    prefixes: tuple[str, ...] = ("",)
    """What may stand before each name; the first is written."""
    marks: tuple[str, ...]
    """Names that, all found, tell the layout."""
    names: tuple[tuple[str, str], ...] = ()
    """Their name, our name; the others are alike."""
    dropped: tuple[str, ...] = ()
    """Heads and buffers, behind the prefix."""
    beside: tuple[str, ...] = ()
    """Modules beside the backbone, where a prefix tells it from them."""
    has_stage_bias: bool = False
    """Whether a stage may hold one position bias for all its blocks."""
    has_extra_norm: bool = False
    """Whether a block may end in a LayerNorm on the main branch."""
    splits_qkv: bool = False
    """Whether queries, keys and values have a matrix each."""


_QV_BIAS = (
    (_BLOCK + "attn.q_bias", _BLOCK + "attn.qkv.q_bias"),
    (_BLOCK + "attn.v_bias", _BLOCK + "attn.qkv.v_bias"),
)
_CPB = ((_BLOCK + "attn.cpb_mlp.{rest}", _BLOCK + "attn.position_bias.cpb_mlp.{rest}"),)
_DOWNSAMPLE_AT_END = (("layers.{i}.downsample.{rest}", "layers.{next}.downsample.{rest}"),)
_BUFFERS = (
    _BLOCK + "attn.relative_coords_table",
    _BLOCK + "attn.relative_position_index",
    _BLOCK + "attn_mask",
    "layers.{i}.rel_pos_bias.relative_coords_table",
    "layers.{i}.rel_pos_bias.relative_position_index",
)
_HEADS = ("head.{rest}", "mask_token")
_HF_BLOCK = "encoder.layers.{i}.blocks.{j}."
_HF_ATTENTION = _HF_BLOCK + "attention.self."

LAYOUTS = {
    "ours": Layout(
        prefixes=("", "backbone."),
        marks=("{any}.position_bias.cpb_mlp.{rest}",),
        beside=("projectors.{rest}", "projection.{rest}", "norm.{rest}", "head.{rest}"),
        has_stage_bias=True,
        has_extra_norm=True,
    ),
    "fd": Layout(
        prefixes=("encoder.", ""),
        marks=("{any}.rpe_mlp.{rest}",),
        names=(
            ("layers.{i}.rel_pos_bias.rpe_mlp.{rest}", "layers.{i}.position_bias.cpb_mlp.{rest}"),
            (_BLOCK + "attn.rpe_mlp.{rest}", _BLOCK + "attn.position_bias.cpb_mlp.{rest}"),
            (_BLOCK + "enorm.{rest}", _BLOCK + "norm3.{rest}"),
            *_QV_BIAS,
            *_DOWNSAMPLE_AT_END,
        ),
        dropped=_BUFFERS + _HEADS,
        beside=("decoder.{rest}", "feature_model.{rest}", "ln_tgt.{rest}"),
        has_stage_bias=True,
        has_extra_norm=True,
    ),
    "hf": Layout(
        prefixes=("", "swinv2."),
        marks=("{any}.continuous_position_bias_mlp.{rest}",),
        names=(
            ("embeddings.patch_embeddings.projection.{rest}", "patch_embed.proj.{rest}"),
            ("embeddings.norm.{rest}", "patch_embed.norm.{rest}"),
            (_HF_ATTENTION + "logit_scale", _LOGIT_SCALE),
            (
                _HF_ATTENTION + "continuous_position_bias_mlp.{rest}",
                _BLOCK + "attn.position_bias.cpb_mlp.{rest}",
            ),
            (_HF_ATTENTION + "query.bias", _BLOCK + "attn.qkv.q_bias"),
            (_HF_ATTENTION + "value.bias", _BLOCK + "attn.qkv.v_bias"),
            (_HF_ATTENTION + "query.weight", _QKV_PARTS[0]),
            (_HF_ATTENTION + "key.weight", _QKV_PARTS[1]),
            (_HF_ATTENTION + "value.weight", _QKV_PARTS[2]),
            (_HF_BLOCK + "attention.output.dense.{rest}", _BLOCK + "attn.proj.{rest}"),
            (_HF_BLOCK + "layernorm_before.{rest}", _BLOCK + "norm1.{rest}"),
            (_HF_BLOCK + "layernorm_after.{rest}", _BLOCK + "norm2.{rest}"),
            (_HF_BLOCK + "intermediate.dense.{rest}", _BLOCK + "mlp.fc1.{rest}"),
            (_HF_BLOCK + "output.dense.{rest}", _BLOCK + "mlp.fc2.{rest}"),
            ("encoder.layers.{i}.downsample.{rest}", "layers.{next}.downsample.{rest}"),
            ("layernorm.{rest}", "norm.{rest}"),
        ),
        dropped=(
            _HF_ATTENTION + "relative_coords_table",
            _HF_ATTENTION + "relative_position_index",
            "embeddings.mask_token",
        ),
        beside=("classifier.{rest}", "decoder.{rest}"),
        splits_qkv=True,
    ),
    "official": Layout(
        prefixes=("", "encoder."),
        marks=("{any}.attn.cpb_mlp.{rest}", "layers.0.downsample.{rest}"),
        names=_CPB + _QV_BIAS + _DOWNSAMPLE_AT_END,
        dropped=_BUFFERS + _HEADS,
        beside=("decoder.{rest}",),
    ),
    "timm": Layout(
        marks=("layers.{any}.attn.cpb_mlp.{rest}",),  # and, unlike official, no downsampling in stage 0
        names=_CPB + _QV_BIAS,
        dropped=_BUFFERS + _HEADS,
    ),
}


def recognise(names: Iterable[str]) -> tuple[str, str] | None:
    """Returns the layout of a Swin V2's tensor names and the prefix of its backbone; none: no layout known."""
    names = list(names)
    for layout_name, layout in LAYOUTS.items():
        for prefix in sorted(layout.prefixes, key=len, reverse=True):
            inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
            if all(any(_fields(mark, name) for name in inside) for mark in layout.marks):
                return layout_name, prefix
    return None


def from_layout(state: Mapping[str, Tensor], *, shared_bias: bool) -> dict[str, Tensor]:
    """Renames the tensors of any layout above for `SwinTransformerV2`; a name not in its table stays.

    Args:
        state: tensors by name; those that are no Swin V2's come back as they are.
        shared_bias: whether the model has one position bias a stage. A stage's bias is copied into all its
            blocks where it has not; the blocks' biases become the stage's where they are equal.

    Returns:
        The tensors by our names, heads, buffers and neighbours of the backbone left out.

    Raises:
        UserError: blocks of a stage have different biases and the model has one, or two names are one.
    """
    found = recognise(state)
    if found is None:
        return dict(state)
    layout, prefix = LAYOUTS[found[0]], found[1]
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith(prefix):
            ours = name.removeprefix(prefix)
            if _is_any(layout.dropped, ours):
                continue
            ours = _rename(ours, layout.names)
        elif _is_any(layout.beside, name):
            continue
        else:
            ours = name
        if ours in renamed:
            raise UserError(f"{name} and another tensor are both {ours}; save the backbone alone")
        renamed[ours] = tensor
    joined = _join_qkv(renamed) if layout.splits_qkv else renamed
    return _with_stage_bias(joined) if shared_bias else _with_block_bias(joined)


def to_layout(state: Mapping[str, Tensor], layout_name: str) -> dict[str, Tensor]:
    """Renames the tensors of a `SwinTransformerV2` for another project; the inverse of `from_layout`.

    Args:
        state: tensors by our names.
        layout_name: a key of `LAYOUTS`. Where it has no place for a stage's bias, each block gets a copy.

    Raises:
        UserError: an unknown layout, or extra norms that it has no place for.
    """
    if layout_name not in LAYOUTS:
        nearest = difflib.get_close_matches(layout_name, LAYOUTS) or LAYOUTS
        raise UserError(f"unknown layout {layout_name!r}; did you mean {', '.join(nearest)}")
    layout = LAYOUTS[layout_name]
    extra = [name for name in state if _fields(_BLOCK + "norm3.{rest}", name)]
    if extra and not layout.has_extra_norm:
        able = " or ".join(name for name, other in LAYOUTS.items() if other.has_extra_norm)
        raise UserError(
            f"layout {layout_name} has no place for the model's extra norms ({extra[0]}); use {able}"
        )
    ours = dict(state) if layout.has_stage_bias else _with_block_bias(state)
    if layout.splits_qkv:
        ours = _split_qkv(ours)
    backward = tuple((our_name, their_name) for their_name, our_name in layout.names)
    return {layout.prefixes[0] + _rename(name, backward): tensor for name, tensor in ours.items()}


def _with_block_bias(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    blocks = defaultdict(list)
    for name in state:
        if fields := _fields(_LOGIT_SCALE, name):
            blocks[fields["i"]].append(fields["j"])
    result = {}
    for name, tensor in state.items():
        if fields := _fields(_STAGE_BIAS, name):
            for block in blocks[fields["i"]]:
                # Copies: no file format keeps tensors that share memory.
                result[_BLOCK_BIAS.format(**fields | {"j": block})] = tensor.clone()
        else:
            result[name] = tensor
    return result


def _with_stage_bias(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        fields = _fields(_BLOCK_BIAS, name)
        if fields is None:
            result[name] = tensor
        elif not _equal(result.setdefault(_STAGE_BIAS.format(**fields), tensor), tensor):
            raise UserError(
                f"the blocks of stage {fields['i']} have different position biases, and the model has one for the "
                "stage; set shared_bias to false"
            )
    return result


def _equal(first: Tensor, second: Tensor) -> bool:
    """Equality of values, on the meta device, where there are none, of shapes."""
    return first.shape == second.shape if first.is_meta else torch.equal(first, second)


def _join_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    result = dict(state)
    for name in state:
        if fields := _fields(_QKV_PARTS[0], name):
            parts = [part.format(**fields) for part in _QKV_PARTS]
            if len({state[part].shape if part in state else None for part in parts}) == 1:
                result[_QKV.format(**fields)] = torch.cat([result.pop(part) for part in parts])
    return result


def _split_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if fields := _fields(_QKV, name):
            names = (part.format(**fields) for part in _QKV_PARTS)
            result.update(zip(names, (part.clone() for part in tensor.chunk(3)), strict=True))
        else:
            result[name] = tensor
    return result


def _rename(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for source, target in table:
        if fields := _fields(source, name):
            return target.format(**fields)
    return name


def _is_any(templates: tuple[str, ...], name: str) -> bool:
    return any(_fields(template, name) is not None for template in templates)


def _fields(template: str, name: str) -> dict[str, str] | None:
    """What the braces of a template stand for in a name, or None where the name is another."""
    match = _pattern(template).fullmatch(name)
    if match is None:
        return None
    fields = match.groupdict()
    if "next" in fields:
        fields["i"] = str(int(fields["next"]) - 1)
    elif "i" in fields:
        fields["next"] = str(int(fields["i"]) + 1)
    return fields


@cache
def _pattern(template: str) -> re.Pattern[str]:
    kinds = {"i": r"\d+", "next": r"\d+", "j": r"\d+", "rest": ".+", "any": ".+"}
    parts = re.split(r"\{(\w+)\}", template)
    return re.compile(
        "".join(
            f"(?P<{part}>{kinds[part]})" if index % 2 else re.escape(part) for index, part in enumerate(parts)
        )
    )
