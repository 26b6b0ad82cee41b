"""A run's checkpoints chosen without labels: by what the monitor wrote or by measuring; the folder that is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModel

from hf_ssl_or.cli import main
from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluate import select
from hf_ssl_or.training.checkpoint import CheckpointStore

TINY = {
    "data": {"dataset": "shapes", "shapes_train": 64, "shapes_test": 32},
    "encoder": {"name": "resnet18", "stem": "small", "channels": [8, 8, 8, 8]},
    "method": {"name": "barlow_twins"},
    "training": {
        "batch_size": 16,
        "epochs": 3,
        "save_every": 1,
        "monitor_every": 1,
        "monitor_images": 48,
        "keep_last": None,
        "device": "cpu",
    },
    "evaluation": {"protocols": []},
}
STEPS = [4, 8, 12]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("selection")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    assert main(["train", str(folder / "tiny.yaml"), "--output", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def forget_metrics(run: Path, *names: str, last_only: bool = False) -> None:
    """Takes values out of metrics.jsonl, of all looks or of the last."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines[-1:] if last_only else lines:
        for name in names:
            line.pop(name, None)
    kept = [line for line in lines if not (last_only and line is lines[-1])]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))


@pytest.mark.parametrize("measure", ["rankme", "participation_ratio", "alpha_req", "knn"])
def test_measured_again_the_values_are_those_of_the_monitor(run: Path, measure: str) -> None:
    logged = select(run, measure)
    assert logged.source == "metrics.jsonl" and list(logged.values) == STEPS
    forget_metrics(run, measure)
    measured = select(run, measure)
    assert measured.source == "checkpoints" and measured.step == logged.step
    assert list(measured.values.values()) == pytest.approx(list(logged.values.values()), rel=1e-3)
    better = min if measure == "alpha_req" else max
    key = {step: abs(value - 1) if measure == "alpha_req" else value for step, value in logged.values.items()}
    assert key[logged.step] == better(key.values())


def test_lidar_is_not_logged_and_is_measured(run: Path) -> None:
    choice = select(run, "lidar")
    assert choice.source == "checkpoints" and choice.values[choice.step] == max(choice.values.values())
    assert len(set(choice.values.values())) == 3


def test_a_look_that_is_missing_means_that_all_are_measured(run: Path) -> None:
    forget_metrics(run, last_only=True)
    assert select(run, "rankme").source == "checkpoints"


def test_the_chosen_encoder_is_written_for_from_pretrained(run: Path, tmp_path: Path, capsys) -> None:
    shutil.rmtree(run / "encoder")  # as of a run that has not ended
    output = tmp_path / "best"
    assert main(["evaluate", str(run), "--select", "rankme", "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    selection = json.loads((output / "selection.json").read_text())
    assert "chosen" in shown and selection["values"].keys() == {str(step) for step in STEPS}
    model = AutoModel.from_pretrained(output)
    assert model.config.pretraining["steps"] == selection["step"] and (output / "preprocessor_config.json").exists()
    store = CheckpointStore(run)
    groups, _ = store.load(store.folder / f"step-{selection['step']}")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, groups["method"][f"encoder.{name}"]), name
    assert main(["evaluate", str(run), "--select", "rankme", "--output", str(output)]) == 2  # it is not empty


def test_bad_input_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown measure 'rankm': did you mean 'rankme'"):
        select(run, "rankm")
    with pytest.raises(InputError, match="is no run's folder"):
        select(tmp_path, "rankme")
    weights = run / "checkpoints" / "step-8" / "method.safetensors"
    forget_metrics(run, "rankme")
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(InputError, match="step-8/method.safetensors: incomplete"):
        select(run, "rankme")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(InputError, match="no checkpoint to choose from"):
        select(run, "rankme")
    assert main(["evaluate", str(run), "--select", "rankme", "--protocols", "knn"]) == 2
