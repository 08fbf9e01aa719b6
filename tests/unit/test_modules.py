"""What the trained modules compute, against other people's code or a plain loop."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as transforms

from fd_scale import distributed
from fd_scale.config import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ClassificationConfig,
    ContrastiveConfig,
    DistillConfig,
    ModelConfig,
    Recipe,
    TeacherConfig,
)
from fd_scale.distill.losses import choose_loss
from fd_scale.distill.module import DistillationModule, Objective
from fd_scale.distributed import micro_batch_of_a_rank
from fd_scale.errors import UserError
from fd_scale.finetune.classes import require_same_classes
from fd_scale.finetune.classification import ClassificationModule
from fd_scale.models import build_model, drop_path_scale, normalize
from fd_scale.pretrain.contrastive import ContrastiveModule, nt_xent_sum

OVERRIDES = {"patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
MODEL = ModelConfig(name="swin_v2_tiny", img_size=16, overrides=OVERRIDES)
VIT = ModelConfig(
    name="fd_vit_tiny_patch16", img_size=32, overrides={"embed_dim": 16, "depth": 1, "num_heads": 1}
)


def test_normalize_equals_torchvision() -> None:
    images = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    expected = transforms.normalize(transforms.to_dtype(images, torch.float32, scale=True), mean, std)
    # Ours scales mean and std and not the image: the same in exact arithmetic, a few fp32 roundings apart.
    torch.testing.assert_close(normalize(images, mean, std), expected, rtol=1e-5, atol=2e-6)


def test_drop_path_is_a_function_of_seed_position_and_branch() -> None:
    rates = (0.0, 0.1, 0.3)
    positions = torch.arange(20_000)
    whole = drop_path_scale(rates, 7, positions, torch.device("cpu"))
    assert whole is not None
    parts = [drop_path_scale(rates, 7, part, torch.device("cpu")) for part in positions.split(999)]
    assert torch.equal(torch.cat(parts, 1), whole), "how a batch is cut changes nothing"
    assert not torch.equal(drop_path_scale(rates, 8, positions, torch.device("cpu")), whole)
    for rate, scales in zip(rates, whole, strict=True):
        values = set(scales.unique().tolist())
        assert values == ({1.0} if rate == 0 else {0.0, float(np.float32(1 / (1 - rate)))})
        # Mean 1 in expectation; 5 standard deviations of the mean of 20,000 draws.
        deviation = math.sqrt(rate / (1 - rate) / 20_000)
        assert abs(float(scales.double().mean()) - 1) <= 5 * deviation + 1e-7
    kept = whole[1:] > 0
    together = float((kept[0] & kept[1]).double().mean())
    assert together == pytest.approx(0.9 * 0.7, abs=0.02), "branches are independent"
    assert drop_path_scale((0.0, 0.0), 7, positions, torch.device("cpu")) is None


def test_distillation_loss_is_the_papers() -> None:
    torch.manual_seed(0)
    objective, loss = (
        Objective(num_features=24),
        choose_loss(DistillConfig(teachers=[TeacherConfig(model=MODEL)])),
    )
    module = DistillationModule(build_model(MODEL), [objective], loss, dtype=torch.float32)
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    target = 5 * torch.randn(3, 4, 24) + 1
    outputs = module(images, [target], [None])
    pixels = normalize(images, IMAGENET_MEAN, IMAGENET_STD)
    student = module.projectors[0](module.backbone(pixels))
    expected = F.smooth_l1_loss(student, F.layer_norm(target, (24,)), beta=2.0)  # mean of all elements
    torch.testing.assert_close(outputs["loss"] / (3 * 4), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(outputs["tokens"], student)
    assert not outputs["tokens"].requires_grad


def test_nt_xent_is_equation_1() -> None:
    projected = torch.randn(2, 5, 8, dtype=torch.float64)
    distributed.start("cpu", 60)
    assert dist.get_world_size() == 1
    found = nt_xent_sum(projected, 0.3)
    z = [vector / vector.norm() for vector in projected.flatten(0, 1)]
    total = 0.0
    for i in range(10):
        j = (i + 5) % 10
        others = sum(math.exp(float(z[i] @ z[k]) / 0.3) for k in range(10) if k != i)
        total += -math.log(math.exp(float(z[i] @ z[j]) / 0.3) / others)
    assert float(found) == pytest.approx(total, rel=1e-5)  # the op computes in fp32


def test_classification_ignores_the_unlabelled_and_keeps_logits_whole() -> None:
    torch.manual_seed(0)
    module = ClassificationModule(MODEL, ClassificationConfig(head_init_scale=1.0), 7, torch.float32)
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    labels = torch.tensor([3, -1, 0, 6])
    outputs = module(images, labels)
    kept = module(images[[0, 2, 3]], labels[[0, 2, 3]])
    torch.testing.assert_close(outputs["loss"], kept["loss"])
    assert outputs["logits"].shape == (4, 7)
    expected = F.cross_entropy(
        outputs["logits"][[0, 2, 3]], labels[[0, 2, 3]], label_smoothing=0.1, reduction="sum"
    )
    torch.testing.assert_close(outputs["loss"].detach(), expected)


def test_tasks_take_the_mean_of_the_patches_alone() -> None:
    """Without the CLS token, which a model may have or not."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    module = ClassificationModule(VIT, ClassificationConfig(head_init_scale=1.0), 7, torch.float32)
    patches = module.backbone(normalize(images, IMAGENET_MEAN, IMAGENET_STD))[:, 1:]
    assert patches.shape == (3, 4, 16)
    logits = module(images, torch.zeros(3, dtype=torch.int64))["logits"]
    torch.testing.assert_close(logits, module.head(module.norm(patches.mean(1))).detach())
    distributed.start("cpu", 60)
    contrastive = ContrastiveModule(VIT, ContrastiveConfig(projection_dim=4), torch.float32)
    loss = contrastive(torch.stack([images, images.flip(-1)], 1))["loss"]
    views = [normalize(view, IMAGENET_MEAN, IMAGENET_STD) for view in (images, images.flip(-1))]
    projected = torch.stack(
        [contrastive.projection(contrastive.backbone(view)[:, 1:].mean(1)) for view in views]
    )
    torch.testing.assert_close(loss, nt_xent_sum(projected, 0.2))


@pytest.mark.parametrize(
    ("norm", "name", "overrides"),
    [  # timm's Beit with average pooling is the FD authors' ViT, and its Swin V2 ends as Microsoft's does
        ("fresh", "beit_base_patch16_224", {"embed_dim": 32, "depth": 2, "num_heads": 2}),
        ("own", "swinv2_tiny_window8_256", {"embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2)}),
    ],
)
def test_heads_are_those_of_timm(norm: Any, name: str, overrides: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = ModelConfig(name=name, img_size=64, overrides=overrides)
    ours = ClassificationModule(model, ClassificationConfig(norm=norm, head_init_scale=1.0), 7, torch.float32)
    pool = {"global_pool": "avg"} if norm == "fresh" else {}
    theirs = timm.create_model(name, img_size=64, num_classes=7, **overrides, **pool).eval()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    state = {key.removeprefix("backbone.model."): value for key, value in ours.state_dict().items()}
    names = {"fresh": {"norm.": "fc_norm."}, "own": {"head.": "head.fc."}}[norm]
    renamed = {
        next((new + key.removeprefix(old) for old, new in names.items() if key.startswith(old)), key): value
        for key, value in state.items()
    }
    theirs.load_state_dict(renamed)
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    found = ours(images, torch.zeros(3, dtype=torch.int64))
    expected = theirs(normalize(images, ours.backbone.mean, ours.backbone.std))
    torch.testing.assert_close(found["logits"], expected, rtol=1e-4, atol=1e-4)  # fp32, sums in another order
    found["loss"].backward()
    assert all(parameter.grad is not None for parameter in ours.parameters())


def test_a_fresh_norm_is_the_final_one_of_an_export() -> None:
    module = ClassificationModule(VIT, ClassificationConfig(norm="fresh"), 7, torch.bfloat16)
    assert module.backbone.state_dict().keys() == build_model(VIT).state_dict().keys()
    assert module.backbone.final_norm().eps == build_model(VIT).final_norm().eps == 1e-6
    with pytest.raises(
        UserError, match=r"has no LayerNorm at its end .* classification.norm=own does without"
    ):
        build_model(ModelConfig(name="resnet18")).norm_behind_pooling()


def test_class_scores_are_computed_in_fp32() -> None:
    """In bf16 the two best of 1000 scores are often one number, and the first of them would win."""
    module = ClassificationModule(
        VIT, ClassificationConfig(head_init_scale=1.0), 1000, torch.bfloat16
    ).bfloat16()
    logits = module(
        torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8), torch.zeros(8, dtype=torch.int64)
    )["logits"]
    assert not torch.equal(logits, logits.bfloat16().float())


def test_an_evaluation_source_with_other_classes_is_refused(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe("classification")
    train = SimpleNamespace(num_classes=3, class_names=["a", "b", "c"])
    require_same_classes(recipe, train, train)
    require_same_classes(recipe, train, SimpleNamespace(num_classes=3, class_names=None))
    for names in (["b", "c"], ["a", "b", "c", "d"], ["a", "b", "d"], []):
        with pytest.raises(UserError, match="expected the same ones"):
            require_same_classes(
                recipe, train, SimpleNamespace(num_classes=len(names), class_names=names or None)
            )


@pytest.mark.parametrize(
    ("global_batch", "largest", "ranks", "together", "expected"),
    [
        (2048, 128, 16, 1, 128), (96, 32, 2, 1, 24), (16, 64, 4, 1, 4), (7, 3, 1, 1, 1), (8, 8, 1, 1, 8),
        (30, 15, 1, 2, 10), (24, 24, 1, 4, 24),
    ],
)  # fmt: skip
def test_micro_batch_divides_a_ranks_share(
    global_batch: int, largest: int, ranks: int, together: int, expected: int
) -> None:
    found = micro_batch_of_a_rank(global_batch, largest, ranks, together)
    assert found == expected
    assert (global_batch // ranks) % found == 0


def test_a_batch_that_does_not_divide_names_one_that_does() -> None:
    with pytest.raises(UserError, match=r"100 images do not divide over 3 ranks; set train\.global_batch=99"):
        micro_batch_of_a_rank(100, 10, 3)
    with pytest.raises(UserError, match=r"the 50 images of a rank .* at most 10 that are multiples of 4"):
        micro_batch_of_a_rank(100, 10, 2, 4)
