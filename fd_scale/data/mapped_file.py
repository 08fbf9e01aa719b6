"""What takes long to find out, written once into the user's cache and mapped into memory by all ranks and workers.

    MAGIC | what the owner writes | columns | header, JSON | its length, 8 bytes | MAGIC

The last MAGIC is written last, so that a file without it is one whose writing ended early.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
import numpy.typing as npt

from fd_scale.data.base import content_hash
from fd_scale.errors import UserError

logger = logging.getLogger(__name__)

_TEMPORARY = ".fd-scale.tmp"
"""Ends the name of what is being written: others may have a *.tmp in the same folder."""
_LEFT_S = 3600
"""A temporary file without a change for so long is of a process that was killed: nothing is written so slowly."""
Columns = dict[str, npt.NDArray[Any] | Sequence[npt.NDArray[Any]]]
"""Arrays by their names; one that would be large is given as the parts it is made of, one behind the other."""
Fill = Callable[[IO[bytes]], tuple[Columns, dict[str, Any]]]
"""Writes what is no column, and returns the columns and the header's facts."""


class MappedFile:
    """What such a file holds; a copy for a worker maps the file itself.

    Args:
        file: written by `create`; or, where there is no place for it, what `write` wrote, in memory.

    Raises:
        UserError: it is not whole.
    """

    MAGIC: ClassVar[bytes]
    """8 bytes, of the kind and its version."""
    CONTENT: ClassVar[str]
    """What it is an index of."""
    ORIGIN: ClassVar[str]
    """What it is made from."""

    def __init__(self, file: Path | bytes) -> None:
        self.file = file
        self._open()

    def __getstate__(self) -> dict[str, Any]:
        return {"file": self.file}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.file = state["file"]
        self._open()

    def _open(self) -> None:
        try:
            self.bytes: npt.NDArray[np.uint8] = (
                np.memmap(self.file, dtype=np.uint8, mode="r").view(np.ndarray)
                if isinstance(self.file, Path)
                else np.frombuffer(self.file, dtype=np.uint8)
            )
            size = int.from_bytes(self.bytes[-16:-8].tobytes(), "little")
            whole = self.bytes[:8].tobytes() == self.bytes[-8:].tobytes() == self.MAGIC
            self.header: dict[str, Any] = json.loads(self.bytes[-16 - size : -16].tobytes()) if whole else {}
            if self.header.get("at") != len(self.bytes) - size - 16:
                raise UserError(
                    f"{self.file!s}: this index of {self.CONTENT} is not whole; remove it, it is made again from "
                    f"{self.ORIGIN}"
                )
            self.columns: dict[str, npt.NDArray[Any]] = {
                name: np.frombuffer(
                    self.bytes, dtype=dtype, count=int(np.prod(shape)), offset=offset
                ).reshape(shape)
                for name, (dtype, shape, offset) in self.header["columns"].items()
            }
        except UserError:
            raise
        except (OSError, ValueError) as error:
            raise UserError(f"{self.file!s}: no index of {self.CONTENT} ({error}); remove it") from None

    @classmethod
    def write(cls, out: IO[bytes], fill: Fill) -> None:
        """Writes all of a file, from its beginning."""
        out.write(cls.MAGIC)
        columns, facts = fill(out)
        places = {name: _write_column(out, column) for name, column in columns.items()}
        header = json.dumps({"columns": places, "at": out.tell(), **facts}).encode()
        out.write(header + len(header).to_bytes(8, "little") + cls.MAGIC)

    @classmethod
    def create(cls, target: Path, fill: Fill) -> None:
        """Writes a file that is there whole, or not at all.

        Raises:
            OSError: it cannot be written.
        """
        with written_whole(target) as out:
            cls.write(out, fill)


def _write_column(out: IO[bytes], column: npt.NDArray[Any] | Sequence[npt.NDArray[Any]]) -> Any:
    """Writes an array and returns where it is: dtype, shape and offset."""
    parts = [column] if isinstance(column, np.ndarray) else column
    out.write(bytes(-out.tell() % 8))
    offset = out.tell()
    for part in parts:
        out.write(np.ascontiguousarray(part).tobytes())
    shape = [sum(len(part) for part in parts), *parts[0].shape[1:]]
    return parts[0].dtype.str, shape, offset


def cache_folder() -> Path:
    """Returns the user's cache: `$XDG_CACHE_HOME/fd-scale` (`~/.cache/fd-scale`)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fd-scale"


def cache_file(stem: str, identity: Sequence[str]) -> Path:
    """Returns where a file lies that is made from what has an identity: in the user's cache."""
    return cache_folder() / f"{stem}-{content_hash(identity)[:16]}.index"


@contextlib.contextmanager
def written_whole(target: Path) -> Iterator[IO[bytes]]:
    """Gives a file to write, which becomes the target when all is well, and is gone when not.

    What processes that were killed have left in its folder goes, too.

    Raises:
        OSError: it cannot be written.
    """
    with tempfile.NamedTemporaryFile(
        dir=target.parent, prefix=target.stem, suffix=_TEMPORARY, buffering=2**20, delete=False
    ) as out:
        try:
            _remove_left(target.parent, os.fstat(out.fileno()).st_mtime)
            yield out.file
            out.flush()
            os.fchmod(out.fileno(), 0o644)  # it may be for others, too
            os.fsync(out.fileno())
            os.replace(out.name, target)
        except BaseException:
            Path(out.name).unlink(missing_ok=True)
            raise


def _remove_left(folder: Path, now: float) -> None:
    """Removes old temporary files; `now` is the time of a new one, since a file server has a clock of its own."""
    for file in folder.glob(f"*{_TEMPORARY}"):
        with contextlib.suppress(OSError):  # somebody else's, or removed by another
            if now - file.stat().st_mtime > _LEFT_S:
                file.unlink()


def make_once(file: Path, make: Callable[[], None]) -> None:
    """Makes a file that is not there; others who want it wait for the one that makes it.

    Raises:
        OSError: it cannot be written.
    """
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with locked(file.with_suffix(".lock")):
        if not file.exists():  # whoever had the lock before may have made it
            make()


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Keeps others waiting; where a file system has no locks, each makes its own and the last one stays."""
    with file.open("w") as opened:
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("%s: waits for the process that has it", file)
                fcntl.flock(opened, fcntl.LOCK_EX)
        yield


def unwritable(file: Path, error: OSError) -> UserError:
    """Returns the sentence for a cache without room or permission."""
    return UserError(
        f"{file} cannot be written ({error.strerror}); make room, or set XDG_CACHE_HOME to a folder that can"
    )
