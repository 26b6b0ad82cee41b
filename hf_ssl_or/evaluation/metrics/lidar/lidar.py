"""LiDAR for the `evaluate` library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import torch

from hf_ssl_or.evaluation.collapse.measures import entropy_rank
from hf_ssl_or.evaluation.collapse.view_scatter import ViewScatter

_DESCRIPTION = "LiDAR: how many dimensions of features tell images apart, beside what tells views of one image apart."

_INPUTS = """
Args:
    predictions: Features of several views of each image, (views, dimensions) per image, as many views of each; or the
        eigenvalues of their linear discriminants.
    delta: Ridge of the covariance within images; 1e-4, as in the paper. Eigenvalues have theirs already.
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
    """Rank of the features' linear discriminants; what `hf_ssl_or.evaluation.collapse.lidar` returns."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=[
                datasets.Features({"predictions": datasets.List(datasets.List(datasets.Value("float64")))}),
                datasets.Features({"predictions": datasets.Value("float64")}),
            ],
            reference_urls=["https://arxiv.org/abs/2312.04000"],
        )

    def _compute(self, predictions: Sequence[Any], delta: float = 1e-4, eps: float = 1e-8) -> dict[str, float]:
        given = torch.from_numpy(np.asarray(predictions))
        values_D = given if given.ndim == 1 else ViewScatter.of(given).discriminant_eigenvalues(delta)
        return {"lidar": entropy_rank(values_D, eps)}
