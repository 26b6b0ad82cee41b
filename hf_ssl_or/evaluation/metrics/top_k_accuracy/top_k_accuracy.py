"""Top-k accuracy for the `evaluate` library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import torch

from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation.protocols.base import in_top

_DESCRIPTION = "Top-k accuracy: how often the right class is among the k classes with the highest scores."

_INPUTS = """
Args:
    predictions: Scores, say logits: one row of numbers per image, one number per class.
    references: The right class of each image, from 0.
    k: One or more numbers of classes.

Returns:
    top_<k>_accuracy: Between 0 and 1, for every k. Of equal scores the lower class comes first.
"""

_CITATION = """\
@article{russakovsky2015imagenet,
  title = {{ImageNet} Large Scale Visual Recognition Challenge},
  author = {Russakovsky, Olga and Deng, Jia and Su, Hao and Krause, Jonathan and Satheesh, Sanjeev and Ma, Sean and
            Huang, Zhiheng and Karpathy, Andrej and Khosla, Aditya and Bernstein, Michael and Berg, Alexander C. and
            Fei-Fei, Li},
  journal = {International Journal of Computer Vision},
  year = {2015}
}
"""


class TopKAccuracy(evaluate.Metric):
    """Share of images whose class is among the k best scored."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.List(datasets.Value("float64")), "references": datasets.Value("int64")}
            ),
            reference_urls=["https://arxiv.org/abs/1409.0575"],
        )

    def _compute(
        self, predictions: Sequence[Any], references: Sequence[int], k: int | Sequence[int] = (1, 5)
    ) -> dict[str, float]:
        scores_NK, labels_N = torch.from_numpy(np.asarray(predictions)), torch.tensor(references)
        if not bool(scores_NK.isfinite().all()):
            raise InputError("predictions: some scores are NaN or infinite")
        classes = scores_NK.shape[1]
        if int(labels_N.min()) < 0 or int(labels_N.max()) >= classes:
            raise InputError(f"references: classes must be from 0 to {classes - 1}, one for every score of a row")
        ks = [k] if isinstance(k, int) else list(k)
        if min(ks) < 1:
            raise InputError(f"k: at least 1, not {min(ks)}")
        return {f"top_{n}_accuracy": float(in_top(scores_NK, labels_N, n).double().mean()) for n in ks}
