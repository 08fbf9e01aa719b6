"""`fd-scale bench data`: images a second and core, from libjpeg-turbo alone to whole loaders, ours beside others.

What is measured takes turns and sees the same JPEG files. A loader has one worker process, whose time on a core counts:
the main process only takes the batches.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import itertools
import logging
import multiprocessing
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import simplejpeg
import torch
from rich.table import Table
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from fd_scale.benchmarks.records import write_json
from fd_scale.data import ImageAlone, Picture, Source, TrainLoader, open_source, subset, training_view
from fd_scale.data.decode import DecodeError
from fd_scale.data.mixture import Mixture
from fd_scale.errors import UserError
from fd_scale.log import console
from fd_scale.run_folder import environment

logger = logging.getLogger(__name__)

BATCH = 64
LIMIT = "libjpeg-turbo alone"
OURS = "fd-scale's loader"
MANY = 100_000_000
_WARM_UP_BATCHES = 6  # more than workers load ahead

Way = Callable[[], Generator[int, None, None]]
"""Starts what is measured, which yields a number of crops whenever so many are done, without end."""


@dataclass(frozen=True)
class _Files:
    """JPEG files of a source, in memory, in it, and in a folder and in shards for those who want such."""

    source: Source
    data: list[bytes]
    folder: Path
    size: int

    def write(self, copies: int) -> None:
        """Writes each file so many times: in a folder of classes, and in shards of 500."""
        for number, data in enumerate(self.data):
            first = self.folder / "images" / f"{number % 10}" / f"{number:06}_0.jpg"
            first.parent.mkdir(parents=True, exist_ok=True)
            first.write_bytes(data)
            for copy in range(1, copies):
                os.link(first, first.with_name(f"{number:06}_{copy}.jpg"))
        (self.folder / "shards").mkdir()
        count = copies * len(self.data)
        for first_number in range(0, count, 500):
            with tarfile.open(self.folder / "shards" / f"{first_number:06}.tar", "w") as archive:
                for number in range(first_number, min(first_number + 500, count)):
                    data = self.data[number % len(self.data)]
                    for suffix, content in (("jpg", data), ("cls", b"%d" % (number % 10))):
                        member = tarfile.TarInfo(f"{number:06}.{suffix}")
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))


def bench_data(
    spec: str, num_images: int, num_rounds: int, size: int, crops: int, json_file: str | None
) -> float:
    """Measures, and prints a table.

    Args:
        spec: source of labelled images; those that are no whole JPEG files of grey or three channels are left out.
        num_images: crops in a round of each way.
        num_rounds: each way is measured so often.
        size: side of the crops, in pixels.
        crops: of each image; more than 1: the loader is measured with as many besides.
        json_file: where the measurements go too.

    Returns:
        Crops a second and core of our loader.

    Raises:
        UserError: no such images.
    """
    if min(num_images, num_rounds, size, crops) < 1:
        raise UserError("--images, --rounds, --size, --crops: expected at least 1 of each")
    torch.set_num_threads(1)
    source = open_source(spec)
    with tempfile.TemporaryDirectory() as folder:
        files = _jpeg_files(spec, source, num_images, Path(folder), size)
        files.write(-(-num_images // len(files.data)))
        found: dict[str, list[Speed]] = {}
        for round_number in range(num_rounds):
            for name, way in _ways(files, crops).items():
                speed = _speed(way, num_images)
                found.setdefault(name, []).append(speed)
                logger.info(
                    "round %d of %d: %s, %.0f images/s", round_number + 1, num_rounds, name, speed.core
                )
    result = {
        "environment": environment(), "source": spec, "images": len(files.data), "size": size, "crops": crops,
        "bytes_per_image": sum(map(len, files.data)) / len(files.data),
        "images_per_s": {name: [speed._asdict() for speed in speeds] for name, speeds in found.items()},
    }  # fmt: skip
    console.print(_table(found))
    write_json(json_file, result)
    last = OURS if crops == 1 else f"{OURS}, {crops} crops an image"
    return statistics.median(speed.core for speed in found[last])


def _jpeg_files(spec: str, source: Source, num_images: int, folder: Path, size: int) -> _Files:
    if source.targets != "labels":
        raise UserError(
            f"{spec}: its images have {source.targets}; expected a source of images, or with labels"
        )
    kept, data = [], []
    for sample_id in range(min(len(source), num_images)):
        # What is damaged would end one of the others; Pillow reads some files that this decoder refuses.
        with contextlib.suppress(DecodeError, ValueError):
            picture, _ = source.read(sample_id)
            if picture.jpeg:
                simplejpeg.decode_jpeg(picture.jpeg)
                kept.append(sample_id)
                data.append(picture.jpeg)
    if not data:
        raise UserError(
            f"{spec}: none of its images is a whole JPEG file of grey or three channels; expected such"
        )
    return _Files(subset(source, kept), data, folder, size)


def _ways(files: _Files, crops: int) -> dict[str, Way]:
    ways: dict[str, Way] = {
        LIMIT: lambda: _bare(files, simplejpeg.decode_jpeg),
        "decode and crop": lambda: _bare(files, _decode_and_crop(files.size)),
        OURS: lambda: _ours(files, len(files.data)),
        f"{OURS}, {MANY:,} images": lambda: _ours(files, MANY),
    }
    if crops > 1:
        ways[f"{OURS}, {crops} crops an image"] = lambda: _ours(files, len(files.data), crops)
    peers = {name: functools.partial(peer, files) for name, peer in _PEERS.items()}
    if importlib.util.find_spec("webdataset") is None:
        del peers["webdataset"]
    return ways | peers


class Speed(NamedTuple):
    """Of one way in one round."""

    core: float
    """Crops a second of the CPU's time: of the worker, or of this process where there is none."""
    wall: float
    """Crops a second, which is less where other processes have the cores too."""


def _speed(way: Way, num_images: int) -> Speed:
    with contextlib.closing(way()) as done:
        for _ in range(_WARM_UP_BATCHES):
            next(done)
        process_ids = [worker.pid or 0 for worker in multiprocessing.active_children()] or [os.getpid()]
        began, began_cpu, count = time.perf_counter(), _cpu_s(process_ids), 0
        while count < num_images:
            count += next(done)
        return Speed(count / (_cpu_s(process_ids) - began_cpu), count / (time.perf_counter() - began))


def _cpu_s(process_ids: list[int]) -> float:
    """Time that processes have had of cores, of the user and of the system."""
    # As clock_getcpuclockid(3) numbers a process's clock, which Python has for threads alone.
    return sum(time.clock_gettime(~number << 3 | 2) for number in process_ids)


def _bare(files: _Files, step: Callable[[bytes], Any]) -> Generator[int, None, None]:
    endless = itertools.cycle(files.data)
    while True:
        for data in itertools.islice(endless, BATCH):
            step(data)
        yield BATCH


def _decode_and_crop(size: int) -> Callable[[bytes], Any]:
    view = training_view(size)
    return lambda data: view(Picture(data))


def _ours(files: _Files, num_images: int, crops: int = 1) -> Generator[int, None, None]:
    """The loader of a run on so many images: those of the files, again and again."""
    batch = max(1, BATCH // crops) * crops
    repeated = Mixture([files.source], [-(-max(num_images, BATCH) // len(files.data))])
    steps = TrainLoader(
        repeated, ImageAlone(training_view(files.size)), seed=0, global_batch=batch, micro_batch=batch,
        rank=0, world_size=1, num_workers=1, crops=crops,
    ).iterate(0)  # fmt: skip
    with contextlib.closing(steps):
        for step in steps:
            yield sum(len(batch.positions) for batch in step)


def _torchvision(files: _Files) -> Generator[int, None, None]:
    transform = v2.Compose([v2.RandomResizedCrop(files.size), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    dataset = ImageFolder(str(files.folder / "images"), transform)
    return _counted(DataLoader(dataset, BATCH, shuffle=True, num_workers=1, persistent_workers=True))


def _timm(files: _Files) -> Generator[int, None, None]:
    """Its loader up to the batches of uint8 that it normalises on the device."""
    from timm.data import create_dataset, create_loader

    dataset = create_dataset("", root=str(files.folder / "images"))
    loader = create_loader(
        dataset, (3, files.size, files.size), BATCH, is_training=True, color_jitter=0.0, interpolation="bilinear",
        num_workers=1, device=torch.device("cpu"),
    )  # fmt: skip
    return _counted(loader.loader)


def _webdataset(files: _Files) -> Generator[int, None, None]:
    import webdataset

    transform = v2.Compose([v2.RandomResizedCrop(files.size), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    shards = sorted(str(file) for file in (files.folder / "shards").iterdir())
    dataset = webdataset.WebDataset(shards, shardshuffle=len(shards)).shuffle(1000).decode("pilrgb")
    dataset = dataset.to_tuple("jpg", "cls").map_tuple(transform, int).batched(BATCH).repeat()
    return _counted(DataLoader(dataset, None, num_workers=1))


_PEERS = {"torchvision's ImageFolder": _torchvision, "timm's create_loader": _timm, "webdataset": _webdataset}


def _counted(loader: Iterable[Any]) -> Generator[int, None, None]:
    while True:
        for images, *_ in loader:
            yield len(images)


def _table(found: dict[str, list[Speed]]) -> Table:
    medians = {name: statistics.median(speed.core for speed in speeds) for name, speeds in found.items()}
    best_peer = max(rate for name, rate in medians.items() if name in _PEERS)
    table = Table(
        "",
        "images/s a core, median (least to most)",
        "of the limit",
        "of the best other",
        "images/s by the clock",
    )
    for name, speeds in found.items():
        rates = [speed.core for speed in speeds]
        table.add_row(
            name, f"{medians[name]:.0f} ({min(rates):.0f} to {max(rates):.0f})",
            f"{medians[name] / medians[LIMIT]:.0%}", f"{medians[name] / best_peer:.2f}",
            f"{statistics.median(speed.wall for speed in speeds):.0f}",
        )  # fmt: skip
    return table
