"""Files of a store, an object store or a web server: their sizes and versions, and ranges of their bytes.

fsspec knows a store by the beginning of a URL. What is added here: nothing waits longer than `TIMEOUT_S`, what may help
is tried `NUM_TRIES` times, and what fails for good is a sentence that names the file.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import io
import logging
import os
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import IO, Any, NamedTuple

from fd_scale import hub
from fd_scale.errors import UserError

logger = logging.getLogger(__name__)

TIMEOUT_S = 30.0
"""For one answer, which has at most `CHUNK_BYTES` bytes."""
NUM_TRIES = 5
FIRST_PAUSE_S = 1.0
"""Before the second try; doubled before each further one."""
CHUNK_BYTES = 8 * 2**20
_NUM_ASKED_AT_ONCE = 16
_NUM_CHUNKS_AT_ONCE = 4
_URL = re.compile(r"([a-z][a-z0-9]*)://")
_CLIENTS = {
    "http": "aiohttp, pip install aiohttp", "https": "aiohttp, pip install aiohttp",
    "s3": "s3fs, pip install s3fs", "gs": "gcsfs, pip install gcsfs",
}  # fmt: skip
# What stores call that which changes when a file does.
_VERSIONS = (
    "ETag", "etag", "md5Hash", "Content-MD5", "Digest", "Last-Modified", "LastModified", "mtime", "created",
)  # fmt: skip
# Other answers of 400 to 499 say that the question is wrong, and asking again is of no use.
_BUSY = (408, 425, 429)

_counts: collections.Counter[str] = collections.Counter()


class _ForbiddenError(UserError):
    """This may not be read, others perhaps."""


class State(NamedTuple):
    """What tells a file from what it was before."""

    size: int
    version: str


def is_remote(path: str) -> bool:
    """Whether a path is a URL of a store; those of the Hugging Face hub have a cache of their own."""
    return bool(_URL.match(path)) and not path.startswith(hub.PREFIX)


def warn(kind: str, message: str, *arguments: object) -> None:
    """Warns of a fault that a run survives, with their number in this process: of the 1st, 2nd, 4th, 8th, ..."""
    _counts[kind] += 1
    if _counts[kind].bit_count() == 1:
        logger.warning(f"{message} (%s: %d until now)", *arguments, kind, _counts[kind])


def files(pattern: str) -> list[str]:
    """Returns the URLs that a URL with braces and `*` means, sorted; whether one without `*` is there is not asked.

    Raises:
        UserError: a range is empty, a pattern with `*` matches nothing, or the store cannot list.
    """
    found = set()
    for url in hub.expand_braces(pattern):
        matches = [url]
        if "*" in url:
            matches = []
            with contextlib.suppress(FileNotFoundError):
                matches = [_filesystem(url).unstrip_protocol(path) for path in _asked(url, "glob")]
            if not matches:
                raise UserError(
                    f"{url}: matches no file that the store lists; write a range, as {{0000..0099}}"
                )
        found.update(matches)
    return sorted(found)


def state(url: str) -> State | None:
    """Returns size and version of a file; none where there is no such file.

    Raises:
        UserError: the store fails, or does not tell the size.
    """
    try:
        return _state(url, _asked(url, "info"))
    except FileNotFoundError:
        return None


def states(urls: list[str]) -> list[State]:
    """Returns sizes and versions of files: by a list of each folder, or one by one where there are no lists for us.

    Raises:
        UserError: one is not there, or as of `state`.
    """
    found: dict[str, State | None] = dict.fromkeys(urls)
    folders = set() if urls[0].startswith("http") else {os.path.dirname(url) for url in urls}
    alone = [] if folders else urls
    for folder in sorted(folders):
        try:
            for info in _asked(folder, "ls", detail=True):
                url = f"{folder}/{os.path.basename(info['name'])}"
                if url in found and info["type"] == "file":
                    found[url] = _state(url, info)
        except FileNotFoundError:
            continue
        except _ForbiddenError:  # who may not list may read all the same
            alone += [url for url in urls if os.path.dirname(url) == folder]
    with ThreadPoolExecutor(_NUM_ASKED_AT_ONCE) as executor:
        found |= zip(alone, executor.map(state, alone), strict=True)
    missing = [url for url, its in found.items() if its is None]
    if missing:
        raise UserError(
            f"{missing[0]}: is not there, as {len(missing)} of {len(urls)} files; check the address and the range"
        )
    return [its for its in found.values() if its is not None]


def read(url: str, offset: int, size: int) -> bytes:
    """Reads a range of a file, of `CHUNK_BYTES` at a time.

    Raises:
        UserError: the store fails, the file is gone, or ends before.
    """
    chunks = []
    for start in range(offset, offset + size, CHUNK_BYTES):
        end = min(start + CHUNK_BYTES, offset + size)
        try:
            chunks.append(_asked(url, "cat_file", start=start, end=end))
        except FileNotFoundError:
            raise UserError(f"{url}: is not there any more; put it back, or start again without it") from None
    return b"".join(chunks)


def fetch(url: str, size: int, out: IO[bytes]) -> None:
    """Downloads a file, some ranges of it at a time.

    Raises:
        OSError: what came cannot be written.
        UserError: as of `read`.
    """

    def fetched(start: int) -> None:
        chunk = read(url, start, min(CHUNK_BYTES, size - start))
        os.pwrite(out.fileno(), chunk, start)

    with ThreadPoolExecutor(_NUM_CHUNKS_AT_ONCE) as executor:
        for _ in executor.map(fetched, range(0, size, CHUNK_BYTES)):
            pass


def opened(url: str) -> io.BufferedReader:
    """Opens a file for reading from its beginning to its end, ahead of what is asked for.

    Raises:
        UserError: it is not there.
    """
    return io.BufferedReader(_Stream(url, states([url])[0].size), CHUNK_BYTES)


class _Stream(io.RawIOBase):
    def __init__(self, url: str, size: int) -> None:
        self._url, self._size, self._at = url, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = read(self._url, self._at, max(0, min(len(buffer), self._size - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _state(url: str, info: dict[str, Any]) -> State:
    if info.get("size") is None:
        raise UserError(f"{url}: the store does not tell its size; expected one that serves ranges of files")
    version = next((info[key] for key in _VERSIONS if info.get(key)), "")
    # A file alone and in a list may have its time in two forms.
    return State(int(info["size"]), str(version.timestamp() if isinstance(version, datetime) else version))


def _asked(url: str, method: str, **options: Any) -> Any:
    """Calls a method of a store's file system, again where that may help.

    Raises:
        FileNotFoundError: the store says so.
        UserError: it has failed.
    """
    for attempt in range(1, NUM_TRIES + 1):
        try:
            return _asked_once(url, method, **options)
        except Exception as error:  # clients of stores raise what they like, with no common base
            reason: BaseException = error
        # What is no fault of a store: also that this process ends while threads of it read.
        if isinstance(reason, (UserError, RuntimeError)):
            raise reason
        # fsspec makes a missing file of any failure of a web server to tell a size.
        if isinstance(reason, FileNotFoundError) and url.startswith("http"):
            reason = reason.__cause__ or reason
        status = getattr(reason, "status", None) or getattr(reason, "code", None)
        if status == 404 or isinstance(reason, FileNotFoundError):
            raise FileNotFoundError(url)
        if isinstance(reason, PermissionError) or status in (401, 403):
            raise _ForbiddenError(f"{url}: may not be read ({_said(reason)}); check this host's credentials")
        if isinstance(status, int) and 400 <= status < 500 and status not in _BUSY:
            break
        if attempt < NUM_TRIES:
            warn("tries of a store that failed", "%s: %s; is tried again", url, _said(reason))
            # Not all ranks at once.
            time.sleep(FIRST_PAUSE_S * 2 ** (attempt - 1) * random.SystemRandom().uniform(0.5, 1))
    raise UserError(
        f"{url}: cannot be read: {_said(reason)}, tried {attempt} times; check the store and the network, then start "
        "the run again"
    )


def _asked_once(url: str, method: str, **options: Any) -> Any:
    from fsspec.asyn import sync

    filesystem = _filesystem(url)
    path = filesystem._strip_protocol(url)
    if filesystem.async_impl:
        found = sync(filesystem.loop, getattr(filesystem, f"_{method}"), path, timeout=TIMEOUT_S, **options)
    else:
        found = getattr(filesystem, method)(path, **options)
    if method == "cat_file":
        wanted = options["end"] - options["start"]
        if len(found) > wanted:
            raise UserError(
                f"{url}: the store gives whole files, not ranges of them; take one that serves ranges"
            )
        if len(found) < wanted:
            raise EOFError(f"it gave {len(found)} of {wanted} bytes from {options['start']} on")
    return found


def _said(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {TIMEOUT_S:g} s"
    status = getattr(error, "status", None)
    text = str(getattr(error, "message", "") or error).strip().split("\n")[0]
    return f"{type(error).__name__}{f' {status}' if status else ''}: {text}".rstrip(": ")


def _filesystem(url: str) -> Any:
    protocol = url.partition("://")[0]
    return _filesystem_of(protocol, os.getpid())


@functools.cache
def _filesystem_of(protocol: str, pid: int) -> Any:
    """One of this process: a connection does not survive a fork, and threads share it."""
    import fsspec

    options: dict[str, Any] = {"use_listings_cache": False}
    if protocol.startswith("http"):
        # Proxies as other programs have them; and the bytes as they are, since ranges are of those.
        options["client_kwargs"] = {"trust_env": True, "headers": {"Accept-Encoding": "identity"}}
    try:
        return fsspec.filesystem(protocol, **options)
    except ImportError:
        client, _, how = _CLIENTS.get(protocol, f"a client, {protocol}").partition(", ")
        raise UserError(f"{protocol}://: needs {client}, which is not installed; run: {how}") from None
    except ValueError:
        raise UserError(
            f"{protocol}://: no store is known by this name; expected one of {', '.join(_CLIENTS)}"
        ) from None
