"""What the miniature runs: teachers, students and what is varied, at the size of a laptop and at that of a GPU."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

DROP_PATH: dict[str, Any] = {"drop_path_rate": 0.1}


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A backbone of the recipes `miniature/`."""

    name: str
    overrides: Mapping[str, Any]

    def settings(self, key: str = "model", **changes: Any) -> list[str]:
        """Settings that make it the model of a recipe, at `key`, with other overrides."""
        return [f"{key}.name={self.name}", f"{key}.overrides={json.dumps({**self.overrides, **changes})}"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A way to distil."""

    settings: Sequence[str] = ()
    student: Model | None = None
    """Also as it is fine-tuned; none: the architecture's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """Models of a kind, and what is varied of them."""

    teacher: Model
    teacher_init: Mapping[str, Any] = field(default_factory=dict)
    """Overrides of a teacher that is trained from random weights."""
    student: Model
    tuned: Model
    """The student as it is fine-tuned."""
    ablations: Mapping[str, Variant] = field(default_factory=dict)
    """Students of the first teacher, besides those of every teacher."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Teaching:
    """How a teacher learns: recipe miniature/teacher_NAME."""

    verb: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    labelled: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """A whole miniature."""

    architectures: Mapping[str, Architecture]
    teachers: Mapping[str, Teaching]
    num_seeds: int
    side_by_side: int
    """Runs at a time."""
    settings: Sequence[str] = ()
    """Of all runs."""
    by_recipe: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Of the runs of a recipe, besides."""

    def of(self, recipe: str) -> list[str]:
        """Settings of the runs of a recipe."""
        return [*self.settings, *self.by_recipe.get(recipe, ())]


VARIANTS = {"whitened": Variant(), "raw": Variant(settings=["distill.loss=smooth_l1"])}
"""Of every teacher."""

CONTRASTIVE = Teaching(verb="pretrain")
SUPERVISED = Teaching(verb="finetune", overrides=DROP_PATH, labelled=True)
MASKED = Teaching(verb="pretrain")

_TEACHER = "distill.teachers.0"
ABLATIONS = {
    "pooled target": Variant(settings=[f"{_TEACHER}.target=pooled"]),
    "cosine": Variant(settings=["distill.loss=cosine"]),
    "squared error": Variant(settings=["distill.loss=mse"]),
    "no drop path": Variant(settings=["model.overrides.drop_path_rate=0.0"]),
    "drop path in both": Variant(
        settings=[f"{_TEACHER}.drop_path=true", f"{_TEACHER}.model.overrides.drop_path_rate=0.1"]
    ),
}
"""Of every architecture; position biases are its own."""
_OWN_BIAS = "bias of each block"

_SWIN = {"patch_size": 4, "embed_dim": 64, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
_SWIN_MODEL = Model(name="swin_v2_tiny", overrides=_SWIN)
SWIN = Architecture(
    teacher=_SWIN_MODEL, teacher_init={"post_norm_gain_init": 1.0}, student=_SWIN_MODEL, tuned=_SWIN_MODEL
)
_SWIN_OWN_BIAS = Model(name="swin_v2_tiny", overrides={**_SWIN, "shared_bias": False})
SWIN_ABLATED = replace(SWIN, ablations={**ABLATIONS, _OWN_BIAS: Variant(student=_SWIN_OWN_BIAS)})

# Narrow enough that a checkpoint, 14 bytes a parameter, stays under 16 MiB.
_VIT = {"patch_size": 4, "embed_dim": 128, "depth": 5, "num_heads": 4}
_OWN_TABLES = Model(name="fd_vit_tiny_patch16", overrides={**_VIT, "shared_bias": False})
_PLAIN = Model(name="vit_tiny_patch16_224", overrides=_VIT)
_ABSOLUTE = Model(name="vit_tiny_patch16_224", overrides={**_VIT, "init_values": 0.1})
VIT = Architecture(
    teacher=_PLAIN,
    student=Model(name="fd_vit_tiny_patch16", overrides=_VIT),
    tuned=_OWN_TABLES,
    ablations={
        **ABLATIONS,
        _OWN_BIAS: Variant(student=_OWN_TABLES),
        "absolute positions": Variant(student=_ABSOLUTE),
    },
)

STUDIES = {
    "cpu": Study(
        architectures={"swin_v2": SWIN},
        teachers={"contrastive": CONTRASTIVE, "supervised": SUPERVISED},
        num_seeds=2,
        side_by_side=2,
    ),
    "ablations": Study(
        architectures={"swin_v2": SWIN_ABLATED},
        teachers={"contrastive": CONTRASTIVE},
        num_seeds=2,
        side_by_side=2,
    ),
    "gpu": Study(
        architectures={"vit": VIT, "swin_v2": SWIN},
        teachers={"contrastive": CONTRASTIVE, "supervised": SUPERVISED, "masked": MASKED},
        num_seeds=3,
        side_by_side=14,  # of 16 cores; a run's process and its worker take turns
        settings=[
            "train.device=cuda", "train.precision=bf16", "train.ds_config=zero1", "data.num_workers=1",
            "checkpoint.keep_last=1", "checkpoint.save_every_steps=500",
        ],
        by_recipe={
            # Two crops an image and their colours: 0.45 ms an image, where the others take 0.05.
            "teacher_contrastive": ["train.steps=1000", "data.num_workers=6"],
            "teacher_supervised": ["train.steps=1500"],
            "teacher_masked": ["train.steps=1500"],
            "distill": ["train.steps=1000"],
            "finetune": ["train.steps=400"],
        },
    ),
}  # fmt: skip
