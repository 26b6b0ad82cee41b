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
from hf_ssl_or.report.sweep_page import render_sweep
from hf_ssl_or.report.sweep_plots import frontier, mean_curve, plot_sweep
from hf_ssl_or.report.sweep_tables import markdown
from hf_ssl_or.runs.representations import Embedding, FilterCorrelations, Representations, Spectrum
from hf_ssl_or.runs.sweep_results import ArmValues, RunValues, SweepResults
from hf_ssl_or.runs.time_to import TimeTo


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


def timed(seeds: tuple[int, ...] = (0, 1), **more: object) -> SweepResults:
    """Arms whose kNN is linear in minutes: "slow" ends at 40 %, "fast" is twice as fast, "low" stays below."""
    arms = []
    for name, k in (("slow", 10.0), ("fast", 20.0), ("low", 5.0)):
        curves = [[{"minutes": x * (1 + s), "knn": k * x} for x in (1.0, 2.0, 4.0)] for s in seeds]
        arms.append(
            ArmValues(name=name, runs=[RunValues(seed=s, curve=c) for s, c in zip(seeds, curves, strict=True)])
        )
    return SweepResults(name="times", arms=[*arms, ArmValues(name="none", runs=[])], columns=[], **more)


def test_minutes_to_what_an_arm_ends_with(tmp_path: Path):
    found = timed(time_to=TimeTo(metric="knn", arm="slow"))
    table = markdown(found)
    there = "the last kNN top-1 of slow with the same seed, mean 40.00 %"
    assert f"| minutes to {there} | times sooner than slow |" in table
    assert "| slow | 6.00 ± 2.83 | – |" in table and "| fast | 3.00 ± 1.41 | 2.00 [2.00, 2.00] |" in table
    assert "| low | not reached (0 of 2 seeds) | – |" in table and "| none | – | – |" in table
    with style():
        (time,) = plot_sweep(found, tmp_path)
    assert time.name == "time" and "fast goes from 20 at 1.5 minutes to 80 at 6 minutes" in time.alt
    assert f"Dotted: {there}." in time.alt and "none goes" not in time.alt
    assert all(file.stat().st_size > 1000 for file in time.files)
    assert f"minutes to {there}" in render_sweep(found, [time], base=tmp_path)


def test_minutes_to_a_value_that_some_seeds_reach(tmp_path: Path):
    found = timed(seeds=(0,), time_to=TimeTo(metric="knn", value=30))
    slow, *others = found.arms
    short = RunValues(seed=1, curve=[{"minutes": 1.0, "knn": 3.0}])
    table = markdown(replace(found, arms=[replace(slow, runs=[*slow.runs, short]), *others]))
    assert "| slow | 3.00 (1 of 2 seeds) | – |" in table and "| fast | 1.50 | 2.00 (1 seed: no interval) |" in table
    assert "kNN top-1 of 30.00 % |" in table
    empty = timed(seeds=(), time_to=TimeTo(metric="knn", arm="slow"))
    assert "| minutes to the last kNN top-1 of slow with the same seed |" in markdown(empty)
    with style():
        assert plot_sweep(empty, tmp_path) == [] and plot_sweep(timed(), tmp_path) == []


def test_the_mean_curve_ends_where_a_seed_does():
    arm = timed().arms[0]
    shorter = replace(arm, runs=[arm.runs[0], replace(arm.runs[1], curve=arm.runs[1].curve[:2])])
    found = [(x, metric.mean, metric.std) for x, metric in mean_curve(shorter, "knn")]
    assert found == [(1.5, 10.0, 0.0), (3.0, 20.0, 0.0)]


def test_the_frontier():
    dice = random.Random(0)
    points = [(dice.random(), dice.random()) for _ in range(50)]
    beaten = {p for p in points for q in points if q != p and q[0] <= p[0] and q[1] <= p[1]}
    assert frontier(points) == sorted(set(points) - beaten)
