"""Feature whitening: VICReg's variance and covariance terms, added to any other method.

He et al. (NeurIPS 2024, sec. 5) compare weight orthogonality with it: it whitens features but not weights.
"""

from __future__ import annotations

from torch import Tensor

from hf_ssl_or.methods.functional import full_precision, product_split, variance_hinge
from hf_ssl_or.settings import settings


@settings
class WhiteningConfig:
    """How much feature whitening is added to a method's loss.

    Attributes:
        weight: Factor on both terms; 0 adds none. The paper tunes it from 1e-3 to 1e-5.
        covariance: Factor on the covariance term beside the variance term.
    """

    weight: float | int = 0.0
    covariance: float | int = 0.004  # the paper

    def validate_ranges(self) -> None:
        """Checks that the weights are not negative."""
        for name in ("weight", "covariance"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must be at least 0, not {getattr(self, name)}")


@full_precision
def feature_whitening(z_VND: Tensor, covariance: float = 0.004) -> Tensor:
    """Returns 2 mean_v (h(z_v) + covariance c(z_v)), h and c as in `hf_ssl_or.methods.vicreg`.

    Two views give the sum of both views' terms, as solo-learn computes them.
    """
    images, dim = z_VND.shape[1:]
    centered = z_VND - z_VND.mean(1, keepdim=True)
    squares, off_diagonal = product_split(centered, centered)
    variance = variance_hinge(squares / (images - 1))
    return 2 * (variance + covariance * off_diagonal.mean() / ((images - 1) ** 2 * dim))
