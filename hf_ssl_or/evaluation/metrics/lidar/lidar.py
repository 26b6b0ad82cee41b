"""LiDAR for the `evaluate` library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from hf_ssl_or.evaluation.collapse import lidar

_DESCRIPTION = "LiDAR: how many dimensions of features tell images apart, beside what tells views of one image apart."

_INPUTS = """
Args:
    predictions: Features of several views of each image, (views, dimensions) per image, as many views of each.
    delta: Ridge of the covariance within images; 1e-4, as in the paper.
    eps: Added to each share of the spectrum.

Returns:
    lidar: At most the smaller of images - 1 and dimensions; 0 where images do not differ.
"""

_CITATION = """\
@inproceedings{thilak2024lidar,
  title = {{LiDAR}: Sensing Linear Probing Performance in Joint Embedding {SSL} Architectures},
  author = {Thilak, Vimal and Huang, Chen and Saremi, Omid and Dinh, Laurent and Goh, Hanlin and
            Nakkiran, Preetum and Susskind, Joshua M. and Littwin, Etai},
  booktitle = {International Conference on Learning Representations},
  year = {2024}
}
"""


class Lidar(evaluate.Metric):
    """Rank of the features' linear discriminants; `hf_ssl_or.evaluation.collapse.lidar`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.List(datasets.List(datasets.Value("float64")))}),
            reference_urls=["https://arxiv.org/abs/2312.04000"],
        )

    def _compute(self, predictions: Sequence[Any], delta: float = 1e-4, eps: float = 1e-8) -> dict[str, float]:
        return {"lidar": lidar(np.asarray(predictions), delta, eps)}
