"""A copy of the code beside the run: a job that waits for days runs what was submitted, whatever changes meanwhile."""

from __future__ import annotations

import os
import shutil
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

_PACKAGES = ("fd_scale", "fd_kernels", "fd_ds_configs", "fd_slurm")


def scripts() -> Path:
    """Returns the folder of the batch scripts: `slurm/` of a checkout, or as it was installed."""
    return _folder("fd_slurm")


def commit() -> str | None:
    """Returns the commit of this code, with `+changes` where it has any; none where nothing says so.

    A copy that `pin` made says it in a file, since git would answer for whatever repository the copy lies in.
    """
    root = _folder("fd_scale")
    if (root.parent / "COMMIT").is_file():
        return (root.parent / "COMMIT").read_text(encoding="utf-8").strip()
    try:
        head = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if changed else "")


def origin() -> str:
    """Returns the commit of this code, or the release that was installed."""
    return commit() or f"release {version('fd-scale')}"


def place(run_dir: Path) -> Path:
    """Returns where the next copy goes: `RUN/submitted/TIME`, since an earlier job may still wait for its own."""
    name = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    folder = run_dir.absolute() / "submitted"
    names = (name, *(f"{name}-{number}" for number in range(2, 1000)))
    return next(folder / name for name in names if not (folder / name).exists())


def pin(target: Path) -> None:
    """Copies the packages as they are imported here, and the batch scripts, into a new folder."""
    ignored = shutil.ignore_patterns("__pycache__", "cluster.env")
    for package in _PACKAGES:
        shutil.copytree(_folder(package), target / package, ignore=ignored)
    (target / "COMMIT").write_text(f"{origin()}\n", encoding="utf-8")


def _folder(package: str) -> Path:
    """Where a package lies; it is not imported, since `fd_kernels` would bring torch."""
    spec = find_spec(package)
    assert spec is not None, package
    assert spec.origin is not None, package
    return Path(spec.origin).parent


def _git(folder: Path, *command: str) -> str:
    done = subprocess.run(
        ["git", *command], cwd=folder, env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    return done.stdout.strip()
