"""Run folders as they are found: unfinished, damaged, of several names, or no run's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hf_ssl_or.errors import InputError
from hf_ssl_or.runs.reader import read_run, read_runs
from hf_ssl_or.runs.results import Metric
from tests.run_folders import write_run


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    return lambda name, **settings: write_run(tmp_path / name, **settings)


def test_everything_of_a_finished_run_is_read(make_run) -> None:
    (run,) = read_runs([make_run("so", seed=1)])
    assert run.results is not None and not run.notes
    assert [line["step"] for line in run.train] == list(range(1, 41))  # finished steps, as file names of spectra count
    assert [line["knn"] for line in run.monitor] == [39.0, 49.0, 59.0, 69.0]
    assert [step for step, _ in run.spectra] == [10, 40] and len(run.spectra[0][1]) == 10
    knn, linear = run.evaluations
    assert knn.headline_metric == Metric(mean=61.0, std=None, values=[61.0])
    assert run.results.baseline("untrained", knn, "top1_k20").mean == 23.0
    assert linear.headline_metric.describe() == "72.25 ± 0.50" and [name for name, _ in linear.test_metrics()] == [
        "top1"
    ]
    assert run.results.baseline("untrained", linear, "top1") is None and linear.data.test.size == 500
    before = run.results.weights_before["timm_model.layer1.0.conv1.weight"]
    assert before.orthogonality_error == 4.0 and len(run.results.weights) == 8
    assert run.features["features"].shape == (300, 32) and run.neighbors["images"].shape == (3, 5, 3, 16, 16)
    assert run.views_picture is not None and run.setting("training.optimizer.lr") == 6e-3
    assert run.weight("timm_model.layer4.0.conv2.weight").shape == (64, 288)


def test_an_unfinished_run_says_so(make_run) -> None:
    (run,) = read_runs([make_run("half", finished=False)])
    assert run.results is None and run.evaluations == [] and run.train
    assert run.notes == ["This run has not finished: it has no results.json, and so no evaluations."]


def test_damaged_lines_are_counted_and_later_lines_win(make_run) -> None:
    folder = make_run("run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('\n[1]\n{"kind": "train"}\n{"kind": "train", "step": "x"}\n')
        file.write('{"kind": "train", "step": 3, "loss": 7.5, "word": "no", "large": 1e999}\n{"kind": "tra')
    (run,) = read_runs([folder])
    assert run.notes == [
        "metrics.jsonl was left out, or a part of it: damaged lines: 45, 46, 47, 48."
    ]  # 50 is cut off
    assert len(run.train) == 40 and run.train[3] == {"step": 4, "loss": 7.5, "large": float("inf")}


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
    assert [step for step, _ in run.spectra] == [10] and run.views_picture is None and run.train


def test_results_of_another_form_become_a_note(make_run) -> None:
    folder = make_run("run")
    (folder / "results.json").write_text('{"schema_version": 1, "evaluations": 5}')
    (run,) = read_runs([folder])
    assert run.results is None and run.notes == ["results.json was left out, or a part of it: recipe: is missing."]


def test_times_and_rates_are_those_of_the_log(make_run) -> None:
    run = read_run(make_run("run"))
    rates = [line["images_per_second"] for line in run.metrics.lines if line["kind"] == "train"]
    assert run.steps == 40 and run.images_per_second == pytest.approx(np.median(rates))
    assert run.step_seconds == pytest.approx(sum(256 / rate for rate in rates))
    minutes = [look["minutes"] for look in run.curve]
    assert minutes == pytest.approx([sum(256 / rate for rate in rates[:step]) / 60 for step in (10, 20, 30, 40)])
    assert [look["knn"] for look in run.curve] == [line["knn"] for line in run.monitor]


def test_checkpoints_are_listed_by_step(make_run) -> None:
    folder = make_run("run")
    for name in ("step-9", "step-10", "step-x", ".tmp-step-11"):
        (folder / "checkpoints" / name).mkdir(parents=True)
    assert read_run(folder).checkpoints == [9, 10]


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
