"""Images with masks: what a pixel's value means, and what is refused."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fd_scale.config import SourceConfig
from fd_scale.data import open_source, subset
from fd_scale.data.decode import DecodeError, decode_mask
from fd_scale.data.masks import ade20k_names
from fd_scale.errors import UserError

WriteShapes = Callable[..., str]


def saved(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def ade20k(root: Path, values: np.ndarray, part: str = "validation") -> Path:
    """One image and its mask in the layout of ADEChallengeData2016."""
    for folder in ("images", "annotations"):
        (root / folder / part).mkdir(parents=True)
    Image.new("RGB", values.shape[::-1]).save(root / f"images/{part}/ADE_val_00000001.jpg")
    Image.fromarray(values).save(root / f"annotations/{part}/ADE_val_00000001.png")
    return root


def test_grey_and_palette_are_numbers() -> None:
    values = np.array([[0, 1, 150], [255, 7, 0]], dtype=np.uint8)
    grey = Image.fromarray(values)
    with_palette = Image.fromarray(values, mode="P")
    with_palette.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    deep = Image.fromarray(values.astype(np.uint16))
    for image in (grey, with_palette, deep):
        np.testing.assert_array_equal(decode_mask(saved(image)), values)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_of_few_bits_is_what_the_file_holds(bits: int) -> None:
    """Pillow makes 0 to 255 of it, as of a picture: class 1 of 16 would be 17."""
    values = np.arange(2**bits, dtype=np.uint8).reshape(2, -1)
    places = np.unpackbits(values[..., None], axis=-1)[..., -bits:].reshape(2, -1)
    rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in places)  # no filter
    header = struct.pack(">IIBBBBB", values.shape[1], 2, bits, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )
    np.testing.assert_array_equal(decode_mask(b"\x89PNG\r\n\x1a\n" + b"".join(parts)), values)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (Image.new("RGB", (2, 2)), "a mask of mode RGB, expected grey or a palette"),
        (Image.fromarray(np.full((2, 2), 300, dtype=np.uint16)), "values 300 to 300, expected 0 to 255"),
    ],
)
def test_what_is_no_mask(image: Image.Image, words: str) -> None:
    with pytest.raises(DecodeError, match=words):
        decode_mask(saved(image))


def test_ade20k_counts_from_1_and_ignores_0(tmp_path: Path) -> None:
    source = open_source(f"ade20k_val:{ade20k(tmp_path, np.array([[0, 1], [2, 150]], dtype=np.uint8))}")
    image, mask = source.read(0)
    assert image.size == mask.size == (2, 2)
    np.testing.assert_array_equal(np.asarray(mask), [[255, 0], [1, 149]])
    assert (source.num_classes, len(source), source.targets) == (150, 1, "masks")
    assert source.class_names == ade20k_names()
    assert (ade20k_names()[0], ade20k_names()[-1], len(set(ade20k_names()))) == ("wall", "flag", 150)


def test_a_list_of_classes_says_what_values_mean(tmp_path: Path, write_shapes: WriteShapes) -> None:
    source = open_source(write_shapes(tmp_path / "shapes", count=2))
    before = [np.asarray(source.read(index)[1]) for index in range(2)]
    assert set(np.unique(before[1])) == {0, 1, 2, 255}
    fingerprint = source.fingerprint
    (tmp_path / "shapes/classes.txt").write_text("-\ndisc\nsquare\n")
    zero_is_ignored = open_source(f"masks:{tmp_path / 'shapes'}")
    assert (zero_is_ignored.class_names, zero_is_ignored.num_classes) == (["disc", "square"], 2)
    expected = np.where(before[0] == 0, 255, before[0] - 1)
    np.testing.assert_array_equal(np.asarray(zero_is_ignored.read(0)[1]), expected)
    assert zero_is_ignored.fingerprint != fingerprint
    assert subset(source, [1]).targets == "masks"
    np.testing.assert_array_equal(np.asarray(subset(source, [1]).read(0)[1]), before[1])


def test_a_mask_that_does_not_fit_names_its_file(tmp_path: Path, write_shapes: WriteShapes) -> None:
    source = open_source(write_shapes(tmp_path, count=4))
    width, height = source.read(0)[0].size
    Image.new("L", (width + 1, height)).save(tmp_path / "masks/0.png")
    with pytest.raises(
        DecodeError, match=rf"masks/0.png is {width + 1} x {height} px, and the image {width} x {height}"
    ):
        source.read(0)
    Image.new("L", source.read(1)[0].size, 3).save(tmp_path / "masks/1.png")
    with pytest.raises(DecodeError, match=r"masks/1.png has the value 3, which is none of the 3 classes"):
        source.read(1)
    (tmp_path / "masks/2.png").write_bytes((tmp_path / "masks/2.png").read_bytes()[:60])
    with pytest.raises(DecodeError, match=r"its mask .*masks/2.png: "):
        source.read(2)
    (tmp_path / "masks/3.png").unlink()
    with pytest.raises(DecodeError, match=r"masks/3.png cannot be read"):
        source.read(3)


@pytest.mark.parametrize(
    ("text", "words"),
    [("ground\ndisc\nsquare\n\n", "an empty line"), ("ground\ndisc\nground\n", "'ground' twice")],
)
def test_a_list_of_classes_that_is_none(
    tmp_path: Path, write_shapes: WriteShapes, text: str, words: str
) -> None:
    spec = write_shapes(tmp_path / "shapes", count=1)
    (tmp_path / "shapes/classes.txt").write_text(text)
    with pytest.raises(UserError, match=f"classes.txt has {words}; expected a class of its own in each line"):
        open_source(spec)


def test_a_byte_order_mark_is_no_part_of_a_class(tmp_path: Path, write_shapes: WriteShapes) -> None:
    spec = write_shapes(tmp_path / "shapes", count=1)
    (tmp_path / "shapes/classes.txt").write_text("-\ndisc\nsquare\n", encoding="utf-8-sig")
    assert open_source(spec).class_names == ["disc", "square"]


def test_masks_and_labels_are_not_mixed(tmp_path: Path, write_shapes: WriteShapes) -> None:
    spec = write_shapes(tmp_path / "shapes", count=2)
    for name in ("disc", "ground", "square"):
        (tmp_path / "labelled" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "labelled" / name / "0.png")
    (tmp_path / "shapes/classes.txt").write_text("disc\nground\nsquare\n")
    mixed = [SourceConfig(source=spec), SourceConfig(source=f"imagefolder:{tmp_path}/labelled")]
    with pytest.raises(UserError, match="one has masks and one labels; expected one kind"):
        open_source(mixed)


def test_folders_that_are_refused(tmp_path: Path, write_shapes: WriteShapes) -> None:
    with pytest.raises(UserError, match=r"ade20k_train:.*images/training is not a folder"):
        open_source(f"ade20k_train:{tmp_path}")
    with pytest.raises(UserError, match=r"classes.txt cannot be read .*expected a class in each line"):
        open_source(f"masks:{tmp_path}")
    spec = write_shapes(tmp_path / "shapes", count=3)
    (tmp_path / "shapes/masks/1.png").unlink()
    with pytest.raises(UserError, match=r"1 of 3 images have no mask, the first misses .*masks/1.png"):
        open_source(spec)
    (tmp_path / "shapes/classes.txt").write_text("ground\n")
    with pytest.raises(UserError, match="1 classes; expected 2 to 253"):
        open_source(spec)
