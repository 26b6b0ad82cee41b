"""Damaged files of a run: each is read, or refused in one line, whoever wrote it."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from mutations import damaged, fuzz, mutated, result_or_one_line

from hf_ssl_or.hub.card import build_card, card_files, comparison_table
from hf_ssl_or.report.html import plot_figures, render_page
from hf_ssl_or.runs.reader import read_metrics, read_runs
from hf_ssl_or.training import checkpoint
from hf_ssl_or.training.checkpoint import CheckpointStore


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    store = CheckpointStore(tmp_path, keep_last=None)
    for step in (1, 2):
        store.save(step, {"method": {"w": torch.arange(6.0) * step}}, {"recipe": {"a": [1, None, "x"]}})
    store.mark_best(1, 0.5, "rankme")
    return store


def read_all(store: CheckpointStore) -> int:
    """Reads what a resumed run and a selection do; gives the step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        newest = store.latest()
    best = store.best()
    assert best is None or best["step"] in store.steps()
    if newest is None:
        return 0
    groups, state = store.load(newest)
    if int(newest.name.removeprefix("step-")) == 1:
        assert groups["method"]["w"].equal(torch.arange(6.0)) and state["recipe"] == {"a": [1, None, "x"]}
    return int(state["step"])


@pytest.mark.parametrize("file", ["step-2/state.json", "step-2/method.safetensors", "best.json"])
@fuzz
@given(data=st.data())
def test_damaged_bytes_of_a_checkpoint(file: str, data: st.DataObject, store: CheckpointStore) -> None:
    """A change is found by the checksum, and the checkpoint before it is used; nothing else comes of it."""
    path = store.folder / file
    whole = path.read_bytes()
    path.write_bytes(data.draw(damaged(whole)))
    changed = path.read_bytes() != whole
    step = result_or_one_line(lambda: read_all(store))
    if file.startswith("step-2/method"):
        assert step == (1 if changed else 2)
    path.write_bytes(whole)


@fuzz
@given(data=st.data())
def test_a_forged_state_with_a_right_checksum(data: st.DataObject, store: CheckpointStore) -> None:
    path = store.folder / "step-2" / "state.json"
    whole = path.read_text()
    content = json.loads(whole)
    del content["sha256"]
    content = data.draw(mutated(content))
    if isinstance(content, dict):
        content = json.loads(json.dumps(content))
        content["sha256"] = checkpoint._json_digest(content)
    path.write_text(json.dumps(content))
    result_or_one_line(lambda: read_all(store))
    result_or_one_line(lambda: store.load(path.parent))
    path.write_text(whole)


@fuzz
@given(data=st.data())
def test_forged_tensors_with_a_right_checksum(data: st.DataObject, store: CheckpointStore) -> None:
    folder = store.folder / "step-2"
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    tensors = data.draw(damaged(whole[folder / "method.safetensors"]))
    (folder / "method.safetensors").write_bytes(tensors)
    content = json.loads(whole[folder / "state.json"])
    del content["sha256"]
    content["files"]["method.safetensors"] = {
        "size": len(tensors),
        "sha256": checkpoint.hashlib.sha256(tensors).hexdigest(),
    }
    content["sha256"] = checkpoint._json_digest(content)
    (folder / "state.json").write_text(json.dumps(content))
    result_or_one_line(lambda: store.load(folder))
    for path, content in whole.items():
        path.write_bytes(content)


@fuzz
@given(best=mutated({"step": 1, "value": 0.5, "name": "rankme"}))
def test_a_changed_note_of_the_best_checkpoint(best: Any, store: CheckpointStore) -> None:
    (store.folder / "best.json").write_text(json.dumps(best))
    result_or_one_line(lambda: read_all(store))
    result_or_one_line(lambda: store.mark_best(2, 0.1, "rankme"))
    (store.folder / "best.json").unlink()


LINES = b'{"kind": "train", "step": 0, "loss": 1.5}\n{"kind": "monitor", "step": 1, "rankme": 9.0}\n' * 2


@fuzz
@given(
    content=damaged(LINES)
    | st.lists(mutated(json.loads(LINES.split(b"\n")[0])), max_size=4).map(
        lambda lines: "\n".join(map(json.dumps, lines)).encode()
    )
)
def test_a_damaged_log(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(content)
    for line in read_metrics(tmp_path / "metrics.jsonl").lines:
        assert isinstance(line["kind"], str) and isinstance(line["step"], int)


# -- reports and cards ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_copy(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copies") / "run"
    shutil.copytree(finished_run, folder)
    return folder


def publish(folder: Path) -> list[Callable[[], Any]]:
    """What reads the folder for others: the page, the card, what goes beside it, and the table."""

    def page() -> str:
        runs = read_runs([folder])
        sections: dict[str, list[Any]] = dict.fromkeys(("training", "collapse", "spectra", "weights", "pictures"), [])
        return render_page(runs, sections, base=folder)

    return [page, lambda: build_card(folder), lambda: card_files(folder), lambda: comparison_table([folder])]


@pytest.mark.parametrize("file", ["results.json", "recipe.yaml"])
@fuzz
@given(data=st.data())
def test_changed_results_and_recipes(file: str, data: st.DataObject, run_copy: Path) -> None:
    path = run_copy / file
    whole = path.read_text()
    tree = yaml.safe_load(whole) if file == "recipe.yaml" else json.loads(whole)
    if file == "results.json":  # the parts that are read, at the size that a search can cover
        for section in ("weights", "weights_before"):
            tree[section] = dict(list(tree[section].items())[:2])
    changed = data.draw(mutated(tree))
    path.write_text(json.dumps(changed), encoding="utf-8")
    try:
        for call in publish(run_copy):
            result_or_one_line(call)
    finally:
        path.write_text(whole)


@pytest.mark.parametrize("file", ["results.json", "recipe.yaml", "metrics.jsonl"])
@fuzz
@given(data=st.data())
def test_damaged_bytes_of_a_run(file: str, data: st.DataObject, run_copy: Path) -> None:
    path = run_copy / file
    whole = path.read_bytes()
    path.write_bytes(data.draw(damaged(whole)))
    try:
        for call in publish(run_copy):
            result_or_one_line(call)
    finally:
        path.write_bytes(whole)


def test_figures_of_strange_numbers(run_copy: Path, tmp_path: Path) -> None:
    """Figures are slow to draw: one run whose numbers are as odd as JSON allows stands for many."""
    folder = tmp_path / "odd"
    shutil.copytree(run_copy, folder)
    odd = [float("nan"), float("inf"), -1e308, 0, 10**300, -5]
    lines = [
        {"kind": kind, "step": step, **dict.fromkeys(("loss", "penalty", "rankme", "images_per_second", "lr"), value)}
        for kind in ("train", "monitor")
        for step, value in enumerate(odd)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = json.loads((folder / "results.json").read_text())
    for i, layer in enumerate(results["weights"].values()):
        layer["orthogonality_error"] = odd[i % len(odd)]
    (folder / "results.json").write_text(json.dumps(copy.deepcopy(results)))
    assert plot_figures(read_runs([folder]), tmp_path)["training"]
