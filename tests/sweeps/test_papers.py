"""The sweeps of both papers: each loads, lists its commands, and one small cell of its CPU variant runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import hf_ssl_or
from hf_ssl_or.recipe import recipe_variants
from hf_ssl_or.sweeps.plan import read_plan
from hf_ssl_or.sweeps.sweep import list_runs

PAPERS = Path(__file__).resolve().parents[2] / "recipes" / "papers"
FILES = sorted([*PAPERS.glob("orthogonality/*.yaml"), *PAPERS.glob("multiview/*.yaml")])
NAMED = [
    file.with_stem("-".join([file.stem, *own]))
    for file in FILES
    for own in [[], *([v] for v in recipe_variants(file))]
]
TINY = [
    *("data.dataset=shapes", "data.shapes_train=64", "data.shapes_test=40", "data.fraction=1.0"),
    *("training.max_steps=2", "training.batch_size=32", "training.monitor_images=32", "training.monitor_every=1"),
    "evaluation.protocols=[knn]",
]


def name(file: Path) -> str:
    return f"{file.parent.name}/{file.stem}"


@pytest.mark.parametrize("file", NAMED, ids=name)
def test_every_sweep_lists_a_command_per_run(file: Path, tmp_path: Path):
    plan = read_plan(file)
    lines = list_runs(file, tmp_path)
    assert len(lines) == len(plan.arms) * len(plan.seeds) >= 6 and len(plan.seeds) >= 3
    assert all(line.startswith(("hf-ssl-or train ", "python benchmarks/")) for line in lines)


@pytest.mark.parametrize("file", FILES, ids=name)
def test_every_head_says_command_cost_claim_and_what_was_measured(file: Path):
    head = "".join(line for line in file.read_text().splitlines(keepends=True) if line.startswith("#"))
    for named in re.findall(r"recipes/papers/\S+\.yaml", head):
        read_plan(PAPERS.parents[1] / named)
    assert f"hf-ssl-or sweep recipes/papers/{name(file)}.yaml" in head
    assert all(part in head for part in ("# Cost: ", "# The paper: ", "# Measured: "))


@pytest.mark.parametrize("file", FILES, ids=name)
def test_a_small_cell_of_the_cpu_variant_runs(file: Path, tmp_path: Path):
    arm = read_plan(file.with_stem(f"{file.stem}-cpu")).arms[-1]
    results = hf_ssl_or.pretrain(arm.recipe.override(TINY), output_dir=tmp_path / "run")
    assert results is not None and (tmp_path / "run" / "encoder" / "model.safetensors").is_file()
