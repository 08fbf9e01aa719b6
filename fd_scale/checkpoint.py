"""Checkpoints: whole or not used.

    RUN/checkpoints/step_00001000/   what DeepSpeed would write, and manifest.json, written last
    RUN/checkpoints/latest           name of the newest whole checkpoint (for people and scripts)

Training waits for a copy to host memory; a thread writes it, and once the threads of all ranks are done, the ranks
make the checkpoint whole between two steps. A folder without a manifest is a save that never ended and is ignored;
one whose files do not match its manifest is refused by name, and the next older one is used. On the disk are at most
`keep_last` checkpoints, the best, and the one being written.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fd_scale.config import default_settings
from fd_scale.distributed import ALONE, World
from fd_scale.errors import UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")

FORMAT = 2
"""Version of the layout, of the sample order and of the random streams behind it."""

MANIFEST = "manifest.json"
# Of an identity's values, those that a setting of another name decides.
_SETTINGS = {"zero_stage": "ZeRO stage (train.ds_config)", "data_fingerprint": "images (data.train)"}


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
    bad_in_a_row: int = 0
    """Steps with a spike or a skipped gradient since the last good one."""
    recent_losses: list[float] = field(default_factory=list)
    """Those by which the next ones are judged."""
    rollbacks: int = 0
    """Times that the run went back to a checkpoint and took other samples from there."""


class Saveable(Protocol):
    """What holds tensors: the engine."""

    def snapshot(self, folder: Path) -> dict[str, Any]:
        """Copies this rank's part to host memory: file name in `folder` -> what `torch.save` writes there."""

    def load(self, folder: Path) -> None:
        """Reads what snapshots of all ranks of a run hold."""


@dataclass(frozen=True, slots=True)
class _Written:
    """What a rank has on the disk."""

    files: dict[str, dict[str, Any]]
    write_s: float
    checksum_s: float
    disk_mb_per_s: float


@dataclass(frozen=True, slots=True)
class _Pending:
    """A checkpoint in writing."""

    folder: Path
    state: TrainState
    stall_s: float
    written: Future[_Written]


class Checkpoints:
    """The checkpoints of one run.

    Args:
        run_dir: the run folder, on a file system that all ranks share.
        keep_last: newest checkpoints kept; the best is kept besides.
        identity: what each checkpoint is written with; `refuse_other_identity` compares it.
        world: ranks; all of them call `save`, `complete` and `resume`.
    """

    def __init__(self, run_dir: Path, keep_last: int, identity: dict[str, Any], world: World) -> None:
        self.root = run_dir / "checkpoints"
        self.keep_last = keep_last
        self.identity = identity
        self.world = world
        self.pending: _Pending | None = None
        self.disk_mb_per_s = 0.0
        self.writer = ThreadPoolExecutor(1, "checkpoint")
        world.on_main(lambda: self._told(self.root, lambda: self.root.mkdir(exist_ok=True)))

    def save(self, engine: Saveable, state: TrainState) -> None:
        """Copies a checkpoint to host memory and begins to write it; `complete` makes it whole.

        Raises:
            UserError: the folder cannot be written; older checkpoints are untouched.
        """
        assert self.pending is None, "a checkpoint is in writing: complete it first"
        start = time.perf_counter()
        folder = self._folder(state.step)
        self.world.on_main(lambda: self._told(folder, lambda: _renew(folder)))
        objects = self._told(folder, lambda: engine.snapshot(folder))
        stall_s = time.perf_counter() - start
        probes = self.world.is_main and not self.disk_mb_per_s
        written = self.writer.submit(self._told, folder, lambda: _write(folder, objects, probes))
        self.pending = _Pending(folder, replace(state), stall_s, written)

    @property
    def written(self) -> bool:
        """Whether this rank has written its part of a checkpoint that is not whole yet."""
        return self.pending is not None and self.pending.written.done()

    def complete(self, alive: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Waits until all ranks have written the checkpoint in hand and makes it whole; all ranks call it.

        Args:
            alive: called while its files grow.

        Returns:
            Its step and what it took, the slowest rank's: `stall_s` of training, `write_s` until the files
            were on the disk, `checksum_s`, `bytes` and `write_mb_per_s` of all ranks together, beside them
            `disk_mb_per_s` of one plain file, measured once. Empty where no checkpoint is in hand.

        Raises:
            UserError: a rank could not write, as on a full disk; older checkpoints are untouched.
        """
        if self.pending is None:
            return {}
        pending, self.pending = self.pending, None
        mine: _Written | str
        try:
            mine = _wait(pending, alive)
        except UserError as error:
            mine = str(error)
        parts = self.world.gather(mine)
        problem = next((part for part in parts if isinstance(part, str)), None)
        if problem is not None:
            self.world.on_main(lambda: shutil.rmtree(pending.folder, ignore_errors=True))
            raise UserError(problem)
        files = {name: entry for part in parts for name, entry in part.files.items()}
        self.world.on_main(
            lambda: self._told(pending.folder, lambda: self._complete(pending.folder, pending.state, files))
        )
        write_s = max(part.write_s for part in parts)
        num_bytes = sum(entry["bytes"] for entry in files.values())
        self.disk_mb_per_s = self.disk_mb_per_s or parts[0].disk_mb_per_s
        took = {
            "step": pending.state.step,
            "stall_s": max(self.world.gather(pending.stall_s)),
            "write_s": write_s,
            "checksum_s": max(part.checksum_s for part in parts),
            "bytes": num_bytes,
            "write_mb_per_s": num_bytes / 1e6 / write_s,
            "disk_mb_per_s": self.disk_mb_per_s,
        }
        logger.info(
            "step %d: saved %s; training waited %.2f s; %.1f MB written in %.2f s, %.0f MB/s (a plain file: %.0f MB/s)",
            pending.state.step, pending.folder, took["stall_s"], num_bytes / 1e6, write_s, took["write_mb_per_s"],
            took["disk_mb_per_s"],
        )  # fmt: skip
        return took

    def update(self, state: TrainState) -> bool:
        """Writes a newer state into the checkpoint of its step, whose tensors stay; returns whether there is one."""
        folder = self._folder(state.step)

        def rewrite() -> bool:
            manifest = read_manifest(folder)
            if manifest:
                self._complete(folder, state, manifest["files"])
            return bool(manifest)

        return self.world.on_main(lambda: self._told(folder, rewrite))

    def resume(
        self, engine: Saveable, accepts: Callable[[TrainState], bool] = lambda state: True
    ) -> TrainState:
        """Loads the newest whole checkpoint into `engine`; a fresh state where none was ever written.

        Args:
            engine: reads it.
            accepts: whether a state is one to go on from; others are passed over.

        Raises:
            UserError: a checkpoint is there and none is whole.
        """
        refused: list[Path] = []
        passed_over: list[Path] = []
        for folder in self.world.from_main(_newest_first(self.root)):
            problems = verify(folder, self.world)
            if problems:
                logger.warning("%s is refused: %s", folder, "; ".join(problems))
                refused.append(folder)
                continue
            state = TrainState(**read_manifest(folder)["state"])
            if not accepts(state):
                passed_over.append(folder)
                continue
            engine.load(folder)
            self._adopt(folder, state, refused + passed_over)
            logger.info("resumed %s", folder)
            return state
        if refused:
            raise UserError(
                f"{self.root}: no checkpoint there is whole ({', '.join(folder.name for folder in refused)} refused); "
                "restore one, or remove the folder to start from step 0"
            )
        return TrainState()

    def _adopt(self, folder: Path, state: TrainState, others: list[Path]) -> None:
        """Makes a checkpoint the newest: the others must not be taken for one when their step comes.

        What is more than `keep_last` goes now: on a full disk, for which it was lowered, the next one has no room else.
        """

        def move() -> None:
            for other in others:
                (other / MANIFEST).unlink(missing_ok=True)
            # A kill before the last move of `latest`, or a refusal, left it wrong.
            write_atomically(self.root / "latest", folder.name + "\n")
            self._retain(state)

        self.world.on_main(lambda: self._told(folder, move))

    def _complete(self, folder: Path, state: TrainState, files: dict[str, dict[str, Any]]) -> None:
        body = {"format": FORMAT, "state": asdict(state), "identity": self.identity, "files": files}
        write_atomically(folder / MANIFEST, json.dumps(body | {"sha256": _body_sha256(body)}, indent=1))
        write_atomically(self.root / "latest", folder.name + "\n")
        self._retain(state)

    def _retain(self, state: TrainState) -> None:
        best = self._folder(state.best_step) if state.best_step is not None else None
        present = self._folder(state.step)
        folders = _newest_first(self.root)
        # What is newer than the present step was refused when the run resumed before it.
        kept = [folder for folder in folders if folder.name <= present.name][: self.keep_last]
        for folder in folders:
            if folder not in kept and folder != best:
                _discard(folder)

    def _told(self, folder: Path, function: Callable[[], T]) -> T:
        """Runs `function`; what it cannot write becomes a sentence."""
        try:
            return function()
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "inline_container" not in str(error):
                raise  # torch names its archive writer, and no errno, where a file cannot be written
            reason = "as on a full disk: " if isinstance(error, RuntimeError) else ""
            raise UserError(
                f"{folder}: the checkpoint could not be written ({reason}{' '.join(str(error).split())[:200]}); "
                f"the last whole one is {self._newest_name()}; free space there and start the same command again"
            ) from error

    def _folder(self, step: int) -> Path:
        return self.root / f"step_{step:08d}"

    def _newest_name(self) -> str:
        newest = _newest_first(self.root)
        return newest[0].name if newest else "none"


def _wait(pending: _Pending, alive: Callable[[], None]) -> _Written:
    size = -1
    while True:
        wait([pending.written], timeout=1.0)
        if pending.written.done():
            return pending.written.result()
        now = sum(path.stat().st_size for path in pending.folder.iterdir())
        if now != size:
            size = now
            alive()


def verify(folder: Path, world: World, *, contents: bool = True) -> list[str]:
    """Returns what is wrong with a checkpoint; ranks share the reading, and all get the verdict.

    Args:
        folder: the checkpoint.
        world: ranks, which all call it.
        contents: whether checksums are compared too, not names and sizes alone.
    """
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
        elif contents and _sha256(path) != wanted["sha256"]:
            problems.append(f"{name} does not match its checksum")
    return [problem for of_rank in world.gather(problems) for problem in of_rank]


def newest_checkpoint(run_dir: Path, *, contents: bool = True) -> Path:
    """Returns the newest whole checkpoint of a run; its files are verified, as `verify` does.

    Raises:
        UserError: the run has none.
    """
    for folder in _newest_first(run_dir / "checkpoints"):
        problems = verify(folder, ALONE, contents=contents)
        if not problems:
            return folder
        logger.warning("%s is refused: %s", folder, "; ".join(problems))
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} does not exist; expected the folder of a run")
    raise UserError(
        f"{run_dir}: no whole checkpoint in {run_dir / 'checkpoints'}; expected the folder of a run"
    )


def refuse_other_identity(run_dir: Path, identity: dict[str, Any]) -> None:
    """Compares what the newest checkpoint was written with; called before a run writes anything.

    Args:
        run_dir: the run folder.
        identity: what a checkpoint and the run that resumes it have in common: flat, JSON values.

    Raises:
        UserError: values differ; their keys and both values are named.
    """
    manifests = [read_manifest(folder) for folder in _newest_first(run_dir / "checkpoints")]
    theirs = next((manifest["identity"] for manifest in manifests if manifest), None)
    if theirs is None:
        return
    ours = json.loads(json.dumps(identity))  # as a manifest gives it back: no tuples
    # A setting that there was not yet when it was written had the effect of its default.
    new = {key: value for key, value in default_settings().items() if key in ours.keys() - theirs.keys()}
    theirs |= json.loads(json.dumps(new, default=lambda _: None))
    # Version 0.1.0 wrote world_size into every checkpoint.
    other = [
        f"{_SETTINGS.get(key, key)}={shown(theirs.get(key))}, this run has {shown(ours.get(key))}"
        for key in sorted(ours.keys() | (theirs.keys() - {"world_size"}))
        if ours.get(key) != theirs.get(key)
    ]
    if other:
        more = f" (and {len(other) - 5} more)" if len(other) > 5 else ""
        raise UserError(
            f"{run_dir}: its checkpoints were written with {'; with '.join(other[:5])}{more}; restore "
            f"{'it' if len(other) == 1 else 'them'}, or give the new run a run_dir of its own"
        )


def shown(value: Any) -> str:
    """A value of JSON in a message: a hash by its first digits."""
    text = json.dumps(value)
    return f"{text[1:9]}..." if re.fullmatch('"[0-9a-f]{32,}"', text) else text


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns a checkpoint's manifest; an empty one where it is not there or does not match its own checksum."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return {}
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != _body_sha256(manifest):
        return {}
    return manifest


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file, of text as UTF-8, that is seen whole or not at all, and stays after a power cut."""
    # File systems take names of 255 bytes, and an image may have one.
    temporary = path.with_name(os.fsdecode(os.fsencode(path.name)[-251:]) + ".tmp")
    with temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
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
    """Makes an empty folder; saves that never ended, and a refused one, give way."""
    for other in folder.parent.glob("step_*"):
        if other == folder or not (other / MANIFEST).exists():
            _discard(other)
    folder.mkdir()


def _write(folder: Path, objects: dict[str, Any], probes: bool) -> _Written:
    """Writes a rank's files, in a thread of its own; `probes`: measures first what the disk can do."""
    disk_mb_per_s = _disk_mb_per_s(folder, objects) if probes else 0.0
    start = time.perf_counter()
    for name, value in objects.items():
        with (folder / name).open("wb") as file:
            torch.save(value, file)
            # A file system may report a full disk only when the files are flushed.
            file.flush()
            os.fsync(file.fileno())
    write_s = time.perf_counter() - start
    files = {}
    for name in objects:
        files[name] = {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
    return _Written(files, write_s, time.perf_counter() - start - write_s, disk_mb_per_s)


def _disk_mb_per_s(folder: Path, objects: dict[str, Any]) -> float:
    """Rate at which one plain file reaches the disk; no larger than `objects`, for which there must be room."""
    sizes = [leaf.nbytes for leaf in tree_leaves(objects) if isinstance(leaf, Tensor)]
    content, file = os.urandom(min(sum(sizes), 2**26)), folder / "write_rate.tmp"
    start = time.perf_counter()
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    seconds = time.perf_counter() - start
    file.unlink()
    return len(content) / 1e6 / seconds


def _discard(folder: Path) -> None:
    # From here on it is no checkpoint, wherever the deletion stops.
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _newest_first(root: Path) -> list[Path]:
    return sorted((path.parent for path in root.glob(f"step_*/{MANIFEST}")), reverse=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
