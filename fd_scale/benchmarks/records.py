"""Measurements on disk: one JSON file for each GPU and set of versions, written anew after each measurement."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fd_scale.checkpoint import write_atomically
from fd_scale.errors import UserError
from fd_scale.run_folder import environment


def write_json(file: str | None, found: Any) -> None:
    """Writes measurements where a user wants them; none: nowhere.

    Raises:
        UserError: they cannot be written there.
    """
    if file is None:
        return
    try:
        write_atomically(Path(file), json.dumps(found, indent=1))
    except OSError as error:
        raise UserError(
            f"--json {file}: cannot be written ({error.strerror}); the table above has it"
        ) from None


_PACKAGES = ("torch", "triton", "deepspeed", "timm")


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """Where and of what a measurement is."""

    gpu: str
    versions: dict[str, str | None]
    """Of torch, triton, deepspeed and timm."""
    commit: str | None
    """With `+changes` where the tree has any; none outside a checkout."""
    source: str
    """Digest of the code of `fd_scale` and `fd_kernels`; a measurement of another code is made again."""
    time: str

    @classmethod
    def here(cls) -> Environment:
        """That of this process."""
        found = environment()
        return cls(
            gpu=next(iter(found["gpus"]), "cpu"),
            versions={name: found["versions"][name] for name in _PACKAGES},
            commit=found["commit"],
            source=source_digest(),
            time=found["time"],
        )

    @property
    def file_name(self) -> str:
        """Of the measurements on this GPU with these versions."""
        versions = (f"{name}{version}" for name, version in self.versions.items() if version)
        return re.sub(r"[^\w.]+", "_", " ".join((self.gpu, *versions))) + ".json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """A cell's measurement, or the error that stood in its place."""

    cell: str
    recipe: str
    settings: list[str]
    """Of the recipe."""
    environment: Environment
    micro_batch: int
    num_steps: int = 0
    median_ms: float | None = None
    """Wall time of a step, the device waited for before and after it."""
    p10_ms: float | None = None
    p90_ms: float | None = None
    images_per_s: float | None = None
    mfu: float | None = None
    """As `fd_scale.hardware.mfu`; none where the GPU's peak is not known. A peer's: with our count of FLOPs."""
    peak_gib: float | None = None
    """Most that torch had allocated on the GPU in the measured steps."""
    reserved_gib: float | None = None
    """Most that torch had taken from the driver."""
    plan_gib: float | None = None
    """What `fd-scale plan` predicts for `peak_gib`; none for a peer."""
    num_ranks: int = 1
    sent_bytes: float | None = None
    """Bytes that rank 0 sent a step, taken as rings; a peer's are not counted."""
    phases_s: dict[str, float] = field(default_factory=dict)
    """Seconds of a step in each phase, the mean; a peer's are not taken."""
    build_s: float | None = None
    """From the recipe to a model and its optimizer on the device."""
    first_step_s: float | None = None
    """Compilation in it."""
    error: str | None = None

    @property
    def plan_off_by(self) -> float | None:
        """How much more the plan says than was measured, as a share."""
        if self.plan_gib is None or self.peak_gib is None:
            return None
        return self.plan_gib / self.peak_gib - 1


@dataclass(slots=True)
class Records:
    """The records of one file."""

    path: Path
    by_cell: dict[str, Record] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Records:
        """Reads a file; one that does not exist holds no records.

        Raises:
            UserError: it is not such a file.
        """
        try:
            items: list[dict[str, Any]] = (
                json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
            )
            found = [Record(**item | {"environment": Environment(**item["environment"])}) for item in items]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path} is no file of `bench giant` or `bench scale` ({error}); name another folder with --out"
            ) from None
        return cls(path, {record.cell: record for record in found})

    @classmethod
    def newest(cls, folder: Path) -> Records | None:
        """The file of a folder with the latest measurement; none where there is none."""
        files = [records for path in sorted(folder.glob("*.json")) if (records := cls.read(path)).by_cell]
        return max(files, key=lambda records: records.latest.time, default=None)

    @property
    def latest(self) -> Environment:
        """That of the last measurement."""
        return max((record.environment for record in self.by_cell.values()), key=lambda each: each.time)

    def has(self, cell: str, source: str) -> bool:
        """Whether there is a record of this code."""
        return cell in self.by_cell and self.by_cell[cell].environment.source == source

    def add(self, record: Record) -> None:
        """Puts a record in the place of an older one, and writes the file: whole, or not at all."""
        self.by_cell[record.cell] = record
        self.path.parent.mkdir(parents=True, exist_ok=True)
        items = [asdict(each) for each in self.by_cell.values()]
        write_atomically(self.path, json.dumps(items, indent=1) + "\n")


def source_digest() -> str:
    """Digest of the Python files of `fd_scale` and `fd_kernels`."""
    digest = hashlib.sha256()
    for package in ("fd_scale", "fd_kernels"):
        spec = find_spec(package)
        assert spec is not None, package
        assert spec.origin is not None, package
        root = Path(spec.origin).parent
        for path in sorted(root.rglob("*.py")):
            name = f"{package}/{path.relative_to(root).as_posix()}"
            digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
