from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from hf_ssl_or.cli import main

TINY = {
    "data": {"dataset": "shapes", "shapes_train": 64, "shapes_test": 32},
    "encoder": {"name": "resnet18", "stem": "small", "channels": [8, 8, 8, 8]},
    "method": {"name": "barlow_twins"},
    "orthogonality": {"penalty": "so", "weight": 1e-4},
    "training": {
        "batch_size": 16,
        "max_steps": 3,
        "log_every": 1,
        "monitor_every": 1,
        "monitor_images": 32,
        "device": "cpu",
    },
    "evaluation": {"protocols": ["knn"], "baselines": True},
}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


def refusal(capsys: pytest.CaptureFixture, *argv: object) -> str:
    """Runs a command that must fail, and returns its one line."""
    assert main([str(argument) for argument in argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hf-ssl-or: error: ") and error.count("\n") == 1, error
    return error


def test_train_leaves_a_folder_with_everything(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = tmp_path / "run"
    assert main(["train", str(tiny), "--output", str(folder)]) == 0
    for name in ("recipe.yaml", "metrics.jsonl", "results.json", "encoder/config.json", "encoder/model.safetensors"):
        assert (folder / name).exists(), name
    assert (folder / "encoder" / "preprocessor_config.json").exists() and list((folder / "spectra").glob("*.npz"))
    results = json.loads((folder / "results.json").read_text())
    assert results["evaluations"][0]["protocol"] == "knn" and results["baselines"].keys() == {"pixels", "untrained"}
    layers = results["weights"].values()
    assert len(layers) == 21 and all(layer["orthogonality_error"] > 0 < layer["stable_rank"] for layer in layers)
    shown = capsys.readouterr().out
    assert "RankMe" in shown and "AutoModel.from_pretrained" in shown and "raw pixels" in shown

    assert main(["evaluate", str(folder), "--output", str(tmp_path / "again.json")]) == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["evaluations"][0]["metrics"] == results["evaluations"][0]["metrics"]


def test_preview_is_a_picture_of_all_views(tiny: Path, tmp_path: Path):
    path = tmp_path / "views.png"
    assert main(["preview", str(tiny), "views.count=3", "--images", "2", "--output", str(path)]) == 0
    assert Image.open(path).size == (4 * 100, 2 * 100)


@pytest.mark.parametrize("what", ["methods", "encoders", "datasets", "protocols", "recipes"])
def test_list(what: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    assert main(["list", what]) == 0
    expected = {
        "methods": "barlow_twins",
        "encoders": "resnet18",
        "datasets": "uoft-cs/cifar10",
        "protocols": "knn",
        "recipes": "recipes/quickstart.yaml",
    }
    assert expected[what] in capsys.readouterr().out


def test_help_shows_examples(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0 and "hf-ssl-or train recipes/quickstart.yaml" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.epoch=3", "did you mean 'epochs'"),
        ("method=barlow", "did you mean 'barlow_twins'"),
        ("encoder.name=resnet19", "resnet18"),
        ("views.count=1", "at least 2 views"),
        ("data.dataset=/no/such/folder", "/no/such/folder"),
        ("training.batch_size=1000", "batch_size"),
        ("orthogonality.weight=auto orthogonality.penalty=dso", "weight"),
        ("training.mixed_precision=fp16", "fp16 needs a GPU"),
    ],
)
def test_bad_settings(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture, override: str, message: str):
    assert message in refusal(capsys, "train", tiny, *override.split(), "--output", tmp_path / "run")


def test_a_file_that_cannot_be_written_is_named(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert "/no/such" in refusal(capsys, "preview", tiny, "--output", "/no/such/views.png")
    (tmp_path / "file").write_text("")
    assert "file" in refusal(capsys, "train", tiny, "--output", tmp_path / "file" / "run")


def test_overrides_may_follow_options(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    line = ["train", tiny, "--output", tmp_path / "run", "training.epoch=1"]
    assert "did you mean 'epochs'" in refusal(capsys, *line)
    assert "unrecognized arguments: --ouput" in refusal(capsys, "train", tiny, "--ouput", "x=1")


def test_bad_commands(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert "did you mean 'train'" in refusal(capsys, "trian", tiny)
    assert "tiny.yaml" in refusal(capsys, "train", tmp_path / "missing.yaml")
    assert "--resume" in refusal(capsys, "train", tmp_path)
    assert "recipe" in refusal(capsys, "train")
    assert "--dataset" in refusal(capsys, "evaluate", tmp_path)
    assert "at least 1" in refusal(capsys, "preview", tiny, "--images", "0")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("mine")
    assert "is not empty" in refusal(capsys, "train", tiny, "--output", tmp_path / "full")
    assert (tmp_path / "full" / "precious.txt").read_text() == "mine"


def test_options_of_other_programs_are_answered_with_ours(tiny: Path, capsys: pytest.CaptureFixture):
    assert "unrecognized argument --epochs: write training.epochs=..." in refusal(
        capsys, "train", tiny, "--epochs", "5"
    )
    assert "write training.optimizer.lr=..." in refusal(capsys, "train", tiny, "--learning-rate", "1")
    assert "'num_train_epochs': set training.epochs" in refusal(capsys, "train", tiny, "training.num_train_epochs=5")


def test_the_augmentation_graph_is_drawn_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture):
    path = tmp_path / "graph.png"
    line = ["augmentation-graph", "--augmentations", "4,1", "--repeats", "50", "--output", str(path)]
    assert main(line) == 0
    shown = capsys.readouterr().out
    assert "full graph" in shown and "0.360" in shown and f"wrote {path} and {path.with_suffix('.svg')}" in shown
    assert min(Image.open(path).size) > 200 and "augmentations of each image" in path.with_suffix(".svg").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--same", "0.7"], "add up to 1 are wanted, not same 0.7"),
        (["--same", "most"], "--same"),
        (["--augmentations", "1,x"], "whole numbers of 1 or more like 1,2,4, not '1,x'"),
        (["--augmentations", "0"], "1 or more"),
        (["--repeats", "1"], "repeats: 2 or more"),
        (["--output", "graph.pdf"], "graph.pdf: a name that ends in .png"),
        (["--output", "/no/such/graph.png"], "/no/such/graph.png: cannot be written"),
    ],
)
def test_bad_augmentation_graphs(options: list[str], message: str, capsys: pytest.CaptureFixture):
    assert message in refusal(capsys, "augmentation-graph", *options)
