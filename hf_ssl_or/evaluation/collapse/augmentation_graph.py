"""The four-node augmentation graph of the multi-view paper, a teaching tool: why few augmentations hide classes.

Ghosh et al., "Harnessing small projectors and multiple views" (NeurIPS 2024), appendix C.3. Two classes of two images
each; the images of a class differ in their pixels, and each resembles one image of the other class. An augmentation of
an image looks like the image itself with probability `same`, like the other of its class with `same_class`, like its
look-alike of the other class with `same_pixels`, and like the fourth image with `neither`: rho', mu', nu' and delta'
there. The graph W has the weight w_xx' = 4 E[A(x | image) A(x' | image)] between patches x and x', the expectation
over images, scaled as D^-1/2 W D^-1/2 with the node weights of an even graph. A self-supervised loss learns its top
eigenvectors: constant (1, 1, 1, 1), class (1, 1, -1, -1), pixels (1, -1, 1, -1), both (1, -1, -1, 1).

With m augmentations of each image, two draws of one image are often the same draw. On average the sampled graph is
(1 - 1 / m) W + I / m: the gap between class and pixels, and all else that tells eigenvectors apart, shrinks by
1 - 1 / m, while the noise of a single sample grows. This is the paper's ansatz, |mu - nu| and delta to 0, in closed
form.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hf_ssl_or.errors import InputError

EIGENVECTORS = {
    "constant": np.array([1, 1, 1, 1]) / 2,
    "class": np.array([1, 1, -1, -1]) / 2,
    "pixels": np.array([1, -1, 1, -1]) / 2,
    "both": np.array([1, -1, -1, 1]) / 2,
}


@dataclass(frozen=True, kw_only=True)
class AugmentationGraph:
    """Probabilities of what an augmentation looks like; they add up to 1.

    Attributes:
        same: Like its own image.
        same_class: Like the other image of its class.
        same_pixels: Like the image of the other class that shares its pixels.
        neither: Like the fourth image.

    Raises:
        InputError: A probability is negative, or they do not add up to 1.
    """

    same: float
    same_class: float
    same_pixels: float
    neither: float

    def __post_init__(self) -> None:
        values = (self.same, self.same_class, self.same_pixels, self.neither)
        if min(values) < 0 or abs(sum(values) - 1) > 1e-9:
            raise InputError(f"augmentation graph: wants four probabilities that add up to 1, not {values}")

    @property
    def augmentations(self) -> np.ndarray:
        """A(x | image) as (4, 4), one image per row; images are ordered (class, pixels) = 00, 01, 10, 11."""
        row = np.array([self.same, self.same_class, self.same_pixels, self.neither])
        return row[np.bitwise_xor.outer(np.arange(4), np.arange(4))]

    @property
    def weights(self) -> np.ndarray:
        """W as (4, 4); its first row holds the paper's rho, mu, nu and delta."""
        return self.augmentations.T @ self.augmentations

    def eigenvalues(self, num_augmentations: int | None = None) -> dict[str, float]:
        """Eigenvalues of the graph in closed form, by the name of the eigenvector.

        Args:
            num_augmentations: Those of the mean graph of m augmentations per image, from 1; None of the whole graph.
        """
        rho, mu, nu, delta = self.augmentations[0]
        roots = {
            "constant": rho + mu + nu + delta,
            "class": rho + mu - nu - delta,
            "pixels": rho - mu + nu - delta,
            "both": rho - mu - nu + delta,
        }
        lost = 0.0 if num_augmentations is None else 1 / num_augmentations
        return {name: float((1 - lost) * root**2 + lost) for name, root in roots.items()}

    def sample(self, num_augmentations: int, *, repeats: int = 1, seed: int = 0) -> np.ndarray:
        """Draws graphs from m augmentations of each of the four images.

        Args:
            num_augmentations: Augmentations m of each image, from 1.
            repeats: Number of graphs.
            seed: Seed of the draws.

        Returns:
            float64 array (repeats, 4, 4), each scaled as `weights`.
        """
        if num_augmentations < 1:
            raise InputError(f"num_augmentations: at least 1, not {num_augmentations}")
        generator = np.random.default_rng(seed)
        counts = generator.multinomial(num_augmentations, self.augmentations, size=(repeats, 4))
        share = counts / num_augmentations
        return np.swapaxes(share, 1, 2) @ share

    def sampled_eigenvalues(self, num_augmentations: int, *, repeats: int = 1, seed: int = 0) -> np.ndarray:
        """Eigenvalues of sampled graphs from the largest, (repeats, 4); they near the whole graph's as m grows."""
        return np.linalg.eigvalsh(self.sample(num_augmentations, repeats=repeats, seed=seed))[:, ::-1]
