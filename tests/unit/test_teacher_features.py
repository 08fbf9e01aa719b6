"""Teachers' features on disk: exact or with the stated error, whole or refused, of the views that a training shows."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fd_scale import api, distributed
from fd_scale.config import Recipe, build_recipe, to_yaml
from fd_scale.data import (
    FeatureFiles,
    ImageAlone,
    Source,
    TrainLoader,
    evaluation_transform,
    open_source,
    training_transform,
)
from fd_scale.distill import DistillationTask
from fd_scale.distill.features import FeatureCodec
from fd_scale.errors import UserError
from fd_scale.evaluation import EvaluationSet
from fd_scale.models import resolved
from fd_scale.run_folder import create
from fd_scale.teachers import Target
from fd_scale.verbs import features as teacher_features
from fd_scale.verbs.check import check
from fd_scale.verbs.evaluate import recipe_of

TARGETS = (
    Target(num_features=40, grid=(2, 3), has_cls=True),
    Target(num_features=7, grid=None, has_cls=False),
)


def features_with_outliers(count: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(count, target.num_tokens, target.num_features) for target in TARGETS]
    features = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    features[0][:, :, 3] *= 100  # as a ViT's few large channels
    features[0][0, 0] = 0
    return features


def test_bf16_keeps_what_bf16_holds() -> None:
    codec = FeatureCodec(TARGETS, "bf16")
    features = features_with_outliers()
    records_BR = codec.encode(features)
    assert records_BR.shape == (5, codec.record_bytes) == (5, 2 * (7 * 40 + 7))
    for found, given in zip(codec.decode(records_BR), features, strict=True):
        assert found.equal(given.bfloat16())


def test_int8_is_wrong_by_no_more_than_it_says() -> None:
    """Half a scale, which bf16 has rounded by at most 2^-8; then the result to bf16, 2^-9 of itself."""
    codec = FeatureCodec(TARGETS, "int8")
    features = features_with_outliers()
    records_BR = codec.encode(features)
    assert records_BR.shape == (5, codec.record_bytes) == (5, 7 * 40 + 7 + 2 * (7 * 2 + 1))
    for found, given in zip(codec.decode(records_BR), features, strict=True):
        for first in range(0, given.shape[2], 32):
            group = given[..., first : first + 32]
            largest = group.abs().amax(2, keepdim=True)
            bound = largest * (1 + 2**-8) / 254 + group.abs() * 2**-8
            assert bool(((found[..., first : first + 32].double() - group).abs() <= bound).all())
    # Channels in another group than the large one are as exact as if it were not there.
    assert (codec.decode(records_BR)[0][..., 32:].double() - features[0][..., 32:]).abs().max() < 0.02


@pytest.mark.parametrize("count", [1, 2])
def test_parts_that_begin_at_odd_bytes(count: int) -> None:
    targets = [Target(num_features=7, grid=(1, 1), has_cls=False)] * 2
    codec = FeatureCodec(targets, "int8")
    features = [torch.full((count, 1, 7), value) for value in (127.0, -254.0)]
    records_BR = codec.encode(features)
    for records in (records_BR, torch.cat([records_BR[:, :1], records_BR], dim=1)[:, 1:]):
        for found, given in zip(codec.decode(records), features, strict=True):
            assert found.equal(given.bfloat16())


@pytest.fixture
def files(tmp_path: Path) -> FeatureFiles:
    """Two views of ten images with records of 8 bytes, four in a file."""
    files = FeatureFiles(tmp_path / "features", 8, 10, num_views=2, file_bytes=4 * 20)
    files.open({"seed": 1}, make=True)
    for view, number in files.missing():
        files.write(view, number, records(view, files.samples(number)), np.array(files.samples(number)))
    return files


def records(view: int, sample_ids: range) -> Any:
    return np.array([[view, sample_id] * 4 for sample_id in sample_ids], dtype=np.uint8)


def test_records_are_found_by_view_and_image(files: FeatureFiles) -> None:
    assert [len(files.samples(number)) for number in range(3)] == [4, 4, 2]
    assert files.read(1, [9, 0, 4], [9, 0, 4])[:, :2].tolist() == [[1, 9], [1, 0], [1, 4]]
    files.open({"seed": 1}, make=False)


def test_what_is_missing_is_named_and_made_again(files: FeatureFiles) -> None:
    gone = files.folder / "view_1/000002.features"
    gone.unlink()
    assert files.missing() == [(1, 2)]
    with pytest.raises(
        UserError,
        match=r"1 of 6 files are not there, or cut off, as .*view_1/000002.features; run `fd-scale feat",
    ):
        files.open({"seed": 1}, make=False)
    with pytest.raises(UserError, match=r"000002.features: cannot be read: No such file"):
        files.read(1, [9], [9])
    cut = files.folder / "view_0/000001.features"
    cut.write_bytes(cut.read_bytes()[:-1])
    assert files.missing() == [(0, 1), (1, 2)], "before a run comes to its last record"


def test_what_killed_calls_have_left_goes_when_a_file_is_written(files: FeatureFiles) -> None:
    names = ("000001abc.fd-scale.tmp", "000002def.fd-scale.tmp", "mine.tmp")
    old, new, other = (files.folder / "view_0" / name for name in names)
    for file in (old, new, other):
        file.write_bytes(b"part of a record")
    for file in (old, other):
        os.utime(file, (0, time.time() - 3700))
    files.write(0, 0, records(0, files.samples(0)), np.array(files.samples(0)))
    assert new.exists(), "another process may be writing it"
    assert not old.exists()
    assert other.exists(), "somebody else's"


def test_other_features_are_refused_by_the_setting_that_differs(files: FeatureFiles) -> None:
    for make in (True, False):
        with pytest.raises(
            UserError,
            match=r"made with seed=1, this recipe has 2; restore it, .*, or remove .*: `fd-scale features`",
        ):
            files.open({"seed": 2}, make=make)
    other = FeatureFiles(files.folder, 9, 10, num_views=2)
    with pytest.raises(UserError, match="made with record_bytes=8, this recipe has 9"):
        other.open({"seed": 1}, make=False)
    with pytest.raises(UserError, match="elsewhere: holds no features; run `fd-scale features`"):
        FeatureFiles(files.folder.with_name("elsewhere"), 8, 10).open({}, make=False)
    for damaged in ("{", "[1]"):
        (files.folder / "manifest.json").write_text(damaged)
        with pytest.raises(UserError, match=r"manifest.json: cannot be read .*; remove the folder"):
            files.open({"seed": 1}, make=True)


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_damage_is_told_by_file_and_image(files: FeatureFiles, damage: str) -> None:
    file = files.folder / "view_0/000001.features"
    data = bytearray(file.read_bytes())
    data[21] ^= 1  # in the record of image 5
    file.write_bytes(data if damage == "changed" else data[:30])
    assert files.read(0, [4], [4]).tolist() == [[0, 4] * 4]
    with pytest.raises(
        UserError, match=r"000001.features: the features of image 5 are damaged; remove the file"
    ):
        files.read(0, [5], [5])


def test_a_folder_without_permission_or_room_is_a_sentence(
    files: FeatureFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(
        UserError, match=r"distill\.features\.folder: .* cannot be written \(No space left on device\)"
    ):
        files.write(0, 2, records(0, files.samples(2)), np.array(files.samples(2)))
    assert not list(files.folder.rglob("*.tmp"))


@pytest.fixture
def images(tmp_path: Path) -> str:
    """24 noisy images, of which one cannot be decoded."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(24):
        noise = rng.integers(0, 256, (30, 36, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"images/{number:02}.png")
    damaged = tmp_path / "images/07.png"
    damaged.write_bytes(damaged.read_bytes()[:100])
    return f"imagefolder:{tmp_path / 'images'}"


@pytest.fixture
def keeping(
    recipe_values: Callable[..., dict[str, Any]], images: str, tmp_path: Path
) -> Callable[..., Recipe]:
    """Returns a function that makes a recipe that keeps two views' features, or with `section.key=value` another."""

    def make(**changes: Any) -> Recipe:
        values = recipe_values(data={"train": images, "num_workers": 0, "max_bad_fraction": 0.5})
        values["train"] |= {"global_batch": 8, "micro_batch": 8}
        values["distill"]["features"] = {
            "folder": str(tmp_path / "kept"),
            "views": 2,
            "precision": "bf16",
        } | changes
        return resolved(build_recipe(values))

    return make


WORLD = distributed.ALONE


def loader_of(recipe: Recipe, source: Source, files: FeatureFiles | None, **ranks: int) -> TrainLoader:
    return TrainLoader(
        source, training_transform(recipe, source), seed=recipe.seed, global_batch=8,
        micro_batch=8 // ranks.get("world_size", 1), num_workers=0,
        crops=recipe.data.crops, max_bad_fraction=0.5, features=files,
        **{"rank": 0, "world_size": 1} | ranks,
    )  # fmt: skip


def computed(recipe: Recipe) -> tuple[Source, teacher_features.Part]:
    source = open_source(recipe.data.train)
    part = teacher_features.train_part(recipe, source)
    teacher_features.compute(recipe, part, WORLD)
    return source, part


def with_its_teacher(recipe: Recipe) -> DistillationTask:
    """The task without features on disk, its teacher as that of the features."""
    assert recipe.distill is not None
    torch.manual_seed(teacher_features.initial_seed(recipe.seed))
    return DistillationTask(replace(recipe, distill=replace(recipe.distill, features=None)), None)


@pytest.mark.parametrize("crops", [1, 2])
def test_a_batch_brings_the_targets_that_the_teacher_would_give(
    keeping: Callable[..., Recipe], crops: int
) -> None:
    """Of an image that is replaced, too; in epochs 0 and 1 with the views of any training, in 2 again those of 0."""
    recipe = keeping()
    recipe = replace(recipe, data=replace(recipe.data, crops=crops))
    source, part = computed(recipe)
    task, plain = DistillationTask(recipe, None), with_its_teacher(recipe)
    assert not task.teachers
    kept, ordinary = (loader_of(recipe, source, files).iterate(0) for files in (part.files, None))
    assert loader_of(recipe, source, None).steps_per_epoch == 3 * crops
    num_bad = 0
    for step in range(9 * crops):
        [batch], [usual] = next(kept), next(ordinary)
        assert batch.images.equal(usual.images) == (step < 6 * crops)
        num_bad += batch.num_bad
        [found] = task.inputs(batch)["targets"]
        [wanted] = plain.inputs(batch._replace(features=None))["targets"]
        # Rounding to bf16; and that of fp32 in a batch of other images.
        torch.testing.assert_close(found.float(), wanted, rtol=2**-8, atol=1e-5)
    assert num_bad > 0


def test_features_of_another_image_than_is_read_are_refused(
    keeping: Callable[..., Recipe], images: str
) -> None:
    """One that could not be decoded when its features were made, and was replaced, and can be now."""
    recipe = keeping()
    source, part = computed(recipe)
    folder = Path(images.removeprefix("imagefolder:"))
    (folder / "07.png").write_bytes((folder / "08.png").read_bytes())
    with pytest.raises(
        UserError, match=r"the features of image 7 are of image \d+, and image 7 was read now: .*mend"
    ):
        for _, _ in zip(range(3), loader_of(recipe, source, part.files).iterate(0), strict=False):
            pass


def test_ranks_and_rollbacks_bring_the_same_features(keeping: Callable[..., Recipe]) -> None:
    recipe = keeping(precision="int8")
    source, part = computed(recipe)
    [alone] = next(loader_of(recipe, source, part.files).iterate(4))
    halves = [next(loader_of(recipe, source, part.files, rank=r, world_size=2).iterate(4))[0] for r in (0, 1)]
    assert alone.features is not None
    assert alone.features.equal(torch.cat([half.features for half in halves if half.features is not None]))
    # After a rollback other images come, each in a view whose features are kept.
    [reordered] = next(loader_of(recipe, source, part.files).iterate(4, reordered=1))
    assert not reordered.images.equal(alone.images)
    task, plain = DistillationTask(recipe, None), with_its_teacher(recipe)
    [found] = task.inputs(reordered)["targets"]
    [wanted] = plain.inputs(reordered._replace(features=None))["targets"]
    assert (found.float() - wanted).abs().max() < 0.01 * wanted.abs().max()


def test_a_second_call_makes_what_is_missing_alike(
    keeping: Callable[..., Recipe], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = keeping()
    _, part = computed(recipe)
    assert "images/07.png cannot be decoded, another sample takes its place" in caplog.text
    files = sorted((tmp_path / "kept/train").rglob("*.features"))
    assert [file.parent.name for file in files] == ["view_0", "view_1"]
    before = [(file.read_bytes(), file.stat().st_mtime_ns) for file in files]
    files[1].unlink()
    teacher_features.compute(recipe, part, WORLD)
    after = [(file.read_bytes(), file.stat().st_mtime_ns) for file in files]
    assert after[0] == before[0]
    assert after[1][0] == before[1][0]


def test_too_many_bad_images_end_a_call(keeping: Callable[..., Recipe]) -> None:
    recipe = keeping()
    part = teacher_features.train_part(recipe, open_source(recipe.data.train))
    assert part.max_bad_fraction == 0.5
    with pytest.raises(UserError, match=r"1 of \d+ samples cannot be decoded, allowed are 1\.00%.*07\.png"):
        teacher_features.compute(recipe, replace(part, max_bad_fraction=0.01), WORLD)
    with pytest.raises(UserError, match=r"07\.png cannot be decoded: .*repair or remove it"):
        teacher_features.compute(recipe, replace(part, max_bad_fraction=0), WORLD)


@pytest.mark.slow
def test_a_run_trains_and_evaluates_without_its_teacher(
    keeping: Callable[..., Recipe], images: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = keeping()
    good = images.replace("images", "good")
    (tmp_path / "good").mkdir()
    for file in sorted((tmp_path / "images").iterdir())[:6]:
        (tmp_path / "good" / file.name).write_bytes(file.read_bytes())
    recipe = replace(recipe, data=replace(recipe.data, evaluation=good))
    with pytest.raises(UserError, match=r"kept/train: holds no features; run `fd-scale features`"):
        api.train(recipe)
    api.features(recipe)
    assert api.train(recipe).step == 6
    check_file = tmp_path / "recipe.yaml"
    check_file.write_text(to_yaml(recipe))
    check(str(check_file), ["run_dir=other"], 1)
    told = " ".join(capfd.readouterr().out.split())
    assert "2 views of features in" in told
    assert "1 views of features in" in told
    (tmp_path / "kept/evaluation/view_0/000000.features").rename(tmp_path / "elsewhere")
    with pytest.raises(SystemExit):
        check(str(check_file), ["run_dir=other"], 1)
    assert "1 of 1 files are" in " ".join(capfd.readouterr().out.split())
    lines = [json.loads(line) for line in Path(recipe.run_dir, "metrics.jsonl").read_text().splitlines()]
    [trained] = [line["loss"] for line in lines if line["kind"] == "evaluation"]
    # By the teacher itself, since other images may be named: equal but for bf16.
    assert api.evaluate(recipe.run_dir)["loss"] == pytest.approx(trained, rel=2**-8)


def test_other_teachers_precision_or_images_are_other_features(keeping: Callable[..., Recipe]) -> None:
    recipe = keeping()
    source, _ = computed(recipe)
    assert recipe.distill is not None
    [teacher] = recipe.distill.teachers
    others = {
        "distill.teachers.0.precision": replace(
            recipe, distill=replace(recipe.distill, teachers=[replace(teacher, precision="bf16")])
        ),
        "data.flip": replace(recipe, data=replace(recipe.data, flip=0.25)),
        "seed": replace(recipe, seed=5),
    }
    for key, other in others.items():
        part = teacher_features.train_part(other, source)
        with pytest.raises(UserError, match=f"its features were made with {key}="):
            part.files.open(part.identity, make=False)
    # A student of another shape, another loss or share is no other teacher.
    same = replace(
        recipe, optim=replace(recipe.optim, lr=0.5),
        distill=replace(recipe.distill, loss="cosine", teachers=[replace(teacher, share=0.5, projector="mlp")]),
    )  # fmt: skip
    part = teacher_features.train_part(same, source)
    part.files.open(part.identity, make=False)


def test_a_disk_without_room_is_told_before_the_first_image(
    keeping: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = keeping()
    source = open_source(recipe.data.train)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match=r"has 0\.0 GiB left, .* are needed; make room"):
        teacher_features.compute(recipe, teacher_features.train_part(recipe, source), WORLD)


def test_what_cannot_be_kept_is_refused(keeping: Callable[..., Recipe]) -> None:
    with pytest.raises(UserError, match=r"distill\.features\.views"):
        keeping(views=0)
    recipe = keeping()
    assert recipe.distill is not None
    with pytest.raises(
        UserError, match=r"teachers\.0\.drop_path: features computed ahead have nothing dropped"
    ):
        replace(recipe.distill, teachers=[replace(recipe.distill.teachers[0], drop_path=True)])
    with pytest.raises(UserError, match=r"distill\.features\.folder: names no folder"):
        api.features(replace(recipe, distill=replace(recipe.distill, features=None)))


def test_an_evaluation_asks_the_teacher_itself(keeping: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = keeping()
    create(recipe, open_source(recipe.data.train))
    found = recipe_of(Path(recipe.run_dir), tmp_path, ["data.evaluation=digits:test"])
    assert found.distill is not None
    assert found.distill.features is None


@pytest.mark.slow
def test_the_benchmark_measures_both_kinds_of_step(keeping: Callable[..., Recipe], tmp_path: Path) -> None:
    file, out = tmp_path / "recipe.yaml", tmp_path / "out.json"
    file.write_text(to_yaml(keeping()))
    command = [sys.executable, "-m", "fd_scale", "bench", "features", str(file), "--steps", "2"]
    subprocess.run([*command, "--json", str(out)], check=True, timeout=120)
    found = json.loads(out.read_text())
    assert [len(found[key]) for key in ("features_ms", "teachers_ms")] == [2, 2]
    assert found["precisions"]["int8"]["bytes"] < 0.55 * found["precisions"]["bf16"]["bytes"]
    assert 0 < found["precisions"]["bf16"]["rms"] < found["precisions"]["int8"]["rms"] < 0.01


def test_an_evaluations_cut_is_in_its_identity(keeping: Callable[..., Recipe]) -> None:
    recipe = keeping()
    images = EvaluationSet(
        source=open_source("digits:test"),
        transform=ImageAlone(evaluation_transform(32)),
        batch_size=1,
        num_workers=0,
    )
    for size, resized_px in ((32, 36), (224, None)):
        other = replace(recipe, model=replace(recipe.model, img_size=size))
        assert teacher_features.evaluation_part(other, images).identity.get("resized_px") == resized_px
        assert "resized_px" not in teacher_features.train_part(other, images.source).identity
