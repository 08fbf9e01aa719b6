"""The recipe: one strict, frozen configuration for every task, read from YAML and `key=value` arguments.

Nothing here imports torch: reading a recipe costs milliseconds, on a login node too.
"""

from __future__ import annotations

import difflib
import re
import sys
from dataclasses import MISSING, dataclass, field, fields
from importlib import resources
from math import inf
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fd_scale.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

PRETRAINED = "pretrained"
"""As `model.weights`: the published ones of the model's name."""
TEACHER = "teacher"
"""As a student's `model.weights`: those of the first teacher."""

TASKS = ("distill", "contrastive", "classification", "linear_probe")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A backbone: its shape, its input, and where its weights come from."""

    name: str
    """`swin_v2_*` or `fd_vit_*` (ours), any timm model, e.g. `vit_base_patch16_clip_224.openai`, or `hf:` and a
    folder or repository of Hugging Face."""
    img_size: int | None = None
    """Side of the square input, in pixels; none: the model's own."""
    mean: tuple[float, float, float] | None = None
    """Mean of the RGB channels that the model expects, in 0..1; none: the model's own."""
    std: tuple[float, float, float] | None = None
    """Standard deviation of the RGB channels that the model expects, in 0..1; none: the model's own."""
    weights: str | None = None
    """A file (.safetensors, .pth) or folder in any layout we know; `pretrained`: the published ones of this name;
    `teacher`: those of the first teacher; none: random initialisation."""
    license: str = "unknown"
    """Licence of the weights, as the model card will name it; unknown: what timm says of the name, if it does."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Arguments of the model's constructor that differ from those of its name."""

    def __post_init__(self) -> None:
        _require(
            self.img_size is None or self.img_size > 0, "model.img_size", self.img_size, "more than 0 pixels"
        )
        _require(self.std is None or min(self.std) > 0, "model.std", self.std, "three positive numbers")

    @property
    def size(self) -> int:
        """`img_size` of a resolved section (`fd_scale.models.resolved`)."""
        assert self.img_size is not None, f"{self.name} is not resolved"
        return self.img_size


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """One of several sources of images: how often its images appear, and which of them."""

    source: str
    """`digits:train`, `imagefolder:PATH`, `parquet:PATH` or `tar:PATH`, as `data.train` takes one alone."""
    weight: int = 1
    """How often each image of this source appears in an epoch."""
    only: str | None = None
    """Text file, one key a line: the images to keep; none: all."""
    without: str | None = None
    """Text file, one key a line: the images to leave out; none: none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where images come from and how a training view of one is cut."""

    train: Any
    """Training images: `digits:train`, `imagefolder:PATH`, `parquet:PATH`, `tar:PATH`, or a list of sources."""
    evaluation: Any = None
    """Images that metrics are measured on, a source or a list as in `data.train`; none: no evaluation."""
    num_workers: int = 4
    """Loader processes on each rank; 0 decodes in the training process."""
    max_bad_fraction: float = 0.01
    """Share of samples that may fail to decode (each is named and replaced) before the run stops."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Area of a random crop, as a share of the image."""
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    """Width / height of a random crop."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How a crop is resized."""
    rand_augment: str | None = None
    """RandAugment in timm's words, as `m9-mstd0.5-inc1`; none: no such augmentation."""
    erasing: float = 0.0
    """Probability that a rectangle of the view becomes noise."""

    def __post_init__(self) -> None:
        # OmegaConf knows no type for "a string or a list of these": it is checked here.
        object.__setattr__(self, "train", _sources("data.train", self.train))
        if self.evaluation is not None:
            object.__setattr__(self, "evaluation", _sources("data.evaluation", self.evaluation))
        _require(self.num_workers >= 0, "data.num_workers", self.num_workers, "0 or more")
        _require(
            0 <= self.max_bad_fraction <= 1,
            "data.max_bad_fraction",
            self.max_bad_fraction,
            "a number in 0..1",
        )
        _require(
            0 < self.crop_scale[0] <= self.crop_scale[1] <= 1,
            "data.crop_scale",
            self.crop_scale,
            "0 < smallest <= largest <= 1",
        )
        _require(
            0 < self.crop_ratio[0] <= self.crop_ratio[1],
            "data.crop_ratio",
            self.crop_ratio,
            "0 < smallest <= largest",
        )
        for key in ("flip", "erasing"):
            _require(0 <= getattr(self, key) <= 1, f"data.{key}", getattr(self, key), "a probability")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW and its schedule: linear warm-up, then cosine, a value for every step."""

    lr: float
    """Peak learning rate at this recipe's global batch (nothing is rescaled)."""
    warmup_lr: float = 0.0
    """Learning rate of the first step."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine."""
    warmup_epochs: float = 0.0
    """Length of the warm-up where the run's length is given in epochs."""
    warmup_steps: int = 0
    """Length of the warm-up where the run's length is given in steps."""
    layer_decay: float = 1.0
    """Factor of the peak learning rate from each layer to the one before it; all layers begin and end alike."""
    weight_decay: float = 0.05
    """Decoupled weight decay; 1-D parameters and those that the model names are spared."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: float = 1e-8
    """Term added to the denominator."""
    grad_clip: float = 3.0
    """Largest L2 norm of the whole gradient; 0: no clipping."""

    def __post_init__(self) -> None:
        for key in ("lr", "eps"):
            _require(0 < getattr(self, key) < inf, f"optim.{key}", getattr(self, key), "a positive number")
        _require(
            0 <= min(self.betas) <= max(self.betas) < 1,
            "optim.betas",
            self.betas,
            "two numbers in 0..1, below 1",
        )
        _require(
            0 < self.layer_decay <= 1, "optim.layer_decay", self.layer_decay, "a number above 0, at most 1"
        )
        for key in ("warmup_lr", "min_lr", "warmup_epochs", "warmup_steps", "weight_decay", "grad_clip"):
            _require(0 <= getattr(self, key) < inf, f"optim.{key}", getattr(self, key), "0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Length, batch and engine of the run."""

    global_batch: int
    """Images in one optimizer step over all devices: the same whatever the number of devices."""
    micro_batch: int
    """Most images a device holds in one forward pass; accumulation steps follow from it."""
    epochs: float | None = None
    """Length of the run in epochs (or `steps`)."""
    steps: int | None = None
    """Length of the run in optimizer steps (or `epochs`)."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Arithmetic of the forward and backward pass; master weights are fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; `auto`: CUDA where there is any, else the CPU."""
    ds_config: str = "zero1"
    """A DeepSpeed JSON file, or the name of one in ds_configs/."""
    activation_checkpointing: Literal["none", "block", "selective"] = "none"
    """What the backward pass computes again. `block`: all of a block but its input; `selective`: all but its attention
    (the MLP, norms behind the attention)."""
    checkpointing_period: int = 1
    """One block of each so many is computed again, the others are kept."""
    kernels: Literal["auto", "reference", "triton"] = "auto"
    """`auto`: Triton kernels on CUDA where they serve, PyTorch elsewhere; `reference`: PyTorch alone; `triton`: a call
    that no kernel serves is an error."""
    compile: bool = False
    """Compiles the blocks of `swin_v2_*` and `fd_vit_*` (`torch.compile`), our kernels left as they are: the first step
    takes minutes longer."""
    timeout_s: int = 1800
    """Seconds without a step, a save or a batch of an evaluation after which the job ends, with the stacks of its
    ranks in logs/."""

    def __post_init__(self) -> None:
        for key in ("global_batch", "micro_batch", "checkpointing_period", "timeout_s"):
            _require(getattr(self, key) > 0, f"train.{key}", getattr(self, key), "a positive whole number")
        if (self.epochs is None) == (self.steps is None):
            raise UserError(
                "train: exactly one of train.epochs and train.steps gives the run's length; "
                f"got epochs={self.epochs}, steps={self.steps}"
            )
        length = self.epochs if self.steps is None else self.steps
        _require(length is not None and length > 0, "train.epochs or train.steps", length, "more than 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When the run is saved and what is kept."""

    save_every_steps: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep_last: int = 2
    """Newest checkpoints kept; the best by the evaluation metric is kept besides."""

    def __post_init__(self) -> None:
        for key in ("save_every_steps", "keep_last"):
            _require(
                getattr(self, key) > 0, f"checkpoint.{key}", getattr(self, key), "a positive whole number"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchConfig:
    """What is done about losses that are out of line."""

    spike_factor: float = 4.0
    """A loss above so many times the mean of the 50 before it is a spike; 0: none is."""
    max_bad_steps: int = 10
    """Steps in a row with a spike, or skipped for a gradient that is not finite, after which the run goes back to its
    newest checkpoint and takes other samples from there."""
    max_rollbacks: int = 2
    """Times that it goes back before it stops."""

    def __post_init__(self) -> None:
        _require(
            self.spike_factor == 0 or 1 < self.spike_factor < inf, "watch.spike_factor", self.spike_factor,
            "0 or more than 1",
        )  # fmt: skip
        _require(self.max_bad_steps > 0, "watch.max_bad_steps", self.max_bad_steps, "a positive whole number")
        _require(self.max_rollbacks >= 0, "watch.max_rollbacks", self.max_rollbacks, "0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    """What the run shows of itself."""

    every_steps: int = 50
    """Steps between lines of metrics."""
    images_every_steps: int = 1000
    """Steps between pictures in TensorBoard; 0: none."""
    evaluate_every_steps: int = 0
    """Steps between evaluations; 0: at the end only."""
    profile: bool = False
    """Writes a trace of the third to fifth step after the start into profile/, a file a rank."""

    def __post_init__(self) -> None:
        _require(self.every_steps > 0, "log.every_steps", self.every_steps, "a positive whole number")
        for key in ("images_every_steps", "evaluate_every_steps"):
            _require(getattr(self, key) >= 0, f"log.{key}", getattr(self, key), "0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    """A frozen model whose features are a target."""

    model: ModelConfig
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """Arithmetic of its forward pass; none: that of the student."""
    target: Literal["feature_map", "pooled", "logits"] = "feature_map"
    """What the student predicts: the tokens after the teacher's final norm, the pooled feature, or the logits."""
    layers: list[int] | None = None
    """Blocks (hierarchical models: stages), from 0 or from -1 backwards, whose tokens are predicted in place of the
    last ones; each has a projector."""
    cls_weight: float | None = None
    """Weight of the CLS token beside a patch token's 1; 0: dropped; none: 1 where both models have one."""
    projector: Literal["linear", "mlp"] = "linear"
    """From the student's width to the teacher's: one linear layer, or two with a GELU between them."""
    weight: float = 1.0
    """Factor of this teacher's loss."""
    share: float = 1.0
    """Share of the images that this teacher sees; drawn for each image by the seed."""
    partitioned: bool = False
    """Whether each rank holds a part of its weights, as ZeRO-3 does, and gathers the others block by block; else each
    rank holds all of them. For a teacher that would not fit."""

    def __post_init__(self) -> None:
        _require(0 < self.weight < inf, "distill.teachers.weight", self.weight, "a positive number")
        _require(0 < self.share <= 1, "distill.teachers.share", self.share, "a number above 0, at most 1")
        _require(
            self.cls_weight is None or 0 <= self.cls_weight < inf,
            "distill.teachers.cls_weight",
            self.cls_weight,
            "0 or more",
        )
        if self.layers is not None:
            _require(
                len(self.layers) > 0, "distill.teachers.layers", self.layers, "at least one layer, or none"
            )
            if self.target != "feature_map":
                raise UserError(
                    f"distill.teachers.layers: chosen layers have a feature map alone, target is {self.target}; "
                    "remove layers or set target=feature_map"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig:
    """Feature distillation (arXiv 2205.14141)."""

    teachers: list[TeacherConfig]
    """The teachers; one is the usual case."""
    loss: Literal["whitened_smooth_l1", "smooth_l1", "cosine", "mse", "phi_s"] = "whitened_smooth_l1"
    """Distance: smooth L1 to the whitened target or to the target as it is, 1 - cosine similarity, squared error, or
    squared error to the PHI-S standardised target (arXiv 2410.01680)."""
    beta: float = 2.0
    """Where smooth L1 turns from squared to absolute error; of a whitened target, in its standard deviations."""
    knn_images: int = 0
    """Training images, evenly spread, among which each evaluation looks for its images' 20 nearest neighbours, to judge
    the student's features by labels; 0: no such metric."""
    phi_s_images: int = 4096
    """Images, the first of the run's stream, over which PHI-S measures a teacher's statistics at every start."""

    def __post_init__(self) -> None:
        _require(len(self.teachers) > 0, "distill.teachers", "an empty list", "at least one teacher")
        _require(self.beta > 0, "distill.beta", self.beta, "a positive number")
        _require(self.knn_images >= 0, "distill.knn_images", self.knn_images, "0 or more")
        _require(self.phi_s_images > 0, "distill.phi_s_images", self.phi_s_images, "a positive whole number")
        for index, teacher in enumerate(self.teachers):
            if teacher.model.weights == TEACHER:
                raise UserError(
                    f"distill.teachers.{index}.model.weights: `{TEACHER}` is for a student; name the teacher's file, "
                    f"or write ./{TEACHER} for a folder of that name"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class ContrastiveConfig:
    """Contrastive pre-training: NT-Xent between two views of each image (SimCLR, arXiv 2002.05709)."""

    temperature: float = 0.2
    """Divides the cosine similarities."""
    projection_dim: int = 128
    """Width of the space in which views are compared."""
    jitter: float = 0.4
    """Strength of the brightness, contrast and saturation jitter; 0: none."""

    def __post_init__(self) -> None:
        _require(self.temperature > 0, "contrastive.temperature", self.temperature, "a positive number")
        _require(0 <= self.jitter <= 1, "contrastive.jitter", self.jitter, "a number in 0..1")
        _require(self.projection_dim > 0, "contrastive.projection_dim", self.projection_dim, "more than 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassificationConfig:
    """Fine-tuning on labels: mean of the tokens, LayerNorm, linear head."""

    num_classes: int | None = None
    """Classes that the source must have; none: as many as it has. `plan` needs it where the data are elsewhere."""
    label_smoothing: float = 0.1
    """Share of the target spread over all classes."""
    head_init_scale: float = 0.001
    """Factor on the head's initial weights."""
    mixup: float = 0.0
    """Both parameters of the beta distribution of Mixup's weights; 0: no Mixup."""
    cutmix: float = 0.0
    """Both parameters of the beta distribution of the area that CutMix leaves; 0: no CutMix."""
    cutmix_share: float = 0.5
    """Where both are on, the share of pairs that CutMix mixes."""

    def __post_init__(self) -> None:
        _require(
            self.num_classes is None or self.num_classes > 1,
            "classification.num_classes",
            self.num_classes,
            "2 or more",
        )
        for key in ("mixup", "cutmix"):
            _require(0 <= getattr(self, key) < inf, f"classification.{key}", getattr(self, key), "0 or more")
        _require(
            0 <= self.cutmix_share <= 1, "classification.cutmix_share", self.cutmix_share, "a number in 0..1"
        )
        _require(
            0 <= self.label_smoothing < 1,
            "classification.label_smoothing",
            self.label_smoothing,
            "a number in 0..1",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearProbeConfig:
    """A linear classifier on the mean of a frozen model's patch tokens: computed once, without augmentation."""

    lr_factors: list[float] = field(default_factory=lambda: [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0])
    """A classifier for each: factors of `optim.lr`. All are trained in one pass; the best by top-1 is reported."""

    def __post_init__(self) -> None:
        _require(
            len(self.lr_factors) > 0 and 0 < min(self.lr_factors) <= max(self.lr_factors) < inf,
            "linear_probe.lr_factors", self.lr_factors, "positive numbers, at least one",
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """All that defines a run."""

    task: Literal["distill", "contrastive", "classification", "linear_probe"]
    """What is trained; the section of the same name holds its settings."""
    run_dir: str
    """Folder of the run: made where absent, resumed where it holds a checkpoint."""
    seed: int = 0
    """Root of all randomness: initialisation, order, crops, drop path."""
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    log: LogConfig = field(default_factory=LogConfig)
    distill: DistillConfig | None = None
    contrastive: ContrastiveConfig | None = None
    classification: ClassificationConfig | None = None
    linear_probe: LinearProbeConfig | None = None

    def __post_init__(self) -> None:
        for name in TASKS:
            given = getattr(self, name) is not None
            if given and name != self.task:
                raise UserError(
                    f"{name}: this section belongs to task {name}, the recipe's is {self.task}; remove it"
                )
            if not given and name == self.task:
                raise UserError(
                    f"{name}: task {name} needs a section of this name; `{name}: {{}}` takes the defaults"
                )
        if self.distill is None and self.model.weights == TEACHER:
            raise UserError(
                f"model.weights: task {self.task} has no teacher; name a file, or write ./{TEACHER} for a folder of "
                "that name"
            )
        if self.contrastive is not None and self.data.evaluation is not None:
            raise UserError(
                "data.evaluation: a contrastive loss depends on which images share a batch and is no metric of a "
                "source; remove data.evaluation"
            )
        plain = self.data.interpolation == "bilinear" and not (self.data.rand_augment or self.data.erasing)
        if (self.contrastive is not None or self.linear_probe is not None) and not plain:
            raise UserError(
                f"data.interpolation, data.rand_augment, data.erasing: task {self.task} cuts its views otherwise; "
                "remove them"
            )
        if self.linear_probe is not None and (self.optim.grad_clip or self.optim.layer_decay != 1):
            raise UserError(
                "optim.grad_clip, optim.layer_decay: a linear probe trains classifiers that must not touch each other, "
                "and no layers; set grad_clip to 0 and layer_decay to 1"
            )
        if self.linear_probe is not None and self.train.compile:
            raise UserError(
                "train.compile: a linear probe runs its model once over the images; set it to false"
            )
        if self.train.steps is None and self.optim.warmup_steps:
            raise UserError(
                "optim.warmup_steps: the run's length is in epochs; set optim.warmup_epochs instead"
            )
        if self.train.epochs is None and self.optim.warmup_epochs:
            raise UserError(
                "optim.warmup_epochs: the run's length is in steps; set optim.warmup_steps instead"
            )


_SECTIONS: dict[str, Any] = {
    "": Recipe, "model": ModelConfig, "data": DataConfig, "data.train.0": SourceConfig,
    "optim": OptimConfig, "train": TrainConfig, "checkpoint": CheckpointConfig, "watch": WatchConfig,
    "log": LogConfig,
    "distill": DistillConfig,
    "distill.teachers.0": TeacherConfig, "contrastive": ContrastiveConfig,
    "classification": ClassificationConfig, "linear_probe": LinearProbeConfig,
}  # fmt: skip


def _require(holds: bool, key: str, got: object, expected: str) -> None:
    if not holds:
        raise UserError(f"{key}: got {got}, expected {expected}")


def _sources(key: str, given: Any) -> str | list[SourceConfig]:
    """Returns what `data.train` and `data.evaluation` hold: a string as it is, or a list of checked sources."""
    if isinstance(given, str):
        return given
    _require(
        isinstance(given, list) and len(given) > 0, key, given, "a source or a list of {source, weight, ...}"
    )
    return [
        item if isinstance(item, SourceConfig) else _source(f"{key}.{index}", item)
        for index, item in enumerate(given)
    ]


def _source(key: str, given: Any) -> SourceConfig:
    known = [item.name for item in fields(SourceConfig)]
    _require(isinstance(given, dict), key, given, f"a mapping of {', '.join(known)}")
    for name in given:
        if name not in known:
            nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0)[0]
            raise UserError(f"{key}: no setting '{name}'; nearest: {nearest}, all: {', '.join(known)}")
    if given.get("source") is None:
        raise UserError(f"{key}.source: required and not given")
    try:
        source = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SourceConfig), given))
    except OmegaConfBaseException as error:
        raise UserError(f"{key}.{error.full_key}: {_first_line(error)}") from None
    assert isinstance(source, SourceConfig)
    _require(source.weight >= 1, f"{key}.weight", source.weight, "a whole number, 1 or more")
    return source


def as_list(sources: str | list[SourceConfig]) -> list[SourceConfig]:
    """Returns what `data.train` or `data.evaluation` holds as a list in either form."""
    return [SourceConfig(source=sources)] if isinstance(sources, str) else sources


def packaged_recipes() -> dict[str, Path]:
    """Returns the name and file of every recipe that ships with the package."""
    root = Path(str(resources.files("fd_scale") / "recipes"))
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.yaml"))}


def load_recipe(recipe: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Reads a recipe.

    Args:
        recipe: a YAML file, or the name of a packaged recipe.
        overrides: `key=value` strings, e.g. `optim.lr=1e-3` or `distill.teachers.0.model.weights=PATH`.

    Returns:
        The checked recipe.

    Raises:
        UserError: no such recipe, an unknown key, a wrong type or a value out of range.
    """
    path = _find_recipe(recipe)
    try:
        given = OmegaConf.load(path)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from None
    except OSError as error:  # OmegaConf's, also for a file that holds one number
        raise UserError(f"{path}: a recipe is a mapping of sections, cannot be read: {error}") from None
    if not isinstance(given, DictConfig):
        raise UserError(f"{path}: a recipe is a mapping of sections, got {type(given).__name__}")
    for item in overrides or []:
        key, separator, value = item.partition("=")
        if not separator or not key:
            raise UserError(f"'{item}': an override is written key=value, e.g. optim.lr=1e-3")
        try:
            _put(given, key, OmegaConf.from_dotlist([f"value={value}"]).value)
        except (OmegaConfBaseException, YAMLError, IndexError, TypeError, ValueError) as error:
            raise UserError(f"'{item}': cannot be set: {_first_line(error)}") from None
    try:
        values = OmegaConf.to_container(given, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {error.full_key}: {_first_line(error)}") from None
    return build_recipe(values, where=str(path))


def build_recipe(values: Any, where: str = "recipe") -> Recipe:
    """Builds a checked recipe from plain nested dicts; errors name `where`."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Recipe), values)
        missing = OmegaConf.missing_keys(merged)
        if missing:
            raise UserError(f"{where}: required and not given: {', '.join(sorted(missing))}")
        recipe = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        # OmegaConf names no key where a list of numbers has the wrong length
        key = error.full_key or f"one of {', '.join(_lists_of_fixed_length())}"
        raise UserError(f"{where}: {key}: {_first_line(error)}") from None
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None
    assert isinstance(recipe, Recipe)
    return recipe


def to_yaml(recipe: Recipe) -> str:
    """Returns the resolved recipe as YAML: reading it back gives an equal recipe."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe))


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Returns the resolved recipe as plain nested dicts and lists."""
    values = OmegaConf.to_container(OmegaConf.structured(recipe))
    assert isinstance(values, dict)
    return values  # type: ignore[return-value]


def describe_keys() -> list[tuple[str, str, str]]:
    """Returns (key, default, meaning) of every setting, from the field docstrings above."""
    return [
        (f"{section}.{name}".lstrip("."), default, meaning)
        for section, cls in _SECTIONS.items()
        for name, default, meaning in describe_fields(cls)
    ]


def default_settings() -> dict[str, Any]:
    """Returns key -> default of every setting that has one."""
    found = {}
    for section, cls in _SECTIONS.items():
        for item in fields(cls):
            key = f"{section}.{item.name}".lstrip(".")
            if item.default is not MISSING:
                found[key] = item.default
            elif item.default_factory is not MISSING:
                found[key] = item.default_factory()
    return found


def describe_fields(cls: type) -> list[tuple[str, str, str]]:
    """Returns (name, default, meaning) of each field of a dataclass that has a docstring under it."""
    source = Path(str(sys.modules[cls.__module__].__file__)).read_text(encoding="utf-8")
    body = source.split(f"class {cls.__name__}:")[1].split("\n\n\n")[0]
    rows = []
    for item in fields(cls):
        match = re.search(rf'^    {item.name}: .*\n    """((?:.|\n)*?)"""', body, re.MULTILINE)
        if match is None:
            continue  # a section of its own
        required = item.default is MISSING and item.default_factory is MISSING
        default = "required" if required else str(item.default)
        rows.append((item.name, default if "MISSING" not in default else "{}", " ".join(match[1].split())))
    return rows


def _find_recipe(recipe: str | Path) -> Path:
    path = Path(recipe)
    if path.is_file():
        return path
    packaged = packaged_recipes()
    if str(recipe) in packaged:
        return packaged[str(recipe)]
    raise UserError(
        f"{recipe}: neither a file nor a packaged recipe; give a path to a YAML file or one of: {', '.join(packaged)}"
    )


def _put(config: DictConfig, key: str, value: Any) -> None:
    """Sets `a.b.0.c` in a config; numbers index lists."""
    *parents, last = [int(part) if part.isdigit() else part for part in key.split(".")]
    node: Any = config
    for part in parents:
        if isinstance(node, DictConfig) and node.get(part) is None:
            node[part] = {}
        node = node[part]
    node[last] = value


def _lists_of_fixed_length() -> list[str]:
    return [
        f"{section}.{item.name}"
        for section, cls in _SECTIONS.items()
        for item in fields(cls)
        if str(item.type).startswith("tuple[")
    ]


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
