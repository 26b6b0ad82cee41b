"""LeJEPA (Balestriero and LeCun, 2025): views agree, and embeddings follow an isotropic Gaussian distribution.

With z_s the projections of view s, m_n the mean over the global views of image n, and x = a . z along a random unit
direction a, new in each step:

    loss = (1 - lambda) mean (z_snd - m_nd)^2 + lambda mean_{s, a} SIGReg(x_s)
    SIGReg(x) = N integral |mean_n exp(i t x_n) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) dt   (the Epps-Pulley test)

over all views s, global and local, each tested by itself. The integral runs over [-3, 3] by the trapezoidal rule with
17 knots on [0, 3], where the integrand, which is even, is taken twice (the authors' code; the paper's text: [-5, 5]).
Nothing here is about pairs: any number of views is the published loss, at a cost of as many.

The knots are t = k dt, so exp(i t x) are powers of exp(i dt x), and neither the forward nor the backward holds more of
them than one at a time. Processes add up their sums over images; they exchange no embeddings.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_ssl_or.distributed import sum_over_ranks, world_size
from hf_ssl_or.methods.base import require_at_least, require_positive, require_share
from hf_ssl_or.methods.base_methods import ProjectionMethod, ProjectorConfig
from hf_ssl_or.methods.functional import full_precision, global_mean
from hf_ssl_or.randomness import keyed_generator
from hf_ssl_or.settings import settings
from hf_ssl_or.structures import MultiViewBatch, SSLOutput, ViewSpec


@settings
class LeJEPAConfig(ProjectorConfig):
    """Settings of LeJEPA.

    Attributes:
        sigreg_weight: Lambda, the share of SIGReg in the loss; the agreement of views has the rest.
        directions: Number of random directions in a step.
        knots: Number of points of the trapezoidal rule on [0, largest_frequency].
        largest_frequency: Where the integral ends.
    """

    projector_hidden: int | Literal["same"] = 2048  # the authors' example; lightly
    projector_dim: int = 64  # lightly; the authors' example, ten classes of ImageNet: 16
    projector_layers: int = 3  # the authors' example; lightly
    sigreg_weight: float | int = 0.05  # lightly; the paper: 0.01 to 0.1
    directions: int = 1024  # the authors' README; lightly; the authors' example: 256
    knots: int = 17  # the authors' code; lightly
    largest_frequency: float | int = 3.0  # the authors' example; lightly

    def validate_ranges(self) -> None:
        """Checks that the share is one and that there is something to integrate."""
        require_positive(self, "directions", "largest_frequency")
        require_share(self, "sigreg_weight")
        require_at_least(self, 2, "knots")


@full_precision
def lejepa_loss(
    z_SBD: Tensor,
    directions_DA: Tensor,
    global_views: int,
    sigreg_weight: float = 0.05,
    knots: int = 17,
    largest_frequency: float = 3.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss of the global batch and its unweighted terms.

    Args:
        z_SBD: This process's projections of all views, the global ones first.
        directions_DA: Unit columns, the same on every process.
        global_views: How many of the views are averaged into what all are to agree on.
        sigreg_weight: Lambda.
        knots: Number of points of the trapezoidal rule.
        largest_frequency: Where the integral ends.
    """
    invariance = global_mean((z_SBD - z_SBD[:global_views].mean(0)).square().mean())
    normality = sigreg(z_SBD, directions_DA, knots, largest_frequency)
    loss = (1 - sigreg_weight) * invariance + sigreg_weight * normality
    return loss, {"invariance": invariance, "sigreg": normality}


def sigreg(z_SBD: Tensor, directions_DA: Tensor, knots: int, largest_frequency: float) -> Tensor:
    """Returns the mean Epps-Pulley statistic over views and directions; arguments as in `lejepa_loss`."""
    images, step = z_SBD.shape[1] * world_size(), largest_frequency / (knots - 1)
    t_T = step * torch.arange(1, knots, dtype=z_SBD.dtype, device=z_SBD.device)  # both functions are 1 at t = 0
    gaussian_T = (-t_T.square() / 2).exp()
    weights_T = 2 * step * gaussian_T
    weights_T[-1] /= 2
    angles_SBA = z_SBD @ (step * directions_DA.to(z_SBD.dtype))
    cosines_TSA, sines_TSA = sum_over_ranks(_WaveSums.apply(angles_SBA, knots - 1)) / images
    errors_TSA = (cosines_TSA - gaussian_T[:, None, None]).square() + sines_TSA.square()
    return images * (weights_T @ errors_TSA.flatten(1)).mean()


class _WaveSums(torch.autograd.Function):
    """Sums cos(k angle) and sin(k angle) over images for k = 1 ... waves: (S, B, A) to (2, waves, S, A).

    Autograd would keep every power of w = exp(i angle). Here they are made anew, the backward as Horner's scheme:
    the gradient is Re sum_k k (dL/dsin_k + i dL/dcos_k) w^k.
    """

    @staticmethod
    def forward(ctx: Any, angles_SBA: Tensor, waves: int) -> Tensor:
        ctx.save_for_backward(angles_SBA)
        wave = _wave(angles_SBA)
        power, sums = wave.clone(), []
        for k in range(waves):
            power = power.mul_(wave) if k else power
            sums.append(power.sum(1))
        sums_TSA = torch.stack(sums)
        return torch.stack([sums_TSA.real, sums_TSA.imag])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (angles_SBA,) = ctx.saved_tensors
        waves = grad.shape[1]
        k_T = torch.arange(1, waves + 1, dtype=grad.dtype, device=grad.device)[:, None, None]
        terms_TSA = torch.complex(grad[1] * k_T, grad[0] * k_T)
        wave = _wave(angles_SBA)
        total = torch.zeros_like(wave)
        for term_SA in terms_TSA.flip(0):
            total.add_(term_SA[:, None]).mul_(wave)
        return total.real, None


def _wave(angles: Tensor) -> Tensor:
    return torch.complex(angles.cos(), angles.sin())


class LeJEPA(ProjectionMethod):
    """LeJEPA for any number of global and local views."""

    config_class = LeJEPAConfig
    takes_local_views = True
    views = (ViewSpec(crop_scale=(0.08, 1.0), solarize=0.2),)  # the authors' README without blur, for small images
    citation = """@misc{balestriero2025lejepa,
  title = {{LeJEPA}: Provable and Scalable Self-Supervised Learning Without the Heuristics},
  author = {Balestriero, Randall and LeCun, Yann},
  year = {2025},
  eprint = {2511.08544},
  archivePrefix = {arXiv}
}"""

    def forward(self, batch: MultiViewBatch) -> SSLOutput:
        """Compares the views' projections with those of the global views and with a Gaussian distribution."""
        config = self.config
        z_SBD = self.projector(self.encode_with_local_views(batch))
        generator = keyed_generator(batch.seed, batch.step, "directions", device=z_SBD.device)
        noise_DA = torch.randn(z_SBD.shape[-1], config.directions, generator=generator, device=z_SBD.device)
        loss, terms = lejepa_loss(
            z_SBD,
            F.normalize(noise_DA, dim=0),
            len(batch.views_VBCHW),
            config.sigreg_weight,
            config.knots,
            config.largest_frequency,
        )
        return self.output(loss, terms, z_SBD)
