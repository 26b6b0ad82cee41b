"""DCL (Yeh et al., ECCV 2022): SimCLR without the positive in the denominator, so that small batches do.

With s(a, b) = cos(a, b) / temperature, view v of image n as anchor and view u of it as positive:

    l(v, u, n) = -s(z_vn, z_un) + log sum_{w, m != n} exp s(z_vn, z_wm)

and the loss is the mean of l over images and ordered pairs v != u. The negatives do not depend on u, and s is linear
in the unit vector of u, so the mean over u is that of the anchor with the mean of the other views' unit vectors: the
positives cost V. At V = 2 the negatives are both views of the other images: the published eq. 6, averaged.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from hf_ssl_or.methods.base import require_positive
from hf_ssl_or.methods.base_methods import ProjectionMethod, ProjectorConfig
from hf_ssl_or.methods.functional import full_precision, mean_of_pairs, similarities
from hf_ssl_or.settings import settings
from hf_ssl_or.structures import MultiViewBatch, ViewSpec


@settings
class DCLConfig(ProjectorConfig):
    """Settings of DCL.

    Attributes:
        temperature: Divides the cosines.
    """

    projector_hidden: int | Literal["same"] = 512  # lightly, CIFAR: the width of ResNet-18's features
    projector_dim: int = 128  # lightly, CIFAR
    projector_layers: int = 2
    temperature: float | int = 0.1  # lightly, CIFAR

    def validate_ranges(self) -> None:
        """Checks that the temperature makes sense."""
        require_positive(self, "temperature")


@full_precision
def dcl_loss(z_VND: Tensor, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss, and the mean cosine of positive pairs, from the projections of the global batch."""
    positives_VUN, negatives_VN = similarities(z_VND, temperature)
    positive = mean_of_pairs(positives_VUN)
    return negatives_VN.mean() - positive, {"positive_cosine": temperature * positive}


class DCL(ProjectionMethod):
    """DCL for any number of views."""

    config_class = DCLConfig
    views = (ViewSpec(crop_scale=(0.08, 1.0), saturation=0.4),)  # as SimCLR's
    citation = """@inproceedings{yeh2022decoupled,
  title = {Decoupled Contrastive Learning},
  author = {Yeh, Chun-Hsiao and Hong, Cheng-Yao and Hsu, Yen-Chi and Liu, Tyng-Luh and Chen, Yubei and LeCun, Yann},
  booktitle = {European Conference on Computer Vision},
  year = {2022}
}"""

    def loss(self, z_VND: Tensor, batch: MultiViewBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compares the projections of the views."""
        return dcl_loss(z_VND, self.config.temperature)
