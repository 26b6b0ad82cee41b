"""Orthogonality penalties of a weight matrix, and their gradients in closed form for stacks of matrices.

A weight is the matrix W of shape (out, in * kh * kw), and every penalty looks at M = G - I, where G is the smaller of
the two Grams: G = W W^T if out <= in * kh * kw, else W^T W. Turned on its side where needed, W is a wide matrix A
(R <= C) with G = A A^T, so each formula is written once. For complex weights ^T is the conjugate transpose.

Every penalty also has a scale-free form, its value at W / sqrt(c) with c = tr(G) / R, the mean squared singular value:
what is left to regularize is the ratio of singular values. `unit_scale` makes that matrix, and `without_scale` takes
out of a gradient what would only change c.

Shape letters: L matrices of one shape, O outputs, I inputs (in * kh * kw), R rows and C columns of A.

Sources: Bansal, Chen, Wang, "Can we gain more from orthogonality regularizations in training deep CNNs?", NeurIPS 2018
(SO, DSO, MC, SRIP); He, Du, Ma, "Preventing dimensional collapse in self-supervised learning via orthogonality
regularization", NeurIPS 2024 (the smaller Gram, SRIP unsquared).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

# ---------------------------------------------------------------------------------------------------------------------
# Penalties, with autograd: (..., O, I) -> (...)


def so(w_OI: Tensor) -> Tensor:
    """Soft orthogonality ||G - I||_F^2: the sum over singular values s of (s^2 - 1)^2."""
    return _squares(deviation(w_OI)).sum((-2, -1))


def dso(w_OI: Tensor) -> Tensor:
    """Double soft orthogonality ||W W^T - I||_F^2 + ||W^T W - I||_F^2.

    The bigger Gram has the eigenvalues of the smaller one and |O - I| zeros, each of which adds 1. So this is twice
    `so` plus a constant, and the bigger Gram is never formed.
    """
    return 2 * so(w_OI) + abs(w_OI.shape[-2] - w_OI.shape[-1])


def mutual_coherence(w_OI: Tensor) -> Tensor:
    """The largest |entry| of G - I.

    Bansal et al. take the Gram of the filters; here it is the smaller Gram, as in the other penalties, because the
    bigger one cannot become the identity.
    """
    return deviation(w_OI).abs().amax((-2, -1))


def srip(w_OI: Tensor) -> Tensor:
    """The spectral norm of G - I, from all its eigenvalues: exact, and slow. Its gradient is +-2 W v v^T."""
    return srip_along(w_OI, dominant_vectors(w_OI))


def srip_along(w_OI: Tensor, v_R: Tensor) -> Tensor:
    """|v^T (G - I) v| with the unit vector v held constant: `srip` if v is the dominant eigenvector, else less.

    Args:
        w_OI: Matrices (..., O, I).
        v_R: Unit vectors (..., R), R = min(O, I).
    """
    along_C = _multiply(_wide(w_OI).mH, v_R)
    return (_squares(along_C).sum(-1) - _squares(v_R).sum(-1)).abs()


def srip_power(w_OI: Tensor, v_R: Tensor, iterations: int = 2) -> Tensor:
    """The estimate ||M^k v|| / ||M^(k-1) v|| of the spectral norm, k = iterations; all of it carries gradient.

    Two iterations are the estimate of He et al. (section 4): u = M v, v' = M u, sigma = ||v'|| / ||u||.

    Args:
        w_OI: Matrices (..., O, I).
        v_R: Start vectors (..., R), not zero; the paper draws them from a normal distribution at every step.
        iterations: Number of products with M, at least 1.
    """
    a_RC = _wide(w_OI)
    u_R = v_R / v_R.norm(dim=-1, keepdim=True)
    for _ in range(iterations - 1):
        product_R = _deviate(a_RC, u_R)
        u_R = product_R / _positive(product_R.norm(dim=-1, keepdim=True))
    return _deviate(a_RC, u_R).norm(dim=-1)


def relaxed(w_OI: Tensor, low: float, high: float) -> Tensor:
    """A penalty of the eigenvalues g of G outside of a band: the sum of h^2 y^3 / (1 + y)^2 with y = ((g - b) / h)^2.

    Where b is the middle of the band and h half its width. Far outside this is (g - b)^2, as `so` is with b = 1; at an
    edge it pulls half as much as that, in the inner half of the band about a tenth and less. A relu at the edges would
    need eigenvalues; this needs one inverse, of 1 + y, which is well conditioned.
    """
    _, y_RR, k_RR = _gate_parts(deviation(w_OI), low, high)
    return _relaxed_values(y_RR, k_RR, low, high)


def so_from(w_OI: Tensor, start_RR: Tensor) -> Tensor:
    """||G - G_0||_F^2, G_0 being the smaller Gram of other weights of this shape."""
    return _squares(gram(w_OI) - start_RR).sum((-2, -1))


# ---------------------------------------------------------------------------------------------------------------------
# The same with gradients in closed form, no graph, no host synchronization: (L, O, I) -> (L,) and (L, O, I)


def so_and_grad(w_LOI: Tensor) -> tuple[Tensor, Tensor]:
    """`so` and its gradient 4 (W W^T - I) W, or 4 W (W^T W - I)."""
    m_LRR, grad_LOI = _deviation_and_product(w_LOI, 4)
    return _squares(m_LRR).sum((-2, -1)), grad_LOI


def dso_and_grad(w_LOI: Tensor) -> tuple[Tensor, Tensor]:
    """`dso` and its gradient, twice that of `so`."""
    m_LRR, grad_LOI = _deviation_and_product(w_LOI, 8)
    return 2 * _squares(m_LRR).sum((-2, -1)) + abs(w_LOI.shape[-2] - w_LOI.shape[-1]), grad_LOI


def mutual_coherence_and_grad(w_LOI: Tensor) -> tuple[Tensor, Tensor]:
    """`mutual_coherence` and its gradient: with entry (i, j) the largest, +-a_j in row i of A and +-a_i in row j.

    The sign of a complex entry is its phase, conjugated for row j.
    """
    a_LRC = _wide(w_LOI)
    m_LE = deviation(w_LOI).flatten(1)
    entry_L1 = m_LE.abs().argmax(1, keepdim=True)
    value_L1 = m_LE.gather(1, entry_L1)
    rows, columns = a_LRC.shape[1:]
    i_L1C, j_L1C = (row_L1[:, :, None].expand(-1, 1, columns) for row_L1 in (entry_L1 // rows, entry_L1 % rows))
    sign_L11 = value_L1.sgn()[:, None]
    grad_LRC = torch.zeros_like(a_LRC)
    grad_LRC.scatter_add_(1, i_L1C, sign_L11 * a_LRC.gather(1, j_L1C))
    grad_LRC.scatter_add_(1, j_L1C, sign_L11.conj() * a_LRC.gather(1, i_L1C))
    return value_L1[:, 0].abs(), grad_LRC if grad_LRC.shape == w_LOI.shape else grad_LRC.mH


def srip_along_and_grad(w_LOI: Tensor, v_LR: Tensor) -> tuple[Tensor, Tensor]:
    """`srip_along` and its gradient 2 sign v (A^T v)^T, where the sign is that of v^T (G - I) v."""
    along_LC = _multiply(_wide(w_LOI).mH, v_LR)
    quotient_L = _squares(along_LC).sum(-1) - _squares(v_LR).sum(-1)
    scaled_LR = (2 * quotient_L.sign())[:, None] * v_LR
    return quotient_L.abs(), _low_rank(scaled_LR[:, :, None], along_LC[:, :, None], w_LOI)


def srip_power_and_grad(w_LOI: Tensor, v_LR: Tensor, iterations: int = 2) -> tuple[Tensor, Tensor]:
    """`srip_power` and its gradient through every product: the chain walked backwards by hand, 2 vectors a product.

    The estimate does not change with the length of u, so the divisions by the lengths are constants in backward.
    """
    a_LRC = _wide(w_LOI)
    inputs, lengths = [v_LR / v_LR.norm(dim=-1, keepdim=True)], []
    for _ in range(iterations - 1):
        product_LR = _deviate(a_LRC, inputs[-1])
        lengths.append(_positive(product_LR.norm(dim=-1, keepdim=True)))
        inputs.append(product_LR / lengths[-1])
    product_LR = _deviate(a_LRC, inputs[-1])
    value_L1 = product_LR.norm(dim=-1, keepdim=True)
    outputs = [product_LR / _positive(value_L1)]  # gradients of the products M u, last product first
    back_LR = _deviate(a_LRC, outputs[0]) - value_L1 * inputs[-1]
    for length_L1 in reversed(lengths):
        outputs.append(back_LR / length_L1)
        back_LR = _deviate(a_LRC, outputs[-1])
    u_LRP, g_LRP = torch.stack(inputs, -1), torch.stack(outputs[::-1], -1)
    left_LRQ, right_LRQ = torch.cat([g_LRP, u_LRP], -1), torch.cat([u_LRP, g_LRP], -1)
    return value_L1[:, 0], _low_rank(left_LRQ, a_LRC.mH @ right_LRQ, w_LOI)


@torch.no_grad()
def relaxed_and_grad(w_LOI: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """`relaxed` and its gradient 4 (G - b) y^2 (3 + y) / (1 + y)^3 A, `so`'s with another center and a smooth gate."""
    from_center_LRR, y_LRR, k_LRR = _gate_parts(deviation(w_LOI), low, high)
    inside_LRR = _identity_minus(k_LRR)
    gate_LRR = inside_LRR @ inside_LRR @ (3 * k_LRR + inside_LRR)  # 3 K + y K = (3 + y) / (1 + y)
    return _relaxed_values(y_LRR, k_LRR, low, high), _multiply_gram(4 * from_center_LRR @ gate_LRR, w_LOI)


@torch.no_grad()
def so_from_and_grad(w_LOI: Tensor, start_LRR: Tensor) -> tuple[Tensor, Tensor]:
    """`so_from` and its gradient 4 (G - G_0) A."""
    m_LRR = gram(w_LOI) - start_LRR
    return _squares(m_LRR).sum((-2, -1)), _multiply_gram(4 * m_LRR, w_LOI)


# ---------------------------------------------------------------------------------------------------------------------
# Free of scale


def unit_scale(w_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Returns W / sqrt(c), whose squared singular values have the mean 1, and sqrt(c) of shape (..., 1, 1)."""
    squares_11 = _squares(w_OI).sum((-2, -1), keepdim=True)
    root_11 = _positive(squares_11 / min(w_OI.shape[-2:])).sqrt()
    return w_OI / root_11, root_11


@torch.no_grad()
def without_scale(grad_LOI: Tensor, unit_LOI: Tensor) -> tuple[Tensor, Tensor]:
    """Takes the part along W out of a gradient.

    Args:
        grad_LOI: Gradients at `unit_LOI`.
        unit_LOI: Matrices from `unit_scale`.

    Returns:
        What is left, orthogonal to W, and the multiples of W (L,) that were taken out.
    """
    along_L = torch.linalg.vecdot(unit_LOI.flatten(1), grad_LOI.flatten(1)).real / min(unit_LOI.shape[1:])
    return grad_LOI - along_L[:, None, None] * unit_LOI, along_L


# ---------------------------------------------------------------------------------------------------------------------
# Eigenvectors of G - I


@torch.no_grad()
def dominant_vectors(w_OI: Tensor) -> Tensor:
    """Unit eigenvectors (..., R) of G - I whose eigenvalue is largest in absolute value, by full decomposition."""
    values_R, vectors_RR = torch.linalg.eigh(deviation(w_OI))
    best = values_R.abs().argmax(-1)[..., None, None]
    return vectors_RR.gather(-1, best.expand(*vectors_RR.shape[:-1], 1)).squeeze(-1)


@torch.no_grad()
def power_iterate(w_LOI: Tensor, v_2LR: Tensor, iterations: int = 1) -> Tensor:
    """Takes power iterations with momentum (Xu et al., "Accelerated stochastic power iteration", AISTATS 2018).

    v' = M v - b u with u the vector before v, both then scaled so that |v'| = 1. The first eigenvector wins as long as
    b is less than a quarter of its eigenvalue squared: b = 0.9 / 4 ||M v||^2 always is, and nears the bound with v.

    Args:
        w_LOI: Matrices.
        v_2LR: Unit vectors v, and u; u = 0 is a start without momentum.
        iterations: How many.

    Returns:
        The new v and u.
    """
    a_LRC = _wide(w_LOI)
    v_LR, u_LR = v_2LR
    for _ in range(iterations):
        product_LR = _deviate(a_LRC, v_LR)
        next_LR = product_LR - 0.225 * _squares(product_LR).sum(-1, keepdim=True) * u_LR
        length_L1 = next_LR.norm(dim=-1, keepdim=True)
        moved_L1 = length_L1 > 0  # M = 0 has no dominant direction: stay
        v_LR, u_LR = torch.where(moved_L1, next_LR / length_L1, v_LR), torch.where(moved_L1, v_LR / length_L1, 0)
    return torch.stack([v_LR, u_LR])


@torch.no_grad()
def ritz_vectors(w_LOI: Tensor, v_LR: Tensor) -> Tensor:
    """Returns the unit vectors x in span(v, M v) with the largest |x^T M x|: two Lanczos steps, solved in closed form.

    Where M has eigenvalues near +s and -s, which a penalty on the larger of them brings about, a power iterate is a
    mix of both eigenvectors and v^T M v is near 0. Their plane holds each of them, so x is one of them.

    Args:
        w_LOI: Matrices.
        v_LR: Unit vectors, R = min(O, I), say from `power_iterate`.

    Returns:
        Unit vectors (L, R), at least as good as v.
    """
    a_LRC = _wide(w_LOI)
    product_LR = _deviate(a_LRC, v_LR)
    first_L1 = (v_LR.conj() * product_LR).real.sum(-1, keepdim=True)
    rest_LR = product_LR - first_L1 * v_LR
    across_L1 = rest_LR.norm(dim=-1, keepdim=True)
    rounding_L1 = 10 * torch.finfo(a_LRC.dtype).eps * (1 + first_L1.abs())
    across_L1 = torch.where(across_L1 > rounding_L1, across_L1, 0)  # below, v is an eigenvector already
    other_LR = torch.where(across_L1 > 0, rest_LR / across_L1, 0)
    along_LC = _multiply(a_LRC.mH, other_LR)
    second_L1 = _squares(along_LC).sum(-1, keepdim=True) - _squares(other_LR).sum(-1, keepdim=True)
    angle_L1 = torch.atan2(2 * across_L1, first_L1 - second_L1) / 2  # of the larger eigenvalue of the 2 x 2 problem
    angle_L1 = torch.where(first_L1 + second_L1 < 0, angle_L1 + math.pi / 2, angle_L1)
    best_LR = angle_L1.cos() * v_LR + angle_L1.sin() * other_LR
    return best_LR / best_LR.norm(dim=-1, keepdim=True)


# ---------------------------------------------------------------------------------------------------------------------
# The smaller Gram


def gram(w_OI: Tensor) -> Tensor:
    """The smaller Gram G of W, shape (..., R, R)."""
    a_RC = _wide(w_OI)
    return a_RC @ a_RC.mH


def deviation(w_OI: Tensor) -> Tensor:
    """G - I, shape (..., R, R), where G is the smaller Gram of W."""
    m_RR = gram(w_OI)
    m_RR.diagonal(dim1=-2, dim2=-1).sub_(1)
    return m_RR


def _gate_parts(m_RR: Tensor, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
    """G - b, y = ((G - b) / h)^2 and (1 + y)^-1 from G - I; b is the middle of the band and h half its width."""
    identity_RR = torch.eye(m_RR.shape[-1], dtype=m_RR.dtype, device=m_RR.device)
    from_center_RR = m_RR - ((low + high) / 2 - 1) * identity_RR
    y_RR = from_center_RR @ from_center_RR * (2 / (high - low)) ** 2
    factor_RR, _ = torch.linalg.cholesky_ex(y_RR + identity_RR)  # unlike an inverse, without waiting for the device
    inverse_RR = torch.linalg.solve_triangular(factor_RR, identity_RR.expand_as(y_RR), upper=False)
    return from_center_RR, y_RR, inverse_RR.mH @ inverse_RR


def _relaxed_values(y_RR: Tensor, k_RR: Tensor, low: float, high: float) -> Tensor:
    """h^2 tr((1 - K)^2 y) with K = (1 + y)^-1, so that 1 - K = y / (1 + y)."""
    inside_RR = _identity_minus(k_RR)
    return ((high - low) / 2) ** 2 * (inside_RR @ inside_RR * y_RR.mT).real.sum((-2, -1))


def _identity_minus(k_RR: Tensor) -> Tensor:
    return torch.eye(k_RR.shape[-1], dtype=k_RR.dtype, device=k_RR.device) - k_RR


def _multiply_gram(m_LRR: Tensor, w_LOI: Tensor) -> Tensor:
    """M A, turned as W is; M is Hermitian."""
    return m_LRR @ w_LOI if _is_wide(w_LOI) else w_LOI @ m_LRR


def _is_wide(w_OI: Tensor) -> bool:
    return w_OI.shape[-2] <= w_OI.shape[-1]


def _wide(w_OI: Tensor) -> Tensor:
    return w_OI if _is_wide(w_OI) else w_OI.mH


@torch.no_grad()
def _deviation_and_product(w_LOI: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """M = G - I, and factor * M A turned as W is.

    On a CPU, one matrix after the other through oneDNN, which uses all of the vector unit where torch's own products,
    by MKL, do not: they run at half the speed on AMD's processors.
    """
    onednn = w_LOI.device.type == "cpu" and w_LOI.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    if onednn and w_LOI.numel():  # it kills the process over an empty matrix
        rows = min(w_LOI.shape[1:])
        m_LRR, product_LOI = w_LOI.new_empty(len(w_LOI), rows, rows), torch.empty_like(w_LOI)
        for w_OI, m_RR, product_OI in zip(w_LOI, m_LRR, product_LOI, strict=True):
            _onednn_deviation_and_product(w_OI, factor, m_RR, product_OI)
        return m_LRR, product_LOI
    m_LRR = deviation(w_LOI)
    left, right = (m_LRR, w_LOI) if _is_wide(w_LOI) else (w_LOI, m_LRR)
    return m_LRR, torch.baddbmm(w_LOI, left, right, beta=0, alpha=factor)


def _onednn_deviation_and_product(w_OI: Tensor, factor: int, m_RR: Tensor, product_OI: Tensor) -> None:
    """Fills the last two; a linear layer X Y^T is the one product that torch has for oneDNN's tensors."""
    straight = w_OI.to_mkldnn()
    turned = straight.transpose(0, 1)
    a_RC = straight if _is_wide(w_OI) else turned
    m_RR.copy_(F.linear(a_RC, a_RC).to_dense()).diagonal().sub_(1)
    scaled = (factor * m_RR).to_mkldnn()
    product = F.linear(scaled, turned) if _is_wide(w_OI) else F.linear(straight, scaled)
    product_OI.copy_(product.to_dense())


def _low_rank(x_LRQ: Tensor, y_LCQ: Tensor, w_LOI: Tensor) -> Tensor:
    """X Y^T, turned as W is."""
    left_LOQ, right_LIQ = (x_LRQ, y_LCQ) if _is_wide(w_LOI) else (y_LCQ, x_LRQ)
    return left_LOQ * right_LIQ.mH if x_LRQ.shape[-1] == 1 else left_LOQ @ right_LIQ.mH


def _multiply(a_RC: Tensor, v_C: Tensor) -> Tensor:
    """A v, as a row times A^T: torch has a fast product on a CPU for stacks of rows, not for stacks of columns."""
    return (v_C[..., None, :] @ a_RC.mT)[..., 0, :]


def _squares(x: Tensor) -> Tensor:
    """|x|^2 of each entry, real."""
    return x.abs().square() if x.is_complex() else x.square()


def _positive(length: Tensor) -> Tensor:
    """Keeps 0 / 0 away where G is the identity exactly: M v is 0 then, and so are the estimate and its gradient."""
    return length.clamp_min(torch.finfo(length.dtype).tiny)


def _deviate(a_RC: Tensor, v_R: Tensor) -> Tensor:
    """(A A^T - I) v as two matrix-vector products."""
    return _multiply(a_RC, _multiply(a_RC.mH, v_R)) - v_R
