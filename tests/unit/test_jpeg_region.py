"""A rectangle of a JPEG file: Pillow's pixels to the last bit, damaged or not, and nothing said on the way."""

import io
import subprocess
import sys
import tempfile
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from fd_scale.data import jpeg_region
from fd_scale.data.jpeg_region import NARROWEST, decode_region

SIZE = (139, 93)  # neither side a multiple of the 8 or 16 pixels that are decoded together


def jpeg(mode: str = "RGB", **options: object) -> bytes:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    noise.resize(SIZE, Image.Resampling.BILINEAR).convert(mode).save(
        buffer, "JPEG", **({"quality": 90} | options)
    )
    return buffer.getvalue()


def whole(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def draw_box(rng: np.random.Generator) -> tuple[int, int, int, int]:
    width, height = int(rng.integers(NARROWEST, SIZE[0] + 1)), int(rng.integers(1, SIZE[1] + 1))
    return int(rng.integers(SIZE[0] - width + 1)), int(rng.integers(SIZE[1] - height + 1)), width, height


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": "4:4:4"}, {"subsampling": "4:2:2"}, {"subsampling": "4:2:0"}, {"subsampling": "4:1:1"},
        {"progressive": True}, {"restart_marker_rows": 1}, {"keep_rgb": True},
    ],
    ids=str,
)  # fmt: skip
def test_pixels_are_those_of_the_whole(mode: str, options: dict[str, object]) -> None:
    """Chroma is smoothed over the edge of what is decoded together, so a crop's edge is where it would go wrong."""
    data, rng = jpeg(mode, **options), np.random.default_rng(1)
    expected = whole(data)
    boxes = [(0, 0, *SIZE), (0, 0, NARROWEST, 1), (SIZE[0] - NARROWEST, SIZE[1] - 1, NARROWEST, 1)]
    for left, top, width, height in [*boxes, *(draw_box(rng) for _ in range(100))]:
        found = decode_region(data, left, top, width, height)
        np.testing.assert_array_equal(found, expected[top : top + height, left : left + width])


def test_what_is_missing_below_a_rectangle_is_not_missed(capfd: pytest.CaptureFixture[str]) -> None:
    data = jpeg()
    cut = data[: len(data) // 2]
    assert decode_region(cut, 0, 60, 50, 33) is None
    assert decode_region(cut, 0, 0, *SIZE) is None
    np.testing.assert_array_equal(decode_region(cut, 20, 0, 50, 20), whole(data)[:20, 20:70])
    assert decode_region(b"no image", 0, 0, 20, 1) is None
    assert capfd.readouterr() == ("", "")


def test_a_narrower_rectangle_is_left_to_the_whole_decode() -> None:
    assert decode_region(jpeg(), 0, 0, NARROWEST - 1, 9) is None


def test_threads_do_not_get_in_each_others_way() -> None:
    data = jpeg()
    expected, boxes = whole(data), [draw_box(np.random.default_rng(seed)) for seed in range(200)]

    def right(box: tuple[int, int, int, int]) -> bool:
        left, top, width, height = box
        return np.array_equal(decode_region(data, *box), expected[top : top + height, left : left + width])

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(right, boxes))


def test_damaged_files_are_read_as_pillow_does() -> None:
    """Baseline ones; of a progressive file what is missing is smoothed, at a crop's edge in another way."""
    rng = np.random.default_rng(2)
    undamaged = np.frombuffer(jpeg(), dtype=np.uint8)
    compared = 0
    for _ in range(300):
        damaged = undamaged.copy()
        damaged[rng.integers(0, len(damaged), 2)] = rng.integers(0, 256, 2)
        left, top, width, height = draw_box(rng)
        try:
            expected = whole(damaged.tobytes())
        except (OSError, SyntaxError, ValueError):
            continue
        found = decode_region(damaged.tobytes(), left, top, width, height)
        if found is not None and expected.shape[1::-1] == SIZE:
            np.testing.assert_array_equal(found, expected[top : top + height, left : left + width])
            compared += 1
    assert compared > 200


def test_the_decoder_loads_its_own_plugin_and_says_nothing() -> None:
    """Those for a GPU would name, on any machine without their libraries, what is to be installed."""
    code = """
        import io, os
        from PIL import Image
        from fd_scale.data.jpeg_region import NARROWEST, decode_region
        buffer, before = io.BytesIO(), dict(os.environ)
        Image.new("RGB", (32, 32)).save(buffer, "JPEG")
        assert decode_region(buffer.getvalue(), 0, 0, 20, 8).shape == (8, 20, 3)
        assert dict(os.environ) == before
    """
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert (found.stdout, found.stderr) == ("", "")


@pytest.mark.parametrize("missing", ["package", "temporary folder"])
def test_where_it_cannot_be_loaded_there_is_no_region(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setattr(jpeg_region, "_OF_THREAD", threading.local())
    if missing == "package":
        monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", None)
    else:
        monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    assert decode_region(jpeg(), 0, 0, 20, 8) is None
