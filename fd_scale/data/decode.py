"""Bytes of an image file to an 8-bit RGB image, or to the numbers that a mask holds."""

import contextlib
import io
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, UnidentifiedImageError

# Formats outside this list are refused unseen: some of Pillow's plugins start other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
# Pillow warns at this size (0.25 GiB as RGB) and raises at twice as much; here it is an error at once.
MAX_PIXELS = 1024**3 // 4 // 3

# What Pillow's decoders raise on damaged files (OSError includes its UnidentifiedImageError).
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    OverflowError,
    RuntimeError,
    struct.error,
    Image.DecompressionBombError,
)

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class DecodeError(Exception):
    """The bytes are no image that can be decoded; the message says why."""


def decode(data: bytes) -> Image.Image:
    """Decodes an image file, upright and as 8-bit RGB.

    The EXIF orientation is applied. 16-bit grey is scaled to 8 bits (65535 becomes 255). Alpha is
    dropped, not composited: the stored colours stay as they are, also under transparent pixels. Of
    an animation the first frame is taken.

    Args:
        data: the whole file, in one of `FORMATS`.

    Returns:
        Image of mode RGB, at least one pixel in size.

    Raises:
        DecodeError: truncated, damaged, no image, unsupported, or more than `MAX_PIXELS` pixels.
    """
    with _damage_named():
        image = _opened(data)
        image.load()
        orientation = image.getexif().get(_EXIF_ORIENTATION)
        image = _to_rgb(image)
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


class JpegHeader(NamedTuple):
    """What `decode` will make of a JPEG file."""

    width: int
    """As stored, in pixels."""
    height: int
    turn: Image.Transpose | None
    """What turns it upright."""


def jpeg_header(data: bytes) -> JpegHeader | None:
    """Returns the header of a JPEG file that is grey or of three channels, none of any other image.

    Raises:
        DecodeError: no image, unsupported, or more than `MAX_PIXELS` pixels.
    """
    if _is_plain_jpeg(data):
        # Nothing need be asked of Pillow, which takes ten times as long.
        with contextlib.suppress(ValueError):
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
            if colours in ("YCbCr", "RGB", "Gray"):
                _refuse_large(width, height)
                return JpegHeader(width, height, None)
    with _damage_named():
        image = _opened(data)
        if image.format != "JPEG" or image.mode not in ("RGB", "L"):
            return None
        orientation: Any = image.getexif().get(_EXIF_ORIENTATION)
        return JpegHeader(*image.size, _UPRIGHT.get(orientation))


def decode_mask(data: bytes) -> npt.NDArray[np.uint8]:
    """Decodes a mask: of a grey image its values, of one with a palette its indices.

    Args:
        data: the whole file, in one of `FORMATS`.

    Returns:
        mask_HW, uint8, as stored: no orientation is applied.

    Raises:
        DecodeError: as of `decode`, or its pixels are no single numbers of 8 bits.
    """
    with _damage_named():
        image = _opened(data)
        image.load()
    # Behind the signature of a PNG and the name of its first chunk: width, height, bits of a pixel, kind of colour.
    bits, kind = data[24:26] if image.format == "PNG" else (8, 0)
    if image.mode not in ("L", "P", "1") and not image.mode.startswith("I"):
        raise DecodeError(
            f"a mask of mode {image.mode}, expected grey or a palette: one number for each pixel"
        )
    mask_HW = np.asarray(image)
    if kind == 0 and bits in (2, 4):
        mask_HW = mask_HW // (255 // (2**bits - 1))  # Pillow spreads the grey of few bits over 0 to 255
    if mask_HW.min() < 0 or mask_HW.max() > 255:
        raise DecodeError(f"a mask with values {mask_HW.min()} to {mask_HW.max()}, expected 0 to 255")
    return mask_HW.astype(np.uint8)


def _is_plain_jpeg(data: bytes) -> bool:
    """Whether a file is a JPEG with nothing that could tell its orientation: EXIF and XMP are segments APP1."""
    at = 2
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] not in (b"\xe1", b"\xff", b""):
        if data[at + 1] == 0xDA:  # the pixels begin
            return data.startswith(b"\xff\xd8")
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return False


@contextlib.contextmanager
def _damage_named() -> Iterator[None]:
    try:
        yield
    except UnidentifiedImageError as error:  # it names an object of ours
        raise DecodeError("it is no image file, or a damaged one") from error
    except _DAMAGE as error:
        raise DecodeError(f"{type(error).__name__}: {error}") from error


def _opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    _refuse_large(image.width, image.height)
    return image


def _refuse_large(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DecodeError(f"{width} x {height} pixels are more than {MAX_PIXELS}")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise DecodeError("floating-point pixels have no defined range")
    if image.mode.startswith("I"):  # Pillow's own conversion clips at 255 instead of scaling
        grey_HW = np.asarray(image).astype(np.int64)
        if grey_HW.min() < 0 or grey_HW.max() > 65535:
            raise DecodeError("32-bit grey pixels have no defined range")
        image = Image.fromarray(((grey_HW + 128) // 257).astype(np.uint8))
    if image.mode == "P":  # straight to RGB, Pillow warns about a palette with transparency
        image = image.convert("RGBA")
    return image.convert("RGB")
