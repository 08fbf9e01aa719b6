"""A rectangle of a JPEG file without the rest of it: nvImageCodec's libjpeg-turbo, on the CPU.

What lies below the rectangle is not read, what lies beside and above it is not turned into pixels.

Shape legend: h, w = pixels of the rectangle.
"""

import contextlib
import importlib.util
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

NARROWEST = 16
"""Pixels; of less, libjpeg-turbo interpolates chroma in another way at the left edge."""

_OF_THREAD = threading.local()  # nvImageCodec mixes up what several threads ask of one decoder
_LOADING = threading.Lock()


def decode_region(data: bytes, left: int, top: int, width: int, height: int) -> npt.NDArray[np.uint8] | None:
    """Returns the pixels that the decode of the whole file has there, bit for bit.

    Of a damaged progressive file some pixels at the edge may be others.

    Args:
        data: a JPEG file, grey or of three channels.
        left: of the rectangle, which is within the image, in pixels as stored.
        top: as left.
        width: as left, at least 1.
        height: as width.

    Returns:
        pixels_hwC, uint8 RGB; none where the file is truncated above the rectangle's end, where the decoder refuses
        it, where the rectangle is narrower than `NARROWEST`, and where there is no working nvImageCodec.
    """
    if width < NARROWEST or (decode := _decoder()) is None:
        return None
    try:
        image = decode(data, top, left, top + height, left + width)
    except RuntimeError:
        return None
    return None if image is None else np.asarray(image)


def _decoder() -> Callable[..., Any] | None:
    if not hasattr(_OF_THREAD, "decoder"):
        with _LOADING:
            _OF_THREAD.decoder = _new_decoder()
    decoder: Callable[..., Any] | None = _OF_THREAD.decoder
    return decoder


def _new_decoder() -> Callable[..., Any] | None:
    with contextlib.suppress(ImportError, OSError, RuntimeError), _plugins_that_decode_jpeg():
        from nvidia import nvimgcodec

        decoder = nvimgcodec.Decoder(
            device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
            max_num_cpu_threads=1,
            backends=[nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)],
            options=":fancy_upsampling=1 :fast_idct=0",  # as libjpeg-turbo does unless told otherwise
        )
        params = nvimgcodec.DecodeParams(apply_exif_orientation=False, color_spec=nvimgcodec.ColorSpec.SRGB)

        def decode(data: bytes, *edges: int) -> Any:
            region = nvimgcodec.CodeStream(data).get_sub_code_stream(region=nvimgcodec.Region(*edges))
            return decoder.decode(region, params=params)

        return decode
    return None


@contextlib.contextmanager
def _plugins_that_decode_jpeg() -> Iterator[None]:
    """Has nvImageCodec load this plugin alone: the others' libraries are large, and missing ones are complained of."""
    spec = importlib.util.find_spec("nvidia.nvimgcodec")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("nvidia.nvimgcodec")
    package = spec.submodule_search_locations[0]
    settings = {"NVIMGCODEC_EXTENSIONS_PATH": "", "PYNVIMGCODEC_VERBOSITY": "0"}
    before = {name: os.environ[name] for name in settings if name in os.environ}
    with tempfile.TemporaryDirectory() as folder:
        for plugin in Path(package, "extensions").glob("libjpeg_turbo_ext.so*"):
            Path(folder, plugin.name).symlink_to(plugin)
        os.environ.update(settings | {"NVIMGCODEC_EXTENSIONS_PATH": folder})
        try:
            yield
        finally:
            for name in settings:
                del os.environ[name]
            os.environ.update(before)
