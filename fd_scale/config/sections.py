"""The sections that every task has: model, data, optimizer, length, checkpoints, watch, log."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, fields
from math import inf
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fd_scale.config.checks import checks_of, first_line, require
from fd_scale.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

PRETRAINED = "pretrained"
"""As `model.weights`: the published ones of the model's name."""
TEACHER = "teacher"
"""As a student's `model.weights`: those of the first teacher."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A backbone: its shape, its input, and where its weights come from."""

    name: str
    """`swin_v2_*` or `fd_vit_*` (ours), any timm model, e.g. `vit_base_patch16_dinov3.lvd1689m`, or `hf:` and a
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
        check = checks_of(self, "model")
        check("img_size", self.img_size is None or self.img_size > 0, "more than 0 pixels")
        check("std", self.std is None or min(self.std) > 0, "three positive numbers")

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
    shard_window: int = 0
    """How many shards are read at a time, each for as many shards' images, all of which mix; 0: images come in a random
    order over all. For `tar:` in stores and `parquet:` that are too large to be read at random."""
    max_bad_fraction: float = 0.01
    """Share of samples that may fail to decode (each is named and replaced) before the run stops."""
    crops: int = 1
    """Crops of each decoded image, side by side in a micro-batch; an epoch has all of them, and so as many times the
    steps: divide train.epochs by it for a run of the same length."""
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
        check = checks_of(self, "data")
        # OmegaConf knows no type for "a string or a list of these": it is checked here.
        object.__setattr__(self, "train", checked_sources("data.train", self.train))
        if self.evaluation is not None:
            object.__setattr__(self, "evaluation", checked_sources("data.evaluation", self.evaluation))
        for key in ("num_workers", "shard_window"):
            check(key, getattr(self, key) >= 0, "0 or more")
        check("max_bad_fraction", 0 <= self.max_bad_fraction <= 1, "a number in 0..1")
        check("crops", self.crops >= 1, "1 or more")
        check("crop_scale", 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1, "0 < smallest <= largest <= 1")
        check("crop_ratio", 0 < self.crop_ratio[0] <= self.crop_ratio[1], "0 < smallest <= largest")
        for key in ("flip", "erasing"):
            check(key, 0 <= getattr(self, key) <= 1, "a probability")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW and its schedule: linear warm-up, then a fall, a value for every step."""

    lr: float
    """Peak learning rate at this recipe's global batch (nothing is rescaled)."""
    warmup_lr: float = 0.0
    """Learning rate of the first step."""
    min_lr: float = 0.0
    """Learning rate at the end of the schedule."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """How the learning rate falls behind the warm-up: half a cosine, or a straight line."""
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
    ema_decay: float = 0.0
    """Decay a step of an exponential moving average of the weights, which is evaluated and exported in their place; 0:
    none."""

    @property
    def state_bytes(self) -> int:
        """Bytes a parameter of what is kept of it in fp32 beside its master weight: two moments, and the average."""
        return 12 if self.ema_decay else 8

    def __post_init__(self) -> None:
        check = checks_of(self, "optim")
        for key in ("lr", "eps"):
            check(key, 0 < getattr(self, key) < inf, "a positive number")
        check("betas", 0 <= min(self.betas) <= max(self.betas) < 1, "two numbers in 0..1, below 1")
        check("layer_decay", 0 < self.layer_decay <= 1, "a number above 0, at most 1")
        check("ema_decay", 0 <= self.ema_decay < 1, "a number in 0..1, below 1")
        for key in ("warmup_lr", "min_lr", "warmup_epochs", "warmup_steps", "weight_decay", "grad_clip"):
            check(key, 0 <= getattr(self, key) < inf, "0 or more")


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
    mics_shard_size: int = 0
    """At ZeRO-3: ranks in a row, as those of a node, that hold the model among them. The next ones hold a replica, with
    which they exchange gradients alone, once a step (MiCS, arXiv 2205.00119). 0, or no fewer than there are: all ranks
    hold one."""
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
    cuda_graphs: bool = False
    """Records forward and backward as CUDA graphs, which the host launches at once: for models whose GPU waits for
    Python. The student's backbone where it is not in parts (ZeRO 0 to 2), and teachers that are whole. Gradients then
    come all at the end of the backward pass, so that their reduction does not hide behind it."""
    timeout_s: int = 1800
    """Seconds without a step, a save or a batch of an evaluation after which the job ends, with the stacks of its
    ranks in logs/."""

    def __post_init__(self) -> None:
        check = checks_of(self, "train")
        for key in ("global_batch", "micro_batch", "checkpointing_period", "timeout_s"):
            check(key, getattr(self, key) > 0, "a positive whole number")
        check("mics_shard_size", self.mics_shard_size == 0 or self.mics_shard_size > 1, "0, or 2 or more")
        if (self.epochs is None) == (self.steps is None):
            raise UserError(
                "train: exactly one of train.epochs and train.steps gives the run's length; "
                f"got epochs={self.epochs}, steps={self.steps}; give one of them, and null for the other"
            )
        length = self.epochs if self.steps is None else self.steps
        require(length is not None and length > 0, "train.epochs or train.steps", length, "more than 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When the run is saved and what is kept."""

    save_every_steps: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep_last: int = 2
    """Newest checkpoints kept; the best by the evaluation metric is kept besides."""

    def __post_init__(self) -> None:
        check = checks_of(self, "checkpoint")
        for key in ("save_every_steps", "keep_last"):
            check(key, getattr(self, key) > 0, "a positive whole number")


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
        check = checks_of(self, "watch")
        check("spike_factor", self.spike_factor == 0 or 1 < self.spike_factor < inf, "0 or more than 1")
        check("max_bad_steps", self.max_bad_steps > 0, "a positive whole number")
        check("max_rollbacks", self.max_rollbacks >= 0, "0 or more")


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
        check = checks_of(self, "log")
        check("every_steps", self.every_steps > 0, "a positive whole number")
        for key in ("images_every_steps", "evaluate_every_steps"):
            check(key, getattr(self, key) >= 0, "0 or more")


def as_list(sources: str | list[SourceConfig]) -> list[SourceConfig]:
    """Returns what `data.train` or `data.evaluation` holds as a list in either form."""
    return [SourceConfig(source=sources)] if isinstance(sources, str) else sources


def checked_sources(key: str, given: Any) -> str | list[SourceConfig]:
    """Returns what `data.train` and `data.evaluation` hold: a string as it is, or a list of checked sources."""
    if isinstance(given, str):
        return given
    require(
        isinstance(given, list) and len(given) > 0, key, given, "a source or a list of {source, weight, ...}"
    )
    return [
        item if isinstance(item, SourceConfig) else _source(f"{key}.{index}", item)
        for index, item in enumerate(given)
    ]


def _source(key: str, given: Any) -> SourceConfig:
    known = [item.name for item in fields(SourceConfig)]
    require(isinstance(given, dict), key, given, f"a mapping of {', '.join(known)}")
    for name in given:
        if name not in known:
            nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0)[0]
            raise UserError(f"{key}: no setting '{name}'; nearest: {nearest}, all: {', '.join(known)}")
    if given.get("source") is None:
        raise UserError(f"{key}.source: required and not given")
    try:
        source = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SourceConfig), given))
    except OmegaConfBaseException as error:
        raise UserError(f"{key}.{error.full_key}: {first_line(error)}") from None
    assert isinstance(source, SourceConfig)
    require(source.weight >= 1, f"{key}.weight", source.weight, "a whole number, 1 or more")
    return source
