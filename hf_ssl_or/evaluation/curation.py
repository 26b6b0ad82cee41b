"""What features say about a set of images: the nearest neighbors, near-duplicates and outliers of each.

Shapes: N images, F features, K neighbors, B rows of a chunk. All searches are exact, by cosine, in chunks of rows, so
that memory grows with N and not with its square.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation.protocols.knn import nearest_in_bank
from hf_ssl_or.randomness import keyed_permutation

_CHUNK_ELEMENTS = 2**23  # similarities that are held at once
_ROUNDING = 1e-6  # of a cosine in float32: a threshold of 1 finds equal features
_SAMPLE = 1024  # images that the distance between neighbors is measured on
_NEAR = 0.15  # share of that distance that near-duplicates are apart, at most


@dataclass(frozen=True, kw_only=True)
class Curation:
    """What is asked about the set.

    Attributes:
        neighbors: Nearest images of each image; 0 for none.
        duplicates: Cosine from which two images are near-duplicates; "auto" measures it (see
            `duplicate_threshold`), None leaves them out.
        outliers: Nearest images that an image's outlier score is the mean distance to; 0 for no score.
    """

    neighbors: int = 0
    duplicates: float | Literal["auto"] | None = None
    outliers: int = 0

    def __post_init__(self) -> None:
        for name in ("neighbors", "outliers"):
            if getattr(self, name) < 0:
                raise InputError(f"--{name}: 1 or more nearest images, not {getattr(self, name)}")
        if self.duplicates not in (None, "auto"):
            check_threshold(float(self.duplicates))

    def check(self, n: int) -> None:
        """Refuses what n images are too few for.

        Raises:
            InputError: The message names the option.
        """
        for name, k in (("neighbors", self.neighbors), ("outliers", self.outliers)):
            if k:
                check_k(k, n, f"--{name}")
        if self.duplicates is not None:
            check_k(1, n, "--duplicates")

    @property
    def wanted(self) -> bool:
        """Whether anything is."""
        return bool(self.neighbors or self.outliers or self.duplicates is not None)


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What was found among N images; None what was not asked for.

    Attributes:
        neighbor_index: Places of the nearest images, (N, K) int64, the nearest first.
        neighbor_similarities: Their cosines, (N, K) float32.
        duplicate_group: See `duplicate_groups`.
        groups: See `group_members`.
        threshold: Cosine from which images are near-duplicates.
        outlier_score: See `outlier_scores`.
    """

    neighbor_index: Tensor | None = None
    neighbor_similarities: Tensor | None = None
    duplicate_group: Tensor | None = None
    groups: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    threshold: float | None = None
    outlier_score: Tensor | None = None


def curate(features_NF: Tensor, curation: Curation) -> Findings:
    """Finds what is asked for.

    Args:
        features_NF: Features, (N, F), on any device.
        curation: What is asked for.

    Raises:
        InputError: There are too few images.
    """
    found: dict[str, Any] = {}
    curation.check(len(features_NF))
    if most := max(curation.neighbors, curation.outliers):
        cosine_NK, index_NK = nearest_neighbors(features_NF, most)
        if k := curation.neighbors:
            found |= {"neighbor_index": index_NK[:, :k], "neighbor_similarities": cosine_NK[:, :k]}
        if k := curation.outliers:
            found["outlier_score"] = outlier_scores(cosine_NK[:, :k])
    if curation.duplicates is not None:
        given = curation.duplicates
        threshold = duplicate_threshold(features_NF) if given == "auto" else float(given)
        group_N = duplicate_groups(features_NF, threshold)
        groups = group_members(features_NF, group_N)
        found |= {"threshold": threshold, "duplicate_group": group_N, "groups": groups}
    return Findings(**found)


@torch.no_grad()
def nearest_neighbors(features_NF: Tensor, k: int, query_Q: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns the k images of a set that lie nearest to some of its images; no image is its own neighbor.

    Args:
        features_NF: Features, (N, F), on any device.
        k: Neighbors of each, from 1 to N - 1.
        query_Q: Indices of the images asked for; None for all.

    Returns:
        Cosine similarities (Q, k) float32, from the nearest, and indices (Q, k) int64; of equally near images the
        lower index comes first. A feature of zeros has the similarity 0 to all.

    Raises:
        InputError: There are not more than k images.
    """
    check_k(k, len(features_NF), "neighbors")
    own_Q = torch.arange(len(features_NF)) if query_Q is None else query_Q
    queries_QF = features_NF if query_Q is None else features_NF[query_Q]
    cosine_QK, index_QK = torch.empty(len(own_Q), k), torch.empty(len(own_Q), k, dtype=torch.int64)
    # Among the k + 1 nearest is the image itself, unless k + 1 others are as near.
    for rows, cosine_BP, index_BP in nearest_in_bank(features_NF, queries_QF, [k + 1]):
        is_own_BP = index_BP == own_Q.to(index_BP.device)[rows, None]
        is_own_BP[:, -1] |= ~is_own_BP.any(1)
        cosine_QK[rows] = cosine_BP[~is_own_BP].view(-1, k).cpu()
        index_QK[rows] = index_BP[~is_own_BP].view(-1, k).cpu()
    return cosine_QK.clamp_(-1, 1), index_QK


def check_k(k: int, n: int, what: str) -> None:
    """Refuses a number of neighbors that n images do not have.

    Raises:
        InputError: The message names what asked for them.
    """
    if not 1 <= k < n:
        raise InputError(f"{what}: {k} nearest of {n} images; at least 1 and fewer than there are images")


def outlier_scores(cosine_NK: Tensor) -> Tensor:
    """Returns the mean cosine distance of each image to its nearest neighbors: (N,) float32, 0 to 2.

    The distance to the k nearest neighbors is Ramaswamy, Rastogi, Shim, "Efficient algorithms for mining outliers from
    large data sets" (SIGMOD 2000), in the mean over them (Angiulli, Pizzuti, PKDD 2002).

    Args:
        cosine_NK: Similarities to the neighbors, see `nearest_neighbors`.
    """
    return (1 - cosine_NK).mean(1)


def duplicate_threshold(features_NF: Tensor) -> float:
    """Returns the cosine from which two images count as near-duplicates, where none is given.

    Their distance is then 0.15 of the median distance of an image to its nearest neighbor, in a sample of at most
    1,024 images. Encoders differ too much for one number: of ImageNet classes at 64 pixels half of all images have a
    neighbor at 0.64 under a trained EfficientNet-Lite0, and at 0.997 under an untrained ResNet-18, to which a
    threshold of 0.95 would be no distinction at all. In a set that consists of duplicates for the most part the
    threshold comes out too high: give one.

    Args:
        features_NF: Features of at least two images.
    """
    sample = torch.from_numpy(np.sort(keyed_permutation(len(features_NF), "duplicate threshold")[:_SAMPLE]))
    cosine_N1, _ = nearest_neighbors(features_NF[sample.to(features_NF.device)], 1)
    return float((1 - _NEAR * (1 - cosine_N1).median()).clamp(0.01, 1))


@torch.no_grad()
def duplicate_groups(features_NF: Tensor, threshold: float) -> Tensor:
    """Returns the group of near-duplicates that each image is in: (N,) int64, -1 for none.

    Groups are the connected components of the graph of all pairs whose cosine is at least the threshold, of two or
    more images, numbered from 0 in the order of their first images.

    Args:
        features_NF: Features, (N, F), on any device.
        threshold: More than 0, at most 1.

    Raises:
        InputError: The threshold is out of range.
    """
    check_threshold(threshold)
    unit_NF = F.normalize(features_NF.float(), dim=1)
    n = len(unit_NF)
    first_N = torch.arange(n, device=unit_NF.device)  # the lowest image of each image's component
    rows = max(64, _CHUNK_ELEMENTS // max(1, n))
    for start in range(0, n, rows):
        cosine_BM = unit_NF[start : start + rows] @ unit_NF[start:].T  # those before have met these rows already
        new_BM = cosine_BM >= threshold - _ROUNDING
        new_BM &= first_N[start : start + rows, None] != first_N[None, start:]
        a_P, b_P = new_BM.nonzero().T + start
        if len(a_P):
            first_N = _join(first_N, a_P, b_P)
    first_N = first_N.cpu()
    size_N = torch.bincount(first_N, minlength=n)
    group_N = torch.full((n,), -1, dtype=torch.int64)
    heads_G = (size_N > 1).nonzero()[:, 0]
    group_N[heads_G] = torch.arange(len(heads_G))
    return group_N[first_N]


def check_threshold(threshold: float) -> None:
    """Refuses a threshold of near-duplicates that is no cosine above 0.

    Raises:
        InputError: It is out of range.
    """
    if not 0 < threshold <= 1:
        raise InputError(f"--duplicates: a cosine of more than 0 and at most 1, not {threshold:g}")


def _join(first_N: Tensor, a_P: Tensor, b_P: Tensor) -> Tensor:
    """Joins the components of pairs of images.

    Args:
        first_N: The lowest image of each image's component.
        a_P: One image of each pair.
        b_P: The other.
    """
    a_P, b_P = first_N[a_P], first_N[b_P]
    while bool((a_P != b_P).any()):
        first_N = first_N.scatter_reduce(0, torch.maximum(a_P, b_P), torch.minimum(a_P, b_P), "amin")
        while bool(((ahead_N := first_N[first_N]) != first_N).any()):
            first_N = ahead_N
        a_P, b_P = first_N[a_P], first_N[b_P]
    return first_N


def group_members(features_NF: Tensor, group_N: Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the images of each group and their cosines to its representative, the largest group first.

    The representative is the first image of the set that is in the group; the others follow from the most alike.

    Args:
        features_NF: Features, (N, F).
        group_N: Groups, see `duplicate_groups`.
    """
    in_group = (group_N >= 0).nonzero()[:, 0]
    order = in_group[group_N[in_group].argsort(stable=True)]
    sizes = torch.bincount(group_N[in_group]).tolist() if len(in_group) else []
    groups = []
    for member_M in order.split(sizes):
        unit_MF = F.normalize(features_NF[member_M].float(), dim=1).cpu()
        cosine_M = (unit_MF @ unit_MF[0]).clamp(-1, 1)
        cosine_M[0] = 1.0
        place_M = torch.cat(
            [torch.zeros(1, dtype=torch.int64), 1 + cosine_M[1:].argsort(descending=True, stable=True)]
        )
        groups.append((member_M[place_M].numpy(), cosine_M[place_M].numpy()))
    return sorted(groups, key=lambda group: -len(group[0]))
