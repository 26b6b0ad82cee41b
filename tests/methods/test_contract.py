"""What every method keeps, whatever it does; a new file under methods/ is tested here by being there."""

from __future__ import annotations

import ast
import dataclasses
import importlib
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

import hf_ssl_or.methods
from hf_ssl_or.methods import available_methods, get_method
from hf_ssl_or.structures import MultiViewBatch, ViewSpec

B = 16

pytestmark = pytest.mark.parametrize("name", available_methods())


def small_config(name):
    """Widths, queues and the like above 64 shrink to 32; everything else is the default."""
    config_class = get_method(name).config_class
    large = [f.name for f in dataclasses.fields(config_class) if type(f.default) is int and f.default > 64]
    return config_class(**dict.fromkeys(large, 32))


def make_method(name, encoder, views=2, seed=0):
    torch.manual_seed(seed)
    return get_method(name)(encoder, small_config(name), num_views=views, batch_size=B).train()


def make_batch(views=2, dtype=torch.float32):
    """Views of the same images: a pattern of each image's own, and noise."""
    generator = torch.Generator().manual_seed(1)
    pattern = torch.randn(1, B, 3, 8, 8, generator=generator, dtype=torch.float64)
    noise = torch.randn(views, B, 3, 8, 8, generator=generator, dtype=torch.float64)
    return MultiViewBatch(views_VBCHW=(pattern + 0.3 * noise).to(dtype), index_B=torch.arange(B))


def gradients(method):
    return {name: p.grad for name, p in method.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("views", [2, 3, 4])
def test_the_loss_is_a_finite_scalar_with_a_gradient_for_every_trained_weight(name, tiny_encoder, views):
    method = make_method(name, tiny_encoder(), views)
    output = method(make_batch(views))
    assert output.loss.shape == () and output.loss.isfinite()
    assert all(term.shape == () and term.isfinite() and not term.requires_grad for term in output.terms.values())
    output.loss.backward()
    for parameter, grad in gradients(method).items():  # DDP waits for ever for a gradient that does not come
        assert grad is not None and grad.isfinite().all(), parameter
    assert all(grad.count_nonzero() for part, grad in gradients(method).items() if part.startswith("encoder."))


def test_the_loss_falls(name, tiny_encoder):
    method = make_method(name, tiny_encoder())
    optimizer = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for step in range(30):
        loss = method(make_batch()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.on_step_end(step, 30)
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_the_state_dict_is_the_whole_state(name, tiny_encoder):
    first, second = make_method(name, tiny_encoder()), make_method(name, tiny_encoder(seed=5), seed=6)
    for step in range(2):
        first(make_batch())
        first.on_step_end(step, 10)
    second.load_state_dict(first.state_dict())
    batch = make_batch()
    assert torch.equal(first(batch).loss, second(batch).loss)
    torch.testing.assert_close(second.state_dict(), first.state_dict(), rtol=0, atol=0)


def test_the_encoder_alone_is_what_is_pushed(name, tiny_encoder):
    encoder = tiny_encoder()
    method = make_method(name, encoder)
    assert method.encoder is encoder
    assert encoder.state_dict().keys() == tiny_encoder().state_dict().keys()


def test_gradients_do_not_depend_on_the_chunks(name, tiny_encoder):
    found = []
    for chunks in (1, 2, 4):
        method = make_method(name, tiny_encoder(batch_norm=False)).double()
        method.prepare_accumulation(chunks)
        method(make_batch(dtype=torch.float64)).loss.backward()
        found.append(gradients(method))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunks", [1, 2])
def test_autocast_gives_a_float32_loss_near_the_exact_one(name, tiny_encoder, chunks):
    exact = make_method(name, tiny_encoder(batch_norm=False))(make_batch()).loss
    method = make_method(name, tiny_encoder(batch_norm=False))
    method.prepare_accumulation(chunks)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = method(make_batch()).loss
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.05)
    loss.backward()
    assert all(grad.isfinite().all() for grad in gradients(method).values())


def test_a_step_never_asks_for_a_value(name, tiny_encoder):
    """Fake tensors have no values: reading one, branching on one or masking by one raises."""
    method = make_method(name, tiny_encoder())
    with FakeTensorMode(allow_non_fake_inputs=True):
        method(make_batch()).loss.backward()
        method.on_step_end(0, 10)


@pytest.mark.parametrize("ask", [lambda x: x.item(), lambda x: bool(x > 0), lambda x: x[x > 0], lambda x: x.tolist()])
def test_asking_for_a_value_is_seen(name, ask):
    with FakeTensorMode(), pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        ask(torch.ones(()))


def test_the_source_has_no_call_that_waits_for_the_device(name):
    folder = Path(hf_ssl_or.methods.__file__).parent
    waiting = {"item", "tolist", "nonzero", "cpu", "numpy", "masked_select", "synchronize"}
    for file in (f"{name}.py", "base.py", "heads.py", "teacher.py", "terms.py"):
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


def test_every_parameter_outside_the_trained_ones_is_frozen(name, tiny_encoder):
    method = make_method(name, tiny_encoder())
    teachers = [module for key, module in method.named_modules() if key == "teacher"]
    assert not any(p.requires_grad for teacher in teachers for p in teacher.parameters())
    assert all(isinstance(p, nn.Parameter) for p in method.parameters())
