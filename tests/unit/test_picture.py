"""Pictures: the pixels of Pillow, decoded no larger than a crop needs, and refused where Pillow refuses."""

import io

import numpy as np
import pytest
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torchvision.transforms.v2.functional import pil_to_tensor

from fd_scale.data.decode import DecodeError, decode
from fd_scale.data.picture import Box, Picture, tensor_of


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """Smooth and sharp parts, as a photo has them; neither side is a multiple of 16."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((637, 475), 2)
    edges = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((637, 475), 0)
    return Image.blend(coarse, edges, 0.3).filter(ImageFilter.GaussianBlur(1))


def jpeg(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **({"quality": 92} | options))
    return buffer.getvalue()


@pytest.fixture
def decoded_sizes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Height and width of each decode that follows."""
    sizes: list[tuple[int, ...]] = []
    whole = simplejpeg.decode_jpeg

    def counted(*args: object, **options: object) -> np.ndarray:
        pixels = whole(*args, **options)
        sizes.append(pixels.shape[:2])
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", counted)
    return sizes


@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 2}, {"progressive": True}], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_pixels_are_pillows(photo: Image.Image, mode: str, options: dict[str, object]) -> None:
    data = jpeg(photo.convert(mode), **options)
    picture = Picture(data)
    assert picture.size == (637, 475)
    np.testing.assert_array_equal(np.asarray(picture.pil()), np.asarray(decode(data)))


def test_a_plain_file_is_not_opened_by_pillow(photo: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes ten times as long to read its header; one that may be turned is."""
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    turned = Picture(jpeg(photo, xmp=xmp))
    assert turned.size == (475, 637) == decode(jpeg(photo, xmp=xmp)).size
    data = jpeg(photo, icc_profile=b"profile" * 1000, comment=b"Exif\0\0")
    expected = np.asarray(decode(data))
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("Pillow was asked"))
    np.testing.assert_array_equal(np.asarray(Picture(data).pil()), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_it_stands_upright(photo: Image.Image, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg(photo, exif=exif)
    picture, expected = Picture(data), decode(data)
    assert picture.size == expected.size, "known from the header"
    np.testing.assert_array_equal(np.asarray(picture.pil()), np.asarray(expected))
    # Eight times as large as wanted: turned images are decoded whole all the same.
    crop = Picture(data).crop(Box(40, 60, 400, 400), 50, "bilinear")
    assert_near(crop, expected.crop((40, 60, 440, 460)).resize((50, 50), Image.Resampling.BILINEAR), 8)


def assert_near(found: torch.Tensor, expected: Image.Image, levels: float) -> None:
    """Their mean difference is below so many grey levels."""
    expected_CHW = torch.from_numpy(np.array(expected)).permute(2, 0, 1)
    assert (found.float() - expected_CHW.float()).abs().mean() < levels


@pytest.mark.parametrize(
    ("side", "part"), [(400, 1), (201, 1), (200, 2), (101, 2), (100, 4), (51, 4), (50, 8), (7, 8)]
)
def test_the_scale_is_the_smallest_that_is_large_enough(
    photo: Image.Image, decoded_sizes: list[tuple[int, ...]], side: int, part: int
) -> None:
    box, picture = Box(101, 43, 460, 400), Picture(jpeg(photo))
    picture.num_crops = 2
    crop = picture.crop(box, side, "bilinear")
    assert decoded_sizes == [(-(-475 // part), -(-637 // part))]
    assert crop.shape == (3, side, side)
    assert crop.dtype == torch.uint8
    whole = decode(jpeg(photo)).crop((101, 43, 561, 443)).resize((side, side), Image.Resampling.BILINEAR)
    # At full scale there is only rounding. Reduced, the image is smoothed twice, by the DCT and by the resize.
    assert_near(crop, whole, 0.05 if part == 1 else 2.5)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_of_one_crop_no_more_is_decoded(
    photo: Image.Image, decoded_sizes: list[tuple[int, ...]], interpolation: str
) -> None:
    box, several = Box(101, 43, 260, 200), Picture(jpeg(photo))
    crop = Picture(jpeg(photo)).crop(box, 180, interpolation)
    assert decoded_sizes == []
    several.num_crops = 2
    assert torch.equal(crop, several.crop(box, 180, interpolation))
    assert decoded_sizes == [(475, 637)]


def test_a_file_that_ends_within_its_crop_is_refused(photo: Image.Image) -> None:
    data = jpeg(photo)
    cut = data[: len(data) // 2]
    upper, lower = Box(10, 10, 300, 100), Box(10, 300, 300, 100)
    assert torch.equal(Picture(cut).crop(upper, 90, "bilinear"), Picture(data).crop(upper, 90, "bilinear"))
    with pytest.raises(DecodeError):
        Picture(cut).crop(lower, 90, "bilinear")


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_reduced_crop_is_that_of_block_means(photo: Image.Image, interpolation: str) -> None:
    """An eighth of the size is one pixel a block, its first coefficient; edges lie between these."""
    data = jpeg(photo, subsampling=0, quality=100)
    found = Picture(data).crop(Box(67, 30, 509, 386), 48, interpolation)
    whole_BCHW = torch.from_numpy(np.array(decode(data)))[:472, :632].permute(2, 0, 1)[None].double()
    means_HWC = F.avg_pool2d(whole_BCHW, 8)[0].permute(1, 2, 0).round().to(torch.uint8).numpy()
    resample = Image.Resampling[interpolation.upper()]
    edges = (67 / 8, 30 / 8, (67 + 509) / 8, (30 + 386) / 8)
    expected = np.array(Image.fromarray(means_HWC).resize((48, 48), resample, edges)).transpose(2, 0, 1)
    # Luma and chroma are rounded before they become colours, in which a level of chroma is up to 1.8 levels.
    assert np.abs(found.numpy().astype(int) - expected).max() <= 3


def test_what_is_decoded_serves_further_crops(
    photo: Image.Image, decoded_sizes: list[tuple[int, ...]]
) -> None:
    picture = Picture(jpeg(photo))
    picture.num_crops = 5
    for side in (100, 20, 180):
        picture.crop(Box(0, 0, 460, 460), side, "bilinear")
    assert decoded_sizes == [(119, 160), (238, 319)], "a quarter; then the same, fine enough; then half"
    picture.pil()
    picture.crop(Box(0, 0, 460, 460), 20, "bilinear")
    assert decoded_sizes[2:] == [(475, 637)]


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.999])
@pytest.mark.parametrize("progressive", [False, True])
def test_truncated_files_are_refused(photo: Image.Image, share: float, progressive: bool) -> None:
    data = jpeg(photo, progressive=progressive)
    data = data[: int(share * len(data))]
    for look in (lambda: Picture(data).pil(), lambda: Picture(data).crop(Box(0, 0, 400, 400), 50, "bicubic")):
        with pytest.raises(DecodeError):
            look()


def test_damaged_files_are_refused_or_read_as_pillow_does(photo: Image.Image) -> None:
    rng = np.random.default_rng(1)
    whole = np.frombuffer(jpeg(photo.crop((0, 0, 60, 40))), dtype=np.uint8)
    outcomes = set()
    for _ in range(300):
        damaged = whole.copy()
        damaged[rng.integers(0, len(whole), 2)] = rng.integers(0, 256, 2)
        try:
            expected = np.asarray(decode(damaged.tobytes()))
        except DecodeError:
            expected = None
        try:
            found = np.asarray(Picture(damaged.tobytes()).pil())
        except DecodeError:
            found = None
        if found is not None and expected is not None:
            np.testing.assert_array_equal(found, expected)
        outcomes.add((found is None, expected is None))
    assert outcomes == {(False, False), (True, True)}


def test_other_formats_and_images_in_memory(photo: Image.Image) -> None:
    buffer = io.BytesIO()
    photo.save(buffer, "PNG")
    expected = photo.crop((10, 20, 110, 140)).resize((32, 32), Image.Resampling.BICUBIC)
    for picture in (Picture(buffer.getvalue()), Picture.of(photo)):
        assert picture.size == photo.size
        np.testing.assert_array_equal(np.asarray(picture.pil()), np.asarray(photo))
        assert_near(picture.crop(Box(10, 20, 100, 120), 32, "bicubic"), expected, 0.2)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_tensor_is_torchvisions(mode: str, photo: Image.Image) -> None:
    image = photo.convert(mode)
    assert torch.equal(tensor_of(image), pil_to_tensor(image))
