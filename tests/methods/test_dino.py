from __future__ import annotations

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from lightly.loss import DINOLoss
from torch import nn

from hf_ssl_or.methods.dino import DINO, DINOConfig, dino_loss
from hf_ssl_or.models.auto import create_encoder
from hf_ssl_or.structures import MultiViewBatch

SMALL = {"projector_hidden": 16, "projector_dim": 8, "prototypes": 12, "freeze_prototypes_steps": 0}


def make_method(encoder, views=2, local=0, **settings):
    torch.manual_seed(0)
    return DINO(encoder, **SMALL | settings).train()


def make_batch(views=2, local=0, step=0, size=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(views, 6, 3, size, size, generator=generator, dtype=dtype)
    crops = torch.randn(local, 6, 3, size // 2, size // 2, generator=generator, dtype=dtype) if local else None
    return MultiViewBatch(views_VBCHW=images, local_views_VBCHW=crops, index_B=torch.arange(6), step=step)


@pytest.mark.parametrize(("views", "local"), [(2, 0), (2, 3), (3, 0), (4, 2)])
def test_the_loss_equals_lightly_with_gradient(views, local):
    torch.manual_seed(views)
    scores_SBK = torch.randn(views + local, 7, 20, dtype=torch.float64, requires_grad=True)
    teacher_VBK = torch.randn(views, 7, 20, dtype=torch.float64)
    criterion = DINOLoss(20, student_temp=0.2).double()
    criterion.center.normal_()
    loss, _ = dino_loss(scores_SBK, teacher_VBK, criterion.center.flatten().clone(), 0.2, 0.06)
    expected = criterion(list(teacher_VBK), list(scores_SBK), teacher_temp=0.06)
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=0)  # lightly keeps its temperature in float32
    gradients = torch.autograd.grad(loss, scores_SBK), torch.autograd.grad(expected, scores_SBK)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(("views", "local"), [(2, 0), (2, 3), (3, 1)])
def test_training_equals_lightly_loss_and_center(tiny_encoder, views, local):
    method = make_method(tiny_encoder(batch_norm=False), views, local, momentum=0.8).double()
    criterion = DINOLoss(12).double()
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    for step in range(4):
        batch = make_batch(views, local, step, dtype=torch.float64)
        with torch.no_grad():
            student_SBK = method.projector(method.encode_with_local_views(batch))
        temperature = method.teacher_temperature.item()
        expected = criterion(list(method.targets(batch.views_VBCHW)), list(student_SBK), teacher_temp=temperature)
        output = method(batch)
        torch.testing.assert_close(output.loss.detach(), expected, rtol=1e-6, atol=0)
        assert 0 < output.terms["target_confidence"] < 1
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        method.on_step_end(step, 4)
        torch.testing.assert_close(method.center_K, criterion.center.flatten(), rtol=1e-12, atol=1e-15)
    assert method.center_K.any()


def test_the_teacher_follows_the_prototypes_too(tiny_encoder):
    method = make_method(tiny_encoder(), momentum=0.75)
    method(make_batch()).loss.backward()
    with torch.no_grad():
        method.projector[1].weight += 1
    before = method.teacher.projector[1].weight.clone()
    method.on_step_end(0, 10)
    torch.testing.assert_close(method.teacher.projector[1].weight, before + 0.25)


def test_the_teachers_temperature_rises_over_its_share_of_the_training(tiny_encoder):
    method = make_method(tiny_encoder(), teacher_temperature=0.04, final_teacher_temperature=0.08)
    method.config.teacher_temperature_warmup = 0.4
    method(make_batch())
    seen = []
    for step in range(10):
        seen.append(method.teacher_temperature.item())
        method.on_step_end(step, 10)
    assert seen == pytest.approx([0.04, 0.05, 0.06, 0.07, *[0.08] * 6])
    other = make_method(tiny_encoder())
    other.load_state_dict(method.state_dict())
    assert other.teacher_temperature.item() == pytest.approx(0.08)


def test_without_a_warm_up_the_temperature_is_the_final_one(tiny_encoder):
    method = make_method(tiny_encoder(), teacher_temperature_warmup=0, final_teacher_temperature=0.05)
    assert method.teacher_temperature.item() == pytest.approx(0.05)


def test_prototypes_stay_for_the_first_steps(tiny_encoder):
    method = make_method(tiny_encoder(), freeze_prototypes_steps=3)
    for step, moves in ((0, False), (2, False), (3, True)):
        method.zero_grad()
        method(make_batch(step=step)).loss.backward()
        mlp, prototypes = method.projector
        assert bool(prototypes.weight.grad.any()) == moves
        assert all(p.grad.any() for p in mlp.parameters())


def test_the_head_is_the_published_one(tiny_encoder):
    def kinds(method):
        return [type(module).__name__ for module in method.projector[0].mlp]

    mlp, prototypes = make_method(tiny_encoder(), projector_hidden=256).projector
    assert kinds(make_method(tiny_encoder())) == ["Linear", "GELU", "Linear", "GELU", "Linear"]
    assert kinds(make_method(tiny_encoder(), projector_norm=True))[:3] == ["Linear", "BatchNorm1d", "GELU"]
    assert prototypes.weight.shape == (12, 8)
    for linear in (module for module in mlp.modules() if isinstance(module, nn.Linear)):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1) and not linear.bias.any()


@pytest.mark.parametrize("name", ["vit_tiny", "resnet18"])
def test_local_views_of_another_size_and_real_encoders(name):
    torch.manual_seed(0)
    small = {"patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2}
    if name == "resnet18":
        small = {"stem": "small", "channels": [4, 4, 8, 8]}
    method = make_method(create_encoder(name, image_size=32, **small), local=3)
    output = method(make_batch(local=3, size=32))
    output.loss.backward()
    assert output.loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "settings",
    [
        {"student_temperature": 0},
        {"teacher_temperature": 0},
        {"final_teacher_temperature": -1},
        {"prototypes": 1},
        {"freeze_prototypes_steps": -1},
        {"teacher_temperature_warmup": 1.5},
        {"center_momentum": -0.1},
    ],
)
def test_a_wrong_setting_is_refused_by_name(settings):
    with pytest.raises(StrictDataclassError, match=next(iter(settings))):
        DINOConfig(**settings)
