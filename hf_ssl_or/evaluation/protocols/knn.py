"""Weighted nearest neighbors: evaluates features without training anything.

Wu et al., "Unsupervised feature learning via non-parametric instance discrimination" (CVPR 2018), as used by DINO.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation.protocols.base import (
    LabeledFeatures,
    Protocol,
    accuracies,
    best_classes,
    check_labeled,
    labeled,
)

_CHUNK_ELEMENTS = 2**23  # similarities held at once, 32 MiB: the fastest on CPU, and enough to fill a GPU


@dataclass(frozen=True, kw_only=True)
class KnnProtocol(Protocol):
    """Settings of `knn_accuracy`, over all of the bank.

    Attributes:
        k: Numbers of neighbors; the first gives the primary metric.
        temperature: Divides the cosine similarity in a neighbor's weight.
    """

    seeded: ClassVar[bool] = False

    k: tuple[int, ...] = (20, 200)
    temperature: float = 0.07

    @property
    def primary_metric(self) -> str:
        """Top-1 accuracy with the first k."""
        return f"top1_k{self.k[0]}"

    def run(
        self, train: LabeledFeatures, test: LabeledFeatures, *, seed: int, device: torch.device | str
    ) -> dict[str, float]:
        """Evaluates features on `device`, with each k that the bank can give; the seed changes nothing."""
        k = [k for k in self.k if k <= len(train)] or self.k
        return _accuracies(train.to(device), test.to(device), k, self.temperature)


KNN_PROTOCOLS = (
    KnnProtocol(name="knn"),  # k and temperature of DINO (Caron et al., 2021)
    KnnProtocol(name="knn-t0.1", temperature=0.1),  # temperature of Wu et al. and of LightlySSL's benchmarks
)


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor | None,
    test_features: Tensor,
    test_labels: Tensor | None,
    *,
    k: int | Sequence[int] = (20, 200),
    temperature: float = 0.07,
    num_classes: int | None = None,
) -> dict[str, float]:
    """Classifies test images by the votes of their nearest training images.

    A neighbor votes for its class with weight exp(cosine similarity / temperature). The search is exact. Equally near
    images are taken in the order of the bank, and of equal votes the lower class wins, so the result is reproducible.
    A class without a vote is never counted as one of the top 5.

    Args:
        train_features: The bank, (N, F), on any device; need not be normalized.
        train_labels: Its classes, (N,) int64.
        test_features: The queries, (M, F), on the device of the bank.
        test_labels: Their classes, (M,) int64.
        k: One or more numbers of neighbors.
        temperature: Above 0.
        num_classes: Number of classes; None takes the largest label plus one.

    Returns:
        `top1_k<k>` and `top5_k<k>` in percent for every k, in the order given.

    Raises:
        InputError: A k is below 1 or larger than the bank; or what `check_labeled` refuses.
    """
    ks = [k] if isinstance(k, int) else list(k)
    train, test = (
        labeled(features, labels, what="kNN").to(train_features.device)
        for features, labels in ((train_features, train_labels), (test_features, test_labels))
    )
    return _accuracies(train, test, ks, temperature, num_classes)


@torch.no_grad()
def _accuracies(
    train: LabeledFeatures,
    test: LabeledFeatures,
    ks: Sequence[int],
    temperature: float,
    num_classes: int | None = None,
) -> dict[str, float]:
    seen = check_labeled(train, test, what="kNN")
    classes = seen if num_classes is None else num_classes
    if classes < seen:
        raise InputError(f"kNN: num_classes={classes}, but there is a label {seen - 1}")
    _check_settings(ks, temperature, len(train))
    predicted: dict[int, list[Tensor]] = {n: [] for n in ks}
    for _, similarity_BP, index_BP in nearest_in_bank(train.features_NF, test.features_NF, ks):
        weight_BP = ((similarity_BP - similarity_BP[:, :1]).double() / temperature).exp()  # the nearest has 1
        class_BP = train.labels_N[index_BP]
        for n in ks:
            votes_BK = weight_BP.new_zeros(len(class_BP), classes)
            votes_BK.scatter_add_(1, class_BP[:, :n], weight_BP[:, :n])
            predicted[n].append(best_classes(votes_BK.masked_fill(votes_BK == 0, -torch.inf)))
    found = {n: accuracies(torch.cat(parts), test.labels_N) for n, parts in predicted.items()}
    return {f"top{top}_k{n}": percent for n, each in found.items() for top, percent in each.items()}


def nearest_in_bank(train_NF: Tensor, test_MF: Tensor, ks: Sequence[int]) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yields, for a chunk of B queries, their rows and the cosines and indices of the P = max(ks) nearest images."""
    bank_FN = F.normalize(train_NF.float(), dim=1).T
    size, most = bank_FN.shape[1], max(ks)
    cuts = torch.tensor([n for n in ks if n < size], dtype=torch.int64, device=train_NF.device)
    chunk = max(64, _CHUNK_ELEMENTS // size)
    for start in range(0, len(test_MF), chunk):
        rows = slice(start, start + chunk)
        cosine_BN = F.normalize(test_MF[rows].float(), dim=1) @ bank_FN
        cosine_BP, index_BP = cosine_BN.topk(min(most + 1, size), dim=1)
        # `topk` leaves open which of equally near images it takes: where that matters, sort by (cosine, index).
        tied = (cosine_BP[:, cuts - 1] == cosine_BP[:, cuts]).any(1).nonzero()[:, 0]
        if len(tied):
            ordered = cosine_BN[tied].sort(dim=1, descending=True, stable=True)
            cosine_BP[tied], index_BP[tied] = (x[:, : cosine_BP.shape[1]] for x in ordered)
        yield rows, cosine_BP[:, :most], index_BP[:, :most]


def _check_settings(ks: Sequence[int], temperature: float, bank: int) -> None:
    for n in ks:
        if not 1 <= n <= bank:
            raise InputError(f"kNN: k={n} neighbors of a bank of {bank} images; k must be from 1 to {bank}")
    if temperature <= 0:
        raise InputError(f"kNN: temperature must be above 0, not {temperature}")
    if not ks:
        raise InputError("kNN: k names no number of neighbors")
