"""What an evaluation has found so far, in a file: a second one of the same goes on there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fd_scale.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """A file of lines: what is evaluated, then a JSON object for each entry, in the order of their addition."""

    file: Path
    of: str
    """What is evaluated, and how; a file of something else is not read, and is replaced."""
    every: int = 100
    """Rounds, an image a rank each, from one writing to the next."""

    def read(self) -> list[dict[str, Any]]:
        """Returns all entries but one that was cut when the process was killed."""
        if not self._is_of_this():
            return []
        entries = []
        with self.file.open(encoding="utf-8") as lines:
            next(lines)
            for line in lines:
                try:
                    entries.append(json.loads(line))
                except ValueError:
                    continue
        return entries

    def add(self, entries: Iterable[dict[str, Any]]) -> None:
        """Adds entries to the file.

        Raises:
            UserError: it cannot be written.
        """
        try:
            with self.file.open("a" if self._is_of_this() else "w", encoding="utf-8") as file:
                if not file.tell():
                    file.write(self._first_line())
                # Each begins a line of its own, whatever end the one before had.
                file.writelines(f"\n{json.dumps(entry)}" for entry in entries)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"{self.file} cannot be written ({error.strerror}); make room for it") from None

    def _first_line(self) -> str:
        return json.dumps({"of": self.of})

    def _is_of_this(self) -> bool:
        try:
            with self.file.open(encoding="utf-8") as lines:
                return lines.readline().rstrip("\n") == self._first_line()
        except (OSError, UnicodeDecodeError):
            return False
