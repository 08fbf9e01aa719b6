"""The recipe: strict, the same after a round trip, and every setting explained."""

import re
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from fd_scale.config import (
    TASKS,
    Recipe,
    SourceConfig,
    build_recipe,
    describe_keys,
    load_recipe,
    packaged_recipes,
    to_dict,
    to_yaml,
)
from fd_scale.errors import UserError

Values = Callable[..., dict[str, Any]]


REQUIRED_BESIDE = {"distill.features.views": {"folder": "features"}}


def leaves(cls: type, prefix: str = "") -> set[str]:
    """Every setting below a dataclass, as `describe_keys` spells it."""
    found = set()
    for name, hint in get_type_hints(cls).items():
        inner = [part for part in (hint, *get_args(hint)) if is_dataclass(part)]
        if name == "teachers":
            found |= {f"{prefix}teachers"} | leaves(inner[0], f"{prefix}teachers.0.")
        elif (prefix, name) == ("data.", "train"):  # a string, or a list of these
            found |= {"data.train"} | leaves(SourceConfig, "data.train.0.")
        elif inner and not prefix.startswith("distill.teachers"):  # a teacher's model is a model
            found |= leaves(inner[0], f"{prefix}{name}.")
        elif not inner:
            found.add(prefix + name)
    return found


@pytest.mark.parametrize("name", sorted(packaged_recipes()))
def test_packaged_recipe(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    header = [line for line in packaged_recipes()[name].read_text().split("\n") if line.startswith("#")]
    for word in ("Command", "Hardware", "Expected"):
        assert any(re.match(rf"# {word}: +\S", line) for line in header), word
    command = next(line for line in header if line.startswith("# Command"))
    verb = {"distill": "distill", "contrastive": "pretrain", "masked": "pretrain"}.get(
        recipe.task, "finetune"
    )
    assert f" {verb} {name}" in command
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml(recipe))
    assert load_recipe(file) == recipe


@pytest.mark.parametrize(
    "task", ["distill", "contrastive", "masked", "classification", "segmentation", "detection"]
)
def test_round_trip_keeps_every_value(recipe_values: Values, tmp_path: Path, task: str) -> None:
    values = recipe_values(
        task, seed=7, data__max_bad_fraction=0.25, optim__betas=[0.8, 0.95], optim__eps=1e-9
    )
    recipe = build_recipe(values)
    assert (recipe.seed, recipe.optim.betas, recipe.optim.eps) == (7, (0.8, 0.95), 1e-9)
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml(recipe))
    assert load_recipe(file) == recipe
    assert build_recipe(to_dict(recipe)) == recipe


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        ("optim.lr=1e-3", lambda recipe: recipe.optim.lr, 1e-3),
        ("data.crop_scale=[0.5,1]", lambda recipe: recipe.data.crop_scale, (0.5, 1.0)),
        ("model.overrides.depths=[1,2]", lambda recipe: recipe.model.overrides["depths"], [1, 2]),
        ("model.overrides={}", lambda recipe: recipe.model.overrides, {}),
        (
            "distill.teachers.0.model.weights=a=b",
            lambda recipe: recipe.distill.teachers[0].model.weights,
            "a=b",
        ),
        ("distill.teachers.0.precision=bf16", lambda recipe: recipe.distill.teachers[0].precision, "bf16"),
        ("data.evaluation=null", lambda recipe: recipe.data.evaluation, None),
    ],
)
def test_override(override: str, read: Callable[[Recipe], Any], expected: Any) -> None:
    found = read(load_recipe("digits/distill", [override]))
    assert found == expected
    assert type(found) is type(expected)


def test_an_override_leaves_the_rest(tmp_path: Path) -> None:
    plain, changed = (to_dict(load_recipe("digits/distill", given)) for given in ([], ["optim.lr=0.5"]))
    assert changed.pop("optim") == plain.pop("optim") | {"lr": 0.5}
    assert changed == plain


def test_the_last_override_wins() -> None:
    assert load_recipe("digits/distill", ["seed=1", "seed=2"]).seed == 2


def test_every_setting_is_described() -> None:
    rows = {key: (default, meaning) for key, default, meaning in describe_keys()}
    assert rows.keys() == leaves(Recipe)
    assert all(len(meaning) > 10 and meaning.endswith(".") for _, meaning in rows.values())
    assert rows["train.global_batch"][0] == "required"
    assert rows["optim.weight_decay"][0] == "0.05"
    assert rows["model.overrides"][0] == "{}"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.img_size", 0), ("model.std", [0.5, 0.0, 0.5]),
        ("data.num_workers", -1), ("data.shard_window", -1), ("data.crops", 0),
        ("data.max_bad_fraction", 1.5), ("data.flip", -0.1),
        ("data.crop_scale", [0.0, 1.0]), ("data.crop_scale", [0.9, 0.5]), ("data.crop_scale", [0.5, 1.1]),
        ("data.crop_ratio", [0.0, 1.0]), ("data.crop_ratio", [2.0, 1.0]),
        ("optim.lr", 0.0), ("optim.lr", float("nan")), ("optim.lr", float("inf")), ("optim.eps", -1e-8),
        ("optim.betas", [0.9, 1.0]), ("optim.betas", [-0.1, 0.9]),
        ("optim.warmup_lr", -1.0), ("optim.min_lr", -1.0), ("optim.warmup_epochs", -1.0),
        ("optim.warmup_steps", -1), ("optim.weight_decay", -0.1), ("optim.grad_clip", float("nan")),
        ("train.global_batch", 0), ("train.micro_batch", -1), ("watch.max_bad_steps", 0),
        ("watch.spike_factor", 1.0), ("watch.spike_factor", -2.0), ("watch.max_rollbacks", -1),
        ("train.checkpointing_period", 0), ("train.mics_shard_size", 1), ("train.mics_shard_size", -8),
        ("train.timeout_s", 0), ("train.steps", 0),
        ("checkpoint.save_every_steps", 0), ("checkpoint.keep_last", 0),
        ("log.every_steps", 0), ("log.images_every_steps", -1), ("log.evaluate_every_steps", -1),
        ("distill.beta", 0.0), ("distill.phi_s_images", 0), ("distill.knn_images", -1), ("linear_probe.knn_images", -1),
        ("distill.features.views", 0),
        ("distill.teachers.0.weight", 0.0),
        ("distill.teachers.0.share", 0.0), ("distill.teachers.0.share", 1.1), ("distill.teachers.0.cls_weight", -1.0),
        ("distill.teachers.0.layers", []), ("contrastive.temperature", 0.0), ("contrastive.projection_dim", 0),
        ("masked.ratio", 1.0),
        ("classification.label_smoothing", 1.0), ("classification.num_classes", 1), ("classification.mixup", -0.1),
        ("classification.cutmix", -0.1), ("classification.cutmix_share", 1.1), ("data.erasing", 1.1),
        ("optim.ema_decay", 1.0), ("optim.ema_decay", -0.1),
        ("optim.layer_decay", 0.0), ("optim.layer_decay", 1.1), ("linear_probe.lr_factors", []),
        ("linear_probe.lr_factors", [1.0, 0.0]),
        ("segmentation.num_classes", 1), ("segmentation.layers", [1, 2]), ("segmentation.channels", 3),
        ("segmentation.num_queries", 0),
        ("segmentation.auxiliary_weight", -0.1), ("segmentation.resize", [2.0, 0.5]),
        ("segmentation.max_class_share", 0.0), ("segmentation.stride", 1.1), ("segmentation.short_side", -1),
        ("segmentation.scales", []), ("detection.scale_range", [0.0, 1.0]), ("detection.copy_paste", 1.1),
        ("detection.num_classes", 0), ("detection.channels", 0), ("detection.rois_per_image", 3),
        ("detection.semantic_classes", 256), ("detection.score_threshold", 1.0), ("detection.max_detections", 0),
        ("detection.scales", [0.0]),
    ],
)  # fmt: skip
def test_range(recipe_values: Values, key: str, value: Any) -> None:
    section, *inner, name = key.split(".")
    task = section if section in TASKS else "distill"
    values = place = recipe_values(task)
    for part in (section, *inner):
        place = place[0] if part == "0" else place.setdefault(part, {})
    place.update(REQUIRED_BESIDE.get(key, {}) | {name: value})
    with pytest.raises(UserError, match=rf"recipe: .*{re.escape(key.replace('.0.', '.'))}.*: got .*expected"):
        build_recipe(values)


def test_every_limit_is_in_the_table_above() -> None:
    """A new `_require` needs a row."""
    [marker] = [mark for mark in test_range.pytestmark if mark.name == "parametrize"]  # type: ignore[attr-defined]
    tested = {key for key, _ in marker.args[1]}
    free = {  # any value of the type is allowed, or its meaning is checked where it is used
        "task", "run_dir", "seed", "model.name", "model.mean", "model.weights", "model.license", "model.overrides",
        "data.train", "data.train.0.source", "data.train.0.weight", "data.train.0.only", "data.train.0.without",
        "data.evaluation", "train.epochs", "train.precision", "train.device", "train.ds_config",
        "train.activation_checkpointing", "train.kernels", "distill.teachers", "distill.teachers.0.precision",
        "distill.teachers.0.target", "distill.teachers.0.projector", "distill.teachers.0.partitioned",
        "distill.teachers.0.drop_path", "distill.features.folder", "distill.features.precision",
        "distill.loss", "contrastive.jitter",
        "classification.norm", "classification.head_init_scale", "log.profile", "train.compile", "train.cuda_graphs",
        "data.interpolation", "data.rand_augment",
        "optim.schedule", "segmentation.head", "segmentation.frozen", "segmentation.norm",
        "segmentation.photometric",
        "segmentation.inference", "segmentation.flip_too", "detection.photometric", "detection.head", "detection.masks",
        "detection.box_head", "detection.global_attention", "detection.soft_nms", "detection.flip_too",
    }  # fmt: skip
    assert tested | free == leaves(Recipe)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"train__epochs": 1.0}, "exactly one of train.epochs and train.steps"),
        ({"train__steps": None}, "exactly one of train.epochs and train.steps"),
        ({"optim__warmup_epochs": 1.0}, "set optim.warmup_steps instead"),
        (
            {"train__steps": None, "train__epochs": 1.0, "optim__warmup_steps": 1},
            "set optim.warmup_epochs instead",
        ),
        ({"distill__teachers": []}, "distill.teachers: got an empty list"),
        (
            {"distill__teachers": {"model": {"name": "swin_v2_tiny"}}},
            "distill.teachers: expected a list, each item after a dash, got a mapping of settings",
        ),
        ({"distill__teachers": ["a"]}, "distill.teachers.0: expected a mapping of settings, got 'a'"),
        ({"log": 5}, "log: expected a mapping of settings, got 5"),
        ({"optim": [1]}, "optim: expected a mapping of settings, got a list"),
        ({"model__overrides": ["depth", 4]}, "model.overrides: expected a mapping of settings, got a list"),
        ({"optim__betas": [0.9, 0.95, 0.99]}, "optim.betas: expected 2 values, got 3"),
        ({"optim__lr": [1e-3]}, "optim.lr: expected a value, got a list"),
        ({"optim__betas": [0.9, "abc"]}, "optim.betas: expected numbers, got 'abc'"),
        ({"data__crop_scale": [0.08, None]}, "data.crop_scale: expected numbers, got None"),
        (
            {"distill__teachers": [{"model": {"name": "swin_v2_tiny", "weights": "teacher"}}]},
            "distill.teachers.0.model.weights: `teacher` is for a student",
        ),
        (
            {"task": "detection", "distill": None, "detection": {"semantic_classes": 7}},
            "classes of places help head htc alone, head is mask_rcnn",
        ),
        (
            {"task": "contrastive", "distill": None, "contrastive": {}, "data__crops": 2},
            "data.crops: got 2, and task contrastive learns from one crop of an image at a time; set it to 1",
        ),
        (
            {
                "task": "linear_probe",
                "distill": None,
                "linear_probe": {},
                "data__shard_window": 2,
                "optim__grad_clip": 0.0,
            },
            "data.shard_window: a linear probe reads its images once, in a row; set it to 0",
        ),
        ({"contrastive": {}}, "this section belongs to task contrastive, the recipe's is distill"),
    ],
)
def test_settings_that_exclude_each_other(
    recipe_values: Values, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        build_recipe(recipe_values(**changes))


def test_reading_a_recipe_changes_nothing_given(recipe_values: Values) -> None:
    values, again = recipe_values(), recipe_values()
    build_recipe(values)
    assert values == again


def test_configs_are_frozen(recipe_values: Values) -> None:
    recipe = build_recipe(recipe_values())
    for part in (recipe, *(getattr(recipe, item.name) for item in fields(recipe))):
        if is_dataclass(part):
            with pytest.raises(AttributeError):
                setattr(part, fields(part)[0].name, 1)


def test_a_task_without_teachers_has_no_teachers_weights(recipe_values: Values) -> None:
    with pytest.raises(UserError, match=r"task contrastive has no teacher; .* write \./teacher"):
        build_recipe(recipe_values("contrastive", model__weights="teacher"))


def test_a_contrastive_run_has_no_evaluation(recipe_values: Values) -> None:
    with pytest.raises(UserError, match="no metric of a source; remove"):
        build_recipe(recipe_values("contrastive", data__evaluation="digits:test"))


def test_one_string_is_no_list_of_overrides() -> None:
    with pytest.raises(UserError, match=r"write \['seed=1'\]$"):
        load_recipe("digits/distill", "seed=1")
