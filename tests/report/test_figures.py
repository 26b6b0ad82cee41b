"""What the figures draw: the right numbers, in the right style, also for what is rare."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from hf_ssl_or.report.curves import plot_collapse, plot_losses, plot_throughput
from hf_ssl_or.report.embeddings import embed, plot_embedding, principal_components
from hf_ssl_or.report.filters import block_means, correlate_filters, plot_errors, plot_filters
from hf_ssl_or.report.html import plot_figures
from hf_ssl_or.report.spectrum_plots import plot_spectra_compared, plot_spectra_of_runs
from hf_ssl_or.report.style import inline_svg, panels, shorten, style
from hf_ssl_or.runs.reader import read_runs
from tests.run_folders import WEIGHTS


def test_all_figures_of_several_runs_are_files_that_open(three_runs: list[Path], tmp_path: Path) -> None:
    figures = [figure for drawn in plot_figures(read_runs(three_runs), tmp_path).values() for figure in drawn]
    assert {figure.name for figure in figures} == {
        *("loss", "throughput", "collapse", "spectra", "spectra-compared", "orthogonality", "filters"),
        *("neighbors-1", "neighbors-2", "embedding-pca"),
    }
    for figure in figures:
        png, svg = figure.files
        with Image.open(png) as picture:
            assert min(picture.size) > 200
        ElementTree.parse(svg)
        ElementTree.fromstring(figure.svg)
        assert figure.title and len(figure.alt) > 40 and figure.caption
    ids = [e.get("id") for f in figures for e in ElementTree.fromstring(f.svg).iter() if e.get("id")]
    assert len(ids) == len(set(ids)), "the page holds every id once"


def test_a_run_of_one_line_is_drawn(make_run, tmp_path: Path) -> None:
    folder = make_run("young", finished=False, steps=1)
    for path in (folder / "spectra").glob("*.npz"):
        path.unlink()
    sections = plot_figures(read_runs([folder]), tmp_path)
    assert [figure.name for drawn in sections.values() for figure in drawn] == ["loss", "throughput"]


def test_a_run_that_holds_nothing_yet_has_no_figures(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "recipe.yaml").write_text("data: {dataset: shapes}")
    assert not any(plot_figures(read_runs([tmp_path / "new"]), tmp_path).values())


def test_values_that_are_not_finite_are_drawn_around(make_run, tmp_path: Path) -> None:
    folder = make_run("run", steps=2)
    with (folder / "metrics.jsonl").open("a") as file:
        for step, loss in ((5, float("nan")), (6, float("inf")), (7, 1e300), (8, -1.0)):
            file.write(json.dumps({"kind": "train", "step": step, "loss": loss}) + "\n")
    with style():
        assert plot_losses(read_runs([folder]), tmp_path) is not None


def test_spectra_are_dashed_and_counted_where_eigenvalues_are_not_positive(make_run, tmp_path: Path) -> None:
    runs = read_runs([make_run("none"), make_run("so", seed=1)])
    with style():
        by_run, compared = plot_spectra_of_runs(runs, tmp_path), plot_spectra_compared(runs, tmp_path)
        assert plot_spectra_compared(runs[:1], tmp_path) is None
    for figure in (by_run, compared):
        assert figure.svg.count("12 of 256 ≤ 0") == 2  # layer4 of each run
    assert "none: Input 9 of 300, Features of layer1 " in by_run.alt  # i^-2 > 1 % for i < 10
    assert "step 10 and step 40" in by_run.caption and compared.svg.count("stroke-dasharray: 6.4") >= 2


def test_curves_end_where_the_log_ends(make_run, tmp_path: Path) -> None:
    runs = read_runs([make_run("run")])
    with style():
        collapse, throughput = plot_collapse(runs, tmp_path), plot_throughput(runs, tmp_path)
    assert "kNN top-1, % goes from 39 to 69" in collapse.alt
    rates = [line["images_per_second"] for line in runs[0].train]
    assert f"Views per second goes from {4 * rates[0]:.4g} to {4 * rates[-1]:.4g}" in throughput.alt


def test_errors_before_and_after(make_run, tmp_path: Path) -> None:
    runs = read_runs([make_run("one"), make_run("two", seed=1)])
    with style():
        assert "one: mean 5.5 (before training 7.5)" in plot_errors(runs[:1], tmp_path).alt
        assert "before training</text>" in plot_errors(runs[:1], tmp_path).svg
        assert "before training</text>" not in plot_errors(runs, tmp_path).svg
        runs[0].results = replace(runs[0].results, weights_before={})
        assert "before" not in plot_errors(runs[:1], tmp_path).alt


@pytest.mark.parametrize("shape", [(200, 40), (30, 400), (2, 5)])
def test_principal_components_are_those_of_the_exact_decomposition(shape: tuple[int, int]) -> None:
    x = np.random.default_rng(0).standard_normal(shape) * np.arange(1, shape[1] + 1) ** -0.7 + 3
    xy, share = principal_components(x.astype(np.float32))
    centerd = x - x.mean(0)
    u, s, _ = np.linalg.svd(centerd.astype(np.float64), full_matrices=False)
    exact = np.zeros((shape[0], 2))
    exact[:, : len(s[:2])] = u[:, :2] * s[:2]
    assert xy.shape == (shape[0], 2)
    np.testing.assert_allclose(xy @ xy.T, exact @ exact.T, atol=2e-3 * s[0] ** 2)
    assert share == pytest.approx(float((s[:2] ** 2).sum() / (s**2).sum()), rel=1e-3)


def test_principal_components_of_collapsed_features_are_zero() -> None:
    xy, share = principal_components(np.full((6, 4), 2.0, np.float16))
    assert not xy.any() and share == 0


def test_correlations_of_at_most_256_filters_are_drawn(make_run, tmp_path: Path) -> None:
    folder = make_run("run")
    weight = np.random.default_rng(0).standard_normal((600, 4, 1, 1)).astype(np.float32)
    save_file({WEIGHTS[-1]: weight}, folder / "encoder" / "model.safetensors")
    with style():
        assert "256 of 600 filters" in plot_filters(read_runs([folder]), tmp_path).alt


def test_filters_that_are_alike_are_drawn_together(make_run) -> None:
    (run,) = read_runs([make_run("run")])  # filter i + 32 nearly repeats filter i
    found, blocks = correlate_filters(run), correlate_filters(run, 32)
    image = np.array(found.image)
    beside = np.maximum(np.append(np.diag(image, 1), 0), np.append(0, np.diag(image, 1)))
    assert (found.layer, found.filters, found.drawn, image.shape) == (WEIGHTS[-1], 64, 64, (64, 64))
    assert (beside > 0.8).mean() > 0.7 and found.mean < 0.1
    assert np.shape(blocks.image) == (32, 32) and blocks.mean == found.mean
    assert np.diag(blocks.image).mean() > 0.4 > 5 * np.median(blocks.image)


def test_block_means_are_those_of_pairs_of_different_filters() -> None:
    matrix = np.random.default_rng(0).random((7, 7))
    matrix = (matrix + matrix.T) / 2
    np.fill_diagonal(matrix, 1)
    means = block_means(matrix, 3)  # of filters 0-1, 2-3, 4-6
    assert means[0, 0] == pytest.approx(matrix[0, 1]) and means[0, 2] == pytest.approx(matrix[:2, 4:].mean())
    assert means[2, 2] == pytest.approx((matrix[4, 5] + matrix[4, 6] + matrix[5, 6]) / 3)
    np.testing.assert_allclose(block_means(matrix, 9), matrix)


def test_features_in_two_dimensions(make_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run,) = read_runs([make_run("run")])
    features, labels = run.features["features"].astype(np.float64), run.features["labels"]
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    cosine = unit @ unit.T - 3 * np.eye(len(unit))
    alike = labels[np.argsort(-cosine, axis=1)[:, :10]] == labels[:, None]
    found = embed(run.features, "PCA")
    assert found.same_class == pytest.approx(100 * alike.mean(), abs=0.1) and len(found.x) == len(labels)
    assert found.class_names == ["circle", "square", "triangle", "star", "cross"] and found.labels == labels.tolist()

    class UMAP:
        def __init__(self, **settings: int) -> None:
            assert settings == {"n_neighbors": 15, "random_state": 0}

        def fit_transform(self, x: np.ndarray) -> np.ndarray:
            return x[:, :2]

    module = types.ModuleType("umap")
    module.UMAP, module.__spec__ = UMAP, ModuleSpec("umap", None)
    monkeypatch.setitem(sys.modules, "umap", module)
    with style():
        pca, umap = plot_embedding([run], tmp_path, umap=True)
    assert (pca.name, umap.name) == ("embedding-pca", "embedding-umap")
    share = f"so many have its class: run: {100 * alike.mean():.1f} %"
    assert share in pca.caption and share in umap.caption and "of the variance" in pca.alt
    assert "Distances between groups mean little" in umap.caption


@pytest.mark.parametrize(
    ("labels", "names"), [(None, []), ([0, 1, 1, 0], ["class 0", "class 1"]), ([0, 1, 3, 99], [])]
)
def test_classes_without_names_and_too_many(labels: list[int] | None, names: list[str]) -> None:
    arrays = {"features": np.random.default_rng(0).standard_normal((4, 3))}
    found = embed(arrays if labels is None else arrays | {"labels": np.array(labels)}, "PCA")
    assert found.class_names == names and (found.same_class is None) == (labels is None)


def test_inline_svg_takes_the_colors_of_the_page() -> None:
    text = (
        '<?xml version="1.0"?><!DOCTYPE svg><svg height="72pt" viewBox="0 0 72 72" width="72pt">'
        "<metadata>x</metadata><defs><style>*{color:red}</style></defs>"
        '<g id="a" clip-path="url(#b)" style="fill: #0072b2; stroke: #123456"/><text>fill #1b1f24</text></svg>'
    )
    svg = inline_svg(text, "p")
    assert svg.startswith("<svg") and "metadata" not in svg and "<style" not in svg
    assert 'id="p-a"' in svg and "url(#p-b)" in svg and "fill: var(--c0); stroke: #123456" in svg
    assert "<text>fill #1b1f24</text>" in svg and 'width="96"' in svg


def test_panels_and_names() -> None:
    figure, axes = panels(4, columns=3, width=2, height=1, left=1, right=0, gap=(0.5, 0.5), top=0.25, bottom=0.25)
    assert len(axes) == 4 and figure.get_size_inches().tolist() == [8, 3]
    assert axes[3].get_position().bounds == pytest.approx((1 / 8, 0.25 / 3, 2 / 8, 1 / 3))
    assert shorten("x" * 30) == "x" * 30 and shorten("a" * 20 + "b" * 20, 11) == "aaaaa…bbbbb"
