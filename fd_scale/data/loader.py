"""Batches in an order that only the seed decides: the same on any number of ranks and workers.

The stream of crops has no end. Position p of it belongs to step p // global_batch, a step to
epoch step // steps_per_epoch, and `order` says which sample stands at a position of an epoch: of so
many crops in a row that all are of one sample, decoded once.

Shape suffixes: B = crops of a micro-batch.
"""

import contextlib
import itertools
import logging
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from fd_scale.data.base import Source, expect, sharded
from fd_scale.data.decode import DecodeError
from fd_scale.data.feature_files import FeatureFiles
from fd_scale.data.instances import Instances, in_few_storages
from fd_scale.data.order import ShardOrder, order
from fd_scale.data.transforms import Transform, Unfinished, finished
from fd_scale.errors import UserError
from fd_scale.randomness import hash64

logger = logging.getLogger(__name__)

# So many others are tried for a sample that cannot be decoded; if all fail, the data set is to blame.
NUM_REPLACEMENTS = 16
# The share of bad samples is judged over at least so many, or over the data set if it is smaller.
_MIN_JUDGED_SAMPLES = 1000
# Micro-batches that a worker loads ahead of their use.
_NUM_PREPARED = 2


class Batch(NamedTuple):
    """A micro-batch of one rank."""

    images: Tensor
    """uint8 (B, 3, H, W), or (B, 2, 3, H, W) from a transform that makes two views."""
    labels: Tensor | list[Instances]
    """int64 (B,), -1 where a sample has none; or masks, uint8 (B, H, W), 255 where a pixel has no class; or what is
    known of the objects of each image."""
    positions: Tensor
    """int64 (B,): step * global_batch + row in a training stream, the sample id in an evaluation."""
    num_bad: int
    """How many of its rows are of other samples, as theirs could not be decoded."""
    features: Tensor | None = None
    """Records of teachers' features, uint8 (B, bytes of a record), where they are kept on disk."""
    read_ids: tuple[int, ...] = ()
    """The samples that were really read, each for all of its crops."""

    def to(self, device: torch.device | str) -> "Batch":
        """Returns all but the positions on a device (from pinned memory without waiting)."""
        images = self.images.to(device, non_blocking=True)
        if isinstance(self.labels, Tensor):
            features = self.features if self.features is None else self.features.to(device, non_blocking=True)
            return self._replace(
                images=images, labels=self.labels.to(device, non_blocking=True), features=features
            )
        moved = [
            Instances(*(tensor.to(device, non_blocking=True) for tensor in each)) for each in self.labels
        ]
        return self._replace(images=images, labels=moved)

    @property
    def classes(self) -> Tensor:
        """The labels, where they are a tensor: of images, or of pixels."""
        assert isinstance(self.labels, Tensor), "a task of images or pixels has no objects"
        return self.labels

    @property
    def instances(self) -> list[Instances]:
        """The labels, where they are objects."""
        assert isinstance(self.labels, list), "a detection has objects"
        return self.labels


class _BadSample(NamedTuple):
    sample_id: int
    name: str
    reason: str


# No batch where a sample could not be decoded and none of its replacements either. Errors travel as
# values, because a worker's exception would reach the user as a traceback inside a message.
_Loaded = tuple[Batch | None, list[_BadSample]]


class _Tally:
    """Counts the samples that could not be decoded, names each once, and says when they are too many."""

    def __init__(self, max_fraction: float, num_crops: int) -> None:
        if not 0 <= max_fraction <= 1:
            raise UserError(f"max_bad_fraction must be between 0 and 1, got {max_fraction}; 0.01 is usual")
        self._max_fraction = max_fraction
        self._min_judged = min(_MIN_JUDGED_SAMPLES, num_crops)
        self._num_seen = 0
        self._num_bad = 0
        self._names: dict[int, str] = {}
        self.problem = ""
        """Says so once too many were bad."""

    def take(self, batch: Batch | None, bad: list[_BadSample]) -> Batch:
        """Returns the batch, if there is one."""
        if batch is None and len(bad) == 1:
            raise UserError(f"{bad[0].name} cannot be decoded: {bad[0].reason}; repair or remove it")
        for sample in bad:
            if sample.sample_id not in self._names:
                self._names[sample.sample_id] = sample.name
                logger.warning("%s cannot be decoded, another sample takes its place: %s", *sample[1:])
        if batch is None:
            names = ", ".join(sample.name for sample in bad[-3:])
            raise UserError(
                f"{NUM_REPLACEMENTS + 1} samples in a row cannot be decoded: {names} (the last one: {bad[-1].reason}); "
                "repair the data set"
            )
        self._num_seen += len(batch.labels)
        self._num_bad += batch.num_bad
        if self._num_bad > self._max_fraction * max(self._num_seen, self._min_judged):
            names = ", ".join(list(self._names.values())[:3])
            self.problem = (
                f"{self._num_bad} of {self._num_seen} samples cannot be decoded, allowed are "
                f"{self._max_fraction:.2%} (max_bad_fraction): {names}; repair or remove them"
            )
        return batch


class _WorkersMemory:
    """Where a worker stacks images: memory that it shares with the main process, the same again after some batches.

    New memory for each batch would take a worker a tenth of its time, as the system clears and maps every page of it.
    A worker is asked for a batch when the one `_NUM_PREPARED` before is taken out of its queue, and `_run` has copied
    what it took when it takes another: of `_NUM_PREPARED + 1` batches in a row, only the last is written to.
    """

    def __init__(self) -> None:
        self._parts = [torch.empty(0, dtype=torch.uint8)] * (_NUM_PREPARED + 1)

    def stack(self, images: list[Tensor]) -> Tensor:
        """Returns uint8 images, as many as given; in the main process, in memory of its own."""
        if get_worker_info() is None:
            return torch.stack(images)
        part, size = self._parts.pop(0), sum(image.numel() for image in images)
        if part.numel() < size:
            part = torch.empty(size, dtype=torch.uint8).share_memory_()
        self._parts.append(part)
        return torch.stack(images, out=part[:size].view(len(images), *images[0].shape))


_MEMORY = _WorkersMemory()


@dataclass(frozen=True)
class _Reader:
    """Reads, decodes and augments samples; runs inside the workers."""

    source: Source
    transform: Transform
    seed: int
    num_replacements: int
    crops: int = 1
    features: FeatureFiles | None = None

    def load(self, positions: range, epoch: int, sample_ids: npt.NDArray[np.int64]) -> _Loaded:
        if self.features is not None:
            epoch %= self.features.num_views
        images, bad = [], []
        labels: list[Any] = []
        read_ids: list[int] = []
        augment_seeds = self._augment_seeds(epoch, sample_ids)
        with torch.random.fork_rng(devices=[]):
            for sample_id, seeds in zip(sample_ids.tolist(), augment_seeds.tolist(), strict=True):
                for candidate in self._candidates(epoch, sample_id):
                    try:
                        crops = self._crops(candidate, seeds)
                        break
                    except DecodeError as error:
                        bad.append(_BadSample(candidate, self.source.name(candidate), str(error)))
                else:
                    return None, bad
                read_ids.append(candidate)
                for pixels, label in crops:
                    images.append(pixels)
                    labels.append(label)
        # Images have their own number of objects each, which do not stack.
        together = in_few_storages(labels) if isinstance(labels[0], Instances) else default_collate(labels)
        features = None
        if self.features is not None:  # a record of a sample holds one of each of its crops
            records = self.features.read(epoch, sample_ids.tolist(), read_ids)
            features = torch.from_numpy(records).view(len(images), -1)
        num_bad = self.crops * sum(
            read != wanted for read, wanted in zip(read_ids, sample_ids.tolist(), strict=True)
        )
        # Finished in a row: of small images, each kind of work for itself takes three quarters of the time, as its code
        # stays in the processor's caches.
        stacked = _MEMORY.stack([finished(image) for image in images])
        return Batch(stacked, together, torch.tensor(positions), num_bad, features, tuple(read_ids)), bad

    def _augment_seeds(self, epoch: int, sample_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        """Of each sample, those of its crops; that of the first is the same with and without others."""
        first = hash64(self.seed, "augment", epoch, sample_ids)
        others = [hash64(self.seed, "augment", epoch, sample_ids, crop) for crop in range(1, self.crops)]
        return np.stack([first, *others], axis=1)

    def _crops(self, sample_id: int, seeds: list[int]) -> list[tuple[Tensor | Unfinished, Any]]:
        picture, target = self.source.read(sample_id)
        picture.num_crops = len(seeds)
        crops = []
        for seed in seeds:
            # Not torch.manual_seed, which would seed the GPUs of this process as well.
            torch.default_generator.manual_seed(seed)
            crops.append(self.transform(picture, target))
        return crops

    def _candidates(self, epoch: int, sample_id: int) -> Iterator[int]:
        yield sample_id
        for attempt in range(self.num_replacements):
            yield int(hash64(self.seed, "replacement", epoch, sample_id, attempt)) % len(self.source)


@dataclass(frozen=True)
class _TrainingSamples(Dataset[_Loaded]):
    reader: _Reader
    crops_per_epoch: int
    by_shards: ShardOrder | None
    order_seed: int

    def __getitem__(self, positions: range) -> _Loaded:
        epoch, first = divmod(positions.start, self.crops_per_epoch)
        crops = self.reader.crops
        in_epoch = np.arange(first // crops, (first + len(positions)) // crops)
        seed, coming = self.order_seed, None
        if self.by_shards is None:
            sample_ids = order(seed, epoch, in_epoch, len(self.reader.source))
        else:
            sample_ids = self.by_shards(seed, epoch, in_epoch)
            coming = self.by_shards.coming(seed, epoch, int(in_epoch[-1]))
        expect(self.reader.source, sample_ids.tolist(), coming)
        return self.reader.load(positions, epoch, sample_ids)


@dataclass(frozen=True)
class _SamplesInOrder(Dataset[_Loaded]):
    reader: _Reader
    epoch: int = 0

    def __getitem__(self, positions: range) -> _Loaded:
        expect(self.reader.source, positions)
        return self.reader.load(positions, self.epoch, np.array(positions))


def _require_sizes(global_batch: int, micro_batch: int, world_size: int, crops: int, num_crops: int) -> None:
    rows = micro_batch * world_size
    if global_batch < 1 or micro_batch < 1 or global_batch % rows:
        multiple = max(1, round(global_batch / max(1, rows))) * max(1, rows)
        raise UserError(
            f"global batch {global_batch} must be a multiple of micro-batch x ranks = "
            f"{micro_batch} x {world_size}; take {multiple}, or another micro-batch"
        )
    if micro_batch % crops:
        raise UserError(
            f"data.crops: a micro-batch on a rank is {micro_batch}, expected a multiple of the {crops} crops of "
            "an image; change data.crops, train.micro_batch or the number of ranks"
        )
    if global_batch > num_crops:
        raise UserError(
            f"global batch {global_batch} is larger than the data set of {num_crops} samples; "
            f"take at most {num_crops}"
        )


class TrainLoader:
    """The batches of a training run, for one rank."""

    def __init__(
        self,
        source: Source,
        transform: Transform,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        num_workers: int,
        shard_window: int = 0,
        crops: int = 1,
        max_bad_fraction: float = 0.01,
        pin_memory: bool = False,
        features: FeatureFiles | None = None,
    ) -> None:
        """Checks the sizes; starts nothing.

        Args:
            source: the data set.
            transform: picture and target -> uint8 tensor and target; random by torch's default generator only.
            seed: seed of the run.
            global_batch: crops of an optimizer step, over all ranks.
            micro_batch: crops of a forward pass on one rank.
            rank: number of this process, 0 to world_size - 1.
            world_size: number of processes.
            num_workers: processes of this rank that read and augment; 0 for none.
            shard_window: how many shards are read at a time (`ShardOrder`); 0: samples come in an order over all.
            crops: of each sample, side by side in a micro-batch; an epoch has all crops of every sample.
            max_bad_fraction: part of the samples that may be impossible to decode, 0 to 1.
            pin_memory: whether batches lie in pinned memory, from which a GPU copies without waiting.
            features: teachers' features that each batch brings along, and of how many views of an image.

        Raises:
            UserError: sizes that do not fit together, or an order by shards of a source that has none.
        """
        assert 0 <= rank < world_size, (rank, world_size)
        rows, num_crops = micro_batch * world_size, len(source) * crops
        _require_sizes(global_batch, micro_batch, world_size, crops, num_crops)
        self.accumulation = global_batch // rows
        self.steps_per_epoch = num_crops // global_batch
        self.global_batch = global_batch
        self.micro_batch = micro_batch
        self._first_row = rank * global_batch // world_size
        self._num_workers = num_workers
        self._pin_memory = pin_memory
        self._tally = _Tally(max_bad_fraction, num_crops)
        by_shards = None
        if shard_window:
            by_shards = ShardOrder(sharded(source).first_of_shards(), shard_window)
            # One comes, one goes, and workers are ahead of each other by what they have prepared for later steps.
            ahead = num_workers * _NUM_PREPARED * rows / num_crops * len(by_shards.sizes_S)
            sharded(source).keep_shards(min(by_shards.window + 2 + math.ceil(ahead), len(by_shards.sizes_S)))
        reader = _Reader(source, transform, seed, NUM_REPLACEMENTS, crops, features)
        self._samples = _TrainingSamples(reader, self.steps_per_epoch * global_batch, by_shards, seed)

    @property
    def problem(self) -> str:
        """Says so once more than `max_bad_fraction` of this rank's samples could not be decoded; else empty."""
        return self._tally.problem

    def iterate(self, start_step: int, reordered: int = 0) -> Generator[list[Batch], None, None]:
        """Yields the micro-batches of each step from `start_step` on, without end.

        Rank r of R has the rows [r * G / R, (r + 1) * G / R) of a global batch of G, cut into
        `accumulation` micro-batches in order. Closing the generator stops the workers.

        Args:
            start_step: optimizer steps taken before.
            reordered: each number has an order of its own; 0 is the run's.

        Raises:
            UserError: a sample and all that might take its place cannot be decoded.
        """
        requests = self._micro_batches(start_step)
        samples = self._samples
        if reordered:
            seed = int(hash64(samples.reader.seed, "reordered", reordered))
            # Views whose features are kept stay what they are.
            reader = samples.reader if samples.reader.features else replace(samples.reader, seed=seed)
            samples = replace(samples, reader=reader, order_seed=seed)
        with contextlib.closing(_run(samples, requests, self._num_workers, self._pin_memory)) as loaded:
            while True:
                yield [self._tally.take(*next(loaded)) for _ in range(self.accumulation)]

    def _micro_batches(self, start_step: int) -> Iterator[range]:
        for step in itertools.count(start_step):
            first = step * self.global_batch + self._first_row
            for i in range(self.accumulation):
                yield range(first + i * self.micro_batch, first + (i + 1) * self.micro_batch)


def evaluation_batches(
    source: Source,
    transform: Transform,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    num_workers: int,
    features: FeatureFiles | None = None,
) -> Generator[Batch, None, None]:
    """Yields a rank's part of a data set: each sample once over all ranks, in order, nothing padded.

    Batch sizes differ by at most one and every rank has as many batches as the others, since a
    partitioned model needs all ranks in each forward pass.

    Args:
        source: the data set.
        transform: picture and target -> uint8 tensor and target.
        batch_size: samples of a batch at most.
        rank: number of this process, 0 to world_size - 1.
        world_size: number of processes.
        num_workers: processes of this rank that read and transform; 0 for none.
        features: teachers' features that each batch brings along.

    Raises:
        UserError: a sample that cannot be decoded, or too few samples for the ranks.
    """
    assert 0 <= rank < world_size, (rank, world_size)
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    num_batches = -(-len(source) // (batch_size * world_size))
    num_parts = num_batches * world_size
    if num_parts > len(source):
        raise UserError(
            f"{len(source)} samples in batches of {batch_size} do not give {world_size} ranks as many "
            f"batches each; take {len(source) // num_batches} ranks at most, or a larger batch_size"
        )
    first_ids = [part * len(source) // num_parts for part in range(num_parts + 1)]
    own = first_ids[rank * num_batches : (rank + 1) * num_batches + 1]
    yield from view_batches(
        source,
        transform,
        seed=0,
        view=0,
        requests=itertools.starmap(range, itertools.pairwise(own)),
        num_workers=num_workers,
        max_bad_fraction=0,
        features=features,
    )


def view_batches(
    source: Source,
    transform: Transform,
    *,
    seed: int,
    view: int,
    requests: Iterable[range],
    num_workers: int,
    max_bad_fraction: float,
    crops: int = 1,
    features: FeatureFiles | None = None,
) -> Generator[Batch, None, None]:
    """Yields images as a training of a seed shows them in an epoch, in an order of one's own.

    Args:
        source: the data set.
        transform: as of `TrainLoader`.
        seed: seed of the run.
        view: the epoch.
        requests: the sample ids of each batch, which become its positions.
        num_workers: processes that read and transform; 0 for none.
        max_bad_fraction: as of `TrainLoader`; at 0 nothing is tried in place of a sample that cannot be decoded.
        crops: of each sample, side by side; positions are of samples then.
        features: teachers' features that each batch brings along.

    Raises:
        UserError: more than `max_bad_fraction` of the samples cannot be decoded.
    """
    num_replacements = NUM_REPLACEMENTS if max_bad_fraction else 0
    samples = _SamplesInOrder(_Reader(source, transform, seed, num_replacements, crops, features), view)
    tally = _Tally(max_bad_fraction, len(source) * crops)
    with contextlib.closing(_run(samples, requests, num_workers, pin_memory=False)) as loaded:
        for batch, bad in loaded:
            taken = tally.take(batch, bad)
            if tally.problem:
                raise UserError(tally.problem)
            yield taken


def _run(
    samples: Dataset[_Loaded], requests: Iterable[range], num_workers: int, pin_memory: bool
) -> Generator[_Loaded, None, None]:
    """Loads the requests in order, ahead of their use, in workers that end when the generator is closed.

    Workers come from a fork server, a process that has imported this module and has nothing else:
    no threads of torch or DeepSpeed, whose locks a plain fork would copy in whatever state they are.
    """
    context = None
    if num_workers:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["fd_scale.data.own_group", __name__])
    loader = DataLoader(
        _Caught(samples),
        batch_size=None,  # a request is a whole micro-batch
        sampler=requests,
        num_workers=num_workers,
        prefetch_factor=_NUM_PREPARED if num_workers else None,
        collate_fn=_as_it_is,
        worker_init_fn=_end_with_main_process,
        multiprocessing_context=context,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else each iterator draws from the default generator
    )
    try:
        iterator: Any = iter(loader)
    except BrokenPipeError:
        raise UserError(
            "a loader worker ended while it was started; what it said stands above, and data.num_workers=0 does without"
        ) from None
    death = None
    try:
        for loaded in iterator:
            if isinstance(loaded, UserError):
                raise loaded
            batch, bad = loaded
            if batch is not None and batch.images.is_shared():  # neither pinned nor of this process
                batch = batch._replace(images=batch.images.clone())
            yield batch, bad
    except (RuntimeError, OSError, EOFError):
        # torch's own error names process ids alone; the others are what reading a dead worker's batch raises.
        death = _death(iterator._workers) if num_workers else None
        if death is None:
            raise
    finally:
        del iterator  # the last reference: torch ends the workers here, whoever still holds a traceback
    if death is not None:  # raised here, the error does not hold torch's, whose traceback holds the iterator
        raise UserError(death)


def _death(workers: list[Any]) -> str | None:
    """What ended one of the workers and what to do about it; none where all live."""
    # A pipe may break a moment before its process is gone.
    if not multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=1):
        return None
    name, exit_code = next((worker.name, worker.exitcode) for worker in workers if not worker.is_alive())
    if exit_code >= 0:
        return f"loader worker {name} ended with exit code {exit_code}; what it said stands above"
    number = signal.Signals(-exit_code).name
    way_out = {
        "SIGKILL": "as the system does with what takes too much memory; lower data.num_workers or train.micro_batch, "
        "or ask for more memory (sbatch --mem)",
        "SIGBUS": "as when /dev/shm is full; make that larger, or lower data.num_workers",
    }.get(number, "as by a fault in a library that reads or decodes; data.num_workers=0 shows where")
    return f"loader worker {name} was killed by {number}, {way_out}"


@dataclass(frozen=True)
class _Caught(Dataset[_Loaded | UserError]):
    samples: Dataset[_Loaded]

    def __getitem__(self, positions: range) -> _Loaded | UserError:
        try:
            return self.samples[positions]
        except UserError as error:
            return error


def _end_with_main_process(worker_id: int) -> None:
    """Ends this worker when the main process is killed.

    torch's own watch looks at the worker's parent, here the fork server. That one lives as long as
    any of its workers: without this, both would outlive a killed run for ever.
    """
    main_process = multiprocessing.parent_process()
    assert main_process is not None, worker_id

    def watch() -> None:
        main_process.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _as_it_is(loaded: Any) -> Any:  # torch declares that what is collated is a list
    return loaded
