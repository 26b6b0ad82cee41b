from __future__ import annotations

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import ViTMAEConfig, ViTMAEForPreTraining
from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

from hf_ssl_or.errors import InputError
from hf_ssl_or.methods.decoder import sine_cosine_positions
from hf_ssl_or.methods.mae import MAE, MAEConfig, mae_loss, number_kept, patchify
from hf_ssl_or.models.auto import create_encoder
from hf_ssl_or.models.configuration_ssl import OrthogonalityConfig
from hf_ssl_or.orthogonality import OrthogonalityRegularizer
from hf_ssl_or.randomness import keyed_orders, keyed_uniform
from hf_ssl_or.structures import MultiViewBatch

SIZE, PATCH, PATCHES, KEPT = 8, 2, 16, 4


def draw_flat(index_B, views, *key):
    """Orders as the method flattens them, view by view."""
    return keyed_orders(index_B, views, *key).flatten(0, 1)


def make_method(encoder_settings=None, views=1, seed=0, **settings):
    torch.manual_seed(seed)
    small = {"image_size": SIZE, "patch_size": PATCH, "embed_dim": 16, "depth": 2, "num_heads": 2}
    encoder = create_encoder("vit_tiny", **small | (encoder_settings or {}))
    return MAE(encoder, **{"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2} | settings)


def make_batch(views=1, images=6, size=(SIZE, SIZE), seed=0, step=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(views, images, 3, *size, generator=generator)
    return MultiViewBatch(views_VBCHW=pixels, index_B=torch.arange(images), step=step)


# ---------------------------------------------------------------------------------------------------------------------
# The loss


@pytest.mark.parametrize("normalize", [True, False])
def test_the_loss_is_the_mean_over_masked_patches(normalize):
    torch.manual_seed(0)
    predictions, patches = torch.randn(2, 3, 5, 12, dtype=torch.float64)
    errors = []
    for image in range(3):
        for patch in range(5):
            target = patches[image, patch]
            if normalize:
                target = (target - target.mean()) / (target.std() ** 2 + 1e-6) ** 0.5
            errors.append(((predictions[image, patch] - target) ** 2).mean())
    torch.testing.assert_close(
        mae_loss(predictions, patches, normalize), torch.stack(errors).mean(), rtol=1e-12, atol=0
    )


def reference_like(method, normalize):
    """Builds transformers' model with random weights and gives them to `method`."""
    torch.manual_seed(3)
    config = ViTMAEConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=SIZE,
        patch_size=PATCH,
        layer_norm_eps=1e-6,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=64,
        norm_pix_loss=normalize,
    )
    reference = ViTMAEForPreTraining(config).double().eval()
    with torch.no_grad():
        for p in reference.parameters():
            p.normal_(std=0.3)
        reference.decoder.decoder_pos_embed[:, :1] = 0
        reference.decoder.decoder_pos_embed[0, 1:] = sine_cosine_positions(4, 4, 16)
    net, decoder, theirs = method.encoder.timm_model, method.decoder, reference.vit.embeddings
    net.cls_token.data, net.pos_embed.data = theirs.cls_token.data, theirs.position_embeddings.data
    net.patch_embed.proj.load_state_dict(theirs.patch_embeddings.projection.state_dict())
    net.norm.load_state_dict(reference.vit.layernorm.state_dict())
    decoder.mask_token.data = reference.decoder.mask_token.data
    decoder.embed.load_state_dict(reference.decoder.decoder_embed.state_dict())
    decoder.norm.load_state_dict(reference.decoder.decoder_norm.state_dict())
    decoder.predict.load_state_dict(reference.decoder.decoder_pred.state_dict())
    layers = [*reference.vit.layers, *reference.decoder.decoder_layers]
    for block, layer in zip([*net.blocks, *decoder.blocks], layers, strict=True):
        attention = layer.attention
        block.norm1.load_state_dict(layer.layernorm_before.state_dict())
        block.norm2.load_state_dict(layer.layernorm_after.state_dict())
        block.mlp.fc1.load_state_dict(layer.mlp.fc1.state_dict())
        block.mlp.fc2.load_state_dict(layer.mlp.fc2.state_dict())
        block.attn.proj.load_state_dict(attention.o_proj.state_dict())
        for name in ("weight", "bias"):
            parts = [getattr(part, name) for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
            getattr(block.attn.qkv, name).data = torch.cat(parts).data
    return reference


@pytest.mark.parametrize("normalize", [True, False])
def test_the_whole_model_equals_transformers(normalize):
    method = make_method(normalize_targets=normalize).double()
    reference = reference_like(method, normalize)
    batch = make_batch(step=5)
    images = batch.views_VBCHW = batch.views_VBCHW.double()
    order = draw_flat(batch.index_B, 1, PATCHES, batch.seed, 5, "mask")
    expected = reference(images[0], noise=order.argsort(-1).double())
    output = method(batch)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-10, atol=0)
    output.loss.backward()
    expected.loss.backward()
    theirs = reference.vit.embeddings.patch_embeddings.projection.weight.grad
    torch.testing.assert_close(method.encoder.timm_model.patch_embed.proj.weight.grad, theirs, rtol=1e-8, atol=1e-12)
    assert torch.equal(patchify(images[0], PATCH), reference.patchify(images[0]))


def test_positions_are_those_of_transformers():
    """Which keeps the order of the authors' code, columns first, by turning its own around."""
    expected = build_2d_sinusoidal_position_embedding(3, 5, 16)
    expected = torch.cat([expected[:, 8:], expected[:, :8]], dim=1)
    torch.testing.assert_close(sine_cosine_positions(3, 5, 16), expected, rtol=0, atol=1e-6)


def test_views_are_averaged_each_with_its_own_mask():
    batch = make_batch(views=3)
    batch.views_VBCHW = batch.views_VBCHW[:1].expand(3, -1, -1, -1, -1)
    method = make_method(views=3)
    losses = []
    for view in range(3):
        order = keyed_orders(batch.index_B, 3, PATCHES, 0, 0, "mask")[view]
        kept, masked = order.tensor_split([KEPT], dim=1)
        tokens = method.encoder(batch.views_VBCHW[view], kept_patches=kept).last_hidden_state
        predictions = method.decoder(tokens, kept, masked, sine_cosine_positions(4, 4, 16))
        losses.append(
            mae_loss(predictions, patchify(batch.views_VBCHW[view], PATCH).take_along_dim(masked[..., None], 1))
        )
    torch.testing.assert_close(method(batch).loss, torch.stack(losses).mean())
    assert len({loss.item() for loss in losses}) == 3


# ---------------------------------------------------------------------------------------------------------------------
# Masks


def test_the_order_of_patches_is_that_of_the_keyed_numbers():
    index_B = torch.tensor([0, 7, 49_999, 2**40])
    order = keyed_orders(index_B, 3, PATCHES, 11, 4, "mask")
    uniform = keyed_uniform(index_B.numpy(), 3 * PATCHES, 11, 4, "mask").reshape(4, 3, PATCHES)
    assert np.array_equal(order.transpose(0, 1).numpy(), uniform.argsort(-1))


def test_a_mask_belongs_to_seed_step_image_and_view():
    index_B = torch.arange(100)
    order = draw_flat(index_B, 2, PATCHES, 0, 0, "mask")
    some = draw_flat(index_B[30:40], 2, PATCHES, 0, 0, "mask")
    assert torch.equal(some.unflatten(0, (2, 10)), order.unflatten(0, (2, 100))[:, 30:40])
    assert torch.equal(draw_flat(index_B, 1, PATCHES, 0, 0, "mask"), order[:100])  # however many views there are
    for other in (order[100:], *(draw_flat(index_B, 1, PATCHES, *key, "mask") for key in ((0, 1), (1, 0)))):
        assert not (other == order[:100]).all(1).any()


def test_every_patch_is_kept_equally_often():
    kept = draw_flat(torch.arange(8000), 1, PATCHES, 0, 0, "mask")[:, :KEPT]
    counts = kept.flatten().bincount(minlength=PATCHES)
    assert (counts - 2000).abs().max() < 200  # five standard deviations


@pytest.mark.parametrize(("patches", "ratio", "kept"), [(196, 0.75, 49), (64, 0.6, 25), (10, 0.9, 1), (5, 0.5, 2)])
def test_how_many_patches_are_kept(patches, ratio, kept):
    assert number_kept(patches, ratio) == kept


def test_masked_pixels_are_not_seen():
    method, batch = make_method(), make_batch()
    images, order = batch.views_VBCHW[0], draw_flat(batch.index_B, 1, PATCHES, 0, 0, "mask")
    kept, masked = order[:, :KEPT], order[:, KEPT:]
    scale = torch.ones(6, PATCHES).scatter_(1, masked, 100.0).view(6, 1, 4, 1, 4, 1)
    changed = (images.view(6, 3, 4, 2, 4, 2) * scale).view_as(images)
    tokens = [method.encoder(x, kept_patches=kept).last_hidden_state for x in (images, changed)]
    assert torch.equal(*tokens)
    assert not torch.equal(images, changed)


# ---------------------------------------------------------------------------------------------------------------------
# Training


ENCODERS = {
    "class token": {},
    "average": {"pooling": "avg"},
    "average, last norm on tokens": {"pooling": "avg", "fc_norm": False},
    "class token, norm after pooling": {"fc_norm": True},
    "no class token": {"pooling": "avg", "class_token": False},
    "registers": {"reg_tokens": 2, "no_embed_class": True},
    "norm before": {"pre_norm": True},
    "no last norm": {"final_norm": False},
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_every_weight_of_any_encoder_gets_a_gradient(kind):
    method = make_method(ENCODERS[kind])
    method(make_batch()).loss.backward()
    missing = [name for name, p in method.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


def smooth_batch(step):
    """Waves of one color: what is masked follows from what is not."""
    generator = torch.Generator().manual_seed(step)
    direction, phase = torch.randn(2, 32, 1, 1, 1, generator=generator), torch.rand(32, 1, 1, 1, generator=generator)
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    images = (0.4 * (direction[0] * x + direction[1] * y) + 6.28 * phase).sin().expand(-1, 3, -1, -1)
    return MultiViewBatch(views_VBCHW=images[None], index_B=torch.arange(32), step=step)


def test_training_beats_the_mean_on_new_images():
    method = make_method({"embed_dim": 32}, decoder_width=32)
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    losses = []
    for step in range(100):
        optimizer.zero_grad()
        loss = method(smooth_batch(step)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    mean = mae_loss(torch.zeros(32, PATCHES, 12), patchify(smooth_batch(0).views_VBCHW[0], PATCH)).item()
    assert mean == pytest.approx(11 / 12, abs=0.02)
    assert sum(losses[-10:]) / 10 < 0.85 * mean < losses[0]


def test_the_orthogonality_penalty_acts_on_the_encoder():
    method = make_method()
    regularizer = OrthogonalityRegularizer(method.encoder, OrthogonalityConfig(penalty="so", weight=0.1))
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    penalties = []
    for step in range(20):
        optimizer.zero_grad()
        method(make_batch(step=step)).loss.backward()
        decoder = [p.grad.clone() for p in method.decoder.parameters()]
        before = method.encoder.timm_model.blocks[0].mlp.fc1.weight.grad.clone()
        penalties.append(regularizer.add_gradients().item())
        assert not torch.equal(method.encoder.timm_model.blocks[0].mlp.fc1.weight.grad, before)
        assert all(torch.equal(p.grad, grad) for p, grad in zip(method.decoder.parameters(), decoder, strict=True))
        optimizer.step()
    assert penalties[-1] < 0.9 * penalties[0]


def test_views_of_another_size_than_the_encoders():
    method = make_method()
    output = method(make_batch(size=(12, 8)))
    assert output.loss.isfinite()
    with pytest.raises(InputError, match="method.mask_ratio: 0.75 keeps 0 of 2 patches"):
        method(make_batch(size=(4, 2)))
    with pytest.raises(ValueError, match="9x8 is not a multiple of the patch size 2"):
        method(make_batch(size=(9, 8)))


# ---------------------------------------------------------------------------------------------------------------------
# Wrong input


@pytest.mark.parametrize(
    "settings",
    [{"mask_ratio": 1.0}, {"mask_ratio": 0}, {"decoder_width": 30}, {"decoder_heads": 3}, {"decoder_depth": 0}],
)
def test_a_wrong_setting_is_refused_by_name(settings):
    name = (
        "decoder_width: must be a multiple" if settings.keys() & {"decoder_width", "decoder_heads"} else [*settings][0]
    )
    with pytest.raises(StrictDataclassError, match=name):
        MAEConfig(**{"decoder_width": 16, "decoder_heads": 2} | settings)


@pytest.mark.parametrize(
    ("encoder", "message"),
    [({"patch_drop_rate": 0.5}, "encoder.model_args: .* patch_drop_rate"), ({"patch_size": 8}, "method.mask_ratio")],
)
def test_an_encoder_that_cannot_be_masked_is_refused(encoder, message):
    with pytest.raises(InputError, match=message):
        make_method(encoder)


def test_a_net_without_patches_is_refused(tiny_encoder):
    with pytest.raises(InputError, match="encoder.name: mae needs a vision transformer"):
        MAE(tiny_encoder())
