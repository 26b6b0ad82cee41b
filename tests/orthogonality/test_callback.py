from __future__ import annotations

import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from hf_ssl_or.errors import InputError
from hf_ssl_or.models.configuration_ssl import OrthogonalityConfig
from hf_ssl_or.orthogonality import OrthogonalityCallback, OrthogonalityRegularizer, callback


def vit():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=16,
        patch_size=8,
        num_labels=4,
        initializer_range=0.1,
    )
    return ViTForImageClassification(config)


def resnet():
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=4, image_size=16
    )
    return ResNetForImageClassification(config)


def images(count=32):
    generator = torch.Generator().manual_seed(0)
    return [
        {"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": i % 4}  # nothing to learn
        for i in range(count)
    ]


def train(model, folder, *callbacks, **arguments):
    settings = {"max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "logging_steps": 4}
    settings |= {"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "optim": "sgd"}
    args = TrainingArguments(output_dir=str(folder), **{**settings, **arguments})
    trainer = Trainer(model, args, train_dataset=images(), callbacks=list(callbacks))
    trainer.train()
    return trainer


@pytest.mark.parametrize(("build", "penalty"), [(vit, "so"), (resnet, "so"), (resnet, "srip")])
def test_errors_shrink_against_a_run_without(build, penalty, tmp_path):
    config = OrthogonalityConfig(penalty=penalty, weight=1.0 if penalty == "so" else 5.0)
    with_penalty, without = OrthogonalityCallback(config), OrthogonalityCallback(OrthogonalityConfig(penalty="none"))
    errors = {}
    for name, one in (("with", with_penalty), ("without", without)):
        model = build()
        train(model, tmp_path, one, learning_rate=1e-2)
        probe = OrthogonalityRegularizer(model.base_model, OrthogonalityConfig(weight=1))
        assert not any("classifier" in layer for layer in probe.names)
        errors[name] = probe.errors()
    assert sum(errors["with"].values()) < 0.9 * sum(errors["without"].values())


def test_the_gradient_comes_once_per_optimizer_step_and_unclipped(tmp_path):
    model = vit()
    penalty = OrthogonalityCallback(OrthogonalityConfig(penalty="so", weight=1e-2))
    train(model, tmp_path, penalty, max_steps=1, gradient_accumulation_steps=2, max_grad_norm=1e-12, learning_rate=1.0)
    wanted = vit()
    OrthogonalityRegularizer(wanted.base_model, penalty.config).add_gradients()
    for (name, got), old in zip(model.named_parameters(), wanted.parameters(), strict=True):
        target = old if old.grad is None else old - old.grad
        torch.testing.assert_close(got, target, rtol=1e-5, atol=1e-7, msg=name)


def test_the_penalty_is_logged_and_the_schedule_follows_the_run(tmp_path):
    penalty = OrthogonalityCallback(OrthogonalityConfig(penalty="so", weight=1e-3, schedule="step"))
    trainer = train(vit(), tmp_path, penalty, max_steps=20, logging_steps=1)
    values = [entry["orthogonality"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(values) == 20
    assert values[1] > 100 * values[2] > 0  # 10 % of the run
    assert values[12:] == [0] * 8


def test_another_encoder_can_be_given(tmp_path):
    model = vit()
    penalty = OrthogonalityCallback(OrthogonalityConfig(weight=1e-3), encoder=model.classifier)
    train(model, tmp_path, penalty, max_steps=1)
    assert penalty.regularizer.names == ["weight"]


@pytest.mark.parametrize("scheduler", ["linear", "cosine_with_min_lr", "constant"])
def test_a_strength_is_spread_as_trainers_learning_rate(scheduler, tmp_path):
    settings = {"learning_rate": 0.0, "optim": "sgd", "max_grad_norm": 1e-12, "warmup_steps": 3}
    settings |= {"lr_scheduler_type": scheduler, "gradient_accumulation_steps": 2}
    settings |= {"lr_scheduler_kwargs": {"min_lr_rate": 0.1}} if scheduler == "cosine_with_min_lr" else {}
    penalty = OrthogonalityCallback(OrthogonalityConfig(target="scaled", strength=1.0))
    model = vit()
    trainer = train(model, tmp_path, penalty, max_steps=10, logging_steps=1, **settings)
    wanted = vit()
    reg = OrthogonalityRegularizer(wanted.base_model, penalty.config)
    reg.follow(trainer.lr_scheduler.lr_lambdas[0])
    values = []
    for step in range(10):
        reg.set_progress(step, 10)
        values.append(reg.step().item())
    for (name, got), old in zip(model.named_parameters(), wanted.parameters(), strict=True):
        assert torch.equal(got, old), name
    logged = [entry["orthogonality"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == values
    assert 0 < logged[-1] < logged[1]


def test_the_start_is_that_of_the_model_handed_over(tmp_path):
    vit().save_pretrained(tmp_path / "model")
    config = OrthogonalityConfig(target="start", strength=1.0)
    callbacks = [OrthogonalityCallback(config) for _ in range(2)]
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "learning_rate": 1e-2}
    model = ViTForImageClassification.from_pretrained(tmp_path / "model")
    train(model, tmp_path, callbacks[0], **settings)
    again = ViTForImageClassification.from_pretrained(tmp_path / "model")
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=6, optim="sgd")
    trainer = Trainer(again, args, train_dataset=images(), callbacks=[callbacks[1]])
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    states = [each.regularizer.state_dict() for each in callbacks]
    assert states[0].keys() == states[1].keys() and states[0]
    assert all(torch.equal(states[1][name], g) for name, g in states[0].items())
    assert callbacks[1].regularizer.penalty() > 0
    late = Trainer(again, args, train_dataset=images())
    late.add_callback(OrthogonalityCallback(config))
    with pytest.raises(InputError, match="target start is for Trainer"):
        late.train()


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3 * 256, 4)

    def forward(self, pixel_values, labels):
        return {"loss": nn.functional.cross_entropy(self.linear(pixel_values.flatten(1)), labels)}


def test_what_cannot_work_is_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="Plain has no base_model; give encoder="):
        train(Plain(), tmp_path, OrthogonalityCallback(OrthogonalityConfig(weight=1)))
    with pytest.raises(InputError, match="config.architecture; set a number"):
        train(vit(), tmp_path, OrthogonalityCallback(OrthogonalityConfig()))

    class Sharded:
        distributed_type = DistributedType.FSDP

    monkeypatch.setattr(callback, "AcceleratorState", Sharded)
    with pytest.raises(InputError, match="FSDP shards the weights"):
        train(vit(), tmp_path, OrthogonalityCallback(OrthogonalityConfig(weight=1)))
