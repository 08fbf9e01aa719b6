"""k-nearest-neighbour classification: what features are worth before anything is trained on them.

Shape legend: N = images of this rank's part of the bank, Q = images to classify, over all ranks, D = channels,
K = classes, n = neighbours.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fd_scale.data import UNLABELLED, Batch
from fd_scale.distributed import World
from fd_scale.errors import UserError
from fd_scale.evaluation.loop import EvaluationSet, evaluated_batches

NUM_NEIGHBOURS = 20
TEMPERATURE = 0.07
_QUERIES_AT_A_TIME = 1024


def nearest_neighbours(
    bank: EvaluationSet, queries: EvaluationSet, features: Callable[[Batch], Tensor], world: World
) -> dict[str, float]:
    """Classifies images by the labels of those of a bank whose features are most similar.

    Each of the 20 neighbours votes with exp(cosine similarity / 0.07). The bank stays where its features were computed,
    a part on each rank.

    Args:
        bank: images and labels to look among.
        queries: images and labels to classify.
        features: called with a batch on the device; returns (B, D).
        world: ranks; all call it.

    Returns:
        `knn_top1` and `knn_top5`, shares of the labelled queries in 0..1.

    Raises:
        UserError: either has no labelled image.

    Source: Wu et al. 2018 (arXiv:1805.01978), section 3.4; numbers as DINO's (arXiv:2104.14294).
    """
    bank_ND, labels_N = _features(bank, features, world)
    own_QD, own_labels_Q = _features(queries, features, world)
    queries_QD = torch.cat(world.gather(own_QD.cpu())).to(bank_ND.device)
    labels_Q = torch.cat(world.gather(own_labels_Q.cpu()))
    if not len(labels_Q) or not sum(world.gather(len(labels_N))):
        raise UserError(
            "knn_images: nearest neighbours need labels, of data.train and of data.evaluation; set it to 0"
        )
    found = [_most_similar(chunk_QD, bank_ND, labels_N) for chunk_QD in queries_QD.split(_QUERIES_AT_A_TIME)]
    similarity_Qn, neighbour_Qn = (torch.cat(parts).cpu() for parts in zip(*found, strict=True))
    all_similarities, all_neighbours = zip(*world.gather((similarity_Qn, neighbour_Qn)), strict=True)
    similarity_Qm, places_Qm = torch.cat(all_similarities, dim=1).sort(dim=1, descending=True, stable=True)
    neighbour_Qm = torch.cat(all_neighbours, dim=1).gather(1, places_Qm)
    num_classes = max(queries.source.num_classes, bank.source.num_classes)
    hits_Qr = torch.cat(
        [
            _ranked(similarities, neighbours, num_classes) == labels[:, None]
            for similarities, neighbours, labels in zip(
                *(x_Q.split(_QUERIES_AT_A_TIME) for x_Q in (similarity_Qm, neighbour_Qm, labels_Q)),
                strict=True,
            )
        ]
    )
    return {"knn_top1": _share(hits_Qr[:, :1]), "knn_top5": _share(hits_Qr)}


def _ranked(similarity_Qn: Tensor, neighbour_Qn: Tensor, num_classes: int) -> Tensor:
    """The five classes with most votes, (Q, 5), of neighbours that are sorted."""
    votes_QK = torch.zeros(len(similarity_Qn), num_classes, dtype=torch.float64)
    weights_Qn = (similarity_Qn[:, :NUM_NEIGHBOURS].double() / TEMPERATURE).exp()
    votes_QK.scatter_add_(1, neighbour_Qn[:, :NUM_NEIGHBOURS], weights_Qn)
    return votes_QK.topk(min(5, num_classes), dim=1).indices


def _features(
    images: EvaluationSet, features: Callable[[Batch], Tensor], world: World
) -> tuple[Tensor, Tensor]:
    """Normalised features, fp32, and labels of this rank's labelled images; every rank runs equally many batches."""
    parts = []
    for batch in evaluated_batches(images, world):
        features_BD = F.normalize(features(batch).float(), dim=-1)
        labelled_B = batch.classes != UNLABELLED
        parts.append((features_BD[labelled_B], batch.classes[labelled_B]))
    features_ND, labels_N = (torch.cat(part) for part in zip(*parts, strict=True))
    return features_ND, labels_N


def _most_similar(queries_QD: Tensor, bank_ND: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Similarities, the largest first, and labels of the nearest images of this rank, (Q, n) each."""
    similarity_Qn, places_Qn = (queries_QD @ bank_ND.T).topk(min(NUM_NEIGHBOURS, len(bank_ND)), dim=1)
    return similarity_Qn, labels_N[places_Qn]


def _share(hits: Tensor) -> float:
    return float(hits.any(dim=1).double().mean())
