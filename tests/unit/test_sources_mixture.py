"""Several sources with weights and filters: each image as often as asked, and nothing else."""

import collections
import logging
import pickle
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from shard_files import image_file, level, numbered, write_tar

from fd_scale.config import DataConfig, SourceConfig, build_recipe, load_recipe, to_dict, to_yaml
from fd_scale.data import ImageAlone, TrainLoader, evaluation_transform, open_source
from fd_scale.data.mixture import filtered
from fd_scale.errors import UserError
from fd_scale.run_folder import identity

Values = Callable[..., dict[str, Any]]


def one(source: str, **settings: Any) -> SourceConfig:
    return SourceConfig(source=source, **settings)


@pytest.fixture
def tar(tmp_path: Path) -> str:
    """5 images of level and label 0 to 4, with keys 0000 to 0004."""
    return f"tar:{write_tar(tmp_path / 'five' / 'a.tar', numbered(0, 5))}"


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """3 images of level 100 to 102 in the classes x and y."""
    for number, name in enumerate(["x/0.png", "x/1.png", "y/2.png"]):
        (tmp_path / "three" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "three" / name).write_bytes(image_file(100 + number))
    return f"imagefolder:{tmp_path / 'three'}"


def test_weights_are_the_proportions_of_an_epoch(tar: str, folder: str) -> None:
    source = open_source([one(tar, weight=2), one(folder, weight=3)])
    assert len(source) == 2 * 5 + 3 * 3
    counts = collections.Counter(level(source, i) for i in range(len(source)))
    assert counts == dict.fromkeys(range(5), 2) | dict.fromkeys(range(100, 103), 3)
    assert source.name(18).endswith("three/y/2.png")
    assert (source.key(0), source.key(18)) == ("0000", "y/2.png")


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_epoch_of_the_loader_has_exactly_these_images(tar: str, folder: str, num_workers: int) -> None:
    source = open_source([one(tar, weight=3), one(folder)])
    loader = TrainLoader(
        source, ImageAlone(evaluation_transform(4)), seed=3, global_batch=6, micro_batch=3, rank=0, world_size=1,
        num_workers=num_workers,
    )  # fmt: skip
    steps = loader.iterate(0)
    for _ in range(2):  # the second epoch as well
        batches = [batch for _ in range(loader.steps_per_epoch) for batch in next(steps)]
        counts = collections.Counter(torch.cat([batch.images[:, 0, 0, 0] for batch in batches]).tolist())
        assert counts == dict.fromkeys(range(5), 3) | dict.fromkeys(range(100, 103), 1)
    steps.close()


def test_labels_mean_nothing_where_classes_differ(
    tar: str, folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    source = open_source([one(folder), one(tar)])
    assert (source.class_names, source.num_classes) == (None, 0)
    assert {source.read(i)[1] for i in range(len(source))} == {-1}
    assert "labels are not used" in caplog.text


def test_labels_are_kept_where_classes_are_the_same(folder: str, tmp_path: Path) -> None:
    for name in ("x/5.png", "y/6.png"):
        (tmp_path / "more" / name).parent.mkdir(parents=True)
        (tmp_path / "more" / name).write_bytes(image_file(5))
    source = open_source([one(folder, weight=2), one(f"imagefolder:{tmp_path / 'more'}")])
    assert (source.class_names, source.num_classes) == (["x", "y"], 2)
    assert [source.read(i)[1] for i in range(8)] == [0, 0, 1, 0, 0, 1, 0, 1]


def test_one_source_with_a_weight_keeps_its_labels(tar: str) -> None:
    source = open_source([one(tar, weight=2)])
    assert [source.read(i)[1] for i in range(10)] == [0, 1, 2, 3, 4] * 2
    assert source.num_classes == 5


def test_a_list_of_one_is_the_source_itself(tar: str) -> None:
    assert type(open_source([one(tar)])) is type(open_source(tar))
    assert open_source([one(tar)]).fingerprint == open_source(tar).fingerprint


def test_only_and_without(tar: str, tmp_path: Path) -> None:
    only, without = tmp_path / "only.txt", tmp_path / "without.txt"
    only.write_text("0004\n0001\n\n0002\n")
    without.write_bytes(b"\xef\xbb\xbf0002\r\n")  # as Windows writes it
    kept = open_source([one(tar, only=str(only))])
    assert [level(kept, i) for i in range(len(kept))] == [1, 2, 4]
    assert [kept.read(i)[1] for i in range(3)] == [1, 2, 4]
    assert (kept.key(2), kept.num_classes) == ("0004", 5)
    assert kept.name(2).endswith("a.tar:0004.png")
    rest = open_source([one(tar, without=str(without))])
    assert [level(rest, i) for i in range(len(rest))] == [0, 1, 3, 4]
    both = open_source([one(tar, only=str(only), without=str(without), weight=2)])
    assert [level(both, i) for i in range(len(both))] == [1, 4, 1, 4]


def test_keys_of_every_kind_of_source(folder: str, tmp_path: Path) -> None:
    rows = [{"bytes": image_file(n), "path": None} for n in range(4)]
    for name in ("a", "b"):
        pq.write_table(pa.table({"image": rows}), tmp_path / f"{name}.parquet", row_group_size=3)
    keys = {
        folder: ["x/0.png", "x/1.png", "y/2.png"],
        f"parquet:{tmp_path}/?.parquet": [f"{name}.parquet:{row}" for name in "ab" for row in range(4)],
    }
    for spec, expected in keys.items():
        source = open_source(spec)
        assert [source.key(i) for i in range(len(source))] == expected
    pytest.importorskip("sklearn", reason="scikit-learn is optional")
    assert open_source("digits:test").key(299) == "299"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0001\n9\n8\n7\n6\n", r"list.txt: 4 of 5 keys name no image: 6, 7, 8; a key is, for example, 0000"),
        ("", "list.txt: no image is left of 5"),
        (None, "list.txt: the list of images cannot be read: No such file"),
    ],
)
def test_lists_that_do_not_fit(tar: str, tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "list.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        open_source([one(tar, only=str(tmp_path / "list.txt"))])


def test_a_list_holds_no_names_of_all_images(tmp_path: Path) -> None:
    class Many(SimpleNamespace):
        def __len__(self) -> int:
            return 50_000

    many: Any = Many(key=lambda number: f"{number:050d}", class_names=None, num_classes=0, targets="labels")
    (tmp_path / "list.txt").write_text(f"{7:050d}\n")
    tracemalloc.start()
    try:
        rest = filtered(many, None, str(tmp_path / "list.txt"))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(rest) == 49_999
    assert most < 20 * 50_000, "bytes: their numbers, and not their names of 100"


def test_leaving_out_all_is_an_error(tar: str, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("".join(f"000{n}\n" for n in range(5)))
    with pytest.raises(UserError, match="no image is left"):
        open_source([one(tar, without=str(tmp_path / "list.txt"))])


def test_the_fingerprint_holds_weights_and_filters(tar: str, folder: str, tmp_path: Path) -> None:
    for name, text in (
        ("a", "0001\n0002\n"),
        ("b", "0002\n0001\n"),
        ("c", "0001\n"),
        ("rest", "0000\n0003\n0004\n"),
    ):
        (tmp_path / f"{name}.txt").write_text(text)
    lists = {name: str(tmp_path / f"{name}.txt") for name in ("a", "b", "c", "rest")}
    different = [
        [one(tar)], [one(tar, weight=2)], [one(tar), one(folder)], [one(folder), one(tar)],
        [one(tar, weight=2), one(folder)], [one(tar, only=lists["a"])], [one(tar, only=lists["c"])],
        [one(tar, only=lists["a"]), one(folder)],
    ]  # fmt: skip
    found = [open_source(configs).fingerprint for configs in different]
    assert len(set(found)) == len(different)
    same = [{"only": lists["a"]}, {"only": lists["b"]}, {"without": lists["rest"]}]
    assert len({open_source([one(tar, **settings)]).fingerprint for settings in same}) == 1


def test_a_run_goes_on_wherever_the_data_lies_and_not_with_other_weights(
    recipe_values: Values, tar: str
) -> None:
    def identity_of(sources: Any) -> dict[str, Any]:
        recipe = build_recipe(recipe_values("contrastive", data__train=sources))
        return identity(recipe, open_source(recipe.data.train).fingerprint, 0, 1)

    assert identity_of(tar) == identity_of([{"source": tar}])
    assert identity_of(tar) != identity_of([{"source": tar, "weight": 2}])


def test_a_copy_for_a_worker(tar: str, folder: str, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("0003\n")
    source = open_source([one(tar, only=str(tmp_path / "list.txt"), weight=2), one(folder)])
    copy = pickle.loads(pickle.dumps(source))
    assert [level(copy, i) for i in range(len(copy))] == [3, 3, 100, 101, 102]


def test_a_source_of_many_images_is_found_without_rounding() -> None:
    class Many:
        class_names, num_classes, fingerprint, targets = None, 0, "", "labels"

        def __len__(self) -> int:
            return 10**12 + 1

        def key(self, sample_id: int) -> str:
            return str(sample_id)

    from fd_scale.data.mixture import Mixture

    source = Mixture([Many(), Many()], [3, 1])  # type: ignore[list-item]
    assert source.key(3 * 10**12 + 2) == str(10**12)
    assert source.key(3 * 10**12 + 3) == "0"
    assert source.key(np.int64(len(source) - 1)) == str(10**12)  # type: ignore[arg-type]


def list_recipe(values: Values) -> dict[str, Any]:
    return values(
        data__train=[{"source": "digits:train", "weight": 2}, {"source": "digits:test", "only": "list.txt"}],
        data__evaluation=[{"source": "digits:test"}],
    )


def test_a_list_in_a_recipe_and_back(recipe_values: Values, tmp_path: Path) -> None:
    recipe = build_recipe(list_recipe(recipe_values))
    assert recipe.data.train == [one("digits:train", weight=2), one("digits:test", only="list.txt")]
    assert recipe.data.evaluation == [one("digits:test")]
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml(recipe))
    assert load_recipe(file) == recipe
    assert build_recipe(to_dict(recipe)) == recipe


@pytest.mark.parametrize(
    ("override", "train"),
    [
        ("data.train=tar:PATH", "tar:PATH"),
        (
            "data.train=tar:hf://datasets/timm/imagenet-1k-wds/imagenet1k-train-{0000..1023}.tar",
            "tar:hf://datasets/timm/imagenet-1k-wds/imagenet1k-train-{0000..1023}.tar",
        ),
        ("data.train.0.weight=5", [one("digits:train", weight=5), one("digits:test", only="list.txt")]),
        ("data.train.1.only=null", [one("digits:train", weight=2), one("digits:test")]),
        ("data.train=[{source: a, weight: 3}]", [one("a", weight=3)]),
    ],
)
def test_overrides_of_a_list(recipe_values: Values, tmp_path: Path, override: str, train: Any) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml(build_recipe(list_recipe(recipe_values))))
    assert load_recipe(file, [override]).data.train == train


@pytest.mark.parametrize(
    ("train", "sentence"),
    [
        ([{"source": "a", "weights": 2}], "data.train.0: no setting 'weights'; nearest: weight, all: source, weight"),
        ([{"source": "a"}, {"weight": 2}], "data.train.1.source: required and not given"),
        ([{"source": "a", "weight": 0}], "data.train.0.weight: got 0, expected a whole number, 1 or more"),
        ([{"source": "a", "weight": 0.5}], "data.train.0.weight: Value '0.5'"),
        ([{"source": "a", "only": ["x"]}], "data.train.0.only: "),
        (["digits:train"], "data.train.0: got digits:train, expected a mapping of source, weight, only, without"),
        ([], "data.train: got [], expected a source or a list of {source, weight, ...}"),
        ({"source": "a"}, "data.train: got {'source': 'a'}, expected a source or a list"),
        (7, "data.train: got 7, expected a source or a list"),
        (None, "data.train: got None, expected a source or a list"),
    ],
)  # fmt: skip
def test_lists_that_are_refused(recipe_values: Values, train: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=rf"recipe: {re.escape(sentence)}"):
        build_recipe(recipe_values(data__train=train))


def test_the_data_section_alone_is_checked_too() -> None:
    assert DataConfig(train=[{"source": "a"}]).train == [one("a")]
    with pytest.raises(UserError, match=r"data.evaluation.0.source: required"):
        DataConfig(train="a", evaluation=[{}])
