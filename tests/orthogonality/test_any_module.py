"""Modules of any kind, what is left out of them, and modules that change after the regularizer was made."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    GptOssConfig,
    GptOssModel,
)
from transformers.pytorch_utils import Conv1D

from hf_ssl_or.errors import InputError
from hf_ssl_or.models.configuration_ssl import OrthogonalityConfig
from hf_ssl_or.orthogonality import OrthogonalityRegularizer, penalties, regularizer
from hf_ssl_or.orthogonality.selection import select_sites

pytestmark = pytest.mark.filterwarnings("ignore:Complex modules are a new", "ignore:FSDP is switching")

PENALTIES = ["so", "dso", "mutual_coherence", "srip"]


def regularize(module, **settings):
    return OrthogonalityRegularizer(module, OrthogonalityConfig(**{"weight": 0.5, **settings}))


def kinds(module, **settings):
    return {name: reason.partition(":")[0] for name, reason in regularize(module, **settings).skipped().items()}


def linear_and(**parts):
    module = nn.Module()
    module.linear = nn.Linear(4, 4)
    for name, part in parts.items():
        setattr(module, name, part)
    return module


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# What is taken


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("build", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
def test_a_transposed_convolution_is_the_matrix_of_its_outputs(build, groups):
    layer = build(6, 4, 2, groups=groups)
    (site,) = select_sites(layer, OrthogonalityConfig())
    inputs = 6 // groups
    assert site.matrices().shape == (groups, 4 // groups, inputs * 2 ** (layer.weight.ndim - 2))
    wanted = layer.weight[inputs * (groups - 1) :, 1].flatten()  # what makes the last group's channel 1
    torch.testing.assert_close(site.matrices()[-1, 1], wanted)
    torch.testing.assert_close(site.like_weight(site.matrices()), layer.weight, rtol=0, atol=0)


def test_bare_parameters_are_taken_where_a_pattern_names_them():
    module = linear_and(latents=nn.Parameter(torch.randn(3, 5)), banks=nn.Parameter(torch.randn(2, 3, 5)))
    assert kinds(module) == {"latents": "bare", "banks": "bare"}
    assert regularize(module, include=["*"]).names == ["linear.weight"]
    assert regularize(module, include=["*", "latents"]).names == ["latents", "linear.weight"]
    reg = regularize(module, include=["banks"])
    wanted = {f"banks[{i}]": penalties.so(module.banks[i].detach()).sqrt().item() for i in range(2)}
    assert reg.errors() == pytest.approx(wanted)
    assert reg.skipped()["linear.weight"] == "excluded: no pattern of include matches"


def test_an_embedding_can_be_asked_for():
    module = linear_and(words=nn.Embedding(9, 4))
    assert kinds(module) == {"words.weight": "embedding"}
    assert regularize(module, include=["words.weight"]).names == ["words.weight"]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors", "ignore:Lazy modules")
def test_each_reason():
    module = linear_and(
        norm=nn.LayerNorm((3, 4)),
        scale=nn.Parameter(torch.ones(1, 8, 1, 1)),
        cls_token=nn.Parameter(torch.zeros(1, 2, 4)),
        pos_embed=nn.Parameter(torch.zeros(1, 5, 4)),
        empty=nn.Linear(4, 0),
        meta=nn.Linear(4, 4, device="meta"),
        lazy=nn.LazyLinear(4, bias=False),
        quantized=nn.Linear(4, 4),
        frozen=nn.Linear(4, 4),
        twin=nn.Linear(4, 4),
        unwanted=nn.Linear(4, 4),
        lora_A=nn.Linear(4, 2),
    )
    module.quantized.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    module.frozen.weight.requires_grad_(False)
    module.twin.weight = module.linear.weight
    reg = regularize(module, exclude=["unwanted.*"])
    assert reg.names == ["linear.weight", "frozen.weight"]
    assert reg.skipped() == {
        "norm.weight": "norm",
        "norm.bias": "norm",
        "scale": "vector",
        "cls_token": "token",
        "pos_embed": "position embedding",
        "empty.weight": "empty: shape (0, 4)",
        "meta.weight": "meta: has no data",
        "lazy.weight": "uninitialized: a lazy layer before its first call",
        "quantized.weight": "quantized: torch.uint8",
        "frozen.weight": "frozen: requires_grad is False",
        "twin.weight": "tied: counted as 'linear.weight'",
        "unwanted.weight": "excluded: by 'unwanted.*'",
        "lora_A.weight": "adapter: a factor of an update",
    }
    assert regularize(module, include=["lora_A*"]).names == ["lora_A.weight"]


def test_a_classifier_beside_its_encoder_is_a_head():
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    vision = small | {"image_size": 16, "patch_size": 8}
    model = CLIPForImageClassification(CLIPConfig(text_config=small, vision_config=vision, num_labels=3))
    assert kinds(model)["classifier.weight"] == "head"
    assert "vision_model.encoder.layers.0.mlp.fc1.weight" in regularize(model).names


def test_the_embeddings_of_a_model_are_no_head():
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = DINOv3ViTModel(DINOv3ViTConfig(**small, image_size=16, patch_size=8))
    assert "embeddings.patch_embeddings.weight" in regularize(model).names


def test_transposed_experts_are_put_right():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = GptOssConfig(**sizes, vocab_size=32, num_hidden_layers=1, head_dim=8, num_local_experts=3)
    (site,) = select_sites(GptOssModel(config), OrthogonalityConfig(include=["*gate_up_proj"]))
    assert site.matrices().shape == (3, 48, 16)
    torch.testing.assert_close(site.like_weight(site.matrices()), site.weight, rtol=0, atol=0)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_sharded_layers_of_any_kind(group, penalty):
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.MultiheadAttention(8, 2), nn.GRU(8, 6), nn.ConvTranspose2d(8, 6, 2, groups=2), Conv1D(8, 6)
    ).double()
    sharded = fully_shard(copy.deepcopy(plain), mesh=init_device_mesh("cpu", (1,)))
    values = [regularize(module, penalty=penalty).add_gradients() for module in (plain, sharded)]
    torch.testing.assert_close(values[1], values[0], rtol=0, atol=0)
    for one, other in zip(plain.parameters(), sharded.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(other.grad.to_local(), one.grad, rtol=1e-14, atol=1e-14)
    assert len(regularize(sharded).names) == len(regularize(plain).names) == 6


def test_one_line_says_once_what_is_left_out(caplog):
    regularizer._log_once.cache_clear()
    module = linear_and(pos_embed=nn.Parameter(torch.zeros(1, 5, 4)))
    with caplog.at_level(logging.INFO):
        regularize(module)
        regularize(module)
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "1 weights (1 matrices) are regularized; left out: 1 position embedding" in record.message
    module.linear.weight.requires_grad_(False)
    regularize(module)
    assert caplog.records[-1].levelno == logging.WARNING
    assert "0 weights (0 matrices) are regularized; left out: 1 position embedding, 1 frozen" in caplog.text
    regularize(linear_and(table=nn.Parameter(torch.zeros(4, 4))))
    assert caplog.records[-1].levelno == logging.WARNING


# ---------------------------------------------------------------------------------------------------------------------
# Modules that change


def module_of():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 6), nn.Linear(4, 6)).double()


@pytest.mark.parametrize("penalty", PENALTIES)
def test_replaced_layers_and_data_are_seen(penalty):
    module = module_of()
    reg = regularize(module, penalty=penalty)
    module[0] = nn.Linear(5, 4).double()
    module[1].weight.data = torch.randn(6, 4, dtype=torch.float64)
    module[2].weight = nn.Parameter(torch.randn(6, 4, dtype=torch.float64))
    other = regularize(copy.deepcopy(module), penalty=penalty)
    assert reg.add_gradients() == other.add_gradients()
    assert all(layer.weight.grad is not None for layer in module)


def parametrize(module):
    nn.utils.parametrizations.weight_norm(module[1])


def remove(module):
    del module[1].weight


def drop(module):
    module[1] = nn.Identity()


def move_to_meta(module):
    module.to("meta")


def reshape(module):
    module[1] = nn.Linear(4, 7)


def quantize(module):
    module[1].weight = nn.Parameter(torch.zeros(6, 4, dtype=torch.int8), requires_grad=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (parametrize, "'1.weight' is no longer a parameter"),
        (remove, "'1.weight' is gone"),
        (drop, "'1.weight' is gone"),
        (move_to_meta, r"'0.weight' is now left out \(meta: has no data\)"),
        (reshape, r"'1.weight' has shape \(7, 4\) now, and had \(6, 4\)"),
        (quantize, r"'1.weight' is now left out \(quantized: torch.int8\)"),
    ],
)
def test_a_weight_that_cannot_be_used_any_more_is_refused_by_name(change, message):
    module = module_of()
    reg = regularize(module)
    change(module)
    for method in (reg.penalty, reg.add_gradients, reg.errors, reg.skipped):
        with pytest.raises(InputError, match=message):
            method()


def test_parametrized_weights_can_be_excluded():
    module = module_of()
    nn.utils.parametrizations.orthogonal(module[0])
    reg = regularize(module, exclude=["0.weight"])
    assert reg.names == ["1.weight", "2.weight"]
    assert {reason.partition(":")[0] for reason in reg.skipped().values()} == {"parametrized"}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_parametrized_weights_of_any_layer_are_refused():
    lstm = nn.utils.parametrizations.weight_norm(nn.LSTM(4, 4), "weight_hh_l0")
    with pytest.raises(InputError, match="'weight_hh_l0' is parametrized"):
        regularize(lstm)
    with pytest.raises(InputError, match="'weight' is parametrized"):
        regularize(nn.utils.weight_norm(nn.Linear(4, 4)))


def test_flattened_weights_are_refused(group):
    flat = FullyShardedDataParallel(module_of(), device_id=torch.device("cpu"))
    with pytest.raises(InputError, match=r"FSDP1 flattens the weights of the model; use FSDP2"):
        regularize(flat)
    module = module_of()
    reg = regularize(module)
    FullyShardedDataParallel(module, device_id=torch.device("cpu"))
    with pytest.raises(InputError, match="'0.weight' is no longer a parameter"):
        reg.add_gradients()


# ---------------------------------------------------------------------------------------------------------------------
# Complex weights


def complex_module():
    torch.manual_seed(0)
    layers = nn.Linear(7, 4), nn.Linear(4, 7), nn.Conv2d(2, 3, 2), nn.Linear(5, 5)
    module = nn.Sequential(*layers).to(torch.complex128)
    for layer in module:
        nn.init.normal_(layer.weight, std=0.5)
    return module


def test_the_error_of_a_complex_weight_is_that_of_its_own_gram():
    module = complex_module()
    wide, tall = module[0].weight.detach(), module[1].weight.detach()
    eye = torch.eye(4, dtype=wide.dtype)
    errors = regularize(module).errors()
    assert errors["0.weight"] == pytest.approx(torch.linalg.norm(wide @ wide.conj().T - eye).item())
    assert errors["1.weight"] == pytest.approx(torch.linalg.norm(tall.conj().T @ tall - eye).item())
    unitary, _ = torch.linalg.qr(torch.randn(5, 5, dtype=wide.dtype))
    module[3].weight.data = unitary
    assert regularize(module).errors()["3.weight"] < 1e-12


@pytest.mark.parametrize("fresh_start", [False, True])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_complex_weights_have_a_real_penalty_and_the_gradient_of_autograd(penalty, fresh_start):
    module = complex_module()
    reg = regularize(module, penalty=penalty, fresh_start=fresh_start, power_iterations=2)
    for step in range(3):
        reg.set_progress(step, 3)
        module.zero_grad()
        total = reg.penalty()
        assert total.dtype == torch.float64
        total.backward()
        wanted = [layer.weight.grad for layer in module]
        module.zero_grad()
        torch.testing.assert_close(reg.add_gradients(), total.detach(), rtol=1e-12, atol=0)
        for layer, grad in zip(module, wanted, strict=True):
            torch.testing.assert_close(layer.weight.grad, grad, rtol=1e-9, atol=1e-12)


def test_srip_of_complex_weights_is_the_spectral_norm():
    module = complex_module()
    reg = regularize(module, penalty="srip")
    weights = [layer.weight.detach().flatten(1) for layer in module]
    grams = [w @ w.mH if w.shape[0] <= w.shape[1] else w.mH @ w for w in weights]
    wanted = 0.5 * sum(torch.linalg.eigvalsh(gram - torch.eye(len(gram))).abs().max() for gram in grams)
    for _ in range(200):
        reg.advance()
    torch.testing.assert_close(reg.penalty().detach(), wanted, rtol=1e-6, atol=0)
    reg.exact_vectors()
    torch.testing.assert_close(reg.penalty().detach(), wanted, rtol=1e-10, atol=0)
