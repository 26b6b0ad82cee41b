"""A run that is killed or asked to stop at any instant, and resumed, ends bitwise as the uninterrupted run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from processes import REPOSITORY, Ended, Processes, command_line
from safetensors.torch import load_file

RECIPE = {
    "data": {"dataset": "shapes", "image_size": 32, "shapes_train": 80, "shapes_test": 20},
    "encoder": {
        "name": "resnet18",
        "stem": "small",
        "channels": [8, 8, 16, 16],
        "model_args": {"layers": [1, 1, 1, 1]},
    },
    "method": {"name": "byol"},  # a teacher, a predictor and their statistics are part of the state
    "views": {"count": 2, "size_schedule": [[0, 16], [0.5, 32]]},
    "orthogonality": {"penalty": "srip", "weight": 1e-3},  # its vectors too
    "training": {
        "batch_size": 16,
        "epochs": 6,  # of 5 steps each
        "log_every": 1,
        "monitor_every": 3,
        "monitor_images": 64,
        "save_steps": 3,
        "device": "cpu",
        "optimizer": {"name": "adamw", "lr": 0.003, "warmup_epochs": 1, "weight_decay_end": 0.1},
    },
    "evaluation": {"protocols": ["knn"]},
}
STEPS = 30


def cold(*arguments: object) -> None:
    """Runs a command line as people do, with an interpreter that has imported nothing."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", *(str(argument) for argument in arguments)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


def start(*arguments: object, log: Path) -> Processes:
    return Processes(command_line, ["train", *(str(argument) for argument in arguments)], log=log)


def run(*arguments: object, log: Path) -> Ended:
    return start(*arguments, log=log).wait(240)


def interrupt(recipe: Path, folder: Path, step: int, number: signal.Signals) -> Ended:
    """Starts a run and sends it a signal once the metrics show that `step` is done."""
    metrics = folder / "metrics.jsonl"
    started = start(recipe, "--output", folder, log=folder.with_name("interrupted.log"))
    started.wait_for(lambda: metrics.exists() and metrics.read_text().count('"kind": "train"') > step, timeout=200)
    started.kill(number)
    return started.wait(120)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


@pytest.fixture(scope="module")
def whole_run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    os.environ["HF_SSL_OR_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    folder = tmp_path_factory.mktemp("runs") / "whole"
    cold("hf_ssl_or", "train", recipe, "--output", folder)
    return folder


def assert_same_end(folder: Path, whole: Path) -> None:
    for name in ("encoder/model.safetensors", *(f"checkpoints/step-{STEPS}/{g}.safetensors" for g in GROUPS)):
        want, got = load_file(whole / name), load_file(folder / name)
        assert want.keys() == got.keys()
        for key in want:
            assert want[key].equal(got[key]), f"{name}: {key} differs"


GROUPS = ("method", "optimizer", "orthogonality")


def test_killed_at_a_random_step_and_resumed(recipe: Path, whole_run: Path, tmp_path: Path):
    step = random.SystemRandom().randrange(1, STEPS - 2)
    folder = tmp_path / "run"
    killed = interrupt(recipe, folder, step, signal.SIGKILL)
    assert killed.statuses == [-signal.SIGKILL], f"was to be killed after step {step}:\n{killed.errors[-2000:]}"
    resumed = run(folder, "--resume", log=tmp_path / "log")
    assert resumed.statuses == [0], resumed.errors[-3000:]
    assert_same_end(folder, whole_run)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(STEPS))


def test_sigterm_saves_and_exits_with_its_own_status(recipe: Path, whole_run: Path, tmp_path: Path):
    folder = tmp_path / "run"
    stopped = interrupt(recipe, folder, 4, signal.SIGTERM)
    assert stopped.statuses == [75], stopped.errors[-3000:]
    assert "SIGTERM" in stopped.errors and "--resume" in stopped.errors
    done = max(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*"))
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert done == max(line["step"] for line in logged) + 1, "the step was finished and saved"
    assert run(recipe, "--output", folder, "--resume", log=tmp_path / "log").statuses == [0]
    assert_same_end(folder, whole_run)


def test_two_processes_train_evaluate_and_save_as_one_does(recipe: Path, whole_run: Path, tmp_path: Path):
    folder = tmp_path / "run"
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    cold(*launch, "hf_ssl_or", "train", recipe, "--output", folder)
    want, got = ([json.loads(line) for line in (f / "metrics.jsonl").open()] for f in (whole_run, folder))
    assert [line["loss"] for line in got if "loss" in line][:3] == pytest.approx(
        [line["loss"] for line in want if "loss" in line][:3], rel=1e-5
    )
    assert json.loads((folder / "results.json").read_text())["environment"]["processes"] == 2
    assert (folder / "encoder" / "model.safetensors").exists()


def test_a_finished_run_resumes_to_itself_and_refuses_another_recipe(recipe: Path, whole_run: Path, tmp_path: Path):
    before = (whole_run / "encoder" / "model.safetensors").read_bytes()
    checkpoints = sorted((whole_run / "checkpoints").iterdir())
    (whole_run / "checkpoints" / ".tmp-gone-20").mkdir()  # a kill while an old checkpoint was being removed
    assert run(recipe, "--output", whole_run, "--resume", log=tmp_path / "log").statuses == [0]
    assert (whole_run / "encoder" / "model.safetensors").read_bytes() == before
    assert sorted((whole_run / "checkpoints").iterdir()) == checkpoints
    other = run(recipe, "--output", whole_run, "training.seed=7", "--resume", log=tmp_path / "other")
    assert other.statuses == [2]
    assert "training.seed was 0, is 7" in other.errors and other.errors.count("\n") == 1
    again = run(recipe, "--output", whole_run, log=tmp_path / "again")
    assert again.statuses == [2]
    assert "is not empty" in again.errors and again.errors.count("\n") == 1
