"""`fd-scale index`: the index of a set of shards, made ahead of the run."""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Iterator

from fd_scale import log
from fd_scale.data.shards import TarSource
from fd_scale.data.tar_index import PUBLISHED, index_of
from fd_scale.errors import UserError


def index(source: str, processes: int, out: str | None = None) -> Iterator[str]:
    """Makes or finds the index of a source; yields lines that say what is in it.

    Args:
        source: as in `data.train`.
        processes: that read headers; 0: threads of this one.
        out: file to write a copy of the index to, which may be put beside the shards in a store.

    Raises:
        UserError: it is no source of shards, a shard is refused, or the cache or the copy cannot be written.
    """
    kind, _, path = source.partition(":")
    if kind != "tar" or not path:
        raise UserError(f"index: {source!r} is no set of tar shards; expected tar:PATH, as in data.train")
    if processes < 0:
        raise UserError(f"--processes: got {processes}, expected 0 for threads, or how many")
    began = time.monotonic()
    with log.counting("shards") as told:
        opened = TarSource(path, functools.partial(index_of, processes=processes, told=told, in_memory=False))
    size = sum(opened.index.num_bytes_S.tolist())
    yield (
        f"{source}: {len(opened):,} images, {opened.num_classes:,} classes, {len(opened.paths):,} shards of "
        f"{size:,} bytes, {time.monotonic() - began:.1f} s"
    )
    file = opened.index.file
    yield f"{file!s}: {opened.index.bytes.nbytes:,} bytes"
    if out is not None:
        try:
            shutil.copyfile(str(file), out)
        except OSError as error:
            raise UserError(f"--out: {out} cannot be written ({error.strerror}); give another file") from None
        yield f"{out}: a copy; beside shards in a store, as {PUBLISHED}, it spares readers their headers"
