"""`fd-scale bench detection`: our Mask R-CNN beside torchvision's on the same backbone and pyramid, in turns.

Shape legend: B = images, C = channels, H, W = pixels, h, w = places of a map, R = residual branches, N = objects.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign

from fd_scale.benchmarks.beside import Peer, beside
from fd_scale.benchmarks.finetune import show
from fd_scale.benchmarks.step import WARM_UP_STEPS, now
from fd_scale.config import Recipe
from fd_scale.data import Batch
from fd_scale.data.instances import Instances, unpacked
from fd_scale.errors import UserError
from fd_scale.finetune import DetectionTask
from fd_scale.finetune.detection import DetectionModule
from fd_scale.finetune.detection.rpn import (
    ASPECT_RATIOS,
    MOST_OF_A_MAP,
    PROPOSALS,
    SAMPLED_ANCHORS,
    SIDE_IN_STRIDES,
)
from fd_scale.models import normalize
from fd_scale.trainer import Task

PEER = "torchvision"


class TorchvisionMaskRCNN(nn.Module):
    """The backbone and pyramid of a detection of ours, with the proposals and heads of torchvision's Mask R-CNN.

    Args:
        task: whose module's parts are taken; its other weights are copied.
        everything: whether each stage learns from all anchors and boxes, and none are sampled.
    """

    def __init__(self, task: DetectionTask, everything: bool = False) -> None:
        super().__init__()
        ours, config = task.module, task.config
        self.dtype, self.backbone, self.neck = ours.dtype, ours.backbone, ours.neck
        strides = [*ours.strides, 2 * ours.strides[-1]]
        sizes = tuple((int(SIDE_IN_STRIDES * stride),) for stride in strides)
        channels, hidden, num_classes = config.channels, 4 * config.channels, task.num_classes + 1
        anchors, boxes = (10**6, 10**6) if everything else (SAMPLED_ANCHORS, config.rois_per_image)
        self.names = [str(index) for index in range(len(ours.strides))]
        self.rpn = RegionProposalNetwork(
            AnchorGenerator(sizes, (ASPECT_RATIOS,) * len(sizes)), RPNHead(channels, len(ASPECT_RATIOS)),
            0.7, 0.3, anchors, 0.5,
            {"training": MOST_OF_A_MAP[True], "testing": MOST_OF_A_MAP[False]},
            {"training": PROPOSALS, "testing": PROPOSALS}, 0.7,
        )  # fmt: skip
        self.heads = RoIHeads(
            MultiScaleRoIAlign(self.names, 7, 2), TwoMLPHead(channels * 49, hidden),
            FastRCNNPredictor(hidden, num_classes),
            0.5, 0.5, boxes, 0.25, None, config.score_threshold, 0.5, config.max_detections,
            MultiScaleRoIAlign(self.names, 14, 2), MaskRCNNHeads(channels, [channels] * 4, 1),
            MaskRCNNPredictor(channels, channels, num_classes),
        )  # fmt: skip
        self._copy(ours)

    @torch.no_grad()
    def _copy(self, ours: DetectionModule) -> None:
        """Copies weights. Its background is class 0, with deltas and a mask that nobody asks for; ours is the last."""
        heads: Any = self.heads
        box: Any = ours.heads.box_heads[0]
        mask: Any = ours.heads.mask_predictors[0]
        body = ours.heads.mask_bodies[0]
        pairs: list[tuple[Any, Any]] = [
            (self.rpn.head.conv[0][0], ours.rpn.hidden), (self.rpn.head.cls_logits, ours.rpn.objectness),
            (self.rpn.head.bbox_pred, ours.rpn.deltas), (heads.box_head.fc6, box.fc1), (heads.box_head.fc7, box.fc2),
            (heads.mask_predictor.conv5_mask, mask.doubled),
            *zip(_convolutions(heads.mask_head), _convolutions(body), strict=True),
        ]  # fmt: skip
        for theirs, own in pairs:
            theirs.load_state_dict(own.state_dict())
        for theirs, own, rows in (
            (heads.box_predictor.cls_score, box.classes, 1), (heads.box_predictor.bbox_pred, box.deltas, 4),
            (heads.mask_predictor.mask_fcn_logits, mask.classes, 1),
        ):  # fmt: skip
            for name, value in own.state_dict().items():
                last = own is box.classes
                background, known = (value[-1:], value[:-1]) if last else (value[:rows] * 0, value)
                getattr(theirs, name).copy_(torch.cat([background, known]))

    def forward(
        self,
        images_BCHW: Tensor,
        targets: list[Instances] | None = None,
        keys_B: Tensor | None = None,
        drop_path_scale_RB: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Returns losses, summed over images as `DetectionModule` does; without targets what is detected."""
        height, width = images_BCHW.shape[2:]
        pixels_BCHW = normalize(images_BCHW, self.backbone.mean, self.backbone.std).to(self.dtype)
        layers = self.backbone.intermediates(pixels_BCHW, self.neck.layers, drop_path_scale_RB)
        layers[-1] = self.backbone.final_norm()(layers[-1])
        maps = self.neck(layers, height, width)
        features = OrderedDict(zip(self.names, maps, strict=True))
        features["pool"] = F.max_pool2d(maps[-1], kernel_size=1, stride=2)
        images = ImageList(pixels_BCHW, [(height, width)] * len(pixels_BCHW))
        wanted = None
        if targets is not None:
            wanted = [
                {
                    "boxes": each.boxes_N4, "labels": each.labels_N + 1,
                    "masks": unpacked(each.masks_NHw, width),
                }
                for each in targets
            ]  # fmt: skip
        boxes, rpn_losses = self.rpn(images, features, wanted)
        found, losses = self.heads(features, boxes, images.image_sizes, wanted)
        if wanted is None:
            return found[0]
        count = len(wanted)
        return {
            "rpn_class": count * rpn_losses["loss_objectness"], "rpn_box": count * rpn_losses["loss_rpn_box_reg"],
            "class_1": count * losses["loss_classifier"], "box_1": count * losses["loss_box_reg"],
            "mask_1": count * losses["loss_mask"],
        }  # fmt: skip


def _convolutions(module: nn.Module) -> list[nn.Module]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]


def bench_detection(recipe_name: str, overrides: Sequence[str], num_steps: int) -> dict[str, Any]:
    """Measures steps, then detections, on images in memory in this process, both in turns, and prints two tables.

    Args:
        recipe_name: recipe of task detection with head mask_rcnn; nothing is evaluated.
        overrides: settings that replace the recipe's.
        num_steps: measured steps, and detections, of each after a warm-up.

    Returns:
        The measurements: times in ms.

    Raises:
        UserError: the recipe is of another task or head.
    """
    peer = Peer(name=PEER, refuse=_refuse, module=TorchvisionMaskRCNN, also=_detections)
    result = beside(recipe_name, overrides, num_steps, peer)
    show(result, PEER, result["images"])
    detections = {f"{loop}_ms": result[f"{loop}_detection_ms"] for loop in ("ours", PEER)}
    show(detections, PEER, 1)
    return result


def _refuse(recipe: Recipe) -> None:
    section = recipe.detection
    if section is None or (section.head, section.box_head, section.masks) != ("mask_rcnn", "2fc", True):
        raise UserError(
            f"task {recipe.task}: bench detection expects task detection, with detection.head=mask_rcnn, "
            "box_head=2fc and masks"
        )


@torch.no_grad()
def _detections(task: Task, batches: list[list[Batch]], num_steps: int) -> dict[str, list[float]]:
    """Times of detecting with the trained weights in one training crop, which both take as it is."""
    assert isinstance(task, DetectionTask), "the recipe's task"
    device = next(task.module.parameters()).device
    images = [image for step in batches for batch in step for image in batch.to(device).images]
    ours, theirs = task.module.eval(), TorchvisionMaskRCNN(task).to(device).eval()
    runs: dict[str, Callable[[Tensor], Any]] = {
        "ours": lambda image_CHW: task.detect(image_CHW, ours),
        PEER: lambda image_CHW: theirs(image_CHW[None]),
    }
    times: dict[str, list[float]] = {f"{name}_detection_ms": [] for name in runs}
    for number in range(WARM_UP_STEPS + num_steps):
        for name, run in runs.items():
            began = now(device)
            run(images[number % len(images)])
            times[f"{name}_detection_ms"].append(1e3 * (now(device) - began))
    return {name: values[WARM_UP_STEPS:] for name, values in times.items()}
