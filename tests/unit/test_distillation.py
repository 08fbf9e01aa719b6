"""Teachers, targets, losses and how they meet: against torch, and against the words of the recipe."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fd_scale import distributed
from fd_scale.config import DistillConfig, ModelConfig, Recipe, TeacherConfig, build_recipe
from fd_scale.data import Batch, ImageAlone, TrainLoader, open_source, training_view
from fd_scale.distill import DistillationTask
from fd_scale.distill.losses import choose_loss
from fd_scale.distill.phi_s import PhiS, hadamard
from fd_scale.distill.task import to_grid
from fd_scale.errors import UserError
from fd_scale.models import create_model, normalize
from fd_scale.models.position_bias import ContinuousPositionBias
from fd_scale.teachers import Target, Teacher

VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}
TEACHER = {"name": "vit_base_patch14_reg4_dinov2.lvd142m", "img_size": 28, "overrides": VIT}
STUDENT = {"name": "fd_vit_tiny_patch16", "img_size": 32, "overrides": VIT | {"drop_path_rate": 0.2}}
SWIN: dict[str, Any] = {
    "name": "swin_v2_tiny",
    "img_size": 24,
    "overrides": {"patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4},
}


def teacher(dtype: torch.dtype = torch.float32, **settings: Any) -> Teacher:
    torch.manual_seed(0)
    return Teacher(TeacherConfig(model=ModelConfig(**TEACHER), **settings), dtype)


def views(count: int = 3, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def batch(count: int = 16, size: int = 32) -> Batch:
    return Batch(views(count, size), torch.zeros(count, dtype=torch.int64), torch.arange(count), 0)


@pytest.fixture
def recipe_of(recipe_values: Callable[..., dict[str, Any]]) -> Callable[..., Recipe]:
    """Returns a function that makes a recipe from a student and the section `distill`."""

    def make(student: dict[str, Any] = STUDENT, **distill: Any) -> Recipe:
        return build_recipe(
            recipe_values(model=student, distill={"teachers": [{"model": TEACHER}]} | distill)
        )

    return make


def test_a_teacher_sees_its_own_input_and_drops_its_registers() -> None:
    """Its own statistics and size; CLS and patches of DINOv2 with four registers."""
    taught = teacher()
    assert taught.targets == (Target(num_features=32, grid=(2, 2), has_cls=True),)
    [found] = taught.features(views())
    pixels = normalize(views(), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    small = F.interpolate(pixels, size=(28, 28), mode="bilinear", align_corners=False)
    timm_model: Any = taught.model.model
    expected = timm_model.forward_features(small)
    torch.testing.assert_close(found, torch.cat([expected[:, :1], expected[:, 5:]], 1))
    assert not found.requires_grad
    assert not taught.model.training


def test_a_whole_teacher_computes_its_position_biases_once(monkeypatch: pytest.MonkeyPatch) -> None:
    own_biases = SWIN | {"overrides": SWIN["overrides"] | {"shared_bias": False}}
    taught = Teacher(TeacherConfig(model=ModelConfig(**own_biases)), torch.float32)
    [before] = taught.features(views(size=24))
    taught.to(torch.device("cpu"))
    [first] = taught.features(views(size=24))
    monkeypatch.setattr(ContinuousPositionBias, "_computed", None)  # a call would be an error
    [second] = taught.features(views(size=24))
    assert torch.equal(before, first)
    assert torch.equal(first, second)


def test_other_targets() -> None:
    pooled = teacher(target="pooled")
    assert pooled.targets == (Target(32, None, has_cls=False),)
    timm_model: Any = pooled.model.model
    pixels = F.interpolate(
        normalize(views(), pooled.model.mean, pooled.model.std), size=(28, 28), mode="bilinear"
    )
    torch.testing.assert_close(
        pooled.features(views())[0][:, 0],
        timm_model.forward_head(timm_model.forward_features(pixels), pre_logits=True),
    )
    layers = teacher(layers=[0, -1])
    assert layers.targets == (Target(32, (2, 2), has_cls=True),) * 2
    first, last = layers.features(views())
    assert first.shape == last.shape == (3, 5, 32)
    blocks: Any = layers.model.model
    x = blocks.norm_pre(blocks._pos_embed(blocks.patch_embed(pixels)))
    x = blocks.blocks[0](x)
    torch.testing.assert_close(first, torch.cat([x[:, :1], x[:, 5:]], 1))
    logits_config = TeacherConfig(
        model=ModelConfig(name="deit_tiny_patch16_224", img_size=32, overrides=VIT), target="logits"
    )
    assert Teacher(logits_config, torch.float32).targets == (Target(1000, None, has_cls=False),)
    stages = Teacher(TeacherConfig(model=ModelConfig(**SWIN), layers=[0, 1]), torch.float32)
    assert stages.targets == (Target(16, (6, 6), has_cls=False), Target(32, (3, 3), has_cls=False))
    assert [tuple(tokens.shape) for tokens in stages.features(views(size=24))] == [(3, 36, 16), (3, 9, 32)]
    odd = Teacher(TeacherConfig(model=ModelConfig(**SWIN | {"img_size": 20}), layers=[0, 1]), torch.float32)
    assert [target.grid for target in odd.targets] == [(5, 5), (3, 3)]
    assert [tokens.shape[1] for tokens in odd.features(views(size=20))] == [25, 9]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target": "logits"}, "has no classifier; choose target feature_map or pooled"),
        ({"layers": [7]}, "layer 7 is none of the model's 2"),
        ({"target": "pooled", "layers": [0]}, "remove layers or set target=feature_map"),
    ],
)
def test_targets_that_a_teacher_does_not_have(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        teacher(**settings)


def test_logits_of_our_own_models_are_refused() -> None:
    with pytest.raises(UserError, match="SwinTransformerV2 has no classifier"):
        Teacher(TeacherConfig(model=ModelConfig(**SWIN), target="logits"), torch.float32)


def test_unequal_grids_are_interpolated() -> None:
    """Each channel of the target is a ramp over the image: interpolation keeps it one."""
    rows, columns = torch.meshgrid(torch.arange(8.0) + 0.5, torch.arange(4.0) + 0.5, indexing="ij")
    patches = torch.stack([rows / 8, columns / 4], -1).flatten(0, 1)[None]
    cls = torch.full((1, 1, 2), 9.0)
    target = Target(2, (8, 4), has_cls=True)
    found = to_grid(torch.cat([cls, patches], 1), target, (4, 8), with_cls=True)
    assert torch.equal(found[:, :1], cls)
    inside = found[:, 1:].unflatten(1, (4, 8))[0, 1:-1, 2:-2]
    expected_rows, expected_columns = torch.meshgrid(
        (torch.arange(4.0) + 0.5) / 4, (torch.arange(8.0) + 0.5) / 8, indexing="ij"
    )
    torch.testing.assert_close(inside[..., 0], expected_rows[1:-1, 2:-2])
    torch.testing.assert_close(inside[..., 1], expected_columns[1:-1, 2:-2])
    assert torch.equal(to_grid(patches, Target(2, (8, 4), has_cls=False), (8, 4), with_cls=False), patches)
    stripes = torch.tensor([1.0, 0, 0, 1]).repeat(2)[:, None].expand(8, 4).reshape(1, 32, 1)
    coarse = to_grid(stripes, Target(1, (8, 4), has_cls=False), (2, 4), with_cls=False)
    assert float(coarse.min()) > 0.2, "every token of the finer grid counts, not the nearest ones alone"


def test_losses_are_torchs() -> None:
    torch.manual_seed(0)
    pred, target, weight = torch.randn(2, 5, 8), 3 * torch.randn(2, 5, 8) + 1, torch.rand(2, 5)

    def mean(name: Any, token_weight: Tensor | None = None) -> Tensor:
        config = DistillConfig(teachers=[TeacherConfig(model=ModelConfig(**TEACHER))], loss=name)
        return choose_loss(config)(pred, target, token_weight_BL=token_weight) / 10

    torch.testing.assert_close(mean("mse"), F.mse_loss(pred, target))
    torch.testing.assert_close(mean("phi_s"), F.mse_loss(pred, target))
    torch.testing.assert_close(
        mean("cosine"), F.cosine_embedding_loss(pred.flatten(0, 1), target.flatten(0, 1), torch.ones(10))
    )
    torch.testing.assert_close(
        mean("whitened_smooth_l1"), F.smooth_l1_loss(pred, F.layer_norm(target, (8,)), beta=2.0)
    )
    for name in ("mse", "cosine", "whitened_smooth_l1"):
        ones, zeros = mean(name, torch.ones(2, 5)), mean(name, torch.zeros(2, 5))
        torch.testing.assert_close(ones, mean(name))
        assert float(zeros) == 0
        torch.testing.assert_close(mean(name, weight) + mean(name, 1 - weight), mean(name))


@pytest.mark.parametrize(
    "size", [1, 2, 4, 12, 24, 48, 96, 192, 384, 512, 768, 1000, 1024, 1152, 1280, 1408, 1664]
)
def test_hadamard_matrices(size: int) -> None:
    matrix = hadamard(size)
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, size**-0.5))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_width_without_a_hadamard_matrix_is_refused() -> None:
    for size in (3, 7, 18, 1001):
        with pytest.raises(UserError, match=f"none of {size} channels is known here; choose another loss"):
            hadamard(size)


def test_phi_s_gives_every_channel_the_same_variance() -> None:
    """The transform is a rotation and one scale: distances between tokens keep their ratios."""
    torch.manual_seed(0)
    tokens = torch.randn(50, 20, 24) * torch.logspace(-2, 2, 24) @ torch.randn(24, 24) + 5
    phi_s = PhiS(24)
    for part in tokens.split(7):
        phi_s.add(part)
    phi_s.finish(distributed.start("cpu", 60))
    found = phi_s.standardise(tokens).flatten(0, 1)
    torch.testing.assert_close(found.mean(0), torch.zeros(24), rtol=0, atol=1e-4)
    # fp32 of covariances whose eigenvalues span eight decades.
    torch.testing.assert_close(found.var(0, unbiased=False), torch.ones(24), rtol=1e-3, atol=0)
    before, after = torch.pdist(tokens.flatten(0, 1)[:30]), torch.pdist(found[:30])
    torch.testing.assert_close(after / after.mean(), before / before.mean(), rtol=1e-3, atol=1e-4)


def test_phi_s_of_a_constant_teacher_is_refused() -> None:
    phi_s = PhiS(4)
    phi_s.add(torch.ones(2, 3, 4))
    with pytest.raises(UserError, match="the same feature everywhere"):
        phi_s.finish(distributed.start("cpu", 60))


def test_phi_s_is_measured_over_the_first_images(recipe_of: Callable[..., Recipe]) -> None:
    recipe = recipe_of(loss="phi_s", phi_s_images=33)
    loader = TrainLoader(
        open_source("digits:train"), ImageAlone(training_view(32)), seed=0, global_batch=16, micro_batch=8, rank=0,
        world_size=1, num_workers=0,
    )  # fmt: skip
    world = distributed.start("cpu", 60)
    tasks = [DistillationTask(recipe, None) for _ in range(2)]
    for task in tasks:
        for ours, theirs in zip(task.teachers, tasks[0].teachers, strict=True):
            ours.model.load_state_dict(theirs.model.state_dict())
        task.prepare(world, loader)
    [first], [second] = (task.phi_s for task in tasks)
    assert float(first.count) == 48 * 5, "three whole steps of 16 images, CLS and four patches each"
    assert torch.equal(first.rotation_DD, second.rotation_DD), "a resumed run has the same target"
    inputs = tasks[0].inputs(batch())
    [target] = inputs["targets"]
    torch.testing.assert_close(target, first.standardise(tasks[0].teachers[0].features(batch().images)[0]))


def test_the_cls_token_weighs_what_the_recipe_says(recipe_of: Callable[..., Recipe]) -> None:
    found = {}
    for weight in (None, 0.0, 1.0, 3.0):
        torch.manual_seed(0)
        task = DistillationTask(recipe_of(teachers=[{"model": TEACHER, "cls_weight": weight}]), None)
        outputs = task.module(**task.inputs(batch()))
        [count] = task.counts(batch()).values()
        found[weight] = (float(outputs["loss"].detach()), count)
    assert found[None] == found[1.0]
    (patches, four), (all_tokens, five), (heavier, seven) = (found[weight] for weight in (0.0, 1.0, 3.0))
    assert (four, five, seven) == (16 * 4, 16 * 5, 16 * 7)
    assert heavier - all_tokens == pytest.approx(2 * (all_tokens - patches), rel=1e-4)


def test_a_cls_token_that_one_side_lacks(recipe_of: Callable[..., Recipe]) -> None:
    swin_student = SWIN | {"img_size": 32}
    task = DistillationTask(recipe_of(student=swin_student), None)
    assert task.counts(batch()) == {"loss": 16 * 16}
    assert task.inputs(batch())["targets"][0].shape == (16, 16, 32), "2 x 2 tokens on the student's 4 x 4"
    for student, teacher_model, lacking in (
        (swin_student, TEACHER, "the student"),
        (STUDENT, SWIN, "the teacher swin_v2_tiny"),
    ):
        with pytest.raises(UserError, match=f"{lacking} has no CLS token"):
            DistillationTask(
                recipe_of(student=student, teachers=[{"model": teacher_model, "cls_weight": 1.0}]), None
            )


def test_two_teachers(recipe_of: Callable[..., Recipe]) -> None:
    """The loss is the weighted sum of what each teacher alone would give, over the images that it sees."""
    first = {"model": TEACHER, "weight": 2.0}
    second = {"model": SWIN | {"img_size": 32}, "share": 0.4, "target": "pooled", "projector": "mlp"}
    torch.manual_seed(0)
    both = DistillationTask(recipe_of(teachers=[first, second]), None)
    given, inputs, counts = batch(), both.inputs(batch()), both.counts(batch())
    outputs = both.module(**inputs)
    seen = inputs["rows"][1]
    assert inputs["rows"][0] is None
    assert 0 < len(seen) < 16
    assert counts == {"loss_0": 16 * 5, "loss_1": len(seen)}
    tokens = both.module.backbone(normalize(given.images, both.module.backbone.mean, both.module.backbone.std),
                                  inputs["drop_path_scale_RB"])  # fmt: skip
    loss = choose_loss(both.config)
    expected_0 = 2.0 * loss(both.module.projectors[0](tokens), both.teachers[0].features(given.images)[0])
    expected_1 = loss(
        both.module.projectors[1](tokens[seen, :1]), both.teachers[1].features(given.images[seen])[0]
    )
    torch.testing.assert_close(outputs["loss_0"], expected_0)
    torch.testing.assert_close(outputs["loss_1"], expected_1)
    seen_positions = []
    for part in (slice(8), slice(8, 16)):
        half = Batch(given.images[part], given.labels[part], given.positions[part], 0)
        seen_positions += half.positions[both.inputs(half)["rows"][1]].tolist()
    assert seen_positions == seen.tolist(), "no matter how the batch is cut"
    assert both.pictures(given, outputs)["features"].shape == (8, 32, 96, 3)


def test_the_loss_of_chosen_layers_is_their_mean(recipe_of: Callable[..., Recipe]) -> None:
    torch.manual_seed(0)
    task = DistillationTask(recipe_of(teachers=[{"model": TEACHER, "layers": [0, 1], "weight": 3.0}]), None)
    inputs = task.inputs(batch())
    tokens = task.module.backbone(
        normalize(batch().images, task.module.backbone.mean, task.module.backbone.std),
        inputs["drop_path_scale_RB"],
    )
    loss = choose_loss(task.config)
    each = [
        loss(projector(tokens), target)
        for projector, target in zip(task.module.projectors, inputs["targets"], strict=True)
    ]
    assert len(each) == 2
    torch.testing.assert_close(task.module(**inputs)["loss"], 3.0 * (each[0] + each[1]) / 2)
    assert task.counts(batch()) == {"loss": 16 * 5}


def test_a_teacher_drops_paths_where_it_is_to(recipe_of: Callable[..., Recipe]) -> None:
    """Symmetric drop path, which the paper compares with its own: masks of its own, none in an evaluation."""
    model = SWIN | {"img_size": 32, "overrides": SWIN["overrides"] | {"drop_path_rate": 0.5}}
    student = SWIN | {"img_size": 32, "overrides": SWIN["overrides"] | {"drop_path_rate": 0.5}}
    config = {"model": model, "drop_path": True, "share": 0.5}
    task = DistillationTask(recipe_of(student=student, teachers=[config]), None)
    [taught], given = task.teachers, batch()
    whole, [dropped] = taught.features(given.images), task.inputs(given)["targets"]
    [rows] = task.inputs(given)["rows"]
    [scale_RB] = task._teachers_scales(given)
    assert scale_RB is not None
    assert not torch.equal(scale_RB, task.inputs(given)["drop_path_scale_RB"]), "not the student's masks"
    pixels = normalize(given.images, taught.model.mean, taught.model.std)
    torch.testing.assert_close(dropped, taught.model(pixels, scale_RB)[rows])
    assert not torch.allclose(dropped, whole[0][rows])
    torch.testing.assert_close(task.evaluation_inputs(given)["targets"], whole)
    spared = DistillationTask(recipe_of(student=student, teachers=[config | {"drop_path": False}]), None)
    assert spared._teachers_scales(given) == [None]
    with pytest.raises(
        UserError, match=r"distill\.teachers\.drop_path: .* has no branch that can be dropped"
    ):
        DistillationTask(recipe_of(teachers=[{"model": TEACHER, "drop_path": True}]), None)
    with pytest.raises(UserError, match=r"distill\.teachers\.drop_path: .* last feature map alone"):
        recipe_of(teachers=[config | {"target": "pooled"}])


def test_a_share_is_met_and_an_empty_one_trains(recipe_of: Callable[..., Recipe]) -> None:
    task = DistillationTask(recipe_of(teachers=[{"model": TEACHER}, {"model": TEACHER, "share": 0.25}]), None)
    many = batch(0)._replace(positions=torch.arange(4000))
    # Five standard deviations of a binomial with p = 0.25.
    assert len(task._rows(1, many)) == pytest.approx(1000, abs=5 * math.sqrt(4000 * 0.25 * 0.75))
    position = next(
        p for p in range(100) if not len(task._rows(1, batch(1)._replace(positions=torch.tensor([p]))))
    )
    alone = batch(1)._replace(positions=torch.tensor([position]))
    outputs = task.module(**task.inputs(alone))
    assert float(outputs["loss_1"].detach()) == 0
    (outputs["loss_0"] + outputs["loss_1"]).backward()
    for parameter in task.module.parameters():
        assert parameter.grad is not None, "ZeRO waits for every parameter's gradient on every rank"


def test_the_student_may_start_from_its_teacher(recipe_of: Callable[..., Recipe]) -> None:
    same = {**SWIN, "weights": "teacher"}
    task = DistillationTask(recipe_of(student=same, teachers=[{"model": SWIN}]), None)
    for name, tensor in task.teachers[0].model.state_dict().items():
        assert torch.equal(task.module.backbone.state_dict()[name], tensor)
    with pytest.raises(UserError, match=r"teacher vit_base_patch14.* is of another architecture"):
        DistillationTask(recipe_of(student=same), None)
    plain = {"name": "vit_tiny_patch16_224", "img_size": 32, "overrides": VIT}
    vit = DistillationTask(
        recipe_of(student={**STUDENT, "weights": "teacher"}, teachers=[{"model": plain}]), None
    ).module.backbone  # fmt: skip
    assert np.allclose(vit.state_dict()["model.blocks.0.gamma_1"], 1.0)


def test_any_timm_model_is_a_student(recipe_of: Callable[..., Recipe]) -> None:
    student = {
        "name": "vit_base_patch16_dinov3.lvd1689m",
        "img_size": 32,
        "overrides": VIT,
    }  # RoPE, registers
    task = DistillationTask(recipe_of(student=student), None)
    assert create_model("vit_base_patch16_dinov3.lvd1689m", img_size=32, **VIT).num_prefix_tokens == 5
    assert task.counts(batch()) == {"loss": 16 * 5}
    loss = task.module(**task.inputs(batch()))["loss"]
    loss.backward()
    assert float(loss.detach()) > 0
    assert all(parameter.grad is not None for parameter in task.module.parameters())
