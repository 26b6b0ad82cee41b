"""The callback in `transformers.Trainer` for models of text, and of text with images."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from hf_ssl_or.models.configuration_ssl import OrthogonalityConfig
from hf_ssl_or.orthogonality import OrthogonalityCallback, OrthogonalityRegularizer

TEXT = {"vocab_size": 32, "max_position_embeddings": 8, "initializer_range": 0.15}
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def gpt2():
    no_dropout = {"attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0}
    sizes = {"vocab_size": 32, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, **no_dropout, **IDS, initializer_range=0.15))


def llama():
    return LlamaForCausalLM(LlamaConfig(**TEXT, **SMALL, **IDS))


def clip():
    vision = SMALL | {"image_size": 16, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=TEXT | SMALL | IDS, vision_config=vision, projection_dim=8))


def examples(model):
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, 32, (16, 8), generator=generator)
    if isinstance(model, CLIPModel):
        images = torch.randn(16, 3, 16, 16, generator=generator)
        return [{"input_ids": ids, "pixel_values": image} for ids, image in zip(words, images, strict=True)]
    return [{"input_ids": ids, "labels": ids} for ids in words]


def collate(rows):
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    return batch | ({"return_loss": True} if "pixel_values" in batch else {})


def train(model, folder, callback, **settings):
    settings = {"max_steps": 10, "learning_rate": 0.02, "per_device_train_batch_size": 4, "optim": "sgd"} | settings
    always = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1}
    args = TrainingArguments(output_dir=str(folder), **settings, **always)
    trainer = Trainer(model, args, train_dataset=examples(model), data_collator=collate, callbacks=[callback])
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("build", [gpt2, llama, clip])
def test_the_error_falls_while_the_loss_stays_finite(build, tmp_path):
    torch.manual_seed(0)
    model = build()
    config = OrthogonalityConfig(penalty="so", weight=1.0)
    before = OrthogonalityRegularizer(model.base_model, config).errors()
    logs = train(model, tmp_path, OrthogonalityCallback(config))
    after = OrthogonalityRegularizer(model.base_model, config).errors()
    assert len(before) == {gpt2: 4, llama: 7, clip: 15}[build]
    assert all(torch.isfinite(torch.tensor([entry["loss"], entry["orthogonality"]])).all() for entry in logs)
    assert logs[-1]["orthogonality"] < 0.8 * logs[0]["orthogonality"]
    assert sum(after.values()) < 0.9 * sum(before.values())


@pytest.mark.parametrize("build", [gpt2, llama])
def test_accumulated_steps_take_one_gradient(build, tmp_path):
    torch.manual_seed(0)
    start = build().state_dict()
    models = []
    for accumulation in (1, 4):
        model = build()
        model.load_state_dict(start)
        penalty = OrthogonalityCallback(OrthogonalityConfig(penalty="so", weight=0.1))
        sizes = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
        train(model, tmp_path, penalty, max_steps=2, **sizes)
        models.append(model)
    for (name, one), many in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, many, rtol=1e-4, atol=1e-6, msg=name)


def test_a_loop_of_accelerate_adds_the_gradient_where_gradients_are_complete():
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = nn.Linear(4, 4)
    wanted = nn.Linear(4, 4)
    wanted.load_state_dict(model.state_dict())
    images = torch.randn(4, 4)
    config = OrthogonalityConfig(weight=0.1)
    wanted(images).square().mean().backward()
    OrthogonalityRegularizer(wanted, config).add_gradients()
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    reg = OrthogonalityRegularizer(model, config)
    for half in images.chunk(2):
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(half).square().mean())
            if accelerator.sync_gradients:
                reg.add_gradients()
            optimizer.step()
            if not accelerator.sync_gradients:
                optimizer.zero_grad()
    torch.testing.assert_close(model.weight, wanted.weight - wanted.weight.grad)


def test_adapters_of_peft_are_left_out_unless_asked_for(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(gpt2(), peft.LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False))
    penalty = OrthogonalityCallback(OrthogonalityConfig(weight=1.0))
    logs = train(model, tmp_path, penalty, max_steps=2)
    assert [entry["orthogonality"] for entry in logs] == [0, 0]
    reasons = {name: reason.partition(":")[0] for name, reason in penalty.regularizer.skipped().items()}
    assert reasons["h.0.attn.c_attn.base_layer.weight"] == "frozen"
    assert reasons["h.0.attn.c_attn.lora_A.default.weight"] == "adapter"

    factors = OrthogonalityCallback(OrthogonalityConfig(weight=1.0, include=["*lora_*"]))
    logs = train(model, tmp_path, factors)
    assert len(factors.regularizer.names) == 2
    assert 0 < logs[-1]["orthogonality"] < 0.8 * logs[0]["orthogonality"]
