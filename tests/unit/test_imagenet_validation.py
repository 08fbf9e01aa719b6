"""ImageNet's validation images and its development kit: against torchvision's reader of the same kit."""

import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import imagenet

from fd_scale.data import open_source
from fd_scale.errors import UserError

# Class numbers of the kit are in another order than the IDs; the fourth is an inner node.
NUMBERS = {1: "n03", 2: "n01", 3: "n02", 4: "n00"}
TRUTHS = [1, 3, 3, 2, 1]
KIT = "ILSVRC2012_devkit_t12"


def write_kit(root: Path, truths: list[int] = TRUTHS) -> None:
    data = root / KIT / "data"
    data.mkdir(parents=True)
    kinds = [(name, "O") for name in ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children")]
    rows = [
        (number, name, f"thing {number}", "a thing", 3 * (number == 4)) for number, name in NUMBERS.items()
    ]
    synsets = np.array(rows, dtype=kinds)
    savemat(data / "meta.mat", {"synsets": synsets[:, None]})
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{truth}\n" for truth in truths))


def write_images(root: Path, numbers: list[int]) -> None:
    (root / "val").mkdir()
    for number in numbers:
        Image.new("RGB", (8, 8), (number, 0, 0)).save(root / "val" / f"ILSVRC2012_val_{number:08}.JPEG")


@pytest.fixture
def refused(tmp_path: Path) -> Callable[[], str]:
    """Returns a function that opens what the test wrote, and gives what is said."""

    def open_it() -> str:
        with pytest.raises(UserError) as error:
            open_source(f"imagenet_val:{tmp_path}")
        return str(error.value)

    return open_it


def test_labels_are_torchvisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_kit(tmp_path)
    write_images(tmp_path, [1, 2, 3, 5])
    source = open_source(f"imagenet_val:{tmp_path}")
    with tarfile.open(tmp_path / "kit.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / KIT, KIT)
    monkeypatch.setattr(imagenet, "_verify_archive", lambda *_: None)  # the checksum is of the real one
    imagenet.parse_devkit_archive(str(tmp_path), "kit.tar.gz")
    _, wordnet_ids = torch.load(tmp_path / imagenet.META_FILE)
    assert source.class_names == ["n01", "n02", "n03"]
    found = [source.class_names[label] for label in source.all_labels()]
    assert found == [wordnet_ids[number - 1] for number in (1, 2, 3, 5)]
    image, label = source.read(3)
    assert (image.size, label) == ((8, 8), 2)
    assert source.key(3) == "val/ILSVRC2012_val_00000005.JPEG"


def test_what_is_missing_is_named(tmp_path: Path, refused: Callable[[], str]) -> None:
    assert "holds no images ILSVRC2012_val_00000001.JPEG" in refused()
    write_images(tmp_path, [1, 6])
    assert "no ILSVRC2012_validation_ground_truth.txt below it; unpack" in refused()
    write_kit(tmp_path)
    assert "there is an image number 6, and labels of 5" in refused()


def test_a_kit_of_two_releases_is_refused(tmp_path: Path, refused: Callable[[], str]) -> None:
    write_images(tmp_path, [1])
    write_kit(tmp_path, [1, 4])
    assert "names classes that meta.mat does not, as 4" in refused()
