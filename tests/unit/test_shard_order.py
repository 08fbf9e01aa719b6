"""The order by shards: each sample once, few shards at a time, resumed anywhere, on any number of ranks."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from shard_files import numbered, write_tar
from test_randomness import chi_square

from fd_scale.cli import main
from fd_scale.config import SourceConfig
from fd_scale.data import ImageAlone, TrainLoader, evaluation_transform, open_source, parquet
from fd_scale.data.base import sharded
from fd_scale.data.order import ShardOrder
from fd_scale.errors import UserError

TRANSFORM = ImageAlone(evaluation_transform(4))


def shards(*sizes: int) -> np.ndarray:
    return np.cumsum([0, *sizes])


UNEVEN = shards(*np.random.default_rng(0).integers(0, 60, 50).tolist())


@pytest.mark.parametrize("window", [1, 2, 7, 50, 1000])
@pytest.mark.parametrize(
    "first", [UNEVEN, shards(1), shards(0, 3, 0, 1), shards(*[1] * 40), shards(500, 1, 1)]
)
def test_every_sample_once_an_epoch(first: np.ndarray, window: int) -> None:
    order, size = ShardOrder(first, window), int(first[-1])
    for seed, epoch in ((0, 0), (3, 1)):
        assert np.array_equal(np.sort(order(seed, epoch, np.arange(size))), np.arange(size))


def test_golden_values() -> None:
    """Runs are resumed by later versions: the values are part of the run format."""
    assert ShardOrder(shards(3, 4, 3), 2)(0, 0, np.arange(10)).tolist() == [4, 5, 7, 9, 1, 3, 6, 2, 8, 0]
    million = ShardOrder(np.arange(10_001) * 1000, 32)
    assert million(7, 3, np.array([0, 1, 9_999_999])).tolist() == [4741059, 3189262, 5856448]


def test_a_position_alone_is_as_among_others() -> None:
    order = ShardOrder(UNEVEN, 5)
    ids = order(1, 2, np.arange(100))
    assert [int(order(1, 2, position)) for position in range(100)] == ids.tolist()
    assert np.array_equal(order(1, 2, np.arange(100).reshape(4, 25)), ids.reshape(4, 25))
    assert order(1, 3, np.arange(100)).tolist() != ids.tolist() != order(2, 2, np.arange(100)).tolist()
    assert order(1, 2, np.arange(100)).tolist() == ids.tolist(), "another epoch between"


@pytest.mark.parametrize("window", [1, 4, 16])
def test_few_shards_at_a_time(window: int) -> None:
    """Within a block `window` shards, over the border of two one more; a shard is read in one stretch of a circle."""
    size, num_shards = 100, 60
    order = ShardOrder(shards(*[size] * num_shards), window)
    shard_P = order(0, 0, np.arange(size * num_shards)) // size
    for start in range(0, len(shard_P) - size):
        now = np.unique(shard_P[start : start + size])
        assert len(now) <= window + 1
        coming = order.coming(0, 0, start)
        assert coming is None or coming // size in shard_P[start : start + 2 * size]
    block_P = np.arange(len(shard_P)) // size
    for shard in range(num_shards):
        blocks = np.unique(block_P[shard_P == shard])
        assert len(blocks) == window
        gaps = np.diff([*blocks, blocks[0] + num_shards])
        assert sorted(gaps)[:-1] == [1] * (window - 1), "one after the other, in the circle"


@pytest.mark.slow
def test_every_sample_is_as_likely_at_every_position() -> None:
    order, counts = ShardOrder(shards(2, 2, 2), 2), np.zeros((6, 6))
    for seed in range(1000):
        counts[np.arange(6), order(seed, 0, np.arange(6))] += 1
    # Rows and columns have fixed sums: 25 degrees of freedom, standard deviation 7.1, 5 of those.
    assert chi_square(counts) < 61


def test_classes_are_spread_evenly_over_an_epoch() -> None:
    """Shards in whose samples classes are mixed: position and class are independent, as in a random order."""
    size, num_shards, num_classes = 200, 100, 10
    class_N = np.random.default_rng(0).integers(0, num_classes, size * num_shards)
    ids_P = ShardOrder(shards(*[size] * num_shards), 8)(0, 0, np.arange(size * num_shards))
    counts = np.zeros((20, num_classes))
    np.add.at(counts, (np.arange(len(ids_P)) * 20 // len(ids_P), class_N[ids_P]), 1)
    expected = counts.sum(1, keepdims=True) * counts.sum(0, keepdims=True) / counts.sum()
    # 19 * 9 = 171 degrees of freedom, standard deviation 18.5, 5 of those on each side.
    assert 78 < ((counts - expected) ** 2 / expected).sum() < 264


@pytest.fixture
def tars(tmp_path: Path) -> str:
    for shard in range(12):
        write_tar(tmp_path / f"set/{shard:02d}.tar", numbered(8 * shard, 8 * shard + 8))
    return f"tar:{tmp_path}/set"


def loader(source: object, window: int, rank: int = 0, ranks: int = 1, workers: int = 0) -> TrainLoader:
    return TrainLoader(
        source, TRANSFORM, seed=3, global_batch=16, micro_batch=16 // ranks, rank=rank, world_size=ranks,
        num_workers=workers, shard_window=window,
    )  # fmt: skip


def labels(made: TrainLoader, start: int, count: int) -> torch.Tensor:
    steps = made.iterate(start)
    found = torch.stack([batch.classes for step in itertools.islice(steps, count) for batch in step])
    steps.close()
    return found


def test_ranks_and_resumption(tars: str) -> None:
    source = open_source(tars)
    alone = labels(loader(source, 3), 0, 12)
    assert all(
        sorted(alone[epoch * 6 : epoch * 6 + 6].flatten().tolist()) == [*range(96)] for epoch in (0, 1)
    )
    assert len(alone[0].div(8, rounding_mode="floor").unique()) <= 3 + 2, "two blocks of 8 a batch"
    parts = [labels(loader(source, 3, rank, 4), 0, 12) for rank in range(4)]
    assert torch.equal(torch.cat(parts, dim=1), alone)
    for start in np.random.default_rng(0).integers(0, 11, 4).tolist():
        assert torch.equal(labels(loader(source, 3), start, 12 - start), alone[start:]), start
    assert not torch.equal(labels(loader(source, 0), 0, 12), alone), "the order over all is another"


def test_lists_of_sources_and_images(tars: str, tmp_path: Path) -> None:
    (tmp_path / "without.txt").write_text("".join(f"{number:04d}\n" for number in range(20, 36)))
    both = [
        SourceConfig(source=tars, without=str(tmp_path / "without.txt")),
        SourceConfig(source=f"{tars}/00.tar", weight=2),
    ]
    mixture = open_source(both)
    assert np.diff(sharded(mixture).first_of_shards()).tolist() == [8, 8, 4, 0, 4, *[8] * 7, 8, 8]
    steps = loader(mixture, 2).iterate(0)
    levels = torch.cat([batch.images[:, 0, 0, 0] for step in itertools.islice(steps, 6) for batch in step])
    counts = np.bincount(levels, minlength=96)
    assert counts.tolist() == [3] * 8 + [1] * 12 + [0] * 16 + [1] * 60


def test_row_groups_are_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from shard_files import image_file

    monkeypatch.setattr(parquet, "CACHE_BYTES", 0)
    images = [{"bytes": image_file(number), "path": None} for number in range(96)]
    pq.write_table(pa.table({"image": images, "label": range(96)}), tmp_path / "a.parquet", row_group_size=8)
    source = open_source(f"parquet:{tmp_path}/a.parquet")
    read = []
    read_row_group = pq.ParquetFile.read_row_group

    def noted(self: pq.ParquetFile, group: int, *arguments: object, **options: object) -> pa.Table:
        read.append(group)
        return read_row_group(self, group, *arguments, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", noted)
    found = labels(loader(source, 3), 0, 6)
    assert sorted(found.flatten().tolist()) == [*range(96)]
    assert len(read) <= 12 + 3, "each once, and those at the circle's end again"


def test_sources_without_shards_are_refused(tars: str) -> None:
    for source in ("digits:train", [SourceConfig(source=tars), SourceConfig(source="digits:train")]):
        with pytest.raises(
            UserError, match=r"data\.shard_window: an order by shards is for sources tar: and parquet:"
        ):
            loader(open_source(source), 3)


def test_the_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([
        "bench", "order", "--shards", "20", "--shard-size", "50", "--batch", "100", "--window", "1", "20",
        "--json", str(tmp_path / "out.json"),
    ])  # fmt: skip
    orders = json.loads((tmp_path / "out.json").read_text())["orders"]
    assert [each["shards in a batch"] for each in orders.values()][:2] == [2, 20]
    assert "…" not in capsys.readouterr().err, "numbers that are cut mean nothing"
    # The mean distance of two places drawn at random is a third; its standard error here is 0.0075.
    assert abs(orders["over all"]["neighbours apart"] - 1 / 3) < 0.03
    for arguments in (["--batch", "0"], ["--shards", "1", "--batch", "2000"]):
        with pytest.raises(SystemExit, match="2"):
            main(["bench", "order", *arguments])
