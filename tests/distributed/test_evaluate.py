"""`evaluate` gives a run's own metrics again, on any number of ranks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
from ranks import run_ranks

from fd_scale.diagnose import diagnose
from fd_scale.diagnose.run import Options

Values = Callable[..., dict[str, Any]]
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("task", "stage", "precision"), [("classification", 3, "bf16"), ("distill", 0, "fp32")]
)
def test_evaluate_gives_the_metrics_of_the_run(
    recipe_values: Values, task: str, stage: int, precision: str
) -> None:
    """300 test images do not divide over 3 ranks' batches of 7."""
    values = recipe_values(
        task, data__evaluation="digits:test", train__ds_config=f"zero{stage}", train__precision=precision,
        train__steps=4, checkpoint__save_every_steps=2,
    )  # fmt: skip
    run_ranks(cases.train, 2, values)
    run_dir = Path(values["run_dir"])
    [logged] = cases.read_metrics(run_dir, "evaluation")
    for ranks, overrides in ((1, []), (3, ["train.micro_batch=7"])):
        found = run_ranks(cases.evaluate, ranks, values["run_dir"], overrides)
        assert all(metrics == found[0] for metrics in found)
        assert found[0]["step"] == 4
        names = [name for name in logged if name in found[0] and name not in ("step", "kind")]
        assert {"top1", "top5", "loss", "calibration_error"} <= set(names) or names == ["loss"]
        for name in names:
            # Batches of another size sum in another order; in bf16 a logit may round to its neighbour.
            assert found[0][name] == pytest.approx(logged[name], rel=2e-2 if precision == "bf16" else 1e-5), (
                name
            )
    written = json.loads((run_dir / "evaluations/step_00000004.json").read_text())
    assert written == found[0]
    if task == "classification":
        assert sum(entry["images"] for entry in written["classes"]) == written["images"] == 300
        assert [entry["name"] for entry in written["classes"]] == list("0123456789")
    other = run_ranks(cases.evaluate, 1, values["run_dir"], ["data.evaluation=digits:train"])[0]
    assert other["loss"] != found[0]["loss"]
    assert json.loads((run_dir / "evaluations/step_00000004.json").read_text()) == written
    [file] = (run_dir / "evaluations").glob("step_00000004-digits_train-*.json")
    assert json.loads(file.read_text()) == other
    earlier = run_ranks(cases.evaluate, 1, str(run_dir / "checkpoints/step_00000002"), [])[0]
    assert earlier["step"] == 2
    assert earlier["loss"] != found[0]["loss"]


@pytest.mark.parametrize("stage", [0, 3])
def test_neighbours_are_found_wherever_they_are(recipe_values: Values, tmp_path: Path, stage: int) -> None:
    """A bank of 100 images in one part, in two, in three: the same votes, but for equal distances."""
    found = []
    for ranks in (1, 2):
        values = recipe_values(
            run_dir=str(tmp_path / f"{ranks}"), data__evaluation="digits:test", train__ds_config=f"zero{stage}",
            train__steps=2, log__evaluate_every_steps=1,
        )  # fmt: skip
        values["distill"]["knn_images"] = 100
        run_ranks(cases.train, ranks, values)
        logged = cases.read_metrics(Path(values["run_dir"]), "evaluation")
        assert len(logged) == 2
        found.append(logged[-1]["knn_top1"])
    found += [metrics["knn_top1"] for metrics in run_ranks(cases.evaluate, 3, values["run_dir"], [])]
    assert 0.15 < found[0] < 1, "better than chance"
    np.testing.assert_allclose(found, found[0], atol=1 / 300)


@pytest.mark.parametrize("task", ["fine-tuning", "distill"])
def test_a_run_is_looked_into(recipe_values: Values, task: str) -> None:
    """The middle of its landscape is the loss that it logged, on any number of ranks; its attention is seen."""
    values = recipe_values(task, data__evaluation="digits:test", train__steps=2)
    run_ranks(cases.train, 1, values)
    run_dir = Path(values["run_dir"])
    [logged] = cases.read_metrics(run_dir, "evaluation")
    found = run_ranks(cases.landscape, 2, values["run_dir"], 3)
    assert found[0] == found[1]
    assert json.loads((run_dir / "diagnosis/landscape.json").read_text()) == found[0]
    rows = found[0]["rows"]
    assert rows[1][1]["loss"] == pytest.approx(logged["loss"], rel=1e-5)
    assert len({point["loss"] for row in rows for point in row}) == 9
    assert found[0]["top_eigenvalue"] != 0
    assert run_ranks(cases.landscape, 1, values["run_dir"], 3)[0]["rows"] == rows, (
        "they are not measured again"
    )
    manifest = run_dir / "checkpoints/step_00000002/manifest.json"
    manifest.write_text(manifest.read_text() + " ")  # as if it were another checkpoint of the same step
    file = run_dir / "diagnosis/landscape.json"
    before = file.read_text()
    assert "checkpoint" in run_ranks(cases.landscape_error, 2, values["run_dir"], 3)[0]
    assert "points 3, here 5" in run_ranks(cases.landscape_error, 2, values["run_dir"], 5)[1]
    assert file.read_text() == before
    names = [values["run_dir"], *([f"teacher:{run_dir}"] if task == "distill" else [])]
    result = diagnose(names, None, Options(num_images=4, batch_size=4))
    assert [len(model["layers"]) for model in result["models"]] == [3] * len(names)
    assert (run_dir / "diagnosis/diagnosis.json").is_file()


def test_a_network_is_measured_and_a_rank_that_cannot_is_named() -> None:
    for verdict, detail in run_ranks(cases.network_row, 2, None):
        assert verdict == "ok"
        assert detail.endswith("at each of 2 ranks, gloo")
    for verdict, detail in run_ranks(cases.network_row, 2, 1):
        assert verdict == "fails"
        assert detail.startswith("on n7: ")
