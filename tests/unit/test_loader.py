"""The loader: same batches on any number of ranks and workers, exact resume, bad samples."""

import contextlib
import itertools
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from fd_scale.data import loader
from fd_scale.data.loader import Batch, TrainLoader, evaluation_batches
from fd_scale.data.sources import Source, open_source
from fd_scale.data.transforms import (
    ImageAlone,
    contrastive_transform,
    evaluation_transform,
    finished,
    training_view,
)
from fd_scale.errors import UserError
from fd_scale.randomness import hash64

NUM_SAMPLES = 31
RANDOM = ImageAlone(training_view(8))
WHOLE = ImageAlone(evaluation_transform(8, crop_fraction=1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """31 noisy images of 12 x 10 pixels in 31 classes: the label tells which image it is."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(NUM_SAMPLES):
        (root / f"{number:02}").mkdir()
        noise = rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / f"{number:02}" / "image.png")
    return root


@pytest.fixture
def source(folder: Path) -> Source:
    return open_source(f"imagefolder:{folder}")


@pytest.fixture
def damage(folder: Path, tmp_path: Path) -> Callable[[set[int]], Source]:
    """Returns the data set with some of its images truncated."""

    def copy_and_truncate(numbers: set[int]) -> Source:
        for file in folder.rglob("*.png"):
            number = file.parent.name
            (tmp_path / "damaged" / number).mkdir(parents=True)
            data = file.read_bytes()
            kept = data[:60] if int(number) in numbers else data
            (tmp_path / "damaged" / number / "image.png").write_bytes(kept)
        return open_source(f"imagefolder:{tmp_path / 'damaged'}")

    return copy_and_truncate


def make_loader(source: Source, **changes: object) -> TrainLoader:
    options = {
        "transform": RANDOM,
        "seed": 0,
        "global_batch": 12,
        "micro_batch": 12,
        "rank": 0,
        "world_size": 1,
        "num_workers": 0,
    }
    return TrainLoader(source, **(options | changes))


def take(loader: TrainLoader, num_steps: int, start_step: int = 0) -> list[list[Batch]]:
    steps = loader.iterate(start_step)
    taken = []
    for micro_batches in itertools.islice(steps, num_steps):
        if loader.problem:  # as a run stops, on all ranks
            steps.close()
            raise UserError(loader.problem)
        taken.append(micro_batches)
    steps.close()
    return taken


def flatten(steps: Iterable[list[Batch]]) -> list[Batch]:
    return list(itertools.chain.from_iterable(steps))


def join(micro_batches: list[Batch]) -> Batch:
    tensors = [torch.cat(parts) for parts in list(zip(*micro_batches, strict=True))[:3]]
    return Batch(*tensors, num_bad=sum(batch.num_bad for batch in micro_batches))


def assert_same(steps: list[list[Batch]], others: list[list[Batch]]) -> None:
    """Whole steps are equal bit for bit, however they are cut."""
    assert len(steps) == len(others)
    for step, other in zip(map(join, steps), map(join, others), strict=True):
        assert torch.equal(step.images, other.images)
        assert torch.equal(step.labels, other.labels)
        assert torch.equal(step.positions, other.positions)
        assert step.num_bad == other.num_bad


def test_batches_have_the_promised_form(source: Source) -> None:
    loader = make_loader(source, micro_batch=4, transform=ImageAlone(contrastive_transform(8)))
    assert (loader.accumulation, loader.steps_per_epoch) == (3, 2)
    (step,) = take(loader, 1, start_step=5)
    assert len(step) == 3
    assert step[0].images.shape == (4, 2, 3, 8, 8)
    assert step[0].images.dtype == torch.uint8
    assert step[0].labels.dtype == torch.int64
    assert torch.equal(join(step).positions, torch.arange(60, 72))
    assert step[0].num_bad == 0


def test_labels_belong_to_the_images(source: Source) -> None:
    for batch in join(take(make_loader(source, transform=WHOLE), 1)[0]), *evaluate(source, 31, 0, 1):
        for image, label in zip(batch.images, batch.labels, strict=True):
            assert torch.equal(image, WHOLE(*source.read(int(label)))[0])


def test_what_is_left_for_later_is_done_as_if_at_once(source: Source) -> None:
    transform = ImageAlone(training_view(8, rand_augment="m9-mstd0.5-inc1", erasing=0.5))
    [[batch]] = take(make_loader(source, transform=transform), 1)
    for image, sample_id in zip(batch.images, batch.labels, strict=True):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(hash64(0, "augment", 0, int(sample_id))))
            alone, _ = transform(*source.read(int(sample_id)))
        assert torch.equal(image, finished(alone))


def test_an_epoch_has_no_sample_twice_and_epochs_differ(source: Source) -> None:
    steps = take(make_loader(source), 4)
    epochs = [join(steps[0] + steps[1]).labels, join(steps[2] + steps[3]).labels]
    assert all(len(labels.unique()) == 24 for labels in epochs)
    assert not torch.equal(*epochs)


def test_seed_decides(source: Source) -> None:
    first, same, other = (take(make_loader(source, seed=seed), 2) for seed in (3, 3, 4))
    assert_same(first, same)
    assert not torch.equal(first[0][0].labels, other[0][0].labels)


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 4), (2, 6), (2, 3), (3, 4), (4, 1)])
def test_ranks_and_micro_batches_share_the_same_steps(
    source: Source, world_size: int, micro_batch: int
) -> None:
    ranks = [
        take(make_loader(source, rank=rank, world_size=world_size, micro_batch=micro_batch), 3)
        for rank in range(world_size)
    ]
    together = [flatten(parts) for parts in zip(*ranks, strict=True)]
    assert_same(together, take(make_loader(source), 3))


def test_resume_at_any_step(source: Source) -> None:
    whole = take(make_loader(source, micro_batch=6), 7)
    for start_step in range(1, 7):
        assert_same(take(make_loader(source), 7 - start_step, start_step), whole[start_step:])


def test_augmentation_belongs_to_sample_and_epoch(source: Source) -> None:
    """Not to the position: epoch 1 starts at position 24 with 12 rows a step, at 30 with 10."""
    epoch_0, epoch_1 = (join(flatten(take(make_loader(source), 2, step))) for step in (0, 2))
    by_10 = join(flatten(take(make_loader(source, global_batch=10, micro_batch=10), 3, start_step=3)))
    assert by_10.positions[0] == 30
    assert torch.equal(by_10.labels[:24], epoch_1.labels)
    assert torch.equal(by_10.images[:24], epoch_1.images)
    in_both = set(epoch_0.labels.tolist()) & set(epoch_1.labels.tolist())
    for label in in_both:
        views = [epoch.images[epoch.labels == label] for epoch in (epoch_0, epoch_1)]
        assert not torch.equal(*views)


def test_global_generator_is_neither_used_nor_changed(source: Source) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = take(make_loader(source), 2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert_same(take(make_loader(source), 2), first)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores are meant
def test_workers_change_nothing_and_end_with_the_iterator(source: Source) -> None:
    steps = make_loader(source, num_workers=4, micro_batch=3).iterate(1)
    taken = [next(steps) for _ in range(5)]
    assert len(multiprocessing.active_children()) == 4
    steps.close()  # in mid-stream, with batches on their way
    assert multiprocessing.active_children() == []
    assert_same(taken, take(make_loader(source), 5, start_step=1))


def slow_copy(tensor: torch.Tensor) -> torch.Tensor:
    """What stands in for a copy to pinned memory: reads the second half a while after the first."""
    copy = torch.empty_like(tensor)
    half = len(tensor) // 2
    copy[:half] = tensor[:half]
    time.sleep(0.02)
    copy[half:] = tensor[half:]
    return copy


@pytest.mark.parametrize("pin_memory", ["no", "stand-in", pytest.param("yes", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("num_workers", [1, 2])
def test_batches_stay_what_they_are_when_workers_use_their_memory_again(
    source: Source, monkeypatch: pytest.MonkeyPatch, num_workers: int, pin_memory: str
) -> None:
    """Workers that are far ahead of whoever takes batches, and keeps them."""
    if pin_memory == "stand-in":
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
        for name in ("current_device_index", "set_device_index"):
            monkeypatch.setattr(torch.accelerator, name, lambda *_: 0)
        monkeypatch.setattr(torch.Tensor, "pin_memory", slow_copy)
    loader = make_loader(source, num_workers=num_workers, pin_memory=pin_memory != "no")
    with contextlib.closing(loader.iterate(0)) as steps:
        kept = []
        for _ in range(8 * num_workers):
            kept.append(next(steps))
            time.sleep(0.03)
    assert all(batch.images.is_pinned() == (pin_memory == "yes") for step in kept for batch in step)
    assert_same(kept, take(make_loader(source), 8 * num_workers))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_that_dies_is_named_with_its_signal(source: Source, number: signal.Signals) -> None:
    """Within 5 s: so often torch looks after its workers."""
    steps = make_loader(source, num_workers=2).iterate(0)
    next(steps)
    worker = multiprocessing.active_children()[0]
    assert worker.pid is not None
    os.kill(worker.pid, number)
    words = rf"loader worker {worker.name} was killed by {number.name}, .*data\.num_workers"
    with pytest.raises(UserError, match=words) as error:
        list(itertools.islice(steps, 20))
    assert "\n" not in str(error.value)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("num_workers", [0, 1])
def test_crops_of_an_image_stand_side_by_side(source: Source, num_workers: int) -> None:
    loader = make_loader(source, crops=3, num_workers=num_workers)
    assert loader.steps_per_epoch == 31 * 3 // 12
    epoch = join(flatten(take(loader, 7)))
    labels_NK = epoch.labels.view(-1, 3)
    assert (labels_NK == labels_NK[:, :1]).all()
    assert len(labels_NK[:, 0].unique()) == 7 * 4, "no image twice in an epoch"
    images_NK = epoch.images.view(-1, 3, *epoch.images.shape[1:])
    for first, second in itertools.combinations(range(3), 2):
        assert (images_NK[:, first] != images_NK[:, second]).flatten(1).any(1).float().mean() > 0.9
    # The first crop of an image is that of a run with one crop of each, where the epochs have as many images.
    alone = join(flatten(take(make_loader(source, global_batch=4, micro_batch=4), 7)))
    assert torch.equal(alone.labels, labels_NK[:, 0])
    assert torch.equal(alone.images, images_NK[:, 0])


@pytest.mark.parametrize(("crops", "views", "decodes"), [(1, 1, 0), (3, 1, 1), (1, 2, 1)])
def test_an_image_is_decoded_whole_once_where_several_crops_are_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crops: int, views: int, decodes: int
) -> None:
    """And only then."""
    (tmp_path / "one").mkdir()
    Image.new("RGB", (64, 48)).save(tmp_path / "one" / "image.jpg")
    calls = []
    whole = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *a, **k: (calls.append(a), whole(*a, **k))[1])
    view = training_view(40) if views == 1 else contrastive_transform(40)
    sizes = {"global_batch": crops, "micro_batch": crops, "crops": crops, "transform": ImageAlone(view)}
    take(make_loader(open_source(f"imagefolder:{tmp_path}"), **sizes), 1)
    assert len(calls) == decodes


def test_crops_do_not_depend_on_ranks_micro_batches_or_resume(source: Source) -> None:
    whole = take(make_loader(source, crops=2), 8)
    for start_step in (1, 5):
        assert_same(take(make_loader(source, crops=2), 8 - start_step, start_step), whole[start_step:])
    for world_size, micro_batch in ((1, 4), (2, 6), (3, 2)):
        ranks = [
            take(make_loader(source, crops=2, rank=rank, world_size=world_size, micro_batch=micro_batch), 8)
            for rank in range(world_size)
        ]
        assert_same([flatten(parts) for parts in zip(*ranks, strict=True)], whole)


def test_crops_of_an_image_that_is_replaced(damage: Callable[[set[int]], Source], source: Source) -> None:
    ((healthy,),) = take(make_loader(source, crops=2), 1)
    ((found,),) = take(make_loader(damage({int(healthy.labels[4])}), crops=2, max_bad_fraction=1), 1)
    changed = (found.images != healthy.images).flatten(1).any(1)
    assert (found.num_bad, changed.nonzero().flatten().tolist()) == (2, [4, 5])
    assert found.labels[4] == found.labels[5]


def assert_ends(process_id: int) -> None:
    for _ in range(200):
        try:
            os.kill(process_id, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail(f"worker {process_id} still lives after 10 s")


@pytest.mark.slow
def test_workers_end_with_the_process_however_it_ends(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
        import multiprocessing
        from fd_scale.data.loader import TrainLoader
        from fd_scale.data.sources import open_source
        from fd_scale.data.transforms import ImageAlone, training_view

        if __name__ == "__main__":
            source = open_source("imagefolder:{folder}")
            sizes = dict(global_batch=4, micro_batch=4, rank=0, world_size=1, num_workers=1)
            steps = TrainLoader(source, ImageAlone(training_view(8)), seed=0, **sizes).iterate(0)
            next(steps)
            print(multiprocessing.active_children()[0].pid, flush=True)
            input()
        """)
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    leaving, killed = (subprocess.Popen([sys.executable, script], **pipes) for _ in range(2))
    worker_of_killed = int(killed.stdout.readline())
    killed.kill()
    assert_ends(worker_of_killed)
    killed.communicate()
    # It leaves without closing the iterator. About 5 s, most of it importing torch twice.
    stdout, stderr = leaving.communicate("\n", timeout=60)
    assert (leaving.returncode, stderr) == (0, "")
    assert_ends(int(stdout))


def test_bad_samples_are_replaced_counted_and_named_once(
    damage: Callable[[set[int]], Source], source: Source, caplog: pytest.LogCaptureFixture
) -> None:
    bad = {3, 17, 20}
    damaged = damage(bad)
    steps = take(make_loader(damaged, max_bad_fraction=0.5), 6)
    healthy = take(make_loader(source), 6)
    replaced = 0
    for step, other in zip(map(join, steps), map(join, healthy), strict=True):
        was_bad = torch.isin(other.labels, torch.tensor(list(bad)))
        assert torch.equal(step.images[~was_bad], other.images[~was_bad])
        assert not bad & set(step.labels.tolist())
        assert step.num_bad == was_bad.sum()
        replaced += step.num_bad
    assert replaced > len(bad)  # so the epochs met some of them again
    for number in bad:
        assert caplog.text.count(damaged.name(number)) == 1
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_replacements_do_not_depend_on_the_ranks(damage: Callable[[set[int]], Source]) -> None:
    damaged = damage(set(range(0, 31, 3)))
    halves = [
        take(make_loader(damaged, rank=rank, world_size=2, micro_batch=6, max_bad_fraction=1), 3)
        for rank in (0, 1)
    ]
    together = [first + second for first, second in zip(*halves, strict=True)]
    assert_same(together, take(make_loader(damaged, max_bad_fraction=1), 3))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_too_many_bad_samples_are_an_error(damage: Callable[[set[int]], Source], num_workers: int) -> None:
    damaged = damage(set(range(10)))
    with pytest.raises(
        UserError, match=r"samples cannot be decoded, allowed are 10.00%.*image\.png"
    ) as error:
        take(make_loader(damaged, max_bad_fraction=0.1, num_workers=num_workers), 6)
    assert "Traceback" not in str(error.value)
    assert multiprocessing.active_children() == []


def test_first_bad_sample_is_judged_over_the_data_set(
    damage: Callable[[set[int]], Source], source: Source
) -> None:
    first_label = int(take(make_loader(source), 1)[0][0].labels[0])
    damaged = damage({first_label})
    # 1 of the first 12 is 8 %, but 1 of the 31 in the data set is 3 %.
    assert [batch.num_bad for (batch,) in take(make_loader(damaged, max_bad_fraction=0.04), 2)] == [1, 0]
    with pytest.raises(UserError, match=r"1 of 12 samples cannot be decoded, allowed are 0\.00%"):
        take(make_loader(damaged, max_bad_fraction=0), 1)


def test_an_image_whose_pixels_alone_are_damaged_is_replaced(folder: Path, tmp_path: Path) -> None:
    """A JPEG file is decoded within the transform, after its crop is drawn."""
    for number in range(NUM_SAMPLES):
        (tmp_path / f"{number:02}").mkdir()
        Image.open(folder / f"{number:02}" / "image.png").save(tmp_path / f"{number:02}" / "image.jpg")
    ((healthy,),) = take(make_loader(open_source(f"imagefolder:{tmp_path}")), 1)
    file = tmp_path / f"{int(healthy.labels[3]):02}" / "image.jpg"
    file.write_bytes(file.read_bytes()[:-30])
    ((found,),) = take(make_loader(open_source(f"imagefolder:{tmp_path}"), max_bad_fraction=1), 1)
    assert found.num_bad == 1
    same = (found.images == healthy.images).flatten(1).all(1)
    assert same.logical_not().nonzero().tolist() == [[3]]


def test_nothing_decodable_is_an_error(damage: Callable[[set[int]], Source]) -> None:
    damaged = damage(set(range(NUM_SAMPLES)))
    with pytest.raises(UserError, match=r"in a row cannot be decoded: .*image\.png .*\(.+\); repair"):
        take(make_loader(damaged, max_bad_fraction=1), 1)


def test_samples_in_a_row_are_named_beside_the_reason_of_one_of_them() -> None:
    """Not those of before, which have reasons of their own."""
    tally = loader._Tally(1, NUM_SAMPLES)
    good = Batch(torch.zeros(1, 3, 1, 1), torch.zeros(1), torch.zeros(1), num_bad=1)
    tally.take(good, [loader._BadSample(number, f"cut_{number}.png", "it is cut off") for number in range(3)])
    gone = [
        loader._BadSample(number, f"{number}.png", f"its mask {number}.png is gone")
        for number in range(3, 20)
    ]
    with pytest.raises(
        UserError, match=r": 17\.png, 18\.png, 19\.png \(the last one: its mask 19\.png is gone\); repair"
    ):
        tally.take(None, gone)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch": 10, "micro_batch": 4}, "micro-batch x ranks = 4 x 1; take 8"),
        ({"global_batch": 12, "micro_batch": 4, "world_size": 2}, "4 x 2; take 16"),
        ({"global_batch": 2, "micro_batch": 8}, "8 x 1; take 8"),
        ({"global_batch": 12, "micro_batch": 0}, "multiple of micro-batch"),
        ({"global_batch": 0}, "multiple of micro-batch"),
        ({"global_batch": 36}, "larger than the data set of 31 samples; take at most 31"),
        ({"crops": 5}, r"data\.crops: a micro-batch on a rank is 12, expected a multiple of the 5 crops"),
        ({"max_bad_fraction": 1.5}, "between 0 and 1, got 1.5"),
    ],
)
def test_sizes_that_do_not_fit_are_an_error(source: Source, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_loader(source, **changes)


def evaluate(
    source: Source, batch_size: int, rank: int, world_size: int, num_workers: int = 0
) -> list[Batch]:
    sizes = {"batch_size": batch_size, "rank": rank, "world_size": world_size, "num_workers": num_workers}
    return list(evaluation_batches(source, WHOLE, **sizes))


@pytest.mark.parametrize(
    ("batch_size", "world_size"), [(1, 1), (4, 1), (31, 1), (100, 1), (4, 2), (3, 4), (8, 31)]
)
def test_evaluation_has_each_sample_once_in_order(source: Source, batch_size: int, world_size: int) -> None:
    ranks = [evaluate(source, batch_size, rank, world_size) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1  # as many forward passes on every rank
    batches = flatten(ranks)
    assert join(batches).positions.tolist() == list(range(NUM_SAMPLES))
    assert join(batches).labels.tolist() == list(range(NUM_SAMPLES))
    assert all(1 <= len(batch.labels) <= batch_size for batch in batches)


def test_evaluation_with_workers(source: Source) -> None:
    assert_same([evaluate(source, 5, 0, 1, num_workers=1)], [evaluate(source, 5, 0, 1)])
    assert multiprocessing.active_children() == []


def test_evaluation_never_replaces_a_sample(damage: Callable[[set[int]], Source]) -> None:
    damaged = damage({9})
    with pytest.raises(UserError, match=r"09/image\.png cannot be decoded"):
        evaluate(damaged, 4, 0, 1)


@pytest.mark.parametrize(
    ("batch_size", "world_size", "message"),
    [(4, 32, "take 31 ranks at most"), (1, 2, "or a larger batch_size"), (0, 1, "at least 1, got 0")],
)
def test_evaluation_sizes_that_do_not_fit(
    source: Source, batch_size: int, world_size: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(source, batch_size, 0, world_size)


def test_batch_moves_to_a_device(source: Source) -> None:
    batch = take(make_loader(source), 1)[0][0]
    moved = batch.to("meta")
    assert (moved.images.device.type, moved.labels.device.type) == ("meta", "meta")
    assert moved.positions is batch.positions, "drop path is drawn from them on the host"
    assert moved.num_bad == batch.num_bad


def test_a_worker_that_does_not_start(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a script without `if __name__ == "__main__":`, which a worker imports and which fails there."""
    context = multiprocessing.get_context("forkserver")

    def broken(process: Any) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(context.Process, "start", broken)
    with pytest.raises(UserError, match="ended while it was started; what it said stands above"):
        next(make_loader(source, num_workers=1).iterate(0))
