"""What every method keeps, whatever it does; a new file under methods/ is tested here by being there."""

from __future__ import annotations

import ast
import dataclasses
import importlib
from pathlib import Path

import pytest
import torch
from small_methods import small_settings
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

import hf_ssl_or.methods
from hf_ssl_or.errors import InputError
from hf_ssl_or.methods import available_methods, get_method
from hf_ssl_or.methods.whitening import WhiteningConfig
from hf_ssl_or.structures import MultiViewBatch, ViewSpec

B = 16

pytestmark = pytest.mark.parametrize("name", available_methods())


@pytest.fixture
def encoder(name, tiny_encoder, tiny_vit):
    """Makes a tiny encoder of the kind that the method takes."""
    return tiny_vit if get_method(name).needs_patches else tiny_encoder


def make_method(name, encoder, views=2, seed=0, local_views=0, whitening=None):
    torch.manual_seed(seed)
    method = get_method(name)(encoder, whitening=whitening, **small_settings(name)).train()
    method.prepare(num_views=views, batch_size=B, num_local_views=local_views)
    return method


def make_batch(views=2, dtype=torch.float32, local_views=0):
    """Views of the same images: a pattern of each image's own, and noise; local views are their middles."""
    generator = torch.Generator().manual_seed(1)
    pattern = torch.randn(1, B, 3, 8, 8, generator=generator, dtype=torch.float64)
    noise = torch.randn(views + local_views, B, 3, 8, 8, generator=generator, dtype=torch.float64)
    images = (pattern + 0.3 * noise).to(dtype)
    local = images[views:, ..., 2:6, 2:6].contiguous() if local_views else None
    return MultiViewBatch(views_VBCHW=images[:views], local_views_VBCHW=local, index_B=torch.arange(B))


def gradients(method):
    return {name: p.grad for name, p in method.named_parameters() if p.requires_grad}


def check_gradients(method):
    for parameter, grad in gradients(method).items():  # DDP waits for ever for a gradient that does not come
        assert grad is not None and grad.isfinite().all(), parameter
    weights = {part: grad for part, grad in gradients(method).items() if part.startswith("encoder.")}
    assert all(grad.count_nonzero() for part, grad in weights.items() if part.endswith("weight"))


@pytest.mark.parametrize("views", [1, 2, 3, 4])
def test_the_loss_is_a_finite_scalar_with_a_gradient_for_every_trained_weight(name, encoder, views):
    if views < get_method(name).min_views:
        with pytest.raises(InputError, match="views.count"):
            make_method(name, encoder(), views)
        return
    method = make_method(name, encoder(), views)
    output = method(make_batch(views))
    assert output.loss.shape == () and output.loss.isfinite()
    assert all(term.shape == () and term.isfinite() and not term.requires_grad for term in output.terms.values())
    output.loss.backward()
    check_gradients(method)


def test_the_encoders_features_are_what_is_compared_without_projector(name, encoder):
    own = {field.name for field in dataclasses.fields(get_method(name).config_class)}
    if "projector_layers" not in own:
        return
    fitting = {"iternorm_group": 4} if name == "vibcreg" else {}
    method = get_method(name)(encoder(), **small_settings(name) | fitting, projector_layers=0).train()
    if name == "wmse":  # whose batch is too small for the width of the features
        with pytest.raises(InputError, match="16 images are too few to whiten 16 dimensions"):
            method.prepare(num_views=2, batch_size=B)
        return
    method.prepare(num_views=2, batch_size=B)
    assert method.projection_dim == 16 and not any(part.startswith("projector.mlp") for part in method.state_dict())
    method(make_batch()).loss.backward()
    check_gradients(method)


def test_the_hidden_layers_may_be_as_wide_as_the_projections(name, encoder):
    own = {field.name for field in dataclasses.fields(get_method(name).config_class)}
    if "projector_hidden" not in own:
        return
    settings = small_settings(name) | {"projector_hidden": "same", "projector_layers": 2}
    weights = [p for key, p in get_method(name)(encoder(), **settings).named_parameters() if "projector" in key]
    assert weights[0].shape[0] == settings.get("projector_dim", get_method(name).config_class().projector_dim)


def test_local_views_take_part_or_are_refused(name, encoder):
    if not get_method(name).takes_local_views:
        with pytest.raises(InputError, match="views.local_count: .* takes no local views"):
            make_method(name, encoder(), local_views=2)
        return
    method = make_method(name, encoder(), local_views=2)
    output = method(make_batch(local_views=2))
    output.loss.backward()
    check_gradients(method)
    other = make_batch(local_views=2)
    other.local_views_VBCHW = other.local_views_VBCHW.flip(-1) + 1
    assert make_method(name, encoder(), local_views=2)(other).loss != output.loss


def test_the_order_of_the_views_does_not_matter_where_the_method_says_so(name, encoder):
    batch = make_batch(3, torch.float64)
    loss = make_method(name, encoder(), 3).double()(batch).loss.item()
    batch.views_VBCHW = batch.views_VBCHW[[2, 0, 1]]
    permuted = make_method(name, encoder(), 3).double()(batch).loss.item()
    same = permuted == pytest.approx(loss, rel=1e-10, abs=1e-12)
    assert same != get_method(name).order_of_views_matters


def test_the_loss_falls(name, encoder):
    """Beside the same 30 steps without learning, in which queues fill and centers settle."""
    learned, rested = (last_losses(make_method(name, encoder()), learning_rate) for learning_rate in (3e-3, 0))
    assert learned < rested - 0.05 * abs(rested)


def last_losses(method, learning_rate, steps=30):
    optimizer = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], lr=learning_rate)
    losses = []
    for step in range(steps):
        loss = method(make_batch()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.on_step_end(step, steps)
        losses.append(loss.item())
    return sum(losses[-5:]) / 5


def test_the_state_dict_is_the_whole_state(name, encoder):
    first, second = make_method(name, encoder()), make_method(name, encoder(seed=5), seed=6)
    for step in range(2):
        first(make_batch())
        first.on_step_end(step, 10)
    second.load_state_dict(first.state_dict())
    for step in range(2, 4):
        batch = make_batch()
        assert torch.equal(first(batch).loss, second(batch).loss)
        first.on_step_end(step, 10)
        second.on_step_end(step, 10)
    torch.testing.assert_close(second.state_dict(), first.state_dict(), rtol=0, atol=0)


def test_the_forward_leaves_queues_centers_and_teachers_alone(name, encoder):
    """Only batch normalization may count; the rest moves in `on_step_end`, so that a forward can be repeated."""
    method = make_method(name, encoder())
    norms = {
        f"{key}.{buffer}"
        for key, module in method.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or type(module).__name__ == "IterNorm"
        for buffer, _ in module.named_buffers(recurse=False)
    }
    before = {key: value.clone() for key, value in method.state_dict().items() if key not in norms}
    method(make_batch()).loss.backward()
    after = {key: value for key, value in method.state_dict().items() if key not in norms}
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_a_teacher_is_moved_and_never_trained(name, encoder):
    method = make_method(name, encoder())
    frozen = {key: p.clone() for key, p in method.named_parameters() if not p.requires_grad}
    assert all("teacher" in key or key.startswith("encoder.") or "position" in key for key in frozen)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    method(make_batch()).loss.backward()
    optimizer.step()
    still = {key: p for key, p in method.named_parameters() if not p.requires_grad}
    torch.testing.assert_close(still, frozen, rtol=0, atol=0)
    assert all(p.grad is None for p in still.values())
    method.on_step_end(0, 10)
    moved = [key for key, p in method.named_parameters() if key in frozen and not torch.equal(p, frozen[key])]
    assert bool(moved) == any("teacher" in key for key in frozen)


def test_the_encoder_alone_is_what_is_pushed(name, encoder):
    made = encoder()
    method = make_method(name, made)
    assert method.encoder is made
    assert made.state_dict().keys() == encoder().state_dict().keys()


def test_gradients_do_not_depend_on_the_chunks(name, encoder):
    found = []
    for chunks in (1, 2, 4):
        method = make_method(name, encoder(batch_norm=False)).double()
        method.prepare_chunks(chunks)
        method(make_batch(dtype=torch.float64)).loss.backward()
        found.append(gradients(method))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-10, atol=1e-12)


def test_feature_whitening_is_added(name, encoder):
    plain = make_method(name, encoder()).double()(make_batch(dtype=torch.float64)).loss
    method = make_method(name, encoder(), whitening=WhiteningConfig(weight=2.0)).double()
    output = method(make_batch(dtype=torch.float64))
    assert output.terms["whitening"] > 0
    torch.testing.assert_close(output.loss - output.terms["whitening"], plain)


@pytest.mark.parametrize("chunks", [1, 2])
def test_autocast_gives_a_float32_loss_near_the_exact_one(name, encoder, chunks):
    exact = make_method(name, encoder(batch_norm=False))(make_batch()).loss
    method = make_method(name, encoder(batch_norm=False))
    method.prepare_chunks(chunks)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = method(make_batch()).loss
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.05)
    loss.backward()
    assert all(grad.isfinite().all() for grad in gradients(method).values())


def test_a_step_never_asks_for_a_value(name, encoder):
    """Fake tensors have no values: reading one, branching on one or masking by one raises."""
    method = make_method(name, encoder())
    with FakeTensorMode(allow_non_fake_inputs=True):
        method(make_batch()).loss.backward()
        method.on_step_end(0, 10)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_never_waits_for_the_device(name, encoder):
    method = make_method(name, encoder()).cuda()
    batch = make_batch()
    batch.views_VBCHW, batch.index_B = batch.views_VBCHW.cuda(), batch.index_B.cuda()
    for step in range(3):  # the first ones may wait, while libraries start
        if step == 2:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            method(batch).loss.backward()
            method.on_step_end(step, 10)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("setting", ["temperature", "student_temperature", "projector_dim", "projector_hidden"])
def test_a_zero_where_none_can_be_is_refused_by_its_name(name, setting):
    if setting in {f.name for f in dataclasses.fields(get_method(name).config_class)}:
        with pytest.raises(Exception, match=f"{setting}.*(above 0|at least 1), not 0"):
            get_method(name)(nn.Identity(), **{setting: 0})


@pytest.mark.parametrize("ask", [lambda x: x.item(), lambda x: bool(x > 0), lambda x: x[x > 0], lambda x: x.tolist()])
def test_asking_for_a_value_is_seen(name, ask):
    with FakeTensorMode(), pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        ask(torch.ones(()))


def test_the_source_has_no_call_that_waits_for_the_device(name):
    folder = Path(hf_ssl_or.methods.__file__).parent
    waiting = {"item", "tolist", "nonzero", "cpu", "numpy", "masked_select", "synchronize"}
    shared = [f"{module}.py" for module in hf_ssl_or.methods._SHARED]
    for file in (f"{name}.py", *shared):
        for node in ast.walk(ast.parse((folder / file).read_text())):
            if isinstance(node, ast.Attribute):
                assert node.attr not in waiting, f"{file}:{node.lineno}: .{node.attr}"


def test_the_file_documents_itself(name):
    method = get_method(name)
    assert method.__doc__ and importlib.import_module(method.__module__).__doc__
    assert method.citation.startswith("@") and method.citation.count("{") == method.citation.count("}")
    assert all(isinstance(spec, ViewSpec) for spec in method.views)
    documented = "".join(cls.__doc__ or "" for cls in method.config_class.__mro__)
    assert all(f"{f.name}:" in documented for f in dataclasses.fields(method.config_class))
