"""`results.json` is written and read by the same classes; what does not fit is refused by its key."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_ssl_or.errors import InputError
from hf_ssl_or.runs.results import Collapse, Evaluation, Results, read_results
from tests.run_folders import write_run


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run") / "results.json"


def test_what_is_read_is_written_again(path: Path) -> None:
    tree = json.loads(path.read_text())
    results = read_results(path)
    results.write(path)
    again = json.loads(path.read_text())
    assert again == {**tree, "skipped": {}} and read_results(path) == results
    assert not path.with_name("results.json.tmp").exists() and list(again)[0] == "schema_version"
    assert "weights_sha256" not in again and again["evaluations"][0]["metrics"]["top1_k20"]["std"] is None


def test_measures_stand_beside_the_sizes() -> None:
    tree = {
        "rankme": 3.5,
        "dead_dimensions": 0,
        "alpha_req_range": [3, 9],
        "dimension": 8,
        "samples": 60,
        "notes": ["x"],
    }
    collapse = Collapse.from_dict(tree)
    assert collapse.measures == {"rankme": 3.5, "dead_dimensions": 0} and collapse.alpha_req_range == [3, 9]
    assert collapse.to_dict() == tree


def change(*keys: str | int, to: Any) -> Callable[[Any], None]:
    def apply(tree: Any) -> None:
        for key in keys[:-1]:
            tree = tree[key]
        tree[keys[-1]] = to

    return apply


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tree: tree.pop("schema_version"), "schema_version: is none, and 1 is what this version reads"),
        (change("schema_version", to=2), "schema_version: is 2, and 1 is"),
        (change("schema_version", to=True), "schema_version: is True"),
        (lambda tree: tree.pop("collapse"), "collapse: is missing"),
        (change("run", "steps", to="many"), "run.steps: is text, not a whole number"),
        (change("run", "steps", to=1.5), "run.steps: is 1.5, not a whole number"),
        (change("evaluations", to=3), "evaluations: is 3, not a list"),
        (
            change("evaluations", 1, "metrics", "top1", "mean", to=float("nan")),
            "evaluations.1.metrics.top1.mean: is NaN",
        ),
        (change("evaluations", 0, "headline", to="top5"), "evaluations.0.headline: top5 is none of the metrics"),
        (change("evaluations", 0, "data", "test", "size", to=None), "evaluations.0.data.test.size: is null"),
        (change("baselines", "untrained", to={}), "baselines.untrained: is an object, not a list"),
        (change("collapse", to=[]), "collapse: is a list, not an object"),
        (change("collapse", "rankme", to="<b>"), "collapse.measures.rankme: is text, not a finite number"),
        (change("weights", "a\nb", to={"stable_rank": 1}), "weights.a\ufffdb.orthogonality_error: is missing"),
        (change("weights", "a", to={"stable_rank": 10**400, "orthogonality_error": 1}), "weights.a.stable_rank: is 1"),
        (change("data", "preprocessing", to={"image_size": 0}), "data.preprocessing: image_size: at least 1 pixel"),
        (change("environment", "packages", "torch", to=2), "environment.packages.torch: is 2, not text"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_key(path: Path, edit: Callable[[Any], Any], message: str) -> None:
    tree = json.loads(path.read_text())
    edit(tree)
    path.write_text(json.dumps(tree))
    with pytest.raises(InputError) as caught:
        read_results(path)
    assert f"results.json: {message}" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[1]", "", "[" * 100_000])
def test_what_is_no_object_is_refused(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(InputError, match=r"results\.json: (cannot be read|holds a list, not an object)"):
        read_results(path)


def test_unknown_keys_are_dropped(path: Path) -> None:
    tree = json.loads(path.read_text())
    more = copy.deepcopy(tree) | {"secret": "x"}
    assert Results.from_dict(more) == Results.from_dict(tree)


def test_an_entry_of_a_table_names_its_encoder(path: Path) -> None:
    entry = json.loads(path.read_text())["evaluations"][0]
    assert Evaluation.from_dict(entry | {"encoder": "net", "dataset": "birds"}).to_dict()["dataset"] == "birds"
    assert "encoder" not in Evaluation.from_dict(entry).to_dict()
