"""The four-node augmentation graph of the multi-view paper, a teaching tool: why few augmentations hide classes.

Ghosh et al., "Harnessing small projectors and multiple views" (NeurIPS 2024), appendix C.3. Two classes of two images
each; the images of a class differ in their pixels, and each resembles one image of the other class. An augmentation of
an image looks like the image itself with probability `same`, like the other of its class with `same_class`, like its
look-alike of the other class with `same_pixels`, and like the fourth image with `neither`: rho', mu', nu' and delta'
there. The graph W has the weight w_xx' = 4 E[A(x | image) A(x' | image)] between patches x and x', the expectation
over images, scaled as D^-1/2 W D^-1/2 with the node weights of an even graph. A self-supervised loss learns its top
eigenvectors: constant (1, 1, 1, 1), class (1, 1, -1, -1), pixels (1, -1, 1, -1), both (1, -1, -1, 1).

With m augmentations of each image, two draws of one image are often the same draw. The mean of such graphs is
(1 - 1 / m) W + I / m: the gap between class and pixels, and all else that tells eigenvectors apart, shrinks by
1 - 1 / m, while the noise of a single sample grows. This is the paper's ansatz, |mu - nu| and delta to 0, in closed
form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hf_ssl_or.errors import InputError
from hf_ssl_or.randomness import hashed_seed

EIGENVECTORS = {
    "constant": np.array([1, 1, 1, 1]) / 2,
    "class": np.array([1, 1, -1, -1]) / 2,
    "pixels": np.array([1, -1, 1, -1]) / 2,
    "both": np.array([1, -1, -1, 1]) / 2,
}
_PROBABILITIES = ("same", "same_class", "same_pixels", "neither")


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
        if not (min(values) >= 0 and abs(sum(values) - 1) <= 1e-9):  # which holds for NaN too
            names = ", ".join(f"{name} {value:g}" for name, value in zip(_PROBABILITIES, values, strict=True))
            raise InputError(f"augmentation graph: four probabilities that add up to 1 are wanted, not {names}")

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
        """Returns the eigenvalues of the graph in closed form, by the name of the eigenvector.

        Args:
            num_augmentations: Those of the mean graph of m augmentations per image, from 1; None of the full graph.
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
        """Samples graphs from m augmentations of each of the four images.

        Args:
            num_augmentations: Augmentations m of each image, from 1.
            repeats: Number of graphs.
            seed: Seed of the samples.

        Returns:
            float64 array (repeats, 4, 4), each scaled as `weights`.

        Raises:
            InputError: There are no augmentations, or no graphs.
        """
        for name, value in (("augmentations", num_augmentations), ("repeats", repeats)):
            if value < 1:
                raise InputError(f"{name}: at least 1, not {value}")
        generator = np.random.Generator(np.random.Philox(hashed_seed(seed, num_augmentations, "augmentation graph")))
        counts = generator.multinomial(num_augmentations, self.augmentations, size=(repeats, 4))
        share = counts / num_augmentations
        return np.swapaxes(share, 1, 2) @ share

    def sampled_eigenvalues(self, num_augmentations: int, *, repeats: int = 1, seed: int = 0) -> np.ndarray:
        """Returns eigenvalues of sampled graphs from the largest, (repeats, 4); they near the full graph's as m grows.

        The arguments are those of `sample`.
        """
        return np.linalg.eigvalsh(self.sample(num_augmentations, repeats=repeats, seed=seed))[:, ::-1]


@dataclass(frozen=True, kw_only=True)
class SampledSpectrum:
    """Eigenvalues of graphs sampled from a number of augmentations, from the largest, each (4,).

    Attributes:
        num_augmentations: Augmentations of each image.
        mean: Over the sampled graphs.
        std: Standard deviation over them.
        mean_graph: Of the mean of all such graphs, in closed form.
    """

    num_augmentations: int
    mean: np.ndarray
    std: np.ndarray
    mean_graph: np.ndarray


def sample_spectra(
    graph: AugmentationGraph, augmentations: Sequence[int], *, repeats: int, seed: int = 0
) -> list[SampledSpectrum]:
    """Samples graphs for each number of augmentations, in ascending order.

    Raises:
        InputError: A number of augmentations is below 1, or that of graphs below 2.
    """
    if repeats < 2:
        raise InputError(f"repeats: 2 or more, for a standard deviation over them, not {repeats}")
    spectra = []
    for m in sorted(set(augmentations)):
        sampled = graph.sampled_eigenvalues(m, repeats=repeats, seed=seed)
        mean_graph = np.array(sorted(graph.eigenvalues(m).values(), reverse=True))
        mean, std = sampled.mean(0), sampled.std(0, ddof=1)
        spectra.append(SampledSpectrum(num_augmentations=m, mean=mean, std=std, mean_graph=mean_graph))
    return spectra
