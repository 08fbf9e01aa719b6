"""Nearest neighbours against scikit-learn's, with the weights of Wu et al."""

import numpy as np
import pytest
import torch
from sklearn.metrics import top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

from fd_scale.data import Batch, ImageAlone, evaluation_transform, open_source, spread
from fd_scale.distributed import ALONE
from fd_scale.evaluation import EvaluationSet, nearest_neighbours


def images(part: str, count: int = 10_000) -> EvaluationSet:
    source = spread(open_source(f"digits:{part}"), count)
    return EvaluationSet(
        source=source, transform=ImageAlone(evaluation_transform(8)), batch_size=64, num_workers=0
    )


def thumbnails(batch: Batch) -> torch.Tensor:
    """Features that are right for most digits and wrong for some."""
    pixels = batch.images[:, 0].float()
    return torch.nn.functional.avg_pool2d(pixels[:, None], 4).flatten(1) - 60


def features_of(part: EvaluationSet) -> tuple[np.ndarray, np.ndarray]:
    samples = [part.source.read(sample_id) for sample_id in range(len(part.source))]
    stacked = torch.stack([part.transform(*sample)[0] for sample in samples])
    labels = torch.tensor([label for _, label in samples])
    return thumbnails(Batch(stacked, labels, labels, 0)).double().numpy(), labels.numpy()


@pytest.mark.parametrize("bank_size", [500, 7])
def test_equals_scikit_learn(bank_size: int) -> None:
    bank, queries = images("train", bank_size), images("test")
    (bank_ND, labels_N), (queries_QD, labels_Q) = features_of(bank), features_of(queries)
    judge = KNeighborsClassifier(
        n_neighbors=min(20, bank_size), metric="cosine", algorithm="brute",
        weights=lambda distances: np.exp((1 - distances) / 0.07),
    ).fit(bank_ND, labels_N)  # fmt: skip
    votes = np.zeros((len(labels_Q), 10))
    votes[:, judge.classes_] = judge.predict_proba(queries_QD)
    found = nearest_neighbours(bank, queries, thumbnails, ALONE)
    expected = top_k_accuracy_score(labels_Q, votes, k=1, labels=range(10))
    # One query in 300 may have two neighbours that are equally far in fp32.
    assert found["knn_top1"] == pytest.approx(expected, abs=1 / 300)
    assert 0.2 < found["knn_top1"] < 0.95
    if (
        bank_size > 100
    ):  # of seven images several classes have no vote, and which of them come fifth is arbitrary
        expected = top_k_accuracy_score(labels_Q, votes, k=5, labels=range(10))
        assert found["knn_top5"] == pytest.approx(expected, abs=2 / 300)


def test_a_bank_is_spread_over_its_source() -> None:
    source = open_source("digits:train")
    few = spread(source, 100)
    keys = [int(few.key(index)) for index in range(len(few))]
    assert len(few) == len(set(keys)) == 100
    assert max(np.diff(keys)) - min(np.diff(keys)) <= 1
    assert keys[-1] > len(source) - 20
    assert spread(source, len(source)) is source
