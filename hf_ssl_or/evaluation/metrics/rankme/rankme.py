"""RankMe for the `evaluate` library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import torch

from hf_ssl_or.evaluation.collapse.measures import entropy_rank, singular_values

_DESCRIPTION = "RankMe: how many dimensions the features of an encoder use, measured without labels."

_INPUTS = """
Args:
    predictions: Features, one row of numbers per image; or their singular values.
    eps: Added to each share of the spectrum; 1e-7, as in the paper.

Returns:
    rankme: Between 1 and the smaller of images and dimensions; 0 for features that are all 0.
"""

_CITATION = """\
@inproceedings{garrido2023rankme,
  title = {{RankMe}: Assessing the Downstream Performance of Pretrained Self-Supervised Representations by Their Rank},
  author = {Garrido, Quentin and Balestriero, Randall and Najman, Laurent and LeCun, Yann},
  booktitle = {International Conference on Machine Learning},
  year = {2023}
}
"""


class Rankme(evaluate.Metric):
    """Effective rank of features; what `hf_ssl_or.evaluation.collapse.rankme` returns."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=[
                datasets.Features({"predictions": datasets.List(datasets.Value("float64"))}),
                datasets.Features({"predictions": datasets.Value("float64")}),
            ],
            reference_urls=["https://arxiv.org/abs/2210.02885"],
        )

    def _compute(self, predictions: Sequence[Any], eps: float = 1e-7) -> dict[str, float]:
        given = torch.from_numpy(np.asarray(predictions))
        return {"rankme": entropy_rank(given if given.ndim == 1 else singular_values(given), eps)}
