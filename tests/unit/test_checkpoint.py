"""Retention and manifests, without an engine: tensors are a text file here."""

import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest

from fd_scale import checkpoint
from fd_scale.checkpoint import MANIFEST, Checkpoints, TrainState, newest_checkpoint, refuse_other_identity
from fd_scale.distributed import ALONE
from fd_scale.errors import UserError


class Tensors:
    """Stands in for the engine; remembers from which folder it was loaded."""

    loaded: str | None = None

    def snapshot(self, folder: Path) -> dict[str, Any]:
        return {"tensors.txt": folder.name}

    def load(self, folder: Path) -> None:
        self.loaded = folder.name


def make(run_dir: Path, keep_last: int = 2, **identity: Any) -> Checkpoints:
    return Checkpoints(run_dir, keep_last, {"seed": 0, **identity}, ALONE)


def names(run_dir: Path) -> list[int]:
    return sorted(int(path.parent.name[5:]) for path in run_dir.glob(f"checkpoints/*/{MANIFEST}"))


def save(run_dir: Path, steps: list[int], keep_last: int = 10, best: int | None = None) -> None:
    for step in steps:
        whole(make(run_dir, keep_last), TrainState(step=step, best_step=best, best_value=1.0))


def whole(checkpoints: Checkpoints, state: TrainState) -> None:
    checkpoints.save(Tensors(), state)
    checkpoints.complete()


def damage(run_dir: Path, step: int) -> None:
    (run_dir / "checkpoints" / f"step_{step:08d}" / "tensors.txt").write_text(f"step_{step + 1:08d}")


def test_a_refused_checkpoint_is_not_taken_for_one_when_its_step_comes(tmp_path: Path) -> None:
    """An evaluation at step 6 would write its manifest anew, and retention then delete the one that is whole."""
    save(tmp_path, [4, 6])
    damage(tmp_path, 6)
    checkpoints = make(tmp_path, keep_last=1)
    assert checkpoints.resume(Tensors()).step == 4
    assert not checkpoints.update(TrainState(step=6, best_step=6, best_value=2.0))
    assert names(tmp_path) == [4]


def test_going_back_passes_over_what_is_not_accepted(tmp_path: Path) -> None:
    checkpoints, tensors = make(tmp_path), Tensors()
    for step, bad in ((2, 0), (4, 3)):
        whole(checkpoints, TrainState(step=step, bad_in_a_row=bad, recent_losses=[0.1, 0.2]))
    state = checkpoints.resume(tensors, lambda state: state.bad_in_a_row == 0)
    assert (state, tensors.loaded) == (TrainState(step=2, recent_losses=[0.1, 0.2]), "step_00000002")
    assert names(tmp_path) == [2]
    assert checkpoints.resume(tensors, lambda state: False) == TrainState(), "none to go back to"


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    save(tmp_path, [1, 2, 3, 4, 5], keep_last=2, best=1)
    assert names(tmp_path) == [1, 4, 5]


def test_a_resume_makes_room(tmp_path: Path) -> None:
    """On a full disk `keep_last` is lowered: nothing could be written before what is too much is gone."""
    save(tmp_path, [1, 2, 3, 4], best=1)
    assert make(tmp_path, keep_last=1).resume(Tensors()).step == 4
    assert names(tmp_path) == [1, 4]


@pytest.mark.parametrize(
    ("keep_last", "damaged", "saved", "kept"), [(1, [6], 5, [4, 5]), (2, [4, 6], 3, [2, 3])]
)
def test_refused_checkpoints_do_not_count(
    tmp_path: Path, keep_last: int, damaged: list[int], saved: int, kept: list[int]
) -> None:
    save(tmp_path, [2, 4, 6] if 4 in damaged else [4, 6], best=4 if 4 not in damaged else None)
    for step in damaged:
        damage(tmp_path, step)
    checkpoints, tensors = make(tmp_path, keep_last), Tensors()
    state = checkpoints.resume(tensors)
    assert tensors.loaded == f"step_{kept[0]:08d}"
    state.step = saved
    whole(checkpoints, state)
    assert names(tmp_path) == kept
    assert (tmp_path / "checkpoints" / "latest").read_text() == f"step_{saved:08d}\n"


def test_every_digit_and_key_of_a_manifest_counts(tmp_path: Path) -> None:
    save(tmp_path, [2, 4])
    file = tmp_path / "checkpoints" / "step_00000004" / MANIFEST
    text = file.read_text()
    for before, after in (
        ('"step": 4', '"step": 5'),
        ('"files"', '"filex"'),
        ('"bytes"', '"bytez"'),
        ("{", "["),
    ):
        assert before in text
        file.write_text(text.replace(before, after, 1))
        tensors = Tensors()
        assert make(tmp_path).resume(tensors).step == 2, f"{before} became {after}"
        assert tensors.loaded == "step_00000002"
        assert newest_checkpoint(tmp_path).name == "step_00000002"


def test_a_newer_state_is_written_into_the_checkpoint_of_its_step(tmp_path: Path) -> None:
    checkpoints, state = make(tmp_path), TrainState(step=3)
    whole(checkpoints, state)
    state.best_value, state.best_step, state.evaluated_step = 0.5, 3, 3
    checkpoints.update(state)
    assert make(tmp_path).resume(Tensors()) == state
    checkpoints.update(TrainState(step=7))
    assert names(tmp_path) == [3], "an update makes no checkpoint"


def test_latest_is_put_right_on_resume(tmp_path: Path) -> None:
    save(tmp_path, [1, 2])
    latest = tmp_path / "checkpoints" / "latest"
    latest.write_text("step_00000001\n")  # killed between the manifest and the move of `latest`
    assert make(tmp_path).resume(Tensors()).step == 2
    assert latest.read_text() == "step_00000002\n"


def test_another_identity_is_named(tmp_path: Path) -> None:
    refuse_other_identity(tmp_path, {"seed": 1})
    save(tmp_path, [1])
    refuse_other_identity(tmp_path, {"seed": 0})
    with pytest.raises(UserError, match=re.escape("written with seed=0, this run has 1")):
        refuse_other_identity(tmp_path, {"seed": 1})
    with pytest.raises(UserError, match=re.escape("written with ranks=null, this run has 2")):
        refuse_other_identity(tmp_path, {"seed": 0, "ranks": 2})
    # A setting of a later version is what it was without it: its default.
    refuse_other_identity(tmp_path, {"seed": 0, "optim.layer_decay": 1.0, "optim.betas": (0.9, 0.999)})
    with pytest.raises(UserError, match=r"written with optim\.layer_decay=1\.0, this run has 0\.5"):
        refuse_other_identity(tmp_path, {"seed": 0, "optim.layer_decay": 0.5})


def test_a_manifest_is_readable_by_people(tmp_path: Path) -> None:
    save(tmp_path, [1])
    manifest = json.loads((tmp_path / "checkpoints" / "step_00000001" / MANIFEST).read_text())
    assert manifest["state"]["step"] == 1
    assert set(manifest["files"]["tensors.txt"]) == {"bytes", "sha256"}


def test_a_checkpoint_is_whole_when_it_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, [1])
    checkpoints, write, may_write = make(tmp_path), checkpoint._write, threading.Event()

    def write_late(*arguments: Any) -> Any:
        assert may_write.wait(60)
        return write(*arguments)

    monkeypatch.setattr(checkpoint, "_write", write_late)
    state = TrainState(step=2)
    checkpoints.save(Tensors(), state)
    state.step = 3  # training goes on
    assert not checkpoints.written
    assert names(tmp_path) == [1]
    may_write.set()
    took = checkpoints.complete()
    assert took["step"] == 2
    assert names(tmp_path) == [1, 2]
    assert make(tmp_path).resume(Tensors()).step == 2
    assert checkpoints.complete() == {}


def test_saves_that_never_ended_give_way(tmp_path: Path) -> None:
    save(tmp_path, [2])
    (tmp_path / "checkpoints" / "step_00000003").mkdir()
    save(tmp_path, [4])
    assert [path.name for path in sorted(tmp_path.glob("checkpoints/step_*"))] == [
        "step_00000002",
        "step_00000004",
    ]


def test_checkpoints_of_0_1_0_named_their_ranks(tmp_path: Path) -> None:
    whole(make(tmp_path, world_size=2), TrainState(step=1))
    refuse_other_identity(tmp_path, {"seed": 0})


def test_a_file_of_the_longest_name_is_written(tmp_path: Path) -> None:
    """Of its temporary name too no more than the 255 bytes that file systems take; an image may have such a name."""
    for stem in ("x" * 251, "図" * 83 + "xx"):
        file = tmp_path / f"{stem}.png"
        assert len(file.name.encode()) == 255
        checkpoint.write_atomically(file, b"pixels")
        assert file.read_bytes() == b"pixels"
        file.unlink()
    assert not list(tmp_path.iterdir())
