from __future__ import annotations

import dataclasses
import inspect
import pydoc
import re

import pytest
import torch
from torch import nn

from hf_ssl_or.distributed import use_global_batch_norm
from hf_ssl_or.errors import InputError
from hf_ssl_or.methods import BYOL, BYOLConfig, MoCoV2, SSLMethod, WMSEConfig
from hf_ssl_or.structures import MultiViewBatch, ViewSpec


@dataclasses.dataclass
class Config:
    pass


class Plain(SSLMethod):
    config_class = Config
    views = (ViewSpec(),)
    citation = "none"


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
        Plain(tiny_encoder()).prepare(**{"num_views": 2, "batch_size": 4} | sizes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"proj_dim": 3}, "unknown setting of BYOL 'proj_dim': did you mean 'projector_dim'?"),
        ({"momentum_teacher": 0.9}, "unknown setting of BYOL 'momentum_teacher': did you mean 'momentum'?"),
        ({"num_views": 2}, "unknown setting of BYOL 'num_views': one of: final_momentum, momentum, predictor_hidden"),
        ({"projector_dim": "wide"}, "BYOL: Field 'projector_dim' expected int, got str"),
        ({"projector_dim": 0}, "BYOL: projector_dim: must be above 0, not 0"),
        ({"config": BYOLConfig(), "momentum": 0.9}, "BYOL: give either config or settings (momentum), not both"),
        ({"config": {"momentum": 0.9}}, "BYOL: config must be a BYOLConfig, not {'momentum': 0.9}"),
        ({"config": WMSEConfig()}, "BYOL: config must be a BYOLConfig, not WMSEConfig("),
    ],
)
def test_a_wrong_setting_is_one_clear_line(tiny_encoder, settings, message):
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        BYOL(tiny_encoder(), **settings)
    assert "\n" not in str(caught.value)


def test_settings_and_config_are_two_ways_to_say_the_same(tiny_encoder):
    by_settings = BYOL(tiny_encoder(), projector_dim=8, predictor_hidden=16)
    by_config = BYOL(tiny_encoder(), BYOLConfig(projector_dim=8, predictor_hidden=16))
    assert by_settings.config == by_config.config and by_settings.name == "byol"
    assert by_settings.settings()["projector_dim"] == 8 and by_settings.settings()["momentum"] == 0.99


def test_the_signature_shows_the_settings_with_their_defaults():
    parameters = inspect.signature(BYOL).parameters
    assert [*parameters][:3] == ["encoder", "config", "whitening"]
    assert parameters["config"].annotation == BYOLConfig | None
    defaults = {name: setting.default for name, setting in [*parameters.items()][3:]}
    assert defaults == dataclasses.asdict(BYOLConfig())
    assert "projector_dim: int = 256" in pydoc.plain(pydoc.render_doc(BYOL))


def test_an_encoder_that_cannot_be_adapted_is_one_clear_line(tiny_encoder, monkeypatch):
    def refuse(encoder):
        raise ValueError("encoder: gives no features")

    monkeypatch.setattr("hf_ssl_or.methods.base.adapt_encoder", refuse)
    with pytest.raises(InputError, match="^encoder: gives no features$"):
        Plain(tiny_encoder())
    with pytest.raises(InputError, match="^encoder: a module is wanted, which create_encoder makes of a name"):
        Plain("resnet18")


def batch_of(views, images=4):
    return MultiViewBatch(views_VBCHW=torch.randn(views, images, 3, 8, 8), index_B=torch.arange(images))


def test_the_first_batch_tells_the_sizes_where_nobody_did(tiny_encoder):
    method = MoCoV2(tiny_encoder(), projector_hidden=16, projector_dim=8, queue_size=8)
    assert method(batch_of(3)).loss.isfinite()
    assert method.queue.features_QD.shape == (3, 8, 8) and method.num_views == 3
    with pytest.raises(InputError, match="the queues are of 3 views, not 2"):
        method(batch_of(2))
    with pytest.raises(InputError, match="views.count: moco_v2 needs at least 2 views, not 1"):
        method(batch_of(1))
    with pytest.raises(InputError, match="method.queue_size: 8 is not a multiple of training.batch_size, 6"):
        MoCoV2(tiny_encoder(), queue_size=8)(batch_of(2, images=6))


def test_one_forward_encodes_all_views_in_order(tiny_encoder):
    method = Plain(tiny_encoder(batch_norm=False))
    views_VBCHW = torch.randn(3, 4, 3, 8, 8)
    features_VBF = method.encode(views_VBCHW)
    assert method.encoder.seen == [12]
    for view, features in zip(views_VBCHW, features_VBF, strict=True):
        torch.testing.assert_close(features, method.encoder(pixel_values=view).pooler_output)


def test_channels_last_changes_the_layout_and_not_the_features(tiny_encoder):
    method = Plain(tiny_encoder().double())
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
        method = Plain(tiny_encoder(batch_norm=False).double())
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
        method = Plain(tiny_encoder(batch_norm=False))
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
    method = Plain(encoder)
    method.prepare_chunks(4)
    assert asked == {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    method.encode(torch.randn(2, 4, 3, 8, 8))
    assert encoder.seen == [8]  # whole: the statistics are those of the whole batch


@pytest.mark.parametrize("chunks", [2, 4, 8])
def test_parts_are_whole_views_where_each_view_has_statistics_of_its_own(tiny_encoder, chunks):
    views_VBCHW = torch.randn(4, 3, 3, 8, 8, dtype=torch.float64)
    states, gradients = [], []
    for count in (1, chunks):
        method = use_global_batch_norm(Plain(tiny_encoder().double()), 3)
        method.prepare_chunks(count)
        features = method.encode(views_VBCHW)
        (features[0] * features[1:].mean(0).roll(1, 0)).sum().square().backward()
        gradients.append([p.grad for p in method.parameters()])
        states.append(method.state_dict())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(states[1], states[0], rtol=1e-12, atol=1e-12)  # running statistics moved once
    assert set(method.encoder.seen) == {3 * -(-4 // chunks)}


@pytest.mark.parametrize("has_it", [False, True])
def test_gradient_checkpointing_is_asked_for_only_where_it_is_needed(tiny_encoder, has_it):
    method = Plain(tiny_encoder(batch_norm=True))
    method.encoder = nn.Sequential(nn.BatchNorm2d(3))
    if has_it:

        def refuse(**kwargs):
            raise ValueError("Sequential does not support gradient checkpointing.")

        method.encoder.gradient_checkpointing_enable = refuse
    method.prepare_chunks(1)
    with pytest.raises(InputError, match="training.forward_chunks: .* batch statistics need here; leave it at 1"):
        method.prepare_chunks(2)
    with pytest.raises(InputError, match="training.gradient_checkpointing: this encoder has no .*; leave it at false"):
        method.prepare_chunks(1, recompute_blocks=True)


def test_dropout_is_repeated_when_a_chunk_is_recomputed(tiny_encoder):
    encoder = tiny_encoder(batch_norm=False)
    encoder.layers.append(nn.Dropout(0.5))
    method = Plain(encoder)
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
    method = use_global_batch_norm(Plain(tiny_encoder()), images_per_view)
    method.encode(torch.randn(2, 4, 3, 8, 8)).square().sum().backward()
    assert method.encoder.layers[0].weight.grad.isfinite().all()
