"""Fixtures of the unit tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from local_hub import LocalHub, serve


@pytest.fixture
def local_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """An empty Hugging Face hub on this machine, which huggingface_hub talks to alone."""
    with serve(tmp_path / "hf", monkeypatch) as hub:
        yield hub


@pytest.fixture(scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_cache(_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Indexes of tests lie in a folder of theirs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(_cache))
