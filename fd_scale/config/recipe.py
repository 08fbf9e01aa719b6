"""All that defines a run, and what of it does not go together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from fd_scale.config.sections import (
    TEACHER,
    CheckpointConfig,
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    WatchConfig,
)
from fd_scale.config.tasks import (
    ClassificationConfig,
    ContrastiveConfig,
    DetectionConfig,
    DistillConfig,
    LinearProbeConfig,
    MaskedConfig,
    SegmentationConfig,
)
from fd_scale.errors import UserError

Task = Literal[
    "distill", "contrastive", "masked", "classification", "linear_probe", "segmentation", "detection"
]
TASKS: tuple[str, ...] = get_args(Task)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """All that defines a run."""

    task: Task
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
    masked: MaskedConfig | None = None
    classification: ClassificationConfig | None = None
    linear_probe: LinearProbeConfig | None = None
    segmentation: SegmentationConfig | None = None
    detection: DetectionConfig | None = None

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
        if self.task in ("contrastive", "linear_probe", "segmentation", "detection") and not plain:
            raise UserError(
                f"data.interpolation, data.rand_augment, data.erasing: task {self.task} cuts its views otherwise; "
                "remove them"
            )
        if self.data.crops > 1 and self.task not in ("distill", "classification"):
            raise UserError(
                f"data.crops: got {self.data.crops}, and task {self.task} learns from one crop of an image at a time; "
                "set it to 1"
            )
        touching = self.optim.grad_clip or self.optim.layer_decay != 1 or self.optim.ema_decay
        if self.linear_probe is not None and touching:
            raise UserError(
                "optim.grad_clip, optim.layer_decay, optim.ema_decay: a linear probe trains classifiers that must not "
                "touch each other, and no layers, and averages none; set grad_clip to 0 and layer_decay to 1, "
                "ema_decay to 0"
            )
        if self.linear_probe is not None and self.data.shard_window:
            raise UserError("data.shard_window: a linear probe reads its images once, in a row; set it to 0")
        if self.linear_probe is not None and self.train.compile:
            raise UserError(
                "train.compile: a linear probe runs its model once over the images; set it to false"
            )
        if self.train.cuda_graphs and self.task not in ("distill", "classification"):
            raise UserError(
                f"train.cuda_graphs: task {self.task} has none, only distill and classification; set it to false"
            )
        if self.train.steps is None and self.optim.warmup_steps:
            raise UserError(
                "optim.warmup_steps: the run's length is in epochs; set optim.warmup_epochs instead"
            )
        if self.train.epochs is None and self.optim.warmup_epochs:
            raise UserError(
                "optim.warmup_epochs: the run's length is in steps; set it to 0 and set optim.warmup_steps instead"
            )

    @property
    def crops_together(self) -> int:
        """How many crops one micro-batch holds in any case: those of an image, with Mixup or CutMix those of a pair."""
        section = self.classification
        return self.data.crops * (2 if section is not None and (section.mixup or section.cutmix) else 1)

    @property
    def targets(self) -> Literal["labels", "masks", "instances"]:
        """What the task learns of an image, if it learns any of that; `data.Source.targets` must be the same."""
        if self.segmentation is not None:
            return "masks"
        return "labels" if self.detection is None else "instances"
