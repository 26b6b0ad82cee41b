"""Three heads for all methods: projection, prediction, prototypes, with the loss that prototypes are trained by.

Input and output are (V, B, ...). A head sees all views in one call, view after view, so that batch normalization sees
them as the encoder's does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hf_ssl_or.methods.functional import full_precision


class ProjectionHead(nn.Module):
    """An MLP: (Linear, BatchNorm, ReLU) times `layers` - 1, then Linear.

    Args:
        in_features: Width of the input.
        hidden_features: Width of the hidden layers.
        out_features: Width of the output.
        layers: Number of linear layers.
        norm: Batch normalization after hidden layers, whose linear layers then have no bias.
        last_norm: Batch normalization without scale and shift after the last layer, which then has no bias.
        gelu: GELU instead of ReLU.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        *,
        layers: int = 2,
        norm: bool = True,
        last_norm: bool = False,
        gelu: bool = False,
    ) -> None:
        super().__init__()
        widths = [in_features, *[hidden_features] * (layers - 1)]
        modules: list[nn.Module] = []
        for width, next_width in zip(widths, widths[1:], strict=False):
            modules.append(nn.Linear(width, next_width, bias=not norm))
            if norm:
                modules.append(nn.BatchNorm1d(next_width))
            modules.append(nn.GELU() if gelu else nn.ReLU(inplace=True))
        modules.append(nn.Linear(widths[-1], out_features, bias=not last_norm))
        if last_norm:
            modules.append(nn.BatchNorm1d(out_features, affine=False))
        self.mlp = nn.Sequential(*modules)
        self.out_features = out_features

    def forward(self, x_VBF: Tensor) -> Tensor:
        """Maps (V, B, in_features) to (V, B, out_features)."""
        return self.mlp(x_VBF.flatten(0, 1)).unflatten(0, x_VBF.shape[:2])


class PredictionHead(ProjectionHead):
    """The predictor of a teacher's projection: Linear, BatchNorm, ReLU, Linear, from D to D.

    Args:
        features: D, the width of the projections.
        hidden_features: Width of the hidden layer.
        last_norm: As in `ProjectionHead`.
    """

    def __init__(self, features: int, hidden_features: int, *, last_norm: bool = False) -> None:
        super().__init__(features, hidden_features, features, last_norm=last_norm)


class PrototypeHead(nn.Module):
    """Cosine similarities to K learned prototypes (Caron et al., SwAV, NeurIPS 2020; DINO, ICCV 2021).

    Both inputs and prototypes are scaled to unit length here, so nothing has to be renormalized after a step. Always
    in full precision, as the cosines are divided by temperatures that would make errors 10 to 25 times as large.

    Args:
        in_features: Width D of the input.
        prototypes: Their number K.
    """

    def __init__(self, in_features: int, prototypes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(prototypes, in_features))
        nn.init.trunc_normal_(self.weight, std=in_features**-0.5)

    def forward(self, z_VBD: Tensor, *, frozen: bool = False) -> Tensor:
        """Maps (V, B, D) to similarities (V, B, K) in [-1, 1].

        Args:
            z_VBD: Projections, of any length.
            frozen: Give the prototypes a gradient of zeros. (None at all would make data parallelism wait for it.)
        """
        weight_KD = self.weight.view_as(self.weight)  # a hook on the parameter itself would outlive this call
        if frozen and weight_KD.requires_grad:
            weight_KD.register_hook(torch.zeros_like)
        return _cosines(z_VBD, weight_KD)


@full_precision
def _cosines(z_VBD: Tensor, weight_KD: Tensor) -> Tensor:
    return F.linear(F.normalize(z_VBD, dim=-1), F.normalize(weight_KD, dim=-1))


@full_precision
def swapped_cross_entropy(scores_SBK: Tensor, targets_VBK: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Each view's assignment to prototypes predicts that of the other views (SwAV, eq. 1; DINO, eq. 3).

    The mean over images and pairs (u < V, v < S, v != u) of -sum_k t_uk log softmax(s_v / temperature)_k. It is linear
    in the targets, so each view is compared with the sum of the other views' targets: cost S, not V S.

    Args:
        scores_SBK: Similarities of S views, of which the first V have targets and the rest (local views) have not.
        targets_VBK: Distributions over the K prototypes, without gradient.
        temperature: Divides the scores.

    Returns:
        The loss, and the mean over targets of their largest probability, 1 / K where all prototypes are alike. Both
        are means over images, so those of shards can be averaged.
    """
    views, images = targets_VBK.shape[:2]
    total = _SwappedCrossEntropy.apply(scores_SBK, targets_VBK, temperature)
    return total / (views * (len(scores_SBK) - 1) * images), targets_VBK.amax(-1).mean()


class _SwappedCrossEntropy(torch.autograd.Function):
    """The sum over images and pairs, view by view: nothing as large as the scores is kept for backward but they."""

    @staticmethod
    def forward(ctx: Any, scores_SBK: Tensor, targets_VBK: Tensor, temperature: float) -> Tensor:
        normalizers, total = [], scores_SBK.new_zeros(())
        for scores_BK, (others_BK, count) in zip(scores_SBK, _targets_of_others(scores_SBK, targets_VBK), strict=True):
            logits_BK = scores_BK / temperature
            log_likelihood_BK = logits_BK.log_softmax(-1)  # one kernel, where logsumexp is four
            normalizer_B1 = logits_BK[:, :1] - log_likelihood_BK[:, :1]
            normalizers.append(normalizer_B1 - (math.log(count) if count else -math.inf))
            total -= torch.dot(others_BK.flatten(), log_likelihood_BK.flatten())
        ctx.temperature = temperature
        ctx.save_for_backward(scores_SBK, targets_VBK, *normalizers)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        scores_SBK, targets_VBK, *normalizers = ctx.saved_tensors
        grad_SBK = torch.empty_like(scores_SBK)
        for view, (others_BK, _) in enumerate(_targets_of_others(scores_SBK, targets_VBK)):
            grad_BK = torch.sub(scores_SBK[view] / ctx.temperature, normalizers[view], out=grad_SBK[view])
            grad_BK.exp_().sub_(others_BK)
        return grad_SBK.mul_(grad / ctx.temperature), None, None


def _targets_of_others(scores_SBK: Tensor, targets_VBK: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Yields for each of S views the sum of the targets of the other views, and their number."""
    views = len(targets_VBK)
    if views == len(scores_SBK) == 2:  # no sum to make
        yield from ((targets_VBK[1], 1), (targets_VBK[0], 1))
        return
    total_BK = targets_VBK.sum(0)
    for view in range(len(scores_SBK)):
        if view < views:
            yield total_BK - targets_VBK[view], views - 1
        else:
            yield total_BK, views
