"""Bytes of shards that lie in a store: whole shards from a bounded cache on this node's disk, or one image a request.

Whole shards are kept where all of them fit, with those of a list's other sources, or where the order reads few at a
time (`data.shard_window`) and those fit.
A random order over more than the cache holds would throw shards out before they are used up: each image is then a
request of its own.

All processes of a node share the cache: one downloads a shard, the others wait for it. It lies in `$FD_SHARD_CACHE`
(else with the indexes, in the user's cache) and holds `$FD_SHARD_CACHE_GIB` at most: unless that is set, 100 GiB or
half of what the disk has left for it, whichever is less.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fd_scale.data import store
from fd_scale.data.mapped_file import cache_folder, locked, make_once, written_whole
from fd_scale.data.tar_index import TarIndex, identity_of
from fd_scale.errors import UserError

logger = logging.getLogger(__name__)

DEFAULT_MAX_BYTES = 100 * 2**30
Range = tuple[int, int, int]
"""Number of a shard, where in it, and how many bytes."""
# By a worker; each is a connection.
_NUM_READ_AT_ONCE = 16
# By all processes of a node: at a cold start each of them wants shards of its own, and all would wait for all.
_NUM_FETCHED_AT_ONCE = 8
# A cache that failed is left alone for so long, and a shard's version is believed.
_FAILED_S = 600.0
_BELIEVED_S = 600.0
# Writing down each use of a shard would be a write an image.
_USED_S = 60.0


class ShardCache:
    """Files of stores on this node's disk; those that were not used for longest go when there is no room.

    No file stays open, so that what goes is gone.

    Args:
        folder: where they lie; others may not put files there.
        max_bytes: of all of them.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self._failed_at = float("-inf")

    def read(self, url: str, identity: str, num_bytes: int, offset: int, size: int) -> bytes | None:
        """Reads from a file, which is fetched if it is not here; none if it cannot be kept.

        Args:
            url: of the file.
            identity: as `identity_of` has it.
            num_bytes: of the file.
            offset: where to begin.
            size: how many bytes.

        Raises:
            UserError: the store fails, or has another file than that.
        """
        file = self.folder / f"{identity}.tar"
        data = _read(file, offset, size)
        if data is None and time.monotonic() - self._failed_at > _FAILED_S:
            try:
                make_once(file, lambda: self._fetch(url, identity, num_bytes, file))
            except OSError as error:
                self._failed_at = time.monotonic()
                store.warn(
                    "shards that could not be kept",
                    "%s: no room for %s (%s), its images are read one by one; make room, or set FD_SHARD_CACHE and "
                    "FD_SHARD_CACHE_GIB",
                    self.folder, url, error.strerror,
                )  # fmt: skip
            data = _read(file, offset, size)
        return data

    def _fetch(self, url: str, identity: str, num_bytes: int, file: Path) -> None:
        """Downloads under another name, which has its room in the cache from the beginning."""
        turn = int(identity, 16) % _NUM_FETCHED_AT_ONCE
        with locked(self.folder / f"turn_{turn}.lock"), written_whole(file) as out:
            with locked(self.folder / "room.lock"):
                self._make_room(num_bytes)
                os.posix_fallocate(out.fileno(), 0, num_bytes)
            store.fetch(url, num_bytes, out)
            refuse_changed(url, identity)

    def _make_room(self, num_bytes: int) -> None:
        files = _held(self.folder)
        used = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if used + num_bytes <= self.max_bytes:
                break
            for name in (path, path.with_suffix(".lock")):
                name.unlink(missing_ok=True)
            used -= size


def _held(folder: Path) -> list[tuple[float, int, Path]]:
    """When each file of a cache was last used, its bytes, and where it is; also of those that are on their way."""
    found = []
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if file.suffix in (".tar", ".tmp"):
                found.append((file.stat().st_mtime, file.stat().st_size, file))
    return found


def _read(file: Path, offset: int, size: int) -> bytes | None:
    try:
        with open(file, "rb", buffering=0) as opened:
            if time.time() - os.fstat(opened.fileno()).st_mtime > _USED_S:
                with contextlib.suppress(OSError):  # somebody else's
                    os.utime(opened.fileno())
            data = os.pread(opened.fileno(), size, offset)
    except OSError:
        return None
    return data if len(data) == size else None


class RemoteShards:
    """Reads images of shards in a store.

    Args:
        urls: the shards.
        index: what is in them, and which versions of them that was true of.
    """

    def __init__(self, urls: list[str], index: TarIndex) -> None:
        self.urls, self.index = urls, index
        self.cache = _cache()
        self.whole = int(index.num_bytes_S.sum()) <= self.cache.max_bytes
        self._begin()

    def _begin(self) -> None:
        self._seen_at: dict[int, float] = {}
        self._executor: ThreadPoolExecutor | None = None
        self._expected: dict[Range, Future[bytes]] = {}
        self._coming: Future[bytes] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what each process does for itself."""
        return {"urls": self.urls, "index": self.index, "cache": self.cache, "whole": self.whole}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._begin()

    def expect(self, ranges: Iterable[Range], coming: Range | None) -> None:
        """Begins to read what will be asked for next, and forgets what was expected before.

        A store takes long to answer, but many answers do not take longer. Where whole shards are kept, one that is read
        from after that is fetched meanwhile.
        """
        self._forget()
        if self._executor is None:
            self._executor = ThreadPoolExecutor(_NUM_READ_AT_ONCE)
        self._expected = {each: self._executor.submit(self._read, *each) for each in dict.fromkeys(ranges)}
        if self.whole and coming is not None and (self._coming is None or self._coming.done()):
            self._coming = self._executor.submit(self._read, *coming)

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Returns bytes of a shard.

        Raises:
            UserError: the store fails, or the shard has changed.
        """
        expected = self._expected.pop((shard, offset, size), None)
        if expected is None:
            return self._read(shard, offset, size)
        try:
            return expected.result()
        except UserError:
            self._forget()  # else the process would wait for all of them before it ends
            raise

    def _forget(self) -> None:
        for future in self._expected.values():
            future.cancel()
        self._expected = {}

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        url, identity = self.urls[shard], self.index.identities_S[shard].decode()
        if self.whole:
            num_bytes = int(self.index.num_bytes_S[shard])
            data = self.cache.read(url, identity, num_bytes, offset, size)
            if data is not None:
                return data
        if time.monotonic() - self._seen_at.get(shard, float("-inf")) > _BELIEVED_S:
            refuse_changed(url, identity)
            self._seen_at[shard] = time.monotonic()
        return store.read(url, offset, size)

    def cached_bytes(self) -> dict[bytes, int]:
        """See `Caching`."""
        return dict(zip(self.index.identities_S.tolist(), self.index.num_bytes_S.tolist(), strict=True))

    def share_cache(self, num_bytes: int) -> None:
        """Keeps whole shards where those of all sources fit together."""
        self.whole = num_bytes <= self.cache.max_bytes

    def keep(self, count: int) -> None:
        """Keeps whole shards from now on, if so many fit."""
        needed = count * int(self.index.num_bytes_S.max())
        self.whole = self.whole or needed <= self.cache.max_bytes
        if not self.whole:
            logger.warning(
                "%s holds %.1f GiB, %d shards at a time take %.1f: images are read one by one; set "
                "FD_SHARD_CACHE_GIB or a smaller data.shard_window",
                self.cache.folder, self.cache.max_bytes / 2**30, count, needed / 2**30,
            )  # fmt: skip


def refuse_changed(url: str, identity: str) -> None:
    """Looks whether a file is still the one that an index is of.

    Raises:
        UserError: it is not.
    """
    now = store.state(url)
    if now is None:
        raise UserError(f"{url}: is not there any more; put it back, or start again without it")
    if identity_of(url, now) != identity:
        raise UserError(
            f"{url}: has changed since its index was made, and has {now.size} bytes now, version {now.version}; start "
            "again when it is written, it is then indexed anew"
        )


def _cache() -> ShardCache:
    folder = Path(os.environ.get("FD_SHARD_CACHE") or cache_folder() / "shards")
    given = os.environ.get("FD_SHARD_CACHE_GIB")
    if given is None:
        max_bytes = DEFAULT_MAX_BYTES
        with contextlib.suppress(OSError):  # it will not be written either, and that is said
            existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
            held = sum(size for _, size, _ in _held(folder)) if existing == folder else 0
            max_bytes = min(max_bytes, (shutil.disk_usage(existing).free + held) // 2)
        return ShardCache(folder, max_bytes)
    try:
        return ShardCache(folder, int(float(given) * 2**30))
    except (ValueError, OverflowError):
        raise UserError(f"FD_SHARD_CACHE_GIB: got {given!r}, expected a number of GiB; 0: none") from None
