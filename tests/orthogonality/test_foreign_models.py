"""Value and gradient over every weight that a reader of docs/orthogonality.md expects, for models of others."""

from __future__ import annotations

import importlib.util
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from transformers import GPTBigCodeConfig, GPTBigCodeModel

from hf_ssl_or.models.configuration_ssl import OrthogonalityConfig
from hf_ssl_or.orthogonality import OrthogonalityRegularizer, penalties
from hf_ssl_or.orthogonality.selection import select_sites

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "orthogonality.py"
spec = importlib.util.spec_from_file_location("docs_orthogonality", SCRIPT)
foreign = importlib.util.module_from_spec(spec)
spec.loader.exec_module(foreign)


def whole(weight):
    return [weight.flatten(1)]


def transposed(weight):
    return [weight.T]


def below(count):
    return lambda weight: [part.flatten(1) for part in weight.chunk(count)]


def depthwise(weight):
    return [channel.flatten()[None] for channel in weight]


def inputs_first(groups):
    return lambda weight: [part.transpose(0, 1).flatten(1) for part in weight.chunk(groups)]


def experts(weight):
    return list(weight.unbind())


# Which weights are matrices, the first pattern that matches; and why the rest are not.
TAKEN = {
    "GPT-2": {"*.c_attn.weight": transposed, "*.c_proj.weight": transposed, "*.c_fc.weight": transposed},
    "Llama": {"*_proj.weight": whole},
    "CLIP": {
        "*proj.weight": whole,
        "*.fc?.weight": whole,
        "*patch_embedding.weight": whole,
        "*projection.weight": whole,
    },
    "BERT": {"bert.encoder.*.weight": whole},
    "ViT": {"*_proj.weight": whole, "*.fc?.weight": whole, "*.projection.weight": whole},
    "DINOv2": {"*_proj.weight": whole, "*.projection.weight": whole},
    "Swin": {"*_proj.weight": whole, "*.fc?.weight": whole, "*.projection.weight": whole, "*.reduction.weight": whole},
    "ConvNeXt V2": {
        "*dwconv.weight": depthwise,
        "*pwconv?.weight": whole,
        "*patch_embeddings.weight": whole,
        "*downsampling_layer.1.weight": whole,
    },
    "Mixtral": {"*.experts.*": experts, "*_proj.weight": whole},
    "GPT-NeoX": {"*.layers.*.weight": whole},
    "BLOOM": {"*.h.*.weight": whole},
    "Whisper": {"*.conv?.weight": whole, "*_proj.weight": whole, "*.fc?.weight": whole},
    "LSTM and attention": {
        "lstm.weight_hr*": whole,
        "lstm.weight_*": below(4),
        "attention.in_proj_weight": below(3),
        "over_images.?_proj_weight": whole,
        "*.out_proj.weight": whole,
        "gru.weight_*": below(3),
        "upsample.weight": inputs_first(2),
    },
    "timm's ConvNeXt": {"*conv_dw.weight": depthwise, "stem.0.weight": whole, "stages.*.weight": whole},
    "timm's EfficientNet": {"*conv_dw.weight": depthwise, "*conv*.weight": whole},
}
LEFT_OUT = {
    "lm_head.weight": ("tied", "head"),
    "proj_out.weight": ("tied",),
    "cls.predictions.decoder.weight": ("tied",),
    "cls.predictions.transform.dense.weight": ("head",),
    "*classifier.weight": ("head",),
    "head.fc.weight": ("head",),
    "*pos*": ("position embedding",),
    "*wpe.weight": ("position embedding",),
    "*_token": ("token",),
    "*.grn.*": ("vector",),
    "*.mlp.gate.weight": ("bare",),
    "queries": ("bare",),
    "*embed*": ("embedding",),
    "*words.weight": ("embedding",),
    "*wte.weight": ("embedding",),
}


def first_match(table, name):
    return next((value for pattern, value in table.items() if fnmatchcase(name, pattern)), None)


def reference(penalty, w_OI):
    gram = w_OI @ w_OI.T if w_OI.shape[0] <= w_OI.shape[1] else w_OI.T @ w_OI
    m = gram - torch.eye(len(gram), dtype=w_OI.dtype)
    if penalty == "so":
        return m.square().sum()
    return m.abs().max() if penalty == "mutual_coherence" else torch.linalg.eigvalsh(m).abs().max()


@pytest.mark.parametrize("name", foreign.MODELS)
def test_value_and_gradient_are_those_of_autograd_over_all_that_one_expects(name):
    torch.manual_seed(0)
    model = foreign.MODELS[name]().double()
    names = {n: first_match(TAKEN[name], n) for n, p in model.named_parameters() if p.ndim > 1}
    for weight in model.parameters():  # initial values differ too little from one layer to the next
        torch.nn.init.normal_(weight, std=0.3)
    for penalty in ("so", "mutual_coherence", "srip"):
        reg = OrthogonalityRegularizer(model, OrthogonalityConfig(penalty=penalty, weight=0.5))
        assert reg.names == [n for n in names if names[n]]
        matrices = [w for n in reg.names for w in names[n](model.get_parameter(n))]
        model.zero_grad()
        total = 0.5 * sum(reference(penalty, w_OI) for w_OI in matrices)
        total.backward()
        wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        reg.exact_vectors()
        value = reg.add_gradients()
        torch.testing.assert_close(value, total.detach(), rtol=1e-10, atol=0)
        got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert got.keys() == wanted.keys() == set(reg.names)
        for n in wanted:
            torch.testing.assert_close(got[n], wanted[n], rtol=1e-7, atol=1e-9)
    errors = reg.errors()
    square = sum(reference("so", w_OI).item() for w_OI in matrices)
    assert sum(error**2 for error in errors.values()) == pytest.approx(square)


@pytest.mark.parametrize("name", foreign.MODELS)
def test_nothing_is_left_out_without_a_reason(name):
    model = foreign.MODELS[name]()
    reg = OrthogonalityRegularizer(model, OrthogonalityConfig(weight=1))
    skipped = reg.skipped()
    everything = {n for n, p in model.named_parameters(remove_duplicate=False) if p.ndim > 1}
    assert everything == skipped.keys() | set(reg.names)
    assert not skipped.keys() & set(reg.names)
    for n, reason in skipped.items():
        assert reason.partition(":")[0] in first_match(LEFT_OUT, n), (n, reason)


def gpt_bigcode():
    sizes = {"vocab_size": 32, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return GPTBigCodeModel(GPTBigCodeConfig(**sizes, multi_query=False))


SPLIT = {name: foreign.MODELS[name] for name in ("GPT-2", "GPT-NeoX", "BLOOM")} | {"GPTBigCode": gpt_bigcode}


@pytest.mark.parametrize("name", SPLIT)
@torch.no_grad()
def test_a_fused_weight_is_split_into_what_the_model_takes_for_queries_keys_and_values(name):
    torch.manual_seed(0)
    model = SPLIT[name]().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3) if p.ndim > 1 else None
    sites = [s for s in select_sites(model, OrthogonalityConfig(split_qkv=True)) if s.layout.labels == ("q", "k", "v")]
    words = torch.arange(8)[None]

    def outcome(without, changed):
        """The model's output with one of the matrices zero, and another one times two."""
        kept = [site.weight.clone() for site in sites]
        for site in sites:
            matrices = site.matrices().clone()
            matrices["qkv".index(without)] = 0
            matrices["qkv".index(changed)] *= 2
            site.weight.copy_(site.like_weight(matrices))
        result = model(words)[0]
        for site, weight in zip(sites, kept, strict=True):
            site.weight.copy_(weight)
        return result

    assert sites and all(site.matrix_shape == (16, 16) for site in sites)
    without_keys = outcome("k", "k")
    torch.testing.assert_close(outcome("k", "q"), without_keys)  # attention is even, whatever the queries
    torch.testing.assert_close(outcome("q", "k"), without_keys)
    assert not torch.allclose(outcome("k", "v"), without_keys)
    assert not torch.allclose(outcome("v", "v"), without_keys)


def test_errors_have_a_name_for_each_matrix():
    model = foreign.MODELS["Mixtral"]()
    errors = OrthogonalityRegularizer(model, OrthogonalityConfig(weight=1)).errors()
    down = model.model.layers[1].mlp.experts.down_proj
    wanted = penalties.so(down[2].detach()).sqrt().item()
    assert errors["model.layers.1.mlp.experts.down_proj[expert 2]"] == pytest.approx(wanted)
    errors = OrthogonalityRegularizer(
        foreign.MODELS["GPT-NeoX"](), OrthogonalityConfig(weight=1, split_qkv=True)
    ).errors()
    assert "gpt_neox.layers.0.attention.query_key_value.weight[k]" in errors
    errors = OrthogonalityRegularizer(foreign.Tagger(), OrthogonalityConfig(weight=1)).errors()
    assert {
        "lstm.weight_hh_l0[f]",
        "gru.weight_ih[z]",
        "attention.in_proj_weight[v]",
        "upsample.weight",
    } <= errors.keys()


def test_the_table_of_the_document_is_what_the_script_writes():
    assert foreign.table() in foreign.DOCUMENT.read_text()
