"""Average precision is the same to the last digit on any number of ranks, and after a kill on another number."""

import math
from collections.abc import Callable
from pathlib import Path

import detection_cases
import pytest
from ranks import run_ranks

pytestmark = pytest.mark.slow


def test_any_number_of_ranks(tmp_path: Path, write_objects: Callable[..., str]) -> None:
    """8 images: on 3 ranks, one runs an empty image."""
    source, progress = write_objects(tmp_path / "own"), str(tmp_path / "run.progress")
    [alone] = run_ranks(detection_cases.detect_all, 1, source, None, math.inf)
    assert 0 < alone["metrics"]["box_ap50"] < 1
    assert alone["calls"] == 8
    assert run_ranks(detection_cases.detect_all, 2, source, progress, 2) == [None, None], (
        "killed after two rounds"
    )
    together = run_ranks(detection_cases.detect_all, 3, source, progress, math.inf)
    assert [each["calls"] for each in together] == [2, 2, 2], "4 images are left"
    for each in together:
        assert (each["metrics"], each["classes"]) == (alone["metrics"], alone["classes"])
    assert together[0]["found"] == alone["found"]
    assert together[1]["found"] == []
