from __future__ import annotations

import ast
import copy
import inspect
import math

import pytest
import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_ssl_or.errors import InputError
from hf_ssl_or.models.configuration_ssl import OrthogonalityConfig
from hf_ssl_or.orthogonality import OrthogonalityRegularizer, penalties, regularizer, selection
from hf_ssl_or.randomness import keyed_generator

PENALTIES = ["so", "dso", "mutual_coherence", "srip"]
NETWORKS = ["resnet18", "resnet50", "vit_tiny_patch16_224"]


def regularize(encoder, **settings):
    return OrthogonalityRegularizer(encoder, OrthogonalityConfig(**{"weight": 0.5, **settings}))


def small_encoder(dtype=torch.float64):
    """Wide and tall matrices, a grouped convolution, a repeated shape, and parameters to leave alone."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, bias=False),
        nn.BatchNorm2d(32),
        nn.Conv2d(32, 16, 3, groups=4),
        nn.Conv2d(16, 16, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 16),
        nn.LayerNorm(16),
        nn.Linear(16, 40),
    ).to(dtype)


def matrices_of(encoder, names, split=()):
    for name in names:
        weight = encoder.get_parameter(name)
        layer = encoder.get_submodule(name.removesuffix(".weight"))
        groups = 3 if name in split else getattr(layer, "groups", 1)
        yield from (part.flatten(1) for part in weight.chunk(groups))


def deviation(w_OI):
    gram = w_OI @ w_OI.T if w_OI.shape[0] <= w_OI.shape[1] else w_OI.T @ w_OI
    return gram - torch.eye(len(gram), dtype=w_OI.dtype)


def reference(penalty, w_OI, m):
    """The penalty of one matrix from M = G - I, for autograd; SRIP along the exact eigenvector."""
    if penalty == "so":
        return m.pow(2).sum()
    if penalty == "dso":  # the bigger Gram has the trace and the squared norm of the smaller
        gram = m + torch.eye(len(m), dtype=m.dtype)
        return m.pow(2).sum() + gram.pow(2).sum() - 2 * w_OI.pow(2).sum() + max(w_OI.shape)
    if penalty == "mutual_coherence":
        return m.abs().max()
    v = penalties.dominant_vectors(w_OI.detach())
    return ((w_OI.T @ v if len(v) == len(w_OI) else w_OI @ v).pow(2).sum() - 1).abs()


def gradients(encoder):
    return {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}


def add_gradients(reg, encoder):
    encoder.zero_grad()
    return reg.add_gradients(), gradients(encoder)


def assert_close(got, wanted):
    """To 1e-10 of the largest entry."""
    assert (got - wanted).abs().max() <= 1e-10 * wanted.abs().max(), (got, wanted)


# ---------------------------------------------------------------------------------------------------------------------
# The mathematics


@pytest.mark.parametrize("network", NETWORKS)
def test_every_parameter_of_real_encoders_has_the_gradient_of_autograd(network):
    torch.manual_seed(0)
    encoder = timm.create_model(network, num_classes=0).double()
    names = selection.select_sites(encoder, OrthogonalityConfig())
    names = [site.name for site in names]
    weights = list(matrices_of(encoder, names))
    deviations = [deviation(w_OI) for w_OI in weights]
    for penalty in PENALTIES:
        total = sum(reference(penalty, w_OI, m) for w_OI, m in zip(weights, deviations, strict=True)) * 0.5
        encoder.zero_grad()
        total.backward(retain_graph=True)
        wanted = gradients(encoder)
        reg = regularize(encoder, penalty=penalty)
        reg.exact_vectors()
        value, got = add_gradients(reg, encoder)
        assert_close(value, total.detach())
        assert got.keys() == wanted.keys() == set(names)
        for name in names:
            assert_close(got[name], wanted[name])


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("fresh_start", [False, True])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_penalty_and_add_gradients_agree(penalty, fresh_start, memory_format, normalize):
    encoder = small_encoder().to(memory_format=memory_format)
    settings = {"penalty": penalty, "normalize": normalize, "power_iterations": 2, "fresh_start": fresh_start}
    reg = regularize(encoder, **settings)
    for step in range(3):  # SRIP's vectors are far from converged, and differ at each step
        reg.set_progress(step, 10)
        encoder.zero_grad()
        total = reg.penalty()
        total.backward()
        wanted = gradients(encoder)
        value, got = add_gradients(reg, encoder)
        assert not value.requires_grad
        assert_close(value, total.detach())
        assert got.keys() == wanted.keys()
        for name in wanted:
            assert_close(got[name], wanted[name])
            assert got[name].stride() == encoder.get_parameter(name).stride()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fresh_start", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_layers_without_inputs_or_outputs_change_nothing(penalty, normalize, fresh_start, dtype):
    plain = small_encoder(dtype)
    empty = nn.Linear(0, 4), nn.Linear(4, 0), nn.Conv2d(0, 4, 3), nn.Conv2d(4, 0, 3)
    encoder = nn.Sequential(*plain, *empty).to(dtype)
    settings = {"penalty": penalty, "normalize": normalize, "fresh_start": fresh_start}
    reg, wanted = regularize(encoder, **settings), regularize(plain, **settings)
    assert reg.names == wanted.names
    assert reg.penalty() == wanted.penalty()
    assert reg.errors() == wanted.errors()
    assert reg.add_gradients() == wanted.add_gradients()
    reg.advance()
    assert reg.state_dict().keys() == wanted.state_dict().keys()
    assert all(layer.weight.grad is None for layer in empty)


def test_the_sum_is_over_all_matrices_of_the_encoder():
    encoder = small_encoder()
    names = ["0.weight", "2.weight", "3.weight", "6.weight", "8.weight"]
    reg = regularize(encoder, penalty="so", weight=3)
    assert reg.names == names
    weights = list(matrices_of(encoder, names))
    assert len(weights) == 8  # the grouped convolution is four
    assert_close(reg.penalty(), 3 * sum(deviation(w).pow(2).sum() for w in weights))
    normal = regularize(encoder, penalty="so", weight=3, normalize=True)
    assert_close(normal.penalty(), 3 * sum(deviation(w).pow(2).sum() / min(w.shape) for w in weights) / 8)
    normal = regularize(encoder, penalty="mutual_coherence", weight=3, normalize=True)
    assert_close(normal.penalty(), 3 * sum(deviation(w).abs().max() for w in weights) / 8)


def test_normalised_penalties_do_not_grow_with_the_encoder():
    values = {}
    for width in (16, 64):
        for depth in (1, 4):
            torch.manual_seed(0)
            layers = [nn.Conv2d(width, width, 3, bias=False) for _ in range(depth)]
            for layer in layers:
                nn.init.kaiming_normal_(layer.weight, mode="fan_out")
            encoder = nn.Sequential(*layers)
            for normalize in (False, True):
                value = regularize(encoder, normalize=normalize).penalty().item()
                values.setdefault(normalize, []).append(value)
    assert max(values[False]) / min(values[False]) > 12
    assert max(values[True]) / min(values[True]) < 1.5


def test_split_qkv_takes_three_matrices():
    encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1).double()
    reg = regularize(encoder, penalty="so", split_qkv=True)
    weights = matrices_of(encoder, reg.names, split={"blocks.0.attn.qkv.weight"})
    total = 0.5 * sum(deviation(w_OI).pow(2).sum() for w_OI in weights)
    total.backward()
    wanted = gradients(encoder)
    value, got = add_gradients(reg, encoder)
    assert_close(value, total.detach())
    for name in wanted:
        assert_close(got[name], wanted[name])
    assert value != regularize(encoder, penalty="so").penalty()


def test_errors_are_the_distance_from_orthonormal():
    encoder = small_encoder()
    encoder[0].weight.requires_grad_(False)  # frozen, but measured
    reg = regularize(encoder, penalty="srip")
    errors = reg.errors()
    assert list(errors) == reg.names
    for name, error in errors.items():
        squares = sum(deviation(w_OI).pow(2).sum().item() for w_OI in matrices_of(encoder, [name]))
        assert error == pytest.approx(math.sqrt(squares), rel=1e-12)
    nn.init.orthogonal_(encoder[6].weight)
    assert reg.errors()["6.weight"] < 1e-12


# ---------------------------------------------------------------------------------------------------------------------
# SRIP's vectors


def train(encoder, reg, steps, seed=0):
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.01, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        images = torch.randn(8, 3, 8, 8, generator=generator, dtype=encoder[0].weight.dtype)
        loss = (encoder(images) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        reg.set_progress(step, steps)
        yield reg.add_gradients()
        optimizer.step()


def test_warm_started_srip_follows_the_spectral_norm_while_weights_move():
    encoder = small_encoder(torch.float32)
    reg = regularize(encoder, penalty="srip", weight=1e-2)
    before = encoder[8].weight.detach().clone()
    errors = []
    names = reg.names
    for value in train(encoder, reg, 50):
        exact = 1e-2 * sum(torch.linalg.matrix_norm(deviation(w.detach()), 2) for w in matrices_of(encoder, names))
        errors.append(abs(value.item() - exact.item()) / exact.item())
    assert (encoder[8].weight - before).norm() > 0.1 * before.norm()
    print(f"relative error of SRIP at steps 0, 10, 20, 50: {[f'{errors[i]:.1e}' for i in (0, 10, 20, 49)]}")
    assert errors[0] > 0.05
    assert max(errors[30:]) < 1e-3


def test_penalty_does_not_advance_and_advance_does():
    encoder = small_encoder()
    reg = regularize(encoder, penalty="srip")
    before = reg.state_dict()
    first = reg.penalty()
    assert torch.equal(reg.penalty(), first)
    assert all(torch.equal(v, before[name]) for name, v in reg.state_dict().items())
    for _ in range(100):
        reg.advance()
    exact = regularize(encoder, penalty="srip")
    exact.exact_vectors()
    assert first < 0.99 * exact.penalty()
    torch.testing.assert_close(reg.penalty(), exact.penalty(), rtol=1e-3, atol=0)
    other = regularize(encoder, penalty="srip")
    other.add_gradients()
    fresh = regularize(encoder, penalty="srip")
    fresh.advance()
    assert all(torch.equal(v, other.state_dict()[name]) for name, v in fresh.state_dict().items())


def test_fresh_start_is_the_papers_estimate_with_vectors_of_the_step():
    encoder = nn.Sequential(nn.Linear(12, 7)).double()
    reg = regularize(encoder, penalty="srip", fresh_start=True, power_iterations=2, seed=5)
    assert reg.state_dict() == {}
    values = []
    for step in (0, 1, 0):
        reg.set_progress(step, 10)
        generator = keyed_generator("srip", 5, step, 1, 7, 12)
        v = torch.randn(1, 7, generator=generator, dtype=torch.float64)[0]
        g = deviation(encoder[0].weight.detach())
        u = g @ v
        assert_close(reg.penalty(), 0.5 * (g @ u).norm() / u.norm())
        values.append(reg.add_gradients().item())
    assert values[0] == values[2] != values[1]


def test_state_survives_a_round_trip():
    encoder = small_encoder()
    reg = regularize(encoder, penalty="srip")
    reg.add_gradients()
    other = regularize(encoder, penalty="srip", seed=9)
    assert other.penalty() != reg.penalty()
    state = reg.state_dict()
    other.load_state_dict(state)
    for name, value in state.items():
        value.zero_()  # neither side holds on to the saved tensors
        assert other.state_dict()[name][0].norm(dim=1).sub(1).abs().max() < 1e-12
    assert torch.equal(other.penalty(), reg.penalty())
    assert torch.equal(other.add_gradients(), reg.add_gradients())


def test_a_wrong_state_is_refused():
    encoder = small_encoder()
    reg = regularize(encoder, penalty="srip")
    state = reg.state_dict()
    with pytest.raises(InputError, match=r"vector of '8.weight' is missing"):
        reg.load_state_dict({name: v for name, v in state.items() if name != "8.weight"})
    with pytest.raises(InputError, match="vector of 'more' is not expected"):
        reg.load_state_dict({**state, "more": torch.zeros(1)})
    with pytest.raises(InputError, match=r"vector of '2.weight' has shape \(4, 5\), wanted \(2, 4, 4\)"):
        reg.load_state_dict({**state, "2.weight": torch.zeros(4, 5)})
    with pytest.raises(InputError, match="not expected"):
        regularize(encoder, penalty="so").load_state_dict(state)
    regularize(encoder, penalty="so").load_state_dict({})


# ---------------------------------------------------------------------------------------------------------------------
# Strength over the run


@pytest.mark.parametrize("penalty", ["so", "srip"])
def test_every_k_steps_k_times_as_strong(penalty):
    encoder = small_encoder()
    plain, sparse = (regularize(encoder, penalty=penalty, every=k) for k in (1, 3))
    for step in range(4):
        sparse.set_progress(step, 10)
        state = sparse.state_dict()
        expected = sparse.penalty().detach()
        value, got = add_gradients(sparse, encoder)
        assert_close(value, expected) if step % 3 == 0 else None
        if step % 3:
            assert value == expected == 0
            assert got == {}
            assert all(torch.equal(v, state[name]) for name, v in sparse.state_dict().items())
        if step == 0:
            assert_close(value, 3 * plain.penalty().detach())


def test_schedule_scales_value_and_gradient():
    encoder = small_encoder()
    full, grad = add_gradients(regularize(encoder), encoder)
    reg = regularize(encoder, schedule="cosine")
    reg.set_progress(75, 100)
    factor = (1 + math.cos(0.75 * math.pi)) / 2
    value, got = add_gradients(reg, encoder)
    assert_close(value, factor * full)
    for name in grad:
        assert_close(got[name], factor * grad[name])
    reg = regularize(encoder, schedule="step")
    reg.set_progress(30, 100)
    assert_close(reg.penalty(), 1e-4 * full)
    reg.set_progress(60, 100)
    assert add_gradients(reg, encoder) == (0, {})
    for step, total in ((-1, 10), (0, 0)):
        with pytest.raises(InputError, match="wants step >= 0"):
            reg.set_progress(step, total)


# ---------------------------------------------------------------------------------------------------------------------
# Behavior in a loop


def test_gradients_are_added_to_what_is_there():
    encoder = small_encoder()
    _, alone = add_gradients(regularize(encoder), encoder)
    before = {}
    for name, p in encoder.named_parameters():
        p.grad = torch.full_like(p, 2.0)
        before[name] = p.grad
    regularize(encoder).add_gradients()
    for name, p in encoder.named_parameters():
        assert p.grad is before[name]  # in place: DDP's buckets stay where they are
        assert_close(p.grad, 2 + alone[name] if name in alone else torch.full_like(p, 2.0))


def test_gradients_in_another_memory_order():
    encoder = small_encoder()
    _, wanted = add_gradients(regularize(encoder), encoder)
    encoder[2].weight.grad = torch.zeros_like(encoder[2].weight, memory_format=torch.channels_last)
    regularize(encoder, include=["2.weight"]).add_gradients()
    torch.testing.assert_close(encoder[2].weight.grad, wanted["2.weight"])


def test_frozen_weights_are_left_out():
    encoder = small_encoder()
    total = regularize(encoder).penalty()
    encoder[8].weight.requires_grad_(False)
    reg = regularize(encoder)
    _, got = add_gradients(reg, encoder)
    assert "8.weight" not in got
    assert_close(total - reg.penalty(), 0.5 * penalties.so(encoder[8].weight))


def test_none_does_nothing():
    encoder = small_encoder()
    reg = OrthogonalityRegularizer(encoder, OrthogonalityConfig(penalty="none"))
    assert reg.penalty() == 0
    assert add_gradients(reg, encoder) == (0, {})
    assert reg.errors() == {} and reg.state_dict() == {} and reg.names == []
    reg.set_progress(1, 2)
    reg.advance()
    reg.exact_vectors()


@pytest.mark.parametrize("penalty", PENALTIES)
def test_weights_are_read_at_each_call(penalty):
    encoder = small_encoder()
    reg = regularize(encoder, penalty=penalty)
    encoder.float()
    encoder[8].weight = nn.Parameter(torch.eye(40, 16))
    value, got = add_gradients(reg, encoder)
    assert value.dtype == got["8.weight"].dtype == torch.float32
    assert got["8.weight"].abs().max() < 1e-6
    assert_close(value.double(), reg.penalty().double()) if penalty != "srip" else None


@pytest.mark.parametrize("penalty", PENALTIES)
def test_half_precision_weights_and_autocast_use_float32(penalty):
    encoder = small_encoder(torch.float32)
    wanted, _ = add_gradients(regularize(encoder, penalty=penalty), encoder)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, _ = add_gradients(regularize(encoder, penalty=penalty), encoder)
        assert torch.equal(value, wanted)
        assert torch.equal(regularize(encoder, penalty=penalty).penalty(), wanted)
        assert torch.is_autocast_enabled("cpu")
    half = copy.deepcopy(encoder).bfloat16()
    value, got = add_gradients(regularize(half, penalty=penalty), half)
    assert value.dtype == torch.float32
    assert all(grad.dtype == torch.bfloat16 for grad in got.values())
    exact = half.float()
    assert torch.equal(value, add_gradients(regularize(exact, penalty=penalty), exact)[0])


class NoHostSync(TorchDispatchMode):
    """Fails where a tensor's content would be needed on the host."""

    refused = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in self.refused, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fresh_start", [False, True])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_no_host_synchronization(penalty, fresh_start):
    encoder = small_encoder()
    reg = regularize(encoder, penalty=penalty, fresh_start=fresh_start, schedule="cosine", normalize=True)
    with pytest.raises(AssertionError, match="waits for the device"), NoHostSync():
        torch.ones(()).item()
    with NoHostSync():
        reg.set_progress(1, 10)
        reg.add_gradients()
        reg.penalty().backward()


def test_no_host_synchronisation_in_the_source():
    banned = {"item", "tolist", "cpu", "numpy", "nonzero", "synchronize"}
    for module in (penalties, selection, regularizer):
        tree = ast.parse(inspect.getsource(module))
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            used = {node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)}
            assert function.name in ("errors", "step_sizes", "bounded") or not used & banned, (
                f"{module.__name__}.{function.name}"
            )
