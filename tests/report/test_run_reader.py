"""Run folders as they are found: unfinished, damaged, of several names, or no run's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hf_ssl_or.errors import InputError
from hf_ssl_or.report.run_reader import read_runs, read_weight


def test_everything_of_a_finished_run_is_read(make_run) -> None:
    (run,) = read_runs([make_run("so", seed=1)])
    assert run.finished and not run.notes
    assert [line["step"] for line in run.train] == list(range(1, 41))  # finished steps, as file names of spectra count
    assert [line["knn"] for line in run.monitor] == [39.0, 49.0, 59.0, 69.0]
    assert [step for step, _ in run.spectra] == [10, 40] and len(run.spectra[0][1]) == 10
    knn, linear = run.scores
    assert (knn.mean, knn.std, knn.values, knn.headline, knn.baselines) == (61.0, None, 1, True, {"untrained": 23.0})
    assert (linear.mean, linear.std, linear.values, linear.baselines) == (72.25, 0.5, 3, {})
    assert linear.data == "shapes (2000) → shapes (500)"
    assert run.errors_before["timm_model.layer1.0.conv1.weight"] == 4.0 and len(run.errors) == 8
    assert run.features["features"].shape == (300, 32) and run.neighbors["images"].shape == (3, 5, 3, 16, 16)
    assert run.preview is not None and run.setting("training.optimizer.lr") == 6e-3
    assert read_weight(run, "timm_model.layer4.0.conv2.weight").shape == (64, 288)


def test_an_unfinished_run_says_so(make_run) -> None:
    (run,) = read_runs([make_run("half", finished=False)])
    assert not run.finished and run.scores == [] and run.train
    assert run.notes == ["This run has not finished: it has no results.json, and so no evaluations."]


def test_damaged_lines_are_counted_and_later_lines_win(make_run) -> None:
    folder = make_run("run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('\n[1]\n{"kind": "train"}\n{"kind": "train", "step": "x"}\n')
        file.write('{"kind": "train", "step": 3, "loss": 7.5, "word": "no"}\n{"kind": "tra')
    (run,) = read_runs([folder])
    assert len(run.notes) == 1 and "5 damaged lines" in run.notes[0] and "lines 45, 46, 47, 48, 50" in run.notes[0]
    assert len(run.train) == 40 and run.train[3] == {"step": 4, "loss": 7.5}


def test_damaged_files_become_notes(make_run) -> None:
    folder = make_run("run")
    (folder / "results.json").write_text('{"evaluations": [{"metr')
    (folder / "recipe.yaml").write_text("a: [1\n\tb")
    (folder / "spectra" / "step-40.npz").write_bytes(b"PK\x03\x04 cut off")
    (folder / "features.npz").write_bytes(b"\x00" * 50)
    np.savez(folder / "neighbors.npz", images=np.zeros(3), distances=np.zeros(2))
    (folder / "figures" / "views.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\x00" * 40)
    (run,) = read_runs([folder])
    named = ("results.json", "recipe.yaml", "step-40", "features.npz", "neighbors.npz", "views.png")
    assert len(run.notes) == len(named) and all(any(name in note for note in run.notes) for name in named), run.notes
    assert [step for step, _ in run.spectra] == [10] and run.preview is None and run.train


@pytest.mark.parametrize(
    "results",
    [
        {"evaluations": [{"metrics": {"top1": 3}}]},
        {"evaluations": 5, "weights": [1]},
        {"evaluations": [7], "baselines": 3, "weights": {"a": 1}},
    ],
)
def test_results_of_another_shape_become_a_note(make_run, results: dict) -> None:
    folder = make_run("run")
    (folder / "results.json").write_text(json.dumps(results))
    (run,) = read_runs([folder])
    assert run.scores == [] and run.errors == {} and "an evaluation cannot be read" in run.notes[0]


def test_pickles_are_not_loaded(make_run) -> None:
    folder = make_run("run")
    np.savez(folder / "features.npz", features=np.array([[object()]], dtype=object))
    (run,) = read_runs([folder])
    assert run.features == {} and "features.npz" in run.notes[0]


def test_names_are_unique_short_and_printable(make_run) -> None:
    folders = [make_run("a/seed0"), make_run("b/seed0"), make_run("b/x\x1b[31m\nred")]
    assert [run.name for run in read_runs([*folders, folders[0]])] == ["a/seed0", "b/seed0", "b/x\ufffd[31m\ufffdred"]
    assert [run.name for run in read_runs(folders[1:])] == ["seed0", "x\ufffd[31m\ufffdred"]


def test_what_is_no_run_is_refused(tmp_path: Path, make_run) -> None:
    (tmp_path / "photos").mkdir()
    for folder in (tmp_path / "photos", tmp_path / "missing"):
        with pytest.raises(InputError, match=f"{folder.name}: is no run's folder"):
            read_runs([make_run(f"good-{folder.name}"), folder])
    with pytest.raises(InputError, match="11 runs: a report shows 1 to 10"):
        read_runs([tmp_path / str(i) for i in range(11)])
