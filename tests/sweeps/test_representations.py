"""What a sweep keeps of chosen arms: that of their first seed, computed once for the same weights."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hf_ssl_or.runs.sweep_results import ArmValues, RunValues, SweepResults
from hf_ssl_or.sweeps import representations
from hf_ssl_or.sweeps.plan import Plan, read_plan
from hf_ssl_or.sweeps.representations import add_representations, keep_representations
from tests.run_folders import write_run

ARMS = {"so": [], "none": ["orthogonality.penalty=none"]}


def plan_of(**keys: object) -> Plan:
    recipe = {"data": {"dataset": "shapes"}, "method": {"name": "barlow_twins"}, "orthogonality": {"penalty": "so"}}
    return read_plan({"recipe": recipe, "arms": ARMS, "seeds": [3, 4]} | keys)


def measured(so: str = "abc") -> SweepResults:
    arms = []
    for name, weights in (("so", so), ("none", "def")):
        runs = [RunValues(seed=seed, metrics={"rankme": 2.0}, weights_sha256=weights) for seed in (3, 4)]
        arms.append(ArmValues(name=name, runs=runs))
    return SweepResults(name="sweep", arms=arms, columns=["rankme"])


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(sys.modules, "umap", None)
    for arm in ARMS:
        write_run(tmp_path / arm / "seed-3", seed=3 if arm == "so" else 0)
    return tmp_path


def test_first_seeds_of_chosen_arms(root: Path):
    told: list[str] = []
    found = add_representations(plan_of(spectra=["none", "so"], umap=["so"]), measured(), root, told.append)
    so, none = (arm.runs[0].representations for arm in found.arms)
    assert all(arm.runs[1].representations is None for arm in found.arms)
    assert so.step == 40 and len(so.spectra) == 10 and max(len(s.index) for s in so.spectra.values()) <= 100
    assert none.filters.drawn == 64 and none.embedding is None
    assert so.embedding.method == "PCA" and len(so.embedding.x) == 300
    assert "needs the package umap-learn, so PCA is drawn" in told[0] and "arm so" in told[1]


def test_the_same_weights_are_measured_once(root: Path, monkeypatch: pytest.MonkeyPatch):
    plan = plan_of(spectra=["so"], umap=["so", "none"])
    first = add_representations(plan, measured(), root, print)
    first.write(root / "results.json")
    embed, calls = representations.embed, []
    monkeypatch.setattr(representations, "embed", lambda *given: calls.append(given) or embed(*given))
    again = add_representations(plan, keep_representations(plan, measured(), root), root, print)
    assert again == first and not calls
    other = add_representations(plan, keep_representations(plan, measured(so="new"), root), root, print)
    assert len(calls) == 1 and other.arms[0].runs[0].representations == first.arms[0].runs[0].representations
    fewer = keep_representations(plan_of(spectra=["so"]), measured(), root)
    assert fewer.arms[0].runs[0].representations.embedding is None and fewer.arms[0].runs[0].representations.spectra
    assert fewer.arms[1].runs[0].representations is None
    monkeypatch.setattr(representations, "has_umap", lambda: True)
    monkeypatch.setattr(representations, "embed", lambda arrays, method: replace(embed(arrays, "PCA"), method=method))
    better = add_representations(plan, keep_representations(plan, measured(), root), root, print)
    assert better.arms[1].runs[0].representations.embedding.method == "UMAP"


def test_what_cannot_be_drawn_is_told(root: Path):
    told: list[str] = []
    shutil.rmtree(root / "so" / "seed-3" / "spectra")
    (root / "so" / "seed-3" / "features.npz").write_bytes(b"PK\x03\x04 cut off")
    results = measured()
    results.arms[1].runs[0] = RunValues(seed=3, failure="status 1")
    found = add_representations(plan_of(spectra=["so", "none"], umap=["so"]), results, root, told.append)
    assert all(run.representations is None for arm in found.arms for run in arm.runs)
    assert told[1:] == [
        "spectra: arm so has none; its recipe wants training.monitor_every above 0",
        "umap: arm so has no features.npz that can be read",
    ]


def test_results_without_representations_are_read_and_numbers_stand_on_a_line(root: Path):
    results = measured()
    tree = json.loads(json.dumps(results.to_dict()))
    assert "representations" not in tree["arms"][0]["runs"][0] and SweepResults.from_dict(tree) == results
    results = add_representations(plan_of(umap=["so"]), results, root, print)
    results.write(root / "results.json")
    text = (root / "results.json").read_text()
    assert json.loads(text) == results.to_dict() and len(text.splitlines()) < 100
