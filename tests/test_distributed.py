"""World-size invariance: gloo processes with different shards against one process with the whole batch, in float64.

One start of four processes runs every check with 2 and with 4 of them and writes its errors; the tests read those.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from processes import run_all
from small_methods import small_settings
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hf_ssl_or import distributed
from hf_ssl_or.methods import get_method
from hf_ssl_or.models.auto import create_encoder
from hf_ssl_or.models.modeling_ssl import SSLModel
from hf_ssl_or.structures import MultiViewBatch

N, STEPS = 16, 2  # images of the global batch, optimizer steps
WORLDS = (2, 4)


class Encoder(SSLModel):
    """Two blocks with batch norm and in-place activations."""

    def __init__(self) -> None:
        nn.Module.__init__(self)  # without timm's net
        layers: list[nn.Module] = []
        for width in (3, 8):
            layers += [nn.Conv2d(width, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers)
        self.config = SimpleNamespace(hidden_size=8)

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        return SimpleNamespace(pooler_output=self.layers(pixel_values).mean((2, 3)))


def resnet() -> nn.Module:
    return create_encoder("resnet18", stem="small", image_size=6, channels=[4, 4, 8, 8])


# ---------------------------------------------------------------------------------------------------------------------
# What is computed, by any number of processes: every process gives the same named tensors, of the global batch


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def own_slice(x: Tensor, dim: int) -> Tensor:
    return x.chunk(distributed.world_size(), dim)[distributed.rank()]


def summed(x: Tensor) -> Tensor:
    x = x.detach().clone()
    if distributed.world_size() > 1:
        dist.all_reduce(x)
    return x


def collectives() -> dict[str, Tensor]:
    """A loss of gathered rows and of sums, whose gradient for a shared weight is averaged as DDP does."""
    weight = random(3, 3, seed=1).requires_grad_()
    z_VBD = own_slice(random(2, N, 3), 1) @ weight
    z_VND = distributed.gather_batch(z_VBD, dim=1)
    total_VD = distributed.sum_over_ranks(z_VBD.sin().sum(1))
    loss = (z_VND[0] * z_VND[1].roll(1, 0)).sum().square() + total_VD.prod() + (weight**4).sum()
    loss.backward()
    mean = distributed.mean_over_ranks(z_VBD.mean(1))
    return {
        "rows": z_VND,
        "total": total_VD,
        "mean": mean,
        "loss": loss,
        "grad": distributed.mean_over_ranks(weight.grad),
    }


def batch_norm(views: int, affine: bool, plain: bool = False) -> dict[str, Tensor]:
    """Outputs, running statistics and gradients; `plain` runs torch's own, view by view where views have their own."""
    norm = nn.BatchNorm2d(5, affine=affine).double()
    if affine:
        with torch.no_grad():
            norm.weight.copy_(random(5, seed=2))
            norm.bias.copy_(random(5, seed=3))
    x = own_slice(random(3, N, 5, 2, 2) * 3 + 7, 1).clone().requires_grad_()
    if plain:
        groups = x.flatten(0, 1)[None] if views == 1 else x
        out = torch.cat([norm(group) for group in groups])
    else:
        out = distributed.use_global_batch_norm(norm, x.shape[1] if views > 1 else None)(x.flatten(0, 1))
    out = out.unflatten(0, x.shape[:2])
    (out * own_slice(random(3, N, 5, 2, 2, seed=4), 1)).sum().backward()
    result = {"out": distributed.gather_batch(out, 1), "grad": distributed.gather_batch(x.grad, 1)}
    result |= {name: value.double() for name, value in norm.named_buffers()}
    return result | {name: summed(p.grad) for name, p in norm.named_parameters()}


def training(
    name: str,
    views: int,
    per_view: bool = False,
    chunks: int = 1,
    make_encoder: Callable[[], nn.Module] = Encoder,
    **settings: object,
) -> dict[str, Tensor]:
    """Losses, gradients and the state after steps of a method under DDP."""
    torch.manual_seed(0)
    method = get_method(name)(make_encoder(), **small_settings(name) | settings)
    method.prepare(num_views=views, batch_size=N)
    distributed.use_global_batch_norm(method.double().train(), N // distributed.world_size() if per_view else None)
    method.prepare_chunks(chunks)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.01)
    model = DistributedDataParallel(method, broadcast_buffers=False) if distributed.world_size() > 1 else method
    result = {}
    for step in range(STEPS):
        images = own_slice(random(views, N, 3, 6, 6, seed=10 + step), 1)
        output = model(MultiViewBatch(views_VBCHW=images, index_B=own_slice(torch.arange(N), 0), step=step))
        optimizer.zero_grad()
        output.loss.backward()
        result[f"loss {step}"] = output.loss.detach()
        result |= {f"{key} {step}": term.clone() for key, term in output.terms.items()}
        result |= {f"grad {step} {key}": p.grad.clone() for key, p in method.named_parameters() if p.requires_grad}
        optimizer.step()
        method.on_step_end(step, STEPS)
    return result | {key: value.double() for key, value in method.state_dict().items()}


CHECKS = {
    "collectives": collectives,
    **{f"batch_norm-{v}-{a}": partial(batch_norm, v, a) for v in (1, 3) for a in (True, False)},
    **{f"{name}-{views}": partial(training, name, views) for name in ("barlow_twins", "byol") for views in (2, 3)},
    "barlow_twins-all_views": partial(training, "barlow_twins", 3, standardize="all_views"),
    "swav-sharp": partial(training, "swav", 2, epsilon=0.005),
    "byol-per_view": partial(training, "byol", 3, per_view=True),
    "byol-recomputed": partial(training, "byol", 2, chunks=4, make_encoder=resnet),
}


# ---------------------------------------------------------------------------------------------------------------------
# The processes


def worst_error(result: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference, relative to the largest value of the whole result."""
    assert result.keys() == expected.keys()
    scale = max(value.detach().abs().max().item() for value in expected.values())
    return max((result[key] - expected[key]).detach().abs().max().item() for key in expected) / scale


def work(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    expected = {name: check() for name, check in CHECKS.items()}
    for world in WORLDS:
        if rank >= world:
            continue
        dist.init_process_group("gloo", init_method=f"file://{folder}/store-{world}", rank=rank, world_size=world)
        errors = {name: worst_error(check(), expected[name]) for name, check in CHECKS.items()}
        dist.destroy_process_group()
        (folder / f"{world}-{rank}.json").write_text(json.dumps(errors))


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, list[dict[str, float]]]]:
    folder = tmp_path_factory.mktemp("processes")
    run_all(work, folder, log=folder / "log", count=max(WORLDS))
    yield {w: [json.loads((folder / f"{w}-{rank}.json").read_text()) for rank in range(w)] for w in WORLDS}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("world", WORLDS)
def test_any_number_of_processes_computes_the_same(errors, world, check):
    assert max(of_rank[check] for of_rank in errors[world]) < 1e-10


# ---------------------------------------------------------------------------------------------------------------------
# One process


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("affine", [True, False])
def test_global_batch_norm_equals_torch(views, affine):
    assert worst_error(batch_norm(views, affine), batch_norm(views, affine, plain=True)) < 1e-12


def test_recomputing_in_backward_changes_nothing():
    recomputed = training("byol", 2, chunks=4, make_encoder=resnet)
    assert worst_error(recomputed, training("byol", 2, make_encoder=resnet)) < 1e-12


def test_statistics_per_view_are_another_loss():
    assert worst_error(training("byol", 2, per_view=True), training("byol", 2)) > 1e-4


def test_evaluation_uses_the_running_statistics():
    norm = distributed.use_global_batch_norm(nn.BatchNorm1d(4), images_per_view=4)
    norm(torch.randn(8, 4))
    x = torch.randn(3, 4)  # need not divide into views
    expected = (x - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(norm.eval()(x), expected)


def test_half_precision_keeps_statistics_in_float32():
    norm = distributed.use_global_batch_norm(nn.BatchNorm1d(4), images_per_view=32)
    x = (torch.randn(64, 4) + 30).to(torch.bfloat16)
    out = norm(x)
    assert out.dtype == torch.bfloat16 and norm.running_mean.dtype == torch.float32
    expected = torch.cat([nn.BatchNorm1d(4)(part.float()) for part in x.chunk(2)])
    torch.testing.assert_close(out.float(), expected, rtol=0.01, atol=0.01)


def test_timms_fused_batch_norm_keeps_its_activation():
    torch.manual_seed(0)
    x = torch.randn(6, 4, 3, 3)
    for options in ({}, {"apply_act": False}, {"act_layer": nn.SiLU}):
        fused, plain = BatchNormAct2d(4, **options), nn.BatchNorm2d(4)
        converted = distributed.use_global_batch_norm(copy.deepcopy(fused), images_per_view=3)
        assert converted.state_dict().keys() == fused.state_dict().keys()
        expected = torch.cat([fused.act(plain(part)) for part in x.chunk(2)])
        torch.testing.assert_close(converted(x), expected)
        torch.testing.assert_close(converted.running_var, plain.running_var)
        torch.testing.assert_close(converted.eval()(x), fused.act(plain.eval()(x)))


def test_an_unknown_batch_norm_is_refused():
    class Fused(nn.BatchNorm2d):
        pass

    with pytest.raises(ValueError, match="0: a Fused cannot take statistics over the global batch"):
        distributed.use_global_batch_norm(nn.Sequential(Fused(3)))


def test_has_batch_statistics():
    assert distributed.has_batch_statistics(Encoder())
    assert distributed.has_batch_statistics(distributed.use_global_batch_norm(Encoder()))
    assert not distributed.has_batch_statistics(nn.Sequential(nn.Conv2d(3, 3, 1), nn.GroupNorm(1, 3)))
