"""Checkpoints: whole or not used.

    RUN/checkpoints/step_00001000/   what DeepSpeed wrote, and manifest.json, written last
    RUN/checkpoints/latest           name of the newest whole checkpoint (for people and scripts)

A folder without a manifest is a save that never ended and is ignored; one whose files do not match
its manifest is refused by name, and the next older one is used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from fd_scale.distributed import World
from fd_scale.errors import UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")

FORMAT = 1
"""Version of the layout, of the sample order and of the random streams behind it."""

MANIFEST = "manifest.json"


@dataclass(slots=True)
class TrainState:
    """All that must survive a restart, beside tensors: every other thing is computed from it."""

    step: int = 0
    """Optimizer steps taken."""
    best_value: float | None = None
    """Best value of the task's evaluation metric so far."""
    best_step: int | None = None
    """Step at which it was measured."""
    evaluated_step: int | None = None
    """Step of the last evaluation: a run killed between its save and its evaluation makes up for it."""
    skipped_in_a_row: int = 0
    """Steps skipped for a non-finite gradient since the last one that was not."""


class Saveable(Protocol):
    """What holds tensors: the engine."""

    def save(self, folder: Path) -> None: ...
    def load(self, folder: Path) -> None: ...


class Checkpoints:
    """The checkpoints of one run.

    Args:
        run_dir: the run folder, on a file system that all ranks share.
        keep_last: newest checkpoints kept; the best is kept besides.
        identity: what each checkpoint is written with; `refuse_other_identity` compares it.
        world: ranks; all of them call `save` and `resume`.
    """

    def __init__(self, run_dir: Path, keep_last: int, identity: dict[str, Any], world: World) -> None:
        self.root = run_dir / "checkpoints"
        self.keep_last = keep_last
        self.identity = identity
        self.world = world
        world.on_main(lambda: self._told(self.root, lambda: self.root.mkdir(exist_ok=True)))

    def save(self, engine: Saveable, state: TrainState) -> None:
        """Writes a checkpoint; when this returns, it is whole and `latest` names it.

        Raises:
            UserError: the disk is full or the folder cannot be written; older checkpoints are untouched.
        """
        folder = self._folder(state.step)
        self.world.on_main(lambda: self._told(folder, lambda: _renew(folder)))
        self._told(folder, lambda: engine.save(folder))
        self.world.barrier()
        names = self.world.from_main(_data_files(folder))
        # A file system may report a full disk only when the files are flushed, which this does.
        files = self._told(folder, lambda: self._checksums(folder, names))
        self.world.on_main(lambda: self._told(folder, lambda: self._complete(folder, state, files)))
        logger.info("step %d: saved %s", state.step, folder)

    def update(self, state: TrainState) -> None:
        """Writes a newer state into the checkpoint of its step, where there is one; tensors stay as they are."""
        folder = self._folder(state.step)

        def rewrite() -> None:
            manifest = read_manifest(folder)
            if manifest:
                self._complete(folder, state, manifest["files"])

        self.world.on_main(lambda: self._told(folder, rewrite))

    def resume(self, engine: Saveable) -> TrainState:
        """Loads the newest whole checkpoint into `engine`; a fresh state where none was ever written.

        Raises:
            UserError: a checkpoint is there and none is whole.
        """
        refused = []
        for folder in self.world.from_main(_newest_first(self.root)):
            problems = verify(folder, self.world)
            if problems:
                logger.warning("%s is refused: %s", folder, "; ".join(problems))
                refused.append(folder)
                continue
            manifest = read_manifest(folder)
            engine.load(folder)
            if self.world.is_main:  # a kill before the last move of `latest`, or a refusal, left it wrong
                write_atomically(self.root / "latest", folder.name + "\n")
            logger.info("resumed %s", folder)
            return TrainState(**manifest["state"])
        if refused:
            raise UserError(
                f"{self.root}: no checkpoint there is whole ({', '.join(folder.name for folder in refused)} refused); "
                "restore one, or remove the folder to start from step 0"
            )
        return TrainState()

    def _checksums(self, folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
        mine = {}
        for name in names[self.world.rank :: self.world.size]:
            path = folder / name
            mine[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path, flush=True)}
        return {name: entry for of_rank in self.world.gather(mine) for name, entry in of_rank.items()}

    def _complete(self, folder: Path, state: TrainState, files: dict[str, dict[str, Any]]) -> None:
        body = {"format": FORMAT, "state": asdict(state), "identity": self.identity, "files": files}
        write_atomically(folder / MANIFEST, json.dumps(body | {"sha256": _body_sha256(body)}, indent=1))
        write_atomically(self.root / "latest", folder.name + "\n")
        self._retain(state)

    def _retain(self, state: TrainState) -> None:
        best = self._folder(state.best_step) if state.best_step is not None else None
        present = self._folder(state.step)
        # What is newer than the present step was refused when the run resumed before it.
        refused = [folder for folder in _newest_first(self.root) if folder.name > present.name]
        kept = [folder for folder in _newest_first(self.root) if folder not in refused][: self.keep_last]
        for folder in _newest_first(self.root):
            if folder not in kept and folder != best:
                _discard(folder)

    def _told(self, folder: Path, function: Callable[[], T]) -> T:
        """Runs `function`; what it cannot write becomes a sentence."""
        try:
            return function()
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "inline_container" not in str(error):
                raise  # torch names its archive writer, and no errno, where a file cannot be written
            raise UserError(
                f"{folder}: the checkpoint could not be written ({' '.join(str(error).split())[:200]}); "
                f"the last whole one is {self._newest_name()}; free space there and start the same command again"
            ) from error

    def _folder(self, step: int) -> Path:
        return self.root / f"step_{step:08d}"

    def _newest_name(self) -> str:
        newest = _newest_first(self.root)
        return newest[0].name if newest else "none"


def verify(folder: Path, world: World) -> list[str]:
    """Returns what is wrong with a checkpoint; ranks share the reading, and all get the verdict."""
    manifest = read_manifest(folder)
    if not manifest:
        return [f"{MANIFEST} is damaged"]
    if manifest["format"] != FORMAT:
        return [f"its format is {manifest['format']}, this version reads {FORMAT}"]
    files: dict[str, dict[str, Any]] = manifest["files"]
    problems = []
    for name in sorted(files)[world.rank :: world.size]:
        path, wanted = folder / name, files[name]
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != wanted["bytes"]:
            problems.append(f"{name} has {path.stat().st_size} bytes, expected {wanted['bytes']}")
        elif _sha256(path) != wanted["sha256"]:
            problems.append(f"{name} does not match its checksum")
    return [problem for of_rank in world.gather(problems) for problem in of_rank]


def newest_checkpoint(run_dir: Path) -> Path:
    """Returns the newest whole checkpoint of a run; all its files are verified.

    Raises:
        UserError: the run has none.
    """
    alone = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
    for folder in _newest_first(run_dir / "checkpoints"):
        problems = verify(folder, alone)
        if not problems:
            return folder
        logger.warning("%s is refused: %s", folder, "; ".join(problems))
    raise UserError(
        f"{run_dir}: no whole checkpoint in {run_dir / 'checkpoints'}; expected the folder of a run"
    )


def refuse_other_identity(run_dir: Path, identity: dict[str, Any]) -> None:
    """Compares what the newest checkpoint was written with; called before a run writes anything.

    Args:
        run_dir: the run folder.
        identity: what a checkpoint and the run that resumes it have in common: flat, JSON values.

    Raises:
        UserError: a value differs; its key and both values are named.
    """
    manifests = [read_manifest(folder) for folder in _newest_first(run_dir / "checkpoints")]
    theirs = next((manifest["identity"] for manifest in manifests if manifest), None)
    if theirs is None:
        return
    ours = json.loads(json.dumps(identity))  # as a manifest gives it back: no tuples
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            raise UserError(
                f"{run_dir}: its checkpoints were written with {key}={json.dumps(theirs.get(key))}, this run has "
                f"{json.dumps(ours.get(key))}; restore it, or give the new run a run_dir of its own"
            )


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns a checkpoint's manifest; an empty one where it is not there or does not match its own checksum."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return {}
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != _body_sha256(manifest):
        return {}
    return manifest


def write_atomically(path: Path, text: str) -> None:
    """Writes a file that is seen whole or not at all, and stays after a power cut."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _body_sha256(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _renew(folder: Path) -> None:
    """Makes an empty folder; a save that never ended, or a refused one, gives way."""
    if folder.exists():
        _discard(folder)
    folder.mkdir()


def _discard(folder: Path) -> None:
    (folder / MANIFEST).unlink(
        missing_ok=True
    )  # from here on it is no checkpoint, wherever the deletion stops
    shutil.rmtree(folder)


def _newest_first(root: Path) -> list[Path]:
    return sorted((path.parent for path in root.glob(f"step_*/{MANIFEST}")), reverse=True)


def _data_files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _sha256(path: Path, flush: bool = False) -> str:
    with path.open("rb") as file:
        if flush:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
