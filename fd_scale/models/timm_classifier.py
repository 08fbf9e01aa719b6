"""A fine-tuned classifier as timm's own model with classes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, Literal

import timm
import torch
from torch import Tensor

from fd_scale.models.backbone import Backbone

# A place for the head and the norms as they were trained: behind the mean of the patch tokens, or before it.
_POOLS: tuple[dict[str, Any], ...] = ({"global_pool": "avg"}, {"global_pool": "avg", "fc_norm": False})
_HEADS = ("head.fc.", "head.")


def timm_classifier(
    backbone: Backbone,
    described: Mapping[str, Any],
    named: Mapping[str, Tensor],
    head: Mapping[str, Tensor],
    norm: Literal["own", "fresh", "both"],
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Returns `config.json` and weights of timm's classifier that computes what a run's does.

    Args:
        backbone: of the run.
        described: `config.json` of the backbone in layout `timm`.
        named: the backbone's weights by timm's names.
        head: `weight`, (K, D), and `bias`, (K).
        norm: `classification.norm` of the run.

    Returns:
        None where timm's model has no place for the norms and the head: two norms, a norm between pooling and head that
        was trained before it.
    """
    if norm == "both" or getattr(backbone, "norm_name", None) is not None:
        return None
    num_classes = len(head["bias"])
    body = {name.replace("norm.", "fc_norm.", 1) if norm == "fresh" and name.startswith("norm.") else name: tensor
            for name, tensor in named.items()}  # fmt: skip
    for pool, prefix in itertools.product(_POOLS, _HEADS):
        arguments = described["model_args"] | pool
        try:
            with torch.device("meta"):
                theirs = timm.create_model(described["architecture"], num_classes=num_classes, **arguments)
        except TypeError:  # one that has no such norm
            continue
        weights = body | {prefix + name: tensor for name, tensor in head.items()}
        wanted = {name: parameter.shape for name, parameter in theirs.named_parameters()}
        if wanted == {name: tensor.shape for name, tensor in weights.items()}:
            published = described["pretrained_cfg"] | {"num_classes": num_classes}
            config = {"num_classes": num_classes, "model_args": arguments, "pretrained_cfg": published}
            return {**described, **config}, weights
    return None
