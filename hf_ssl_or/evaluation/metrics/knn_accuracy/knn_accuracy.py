"""Accuracy of weighted nearest neighbors for the `evaluate` library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import torch

from hf_ssl_or.evaluation.protocols.knn import knn_accuracy

_DESCRIPTION = "kNN accuracy: how often the labels of the nearest images, weighted by likeness, give the right class."

_INPUTS = """
Args:
    predictions: Features of the images to classify, one row of numbers per image.
    references: Their classes, from 0.
    bank: Features of the labeled images that vote, as many numbers a row.
    bank_labels: Their classes.
    k: One or more numbers of neighbors, at most the size of the bank.
    temperature: Divides the cosine similarity in a neighbor's weight.

Returns:
    top1_k<k>, top5_k<k>: Accuracies between 0 and 1, for every k.
"""

_CITATION = """\
@inproceedings{wu2018unsupervised,
  title = {Unsupervised Feature Learning via Non-Parametric Instance Discrimination},
  author = {Wu, Zhirong and Xiong, Yuanjun and Yu, Stella X. and Lin, Dahua},
  booktitle = {IEEE Conference on Computer Vision and Pattern Recognition},
  year = {2018}
}
"""


class KnnAccuracy(evaluate.Metric):
    """Accuracy of weighted nearest neighbors; `hf_ssl_or.evaluation.protocols.knn.knn_accuracy`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.List(datasets.Value("float32")), "references": datasets.Value("int64")}
            ),
            reference_urls=["https://arxiv.org/abs/1805.01978", "https://arxiv.org/abs/2104.14294"],
        )

    def _compute(
        self,
        predictions: Sequence[Any],
        references: Sequence[int],
        bank: np.ndarray | torch.Tensor,
        bank_labels: np.ndarray | torch.Tensor | Sequence[int],
        k: int | Sequence[int] = 20,
        temperature: float = 0.07,
    ) -> dict[str, float]:
        percent = knn_accuracy(
            torch.as_tensor(bank),
            torch.as_tensor(bank_labels),
            torch.from_numpy(np.asarray(predictions, dtype=np.float32)),
            torch.tensor(references),
            k=k,
            temperature=temperature,
        )
        return {name: value / 100 for name, value in percent.items()}
