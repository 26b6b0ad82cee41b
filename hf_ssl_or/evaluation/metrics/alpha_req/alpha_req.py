"""Alpha-ReQ for the `evaluate` library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import torch

from hf_ssl_or.evaluation.collapse.measures import power_law
from hf_ssl_or.evaluation.collapse.spectra import eigenvalues

_DESCRIPTION = "alpha-ReQ: the exponent with which the eigenvalues of features decay, measured without labels."

_INPUTS = """
Args:
    predictions: Features, one row of numbers per image; or the eigenvalues of their covariance, from the largest.
    fit_range: Slice of the sorted eigenvalues that is fitted; (3, 100) fits the 4th to the 100th.

Returns:
    alpha_req: The exponent; near 1 is good, 0 is white noise, large is collapse.
    r2: Share of the variance of the logarithms in the range that the power law explains.
    fit_range: The slice that was fitted, after clipping to the positive eigenvalues.
"""

_CITATION = """\
@inproceedings{agrawal2022alpha,
  title = {alpha-{ReQ}: Assessing Representation Quality in Self-Supervised Learning by Measuring Eigenspectrum Decay},
  author = {Agrawal, Kumar Krishna and Mondal, Arnab Kumar and Ghosh, Arna and Richards, Blake},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2022}
}
"""


class AlphaReq(evaluate.Metric):
    """Decay of the eigenvalues of features; what `hf_ssl_or.evaluation.collapse.alpha_req` returns."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=[
                datasets.Features({"predictions": datasets.List(datasets.Value("float64"))}),
                datasets.Features({"predictions": datasets.Value("float64")}),
            ],
            reference_urls=["https://openreview.net/forum?id=ii9X4vtZGTZ"],
        )

    def _compute(
        self, predictions: Sequence[Any], fit_range: Sequence[int] = (3, 100)
    ) -> dict[str, float | list[int]]:
        first, stop = fit_range
        given = torch.from_numpy(np.asarray(predictions))
        alpha = power_law(given if given.ndim == 1 else eigenvalues(given), (first, stop))
        return {"alpha_req": float(alpha), "r2": alpha.r2, "fit_range": list(alpha.fit_range)}
