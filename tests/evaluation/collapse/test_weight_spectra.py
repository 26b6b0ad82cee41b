"""Which weights are drawn, their spectra against the definition, and filters ordered by likeness."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import nn

from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation.collapse.weight_spectra import filter_correlations, select_weights, weight_spectra


def test_resnets_show_the_last_convolution_of_each_stage() -> None:
    class Wrapped(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.encoder = timm.create_model(name, num_classes=0)

    stages = [f"encoder.layer{i}" for i in (1, 2, 3, 4)]
    r18, r50 = select_weights(Wrapped("resnet18")), select_weights(timm.create_model("resnet50", num_classes=0))
    assert list(r18) == [f"{stage}.1.conv2.weight" for stage in stages]
    assert list(r50) == [f"layer{i}.{n}.conv3.weight" for i, n in ((1, 2), (2, 3), (3, 5), (4, 2))]
    assert r18["encoder.layer4.1.conv2.weight"].shape == (512, 512 * 9)


def test_transformers_show_first_middle_and_last_block() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=5, img_size=32)
    assert list(select_weights(vit)) == [f"blocks.{i}.{n}.weight" for i in (0, 2, 4) for n in ("attn.proj", "mlp.fc2")]


def test_weight_spectra_take_inputs_as_samples() -> None:
    encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 4))
    spectra = weight_spectra(encoder)
    assert list(spectra) == ["0.weight", "2.weight"]
    eig = np.linalg.eigvalsh(np.cov(encoder[0].weight.detach().double().flatten(1).numpy()))[::-1]
    np.testing.assert_allclose(spectra["0.weight"], eig / eig[0], rtol=1e-10)


def clones(groups: int, size: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Filters, `size` near copies (some negated) of each of some, shuffled; and the group of each."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(groups, 8, 3, 3, generator=generator).repeat_interleave(size, 0)
    sign = torch.randint(2, (len(base), 1, 1, 1), generator=generator) * 2 - 1
    weight = (base + noise * torch.randn(base.shape, generator=generator)) * sign
    order = torch.randperm(len(base), generator=generator)
    return weight[order], torch.arange(groups).repeat_interleave(size)[order]


def test_filter_correlations_are_those_of_numpy() -> None:
    weight = torch.randn(12, 4, 3, 3)
    weight[5] = 0.1
    with np.errstate(invalid="ignore"):
        expected = np.nan_to_num(np.abs(np.corrcoef(weight.double().flatten(1).numpy())))
    np.fill_diagonal(expected, 1)
    np.testing.assert_allclose(filter_correlations(weight, ordered=False), expected, atol=1e-12)
    assert not filter_correlations(weight, ordered=False)[5, [0, 11]].any(), "a constant filter"
    ordered = filter_correlations(weight)
    np.testing.assert_allclose(np.sort(ordered, axis=None), np.sort(expected, axis=None), atol=1e-12)
    np.testing.assert_array_equal(ordered, ordered.T)


@pytest.mark.parametrize(("groups", "size"), [(2, 10), (5, 8), (8, 16)])
def test_like_filters_stand_together(groups: int, size: int) -> None:
    weight, group = clones(groups, size, noise=0.3)
    correlations = filter_correlations(weight)
    inside = np.kron(np.eye(groups), np.ones((size, size))).astype(bool)
    assert correlations[inside].mean() > 0.8 > 3 * correlations[~inside].mean()
    shuffled = filter_correlations(weight, ordered=False)
    assert shuffled[inside].mean() < 0.6, "the test can fail"


def test_the_order_is_as_good_as_that_of_biclustering() -> None:
    """The paper's order needs the number of groups; this one finds as many groups without."""
    from sklearn.cluster import SpectralBiclustering

    weight, _ = clones(6, 8, noise=0.5)
    given = filter_correlations(weight, ordered=False)
    model = SpectralBiclustering(n_clusters=6, random_state=0).fit(given)
    theirs = given[np.argsort(model.row_labels_)][:, np.argsort(model.row_labels_)]
    inside = np.kron(np.eye(6), np.ones((8, 8))).astype(bool)
    assert filter_correlations(weight)[inside].mean() > theirs[inside].mean() - 0.01


def test_bad_weights_are_refused() -> None:
    with pytest.raises(InputError, match=r"weight: wants \(filters, inputs, ...\), not shape \(3,\)"):
        filter_correlations(torch.zeros(3))
    with pytest.raises(InputError, match="weight: 1 of 3 rows hold NaN"):
        filter_correlations(torch.tensor([[1.0, 2], [torch.nan, 1], [0, 1]]))
