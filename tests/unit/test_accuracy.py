"""Accuracy by class, top-5, calibration and reassessed labels, against scikit-learn and counts by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, log_loss, recall_score, top_k_accuracy_score

from fd_scale.data import open_source
from fd_scale.distributed import ALONE
from fd_scale.errors import UserError
from fd_scale.evaluation import Accuracy, AccuracyCounter, reassessed_labels


def counted(logits: torch.Tensor, labels: torch.Tensor, batch: int = 7, **settings: Any) -> Accuracy:
    counter = AccuracyCounter(logits.shape[1], **settings)
    for start in range(0, len(labels), batch):
        part = slice(start, start + batch)
        counter.add(logits[part], labels[part], list(range(len(labels)))[part])
    return counter.result(ALONE)


@pytest.fixture
def answers() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of 12 classes of which some are hard and one has no image."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 11, (501,), generator=generator)
    logits = torch.randn(501, 12, generator=generator)
    logits[torch.arange(501), labels] += labels / 4
    return logits, labels


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_equals_scikit_learn(answers: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = answers
    found = counted(logits, labels)
    classes = np.arange(12)
    assert found.num_images == 501
    assert found.top1 == pytest.approx(top_k_accuracy_score(labels, logits, k=1, labels=classes))
    assert found.top5 == pytest.approx(top_k_accuracy_score(labels, logits, k=5, labels=classes))
    assert found.loss == pytest.approx(
        log_loss(labels, logits.double().softmax(-1), labels=classes), rel=1e-9
    )
    predicted = logits.argmax(-1)
    assert found.metrics["class_mean"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    np.testing.assert_allclose(
        found.class_top1[:11], recall_score(labels, predicted, average=None, labels=classes[:11])
    )
    assert np.isnan(found.class_top1[11])
    assert found.class_images.tolist() == np.bincount(labels, minlength=12).tolist()
    worst = found.worst_classes(3)
    assert worst == sorted(range(11), key=lambda label: found.class_top1[label])[:3]


def test_calibration_error_by_hand(answers: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Guo et al. 2017, equation 3, written as loops."""
    logits, labels = answers
    confidence, predicted = logits.double().softmax(-1).max(-1)
    expected = 0.0
    for index in range(15):
        inside = (confidence > index / 15) & (confidence <= (index + 1) / 15)
        if inside.any():
            gap = (predicted[inside] == labels[inside]).double().mean() - confidence[inside].mean()
            expected += float(gap.abs() * inside.sum() / 501)
    assert counted(logits, labels).calibration_error == pytest.approx(expected, rel=1e-9)
    sure = torch.tensor([[100.0, 0.0], [100.0, 0.0]])
    assert counted(sure, torch.tensor([0, 1])).calibration_error == pytest.approx(0.5)


def test_images_without_label_do_not_count(answers: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = answers
    some = torch.where(torch.arange(501) % 3 == 0, -1, labels)
    expected = counted(logits[some >= 0], labels[some >= 0]).metrics
    assert counted(logits, some).metrics == pytest.approx(expected, rel=1e-12)
    with pytest.raises(UserError, match="no image has a label"):
        counted(logits, torch.full_like(labels, -1))


def test_two_classes_have_no_top5() -> None:
    found = counted(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]))
    assert (found.top1, found.top5) == (0.5, 1.0)


def validation(folder: Path, num_images: int = 4) -> str:
    (folder / "n01440764").mkdir(parents=True)
    (folder / "n01443537").mkdir()
    from PIL import Image

    for place in range(1, num_images + 1):
        name = f"n0144{'0764' if place % 2 else '3537'}/ILSVRC2012_val_{place:08d}.JPEG"
        Image.new("RGB", (8, 8)).save(folder / name, format="JPEG")
    return f"imagefolder:{folder}"


def test_reassessed_labels(tmp_path: Path) -> None:
    """Of the images' own places in the file, in whatever order the source has them; an empty list does not count."""
    source = open_source(validation(tmp_path / "val"))
    file = tmp_path / "real.json"
    file.write_text(json.dumps([[0, 1], [0], [], [1]]))
    labels = reassessed_labels(str(file), source, 2)
    assert [source.key(index)[-6] for index in range(4)] == ["1", "3", "2", "4"]
    assert labels == [[0, 1], [], [0], [1]]
    predicted = torch.eye(2)[[1, 1, 1, 1]]
    found = counted(predicted, torch.tensor([0, 0, 1, 1]), reassessed=labels)
    assert found.real_top1 == pytest.approx(2 / 3)
    assert found.metrics["real_top1"] == found.real_top1
    assert found.top1 == 0.5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[[0], [1]", "cannot be read as JSON"),
        ("[0, 1, 1, 0]", "no list of lists of labels 0 to 1"),
        ("[[0], [1], [2], [0]]", "no list of lists of labels 0 to 1"),
        ("[[0], [1], [0]]", "ILSVRC2012_val_00000004.JPEG is not among the 3 images"),
    ],
)
def test_other_files_than_reassessed_labels_are_refused(tmp_path: Path, content: str, message: str) -> None:
    source = open_source(validation(tmp_path / "val"))
    (tmp_path / "real.json").write_text(content)
    with pytest.raises(UserError, match=message):
        reassessed_labels(str(tmp_path / "real.json"), source, 2)


def test_classes_that_are_numbers_are_in_their_order(tmp_path: Path) -> None:
    """ImageNet-V2 names its folders 0 to 999."""
    from PIL import Image

    for label in range(12):
        (tmp_path / str(label)).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / str(label) / "x.png")
    source = open_source(f"imagefolder:{tmp_path}")
    assert source.class_names == [str(label) for label in range(12)]
    assert [source.key(index) for index in range(12)][:3] == ["0/x.png", "1/x.png", "2/x.png"]
