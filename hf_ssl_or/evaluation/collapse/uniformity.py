"""How features spread: standard deviations, and alignment and uniformity on the unit sphere, in float64.

These see complete collapse, all images on one point; the ranks in `collapse` see dimensional collapse as well.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation.collapse.spectra import CovarianceAccumulator, Features, as_matrix
from hf_ssl_or.evaluation.collapse.view_scatter import Views, ViewScatter

_ROWS = 4096


def unit_std(features: Features) -> float:
    """Mean over dimensions of the standard deviation over images of features scaled to unit length.

    Chen & He, "SimSiam" (CVPR 2021), figure 2; `lightly.utils.debug.std_of_l2_normalized`. Compare it with
    1 / sqrt(D), the value for directions spread evenly over the sphere; 0 is complete collapse. Not a sign of
    dimensional collapse: r equal dimensions of D still give sqrt(r) / D.

    Args:
        features: Matrix (N, D), or a stream; not centered before scaling. A row of zeros stays zero.
    """
    moments = CovarianceAccumulator.of(features)
    return float((moments.unit_scatter_D / max(moments.count - 1, 1)).sqrt().mean())


def uniformity(features: Tensor | np.ndarray, t: float = 2.0, max_rows: int | None = _ROWS) -> float:
    """Logarithm of the mean of exp(-t ||u - v||^2) over pairs of images, u and v of unit length; lower is better.

    Wang & Isola (ICML 2020), equation 3, where the mean is over the pairs of a batch. 0 is complete collapse; evenly
    spread directions of many dimensions give about -2 t. It is no function of the spectrum and has no stream.

    Args:
        features: Matrix (N, D) of at least 2 images, scaled to unit length here.
        t: The paper's 2.
        max_rows: Takes at most so many images, evenly spaced; None takes all pairs.
    """
    x_ND = as_matrix(features)
    if max_rows is not None and len(x_ND) > max_rows:
        x_ND = x_ND[torch.arange(max_rows) * len(x_ND) // max_rows]
    if len(x_ND) < 2:
        raise InputError("uniformity: needs 2 images or more")
    unit_ND = F.normalize(x_ND.double(), dim=1)
    total = 0.0
    for unit_BD in unit_ND.split(1024):
        distance_BN = torch.cdist(unit_BD, unit_ND, compute_mode="use_mm_for_euclid_dist").square()
        total += float((-t * distance_BN).exp().sum())
    n = len(unit_ND)
    return float(np.log((total - n) / (n * (n - 1))))  # without the pairs of an image with itself


def alignment(views: Views) -> float:
    """Mean squared distance between two views of an image, both scaled to unit length; lower is better, 0 to 4.

    Wang & Isola (ICML 2020), equation 2 with alpha = 2. With more than two views: over all pairs. Collapse lowers it
    too, so read it beside `uniformity`.

    Args:
        views: q views of n images, (n, q, D), or a stream.
    """
    return ViewScatter.of(views).squared_distance()
