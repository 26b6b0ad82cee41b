from __future__ import annotations

import math

import pytest
import timm
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_ssl_or.errors import InputError
from hf_ssl_or.training.optim import (
    LARS,
    OptimizerArguments,
    build_optimizer,
    learning_rate,
    parameter_groups,
    set_learning_rate,
    set_weight_decay,
    weight_decay,
)

SHAPES = [(8, 3, 3, 3), (16, 8), (5, 7), (4, 4)]


def small_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def names_of(groups: list[dict]) -> list[list[str]]:
    return [[name for name, _ in group["params"]] for group in groups]


class Watch(TorchDispatchMode):
    """Notes every operator, and refuses those that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        assert not any(word in name for word in ("_local_scalar_dense", "nonzero", "masked_select")), name
        self.operators.append(name)
        return func(*args, **(kwargs or {}))


# -- groups -----------------------------------------------------------------------------------------------------------


def test_vectors_tokens_and_positions_have_no_decay() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, reg_tokens=2)
    decayed, exempt = names_of(parameter_groups(vit, 0.1, True))
    assert {"cls_token", "reg_token", "pos_embed", "norm.weight", "blocks.0.attn.qkv.bias"} <= set(exempt)
    assert set(decayed) == {n for n, p in vit.named_parameters() if p.ndim > 1} - {
        "cls_token",
        "reg_token",
        "pos_embed",
    }
    assert sorted(decayed + exempt) == sorted(name for name, _ in vit.named_parameters())


def test_mixer_weights_named_after_tokens_are_decayed() -> None:
    module = nn.ModuleDict({"mlp_tokens": nn.Linear(2, 2, bias=False)})
    assert names_of(parameter_groups(module, 0.1, True)) == [["mlp_tokens.weight"]]


def test_groups_carry_their_settings_and_skip_frozen_parameters() -> None:
    net = small_net()
    net[3].weight.requires_grad_(False)
    groups = parameter_groups(net, 0.1, True)
    assert names_of(groups) == [["0.weight"], ["0.bias", "1.weight", "1.bias", "3.bias"]]
    assert [(group["weight_decay"], group["adapt"]) for group in groups] == [(0.1, True), (0.0, False)]
    (single,) = parameter_groups(net, 0.1, False)
    assert len(single["params"]) == 5 and single["weight_decay"] == 0.1 and single["adapt"]


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD), ("lars", LARS)])
def test_build_optimizer(name: str, kind: type) -> None:
    arguments = OptimizerArguments(name=name, lr=0.5, weight_decay=0.1, scale_lr=True)
    optimizer = build_optimizer(small_net(), arguments, batch_size=1024)
    assert type(optimizer) is kind
    assert [(g["lr"], g["base_lr"]) for g in optimizer.param_groups] == [(2.0, 2.0)] * 2
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "3.weight"]
    set_learning_rate(optimizer, 0.25)
    set_learning_rate(optimizer, 0.5)
    assert [(g["lr"], g["base_lr"]) for g in optimizer.param_groups] == [(1.0, 2.0)] * 2


def test_lr_is_taken_as_given_without_scale_lr() -> None:
    assert build_optimizer(small_net(), OptimizerArguments(lr=1), batch_size=8).param_groups[0]["lr"] == 1


def test_nothing_to_train_is_an_input_error() -> None:
    with pytest.raises(InputError, match="nothing to train"):
        build_optimizer(small_net().requires_grad_(False), OptimizerArguments(), batch_size=8)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_a_gradient_may_come_later_than_the_others(name: str) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = build_optimizer(net, OptimizerArguments(name=name, lr=0.1), batch_size=8)
    before = net[1].weight.detach().clone()
    net[0](torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert torch.equal(net[1].weight, before)
    net(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(net[1].weight, before)


# -- LARS -------------------------------------------------------------------------------------------------------------


def lars_reference(
    weights: list[Tensor], buffers: list[Tensor], grads: list[Tensor | None], lr: float, **s: float
) -> None:
    """One step of LARS as the paper writes it, one weight after the other, with Python numbers."""
    for i, gradient in enumerate(grads):
        if gradient is None:
            continue
        w, g = weights[i].norm().item(), gradient.norm().item()
        q = 1.0
        if w > 0 and g > 0:
            q = s["eta"] * w / (g + s["weight_decay"] * w + s["eps"])
            q = min(q / lr, 1.0) if s["clip"] else q
        update = q * (gradient + s["weight_decay"] * weights[i])
        buffers[i] = s["momentum"] * buffers[i] + update
        update = update + s["momentum"] * buffers[i] if s["nesterov"] else buffers[i]
        weights[i] = weights[i] - lr * update


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_lars_equals_the_reference(clip: bool, momentum: float, nesterov: bool, weight_decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    params = [nn.Parameter(draw(shape)) for shape in SHAPES]
    params[1].data.zero_()  # a zero weight
    settings = {"eta": 0.5, "clip": clip, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
    optimizer = LARS(params, 0.1, eps=1e-8, **settings)
    weights, buffers = [p.detach().clone() for p in params], [torch.zeros_like(p) for p in params]
    for step, lr in enumerate([0.1, 0.9, 2.0, 0.3]):
        grads: list[Tensor | None] = [draw(shape) * 10 ** (step - 2) for shape in SHAPES]
        grads[2] = torch.zeros_like(params[2]) if step == 1 else grads[2]  # a zero gradient
        grads[3] = None if step in (0, 2) else grads[3]
        for parameter, gradient in zip(params, grads, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        lars_reference(weights, buffers, grads, lr, eps=1e-8, **settings)
        for parameter, weight, gradient in zip(params, weights, grads, strict=True):
            torch.testing.assert_close(parameter.detach(), weight, rtol=1e-13, atol=1e-14)
            assert gradient is None or torch.equal(parameter.grad, gradient), "the gradient must stay as it was"


def test_lars_without_adaptation_is_sgd() -> None:
    nets = [small_net().double() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    lars = LARS([{"params": list(nets[0].parameters()), "adapt": False}], 0.1, weight_decay=0.2, nesterov=True)
    sgd = torch.optim.SGD(nets[1].parameters(), 0.1, momentum=0.9, weight_decay=0.2, nesterov=True)
    for _ in range(3):
        for net, optimizer in zip(nets, (lars, sgd), strict=True):
            optimizer.zero_grad()
            net(torch.ones(4, 3, 3, 3, dtype=torch.float64)).square().sum().backward()
            optimizer.step()
    for ours, theirs in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_lars_waits_for_nothing_and_is_batched() -> None:
    counts = []
    for repeat in (1, 10):
        params = [nn.Parameter(torch.randn(shape)) for shape in SHAPES * repeat]
        optimizer = LARS(params, 0.1, weight_decay=0.1, nesterov=True)
        for parameter in params:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()  # makes the buffers
        with Watch() as watch:
            optimizer.step()
        counts.append(len(watch.operators))
    assert counts[0] == counts[1] < 30


def test_the_watch_sees_a_host_sync() -> None:
    with pytest.raises(AssertionError, match="_local_scalar_dense"), Watch():
        torch.ones(()).item()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_no_optimizer_waits_for_the_gpu(name: str) -> None:
    net = timm.create_model("resnet18").to("cuda", memory_format=torch.channels_last)
    optimizer = build_optimizer(net, OptimizerArguments(name=name), batch_size=8)
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_lars_at_rate_zero_stands_still() -> None:
    parameter = nn.Parameter(torch.randn(3, 3))
    before, parameter.grad = parameter.detach().clone(), torch.randn(3, 3)
    LARS([parameter], 0.0, weight_decay=0.1).step()
    assert torch.equal(parameter, before)


def test_lars_calls_the_closure_with_gradients_on() -> None:
    parameter = nn.Parameter(torch.ones(2, 2))

    def closure() -> Tensor:
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert LARS([parameter], 0.1).step(closure).item() == 4.0
    assert (parameter < 1).all()


# -- learning rate ----------------------------------------------------------------------------------------------------


def test_cosine_with_warmup() -> None:
    arguments = OptimizerArguments(min_lr_ratio=0.1)
    factors = [learning_rate(step, 100, 20, arguments) for step in range(101)]
    assert factors[:21] == pytest.approx([(step + 1) / 21 for step in range(21)])
    assert factors[20] == 1.0
    assert factors[60] == pytest.approx(0.55)
    assert factors[40] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert factors[100] == pytest.approx(0.1)
    assert all(after < before for before, after in zip(factors[20:], factors[21:], strict=False))


def test_schedule_without_warmup_and_at_its_ends() -> None:
    assert learning_rate(0, 10, 0, OptimizerArguments()) == 1.0
    assert learning_rate(10, 10, 0, OptimizerArguments()) == pytest.approx(0, abs=1e-15)
    assert learning_rate(500, 10, 0, OptimizerArguments(min_lr_ratio=0.5)) == pytest.approx(0.5)
    assert learning_rate(10, 10, 10, OptimizerArguments()) == 1.0
    constant = OptimizerArguments(schedule="constant")
    assert [learning_rate(step, 10, 1, constant) for step in (0, 1, 9)] == [0.5, 1.0, 1.0]


# -- weight decay -----------------------------------------------------------------------------------------------------


def test_weight_decay_is_constant_or_half_a_cosine() -> None:
    assert [weight_decay(step, 10, OptimizerArguments(weight_decay=0.3)) for step in (0, 5, 10)] == [0.3] * 3
    rising = OptimizerArguments(weight_decay=0.04, weight_decay_end=0.4)
    found = [weight_decay(step, 100, rising) for step in range(101)]
    assert found == pytest.approx(
        [0.4 + (0.04 - 0.4) * (1 + math.cos(math.pi * step / 100)) / 2 for step in range(101)]
    )
    assert (found[0], found[50], found[100]) == pytest.approx((0.04, 0.22, 0.4))
    assert weight_decay(500, 100, rising) == pytest.approx(0.4)
    assert weight_decay(9, 9, OptimizerArguments(weight_decay=0.1, weight_decay_end=0)) == 0


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_a_changed_decay_is_that_of_an_optimizer_made_with_it_and_spares_vectors(name: str) -> None:
    nets, results = [small_net() for _ in range(2)], []
    nets[1].load_state_dict(nets[0].state_dict())
    for net, made, later in zip(nets, (0.0, 0.3), (0.3, None), strict=True):
        optimizer = build_optimizer(net, OptimizerArguments(name=name, lr=0.1, weight_decay=made), batch_size=8)
        if later is not None:
            set_weight_decay(optimizer, later)
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
        net(torch.ones(2, 3, 3, 3)).square().sum().backward()
        optimizer.step()
        results.append(net.state_dict())
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 0},
        {"lr": math.nan},
        {"eps": 0},
        {"lars_eta": -1},
        {"weight_decay": -1e-4},
        {"weight_decay_end": -1e-4},
        {"weight_decay_end": math.inf},
        {"warmup_epochs": -1},
        {"momentum": 1},
        {"nesterov": True, "momentum": 0},
        {"betas": [0.9]},
        {"betas": [0.9, 1.0]},
        {"min_lr_ratio": 1.5},
    ],
)
def test_a_value_out_of_range_is_named(wrong: dict) -> None:
    with pytest.raises(InputError, match=rf"training\.optimizer\.{next(iter(wrong))}") as caught:
        OptimizerArguments(**wrong)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", [{"name": "adam"}, {"lr": "1e-3"}, {"schedule": "step"}, {"lars_clip": "yes"}])
def test_a_wrong_type_is_named(wrong: dict) -> None:
    with pytest.raises(StrictDataclassFieldValidationError, match=next(iter(wrong))):
        OptimizerArguments(**wrong)
