"""The recipe: one strict, frozen configuration for every task, read from YAML and `key=value` arguments.

Nothing here imports torch: reading a recipe costs milliseconds, on a login node too.
"""

from fd_scale.config.reading import (
    build_recipe,
    default_settings,
    describe_fields,
    describe_keys,
    load_recipe,
    packaged_recipes,
    to_dict,
    to_yaml,
)
from fd_scale.config.recipe import TASKS, Recipe
from fd_scale.config.sections import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    PRETRAINED,
    TEACHER,
    CheckpointConfig,
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    SourceConfig,
    TrainConfig,
    WatchConfig,
    as_list,
)
from fd_scale.config.tasks import (
    ClassificationConfig,
    ContrastiveConfig,
    DetectionConfig,
    DistillConfig,
    FeaturesConfig,
    LinearProbeConfig,
    MaskedConfig,
    SegmentationConfig,
    TeacherConfig,
)

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "PRETRAINED",
    "TASKS",
    "TEACHER",
    "CheckpointConfig",
    "ClassificationConfig",
    "ContrastiveConfig",
    "DataConfig",
    "DetectionConfig",
    "DistillConfig",
    "FeaturesConfig",
    "LinearProbeConfig",
    "LogConfig",
    "MaskedConfig",
    "ModelConfig",
    "OptimConfig",
    "Recipe",
    "SegmentationConfig",
    "SourceConfig",
    "TeacherConfig",
    "TrainConfig",
    "WatchConfig",
    "as_list",
    "build_recipe",
    "default_settings",
    "describe_fields",
    "describe_keys",
    "load_recipe",
    "packaged_recipes",
    "to_dict",
    "to_yaml",
]
