"""Multinomial logistic regression to convergence: L-BFGS that knows the features' covariance."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor
from torch.nn import functional as F

_SAMPLE = 8192  # rows that the covariance is estimated on: it only shapes the path, not the minimum
_MEMORY = 10  # pairs of steps and gradient changes
_SMALLEST_STEP = 1e-6


class LogisticRegression:
    """Minimizes mean cross-entropy + l2 / 2 * ||W||^2 over one set of features, for any number of penalties.

    The Hessian is close to c * Cov + l2, with Cov the features' second moments and c the mean of p (1 - p) over the
    predicted probabilities. L-BFGS (Nocedal & Wright, Numerical Optimization, 2006, algorithm 7.4) starts from the
    inverse of that matrix instead of a multiple of the identity, so the spread of the features' eigenvalues, which for
    representations is large, costs no iterations. Wide features of few images are first expressed in the
    images' span, which holds the minimum.

    Args:
        features_NF: Features, float32 or float64, centered if they are not to weigh on the bias.
        labels_N: Classes, (N,) int64, on the same device.
        num_classes: Number of classes K.
        bias: Whether the K scores have a free offset.
        tolerance: Largest absolute entry of the gradient at the end; the default is scikit-learn's.
        iterations: At most so many for each penalty.
    """

    def __init__(
        self,
        features_NF: Tensor,
        labels_N: Tensor,
        num_classes: int,
        *,
        bias: bool = True,
        tolerance: float = 1e-4,
        iterations: int = 200,
    ) -> None:
        self.labels_N1, self.bias = labels_N[:, None], bias
        self.tolerance, self.iterations = tolerance, iterations
        wide = features_NF.shape[1] > features_NF.shape[0]
        self.span_FR = torch.linalg.qr(features_NF.T).Q if wide else None
        self.x_NR = features_NF if self.span_FR is None else features_NF @ self.span_FR
        sample_MR = self.x_NR[:: max(1, len(self.x_NR) // _SAMPLE)].double()
        self.eigenvalues_R, axes_RR = torch.linalg.eigh(sample_MR.T @ sample_MR / len(sample_MR))
        self.eigenvalues_R = self.eigenvalues_R.clamp(min=0).to(self.x_NR.dtype)
        self.axes_RR = axes_RR.to(self.x_NR.dtype)
        self.weight_KR = self.x_NR.new_zeros(num_classes, self.x_NR.shape[1] + 1)  # the last column is the bias

    def solve(self, l2: float) -> tuple[Tensor, Tensor]:
        """Finds the minimum for a penalty, from where the last call ended.

        Args:
            l2: Weight of the squared norm, above 0; the bias is free.

        Returns:
            Weights (K, F) and biases (K,), zero without a bias.
        """
        w, pairs = self.weight_KR, deque[tuple[Tensor, Tensor]](maxlen=_MEMORY)
        value, gradient, curvature = self._objective(w, l2)
        inverse = _InverseHessian(self, l2, curvature)
        for _ in range(self.iterations):
            if float(gradient.abs().max()) <= self.tolerance:
                break
            direction = -inverse.times(gradient, pairs)
            step, slope = 1.0, float((direction * gradient).sum())
            while step >= _SMALLEST_STEP:
                new = self._objective(w + step * direction, l2)
                if new[0] <= value + 1e-4 * step * slope + 1e-7 * abs(value):  # the last term is float32's rounding
                    break
                step /= 2
            else:
                break
            s, y = step * direction, new[1] - gradient
            if float((s * y).sum()) > 0:  # as it is in exact arithmetic
                pairs.append((s, y))
            w, value, gradient = w + s, new[0], new[1]
        self.weight_KR = w
        weight_KF = w[:, :-1] if self.span_FR is None else w[:, :-1] @ self.span_FR.T
        return weight_KF.clone(), w[:, -1].clone()

    def _objective(self, w: Tensor, l2: float) -> tuple[float, Tensor, float]:
        """Returns the value, its gradient, and the mean of p (1 - p)."""
        weight_KR, bias_K = w[:, :-1], w[:, -1]
        log_p_NK = F.log_softmax(torch.addmm(bias_K, self.x_NR, weight_KR.T), dim=1)
        value = -log_p_NK.gather(1, self.labels_N1).double().mean() + l2 / 2 * weight_KR.double().square().sum()
        error_NK = log_p_NK.exp_()
        mean, square = error_NK.mean(dtype=torch.float64), torch.linalg.vector_norm(error_NK, dtype=torch.float64) ** 2
        curvature = mean - square / error_NK.numel()
        error_NK.scatter_add_(1, self.labels_N1, error_NK.new_full((1, 1), -1).expand_as(self.labels_N1))
        gradient = torch.empty_like(w)
        torch.addmm(weight_KR, error_NK.T, self.x_NR, beta=l2, alpha=1 / len(error_NK), out=gradient[:, :-1])
        gradient[:, -1] = error_NK.mean(0) if self.bias else 0
        return float(value), gradient, float(curvature)


class _InverseHessian:
    """The estimate of the inverse Hessian that L-BFGS starts from, and its product with a gradient."""

    def __init__(self, model: LogisticRegression, l2: float, curvature: float) -> None:
        curvature = max(curvature, 1e-6)
        self.axes_RR = model.axes_RR
        self.scale_R1 = torch.cat(
            [1 / (curvature * model.eigenvalues_R + l2), model.eigenvalues_R.new_tensor([1 / curvature])]
        )

    def times(self, gradient: Tensor, pairs: deque[tuple[Tensor, Tensor]]) -> Tensor:
        """Corrects the estimate by the last steps: the two-loop recursion."""
        q, factors = gradient.clone(), []
        for s, y in reversed(pairs):
            factors.append((s * q).sum() / (s * y).sum())
            q -= factors[-1] * y
        q = self._start(q)
        if pairs:
            s, y = pairs[-1]
            q *= (s * y).sum() / (y * self._start(y)).sum()
        for (s, y), factor in zip(pairs, reversed(factors), strict=True):
            q += (factor - (y * q).sum() / (s * y).sum()) * s
        return q

    def _start(self, x: Tensor) -> Tensor:
        rotated = torch.cat([x[:, :-1] @ self.axes_RR, x[:, -1:]], dim=1) * self.scale_R1
        return torch.cat([rotated[:, :-1] @ self.axes_RR.T, rotated[:, -1:]], dim=1)
