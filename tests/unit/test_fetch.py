"""`fd-scale fetch`: what a recipe names on the hub is there afterwards, and `check` and a run believe it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from local_hub import LocalHub
from shard_files import level, numbered, write_tar

from fd_scale import api, cli, hub
from fd_scale.config import ModelConfig, build_recipe
from fd_scale.data import open_source
from fd_scale.errors import UserError
from fd_scale.hub import HubFiles
from fd_scale.verbs import fetch
from fd_scale.verbs.check import check

Values = Callable[..., dict[str, Any]]
Saved = Callable[[dict[str, Any]], str]
SHARDS = "tar:hf://datasets/org/set/train-{0..1}.tar"


@pytest.fixture
def on_the_hub(local_hub: LocalHub, tmp_path: Path) -> LocalHub:
    local_hub.files = {
        "datasets/org/set": {
            f"train-{i}.tar": write_tar(tmp_path / "a.tar", numbered(100 * i, 100 * i + 20)).read_bytes()
            for i in range(2)
        },
        "org/teacher": {"model.safetensors": b"weights" * 2**18},
    }
    return local_hub


@pytest.fixture
def published_teacher(monkeypatch: pytest.MonkeyPatch) -> HubFiles:
    """Every model whose weights are `pretrained` has them in one repository."""
    files = HubFiles("org/teacher", "model", ("model.safetensors",))

    def hub_files(config: ModelConfig) -> HubFiles | None:
        return files if config.weights == "pretrained" else None

    monkeypatch.setattr(fetch, "hub_files", hub_files)
    return files


def with_teacher(values: dict[str, Any]) -> dict[str, Any]:
    [teacher] = values["distill"]["teachers"]
    teacher["model"] = teacher["model"] | {"weights": "pretrained"}
    return values


def test_all_that_a_recipe_names(recipe_values: Values, published_teacher: HubFiles) -> None:
    values = with_teacher(recipe_values())
    values["distill"]["teachers"] *= 2
    values["data"] |= {
        "train": [
            {"source": SHARDS, "weight": 2},
            {"source": "digits:train"},
            {"source": "tar:/here/{0..3}.tar"},
        ],
        "evaluation": "parquet:hf://datasets/org/other@v2/val-*.parquet",
    }
    assert fetch.named_files(build_recipe(values)) == [
        HubFiles("org/set", "dataset", ("train-0.tar", "train-1.tar")),
        HubFiles("org/other", "dataset", ("val-*.parquet",), "v2"),
        published_teacher,
    ]


def test_a_recipe_that_names_nothing(recipe_values: Values, local_hub: LocalHub) -> None:
    assert fetch.named_files(build_recipe(recipe_values())) == []
    assert list(fetch.fetch(build_recipe(recipe_values()))) == [
        "the recipe names nothing on the hub: there is nothing to fetch"
    ]
    assert local_hub.requests == []


def test_a_model_or_a_source_alone(on_the_hub: LocalHub, published_teacher: HubFiles, tmp_path: Path) -> None:
    """As `diagnose NAME@pretrained --images SOURCE` takes them."""
    cli.main(["fetch", "swin_v2_tiny@pretrained"])
    assert hub.cached(published_teacher)[0].name == "model.safetensors"
    with pytest.raises(UserError, match=r"not in the cache .*, or fetch SOURCE, where there is a network"):
        open_source(SHARDS)
    cli.main(["fetch", SHARDS])
    assert len(open_source(SHARDS)) == 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["swin_v2_tiny@pretrained"], "no weights of swin_v2_tiny are published"),
        (["hf:{tmp_path}@pretrained"], "is a folder here; there is nothing to fetch"),
        (["tar:hf://org/set/a.tar"], "is written hf://datasets/ORG/NAME/PATTERN"),
        (["vit_base_patch16_224@pretrained", "seed=1"], "has no settings; leave out seed=1"),
    ],
)
def test_wrong_names_alone(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["fetch", *(each.format(tmp_path=tmp_path) for each in arguments)])
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("published_teacher")
def test_the_verb_and_then_the_data_without_a_network(
    recipe_values: Values, saved: Saved, on_the_hub: LocalHub, capsys: pytest.CaptureFixture[str]
) -> None:
    file = saved(with_teacher(recipe_values()))
    with pytest.raises(UserError, match=r"org/set.*is not in the cache"):
        open_source(SHARDS)
    assert on_the_hub.requests == [], "a run asks the cache alone"
    cli.main(["fetch", file, f"data.train={SHARDS}"])
    data, teacher = capsys.readouterr().out.splitlines()
    folder = on_the_hub.home / "hub"
    assert data.startswith("dataset org/set@main (train-0.tar, train-1.tar): 2 files, 0.1 MiB, in ")
    assert teacher.startswith("model org/teacher@main (model.safetensors): 1 files, 1.8 MiB, in ")
    assert str(folder / "datasets--org--set") in data
    on_the_hub.requests.clear()
    source = open_source(SHARDS)
    assert [level(source, i) for i in range(40)] == [*range(20), *range(100, 120)]
    assert source.key(39) == "0119"
    assert on_the_hub.requests == []


@pytest.mark.usefixtures("published_teacher")
def test_check_says_whether_the_network_would_be_needed(
    recipe_values: Values,
    saved: Saved,
    on_the_hub: LocalHub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    file = saved(recipe_values("contrastive", data__train=SHARDS, train__micro_batch=16))

    def row() -> str:
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("│ network"))

    with pytest.raises(SystemExit):
        check(file, [], 1)
    found = row()
    assert "fails" in found
    assert "dataset org/set@main (train-0.tar, train-1.tar): is not in the cache" in found
    cli.main(["fetch", file])
    check(file, [], 1)
    assert "nothing will be fetched: 1 things are in the cache" in row()


def test_a_wrong_address_ends_the_verb(
    recipe_values: Values, saved: Saved, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["fetch", saved(recipe_values()), "data.train=tar:hf://org/set"])
    assert ended.value.code == 2
    assert "is written hf://datasets/ORG/NAME/PATTERN" in capsys.readouterr().err


def test_from_python_it_is_there_after_the_call(on_the_hub: LocalHub) -> None:
    lines = api.fetch(SHARDS)
    assert len(open_source(SHARDS)) == 40
    assert ["2 files" in line for line in lines] == [True]
