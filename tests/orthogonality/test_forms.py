"""The forms beside the paper's sum: the decoupled step of a strength, and targets other than the identity."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import timm
import torch
from test_regularizer import NoHostSync, assert_close, gradients, matrices_of, small_encoder
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from transformers import ViTConfig, ViTModel

from hf_ssl_or.errors import InputError
from hf_ssl_or.models.auto import create_encoder
from hf_ssl_or.models.configuration_ssl import OrthogonalityConfig
from hf_ssl_or.orthogonality import OrthogonalityRegularizer, penalties
from hf_ssl_or.orthogonality.strength import rate_of

BAND = [0.6, 1.5]
FORMS = [
    *({"penalty": "so", "target": target} for target in ("identity", "scaled", "start")),
    {"penalty": "so", "target": "relaxed", "band": BAND},
    *({"penalty": "srip", "target": target} for target in ("identity", "scaled")),
]
COUPLED = [*FORMS, {"penalty": "dso", "target": "scaled"}, {"penalty": "mutual_coherence", "target": "scaled"}]


def name_of(form):
    return f"{form['penalty']}-{form['target']}"


def regularize(encoder, **settings):
    return OrthogonalityRegularizer(encoder, OrthogonalityConfig(**settings))


def gram(w_OI):
    return w_OI @ w_OI.T if w_OI.shape[0] <= w_OI.shape[1] else w_OI.T @ w_OI


def start_from(encoder):
    """The Grams that target "start" keeps, and moves the weights away from them."""
    starts = {
        name: [gram(w).detach() for w in matrices_of(encoder, [name])] for name in regularize(encoder, weight=1).names
    }
    return starts


def move(encoder, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in encoder.parameters():
            dtype = torch.complex128 if p.is_complex() else torch.float64
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=dtype).to(p.dtype))


def gate(y):
    return y**2 * (3 + y) / (1 + y) ** 3


def reference(form, w_OI, start_RR):
    """The penalty of one matrix, from eigenvalues where that is plainest."""
    g_RR = gram(w_OI)
    if form["target"] == "start":
        return (g_RR - start_RR).pow(2).sum()
    if form["target"] != "identity":
        g_RR = g_RR / (g_RR.trace() / len(g_RR))
    values = torch.linalg.eigvalsh(g_RR)
    if form["target"] == "relaxed":
        low, high = form["band"]
        y = ((values - (low + high) / 2) / ((high - low) / 2)) ** 2
        return ((high - low) / 2) ** 2 * (y**3 / (1 + y) ** 2).sum()
    if form["penalty"] == "srip":
        return (values - 1).abs().max()
    if form["penalty"] == "mutual_coherence":
        return (g_RR - torch.eye(len(g_RR), dtype=g_RR.dtype)).abs().max()
    squares = (values - 1).pow(2).sum()
    return squares if form["penalty"] == "so" else 2 * squares + abs(w_OI.shape[0] - w_OI.shape[1])


@pytest.mark.parametrize("form", COUPLED, ids=name_of)
def test_value_and_gradient_are_those_of_autograd(form):
    encoder = small_encoder()
    starts = start_from(encoder)
    reg = regularize(encoder, weight=0.5, **form)
    move(encoder)
    reg.exact_vectors()
    total = 0.5 * sum(
        reference(form, w, g)
        for name in reg.names
        for w, g in zip(matrices_of(encoder, [name]), starts[name], strict=True)
    )
    total.backward()
    wanted = {name: grad.clone() for name, grad in gradients(encoder).items()}
    encoder.zero_grad()
    value = reg.penalty()
    value.backward()
    by_autograd = {name: grad.clone() for name, grad in gradients(encoder).items()}
    encoder.zero_grad()
    assert_close(value.detach(), total.detach())
    assert_close(reg.add_gradients(), total.detach())
    assert reg.step() == 0
    for name in reg.names:
        assert (by_autograd[name] - wanted[name]).abs().max() < 1e-9 * wanted[name].abs().max()
        assert (gradients(encoder)[name] - wanted[name]).abs().max() < 1e-9 * wanted[name].abs().max()


def literal_step(form, w_OI, start_RR, a):
    """The step on one full matrix, from eigenvectors; its bound from Frobenius norms, or SRIP's exact one."""
    wide = w_OI.shape[0] <= w_OI.shape[1]
    a_RC = w_OI if wide else w_OI.T
    identity = torch.eye(len(a_RC), dtype=w_OI.dtype)
    g_RR = a_RC @ a_RC.T
    if form["target"] == "start":
        c = start_RR.trace() / len(start_RR)
        m_RR = (g_RR - start_RR) / c
        norm = m_RR.norm() + (start_RR / c).abs().sum(1).max()
    else:
        if form["target"] != "identity":
            g_RR = g_RR / (g_RR.trace() / len(g_RR))
        values, vectors = torch.linalg.eigh(g_RR)
        low, high = form.get("band", (0, 2))
        pulls = values - (low + high) / 2
        if form["target"] == "relaxed":
            y = (pulls / ((high - low) / 2)) ** 2
            norm = ((high - low) / 2) * (y**3 / (1 + y) ** 2).sum().sqrt()
            pulls = pulls * gate(y)
        elif form["penalty"] == "srip":
            pulls = torch.where(pulls.abs() == pulls.abs().max(), pulls, 0)
            norm = pulls.abs().max()
        else:
            norm = pulls.norm()
        if form["target"] != "identity":
            mean = (pulls * values).mean()  # what would change the scale
            norm, pulls = norm + mean.abs(), pulls - mean
        m_RR = vectors @ torch.diag(pulls) @ vectors.T
        assert norm >= 0.8 * pulls.abs().max()
    assert len(identity) == len(m_RR)
    moved = a_RC - min(a, 0.5 / max(1, norm.item())) * m_RR @ a_RC
    return moved if wide else moved.T


@pytest.mark.parametrize("size", [0.02, 3.0], ids=["free", "bounded"])
@pytest.mark.parametrize("form", FORMS, ids=name_of)
def test_the_step_is_that_of_a_loop_over_full_matrices(form, size):
    encoder = small_encoder()  # with a grouped convolution
    starts = start_from(encoder)
    reg = regularize(encoder, strength=2 * size, **form)
    move(encoder)
    reg.exact_vectors()
    reg.set_progress(0, 1)
    wanted, before = {}, copy.deepcopy(encoder)
    for name in reg.names:
        parts = zip(matrices_of(encoder, [name]), starts[name], strict=True)
        stacked = torch.cat([literal_step(form, w.detach(), g, size) for w, g in parts])
        wanted[name] = stacked.reshape(encoder.get_parameter(name).shape)
    value = reg.penalty().detach()
    assert reg.add_gradients() == 0
    assert gradients(encoder) == {}
    assert_close(reg.step(), value)
    for name, p in encoder.named_parameters():
        torch.testing.assert_close(p.detach(), wanted.get(name, before.get_parameter(name)), rtol=1e-9, atol=1e-9)
    assert set(reg.bounded()) == set(reg.names)
    assert (max(reg.bounded().values()) > 0) == (size > 0.5)


def test_scaled_is_the_formula():
    encoder = nn.Sequential(nn.Linear(12, 7, bias=False)).double()
    w = encoder[0].weight.detach().clone()
    reg = regularize(encoder, strength=0.2, target="scaled")
    reg.set_progress(0, 1)
    reg.step()
    c = (w @ w.T).trace() / 7
    m = (w @ w.T).pow(2).sum() / (c**2 * 7)
    wanted = w - 0.1 * (w @ w.T / c - m * torch.eye(7, dtype=torch.float64)) @ w
    torch.testing.assert_close(encoder[0].weight.detach(), wanted, rtol=1e-12, atol=1e-12)


def test_split_qkv_moves_three_matrices():
    encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1, embed_dim=24, num_heads=2).double()
    name = "blocks.0.attn.qkv.weight"
    form = {"penalty": "so", "target": "scaled"}
    wanted = torch.cat([literal_step(form, w.detach(), None, 0.1) for w in encoder.get_parameter(name).chunk(3)])
    reg = regularize(encoder, strength=0.2, split_qkv=True, **form)
    reg.set_progress(0, 1)
    reg.step()
    torch.testing.assert_close(encoder.get_parameter(name).detach(), wanted, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# What a strength means


def nearly_orthogonal(scale=1.0, deviation=1e-3):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(24, 10), nn.Linear(10, 16), nn.Conv2d(4, 6, 3, groups=2)).double()
    for weight in (p for p in encoder.parameters() if p.ndim > 1):
        nn.init.orthogonal_(weight[: len(weight) // 2] if weight.ndim == 4 else weight)
        if weight.ndim == 4:
            nn.init.orthogonal_(weight[len(weight) // 2 :])
        weight.data.add_(deviation * torch.randn_like(weight)).mul_(scale)
    return encoder


SCHEDULES = {
    "none": None,
    "cosine": lambda step, total: (1 + math.cos(math.pi * step / total)) / 2,
    "warm-up": lambda step, total: min((step + 1) / 10, (total - step) / (total - 9)),
}
OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.3, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=0),
    "adam": lambda params: torch.optim.Adam(params, lr=5.0),
}


@pytest.mark.parametrize("steps", [40, 300])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_without_loss_leaves_exp_minus_strength(optimizer, schedule, steps):
    for form, scale in ((("so", "identity"), 1.0), (("so", "scaled"), 3.0), (("so", "start"), 0.2)):
        encoder = nearly_orthogonal(scale)
        penalty, target = form
        starting = nearly_orthogonal(scale, 0.0) if target == "start" else encoder
        reg = regularize(encoder, penalty=penalty, target=target, strength=1.5)
        if target == "start":
            reg.load_state_dict(regularize(starting, penalty=penalty, target=target, strength=1.5).state_dict())
        made = OPTIMIZERS[optimizer](encoder.parameters())
        course = SCHEDULES[schedule]
        scheduler = LambdaLR(made, lambda step, course=course: course(step, steps)) if course else None
        reg.follow(rate_of(scheduler))
        before = reg.penalty().sqrt()
        for step in range(steps):
            made.zero_grad()
            (0 * encoder[0].weight.sum()).backward()
            reg.set_progress(step, steps)
            reg.add_gradients()
            made.step()
            reg.step()
            if scheduler:
                scheduler.step()
        rate = 2 * sum((0.75 * reg._course.share(step, steps)) ** 2 for step in range(steps))  # of finite steps
        assert (reg.penalty().sqrt() / before).item() == pytest.approx(math.exp(-1.5), rel=0.02 + rate)
        assert max(reg.bounded().values()) == 0


def test_srip_shrinks_its_own_direction():
    encoder = nn.Sequential(nn.Linear(8, 8, bias=False)).double()
    nn.init.orthogonal_(encoder[0].weight)
    with torch.no_grad():
        u = nn.functional.normalize(torch.randn(8, dtype=torch.float64), dim=0)
        encoder[0].weight.add_(0.002 * torch.outer(u, u @ encoder[0].weight))
    reg = regularize(encoder, penalty="srip", strength=2.0)
    reg.exact_vectors()
    before = reg.penalty().item()
    for step in range(200):
        reg.set_progress(step, 200)
        reg.step()
    assert reg.penalty().item() / before == pytest.approx(math.exp(-2), rel=0.02)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "step"])
@pytest.mark.parametrize("every", [1, 4])
def test_all_steps_together_are_the_strength(schedule, every):
    encoder = nn.Sequential(nn.Linear(6, 4, bias=False)).double()
    reg = regularize(encoder, strength=3.0, schedule=schedule, every=every)
    reg.follow(lambda step: 7.0 * (1 + math.cos(math.pi * step / 2000)))
    total = 0.0
    for step in range(2000):
        reg.set_progress(step, 2000)
        total += every * reg._step_size() if step % every == 0 else 0
    assert 2 * total == pytest.approx(3, rel=5e-3)


def test_every_k_steps_k_times_as_far():
    moved = []
    for every in (1, 3):
        encoder = small_encoder()
        before = encoder[6].weight.detach().clone()
        reg = regularize(encoder, strength=0.1, every=every)
        reg.set_progress(3, 10)
        assert reg.step() > 0
        moved.append(encoder[6].weight.detach() - before)
        after = encoder[6].weight.detach().clone()
        reg.set_progress(4, 10)
        assert (reg.step() > 0) == (every == 1)
        assert torch.equal(after, encoder[6].weight) == (every == 3)
    torch.testing.assert_close(moved[1], 3 * moved[0], rtol=1e-9, atol=1e-12)


def test_a_skipped_step_of_the_optimizer_does_not_skip_the_penalty():
    encoder = small_encoder(torch.float32)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    reg = regularize(encoder, strength=1.0)
    before, bias = encoder[6].weight.detach().clone(), encoder[6].bias.detach().clone()
    scaler.scale(encoder(torch.full((2, 3, 8, 8), float("inf"))).sum()).backward()
    scaler.step(optimizer)
    reg.set_progress(0, 4)
    reg.step()
    scaler.update()
    assert scaler.get_scale() == 1.0
    assert torch.equal(encoder[6].bias, bias)
    assert not torch.equal(encoder[6].weight, before)
    assert encoder[6].weight.isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# Scale and stability


@pytest.mark.parametrize("form", [form for form in FORMS if form["target"] in ("scaled", "relaxed")], ids=name_of)
def test_scale_free_forms_do_not_see_the_scale(form):
    encoder, larger = small_encoder(), small_encoder()
    with torch.no_grad():
        for name in regularize(larger, weight=1).names:
            larger.get_parameter(name).mul_(5)
    regs = [regularize(each, weight=1, **form) for each in (encoder, larger)]
    assert_close(regs[1].penalty().detach(), regs[0].penalty().detach())
    regs[0].add_gradients()
    for name, grad in gradients(encoder).items():
        for w_OI, grad_OI in zip(
            matrices_of(encoder, [name]),
            grad.flatten(1).chunk(getattr(encoder.get_submodule(name[:-7]), "groups", 1)),
            strict=True,
        ):
            assert abs((w_OI * grad_OI).sum()) < 1e-12 * w_OI.norm() * grad_OI.norm()
    regs = [regularize(each, strength=0.1, **form) for each in (encoder, larger)]
    for reg in regs:
        reg.set_progress(0, 1)
        reg.step()
    for name in regs[0].names:
        weight = encoder.get_parameter(name)
        torch.testing.assert_close(larger.get_parameter(name), 5 * weight, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", FORMS, ids=name_of)
def test_large_singular_values_come_down_without_overshooting(form):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(48, 24, bias=False)).double()
    if form["target"] == "start":
        nn.init.orthogonal_(encoder[0].weight)
    reg = regularize(encoder, strength=200.0, **form)  # in 100 steps: without a bound a_t = 1
    left, _, right = torch.linalg.svd(encoder[0].weight.detach(), full_matrices=False)
    squares = torch.linspace(0.1, 17.0, 24, dtype=torch.float64)
    encoder[0].weight.data = left @ torch.diag(squares.sqrt()) @ right
    reg.exact_vectors()
    worst = torch.inf
    for step in range(100):
        value = reg.penalty().item()
        assert value <= worst * (1 + 1e-6) + 1e-12
        worst = max(value, 1e-12) if form["penalty"] == "so" else torch.inf
        reg.set_progress(step, 100)
        reg.step()
    final = torch.linalg.svdvals(encoder[0].weight.detach()) ** 2
    assert final.isfinite().all() and final.max() <= 17
    if form["target"] == "identity":
        assert (final - 1).abs().max() < (1e-6 if form["penalty"] == "so" else 0.6)
    elif form["target"] == "relaxed":
        ratios = final / final.mean()
        assert ratios.min() > BAND[0] and ratios.max() < BAND[1]


def test_relaxed_leaves_the_inner_band_nearly_alone():
    torch.manual_seed(0)
    squares = torch.tensor([0.2, 0.8, 0.9, 1.0, 1.1, 1.2, 1.8], dtype=torch.float64)
    left, _, right = torch.linalg.svd(torch.randn(7, 20, dtype=torch.float64), full_matrices=False)
    moved = {}
    for target in ("scaled", "relaxed"):
        encoder = nn.Sequential(nn.Linear(20, 7, bias=False)).double()
        encoder[0].weight.data = left @ torch.diag(squares.sqrt()) @ right
        reg = regularize(encoder, target=target, strength=1.0)
        for step in range(100):
            reg.set_progress(step, 100)
            reg.step()
        final = torch.linalg.svdvals(encoder[0].weight.detach()).flip(0) ** 2
        moved[target] = (final / final[3] - squares).abs()
    assert moved["relaxed"][1:-1].max() < 0.2 * moved["scaled"][1:-1].max()
    assert moved["relaxed"][[0, -1]].min() > 5 * moved["relaxed"][1:-1].max()


def test_layers_that_were_bounded_are_named_at_the_end(caplog):
    encoder = small_encoder()
    reg = regularize(encoder, strength=100.0)
    with caplog.at_level(logging.WARNING, logger="hf_ssl_or"):
        for step in range(10):
            reg.set_progress(step, 10)
            reg.step()
            assert bool(caplog.records) == (step == 9)
    assert "strength 100 was too much for a run of 10 steps" in caplog.text
    assert "0.weight, 2.weight, 3.weight, 6.weight, 8.weight" in caplog.text
    caplog.clear()
    reg = regularize(encoder, strength=0.01)
    for step in range(10):
        reg.set_progress(step, 10)
        reg.step()
    assert not caplog.records


@pytest.mark.parametrize("form", FORMS, ids=name_of)
def test_step_sizes_are_the_lengths_of_the_step_and_move_nothing(form):
    encoder = small_encoder()
    reg = regularize(encoder, strength=0.1, every=2, **form)
    move(encoder)
    reg.set_progress(2, 10)
    before = copy.deepcopy(encoder)
    sizes = reg.step_sizes()
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), encoder.parameters(), strict=True))
    reg.step()
    assert list(sizes) == reg.names
    for name, size in sizes.items():
        length = (encoder.get_parameter(name) - before.get_parameter(name)).norm().item()
        assert 2 * size == pytest.approx(length, rel=1e-9)
    coupled = regularize(encoder, weight=0.1, **form)
    sizes = coupled.step_sizes()
    coupled.add_gradients()
    for name, grad in gradients(encoder).items():
        assert sizes[name] == pytest.approx(grad.norm().item(), rel=1e-9)


@pytest.mark.parametrize("form", FORMS, ids=name_of)
def test_no_host_synchronization(form):
    encoder = small_encoder()
    reg, coupled = regularize(encoder, strength=1.0, **form), regularize(encoder, weight=1.0, **form)
    with NoHostSync():
        reg.set_progress(1, 10)
        reg.step()
        coupled.add_gradients()
        coupled.penalty().backward()


@pytest.mark.parametrize("form", FORMS, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(form, dtype):
    exact = small_encoder(torch.float32).to(dtype).double()
    encoder = copy.deepcopy(exact).to(dtype)
    for each in (exact, encoder):
        reg = regularize(each, strength=0.4, **form)
        move(each) if form["target"] == "start" else None
        reg.set_progress(0, 1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            reg.step()
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    for p, wanted in zip(encoder.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(p.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("form", FORMS, ids=name_of)
def test_complex_weights_come_near_unitary_ones(form):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(8, 5, bias=False, dtype=torch.complex128))
    if form["target"] == "start":
        encoder[0].weight.data = torch.linalg.qr(encoder[0].weight.detach().mH).Q.mH.resolve_conj()
    reg = regularize(encoder, strength=20.0, **form)
    move(encoder) if form["target"] == "start" else None
    before = reg.penalty().item()
    for step in range(200):
        reg.set_progress(step, 200)
        reg.step()
    assert reg.penalty().item() < 0.5 * before


# ---------------------------------------------------------------------------------------------------------------------
# The start, states and settings


def test_the_start_is_kept_and_comes_back_from_a_state():
    encoder = small_encoder()
    reg = regularize(encoder, strength=1.0, target="start")
    assert reg.penalty() == 0
    state = reg.state_dict()
    move(encoder)
    moved = reg.penalty()
    assert moved > 0
    other = regularize(encoder, strength=1.0, target="start")  # as on resume: made from weights of the middle
    assert other.penalty() == 0
    other.load_state_dict(state)
    assert torch.equal(other.penalty(), moved)
    with pytest.raises(InputError, match=r"the Gram of '8.weight' is missing"):
        other.load_state_dict({name: g for name, g in state.items() if name != "8.weight"})


def test_the_start_needs_loaded_weights(tmp_path):
    small = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=8)
    with pytest.raises(InputError, match="target: start keeps .* loaded weights, and these are new"):
        regularize(ViTModel(small), strength=1.0, target="start")
    ViTModel(small).save_pretrained(tmp_path)
    regularize(ViTModel.from_pretrained(tmp_path), strength=1.0, target="start")
    own = create_encoder("resnet18", stem="small", channels=[8, 8, 8, 8])
    with pytest.raises(InputError, match="these are new"):
        regularize(own, strength=1.0, target="start")
    own.save_pretrained(tmp_path / "own")
    loaded = create_encoder("resnet18", stem="small", channels=[8, 8, 8, 8], init_from=tmp_path / "own")
    regularize(loaded, strength=1.0, target="start")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": -1}, "strength: a finite number of at least 0, not -1"),
        ({"strength": float("inf")}, "strength: a finite number"),
        ({"strength": 1, "weight": 1e-3}, "weight and strength: give one"),
        ({"strength": 1, "penalty": "dso"}, "strength: goes with penalty: so or srip"),
        ({"strength": 1, "penalty": "mutual_coherence"}, "strength: goes with penalty: so or srip"),
        ({"strength": 1, "normalize": True}, "leave normalize false"),
        ({"strength": 1, "penalty": "srip", "fresh_start": True}, "leave fresh_start false"),
        ({"target": "relaxed", "band": [1.5, 0.5]}, "band: .low, high. with 0 <= low < 1 < high, not"),
        ({"target": "relaxed", "band": [0.5]}, "band: .low, high."),
        ({"target": "scaled", "band": [0.5, 1.5]}, "band: goes with target: relaxed"),
        ({"target": "relaxed", "penalty": "srip"}, "target: relaxed is a form of penalty: so"),
        ({"target": "start", "penalty": "dso"}, "target: start is a form of penalty: so"),
        ({"target": "size"}, "target"),
    ],
)
def test_what_has_no_meaning_is_refused(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        OrthogonalityConfig.from_dict(settings)
    assert "\n" not in str(caught.value)


def test_settings_of_older_versions_mean_what_they_meant():
    old = {
        **{"penalty": "so", "weight": 0.5, "normalize": False, "power_iterations": 1, "fresh_start": False},
        **{"schedule": "constant", "every": 1, "include": [], "exclude": [], "split_qkv": False, "seed": 0},
    }
    config = OrthogonalityConfig.from_dict(old)
    assert config == OrthogonalityConfig(weight=0.5)
    reg = OrthogonalityRegularizer(small_encoder(), config)
    assert not reg.decoupled and reg.weight == 0.5 and reg.step() == 0
    none = OrthogonalityRegularizer(small_encoder(), OrthogonalityConfig(penalty="none", strength=2.0))
    assert none.step() == 0 and none.step_sizes() == {} and none.bounded() == {}


def test_a_strength_needs_the_length_of_the_run():
    with pytest.raises(InputError, match="call set_progress before step"):
        regularize(small_encoder(), strength=1.0).step()


def test_the_papers_weight_is_for_the_identity():
    encoder = create_encoder("resnet18", stem="small", channels=[8, 8, 8, 8])
    with pytest.raises(InputError, match="the paper's weights are for target: identity"):
        regularize(encoder, target="scaled")
    assert regularize(encoder, target="scaled", strength=1.0).weight == 0


def test_the_course_of_other_schedulers_is_not_known(caplog):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
    assert rate_of(None) is None
    with caplog.at_level(logging.WARNING, logger="hf_ssl_or"):
        assert rate_of(OneCycleLR(optimizer, 1.0, total_steps=10)) is None
    assert "spread evenly over the run, since the course of a OneCycleLR" in caplog.text


def test_matrices_of_zeros_stay():
    encoder = nn.Sequential(nn.Linear(6, 4, bias=False))
    nn.init.zeros_(encoder[0].weight)
    for form in FORMS:
        reg = regularize(encoder, strength=1.0, **form)
        reg.set_progress(0, 2)
        reg.step()
        assert torch.equal(encoder[0].weight, torch.zeros(4, 6))
        assert penalties.unit_scale(encoder[0].weight)[0].isfinite().all()
