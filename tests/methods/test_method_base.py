from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from hf_ssl_or.distributed import use_global_batch_norm
from hf_ssl_or.errors import InputError
from hf_ssl_or.methods.base import SSLMethod
from hf_ssl_or.structures import ViewSpec


@dataclasses.dataclass
class Config:
    pass


class Plain(SSLMethod):
    config_class = Config
    views = (ViewSpec(),)
    citation = "none"


SIZES = {"num_views": 2, "batch_size": 4}


@pytest.mark.parametrize("missing", ["config_class", "views", "citation"])
def test_a_class_without_its_attributes_is_refused_when_defined(missing):
    attributes = {"config_class": Config, "views": (ViewSpec(),), "citation": "none"}
    attributes.pop(missing)
    with pytest.raises(TypeError, match=f"Broken must define {missing}"):
        type("Broken", (SSLMethod,), attributes)


def test_an_abstract_class_may_leave_them_out():
    class Shared(SSLMethod, abstract=True):
        pass

    class Concrete(Shared):
        config_class, views, citation = Config, (ViewSpec(),), "none"

    assert issubclass(Concrete, SSLMethod)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_views": 1}, "views.count: .* at least 2 views, not 1"),
        ({"num_local_views": 6}, "views.local_count: .* takes no local views"),
        ({"batch_size": 1}, "training.batch_size: .* at least 2 images, not 1"),
    ],
)
def test_impossible_sizes_are_refused(tiny_encoder, sizes, message):
    with pytest.raises(InputError, match=message):
        Plain(tiny_encoder(), Config(), **SIZES | sizes)


def test_one_forward_encodes_all_views_in_order(tiny_encoder):
    method = Plain(tiny_encoder(batch_norm=False), Config(), **SIZES)
    views_VBCHW = torch.randn(3, 4, 3, 8, 8)
    features_VBF = method.encode(views_VBCHW)
    assert method.encoder.seen == [12]
    for view, features in zip(views_VBCHW, features_VBF, strict=True):
        torch.testing.assert_close(features, method.encoder(pixel_values=view).pooler_output)


def test_channels_last_changes_the_layout_and_not_the_features(tiny_encoder):
    method = Plain(tiny_encoder().double(), Config(), **SIZES)
    views_VBCHW = torch.randn(2, 4, 3, 8, 8, dtype=torch.float64)
    before = method.encode(views_VBCHW)
    method.use_channels_last()
    layouts = []
    method.encoder.register_forward_pre_hook(
        lambda _, __, kwargs: layouts.append(kwargs["pixel_values"].is_contiguous(memory_format=torch.channels_last)),
        with_kwargs=True,
    )
    torch.testing.assert_close(method.encode(views_VBCHW), before, rtol=1e-12, atol=1e-12)
    assert layouts == [True]
    assert method.encoder.layers[3].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("chunks", [2, 4, 5])
def test_chunks_bound_the_encoder_batch_and_keep_the_gradient(tiny_encoder, chunks):
    views_VBCHW = torch.randn(2, 6, 3, 8, 8, dtype=torch.float64)
    gradients = []
    for count in (1, chunks):
        method = Plain(tiny_encoder(batch_norm=False).double(), Config(), **SIZES)
        method.prepare_chunks(count)
        features = method.encode(views_VBCHW)
        (features[0] * features[1].roll(1, 0)).sum().square().backward()
        gradients.append([p.grad for p in method.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-12)
    calls = len(torch.arange(12).chunk(chunks))
    assert len(method.encoder.seen) == 2 * calls  # once forward, once recomputed
    assert max(method.encoder.seen) == -(-12 // chunks)


def test_chunks_keep_no_activation_but_those_of_one_chunk(tiny_encoder):
    def saved_bytes(chunks):
        method = Plain(tiny_encoder(batch_norm=False), Config(), **SIZES)
        method.prepare_chunks(chunks)
        storages = {}

        def keep(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            features = method.encode(views_VBCHW)
        del features
        return sum(storages.values())

    views_VBCHW = torch.randn(2, 32, 3, 16, 16)
    assert saved_bytes(4) < saved_bytes(1) / 4


def test_an_encoder_with_batch_norm_recomputes_its_blocks_instead(tiny_encoder):
    asked = {}
    encoder = tiny_encoder(batch_norm=True)
    encoder.gradient_checkpointing_enable = lambda **kwargs: asked.update(kwargs)
    method = Plain(encoder, Config(), **SIZES)
    method.prepare_chunks(4)
    assert asked == {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    method.encode(torch.randn(2, 4, 3, 8, 8))
    assert encoder.seen == [8]  # whole: the statistics are those of the whole batch


@pytest.mark.parametrize("chunks", [2, 4, 8])
def test_parts_are_whole_views_where_each_view_has_statistics_of_its_own(tiny_encoder, chunks):
    views_VBCHW = torch.randn(4, 3, 3, 8, 8, dtype=torch.float64)
    states, gradients = [], []
    for count in (1, chunks):
        method = use_global_batch_norm(Plain(tiny_encoder().double(), Config(), **SIZES), 3)
        method.prepare_chunks(count)
        features = method.encode(views_VBCHW)
        (features[0] * features[1:].mean(0).roll(1, 0)).sum().square().backward()
        gradients.append([p.grad for p in method.parameters()])
        states.append(method.state_dict())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(states[1], states[0], rtol=1e-12, atol=1e-12)  # running statistics moved once
    assert set(method.encoder.seen) == {3 * -(-4 // chunks)}


def test_dropout_is_repeated_when_a_chunk_is_recomputed(tiny_encoder):
    encoder = tiny_encoder(batch_norm=False)
    encoder.layers.append(nn.Dropout(0.5))
    method = Plain(encoder, Config(), **SIZES)
    method.prepare_chunks(2)
    method.train()
    weight = encoder.layers[3].weight
    views_VBCHW = torch.randn(2, 4, 3, 8, 8)
    torch.manual_seed(1)
    method.encode(views_VBCHW).sum().backward()
    recomputed, weight.grad = weight.grad, None
    torch.manual_seed(1)
    parts = [encoder(pixel_values=part).pooler_output for part in views_VBCHW.flatten(0, 1).chunk(2)]
    torch.cat(parts).sum().backward()
    torch.testing.assert_close(recomputed, weight.grad)


@pytest.mark.parametrize("images_per_view", [None, 4])
def test_global_batch_norm_bears_in_place_activations(tiny_encoder, images_per_view):
    method = use_global_batch_norm(Plain(tiny_encoder(), Config(), **SIZES), images_per_view)
    method.encode(torch.randn(2, 4, 3, 8, 8)).square().sum().backward()
    assert method.encoder.layers[0].weight.grad.isfinite().all()
