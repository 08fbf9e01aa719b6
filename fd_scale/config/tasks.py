"""A section for each task: what is trained, and by which loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Literal

from fd_scale.config.checks import are_positive, checks_of, require
from fd_scale.config.sections import TEACHER, ModelConfig
from fd_scale.errors import UserError


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
    drop_path: bool = False
    """Whether its residual branches are dropped, too, at the rates of its model: what asymmetric drop path does not."""
    partitioned: bool = False
    """Whether each rank holds a part of its weights, as ZeRO-3 does, and gathers the others block by block; else each
    rank holds all of them. For a teacher that would not fit."""

    def __post_init__(self) -> None:
        check = checks_of(self, "distill.teachers")
        check("weight", 0 < self.weight < inf, "a positive number")
        check("share", 0 < self.share <= 1, "a number above 0, at most 1")
        check("cls_weight", self.cls_weight is None or 0 <= self.cls_weight < inf, "0 or more")
        if self.drop_path and (self.target != "feature_map" or self.layers is not None):
            raise UserError(
                "distill.teachers.drop_path: branches are dropped on the way to the last feature map alone; set it to "
                "false, or remove layers and target"
            )
        if self.layers is not None:
            check("layers", len(self.layers) > 0, "at least one layer, or none")
            if self.target != "feature_map":
                raise UserError(
                    f"distill.teachers.layers: chosen layers have a feature map alone, target is {self.target}; "
                    "remove layers or set target=feature_map"
                )

    @property
    def is_alike(self) -> bool:
        """Whether each step runs it alike: where its weights are stays, and as many images are shown."""
        return not self.partitioned and self.share == 1


@dataclass(frozen=True, kw_only=True, slots=True)
class FeaturesConfig:
    """Teachers' features that `fd-scale features` computes ahead, so that the run needs no teacher."""

    folder: str
    """Where they lie, for all runs that have teachers, images, views and seed in common."""
    views: int
    """Views of each image: those of epoch e are the same as those of epoch e + views."""
    precision: Literal["bf16", "int8"] = "int8"
    """`int8` is half as large; a value is off by 0.4% at most of the largest of the 32 channels that it is among."""

    def __post_init__(self) -> None:
        require(self.views > 0, "distill.features.views", self.views, "1 or more")


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
    features: FeaturesConfig | None = None

    def __post_init__(self) -> None:
        check = checks_of(self, "distill")
        require(len(self.teachers) > 0, "distill.teachers", "an empty list", "at least one teacher")
        check("beta", self.beta > 0, "a positive number")
        check("knn_images", self.knn_images >= 0, "0 or more")
        check("phi_s_images", self.phi_s_images > 0, "a positive whole number")
        for index, teacher in enumerate(self.teachers):
            if teacher.drop_path and self.features is not None:
                raise UserError(
                    f"distill.teachers.{index}.drop_path: features computed ahead have nothing dropped; set it "
                    "to false, or remove distill.features"
                )
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
        check = checks_of(self, "contrastive")
        check("temperature", self.temperature > 0, "a positive number")
        check("jitter", 0 <= self.jitter <= 1, "a number in 0..1")
        check("projection_dim", self.projection_dim > 0, "more than 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedConfig:
    """Masked image modelling: the pixels of hidden cells, from those that are seen (SimMIM, arXiv 2111.09886)."""

    ratio: float = 0.6
    """Share of the cells that are hidden; a cell is what one output token covers."""

    def __post_init__(self) -> None:
        require(0 < self.ratio < 1, "masked.ratio", self.ratio, "a number between 0 and 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassificationConfig:
    """Fine-tuning on labels: mean of the patch tokens, LayerNorm, linear head."""

    num_classes: int | None = None
    """Classes that the source must have; none: as many as it has. `plan` needs it where the data are elsewhere."""
    label_smoothing: float = 0.1
    """Share of the target spread over all classes."""
    norm: Literal["own", "fresh", "both"] = "both"
    """The model's `own` at its end, on each token, and none behind their mean (Swin); a `fresh` one behind the mean, in
    its place (BEiT, the FD authors' ViT); or `both`, which any model can have."""
    head_init_scale: float = 0.001
    """Factor on the head's initial weights, of standard deviation 0.02 (BEiT, the FD authors' ViT: 0.001; Swin: 1)."""
    mixup: float = 0.0
    """Both parameters of the beta distribution of Mixup's weights; 0: no Mixup."""
    cutmix: float = 0.0
    """Both parameters of the beta distribution of the area that CutMix leaves; 0: no CutMix."""
    cutmix_share: float = 0.5
    """Where both are on, the share of pairs that CutMix mixes."""

    def __post_init__(self) -> None:
        check = checks_of(self, "classification")
        check("num_classes", self.num_classes is None or self.num_classes > 1, "2 or more")
        for key in ("mixup", "cutmix"):
            check(key, 0 <= getattr(self, key) < inf, "0 or more")
        check("cutmix_share", 0 <= self.cutmix_share <= 1, "a number in 0..1")
        check("label_smoothing", 0 <= self.label_smoothing < 1, "a number in 0..1")


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearProbeConfig:
    """A linear classifier on the mean of a frozen model's patch tokens: computed once, without augmentation."""

    lr_factors: list[float] = field(default_factory=lambda: [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0])
    """A classifier for each: factors of `optim.lr`. All are trained in one pass; the best by top-1 is reported."""
    knn_images: int = 0
    """As `distill.knn_images`, of the same features."""

    def __post_init__(self) -> None:
        check = checks_of(self, "linear_probe")
        check("knn_images", self.knn_images >= 0, "0 or more")
        check("lr_factors", are_positive(self.lr_factors), "positive numbers, at least one")


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentationConfig:
    """Semantic segmentation: a class for each pixel of images with masks."""

    head: Literal["upernet", "linear", "mask2former"] = "upernet"
    """`upernet`: pyramid pooling and a feature pyramid (arXiv 1807.10221); `linear`: one linear layer on all maps;
    `mask2former`: queries with a class and a mask each (arXiv 2112.01527), Transformers' code."""
    frozen: bool = False
    """Whether the backbone stays as it is, without drop path: a probe of its features."""
    num_classes: int | None = None
    """Classes that the source must have; none: as many as it has. `plan` needs it where the data are elsewhere."""
    layers: list[int] | None = None
    """Four blocks of a ViT that feed the head, from 0 or from -1 backwards; none: at 1/4, 2/4, 3/4 and 4/4 of its
    depth. A hierarchical model gives all of its stages."""
    channels: int = 512
    """Width of the UPerNet head, whose auxiliary head has half of it, or of Mask2Former (256 in its paper)."""
    num_queries: int = 100
    """Of Mask2Former."""
    auxiliary_weight: float = 0.4
    """Factor of the loss of an auxiliary head on the last layer but one; 0: no such head."""
    norm: Literal["batch", "group"] = "group"
    """Normalisation inside the head. `group` trains alike on any number of ranks; `batch` where micro-batch times ranks
    is the same, over which its statistics go."""
    resize: tuple[float, float] = (0.5, 2.0)
    """Shorter side of a randomly resized training image, as a factor of model.img_size; then a square is cut."""
    max_class_share: float = 0.75
    """Largest share of one class in a training crop; ten places are tried."""
    photometric: bool = True
    """Whether brightness, contrast, saturation and hue of training images change at random."""
    inference: Literal["slide", "whole"] = "slide"
    """How an image is predicted: by windows of model.img_size, with the mean of their logits, or at once."""
    stride: float = 2 / 3
    """Step of the sliding windows, as a share of their side."""
    short_side: int | None = None
    """Shorter side to which an image is resized before it is predicted; 0: it stays as it is; none: model.img_size."""
    scales: list[float] = field(default_factory=lambda: [1.0])
    """Factors of that size; probabilities are averaged over all of them."""
    flip_too: bool = False
    """Whether the mirrored image is predicted as well, and averaged."""

    def __post_init__(self) -> None:
        check = checks_of(self, "segmentation")
        check("num_classes", self.num_classes is None or 2 <= self.num_classes <= 253, "2 to 253")
        check("layers", self.layers is None or len(self.layers) == 4, "four layers, or none")
        check("channels", self.channels > 1 and self.channels % 2 == 0, "an even number above 0")
        check("num_queries", self.num_queries > 0, "1 or more")
        if self.head == "mask2former":
            check("channels", self.channels % 32 == 0, "a multiple of 32, of Mask2Former")
            check("auxiliary_weight", self.auxiliary_weight == 0, "0: each layer of Mask2Former has a loss")
        check("auxiliary_weight", 0 <= self.auxiliary_weight < inf, "0 or more")
        check("resize", 0 < self.resize[0] <= self.resize[1] < inf, "0 < smallest <= largest")
        check("max_class_share", 0 < self.max_class_share <= 1, "a number above 0, at most 1")
        check("stride", 0 < self.stride <= 1, "a number above 0, at most 1")
        check("short_side", self.short_side is None or self.short_side >= 0, "0 or more pixels")
        check("scales", are_positive(self.scales), "positive numbers")


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectionConfig:
    """Boxes and masks of the objects in an image."""

    head: Literal["mask_rcnn", "cascade", "htc"] = "mask_rcnn"
    """`mask_rcnn`: one stage (arXiv 1703.06870); `cascade`: three, each from the boxes of the one before (arXiv
    1712.00726); `htc`: the same, with masks that know of each other and of the classes of places (arXiv 1901.07518)."""
    num_classes: int | None = None
    """Classes that the source must have; none: as many as it has. `plan` needs it where the data are elsewhere."""
    masks: bool = True
    """Whether there are mask heads; without them boxes alone are learned."""
    channels: int = 256
    """Width of the pyramid and of the heads' convolutions; their linear layers have four times as many."""
    box_head: Literal["2fc", "4conv1fc"] = "2fc"
    """Layers of a box head: two linear ones, or four convolutions with LayerNorm and a linear one."""
    rois_per_image: int = 512
    """Boxes of an image that a stage learns from, at most a quarter of them objects'."""
    semantic_classes: int = 0
    """Classes of places (COCO-stuff: 183) whose branch helps boxes and masks of `htc`; 0: no such branch."""
    global_attention: bool = False
    """Whether the places of a hierarchical model's last stage attend to each other before the pyramid, as in HTC++."""
    scale_range: tuple[float, float] = (0.1, 2.0)
    """Large-scale jitter: size of a randomly resized training image, as a factor of the largest one that fits into
    model.img_size; then a square of that side is cut, or filled up."""
    photometric: bool = False
    """Whether brightness, contrast, saturation and hue of training images change at random."""
    copy_paste: float = 0.0
    """Probability that objects of another training image are pasted into one."""
    score_threshold: float = 0.05
    """A detection's least probability."""
    max_detections: int = 100
    """Of an image; AP counts 100 at most."""
    soft_nms: Literal["none", "linear", "gaussian"] = "none"
    """What happens to boxes of a class that overlap a surer one: they go where IoU is above 0.5, or (arXiv 1704.04503)
    their scores fall, by 1 - IoU where that is above 0.5, or by exp(-2 IoU^2)."""
    scales: list[float] = field(default_factory=lambda: [1.0])
    """An image is resized to fit into a square of model.img_size times each of these; all views' boxes compete."""
    flip_too: bool = False
    """Whether the mirrored image is looked at as well."""

    def __post_init__(self) -> None:
        check = checks_of(self, "detection")
        check("num_classes", self.num_classes is None or self.num_classes >= 1, "1 or more")
        check("channels", self.channels > 0, "more than 0")
        check("rois_per_image", self.rois_per_image >= 4, "4 or more")
        check("semantic_classes", 0 <= self.semantic_classes <= 255, "0 to 255")
        check("score_threshold", 0 <= self.score_threshold < 1, "0 or more, below 1")
        check("max_detections", self.max_detections > 0, "more than 0")
        check("scales", are_positive(self.scales), "positive numbers")
        low, high = self.scale_range
        check("scale_range", 0 < low <= high < inf, "0 < smallest <= largest")
        check("copy_paste", 0 <= self.copy_paste <= 1, "a number in 0..1")
        if self.semantic_classes and self.head != "htc":
            raise UserError(
                f"detection.semantic_classes: classes of places help head htc alone, head is {self.head}; set it to 0, "
                "or head to htc"
            )
