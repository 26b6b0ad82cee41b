"""The cards in `model_cards/` are what `hf-ssl-or card` writes from the files beside them, to the byte."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_ssl_or.hub.card import card_files

FOLDER = Path(__file__).parent.parent / "model_cards"
CARDS = sorted(path.parent for path in FOLDER.glob("*/README.md"))


def test_every_folder_has_a_card():
    assert CARDS and {card.name for card in CARDS} == {path.name for path in FOLDER.iterdir()}


@pytest.mark.parametrize("folder", CARDS, ids=lambda path: path.name)
def test_the_card_is_made_again_to_the_byte(folder: Path):
    text = (folder / "README.md").read_text()
    stated = re.search(r"^- The training images[^:\n]*: (.*)\.$", text.split("## License")[1], flags=re.MULTILINE)[1]
    license = ModelCard.load(folder / "README.md").data.license
    files = card_files(folder, license=license, data_license=None if stated.startswith("no license") else stated)
    assert {path: (folder / path).read_bytes() for path in files} == files
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == set(files)


@pytest.mark.parametrize("folder", CARDS, ids=lambda path: path.name)
def test_the_metadata_is_that_of_the_results(folder: Path):
    results = json.loads((folder / "results.json").read_text())
    expected = [
        value["mean"]
        for entry in results["evaluations"]
        for name, value in entry["metrics"].items()
        if not name.startswith("train_")
    ]
    assert [result.metric_value for result in ModelCard.load(folder / "README.md").data.eval_results] == expected


@pytest.mark.parametrize("folder", CARDS, ids=lambda path: path.name)
def test_the_files_are_small_and_tell_no_paths(folder: Path):
    for path in folder.rglob("*"):
        if path.is_file():
            assert path.stat().st_size < 150_000, path
            if path.suffix != ".png":
                assert not re.search(r"(^|[\s\"'`])(/|~/|[A-Z]:\\)\w", path.read_text()), path
