"""BYOL (Grill et al., NeurIPS 2020): each view predicts what a slow copy of the network makes of the other views.

With p_v the predictions of the student and t_u the projections of the momentum teacher, which gets no gradient:

    loss = 2 mean_{v != u} |p_v / |p_v| - t_u / |t_u||^2 = 4 - 4 mean_{v != u} cos(p_v, t_u)

over images and ordered pairs of views. The factor 2 makes V = 2 the published sum of both directions. The cosine is
linear in t_u / |t_u|, so V views cost V: p_v is compared with the mean of the other views' normalized targets. (That
mean is not scaled back to unit length: its length says how far the targets agree, and the pairs weigh it so.)
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from hf_ssl_or.methods.base import require_positive
from hf_ssl_or.methods.base_methods import ASYMMETRIC_VIEWS, MomentumConfig, MomentumMethod
from hf_ssl_or.methods.functional import full_precision, global_mean, negative_cosine
from hf_ssl_or.methods.heads import PredictionHead
from hf_ssl_or.settings import settings
from hf_ssl_or.structures import MultiViewBatch, SSLOutput


@settings
class BYOLConfig(MomentumConfig):
    """Settings of BYOL.

    Attributes:
        predictor_hidden: Width of the predictor's hidden layer.
    """

    projector_hidden: int | Literal["same"] = 4096  # the paper; solo-learn, CIFAR
    projector_dim: int = 256  # the paper; solo-learn, CIFAR
    predictor_hidden: int = 4096  # the paper; solo-learn, CIFAR
    momentum: float | int = 0.99  # solo-learn, CIFAR; the paper, 1000 epochs of ImageNet: 0.996

    def validate_ranges(self) -> None:
        """Checks that the predictor has a width."""
        require_positive(self, "predictor_hidden")


@full_precision
def byol_loss(p_VND: Tensor, target_VND: Tensor) -> Tensor:
    """Returns the loss of predictions and the teacher's projections, a mean over images."""
    return 4 + 4 * negative_cosine(p_VND, target_VND)


class BYOL(MomentumMethod):
    """BYOL for any number of views.

    Example:
        method = BYOL(encoder, projector_dim=256)
        method(batch).loss.backward()  # and after the optimizer's step: method.on_step_end(step, total_steps)
    """

    config_class = BYOLConfig
    views = ASYMMETRIC_VIEWS
    citation = """@inproceedings{grill2020bootstrap,
  title = {Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning},
  author = {Grill, Jean-Bastien and Strub, Florian and Altch{\\'e}, Florent and Tallec, Corentin and
            Richemond, Pierre and Buchatskaya, Elena and Doersch, Carl and Avila Pires, Bernardo and Guo, Zhaohan and
            Gheshlaghi Azar, Mohammad and Piot, Bilal and Kavukcuoglu, Koray and Munos, R{\\'e}mi and Valko, Michal},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2020}
}"""

    def build_heads(self) -> None:
        """Adds the predictor."""
        super().build_heads()
        self.predictor = PredictionHead(self.projection_dim, self.config.predictor_hidden)

    def forward(self, batch: MultiViewBatch) -> SSLOutput:
        """Predicts the teacher's projections of the other views."""
        p_VBD = self.predictor(self.projector(self.encode(batch.views_VBCHW)))
        loss = global_mean(byol_loss(p_VBD, self.targets(batch.views_VBCHW)))
        return self.output(loss, {"cosine": 1 - loss / 4}, p_VBD)
