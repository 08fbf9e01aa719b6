"""Tar shards of small images, for the tests that read them."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from fd_scale.data import Source

Member = tuple[str | tarfile.TarInfo, bytes]


def image_file(level: int, kind: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (4, 3)) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, level if mode == "L" else (level, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, members: Iterable[Member], tar_format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as archive:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def numbered(first: int, last: int) -> list[Member]:
    """Samples whose level and label are their number."""
    return [
        member
        for number in range(first, last)
        for member in ((f"{number:04d}.png", image_file(number)), (f"{number:04d}.cls", str(number).encode()))
    ]


def level(source: Source, sample_id: int) -> int:
    """The level that an image was made with."""
    return source.read(sample_id)[0].pil().getpixel((0, 0))[0]
