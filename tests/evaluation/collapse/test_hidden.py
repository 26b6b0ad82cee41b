"""Covariances of every stage against a bank of outputs; four processes with different shards against one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from hf_ssl_or.data.augmentation_sampling import ViewGroup
from hf_ssl_or.data.image_dataset import ImageSet
from hf_ssl_or.data.views import clean_views, render_views, sample_parameters
from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation.collapse import collapse_report
from hf_ssl_or.evaluation.collapse.hidden import hidden_covariances, input_spectrum, scatter_views
from hf_ssl_or.evaluation.collapse.spectra import CovarianceAccumulator
from hf_ssl_or.evaluation.collapse.view_scatter import ViewScatter
from hf_ssl_or.models.auto import create_encoder
from hf_ssl_or.models.image_conversion import Preprocessing
from hf_ssl_or.randomness import hashed_seed
from hf_ssl_or.structures import ViewSpec

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
NORMAL = {"device": "cpu"}
VIEWS = (ViewSpec(), ViewSpec(crop_scale=(0.5, 1.0), jitter=0))
WORLD = 4


def noise(n: int, side: int) -> torch.Tensor:
    """Pixels (n, side, side, 3)."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (n, 3, side, side), dtype=torch.uint8, generator=generator)
    return pixels.permute(0, 2, 3, 1).contiguous()


def image_set(n: int = 18, side: int = 12) -> ImageSet:
    how = Preprocessing(image_size=side, mean=MEAN, std=STD)
    return ImageSet.from_arrays(noise(n, side).numpy(), name="noise", preprocessing=how)


def encoder(kind: str = "resnet") -> nn.Module:
    torch.manual_seed(0)
    if kind == "vit":
        arguments = {"embed_dim": 16, "depth": 2, "num_heads": 2}
        return create_encoder("vit_tiny", image_size=12, patch_size=4, **arguments).eval()
    return create_encoder("resnet18", stem="small", image_size=12, channels=[4, 4, 8, 8]).eval()


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_covariances_are_those_of_all_outputs(kind: str) -> None:
    images, model = image_set(), encoder(kind).train()
    moments = hidden_covariances(model, images, **NORMAL, batch_size=5)
    assert model.training
    with torch.no_grad():
        output = model.eval()(clean_views(noise(18, 12), images.preprocessing), output_hidden_states=True)
    pooled = [x.mean((2, 3)) if x.ndim == 4 else x.mean(1) for x in output.hidden_states]
    stages = ["stem", "stage1", "stage2", "stage3", "stage4"] if kind == "resnet" else ["stem", "stage1", "stage2"]
    assert list(moments) == [*(f"hidden/{stage}" for stage in stages), "representation"]
    for accumulator, x in zip(moments.values(), [*pooled, output.pooler_output], strict=True):
        assert accumulator.count == 18
        expected = np.cov(x.double().numpy().T)
        np.testing.assert_allclose(accumulator.covariance_DD, expected, rtol=1e-4, atol=1e-5 * expected.max())


def test_outputs_may_be_flattened() -> None:
    images, model = image_set(side=4), encoder()
    moments = hidden_covariances(model, images, **NORMAL, flatten=True)
    assert len(moments["hidden/stage1"].mean_D) == 4 * 4 * 4 and len(moments["hidden/stage4"].mean_D) == 8
    with pytest.raises(InputError, match="hidden/stem: flattened it has 9216 dimensions, more than 8192"):
        hidden_covariances(model, image_set(2), **NORMAL, flatten=True)


def test_the_spectrum_of_the_input() -> None:
    values = np.linalg.eigvalsh(np.cov(noise(700, 6).flatten(1).double().numpy().T))[::-1]
    np.testing.assert_allclose(input_spectrum(image_set(700, side=6)), values / values[0], rtol=1e-4)
    averaged = noise(9, 64).double().unflatten(2, (32, 2)).unflatten(1, (32, 2)).mean((2, 4)).flatten(1)
    spectrum = input_spectrum(image_set(9, side=64))
    values = np.linalg.eigvalsh(np.cov(averaged.numpy()))[::-1]
    assert spectrum.shape == (3072,) and (spectrum > 0).sum() == 8
    values = np.linalg.svd(averaged.numpy() - averaged.numpy().mean(0), compute_uv=False)[:8] ** 2
    np.testing.assert_allclose(spectrum[:8], values / values[0], rtol=1e-4)


def test_a_sample_depends_on_its_key_alone() -> None:
    images = image_set(50)
    first, again, other = (images.sample(20, key, "sample").unit_squares(np.arange(20)) for key in (0, 0, 1))
    assert first.equal(again) and not first.equal(other)
    assert len(images.sample(100, 0)) == 50


def test_scattered_views_are_those_of_a_bank() -> None:
    images, model = image_set(), encoder()
    scatter = scatter_views(model, images, VIEWS, num_views=3, **NORMAL, batch_size=7, seed=2)
    group = ViewGroup(specs=(VIEWS[0], VIEWS[1], VIEWS[0]), size=12, seed=hashed_seed("evaluation", 2), epoch=0)
    drawn = sample_parameters(group, np.arange(18), original_size=(12, 12))
    with torch.no_grad():
        rendered = render_views(noise(18, 12), drawn, images.preprocessing)
        views_VBD = torch.stack([model(x).pooler_output for x in rendered])
    bank = ViewScatter.of(views_VBD.transpose(0, 1))
    assert scatter.count == 18
    torch.testing.assert_close(scatter.within_DD, bank.within_DD, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(scatter.means.scatter_DD, bank.means.scatter_DD, rtol=1e-3, atol=1e-6)
    assert scatter.squared_distance() == pytest.approx(bank.squared_distance(), rel=1e-3)


def test_bad_calls_are_refused() -> None:
    with pytest.raises(InputError, match="needs views"):
        scatter_views(encoder(), image_set(), (), num_views=2, **NORMAL)
    with pytest.raises(InputError, match="views: at least 2 of each image, not 1"):
        scatter_views(encoder(), image_set(), VIEWS, num_views=1, **NORMAL)


# ---------------------------------------------------------------------------------------------------------------------
# Four processes


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 5


def numbers(rank: int, world: int) -> dict[str, float]:
    """Every measure, from this process's shard of features and views, and from its share of the images."""
    sizes = [100] if world == 1 else [61, 0, 9, 30]
    moments, scatter = CovarianceAccumulator(12), ViewScatter(12, 3)
    moments.update(random(100, 12).split(sizes)[rank])
    scatter.update(random(100, 3, 12).split(sizes)[rank])
    report = collapse_report(moments.over_ranks(), scatter.over_ranks())
    images, model = image_set(), encoder().double()
    stages = hidden_covariances(model, images, **NORMAL, batch_size=4)
    report |= {name: float(value.scatter_DD.square().sum()) for name, value in stages.items()}
    report["count"] = stages["representation"].count
    views = scatter_views(model, images, VIEWS, num_views=2, **NORMAL)
    return report | {"distance": views.squared_distance(), "within": float(views.within_DD.square().sum())}


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    Path(folder, f"{rank}.json").write_text(json.dumps(numbers(rank, WORLD)))
    with pytest.raises(InputError, match="noise: 3 images for 4 processes; each needs one"):
        hidden_covariances(encoder(), image_set(3), **NORMAL)
    dist.destroy_process_group()


def test_four_processes_measure_what_one_does(tmp_path: Path) -> None:
    mp.set_forkserver_preload(
        ["hf_ssl_or.evaluation.collapse.hidden", "hf_ssl_or.models.auto"]
    )  # imported once, not by each
    mp.start_processes(_work, (str(tmp_path),), nprocs=WORLD, start_method="forkserver")
    expected = numbers(0, 1)
    for rank in range(WORLD):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            encoded = name in ("distance", "within") or "/" in name or name == "representation"  # float32 features
            assert found[name] == (value if name == "notes" else pytest.approx(value, rel=1e-5 if encoded else 1e-10))
