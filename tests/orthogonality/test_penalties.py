from __future__ import annotations

import math

import pytest
import torch

from hf_ssl_or.orthogonality import penalties

SHAPES = [(5, 12), (12, 5), (7, 7), (1, 9), (9, 1)]


def matrices(shape, count=3, scale=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(count, *shape, generator=generator, dtype=torch.float64)


def unit_vectors(w_LOI, seed=1):
    generator = torch.Generator().manual_seed(seed)
    v_LR = torch.randn(len(w_LOI), min(w_LOI.shape[1:]), generator=generator, dtype=torch.float64)
    return v_LR / v_LR.norm(dim=1, keepdim=True)


def started(v_LR):
    return torch.stack([v_LR, torch.zeros_like(v_LR)])


def reference_deviation(w_OI):
    gram = w_OI @ w_OI.T if w_OI.shape[0] <= w_OI.shape[1] else w_OI.T @ w_OI
    return gram - torch.eye(len(gram), dtype=w_OI.dtype)


def assert_close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_penalties_follow_their_formulas(shape):
    for w_OI in matrices(shape):
        m = reference_deviation(w_OI)
        big = reference_deviation(w_OI.T) if shape[0] == shape[1] else None
        if big is None:
            big = w_OI.T @ w_OI if shape[0] < shape[1] else w_OI @ w_OI.T
            big = big - torch.eye(len(big), dtype=torch.float64)
        assert_close(penalties.so(w_OI), m.pow(2).sum())
        assert_close(penalties.dso(w_OI), m.pow(2).sum() + big.pow(2).sum())
        assert_close(penalties.mutual_coherence(w_OI), m.abs().max())
        torch.testing.assert_close(penalties.srip(w_OI), torch.linalg.matrix_norm(m, 2), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["so", "dso", "mutual_coherence", "srip_along", "srip_power"])
def test_closed_form_equals_autograd(name, shape):
    w_LOI = matrices(shape)
    extra = (unit_vectors(w_LOI),) if name.startswith("srip") else ()
    leaf = w_LOI.clone().requires_grad_()
    wanted = getattr(penalties, name)(leaf, *extra)
    wanted.sum().backward()
    values, grad = getattr(penalties, name + "_and_grad")(w_LOI, *extra)
    assert values.shape == (3,)
    assert_close(values, wanted.detach())
    assert_close(grad, leaf.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("iterations", [1, 2, 3])
@pytest.mark.parametrize("shape", [(3, 3), (3, 5), (5, 3)])
def test_the_power_estimate_of_an_orthogonal_matrix_is_zero_with_gradient(shape, iterations, dtype):
    w_LOI = torch.eye(*shape, dtype=dtype)[None]
    leaf = w_LOI.clone().requires_grad_()
    value_L = penalties.srip_power(leaf, torch.ones(1, 3, dtype=dtype), iterations)
    (wanted,) = torch.autograd.grad(value_L.sum(), leaf)
    value, grad = penalties.srip_power_and_grad(w_LOI, torch.ones(1, 3, dtype=dtype), iterations)
    for zero in (value_L, wanted, value, grad):
        assert torch.equal(zero, torch.zeros_like(zero))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("shape", "constant"), [((4, 0), 4), ((0, 4), 4), ((0, 0), 0)])
def test_sums_over_an_empty_matrix_are_empty(shape, constant, dtype):
    w_LOI = torch.zeros(2, *shape, dtype=dtype)
    for name, value in (("so", 0), ("dso", constant)):
        values, grad = getattr(penalties, f"{name}_and_grad")(w_LOI)
        assert values.tolist() == getattr(penalties, name)(w_LOI).tolist() == [value, value]
        assert grad.shape == w_LOI.shape


def test_so_gradient_is_the_one_of_the_paper():
    w_OI = matrices((5, 12))[0]
    _, grad = penalties.so_and_grad(w_OI[None])
    assert_close(grad[0], 4 * (w_OI @ w_OI.T - torch.eye(5, dtype=torch.float64)) @ w_OI)
    _, grad = penalties.so_and_grad(w_OI.T[None])
    assert_close(grad[0], 4 * w_OI.T @ (w_OI @ w_OI.T - torch.eye(5, dtype=torch.float64)))


@pytest.mark.parametrize(("scale", "sign"), [(2.0, 1), (0.05, -1)])
def test_srip_gradient_has_the_sign_of_the_dominant_eigenvalue(scale, sign):
    w_OI = matrices((6, 10), scale=scale)[0].requires_grad_()
    penalties.srip(w_OI).backward()
    m = reference_deviation(w_OI.detach())
    v = penalties.dominant_vectors(w_OI.detach())
    assert torch.sign(v @ m @ v) == sign
    assert_close(w_OI.grad, sign * 2 * torch.outer(v, v @ w_OI.detach()))
    assert torch.autograd.gradcheck(penalties.srip, w_OI)


def test_mutual_coherence_off_the_diagonal():
    w_OI = torch.eye(3, 6, dtype=torch.float64)
    w_OI[2, 0] = -0.9  # rows 0 and 2 overlap by -0.9, row 2 is longer by 0.81
    value, grad = penalties.mutual_coherence_and_grad(w_OI[None])
    assert value.item() == pytest.approx(0.9)
    wanted = torch.zeros(3, 6, dtype=torch.float64)
    wanted[0], wanted[2] = -w_OI[2], -w_OI[0]
    assert_close(grad[0], wanted)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_two_power_iterations_are_the_papers_estimate(shape):
    w_OI = matrices(shape)[0]
    g = reference_deviation(w_OI)
    v = torch.randn(len(g), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    u = g @ v
    v_new = g @ u
    assert_close(penalties.srip_power(w_OI, v, 2), v_new.norm() / u.norm())
    assert_close(penalties.srip_power(w_OI, v, 1), (g @ v).norm() / v.norm())
    exact = torch.linalg.matrix_norm(g, 2)
    assert penalties.srip_power(w_OI, v, 2) < exact  # from below
    assert_close(penalties.srip_power(w_OI, v, 400), exact)


@pytest.mark.parametrize("iterations", [1, 2, 3, 5])
def test_power_gradient_goes_through_every_product(iterations):
    w_LOI = matrices((4, 9))
    v_LR = unit_vectors(w_LOI) * 3  # the length of the start vector does not matter
    leaf = w_LOI.clone().requires_grad_()
    penalties.srip_power(leaf, v_LR, iterations).sum().backward()
    _, grad = penalties.srip_power_and_grad(w_LOI, v_LR, iterations)
    assert_close(grad, leaf.grad)


@pytest.mark.parametrize("scale", [0.05, 0.3, 2.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_iterated_vectors_reach_the_spectral_norm_from_below(shape, scale):
    w_LOI = matrices(shape, scale=scale)
    exact_L = penalties.srip(w_LOI)
    v_2LR = started(unit_vectors(w_LOI))
    for _ in range(20):
        v_LR = v_2LR[0]
        best_LR = penalties.ritz_vectors(w_LOI, v_LR)
        torch.testing.assert_close(best_LR.norm(dim=1), torch.ones(3, dtype=torch.float64))
        value_L = penalties.srip_along(w_LOI, best_LR)
        assert (value_L >= penalties.srip_along(w_LOI, v_LR) - 1e-12).all()
        assert (value_L <= exact_L + 1e-12).all()
        v_2LR = penalties.power_iterate(w_LOI, v_2LR, 5)
    rtol = 1e-3 if scale == 0.05 else 1e-6  # there all eigenvalues lie near -1, and any direction is nearly right
    torch.testing.assert_close(value_L, exact_L, rtol=rtol, atol=1e-12)


def test_eigenvalues_of_both_signs_do_not_cancel():
    w_OI = torch.diag(torch.tensor([math.sqrt(1.9), 1.0, math.sqrt(0.1)], dtype=torch.float64))  # M: 0.9, 0, -0.9
    v_R = penalties.power_iterate(w_OI[None], started(torch.full((1, 3), 3**-0.5, dtype=torch.float64)), 20)[0]
    assert penalties.srip_along(w_OI[None], v_R).item() < 1e-6  # a mix of both eigenvectors, half of each
    best_R = penalties.ritz_vectors(w_OI[None], v_R)
    assert penalties.srip_along(w_OI[None], best_R).item() == pytest.approx(0.9)


def test_momentum_is_faster_than_plain_power_iteration():
    w_LOI = matrices((64, 576), scale=1 / 17)  # as a convolution is initialized
    exact_L = penalties.srip(w_LOI)
    plain_LR = unit_vectors(w_LOI)
    v_2LR = started(plain_LR)
    for _ in range(20):
        plain_LR = penalties.power_iterate(w_LOI, started(plain_LR))[0]
        v_2LR = penalties.power_iterate(w_LOI, v_2LR)
    plain, fast = (1 - penalties.srip_along(w_LOI, v_LR) / exact_L for v_LR in (plain_LR, v_2LR[0]))
    assert plain.mean() > 5 * fast.mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_eigenvectors_stay(dtype):
    for scale in (0.05, 2.0):
        w_LOI = matrices((6, 10), scale=scale).to(dtype)
        v_LR = penalties.dominant_vectors(w_LOI)
        for vectors in (penalties.ritz_vectors(w_LOI, v_LR), penalties.power_iterate(w_LOI, started(v_LR), 3)[0]):
            assert ((vectors * v_LR).sum(1).abs() > 1 - 1e-5).all()
    w_LOI = torch.eye(4, 8, dtype=dtype)[None]  # M = 0: nothing to gain, nothing to break
    v_LR = torch.tensor([[0.5, 0.5, 0.5, 0.5]], dtype=dtype)
    torch.testing.assert_close(penalties.ritz_vectors(w_LOI, v_LR), v_LR)
    torch.testing.assert_close(penalties.power_iterate(w_LOI, started(v_LR), 3), started(v_LR))
