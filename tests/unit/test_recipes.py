"""Every packaged distillation at its full size: it builds, and a step gives every parameter a gradient."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from fd_scale.config import Recipe, load_recipe, packaged_recipes
from fd_scale.data import Batch
from fd_scale.data.instances import Instances
from fd_scale.distill import DistillationTask
from fd_scale.finetune import ClassificationTask, DetectionTask, SegmentationTask
from fd_scale.models import resolved

IMAGENET = sorted(name for name in packaged_recipes() if name.startswith("imagenet"))
FINE_TUNING = [name for name in IMAGENET if "/finetune_" in name]
ADE20K = sorted(
    name for name in packaged_recipes() if name.startswith("ade20k/") and not name.endswith("/tiny")
)
COCO = sorted(name for name in packaged_recipes() if name.startswith("coco/") and not name.endswith("/tiny"))
# Its first stage has the shapes of the second but for the masks, and takes as long.
SHAPES_OF_COCO = [name for name in COCO if not name.endswith("objects365")]
DISTILLATION = [name for name in IMAGENET if name not in FINE_TUNING and "/probe_" not in name]


LARGE = ("giant", "large", "large_336", "esvit_swin_base")


def large_ones_are_slow(names: list[str]) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] * name.endswith(LARGE)) for name in names]


def without_weights(recipe: Recipe) -> Recipe:
    assert recipe.distill is not None
    teachers = [
        replace(teacher, model=replace(teacher.model, weights=None)) for teacher in recipe.distill.teachers
    ]
    return resolved(replace(recipe, distill=replace(recipe.distill, teachers=teachers)))


@pytest.mark.parametrize("name", large_ones_are_slow(DISTILLATION))
def test_a_step_of_shapes(name: str) -> None:
    """On the meta device: all shapes and dtypes of a step, no arithmetic, up to the 3 billion parameters."""
    recipe = without_weights(load_recipe(name))
    size = recipe.model.size
    with torch.device("meta"):
        task = DistillationTask(recipe, None)
        task.module.to(torch.bfloat16)
        images = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    batch = Batch(images, torch.zeros(2), torch.arange(2), 0)
    outputs = task.module(**task.inputs(batch))
    outputs["loss"].backward()
    assert all(parameter.grad is not None for parameter in task.module.parameters())
    [target] = task.teachers[0].targets
    assert target.grid == task.grid, "teacher and student of a packaged recipe have one grid"
    with_cls = "vit" in recipe.model.name and "siglip" not in name
    assert task.counts(batch) == {"loss": 2 * (task.grid[0] * task.grid[1] + with_cls)}


def test_the_published_values() -> None:
    """Learning rates and drop path of the table in the authors' code."""
    published = {
        "clip_vit_base": (1.2e-3, 2e-6, 2e-5, 0.2), "clip_vit_large": (1.2e-3, 2e-6, 2e-5, 0.3),
        "dino_vit_base": (1.2e-3, 2e-6, 2e-5, 0.3), "deit_vit_base": (1.2e-3, 2e-6, 2e-5, 0.3),
        "esvit_swin_base": (8e-4, 4e-6, 4e-5, 0.3),
    }  # fmt: skip
    for name, values in published.items():
        recipe = load_recipe(f"imagenet/{name}")
        optim = recipe.optim
        rate = recipe.model.overrides["drop_path_rate"]
        assert (optim.lr, optim.warmup_lr, optim.min_lr, rate) == values
        assert (recipe.train.global_batch, recipe.train.epochs, optim.warmup_epochs) == (2048, 300, 10)
        assert (optim.weight_decay, optim.grad_clip, optim.betas, optim.eps) == (
            0.05,
            3.0,
            (0.9, 0.999),
            1e-8,
        )
        assert recipe.distill is not None
        assert (recipe.distill.loss, recipe.distill.beta) == ("whitened_smooth_l1", 2.0)


@pytest.mark.parametrize("name", large_ones_are_slow(FINE_TUNING))
def test_a_fine_tuning_step_of_shapes(name: str) -> None:
    """On the meta device, as above; the bias of each block is its own."""
    recipe = load_recipe(name)
    weights = recipe.model.weights
    assert weights is not None
    assert weights.endswith("-export")
    recipe = resolved(replace(recipe, model=replace(recipe.model, weights=None)))
    size, images_of_a_batch = recipe.model.size, 2
    assert recipe.classification is not None
    with torch.device("meta"):
        task = ClassificationTask(recipe, None, None)
        task.module.to(torch.bfloat16)
        images = torch.zeros(images_of_a_batch, 3, size, size, dtype=torch.uint8)
        labels = torch.zeros(images_of_a_batch, dtype=torch.int64)
    outputs = task.module(**task.inputs(Batch(images, labels, torch.arange(images_of_a_batch), 0)))
    assert outputs["logits"].shape == (images_of_a_batch, recipe.classification.num_classes)
    outputs["loss"].backward()
    assert all(parameter.grad is not None for parameter in task.module.parameters())
    blocks = {name.split("attn.")[0] for name, _ in task.module.named_parameters() if "attn." in name}
    biases = [
        name
        for name, _ in task.module.named_parameters()
        if name.endswith(("bias_table", "cpb_mlp.0.weight"))
    ]
    assert len(biases) == len(blocks)


def test_the_published_values_of_fine_tuning() -> None:
    """Section 4 of the method: epochs, warm-up, batch, learning rate, layer decay, drop path; lr at both ends."""
    published = {
        "clip_vit_base": (100, 20, 2048, 5e-3, 0.60, 0.3, 1e-6),
        "dino_vit_base": (100, 20, 2048, 6e-3, 0.60, 0.2, 1e-6),
        "deit_vit_base": (100, 20, 2048, 5e-3, 0.65, 0.3, 1e-6),
        "clip_vit_large": (50, 5, 2048, 1e-3, 0.75, 0.4, 2e-6),
        "esvit_swin_base": (100, 20, 1024, 2.5e-3, 0.80, 0.4, 5e-7),
        "swin_v2_giant": (10, 2, 576, 2.1e-5, 1.0, 0.5, 0.0),
    }  # fmt: skip
    for name, values in published.items():
        recipe = load_recipe(f"imagenet/finetune_{name}")
        train, optim, data, section = recipe.train, recipe.optim, recipe.data, recipe.classification
        assert values == (
            train.epochs, optim.warmup_epochs, train.global_batch, optim.lr, optim.layer_decay,
            recipe.model.overrides["drop_path_rate"], optim.min_lr,
        )  # fmt: skip
        assert optim.warmup_lr == optim.min_lr
        giant = name == "swin_v2_giant"
        assert (optim.weight_decay, optim.grad_clip) == ((0.1, 100.0) if giant else (0.05, 5.0))
        assert (data.rand_augment, data.erasing, data.interpolation) == ("m9-mstd0.5-inc1", 0.25, "bicubic")
        assert section is not None
        assert (section.mixup, section.cutmix, section.cutmix_share) == (0.8, 1.0, 0.5)
        assert (section.label_smoothing, section.num_classes) == (0.1, 1000)
        # The authors' Swin has the final norm of its backbone and a head as torch's trunc_normal_ leaves it.
        assert (section.norm, section.head_init_scale) == (
            ("own", 1.0) if "swin" in name else ("fresh", 0.001)
        )
        assert recipe.model.overrides["shared_bias"] is False


@pytest.mark.parametrize("name", large_ones_are_slow(ADE20K))
def test_a_segmentation_step_of_shapes(name: str) -> None:
    """On the meta device, as above; SwinV2-G also at the size and window of its test."""
    recipe = load_recipe(name)
    assert str(recipe.model.weights).endswith("-export")
    recipe = resolved(replace(recipe, model=replace(recipe.model, weights=None)))
    with torch.device("meta"):
        task = SegmentationTask(recipe, None, None)
        task.module.to(torch.bfloat16)
        images = torch.zeros(2, 3, recipe.model.size, recipe.model.size, dtype=torch.uint8)
    outputs = task.module(**task.inputs(Batch(images, images[:, 0], torch.arange(2), 0)))
    sides = {"swin_v2_giant": 160, "fd_vit_base_patch16": 128, "fd_vit_large_patch14": 148}
    side = sides[recipe.model.name]
    assert outputs["logits"].shape == (2, 150, side, side)
    (outputs["loss"] + outputs["auxiliary"]).backward()
    assert all(parameter.grad is not None for parameter in task.module.parameters())
    if recipe.model.name == "swin_v2_giant":
        tested = load_recipe(
            name, ["model.weights=null", "model.img_size=896", "model.overrides.window_size=56"]
        )
        with torch.device("meta"):
            other = SegmentationTask(resolved(tested), None, None)
        shapes, others = (
            {key: tensor.shape for key, tensor in each.module.state_dict().items()} for each in (task, other)
        )
        assert shapes == others, "the same weights for any window"
        assert other.module.backbone.layers[0].blocks[0].attn.window_size == (56, 56)


def test_the_published_values_of_segmentation() -> None:
    """SwinV2-G's (arXiv 2111.09883), and of the ViTs those of BEiT's released configurations."""
    published = {
        "swin_v2_giant": (80_000, 750, 32, 4e-5, 1.0, 0.4, 640),
        "clip_vit_base": (160_000, 1500, 16, 7e-4, 0.65, 0.1, 512),
        "clip_vit_large": (160_000, 1500, 16, 2e-5, 0.95, 0.2, 518),
    }
    for name, values in published.items():
        recipe = load_recipe(f"ade20k/{name}")
        train, optim, section = recipe.train, recipe.optim, recipe.segmentation
        assert values == (
            train.steps, optim.warmup_steps, train.global_batch, optim.lr, optim.layer_decay,
            recipe.model.overrides["drop_path_rate"], recipe.model.size,
        )  # fmt: skip
        assert (optim.schedule, optim.min_lr) == ("linear", 0.0)
        assert optim.weight_decay == (0.01 if "swin" in name else 0.05), "Swin's on ADE20K, and BEiT's"
        assert section is not None
        assert (section.head, section.channels, section.auxiliary_weight, section.num_classes) == (
            "upernet",
            512,
            0.4,
            150,
        )
        assert (section.resize, section.max_class_share, section.photometric) == ((0.5, 2.0), 0.75, True)
        assert recipe.model.overrides["shared_bias"] is False


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * ("base" not in name)) for name in SHAPES_OF_COCO]
)
def test_a_detection_step_of_shapes(name: str) -> None:
    """On the meta device, as above; SwinV2-G also with the window of its test."""
    recipe = load_recipe(name)
    assert str(recipe.model.weights).endswith("-export")
    recipe = resolved(replace(recipe, model=replace(recipe.model, weights=None)))
    side = recipe.model.size
    with torch.device("meta"):
        task = DetectionTask(recipe, None, None)
        task.module.to(torch.bfloat16)
        images = torch.zeros(1, 3, side, side, dtype=torch.uint8)
        objects = Instances(
            boxes_N4=torch.zeros(3, 4),
            labels_N=torch.zeros(3, dtype=torch.int64),
            crowd_N=torch.zeros(3, dtype=torch.bool),
            masks_NHw=torch.zeros(3, side, -(-side // 8), dtype=torch.uint8),
            semantic_HW=torch.zeros(0, 0, dtype=torch.uint8),
        )
    batch = Batch(images, [objects], torch.arange(1), 0)
    outputs = task.module(**task.inputs(batch))
    losses = {key: value for key, value in outputs.items() if value.requires_grad}
    kinds = ["class", "box"] + ["mask"] * task.config.masks
    assert set(losses) == {"rpn_class", "rpn_box"} | {
        f"{kind}_{stage}" for kind in kinds for stage in (1, 2, 3)
    }
    assert outputs["boxes"].shape == (1, 512, 4)
    torch.stack(list(losses.values())).sum().backward()
    assert all(parameter.grad is not None for parameter in task.module.parameters())
    if name == "coco/swin_v2_giant":
        tested = load_recipe(name, ["model.weights=null", "model.overrides.window_size=48"])
        with torch.device("meta"):
            other = DetectionTask(resolved(tested), None, None)
        assert other.module.backbone.layers[0].blocks[0].attn.window_size == (48, 48)


def test_the_published_values_of_detection() -> None:
    """SwinV2-G's (arXiv 2111.09883); of the others those of the released configurations of Swin and ViTDet."""
    published = {
        "swin_v2_giant_objects365": ("htc", 67_500, None, 96, 1.2e-3, 1.0, 1536, 365),
        "swin_v2_giant": ("htc", 45_000, None, 96, 6e-4, 1.0, 1536, 80),
        "swin_v2_base": ("cascade", None, 36, 16, 1e-4, 1.0, 1024, 80),
        "clip_vit_base": ("cascade", None, 36, 64, 1e-4, 0.7, 1024, 80),
        "clip_vit_large": ("cascade", None, 36, 64, 1e-4, 0.8, 1022, 80),
    }
    for name, values in published.items():
        recipe = load_recipe(f"coco/{name}")
        train, optim, section = recipe.train, recipe.optim, recipe.detection
        assert section is not None
        assert values == (
            section.head, train.steps, train.epochs, train.global_batch, optim.lr, optim.layer_decay,
            recipe.model.size, section.num_classes,
        )  # fmt: skip
        assert section.masks is not name.endswith("objects365")
        assert (section.scale_range, section.box_head, section.channels) == ((0.1, 2.0), "4conv1fc", 256)
        if "giant" in name:  # else the bias network would see other coordinates than it has learned
            assert recipe.model.overrides["pretrained_window_size"] == [12, 12, 12, 6]
        assert section.global_attention is (section.soft_nms != "none") is ("giant" in name)


def test_headers_say_what_is_known() -> None:
    for name in IMAGENET + ADE20K + COCO:
        header = packaged_recipes()[name].read_text().split("task:")[0]
        for word in ("Command:", "Hardware:", "Expected:", "Source:", "Status:   unreproduced"):
            assert word in header, (name, word)
