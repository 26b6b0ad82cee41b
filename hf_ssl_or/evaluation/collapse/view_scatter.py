"""Scatter of features within and between images, gathered from a stream of views: what LiDAR and alignment need."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_ssl_or.distributed import sum_over_ranks
from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation.collapse.spectra import ROUNDING, CovarianceAccumulator


class ViewScatter:
    """Sums over images, each seen in q views, from which LiDAR and alignment follow without a bank of features.

    Images are independent, so batches and processes may hold any share of them; all views of an image come together.

    Args:
        dimension: Width D of the features.
        num_views: Views q of each image, at least 2.
        device: Where the sums are held; it must know float64.

    Attributes:
        means: Count, mean and scatter of the images' mean features.
        within_DD: Sum of the outer products of the views' deviations from their image's mean.
        distance: Sum over images of the mean squared distance between two views, scaled to unit length.

    Raises:
        InputError: Fewer than 2 views.
    """

    def __init__(self, dimension: int, num_views: int, device: torch.device | str = "cpu") -> None:
        if num_views < 2:
            raise InputError(f"views: at least 2 of each image, not {num_views}")
        self.num_views = num_views
        self.means = CovarianceAccumulator(dimension, device, "views")
        self.within_DD = torch.zeros_like(self.means.scatter_DD)
        self.distance = torch.zeros((), dtype=torch.float64, device=device)

    @property
    def count(self) -> int:
        """Images seen."""
        return self.means.count

    @torch.no_grad()
    def update(self, views_BVD: Tensor) -> None:
        """Takes in all views of B images."""
        wanted = (self.num_views, len(self.means.mean_D))
        if views_BVD.ndim != 3 or tuple(views_BVD.shape[1:]) != wanted:
            raise InputError(f"views: want shape (images, {wanted[0]}, {wanted[1]}), not {tuple(views_BVD.shape)}")
        x_BVD = views_BVD.detach().to(self.within_DD.device, torch.float64)
        mean_BD = x_BVD.mean(1)
        deviation_MD = (x_BVD - mean_BD[:, None]).flatten(0, 1)
        unit_BVD = F.normalize(x_BVD, dim=2)
        spread = (unit_BVD - unit_BVD.mean(1, keepdim=True)).square().sum()
        self.within_DD += deviation_MD.T @ deviation_MD
        self.distance += 2 * spread / (self.num_views - 1)  # pairs of q points are 2 q times their spread apart
        self.means.update(mean_BD)

    def over_ranks(self) -> ViewScatter:
        """Merges what all processes have seen; every process gets the same new object."""
        merged = ViewScatter(len(self.means.mean_D), self.num_views, self.within_DD.device)
        merged.means = self.means.over_ranks()
        merged.within_DD = sum_over_ranks(self.within_DD)
        merged.distance = sum_over_ranks(self.distance)
        return merged

    def squared_distance(self) -> float:
        """Mean squared distance between two views of an image, both of unit length."""
        self._check(images=1)
        return float(self.distance) / self.count

    def discriminant_eigenvalues(self, delta: float = 1e-4) -> Tensor:
        """Eigenvalues (D,) of W^-1/2 B W^-1/2 from the largest, see `collapse.lidar`; 0 where images do not differ.

        Raises:
            InputError: Fewer than 2 images, NaN or infinite features, or `delta` too small to invert W.
        """
        self._check(images=2)
        within_DD, between_DD = (x.cpu() for x in (self.within_DD, self.means.covariance_DD))
        within_DD = within_DD / (self.count * (self.num_views - 1))
        mean_square = self.means.second_moment_DD.trace().cpu() + within_DD.trace()
        if between_DD.trace() <= ROUNDING * mean_square:
            return torch.zeros(len(within_DD), dtype=torch.float64)
        lower_DD, failed = torch.linalg.cholesky_ex(within_DD + delta * torch.eye(len(within_DD), dtype=torch.float64))
        if failed:
            raise InputError(f"LiDAR: delta={delta} is too small beside the features; take a larger one")
        half_DD = torch.linalg.solve_triangular(lower_DD, between_DD, upper=False)
        ratio_DD = torch.linalg.solve_triangular(lower_DD, half_DD.T, upper=False)
        return torch.linalg.eigvalsh((ratio_DD + ratio_DD.T) / 2).flip(0).clamp(min=0)

    def _check(self, images: int) -> None:
        if self.count < images:
            raise InputError(f"views: {self.count} images were seen; at least {images} are needed")
        if not bool((self.within_DD.isfinite().all() & self.means.scatter_DD.isfinite().all()).cpu()):
            raise InputError("views: some hold NaN or infinite values")

    @classmethod
    def of(cls, views: Views) -> ViewScatter:
        """Takes in q views of n images, (n, q, D); a scatter is given back as it is."""
        if isinstance(views, ViewScatter):
            return views
        x_NVD = torch.as_tensor(views).detach().cpu()
        if x_NVD.ndim != 3 or not x_NVD.numel():
            raise InputError(f"views: wants (images, views, D), not shape {tuple(x_NVD.shape)}")
        scatter = cls(x_NVD.shape[2], x_NVD.shape[1])
        for batch_BVD in x_NVD.split(max(1, 8192 // x_NVD.shape[1])):  # bounds the copy in float64
            scatter.update(batch_BVD)
        return scatter


Views = Tensor | np.ndarray | ViewScatter
