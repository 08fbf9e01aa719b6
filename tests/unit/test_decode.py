"""Image files of every kind to 8-bit RGB."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from fd_scale.data.decode import DecodeError, decode


def encode(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def png_start(width: int, height: int) -> bytes:
    """A PNG file up to its pixels, which are missing."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + checksum + b"\0\0\1\0IDAT"


def pixels(data: bytes) -> np.ndarray:
    image = decode(data)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.fixture
def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))


def test_rgb_is_kept(noise: Image.Image) -> None:
    assert np.array_equal(pixels(encode(noise)), np.asarray(noise))


def test_grey_fills_three_equal_channels(noise: Image.Image) -> None:
    grey = noise.convert("L")
    assert np.array_equal(pixels(encode(grey)), np.stack([np.asarray(grey)] * 3, axis=-1))


def test_black_and_white(noise: Image.Image) -> None:
    bilevel = noise.convert("1")
    assert np.array_equal(pixels(encode(bilevel))[..., 0] == 255, np.asarray(bilevel))


def test_palette_with_transparency_keeps_its_colours_without_a_warning() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rgb = pixels(encode(image, transparency=bytes([0, 128])))
    assert rgb.tolist() == [[[10, 20, 30], [200, 100, 50]]]


def test_alpha_is_dropped_not_composited() -> None:
    assert pixels(encode(Image.new("RGBA", (1, 1), (10, 20, 30, 0)))).tolist() == [[[10, 20, 30]]]


def test_cmyk_jpeg() -> None:
    rgb = pixels(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100))
    # Full magenta and yellow is red; JPEG at quality 100 is off by a level or two.
    assert np.abs(rgb.astype(int) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_not_clipped(file_format: str) -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65535]], dtype=np.uint16)
    rgb = pixels(encode(Image.fromarray(values), file_format))
    assert rgb[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]  # value / 257, rounded
    assert np.array_equal(rgb[..., 0], rgb[..., 2])


@pytest.mark.parametrize("value", [np.int32(70_000), np.int32(-1), np.float32(0.5)])
def test_grey_without_a_defined_range_is_refused(value: np.generic) -> None:
    with pytest.raises(DecodeError, match="no defined range"):
        decode(encode(Image.fromarray(np.full((2, 2), value)), "TIFF"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int, noise: Image.Image) -> None:
    upright = np.asarray(noise)
    # How a camera that was held so stores the upright picture (EXIF 2.3, tag 0x0112).
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    assert np.array_equal(pixels(data), upright)


def test_unknown_exif_orientation_is_ignored(noise: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 99
    assert np.array_equal(pixels(encode(noise, exif=exif)), np.asarray(noise))


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_one_pixel(file_format: str) -> None:
    assert pixels(encode(Image.new("RGB", (1, 1), (255, 255, 255)), file_format)).shape == (1, 1, 3)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_truncated_file(file_format: str, noise: Image.Image) -> None:
    data = encode(noise, file_format)
    with pytest.raises(DecodeError):
        decode(data[: len(data) * 2 // 3])


@pytest.mark.parametrize("data", [b"", b"no image", bytes(1000)])
def test_garbage(data: bytes) -> None:
    with pytest.raises(DecodeError):
        decode(data)


def test_format_that_is_not_on_the_list_is_refused(noise: Image.Image) -> None:
    data = encode(noise, "PCX")
    assert Image.open(io.BytesIO(data)).size == noise.size
    with pytest.raises(DecodeError, match="it is no image file"):
        decode(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 60_000])
def test_decompression_bomb(side: int) -> None:
    with pytest.raises(DecodeError, match=r"pixels|decompression bomb"):
        decode(png_start(side, side))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about damaged metadata
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "AVIF", "JPEG2000"])
def test_damaged_bytes_decode_or_raise_decode_error(file_format: str, noise: Image.Image) -> None:
    rng = np.random.default_rng(1)
    whole = np.frombuffer(encode(noise, file_format), dtype=np.uint8)
    num_refused = 0
    for _ in range(100):
        damaged = whole.copy()
        damaged[rng.integers(0, min(len(whole), 200), 4)] = rng.integers(0, 256, 4)
        try:
            assert decode(damaged.tobytes()).mode == "RGB"
        except DecodeError:
            num_refused += 1
    assert num_refused > 0
