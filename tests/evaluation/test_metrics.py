"""Each metric loads by its path in a fresh process without a network; the package computes its numbers by them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation import metrics
from hf_ssl_or.evaluation.collapse import alpha_req, lidar, rankme
from hf_ssl_or.evaluation.collapse.spectra import eigenvalues
from hf_ssl_or.evaluation.metrics import available_metrics, compute_metric, metric_path
from hf_ssl_or.evaluation.protocols.base import accuracies, best_classes

NAMES = ["alpha_req", "lidar", "rankme", "top_k_accuracy"]
LOAD_ALL = """
import json, re, socket, sys
def refuse(*arguments, **named): raise OSError("the network was asked for")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import evaluate
import numpy as np
import torch

arrays = {name: torch.from_numpy(value) for name, value in np.load(sys.argv[1]).items()}
paths = json.loads(sys.argv[2])
metric = {name: evaluate.load(path) for name, path in paths.items()}
metric["rankme"].add_batch(predictions=arrays["features"][:30])
metric["rankme"].add_batch(predictions=arrays["features"][30:].numpy())
results = {
    "rankme": metric["rankme"].compute(),
    "rankme of lists": metric["rankme"].compute(predictions=arrays["features"].tolist(), eps=1e-3),
    "alpha_req": metric["alpha_req"].compute(predictions=arrays["features"], fit_range=(5, 15)),
    "lidar": metric["lidar"].compute(predictions=arrays["views"], delta=0.01),
    "top_k_accuracy": metric["top_k_accuracy"].compute(
        predictions=arrays["predicted"], references=arrays["labels"], k=[1, 3]
    ),
    "names": [m.name for m in metric.values()],
    "cards": {name: [m.description, m.citation, m.inputs_description] for name, m in metric.items()},
}
def refused(name, **inputs):
    try: metric[name].compute(**inputs)
    except ValueError as error: return str(error)
results["refused"] = [
    refused("rankme", predictions=[[float("nan"), 1.0], [0.0, 1.0]]),
    refused("alpha_req", predictions=arrays["features"][:3]),
    refused("top_k_accuracy", predictions=[[1, 2]], references=[-1]),
    refused("top_k_accuracy", predictions=[[1, 2]], references=[1], k=0),
    refused("top_k_accuracy", predictions=[[1, 2], [1]], references=[1, 1]),
]
examples = {}
for name, path in paths.items():
    code = re.findall(r"```python\\n(.*?)```", open(path + "/README.md").read(), re.DOTALL)
    lines = code[1].strip().splitlines()
    start = max(i for i, line in enumerate(lines) if line.startswith("metric.compute"))
    space = {"metric": metric[name]}
    exec("\\n".join(lines[:start]), space)
    examples[name] = eval(lines[start], space)
print(json.dumps(results | {"examples": examples}))
"""


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "features": rng.normal(size=(60, 20)) * np.linspace(0.1, 2, 20),
        "views": rng.normal(size=(30, 1, 8)) + 0.3 * rng.normal(size=(30, 4, 8)),
        "predicted": np.argsort(rng.normal(size=(60, 6)), axis=1)[:, :4],
        "labels": rng.integers(3, size=60),
    }


@pytest.fixture(scope="module")
def results(arrays: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("metrics")
    np.savez(folder / "arrays.npz", **arrays)
    paths = json.dumps({name: metric_path(name) for name in NAMES})
    environment = {**os.environ, "HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
    command = [sys.executable, "-c", LOAD_ALL, str(folder / "arrays.npz"), paths]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_numbers_are_those_of_the_package(results: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    features = arrays["features"]
    assert results["rankme"] == {"rankme": pytest.approx(rankme(features), rel=1e-12)}
    assert results["rankme of lists"]["rankme"] == pytest.approx(rankme(features, 1e-3), rel=1e-12)
    alpha = alpha_req(features, (5, 15))
    assert results["alpha_req"] == {
        "alpha_req": pytest.approx(float(alpha), rel=1e-10),
        "r2": pytest.approx(alpha.r2),
        "fit_range": [5, 15],
    }
    assert results["lidar"]["lidar"] == pytest.approx(lidar(arrays["views"], 0.01), rel=1e-10)
    hits = arrays["predicted"] == arrays["labels"][:, None]
    assert results["top_k_accuracy"] == {f"top_{k}_accuracy": hits[:, :k].any(1).mean() for k in (1, 3)}


def test_spectra_stand_for_features(arrays: dict[str, np.ndarray]) -> None:
    """What the package passes: a number per dimension, which no rounding touches on its way."""
    features = arrays["features"]
    values = np.linalg.svd(features, compute_uv=False)
    assert compute_metric("rankme", predictions=values)["rankme"] == pytest.approx(rankme(features), rel=1e-10)
    spectrum = eigenvalues(features)
    found = compute_metric("alpha_req", predictions=spectrum, fit_range=(5, 15))
    assert found["alpha_req"] == float(alpha_req(features, (5, 15)))
    assert compute_metric("lidar", predictions=np.ones(7), eps=0.0)["lidar"] == pytest.approx(7)
    with pytest.raises(InputError, match="alpha_req: 0 positive eigenvalues in the range"):
        compute_metric("alpha_req", predictions=spectrum[:3])
    assert compute_metric("alpha_req", predictions=spectrum, fit_range=(5, 15)) == found, "a refusal leaves nothing"


@pytest.mark.parametrize("classes", [1, 3, 9])
def test_of_equal_scores_the_lower_class_is_the_better(classes: int) -> None:
    scores = torch.randint(4, (200, classes), generator=torch.Generator().manual_seed(0)).float()
    scores[scores == 3] = -torch.inf
    expected = np.argsort(-scores.numpy(), axis=1, kind="stable")
    expected[np.take_along_axis(scores.numpy(), expected, 1) == -np.inf] = -1
    best = best_classes(scores)
    np.testing.assert_array_equal(best, expected[:, :5])
    labels = torch.arange(200) % classes
    hits = expected == labels[:, None].numpy()
    assert accuracies(best, labels) == {k: pytest.approx(100 * hits[:, :k].any(1).mean(), rel=1e-12) for k in (1, 5)}


def test_a_metric_is_loaded_once(monkeypatch) -> None:
    compute_metric("rankme", predictions=np.ones(2))
    monkeypatch.setattr("evaluate.load", None)
    assert compute_metric("rankme", predictions=np.ones(2), eps=0.0)["rankme"] == pytest.approx(2)


def test_caches_that_cannot_be_written_are_named(monkeypatch) -> None:
    def refuse(*arguments: Any, **named: Any) -> None:
        raise PermissionError(13, "Permission denied", "/root/.cache")

    monkeypatch.setattr("evaluate.load", refuse)
    metrics._load.cache_clear()
    with pytest.raises(InputError, match=r"evaluate cannot write its caches \(.*/root/.cache'\); set HF_HOME"):
        compute_metric("rankme", predictions=np.ones(2))


def test_bad_input_is_refused_in_one_line(results: dict[str, Any]) -> None:
    nan, short, label, k, ragged = results["refused"]
    assert nan == "features: 1 of 2 rows hold NaN or infinite values"
    assert short.startswith("alpha_req: 0 positive eigenvalues in the range (3, 100)")
    assert label == "references: classes count from 0, not -1" and k == "k: at least 1, not 0"
    assert ragged == "predictions: every row must name as many classes"


def test_the_examples_of_the_cards_give_what_they_say(results: dict[str, Any]) -> None:
    examples = results["examples"]
    assert examples["rankme"]["rankme"] == pytest.approx(31.5, abs=0.5)
    assert examples["alpha_req"]["alpha_req"] == pytest.approx(1, abs=0.05)
    assert examples["lidar"]["lidar"] == pytest.approx(8, abs=0.5)
    assert examples["top_k_accuracy"] == {"top_1_accuracy": 0.5, "top_2_accuracy": 0.5}


@pytest.mark.parametrize("name", NAMES)
def test_each_metric_has_a_card(name: str, results: dict[str, Any]) -> None:
    assert all(text.strip() for text in results["cards"][name])
    _, header, body = (Path(metric_path(name)) / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(header)
    assert card["title"] and card["description"] and card["tags"] == ["evaluate", "metric"]
    assert re.findall(r"^## (\w+)", body, re.MULTILINE) == ["Inputs", "Output", "Example", "Limits", "Citation"]
    assert results["cards"][name][1].strip() in body, "one citation, in the card and in the module"


def test_metrics_are_found_by_name(results: dict[str, Any]) -> None:
    assert available_metrics() == results["names"] == NAMES
    with pytest.raises(InputError, match="unknown metric 'rank_me': did you mean 'rankme'"):
        metric_path("rank_me")
