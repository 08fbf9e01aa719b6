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
