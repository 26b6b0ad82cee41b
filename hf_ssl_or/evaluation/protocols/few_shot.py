"""Few labeled images per class: a linear classifier of frozen features, over several samples of the images.

Assran et al., "Masked siamese networks for label-efficient learning" (ECCV 2022) and their code: logistic regression
without a bias on features that are centered and scaled to unit length one by one, with a fixed penalty, because so few
images leave none to choose it on. All classes take part, unlike in episodes of five.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_ssl_or.evaluation.protocols.base import LabeledFeatures, Protocol, accuracies, best_classes, check_labeled
from hf_ssl_or.evaluation.protocols.logistic import LogisticRegression
from hf_ssl_or.randomness import hashed_seed, keyed_permutation

_TOLERANCE = 1e-6  # of the gradient: so weak a penalty asks for more than the usual


@dataclass(frozen=True, kw_only=True)
class FewShotProtocol(Protocol):
    """Settings of the few-shot evaluation.

    Attributes:
        shots: Labeled images of each class; a class that has fewer gives all it has.
        draws: How many times images are sampled for each seed. The images of fewer shots are among those of more.
        l2: Penalty l2 / 2 * ||W||^2 of the summed cross-entropy.
    """

    seeded: ClassVar[bool] = True

    shots: tuple[int, ...] = (1, 5, 10)
    draws: int = 5
    l2: float = 2.5e-4

    @property
    def primary_metric(self) -> str:
        """Top-1 accuracy with the most images, which varies least."""
        return f"top1_n{max(self.shots)}"

    def keys(self, seeds: Sequence[int]) -> list[int]:
        """Returns the keys of all samples of all seeds."""
        return [hashed_seed("few-shot", seed, draw) for seed in seeds for draw in range(self.draws)]

    def run(
        self, train: LabeledFeatures, test: LabeledFeatures, *, seed: int, device: torch.device | str
    ) -> dict[str, float]:
        """Evaluates one sample of images: `top1_n<shots>` in percent."""
        classes = check_labeled(train, test, what=self.name)
        test_MF = unit_rows(test.features_NF.to(device))
        order_N, place_N = sample_order(train.labels_N.cpu(), seed)
        fewest = int(train.labels_N.unique(return_counts=True)[1].min())
        if fewest < max(self.shots):
            warnings.warn(f"{self.name}: a class has {fewest} train images only; it gives all it has", stacklevel=2)
        accuracy = {}
        for n in self.shots:
            rows_B = order_N[place_N < n]
            x_BF, labels_B = unit_rows(train.features_NF[rows_B].to(device)), train.labels_N[rows_B].to(device)
            model = LogisticRegression(x_BF, labels_B, classes, bias=False, tolerance=_TOLERANCE)
            weight_KF, _ = model.solve(self.l2 / len(rows_B))
            predicted_M1 = best_classes(test_MF @ weight_KF.T, 1)
            accuracy[f"top1_n{n}"] = accuracies(predicted_M1, test.labels_N, [1])[1]
        return accuracy


FEW_SHOT_PROTOCOLS = (FewShotProtocol(name="few-shot"),)


def sample_order(labels_N: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Orders images at random, class by class, and says which of its class each is, from 0.

    Returns:
        Indices (N,) and places (N,): `indices[places < n]` holds n images of each class.
    """
    shuffled_N = torch.from_numpy(keyed_permutation(len(labels_N), seed, "few-shot"))
    order_N = shuffled_N[labels_N[shuffled_N].argsort(stable=True)]
    _, count_K = labels_N.unique(return_counts=True)
    start_N = (count_K.cumsum(0) - count_K).repeat_interleave(count_K)
    return order_N, torch.arange(len(labels_N)) - start_N


def unit_rows(x_NF: Tensor) -> Tensor:
    """Centers each row and scales it to unit length."""
    return F.normalize(x_NF.float() - x_NF.float().mean(1, keepdim=True), dim=1)
