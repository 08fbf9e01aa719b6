"""A large JSON file, read one element of its lists at a time."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fd_scale.errors import UserError

_CHUNK_BYTES = 4 * 2**20
_MOST_CHUNKS = 64  # of one element; a file that is no JSON is not read to its end
_SPACE = " \t\n\r"


class JsonLists:
    """The lists of a JSON object such as `{"images": [...], "annotations": [...]}`.

    Args:
        file: which is read once, from its beginning to its end; of its text, a few MiB are held at a time.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.digest = hashlib.blake2b(digest_size=16)
        """Of the bytes that have been read."""
        self._text, self._at = "", 0
        self._passed = 0  # characters before the text that is held
        self._decoder = json.JSONDecoder()

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Yields the name of each list with each of its elements; of what is no list, with its value.

        Raises:
            UserError: the file cannot be read, or is no such JSON.
        """
        try:
            with self.file.open("rb") as opened:
                self._chunks = self._read(opened)
                yield from self._members()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{self.file} cannot be read ({error}); expected annotations in COCO's JSON"
            ) from None

    def _read(self, opened: Any) -> Iterator[str]:
        decode = codecs.getincrementaldecoder("utf-8")()
        while chunk := opened.read(_CHUNK_BYTES):
            self.digest.update(chunk)
            yield decode.decode(chunk)

    def _members(self) -> Iterator[tuple[str, Any]]:
        self._expect("{")
        while self._next() != "}":
            name = self._value()
            if not isinstance(name, str):
                raise self._broken(f"{str(name)[:20]} in place of a name")
            self._expect(":")
            if self._next() != "[":
                yield name, self._value()
            else:
                self._at += 1
                while self._next() != "]":
                    yield name, self._value()
                    self._separator("]")
                self._at += 1
            self._separator("}")
        for _ in self._chunks:  # what follows counts for the digest alone
            pass

    def _more(self) -> bool:
        """Adds a chunk to the text, and lets go of what has been read."""
        chunk = next(self._chunks, None)
        if chunk is None:
            return False
        self._text, self._passed = self._text[self._at :] + chunk, self._passed + self._at
        self._at = 0
        return True

    def _next(self) -> str:
        """The next character that is no space, which is not passed."""
        while True:
            while self._at < len(self._text):
                if (character := self._text[self._at]) not in _SPACE:
                    return character
                self._at += 1
            if not self._more():
                raise self._broken("the file ends")

    def _expect(self, character: str) -> None:
        if (found := self._next()) != character:
            raise self._broken(f"{found!r} in place of {character!r}")
        self._at += 1

    def _separator(self, end: str) -> None:
        if self._next() != end:
            self._expect(",")

    def _value(self) -> Any:
        self._next()
        for _ in range(_MOST_CHUNKS):
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:  # an integer of thousands of digits is a ValueError
                problem = str(error)
            else:
                if end < len(self._text):  # else a number may go on
                    self._at = end
                    return value
                problem = "the file ends"
            if not self._more():
                break
        raise self._broken(problem)

    def _broken(self, problem: str) -> UserError:
        return UserError(
            f"{self.file}: no JSON at character {self._passed + self._at} ({problem}); download it again, or write it "
            'as {"images": [...], "annotations": [...], "categories": [...]}'
        )
