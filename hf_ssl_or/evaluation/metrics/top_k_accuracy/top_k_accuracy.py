"""Top-k accuracy for the `evaluate` library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from hf_ssl_or.errors import InputError

_DESCRIPTION = "Top-k accuracy: how often the right class is among the first k that are predicted."

_INPUTS = """
Args:
    predictions: Classes, the most likely first: one row per image, as many classes in each; -1 for none.
    references: The right class of each image, from 0.
    k: One or more numbers of classes.

Returns:
    top_<k>_accuracy: Between 0 and 1, for every k.
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
    """Share of images whose class is among the first k that are predicted."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.List(datasets.Value("int64")), "references": datasets.Value("int64")}
            ),
            reference_urls=["https://arxiv.org/abs/1409.0575"],
        )

    def _compute(
        self, predictions: Sequence[Any], references: Sequence[int], k: int | Sequence[int] = (1, 5)
    ) -> dict[str, float]:
        if len({len(row) for row in predictions}) > 1:
            raise InputError("predictions: every row must name as many classes")
        if min(references) < 0:
            raise InputError(f"references: classes count from 0, not {min(references)}")
        ks = [k] if isinstance(k, int) else list(k)
        if min(ks) < 1:
            raise InputError(f"k: at least 1, not {min(ks)}")
        right_NT = np.asarray(predictions) == np.asarray(references)[:, None]
        return {f"top_{n}_accuracy": float(right_NT[:, :n].any(1).mean()) for n in ks}
