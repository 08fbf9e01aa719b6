"""Tar shards: what is in them is read at random, and what should not be in them is refused by name."""

import gzip
import json
import os
import pickle
import random
import tarfile
from pathlib import Path

import pytest
import torch
from shard_files import Member, image_file, level, numbered, write_tar

from fd_scale.data import ImageAlone, TrainLoader, evaluation_transform, open_source, shards
from fd_scale.data.decode import DecodeError
from fd_scale.errors import UserError


def test_images_of_every_kind_with_their_labels(tmp_path: Path) -> None:
    grey, colour = image_file(9, "JPEG", "L", (50, 20)), image_file(7, size=(3, 90))
    path = write_tar(
        tmp_path / "a.tar",
        [
            ("one.jpg", grey), ("one.cls", b"3\n"), ("one.json", b'{"label": 5}'), ("one.txt", b"a caption"),
            ("deep/er/two.PNG", colour), ("deep/er/two.json", json.dumps({"label": 6, "x": [1]}).encode()),
            ("three.webp", image_file(8, "WEBP")), ("three.json", b'{"width": 4}'),
            (".hidden.png", colour), ("caption_only.txt", b""), ("__meta__", b"x"),
        ],
    )  # fmt: skip
    source = open_source(f"tar:{path}")
    assert (len(source), source.num_classes, source.class_names) == (3, 7, None)
    assert [(*source.read(i)[0].size, source.read(i)[1]) for i in range(3)] == [
        (50, 20, 3),
        (3, 90, 6),
        (4, 3, -1),
    ]
    assert {source.read(i)[0].pil().mode for i in range(3)} == {"RGB"}
    assert source.read(0)[0].pil().getpixel((0, 0)) == (9, 9, 9)
    assert [source.key(i) for i in range(3)] == ["one", "deep/er/two", "three"]
    assert source.name(1) == f"{path}:deep/er/two.PNG"


def test_members_of_a_sample_may_lie_anywhere_in_the_shard(tmp_path: Path) -> None:
    members = numbered(0, 5)
    path = write_tar(tmp_path / "a.tar", sorted(members, key=lambda member: str(member[0])[::-1]))
    source = open_source(f"tar:{path}")
    assert sorted((level(source, i), source.read(i)[1]) for i in range(5)) == [(n, n) for n in range(5)]


def test_without_labels(tmp_path: Path) -> None:
    source = open_source(f"tar:{write_tar(tmp_path / 'a.tar', [('a.png', image_file(0))])}")
    assert (source.read(0)[1], source.num_classes) == (-1, 0)


@pytest.mark.parametrize(
    "spec", ["", "/*.tar", "/train-{000..002}.tar", "/train-{000..001}.tar", "/train-001.tar"]
)
def test_files_folders_globs_and_ranges(tmp_path: Path, spec: str) -> None:
    for number in range(3):
        write_tar(tmp_path / f"train-{number:03d}.tar", numbered(10 * number, 10 * number + 4))
    source = open_source(f"tar:{tmp_path}{spec}")
    expected = {"/train-{000..001}.tar": [0, 1], "/train-001.tar": [1]}.get(spec, [0, 1, 2])
    levels = [10 * shard + number for shard in expected for number in range(4)]
    assert [level(source, i) for i in range(len(source))] == levels
    order = list(range(len(source)))
    random.Random(0).shuffle(order)
    assert [level(source, i) for i in order] == [levels[i] for i in order]


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["GNU", "pax"])
def test_long_and_foreign_names(tmp_path: Path, tar_format: int) -> None:
    long = "/".join(["folder" * 8] * 9) + "/" + "n" * 180
    members: list[Member] = [
        (f"{long}.png", image_file(1)),
        (f"{long}.cls", b"2"),
        ("größe.png", image_file(3)),
    ]
    source = open_source(f"tar:{write_tar(tmp_path / 'a.tar', members, tar_format)}")
    assert [source.key(i) for i in range(2)] == [long, "größe"]
    assert [(level(source, i), source.read(i)[1]) for i in range(2)] == [(1, 2), (3, -1)]


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        ("/etc/evil.png", "leads out of the shard"),
        ("../evil.png", "leads out of the shard"),
        ("a/../../evil.png", "leads out of the shard"),
        (special("evil.png", tarfile.SYMTYPE, "/etc/passwd"), "is a link to '/etc/passwd'"),
        (special("evil.png", tarfile.LNKTYPE, "0001.png"), "is a link to '0001.png'"),
        (special("evil.png", tarfile.CHRTYPE), "a device or a pipe"),
        (special("evil.png", tarfile.FIFOTYPE), "a device or a pipe"),
        (special("../evil", tarfile.DIRTYPE), "leads out of the shard"),
    ],
)
def test_members_that_are_refused(tmp_path: Path, member: str | tarfile.TarInfo, reason: str) -> None:
    path = write_tar(tmp_path / "bad.tar", [*numbered(0, 2), (member, b""), *numbered(2, 3)])
    with pytest.raises(UserError, match=rf"bad.tar: member '.*evil.*' is refused, .*{reason}"):
        open_source(f"tar:{path}")
    assert sorted(os.listdir(tmp_path)) == ["bad.tar"], "nothing is unpacked"


def test_a_sparse_member_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("evil.png")
    info.pax_headers = {"GNU.sparse.map": "0,1,5,1", "GNU.sparse.size": "10"}
    path = write_tar(tmp_path / "bad.tar", [(info, b"ab")])
    with pytest.raises(UserError, match=r"member 'evil.png' is refused, it is a sparse file"):
        open_source(f"tar:{path}")


def test_folders_in_a_shard_are_passed_over(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "a.tar", [(special("./deep", tarfile.DIRTYPE), b""), ("./deep/a.png", image_file(4))]
    )
    assert level(open_source(f"tar:{path}"), 0) == 4


def test_a_shard_cut_at_any_block_is_refused(tmp_path: Path) -> None:
    whole = write_tar(
        tmp_path / "a.tar", [("0.png", image_file(0)), ("1.png", bytes(2000)), ("2.png", image_file(2))]
    )
    data = whole.read_bytes()
    with tarfile.open(whole) as archive:
        members = archive.getmembers()
        end = archive.offset
    cut = tmp_path / "cut.tar"
    for size in [*range(0, end + 512, 512), members[1].offset_data + 700, members[2].offset + 100]:
        cut.write_bytes(data[:size])
        with pytest.raises(UserError, match=r"cut.tar: .*; download it again"):
            open_source(f"tar:{cut}")
    cut.write_bytes(data[: members[1].offset_data + 700])
    with pytest.raises(UserError, match=r"cut.tar: ends inside member '1.png'"):
        open_source(f"tar:{cut}")
    cut.write_bytes(data[: members[2].offset])
    with pytest.raises(UserError, match=r"cut off or damaged after member '1.png'"):
        open_source(f"tar:{cut}")
    cut.write_bytes(data[: end + 1024])
    assert len(open_source(f"tar:{cut}")) == 3, "the zeros that fill a tape record may be missing"


def test_damage_anywhere_is_refused_or_harmless(tmp_path: Path) -> None:
    """Bytes of headers turned over at random: a sentence or a source, never another exception."""
    whole = write_tar(tmp_path / "a.tar", [*numbered(0, 2), ("n" * 150 + ".png", image_file(2))])
    data, draw, refusals = whole.read_bytes(), random.Random(0), []
    damaged = tmp_path / "damaged.tar"
    for _ in range(400):
        changed = bytearray(data)
        for _ in range(draw.choice([1, 3, 30])):
            changed[draw.randrange(len(data))] = draw.randrange(256)
        damaged.write_bytes(changed)
        try:
            source = open_source(f"tar:{damaged}")
        except UserError as error:
            refusals.append(str(error))
        else:
            assert len(source) == 3, "no image is lost in silence"
    assert len(refusals) > 100
    assert all("damaged.tar" in refusal for refusal in refusals)


def test_a_header_of_negative_size_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("evil.png")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 10 + b"\xfe\x00"  # -512 in base 256: back to this header, without end
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    whole = write_tar(tmp_path / "a.tar", [("0.png", b"x" * 512)]).read_bytes()
    (tmp_path / "bad.tar").write_bytes(whole[:1024] + bytes(header) + bytes(1024))
    with pytest.raises(UserError, match=r"bad.tar: member 'evil.png' is refused, its size is negative"):
        open_source(f"tar:{tmp_path / 'bad.tar'}")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "a.tar.gz",
            gzip.compress(b"x" * 2000, mtime=0),
            "is compressed \\(gzip\\), .* unpack it to a plain .tar",
        ),
        ("a.tar", b"BZh91AY", "is compressed \\(bzip2\\)"),
        ("a.tar", b"<html>not found</html>" * 100, "is no tar file"),
        ("a.tar", b"", "is no tar file"),
        ("a.tar", bytes(10240), "holds no images"),
    ],
)
def test_files_that_are_no_shards(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        open_source(f"tar:{tmp_path / name}")


def test_two_tars_in_one_file_are_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", numbered(0, 2))
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(UserError, match=r"after member '0001.cls'"):
        open_source(f"tar:{path}")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", b"x"), ("a.cls", b"cat")], "member 'a.cls' holds b'cat', expected the number of a class"),
        ([("a.png", b"x"), ("a.cls", b"-2")], "member 'a.cls' holds b'-2'"),
        ([("a.png", b"x"), ("a.json", b"{")], "member 'a.json' is no JSON"),
        ([("a.png", b"x"), ("a.json", b'{"label": "cat"}')], "member 'a.json' has the label 'cat'"),
        ([("a.1.png", b"x"), ("a.2.png", b"x")], "sample 'a' has two images, 'a.1.png' and 'a.2.png'"),
        ([("a.txt", b"x"), ("a.cls", b"1")], "holds no images"),
    ],
)
def test_samples_that_are_refused(tmp_path: Path, members: list[Member], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_source(f"tar:{write_tar(tmp_path / 'a.tar', members)}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("missing.tar", "matches no file"),
        ("train-{3..1}.tar", "the range in braces is empty"),
        ("train-{0..3}.tar", "train-2.tar matches no file"),
        ("empty", "without \\*.tar files"),
        ("mixed", "several parts \\(imagenet-train, imagenet-validation\\)"),
        ("hf://org/set/a.tar", "is written hf://datasets/ORG/NAME/PATTERN"),
    ],
)
def test_wrong_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("train-0", "train-1", "mixed/imagenet-train-00", "mixed/imagenet-validation-00"):
        write_tar(tmp_path / f"{name}.tar", numbered(0, 1))
    with pytest.raises(UserError, match=message):
        open_source(f"tar:{spec}")


def test_a_file_that_is_damaged_or_changes_is_a_bad_sample(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "a.tar",
        [("0.png", image_file(0)[:40]), ("1.png", image_file(1)), ("2.png", image_file(2))],
    )
    source = open_source(f"tar:{path}")
    with pytest.raises(DecodeError):
        source.read(0)
    assert level(source, 1) == 1
    os.truncate(path, int(source.index.offsets_N[2]) + 10)
    assert level(source, 1) == 1
    with pytest.raises(DecodeError, match=r"gave 10 of \d+ bytes"):
        source.read(2)
    path.unlink()
    with pytest.raises(DecodeError, match="cannot be read: No such file"):
        pickle.loads(pickle.dumps(source)).read(1)


def test_fewer_files_are_open_than_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_OPEN_FILES", 3)
    for number in range(8):
        write_tar(tmp_path / f"{number}.tar", numbered(number, number + 1))
    source = open_source(f"tar:{tmp_path}")
    num_open = len(os.listdir("/proc/self/fd"))
    assert [level(source, i) for i in [*range(8), 0, 7]] == [*range(8), 0, 7]
    assert len(os.listdir("/proc/self/fd")) - num_open <= 3
    del source
    assert len(os.listdir("/proc/self/fd")) <= num_open


def test_a_copy_for_a_worker_is_small_and_reads(tmp_path: Path) -> None:
    source = open_source(f"tar:{write_tar(tmp_path / 'a.tar', numbered(0, 200))}")
    assert level(source, 7) == 7
    copy = pickle.dumps(source)
    assert len(copy) < 200 * 60  # 28 bytes of numbers and 8 of a name, for each
    assert level(pickle.loads(copy), 199) == 199


def test_fingerprint_follows_the_content_not_the_place(tmp_path: Path) -> None:
    for folder, num_images in (("one", 3), ("two", 3), ("three", 4)):
        write_tar(tmp_path / folder / "a.tar", numbered(0, num_images))
    one, two, three = (open_source(f"tar:{tmp_path / name}").fingerprint for name in ("one", "two", "three"))
    assert one == two != three


def test_a_worker_reads_the_same_batches(tmp_path: Path) -> None:
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", numbered(20 * number, 20 * number + 20))
    source = open_source(f"tar:{tmp_path}")
    assert level(source, 0) == 0  # a shard is open here
    epochs = []
    for num_workers in (0, 1):
        loader = TrainLoader(
            source, ImageAlone(evaluation_transform(4)), seed=1, global_batch=12, micro_batch=6, rank=0, world_size=1,
            num_workers=num_workers,
        )  # fmt: skip
        steps = loader.iterate(0)
        epochs.append([batch for _ in range(loader.steps_per_epoch) for batch in next(steps)])
        steps.close()
    for alone, worked in zip(*epochs, strict=True):
        assert torch.equal(alone.images, worked.images)
        assert torch.equal(alone.labels, worked.labels)
    labels = torch.cat([batch.labels for batch in epochs[0]])
    assert sorted(labels.tolist()) == list(range(60))
    assert torch.equal(torch.cat([batch.images[:, 0, 0, 0] for batch in epochs[0]]).long(), labels)
