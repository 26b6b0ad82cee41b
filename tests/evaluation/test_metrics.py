"""Each metric loads by its path in a fresh process without a network, and gives the package's own numbers."""

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
from hf_ssl_or.evaluation.collapse import alpha_req, lidar, rankme
from hf_ssl_or.evaluation.metrics import available_metrics, metric_path
from hf_ssl_or.evaluation.protocols.knn import knn_accuracy

pytest.importorskip("evaluate")

NAMES = ["alpha_req", "knn_accuracy", "lidar", "rankme", "top_k_accuracy"]
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
        predictions=arrays["scores"], references=arrays["labels"], k=[1, 3]
    ),
    "knn_accuracy": metric["knn_accuracy"].compute(
        predictions=arrays["features"], references=arrays["labels"], bank=arrays["bank"],
        bank_labels=arrays["bank_labels"], k=(5, 20),
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
    refused("top_k_accuracy", predictions=[[0.1, 0.2]], references=[2]),
    refused("top_k_accuracy", predictions=[[0.1, 0.2]], references=[1], k=0),
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
        "scores": rng.integers(4, size=(60, 6)).astype(float),  # with ties
        "labels": rng.integers(3, size=60),
        "bank": rng.normal(size=(50, 20)),
        "bank_labels": rng.integers(3, size=50),
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
    tensors = [torch.from_numpy(arrays[name]) for name in ("bank", "bank_labels", "features", "labels")]
    percent = knn_accuracy(*tensors, k=(5, 20))
    assert results["knn_accuracy"] == {name: pytest.approx(value / 100) for name, value in percent.items()}


def test_top_k_counts_equal_scores_by_class(results: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    best = np.argsort(-arrays["scores"], axis=1, kind="stable")
    hits = best == arrays["labels"][:, None]
    expected = {f"top_{k}_accuracy": pytest.approx(hits[:, :k].any(1).mean()) for k in (1, 3)}
    assert results["top_k_accuracy"] == expected


def test_bad_input_is_refused_in_one_line(results: dict[str, Any]) -> None:
    nan, short, label, k = results["refused"]
    assert nan == "features: 1 of 2 rows hold NaN or infinite values"
    assert short.startswith("alpha_req: 0 positive eigenvalues in the range (3, 100)")
    assert label.startswith("references: classes must be from 0 to 1") and k == "k: at least 1, not 0"


def test_the_examples_of_the_cards_give_what_they_say(results: dict[str, Any]) -> None:
    examples = results["examples"]
    assert examples["rankme"]["rankme"] == pytest.approx(31.5, abs=0.5)
    assert examples["alpha_req"]["alpha_req"] == pytest.approx(1, abs=0.05)
    assert examples["lidar"]["lidar"] == pytest.approx(8, abs=0.5)
    assert examples["top_k_accuracy"] == {"top_1_accuracy": 0.5, "top_2_accuracy": 0.5}
    assert examples["knn_accuracy"] == {"top1_k2": 1.0, "top5_k2": 1.0}


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


def test_the_package_itself_does_not_need_evaluate() -> None:
    package = Path(metric_path("rankme")).parents[2]
    scripts = {package / "evaluation" / "metrics" / name / f"{name}.py" for name in NAMES}
    for path in set(package.rglob("*.py")) - scripts:
        assert not re.search(r"^\s*(?:import|from) evaluate\b", path.read_text(), re.MULTILINE), path
