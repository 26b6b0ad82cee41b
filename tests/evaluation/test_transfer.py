"""Encoders by data sets: numbers are those of one encoder alone, a killed command continues, bad input is one line."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import Processes, command_line
from test_labeled import image_folder, table

from hf_ssl_or.cli import main
from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.data.loading import load_images
from hf_ssl_or.evaluation.transfer import markdown_table, short_names, table_rows
from hf_ssl_or.models.auto import create_encoder
from hf_ssl_or.models.image_conversion import Preprocessing
from hf_ssl_or.models.image_processing_ssl import build_image_processor

SHAPES = ["data.shapes_train=60", "data.shapes_test=30"]


def write_encoder(folder: Path, seed: int = 0, change=None) -> str:
    torch.manual_seed(seed)
    model = create_encoder("resnet18", image_size=16, channels=[8, 8, 8, 8], stem="small")
    if change is not None:
        with torch.no_grad():
            change(model)
    model.save_pretrained(folder)
    how = Preprocessing(image_size=16, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    build_image_processor(how).save_pretrained(folder)
    return str(folder)


def data_set(folder: Path, each: int = 8) -> str:
    return image_folder(folder, {"train": {"a": each, "b": each}, "test": {"a": 3, "b": 3}}).dataset


def test_the_table_holds_the_numbers_of_each_encoder_alone(tmp_path: Path, capsys) -> None:
    encoders = [write_encoder(tmp_path / f"net-{i}", i) for i in (0, 1)]
    folder, output = data_set(tmp_path / "pictures", each=12), tmp_path / "out"
    line = ["evaluate", *encoders, "--datasets", f"shapes,{folder}", "--protocols", "knn,few-shot", *SHAPES]
    assert main([*line, "evaluation.train_limit=50", "--output", str(output)]) == 0
    results = json.loads((output / "results.json").read_text())
    assert [encoder["name"] for encoder in results["encoders"]] == ["net-0", "net-1"]
    assert results["datasets"] == ["shapes", "pictures"] and len(results["evaluations"]) == 8
    shown = capsys.readouterr()
    assert "net-1 on pictures, few-shot" in shown.err and "pictures" in shown.out

    alone = tmp_path / "alone.json"
    options = ["--dataset", "shapes", "--protocols", "knn", "evaluation.train_limit=50", *SHAPES]
    assert main(["evaluate", encoders[1], *options, "--output", str(alone)]) == 0
    wanted = json.loads(alone.read_text())["evaluations"][0]
    found = next(e for e in results["evaluations"] if (e["encoder"], e["protocol"]) == ("net-1", "knn"))
    assert found == {"encoder": "net-1", "dataset": "shapes", **wanted}

    heads, rows = table_rows(results)
    assert heads[1:] == ["shapes knn", "shapes few-shot", "pictures knn", "pictures few-shot"]
    assert rows[1][1] == f"{wanted['metrics']['top1_k20']['mean']:.2f}" and "±" in rows[1][2]
    assert (output / "table.md").read_text() == markdown_table(results)
    capsys.readouterr()
    assert main([*line, "evaluation.train_limit=50", "--markdown"]) == 0
    assert capsys.readouterr().out == markdown_table(results)


def test_a_killed_command_goes_on_where_it_was(tmp_path: Path, monkeypatch, capsys) -> None:
    first, second = data_set(tmp_path / "first"), str(tmp_path / "second")
    cache, output = tmp_path / "cache", tmp_path / "results.json"
    os.mkfifo(tmp_path / "gate")  # the second data set blocks in the middle: its image is a pipe that nobody fills
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / "second" / split / name).mkdir(parents=True)
            Image.fromarray(np.full((12, 12, 3), 90, np.uint8)).save(tmp_path / f"second/{split}/{name}/0.png")
    os.symlink(tmp_path / "gate", tmp_path / "second" / "train" / "a" / "1.png")
    encoder = write_encoder(tmp_path / "net")
    line = ["evaluate", encoder, "--datasets", f"{first},{second}", "--protocols", "few-shot", "--output", str(output)]
    environment = {"HF_SSL_OR_CACHE": str(cache)}
    started = Processes(command_line, line, log=tmp_path / "log", environment=environment)
    assert started.wait_for(lambda: bool(list(cache.glob("evaluation/cells/*.json")))), started.wait().errors
    started.kill()
    assert started.wait().statuses == [-signal.SIGKILL] and not output.exists()

    (cell,) = cache.glob("evaluation/cells/*.json")
    content = json.loads(cell.read_text())
    content["result"]["metrics"]["top1_n10"]["mean"] = 12.34  # a mark that no computation would give
    cell.write_text(json.dumps(content))
    os.unlink(tmp_path / "second" / "train" / "a" / "1.png")
    monkeypatch.setenv("HF_SSL_OR_CACHE", str(cache))
    assert main(line) == 0
    told = capsys.readouterr().err
    assert "net on first, few-shot: 12.34" in told and told.count("(known)") == 1 and "net on second" in told
    entries = json.loads(output.read_text())["evaluations"]
    assert [entry["dataset"] for entry in entries] == ["first", "second"]
    assert not list(cache.glob("evaluation/**/.*"))


def test_other_labels_seeds_or_weights_are_other_cells(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("HF_SSL_OR_CACHE", str(tmp_path / "cache"))
    labels = {"train": ["a", "b", "b", "a"] * 3, "test": ["a", "b"]}
    one, other = (table(tmp_path / name, labels).dataset for name in ("one", "other"))
    encoder = write_encoder(tmp_path / "net")

    def known(*options: str, net: str = encoder, dataset: str = one) -> bool:
        line = ["evaluate", net, "--datasets", dataset, "--protocols", "few-shot", *options]
        assert main(line) == 0
        return "(known)" in capsys.readouterr().err

    assert [known(), known(), known(dataset=other), known("evaluation.seeds=[1]")] == [False, True, False, False]
    assert [known(net=write_encoder(tmp_path / "net-1", seed=1)), known()] == [False, True]
    files = list((tmp_path / "cache" / "evaluation" / "features").glob("*.safetensors"))
    assert len(files) == 6  # two splits, for two nets, and for two data sets
    files[0].write_bytes(b"torn")
    assert not known("evaluation.seeds=[2]")


def test_squares_are_stored_as_the_encoder_gets_them(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_SSL_OR_CACHE", str(tmp_path / "cache"))
    folder = data_set(tmp_path / "pictures")
    line = ["evaluate", "random:timm:test_resnet@40", "--datasets", folder, "--protocols", "few-shot"]
    assert main([*line, "data.cache=disk", "--output", str(tmp_path / "r.json")]) == 0
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["encoders"][0]["image_size"] == 40
    files = sorted(path.stat().st_size for path in (tmp_path / "cache").glob("*-square-*.uint8"))
    assert files == [n * 40 * 40 * 3 for n in (6, 16)]
    images = load_images(DataArguments(dataset=folder, image_size=40), "train")
    assert results["evaluations"][0]["data"]["train"]["fingerprint"] == images.fingerprint


def refusal(capsys, *argv: str) -> str:
    assert main(list(argv)) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("hf-ssl-or: error: ")
    return error[-1]


def test_bad_encoders_and_data_sets_end_in_one_line(tmp_path: Path, capsys) -> None:
    folder = data_set(tmp_path / "pictures")
    options = ["--datasets", folder, "--protocols"]
    broken = write_encoder(tmp_path / "nan", change=lambda model: next(model.parameters()).fill_(torch.nan))
    assert "features are NaN or infinite for 16 of 16 images" in refusal(capsys, "evaluate", broken, *options, "knn")
    net = write_encoder(tmp_path / "net")
    assert "k=20 neighbors of a bank of 16 images" in refusal(capsys, "evaluate", net, *options, "knn")
    one = image_folder(tmp_path / "one", {"train": {"a": 9}, "test": {"a": 1}}).dataset
    assert "has no labels" in refusal(capsys, "evaluate", net, "--datasets", one)
    same = table(tmp_path / "same", {"train": ["a"] * 30, "test": ["a"]}).dataset
    assert "one class only" in refusal(capsys, "evaluate", net, "--datasets", same, "--protocols", "knn")
    assert "unknown evaluation protocol 'kn'" in refusal(capsys, "evaluate", net, *options, "kn")
    assert "one is named twice" in refusal(capsys, "evaluate", net, net, *options, "knn")
    assert "name them" in refusal(capsys, "evaluate", net, net)
    assert "there is no folder /no/such" in refusal(capsys, "evaluate", net, "--datasets", "/no/such")
    assert "name an encoder" in refusal(capsys, "evaluate", "data.image_size=3")


def test_a_collapsed_encoder_is_evaluated_and_said(tmp_path: Path, capsys) -> None:
    flat = write_encoder(tmp_path / "flat", change=lambda model: [p.zero_() for p in model.parameters()])
    line = ["evaluate", flat, "--datasets", data_set(tmp_path / "pictures"), "--protocols", "linear-lbfgs,few-shot"]
    assert main([*line, "--output", str(tmp_path / "r.json")]) == 0
    assert "hf-ssl-or: warning: linear-lbfgs: all train images have the same features" in capsys.readouterr().err
    metrics = json.loads((tmp_path / "r.json").read_text())["evaluations"][0]["metrics"]
    assert metrics["top1"]["mean"] == pytest.approx(50)


def test_names_are_as_short_as_they_can_be(tmp_path: Path) -> None:
    for name in ("a/encoder", "b/encoder", "c"):
        (tmp_path / name).mkdir(parents=True)
    paths = [str(tmp_path / name) for name in ("a/encoder", "b/encoder", "c")]
    assert short_names([*paths[:2], "org/net"], "encoder") == ["a/encoder", "b/encoder", "org/net"]
    assert short_names([f"random:{paths[2]}", paths[2], "timm:x"], "encoder") == ["random:c", "c", "timm:x"]
