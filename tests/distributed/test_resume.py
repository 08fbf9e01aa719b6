"""Killed anywhere, a run resumes from its newest whole checkpoint and has the losses of one that was not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import pytest
from ranks import run_ranks

from fd_scale.checkpoint import read_manifest

Values = Callable[..., dict[str, Any]]
RANKS = 2


@pytest.fixture
def values(recipe_values: Values) -> dict[str, Any]:
    """ZeRO-3 on two ranks, six steps, a checkpoint every second one."""
    return recipe_values(
        train__ds_config="zero3", data__evaluation="digits:test", log__evaluate_every_steps=4
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run that was not killed, made once: its folder and its lines of metrics."""
    return {"folder": tmp_path_factory.mktemp("undisturbed") / "run"}


@pytest.fixture
def whole_run(undisturbed: dict[str, Any], values: dict[str, Any]) -> Path:
    folder: Path = undisturbed["folder"]
    if not folder.exists():
        run_ranks(cases.train, RANKS, values | {"run_dir": str(folder)})
    return folder


def lines(run_dir: str | Path) -> list[tuple[int, str, float, float | None]]:
    """Step, kind, loss and gradient norm of every line of metrics; times are left out."""
    rows = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [
        (row["step"], row["kind"], row["loss"], row.get("grad_norm"))
        for row in rows
        if row["kind"] != "checkpoint"
    ]


def checkpoints(run_dir: str | Path) -> list[str]:
    return sorted(path.parent.name for path in Path(run_dir).glob("checkpoints/*/manifest.json"))


@pytest.mark.parametrize(
    ("step", "where", "victim"),
    [
        (4, "before the manifest", 0),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (1, "between steps", 0),
                (5, "between steps", 1),
                (2, "before the files", 1),
                (4, "while writing", 0),
                (4, "while writing", 1),
                (4, "before the manifest", 1),
                (4, "before the evaluation", 0),
                (6, "before the evaluation", 1),
            )
        ),
    ],
)
def test_sigkill_then_resume_is_exact(
    values: dict[str, Any], whole_run: Path, step: int, where: str, victim: int
) -> None:
    results = run_ranks(cases.train_then_die, RANKS, values, step, where, victim)
    assert results[victim] == -9, "the victim was killed in the middle of the run"
    before = checkpoints(values["run_dir"])
    last = {1: 0, 2: 0, 4: 2, 5: 4, 6: 6}[step] if where != "before the evaluation" else step
    assert before == [f"step_{saved:08d}" for saved in (last - 2, last) if saved > 0]
    run_ranks(cases.train, RANKS, values)
    assert lines(values["run_dir"]) == lines(whole_run)


@pytest.mark.slow
def test_an_evaluation_made_up_for_leaves_the_checkpoint_in_place(values: dict[str, Any]) -> None:
    """Its best value goes into the manifest; the tensors it was resumed from are not written anew."""
    run_ranks(cases.train_then_die, RANKS, values, 6, "before the evaluation", 1)
    for state in run_ranks(cases.train_without_saving, RANKS, values):
        assert state.best_step == state.evaluated_step == 6
    manifest = read_manifest(Path(values["run_dir"]) / "checkpoints/step_00000006")
    assert manifest["state"]["best_step"] == 6


def test_the_teacher_is_in_no_checkpoint(whole_run: Path) -> None:
    import torch

    def tensors(value: Any) -> list[torch.Tensor]:
        if isinstance(value, torch.Tensor):
            return [value]
        parts = (
            value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
        )
        return [tensor for part in parts for tensor in tensors(part)]

    folder = whole_run / "checkpoints" / "step_00000006"
    saved = [torch.load(path, weights_only=False) for path in sorted(folder.glob("*.pt"))]
    names = [name for state in saved for name in state.get("param_shapes", [{}])[0]]
    assert names, "the checkpoint names its parameters"
    assert all(name.startswith(("backbone.", "projectors.")) for name in names)
    # Student and projector once in fp32, two moments of AdamW; ZeRO-3 pads to a multiple of the ranks.
    held = sum(
        t.numel()
        for path in folder.glob("*optim_states.pt")
        for t in tensors(torch.load(path, weights_only=False))
    )
    trained = 48_000  # at most: the tiny student has 31 k parameters, its teacher 67 k
    assert held < 3 * trained


def damage(folder: Path, kind: str) -> str:
    """Damages a checkpoint; returns what its refusal must say."""
    file = max(folder.glob("*optim_states.pt"), key=lambda path: path.name)
    content = bytearray(file.read_bytes())
    if kind == "flipped bit":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        return f"{file.name} does not match its checksum"
    if kind == "truncated":
        file.write_bytes(content[:-7])
        return f"{file.name} has {len(content) - 7} bytes, expected {len(content)}"
    if kind == "missing":
        file.unlink()
        return f"{file.name} is missing"
    (folder / "manifest.json").write_text("{")
    return "manifest.json is damaged"


@pytest.mark.parametrize(
    "kind",
    [
        "torn manifest",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("flipped bit", "truncated", "missing")),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(values: dict[str, Any], whole_run: Path, kind: str) -> None:
    run_dir = Path(values["run_dir"])
    shutil.copytree(whole_run, run_dir)
    expected = damage(run_dir / "checkpoints" / "step_00000006", kind)
    run_ranks(cases.train, RANKS, values)
    log = (run_dir / "logs" / "rank_0.log").read_text()
    assert f"step_00000006 is refused: {expected}" in log
    assert "resumed" in log
    assert "step_00000004" in log.split("resumed")[-1].splitlines()[0], "the newest whole one was used"
    assert lines(run_dir) == lines(whole_run)


def test_a_failing_evaluation_loses_nothing(recipe_values: Values, tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name)
    (tmp_path / "images" / "b.png").write_bytes(b"torn")
    values = recipe_values(
        data__evaluation=f"imagefolder:{tmp_path / 'images'}", checkpoint__save_every_steps=1000
    )
    error = run_ranks(cases.train_or_error, 1, values)[0]
    assert "b.png cannot be decoded" in error
    assert checkpoints(values["run_dir"]) == ["step_00000006"]


def test_nothing_whole_is_an_error_and_not_a_fresh_start(values: dict[str, Any], whole_run: Path) -> None:
    run_dir = Path(values["run_dir"])
    shutil.copytree(whole_run, run_dir)
    for folder in (run_dir / "checkpoints").glob("step_*"):
        damage(folder, "flipped bit")
    before = lines(run_dir)
    errors = run_ranks(cases.train_or_error, RANKS, values)
    assert all("no checkpoint there is whole" in error for error in errors), errors
    assert lines(run_dir) == before, "the metrics are untouched"


def test_preemption_saves_and_the_same_command_resumes(values: dict[str, Any], whole_run: Path) -> None:
    states = run_ranks(cases.train_until_preempted, RANKS, values, 3)
    assert [state.step for state in states] == [3, 3]
    assert "step_00000003" in checkpoints(values["run_dir"])
    run_ranks(cases.train, RANKS, values)
    assert lines(values["run_dir"]) == lines(whole_run)


@pytest.mark.slow
def test_retention_keeps_the_last_and_the_best(recipe_values: Values) -> None:
    values = recipe_values(
        "classification", data__evaluation="digits:test", checkpoint__keep_last=1,
        log__evaluate_every_steps=1, train__steps=8, optim__lr=3e-3,
    )  # fmt: skip
    state = run_ranks(cases.train, 1, values)[0]
    kept = checkpoints(values["run_dir"])
    assert kept == sorted({f"step_{state.best_step:08d}", "step_00000008"})
    assert (Path(values["run_dir"]) / "checkpoints" / "latest").read_text() == "step_00000008\n"
    top1 = {line["step"]: line["top1"] for line in cases.read_metrics(Path(values["run_dir"]), "evaluation")}
    assert state.best_value == max(top1.values()) == top1[state.best_step]


@pytest.mark.slow
@pytest.mark.parametrize("precision_stage", [("fp32", 0), ("fp32", 3), ("bf16", 2)])
def test_a_nan_on_one_rank_skips_the_step_everywhere(
    recipe_values: Values, precision_stage: tuple[str, int]
) -> None:
    precision, stage = precision_stage
    values = recipe_values(train__precision=precision, train__ds_config=f"zero{stage}")
    nan = float("nan")
    for skipped, error in run_ranks(cases.train_with_bad_losses, RANKS, values, [1, 2, 4], nan):
        assert (skipped, error) == ([False, True, True, False, True, False], "")
    assert all(loss < 10 for loss in cases.losses(values["run_dir"])[5:])
    log = (Path(values["run_dir"]) / "logs/rank_1.log").read_text()
    assert "step 2: skipped, a gradient is not finite; the loss is not finite on rank 1" in log
    assert "step 2: samples 24 to 31 of the stream" in log, "the second half of the second global batch of 16"


@pytest.mark.slow
def test_bad_steps_go_back_to_a_checkpoint_and_take_other_samples(recipe_values: Values) -> None:
    values = recipe_values(watch={"max_bad_steps": 2, "max_rollbacks": 1})
    for skipped, error in run_ranks(
        cases.train_with_bad_losses, RANKS, values, [2, 3], float("nan")
    ):  # back from step 4 to the checkpoint of step 2, then to the end
        assert (skipped, error) == ([False, False, True, True, False, False, False, False], "")
    after = cases.losses(values["run_dir"])
    assert len(after) == 6, "one line a step"
    state = read_manifest(Path(values["run_dir"]) / "checkpoints/step_00000006")["state"]
    assert (state["rollbacks"], state["bad_in_a_row"]) == (1, 0)
    undisturbed = recipe_values(run_dir=values["run_dir"] + "_undisturbed")
    run_ranks(cases.train, RANKS, undisturbed)
    before = cases.losses(undisturbed["run_dir"])
    assert after[:2] == before[:2]
    assert after[2] != before[2], "other samples"


@pytest.mark.slow
def test_bad_steps_end_the_run_after_the_last_rollback(recipe_values: Values) -> None:
    values = recipe_values(watch={"max_bad_steps": 2, "max_rollbacks": 1})
    for _, error in run_ranks(cases.train_with_bad_losses, RANKS, values, list(range(2, 20)), float("nan")):
        assert "2 steps in a row had a loss that spikes" in error
        assert "after going back 1 times" in error
    assert checkpoints(values["run_dir"]) == ["step_00000002"]
    early = recipe_values(watch={"max_bad_steps": 2}, run_dir=values["run_dir"] + "_early")
    for _, error in run_ranks(cases.train_with_bad_losses, RANKS, early, [0, 1, 2, 3], float("nan")):
        assert "there is no checkpoint to go back to" in error


@pytest.mark.slow
def test_a_spike_is_not_saved_and_goes_back(recipe_values: Values) -> None:
    values = recipe_values(watch={"max_bad_steps": 2}, train__ds_config="zero3")
    values["train"]["steps"] = 26
    values["checkpoint"] = {"save_every_steps": 22}
    # Steps 22 and 23 have twelve times their loss: the checkpoint due at 22 waits, the run goes back to... none yet.
    for _, error in run_ranks(cases.train_with_bad_losses, RANKS, values, [21, 22, 23], 12.0):
        assert "there is no checkpoint to go back to" in error
    assert checkpoints(values["run_dir"]) == []
    values["checkpoint"] = {"save_every_steps": 21}
    for skipped, error in run_ranks(cases.train_with_bad_losses, RANKS, values, [21, 22], 12.0):
        assert (len(skipped), error) == (23 + 5, "")
    assert not any(skipped)


def test_a_full_disk_is_one_sentence_and_loses_nothing(recipe_values: Values, whole_run: Path) -> None:
    values = recipe_values(train__ds_config="zero0")
    error = run_ranks(cases.train_with_small_files, 1, values, 10_000, 4)[0]
    assert "step_00000004: the checkpoint could not be written" in error
    assert "the last whole one is step_00000002" in error
    assert checkpoints(values["run_dir"]) == ["step_00000002"]
    run_ranks(cases.train, 1, values)
    assert checkpoints(values["run_dir"]) == ["step_00000004", "step_00000006"]
