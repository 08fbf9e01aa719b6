"""Measurements on disk: one JSON file for each GPU, torch and triton, written anew after each measurement."""

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fd_kernels.benchmarks.roofline import Rates

PASSES = ("forward", "backward", "both")
Key = tuple[str, str, str]
"""Shape, pass, variant."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """Where and of what a measurement is."""

    gpu: str
    driver: str | None
    torch: str
    triton: str
    commit: str | None
    """With `-dirty` where the tree has changes; None outside a git checkout."""
    source: str
    """Digest of the code of `fd_kernels`; a measurement of ours with other code is made again."""
    peer_source: str
    """Digest of what peers run, the benchmarks and the references; the same for a measurement of a peer."""
    time: str
    rates: Rates
    """What the GPU does in a second, measured in the same run."""

    def source_of(self, variant: str) -> str:
        """Digest of the code that a variant runs."""
        return self.source if variant.startswith("ours") else self.peer_source

    @property
    def file_name(self) -> str:
        """Of the measurements on this GPU with these versions."""
        return re.sub(r"[^\w.]+", "_", f"{self.gpu} torch{self.torch} triton{self.triton}") + ".json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One pass of one variant at one shape: a measurement, or the error that stood in its place."""

    shape: str
    pass_name: str
    variant: str
    dtype: str
    environment: Environment
    median_us: float | None = None
    p10_us: float | None = None
    p90_us: float | None = None
    repeats: int = 0
    compile_s: float | None = None
    """Wall time of the first forward and backward pass, compilation in it."""
    peak_mib: float | None = None
    """Most memory allocated during the pass, above what the inputs take."""
    kept_mib: float | None = None
    """Memory held between the passes: the output and what autograd keeps."""
    relative_error: float | None = None
    """The largest of output and gradients, each a norm of differences over a norm; against fp32."""
    error: str | None = None

    @property
    def key(self) -> Key:
        """Shape, pass, variant."""
        return self.shape, self.pass_name, self.variant


@dataclass(slots=True)
class Records:
    """The records of one file."""

    path: Path
    by_key: dict[Key, Record] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Records":
        """Reads a file; one that does not exist holds no records."""
        items: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
        records = cls(path)
        for item in items:
            environment = item.pop("environment")
            rates = Rates(**environment.pop("rates"))
            record = Record(**item, environment=Environment(**environment, rates=rates))
            records.by_key[record.key] = record
        return records

    @classmethod
    def newest(cls, folder: Path) -> "Records | None":
        """The file of a folder with the latest measurement, or None."""
        files = [cls.read(path) for path in sorted(folder.glob("*.json"))]
        return max(files, key=lambda records: records.latest.time) if files else None

    @property
    def latest(self) -> Environment:
        """That of the last measurement."""
        return max((record.environment for record in self.by_key.values()), key=lambda each: each.time)

    def has(self, key: Key, environment: Environment) -> bool:
        """Whether there is a record of the code that the variant now runs."""
        *_, variant = key
        found = self.by_key.get(key)
        return found is not None and found.environment.source_of(variant) == environment.source_of(variant)

    def add(self, record: Record) -> None:
        """Puts a record in the place of an older one, and writes the file: whole, or not at all."""
        self.by_key[record.key] = record
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".draft")
        draft.write_text(json.dumps([asdict(each) for each in self.by_key.values()], indent=1) + "\n")
        os.replace(draft, self.path)


def source_digest(*patterns: str) -> str:
    """Digest of the files of `fd_kernels` that a pattern fits, as "**/*.py"."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in root.glob(pattern)}):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
