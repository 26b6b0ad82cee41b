"""Figures of a sweep: which there are, and the frontier against its definition."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from hf_ssl_or.errors import InputError
from hf_ssl_or.report.style import style
from hf_ssl_or.report.sweep_plots import frontier, plot_sweep
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


def test_a_column_that_no_run_has(tmp_path: Path):
    with style(), pytest.raises(InputError, match="figures: unknown column 'knn/top5': did you mean 'knn/top1'"):
        plot_sweep(results(figures=["knn/top5"]), tmp_path)


def test_the_frontier():
    dice = random.Random(0)
    points = [(dice.random(), dice.random()) for _ in range(50)]
    beaten = {p for p in points for q in points if q != p and q[0] <= p[0] and q[1] <= p[1]}
    assert frontier(points) == sorted(set(points) - beaten)
