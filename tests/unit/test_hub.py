"""Files of the hub: fetched once and whole, found again without a network, refused where anything is amiss."""

import json
import socket
from pathlib import Path

import pytest
from huggingface_hub import constants
from local_hub import COMMIT, LocalHub

from fd_scale import hub
from fd_scale.errors import UserError
from fd_scale.hub import HubFiles, dataset_files, expand_braces

FILES = HubFiles("org/set", "dataset", ("train-0.tar", "train-1.tar"))


@pytest.fixture
def data_set(local_hub: LocalHub) -> LocalHub:
    local_hub.files["datasets/org/set"] = {
        "README.md": b"read me", "train-0.tar": b"zero", "train-1.tar": b"one" * 1000, "sub/val-0.tar": b"val",
    }  # fmt: skip
    return local_hub


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*args: object) -> None:
        raise AssertionError(f"the network is used: {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", connect)


def test_fetched_files_are_found_without_a_network(
    data_set: LocalHub, request: pytest.FixtureRequest
) -> None:
    fetched = hub.fetch(FILES)
    assert [path.name for path in fetched] == ["train-0.tar", "train-1.tar"]
    assert [path.read_bytes() for path in fetched] == [b"zero", b"one" * 1000]
    request.getfixturevalue("no_network")
    num_requests = len(data_set.requests)
    assert hub.cached(FILES) == fetched
    assert len(data_set.requests) == num_requests
    assert not any("README" in path or "val-0" in path for path in data_set.requests), (
        "only what was asked for"
    )


def test_patterns_and_folders(data_set: LocalHub) -> None:
    files = HubFiles("org/set", "dataset", ("train-*.tar", "sub/*"))
    fetched = hub.fetch(files)
    assert sorted(path.name for path in fetched) == ["train-0.tar", "train-1.tar", "val-0.tar"]
    assert hub.cached(files) == fetched


def test_a_model_is_another_repository_than_the_data_set_of_its_name(data_set: LocalHub) -> None:
    data_set.files = {"org/net": {"model.safetensors": b"weights"}}
    files = HubFiles("org/net", "model", ("model.safetensors",))
    assert hub.fetch(files)[0].read_bytes() == b"weights"
    with pytest.raises(UserError, match="is not in the cache"):
        hub.cached(HubFiles("org/net", "dataset", ("model.safetensors",)))


def test_a_second_fetch_downloads_nothing(data_set: LocalHub) -> None:
    hub.fetch(FILES)
    num_requests = len(data_set.requests)
    hub.fetch(FILES)
    assert not [path for path in data_set.requests[num_requests:] if "/resolve/" in path]


@pytest.mark.usefixtures("no_network")
def test_what_was_never_fetched(data_set: LocalHub) -> None:
    home = str(data_set.home)
    with pytest.raises(
        UserError, match=f"org/set.*not in the cache .HF_HOME={home}.*run: fd-scale fetch RECIPE"
    ):
        hub.cached(FILES)


def test_other_patterns_of_a_fetched_repository_are_not_there(data_set: LocalHub) -> None:
    hub.fetch(FILES)
    with pytest.raises(UserError, match="is not in the cache"):
        hub.cached(HubFiles("org/set", "dataset", ("*.tar",)))
    with pytest.raises(UserError, match="is not in the cache"):
        hub.cached(HubFiles("org/set", "dataset", FILES.patterns, revision="v2"))


def test_a_fetch_that_stopped_midway_is_refused_and_can_be_repeated(data_set: LocalHub) -> None:
    data_set.broken.add("train-1.tar")
    with pytest.raises(UserError, match="cannot be fetched"):
        hub.fetch(FILES)
    snapshot = data_set.home / "hub" / "datasets--org--set" / "snapshots" / COMMIT
    assert (snapshot / "train-0.tar").read_bytes() == b"zero", "half of it is there"
    with pytest.raises(UserError, match="is not in the cache"):
        hub.cached(FILES)
    data_set.broken.clear()
    fetched = hub.fetch(FILES)
    assert hub.cached(FILES) == fetched


@pytest.mark.parametrize(("damage", "message"), [("cut", "has 2 bytes instead of 4"), ("gone", "is gone")])
def test_a_cached_file_that_changed_is_refused_by_name(data_set: LocalHub, damage: str, message: str) -> None:
    file = hub.fetch(FILES)[0]
    if damage == "cut":
        file.resolve().write_bytes(b"ze")
    else:
        file.unlink()
    with pytest.raises(UserError, match=rf"train-0.tar {message}.*fd-scale fetch RECIPE"):
        hub.cached(FILES)
    file.resolve().unlink(missing_ok=True)
    assert hub.fetch(FILES)[0].read_bytes() == b"zero"
    assert hub.cached(FILES)


def test_a_damaged_file_in_the_cache_is_not_recorded(data_set: LocalHub) -> None:
    file = hub.fetch(FILES)[0]
    file.resolve().write_bytes(b"ze")
    with pytest.raises(UserError, match=r"train-0.tar did not arrive whole, 4 bytes; delete .*blobs"):
        hub.fetch(FILES)


def test_the_record_is_all_or_nothing(data_set: LocalHub) -> None:
    hub.fetch(FILES)
    [record] = (data_set.home / "hub" / "datasets--org--set" / "fd-scale").iterdir()
    values = json.loads(record.read_text())
    assert (values["commit"], values["sizes"]) == (COMMIT, {"train-0.tar": 4, "train-1.tar": 3000})


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (HubFiles("org/sat", "dataset", ("*",)), "the hub knows no dataset org/sat, or it is private"),
        (HubFiles("org/set", "dataset", ("*",), "v7"), "has no revision 'v7'"),
        (HubFiles("org/set", "dataset", ("train-0.tar", "train-9.tar")), "no file matches 'train-9.tar'.*README.md"),
        (HubFiles("org/set/x", "dataset", ("*",)), "cannot be fetched .*org/set/x"),
        (HubFiles("org/closed", "dataset", ("*",)), "is gated; accept its terms at .*/datasets/org/closed"),
    ],
)  # fmt: skip
def test_what_cannot_be_fetched(data_set: LocalHub, files: HubFiles, message: str) -> None:
    data_set.files["datasets/org/closed"] = {"a.tar": b"a"}
    data_set.gated.add("datasets/org/closed")
    with pytest.raises(UserError, match=message) as raised:
        hub.fetch(files)
    assert "\n" not in str(raised.value)


def test_no_network(data_set: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(UserError, match=r"cannot be fetched .*fetch again where there is a network"):
            hub.fetch(FILES)


def test_offline_by_the_hubs_own_switch(data_set: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"cannot be fetched .*HF_HUB_OFFLINE"):
        hub.fetch(FILES)
    assert data_set.requests == []


@pytest.mark.parametrize(
    ("uri", "files"),
    [
        ("hf://datasets/org/set/train-{08..11}.tar",
         HubFiles("org/set", "dataset", tuple(f"train-{n}.tar" for n in ("08", "09", "10", "11")))),
        ("hf://datasets/org/set@v1.0/sub/*.parquet", HubFiles("org/set", "dataset", ("sub/*.parquet",), "v1.0")),
    ],
)  # fmt: skip
def test_addresses(uri: str, files: HubFiles) -> None:
    assert dataset_files(uri) == files


@pytest.mark.parametrize(
    "uri", ["hf://datasets/org/set", "hf://org/set/a.tar", "hf://datasets/set", "hf://datasets/org/set@/a"]
)
def test_wrong_addresses(uri: str) -> None:
    with pytest.raises(UserError, match=r"hf://datasets/ORG/NAME/PATTERN or hf://datasets/ORG/NAME@REVISION"):
        dataset_files(uri)


def test_an_empty_range() -> None:
    with pytest.raises(UserError, match="range in braces is empty"):
        dataset_files("hf://datasets/org/set/{3..1}.tar")


def test_braces() -> None:
    assert expand_braces("a") == ["a"]
    assert expand_braces("a{098..101}b") == ["a098b", "a099b", "a100b", "a101b"]
    assert expand_braces("{x,y}{0..1}") == ["x0", "x1", "y0", "y1"]
    assert expand_braces("{x}") == ["{x}"]
    assert len(expand_braces("{0000..1023}")) == 1024


def test_one_module_imports_the_hub() -> None:
    root = Path(hub.__file__).parent
    named = [path.name for path in root.rglob("*.py") if "huggingface_hub" in path.read_text()]
    assert named == ["hub.py"]
