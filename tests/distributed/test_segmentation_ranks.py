"""A segmentation trains and is measured alike on any number of ranks, and resumes exactly."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
from PIL import Image
from rank_checks import assert_resumes_exactly, curves_of_two_and_one
from ranks import run_ranks

Values = Callable[..., dict[str, Any]]
VIT = {
    "name": "fd_vit_tiny_patch16", "img_size": 32,
    "overrides": {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "drop_path_rate": 0.2},
}  # fmt: skip
pytestmark = pytest.mark.slow


@pytest.fixture
def values(recipe_values: Values, write_shapes: Callable[..., str], tmp_path: Path) -> Values:
    """Eight images of unequal size, with ever more ignored pixels: ranks have unequally many that count."""
    source = write_shapes(tmp_path / "shapes")
    defaults = {
        "data__train": source,
        "data__evaluation": source,
        "train__global_batch": 8,
        "train__micro_batch": 4,
    }

    def make(name: str, **changes: Any) -> dict[str, Any]:
        return recipe_values("segmentation", run_dir=str(tmp_path / name), **(defaults | changes))

    return make


@pytest.mark.parametrize(
    ("stage", "checkpointing", "norm", "model"),
    [(1, "none", "group", None), (3, "block", "batch", None), (3, "none", "group", VIT)],
)
def test_two_ranks_equal_one(
    values: Values, stage: int, checkpointing: str, norm: str, model: dict[str, Any] | None
) -> None:
    changes: dict[str, Any] = {"train__steps": 4, "segmentation__norm": norm}
    if model is not None:
        changes["model"] = model
    alone = values("alone", train__micro_batch=8, **changes)
    together = values(
        "together", train__ds_config=f"zero{stage}", train__micro_batch=2 if norm == "group" else 4,
        train__activation_checkpointing=checkpointing, **changes,
    )  # fmt: skip
    found, expected = curves_of_two_and_one(together, alone)
    # fp32 sums in another order, which AdamW's division amplifies: as in test_equality.
    np.testing.assert_allclose(found[:, 0], expected[:, 0], rtol=1e-5)
    np.testing.assert_allclose(found[:, 1], expected[:, 1], rtol=1e-4)
    assert len(set(expected[:, 0])) == 4
    assert 0.5 < expected[0, 0] < 2, "about 1.4 ln 3: a mean over pixels"


def test_a_skipped_step_leaves_no_nan_in_batch_statistics(values: Values) -> None:
    """What a step that is skipped brought is forgotten, also where accumulation sees the layer twice in it."""
    of = {}
    for name, poisoned in (("bad", [1, 2]), ("good", [])):
        run = values(
            name, train__micro_batch=4, train__steps=3, segmentation__norm="batch", data__evaluation=None
        )
        [(skipped, of[name])] = run_ranks(cases.train_with_bad_activations, 1, run, poisoned)
        # Of six micro-batches the third and the fourth belong to the second step.
        assert skipped[1::2] == [name == "bad", name == "bad", False]
    assert all(np.isfinite(statistic).all() for statistic in of["bad"].values())
    assert (of["bad"]["running_mean"] != 0).any(), "the step that was good is in them"


def test_mask2former_trains_alike_on_two_ranks(values: Values) -> None:
    """Its matching and its points are a function of the image, in parts, too; three of eight images have no class."""
    pytest.importorskip("transformers", reason="needs the extra [hf]")
    head = {"head": "mask2former", "channels": 32, "num_queries": 5, "auxiliary_weight": 0.0}
    changes = {"segmentation": head, "model": VIT, "train__steps": 2, "train__global_batch": 4}
    changes["data__evaluation"] = None
    alone = values("alone", train__micro_batch=4, **changes)
    together = values("together", train__ds_config="zero3", train__micro_batch=1, **changes)
    for path in sorted(Path(alone["data"]["train"][6:]).glob("masks/*.png"))[:3]:
        Image.new("L", Image.open(path).size, 255).save(path)
    found, expected = curves_of_two_and_one(together, alone)
    # As above; a point that is at the border of the most uncertain ones may be another one.
    np.testing.assert_allclose(found[:, 0], expected[:, 0], rtol=1e-4)
    assert len(set(expected[:, 0])) == 2


def test_a_frozen_backbone_is_kept_in_parts_and_in_checkpoints(values: Values) -> None:
    probe = {"head": "linear", "frozen": True, "auxiliary_weight": 0.0}
    changes = {"segmentation": probe, "train__steps": 2}
    alone = values("alone", train__micro_batch=8, **changes)
    together = values("together", train__ds_config="zero3", train__micro_batch=2, **changes)
    found, expected = curves_of_two_and_one(together, alone)
    np.testing.assert_allclose(found[:, 0], expected[:, 0], rtol=1e-5)  # as above
    [logged] = cases.read_metrics(Path(together["run_dir"]), "evaluation")
    [found_again] = run_ranks(cases.evaluate, 1, together["run_dir"], [])
    assert found_again["miou"] == pytest.approx(logged["miou"], abs=1e-3)


def test_evaluate_gives_the_metrics_of_the_run(values: Values) -> None:
    """8 images on 1 and 3 ranks, by windows of which small images have fewer; integers: the same to the last digit."""
    run = values("run", train__ds_config="zero3", train__steps=2, segmentation__short_side=0)
    run_ranks(cases.train, 2, run)
    [logged] = cases.read_metrics(Path(run["run_dir"]), "evaluation")
    results = [run_ranks(cases.evaluate, ranks, run["run_dir"], []) for ranks in (1, 3)]
    assert results[1][0] == results[1][2] == results[0][0]
    found = results[0][0]
    assert {name: found[name] for name in ("miou", "macc", "aacc")} == {
        name: logged[name] for name in ("miou", "macc", "aacc")
    }
    masks = [np.asarray(Image.open(path)) for path in Path(run["data"]["train"][6:]).glob("masks/*.png")]
    assert found["pixels"] == sum(int((mask != 255).sum()) for mask in masks), "each image once"
    assert [entry["name"] for entry in found["classes"]] == ["ground", "disc", "square"]
    assert json.loads((Path(run["run_dir"]) / "evaluations/step_00000002.json").read_text()) == found
    # Swin V2 has the same weights for any window.
    other = run_ranks(
        cases.evaluate,
        1,
        run["run_dir"],
        ["model.img_size=32", "model.overrides.window_size=8", "segmentation.flip_too=true"],
    )[0]
    names = sorted(path.name for path in (Path(run["run_dir"]) / "evaluations").iterdir())
    assert len(names) == 2, "a file for each way, and nothing of the way there"
    assert names[0].startswith("step_00000002-img_size_32_window_size_8_flip_too_True-")
    assert names[1] == "step_00000002.json"
    assert other["pixels"] == found["pixels"]
    assert other["miou"] != found["miou"]


def test_resume_is_exact(values: Values) -> None:
    whole, stopped = values("whole"), values("stopped")
    assert_resumes_exactly(whole, stopped, step=4)
    last = [cases.read_metrics(Path(run["run_dir"]), "evaluation")[-1]["miou"] for run in (whole, stopped)]
    assert last[0] == last[1]
