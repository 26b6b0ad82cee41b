"""Figures of a sweep: which there are, and the frontier against its definition."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hf_ssl_or.errors import InputError
from hf_ssl_or.report.style import style
from hf_ssl_or.report.sweep_plots import frontier, plot_sweep
from hf_ssl_or.runs.representations import Embedding, FilterCorrelations, Representations, Spectrum
from hf_ssl_or.runs.sweep_results import ArmValues, RunValues, SweepResults


def results(**more: object) -> SweepResults:
    arms = []
    for arm in ("so", "none"):
        for dim in (64, 128, 256):
            runs = [
                RunValues(seed=seed, metrics={"knn/top1": 40.0 + seed + dim / 64, "minutes": dim / 60.0})
                for seed in (0, 1)
            ]
            own = ["orthogonality.penalty=none"] if arm == "none" else []
            cell = {"method.projector_dim": dim}
            changes = [*own, f"method.projector_dim={dim}"]
            arms.append(ArmValues(name=f"{arm},projector_dim={dim}", cell=cell, changes=changes, runs=runs))
    grid = {"method.projector_dim": [64, 128, 256]}
    return SweepResults(name="dims", arms=arms, grid=grid, columns=["knn/top1", "minutes"], **more)


def test_bars_curves_and_pareto(tmp_path: Path):
    with style():
        bars, curves, pareto = plot_sweep(results(), tmp_path)
    assert [figure.name for figure in (bars, curves, pareto)] == ["arms", "axis-1", "pareto"]
    assert "knn top-1 of so at 64: 41.50 ± 0.71" in curves.alt and "of none at 256: 44.50" in curves.alt
    assert all(file.stat().st_size > 1000 for file in (*bars.files, *curves.files, *pareto.files))


def test_representations_of_chosen_arms(tmp_path: Path):
    eigenvalues = np.arange(1, 513, dtype=np.float64) ** -1.5
    eigenvalues[500:] = 0
    spectrum = Spectrum.of(eigenvalues, most=100)
    filters = FilterCorrelations(layer="layer4.conv2.weight", filters=512, drawn=256, mean=0.1, image=[[1, 0], [0, 1]])
    umap = Embedding(
        method="UMAP", x=[0, 1, 2], y=[1, 0, 1], labels=[0, 1, 1], class_names=["cat", "dog"], same_class=50
    )
    pca = replace(umap, method="PCA", variance=12.0)
    sweep = results()
    for i, embedding in ((1, umap), (4, pca)):
        kept = Representations(
            step=7, spectra={"representation": spectrum}, filters=filters if i == 1 else None, embedding=embedding
        )
        runs = sweep.arms[i].runs
        runs[0] = replace(runs[0], representations=kept)
    with style():
        *_, spectra, maps, by_umap, by_pca = plot_sweep(sweep, tmp_path)
    first, second = sweep.arms[1].name, sweep.arms[4].name
    assert spectra.name == "spectra-compared" and spectra.svg.count("12 of 512 \u2264 0") == 2
    assert f"{first}: Representation 21 of 512; {second}: Representation 21 of 512" in spectra.alt  # i^-1.5 > 1 %
    assert f"the run with seed 0 ({first}: step 7; {second}: step 7)" in spectra.caption
    assert "fill: var(--c1)" in spectra.svg and "fill: var(--c4)" in spectra.svg, "the colors of the arms' bars"
    assert f"{first}, layer4.conv2.weight: mean 0.100, 256 of 512 filters" in maps.alt and "2 blocks" in maps.caption
    assert by_umap.name == "embedding-umap" and f"{first}: 3 images" in by_umap.alt and second not in by_umap.alt
    assert by_pca.name == "embedding-pca" and f"{second}: 50.0 %" in by_pca.caption
    assert SweepResults.from_dict(json.loads(json.dumps(sweep.to_dict()))) == sweep


def test_spectra_are_thinned_evenly_on_a_logarithmic_axis():
    eigenvalues = np.arange(1, 2049, dtype=np.float64) ** -0.5
    thin, full = Spectrum.of(eigenvalues, most=100), Spectrum.of(eigenvalues)
    assert len(thin.index) <= 100 and (thin.index[0], thin.index[-1]) == (1, 2048)
    assert thin.values == [float(f"{i**-0.5:.4g}") for i in thin.index]
    assert np.diff(np.log(thin.index))[30:].max() < 0.12 and full.values == eigenvalues.tolist()
    nothing = Spectrum.of(np.zeros(3), most=100)
    assert (nothing.index, nothing.size, nothing.positive, nothing.large) == ([], 3, 0, 0)


def test_a_column_that_no_run_has(tmp_path: Path):
    with style(), pytest.raises(InputError, match="figures: unknown column 'knn/top5': did you mean 'knn/top1'"):
        plot_sweep(results(figures=["knn/top5"]), tmp_path)


def test_the_frontier():
    dice = random.Random(0)
    points = [(dice.random(), dice.random()) for _ in range(50)]
    beaten = {p for p in points for q in points if q != p and q[0] <= p[0] and q[1] <= p[1]}
    assert frontier(points) == sorted(set(points) - beaten)
