"""A detector trains and is measured alike on any number of ranks, also where one has nothing to learn, and resumes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
from rank_checks import assert_resumes_exactly, curves_of_two_and_one

Values = Callable[..., dict[str, Any]]
pytestmark = pytest.mark.slow


@pytest.fixture
def values(recipe_values: Values, write_objects: Callable[..., str], tmp_path: Path) -> Values:
    """Seven images of unequal size: the last has no object, some a crowd, and in an evaluation one rank has less."""
    source = write_objects(tmp_path / "objects", count=7)
    defaults = {
        "data__train": source, "data__evaluation": source, "train__global_batch": 4, "train__micro_batch": 2,
        "train__steps": 4, "model__img_size": 48, "optim__lr": 1e-4,
    }  # fmt: skip

    def make(name: str, **changes: Any) -> dict[str, Any]:
        return recipe_values("detection", run_dir=str(tmp_path / name), **(defaults | changes))

    return make


HTC = {"channels": 16, "rois_per_image": 32, "head": "htc", "global_attention": True}


@pytest.mark.parametrize(
    ("stage", "checkpointing", "section"),
    [(1, "none", {"channels": 16, "rois_per_image": 32}), (3, "block", HTC)],
    ids=["mask_rcnn, ZeRO-1", "htc, ZeRO-3"],
)
def test_two_ranks_equal_one(values: Values, stage: int, checkpointing: str, section: dict[str, Any]) -> None:
    """One rank has objects where the other has none: ZeRO-3 gathers each layer on both, or waits for ever.

    Micro-batches are of one image: of another size a convolution rounds otherwise, and untrained scores lie so close
    that their order changes. That an image learns alike in any batch is a unit test's.
    """
    alone = values("alone", train__micro_batch=1, detection=section)
    together = values(
        "together", train__ds_config=f"zero{stage}", train__micro_batch=1,
        train__activation_checkpointing=checkpointing, detection=section,
    )  # fmt: skip
    found, expected = curves_of_two_and_one(together, alone)
    # fp32 sums in another order.
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    # AdamW's division amplifies that, and scores or overlaps that are almost equal then go the other way.
    np.testing.assert_allclose(found[:, 0], expected[:, 0], rtol=1e-2)
    assert len(set(expected[:, 0])) == 4
    for run in (together, alone):
        [metrics] = cases.read_metrics(Path(run["run_dir"]), "evaluation")
        assert {"box_ap", "mask_ap"} <= set(metrics)


def test_resume_is_exact(values: Values) -> None:
    assert_resumes_exactly(values("whole"), values("stopped"), step=2)
