"""Cards: equal to the run's files number by number, honest about what is missing, and deaf to what names would do."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from markdown_it import MarkdownIt
from PIL import Image

from hf_ssl_or.cli import main
from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation.collapse import collapse_report, weight_report
from hf_ssl_or.evaluation.evaluator import evaluate_features
from hf_ssl_or.evaluation.protocols import get_protocol
from hf_ssl_or.hub.card import build_card, card_files, comparison_table, write_card
from hf_ssl_or.hub.export import timm as timm_export
from hf_ssl_or.hub.export.model import read_portable
from hf_ssl_or.hub.markdown import block
from hf_ssl_or.hub.redaction import without_paths
from hf_ssl_or.methods import available_methods, get_method
from hf_ssl_or.models.auto import create_encoder
from hf_ssl_or.models.image_conversion import Preprocessing
from hf_ssl_or.models.image_processing_ssl import build_image_processor
from hf_ssl_or.recipe import recipe_from_dict
from hf_ssl_or.training.finish import environment

Change = Callable[[dict[str, Any], dict[str, Any]], None]
MakeRun = Callable[..., Path]
PIXELS: dict[str, Any] = {"image_size": 32, "crop_pct": 0.9, "mean": [0.5] * 3, "std": [0.2] * 3}


@pytest.fixture(scope="module")
def material() -> tuple[dict[str, Any], dict[str, Any]]:
    """A resolved recipe, and results of the form and with the numbers that the package's own functions give."""
    torch.set_num_threads(1)
    tree = {"dataset": "photos", "image_size": 32}
    recipe = recipe_from_dict({"data": tree, "views": {"count": 4}, "training": {"epochs": 9}}).to_dict()
    encoder = create_encoder("resnet18", stem="small", channels=[4, 4, 8, 8], image_size=32)
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(260, 8, generator=generator), torch.arange(260) % 6
    split = (
        features[:200] + labels[:200, None] / 3,
        labels[:200],
        features[200:] + labels[200:, None] / 3,
        labels[200:],
    )
    data = {
        side: {"name": "photos", "fingerprint": "f6be", "size": size} for side, size in (("train", 200), ("test", 60))
    }
    evaluated = [evaluate_features(get_protocol(name), *split, seeds=[0, 1, 2]) for name in ("knn", "linear-sgd")]
    noise = evaluate_features(get_protocol("knn"), features[:200], labels[:200], features[200:], labels[200:])
    results = {
        "schema_version": 1,
        "recipe": recipe,
        "run": {"steps": 40, "train_seconds_this_session": 372.0},
        "data": {"name": "photos", "fingerprint": "f6be", "images": 20000, "preprocessing": PIXELS},
        "evaluations": [entry | {"data": data} for entry in evaluated],
        "collapse": collapse_report(features),
        "weights": weight_report(encoder),
        "weights_before": weight_report(encoder),
        "baselines": {"untrained": [noise]},
        "environment": environment(torch.device("cpu"), 1),
    }
    return recipe, json.loads(json.dumps(results))


@pytest.fixture
def make_run(tmp_path: Path, material: tuple[dict[str, Any], dict[str, Any]]) -> MakeRun:
    def make(change: Change = lambda recipe, results: None, name: str = "run") -> Path:
        recipe, results = copy.deepcopy(material)
        change(recipe, results)
        folder = tmp_path / name
        folder.mkdir()
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        if results:
            (folder / "results.json").write_text(json.dumps(results))
        lines = [{"kind": "train", "step": step, "images_per_second": 512.0} for step in (19, 39)]
        lines.insert(1, {"kind": "monitor", "step": 19, "rankme": 3.0})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "figures").mkdir()
        Image.new("RGB", (8, 8)).save(folder / "figures" / "spectra.png")
        return folder

    return make


def shown(results: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [
        (entry["protocol_hash"], name, value)
        for entry in results["evaluations"]
        for name, value in entry["metrics"].items()
        if not name.startswith("train_")
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def test_the_metadata_holds_the_numbers_of_the_results(make_run: MakeRun, tmp_path: Path):
    run = make_run()
    build_card(run, repo_id="lab/encoder").save(tmp_path / "README.md")
    loaded = ModelCard.load(tmp_path / "README.md")
    expected = shown(json.loads((run / "results.json").read_text()))
    found = [(r.metric_args["protocol_hash"], r.metric_name, r.metric_value) for r in loaded.data.eval_results]
    assert len(found) == 6
    for (digest, name, value), (wanted_digest, wanted_name, wanted) in zip(found, expected, strict=True):
        assert digest == wanted_digest and value == wanted["mean"] and f" {wanted_name}," in name
    assert [r.metric_args.get("std") for r in loaded.data.eval_results] == [value["std"] for _, _, value in expected]
    assert loaded.data.eval_results[-1].metric_args["seeds"] == [0, 1, 2]
    assert {(r.dataset_name, r.dataset_split) for r in loaded.data.eval_results} == {("photos", "test")}
    assert loaded.data.model_name == "encoder" and loaded.data.pipeline_tag == "image-feature-extraction"
    assert str(loaded) == (tmp_path / "README.md").read_text()


def test_the_tables_hold_the_numbers_of_the_results(make_run: MakeRun):
    run = make_run()
    text, results = str(build_card(run)), json.loads((run / "results.json").read_text())
    rows = [line.strip("| ").split(" | ") for line in section(text, "Evaluation").splitlines() if "|" in line]
    numbers = [row[-2].strip("*") for row in rows[2:]]
    spreads = ["" if value["std"] is None else f" ± {value['std']:.2f}" for _, _, value in shown(results)]
    assert numbers == [f"{v['mean']:.2f}{spread}" for (_, _, v), spread in zip(shown(results), spreads, strict=True)]
    first = results["evaluations"][0]["metrics"]["top1_k20"]["mean"]
    untrained = results["baselines"]["untrained"][0]["metrics"]["top1_k20"]["mean"]
    assert f"| `knn` | `53a583e01993` | top-1, k = 20 | – | **{first:.2f}** | {untrained:.2f} |" in text
    assert "| top-1 | 0, 1, 2 | **" in text and "standard deviation over the probe's seeds" in text
    collapse = section(text, "Dimensional collapse")
    assert f"| RankMe | {results['collapse']['rankme']:.4g} |" in collapse and "8 features of 260 training" in collapse
    for name, layer in results["weights"].items():
        assert f"| `{name}` | {layer['orthogonality_error']:.3g} | {layer['orthogonality_error']:.3g} |" in collapse
    assert "![" in collapse and "](figures/spectra.png)" in collapse


def test_a_baseline_of_another_protocol_is_not_shown(make_run: MakeRun):
    def change(recipe: dict[str, Any], results: dict[str, Any]) -> None:
        results["baselines"]["untrained"][0]["protocol_hash"] = "another"

    rows = [line for line in section(str(build_card(make_run(change))), "Evaluation").splitlines() if "top-" in line]
    assert len(rows) == 6 and all(row.endswith("| – |") for row in rows)


def test_time_is_that_of_the_log(make_run: MakeRun):
    compute = section(str(build_card(make_run())), "Compute")
    assert "| Time in training steps | 20 s |" in compute  # 40 steps of 256 images at 512 images/s
    assert "| Speed, median | 512 images/s" in compute and "monitoring and checkpoints | 6.2 min |" in compute
    assert "| Energy | not measured |" in compute


def test_the_table_of_runs(make_run: MakeRun):
    def other(recipe: dict[str, Any], results: dict[str, Any]) -> None:
        recipe["orthogonality"]["penalty"] = "none"
        recipe["training"]["epochs"] = 200
        results["evaluations"] = results["evaluations"][:1]
        results["evaluations"][0]["protocol_hash"] = "another"

    runs = [make_run(), make_run(other, "other")]
    results = [json.loads((run / "results.json").read_text()) for run in runs]
    lines = comparison_table(runs).splitlines()
    head, first, second = (re.split(r" \| ", line.strip("| ")) for line in (lines[0], *lines[2:]))
    assert head[:5] == ["Encoder", "Method", "Penalty", "Views", "Epochs"]
    assert head[5:] == [
        "`knn` top-1, k = 20, % (`53a583e01993`)",
        "`linear-sgd` top-1, % (`e8ba6cb5e662`)",
        "`knn` top-1, k = 20, % (`another`)",
        *("RankMe", "α-ReQ", "Minutes"),
    ]
    knn, linear = (entry["metrics"][entry["headline"]] for entry in results[0]["evaluations"])
    spread = f"{linear['mean']:.2f} ± {linear['std']:.2f}"
    rank, alpha = (f"{results[0]['collapse'][name]:.4g}" for name in ("rankme", "alpha_req"))
    same = ["`resnet18`", "`barlow_twins`"]
    assert first == [*same, "`so`", "4", "9", f"{knn['mean']:.2f}", spread, "–", rank, alpha, "0.3"]
    assert second == [*same, "`none`", "4", "200", "–", "–", f"{knn['mean']:.2f}", rank, alpha, "0.3"]


# ---------------------------------------------------------------------------------------------------------------------
# What is said, and what is not


def section(text: str, name: str) -> str:
    return text.split(f"\n## {name}\n", 1)[1].split("\n## ", 1)[0]


def unlabeled(recipe: dict[str, Any], results: dict[str, Any]) -> None:
    results.update(evaluations=[], baselines={})


def bare(recipe: dict[str, Any], results: dict[str, Any]) -> None:
    recipe["encoder"]["model_args"] = {"drop_rate": None}
    recipe["orthogonality"]["penalty"] = "none"
    results.clear()


@pytest.mark.parametrize("change", [lambda recipe, results: None, unlabeled, bare])
@pytest.mark.parametrize("repo_id", [None, "lab/encoder"])
def test_no_placeholder_is_left(make_run: MakeRun, change: Change, repo_id: str | None):
    text = str(build_card(make_run(change), repo_id=repo_id))
    for placeholder in ("More Information Needed", "None", "{{", "{%", "TODO", "nan", "Undefined"):
        assert placeholder not in text
    assert "\n\n\n" not in text and not re.search(r"[ \t]\n", text)


def test_without_labels_the_card_says_that_no_accuracy_was_measured(make_run: MakeRun):
    card = build_card(make_run(unlabeled))
    assert card.data.eval_results is None and "model-index" not in str(card)
    assert "No accuracy was measured" in section(str(card), "Evaluation")
    assert "RankMe" in section(str(card), "Dimensional collapse") and "No accuracy was measured." in str(card)


def test_a_run_without_results_gets_a_card(make_run: MakeRun):
    run = make_run()
    (run / "results.json").unlink()
    (run / "figures" / "spectra.png").unlink()
    text = str(build_card(run))
    assert "No accuracy was measured, and no label-free measure" in text and "![" not in text
    assert "had not ended or was not evaluated" in text and "9 epochs, 40 steps of 256 images" in text
    assert "results.json" not in card_files(run)


def test_licenses_are_those_that_were_stated(make_run: MakeRun):
    run = make_run()
    silent = build_card(run)
    assert silent.data.license is None and "\nlicense" not in str(silent)
    assert section(str(silent), "License").count("no license was stated") == 2
    stated = build_card(run, license="apache-2.0", data_license="CC BY 4.0, <b>mine</b>")
    assert stated.data.license == "apache-2.0" and "This model: `apache-2.0`." in str(stated)
    assert "CC BY 4.0, &#60;b&#62;mine&#60;/b&#62;" in str(stated)
    with pytest.raises(InputError, match="no identifier of the Hub"):
        build_card(run, license="mit\ntags: [x]")


def test_a_name_that_the_hub_refuses(make_run: MakeRun):
    with pytest.raises(InputError, match="no Hub id"):
        build_card(make_run(), repo_id="lab/a b")


@pytest.mark.parametrize(
    ("penalty", "views", "keys"),
    [
        ("so", 4, {"he2024preventing", "bansal2018gain", "ghosh2024harnessing"}),
        ("srip", 2, {"he2024preventing", "bansal2018gain"}),
        ("dso", 2, {"bansal2018gain"}),
        ("none", 2, set()),
    ],
)
def test_citations_are_those_of_what_was_used(make_run: MakeRun, penalty: str, views: int, keys: set[str]):
    def change(recipe: dict[str, Any], results: dict[str, Any]) -> None:
        recipe["orthogonality"] |= {"penalty": penalty, "weight": 1e-6}
        recipe["views"]["count"] = views

    cited = set(re.findall(r"@\w+\{(\w+),", section(str(build_card(make_run(change))), "Citation")))
    assert cited == keys | {"zbontar2021barlow"}


@pytest.mark.parametrize("name", available_methods())
def test_every_method_is_named_and_cited(make_run: MakeRun, name: str):
    def change(recipe: dict[str, Any], results: dict[str, Any]) -> None:
        recipe["method"]["name"] = name

    text = str(build_card(make_run(change)))
    assert get_method(name).citation in section(text, "Citation") and f"by `{name}` on 4 views" in text


def test_a_method_from_elsewhere_is_not_imported(make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "stranger.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)

    def change(recipe: dict[str, Any], results: dict[str, Any]) -> None:
        recipe["method"]["name"] = "stranger"

    assert "`stranger`, a method from outside this package" in str(build_card(make_run(change)))


def test_the_papers_weight_is_given_as_a_number(make_run: MakeRun):
    assert "soft orthogonality (SO), weight 1e-06" in str(build_card(make_run()))


def shapes(recipe: dict[str, Any], results: dict[str, Any]) -> None:
    recipe["data"]["dataset"] = "shapes"


def large(recipe: dict[str, Any], results: dict[str, Any]) -> None:
    recipe["data"]["image_size"], recipe["training"]["epochs"], recipe["training"]["seed"] = 224, 400, 7


def no_baselines(recipe: dict[str, Any], results: dict[str, Any]) -> None:
    results["baselines"] = {}
    results["evaluations"][1]["seeds"] = [0]
    results["evaluations"][0]["data"]["test"]["name"] = "others"


@pytest.mark.parametrize(
    ("change", "said", "not_said"),
    [
        (shapes, ["generated shapes", "images of 32 × 32 pixels", "short: 9 epochs", "seed (0)"], ["No baseline"]),
        (large, ["seed (7)"], ["detail is lost", "short", "generated"]),
        (no_baselines, ["No baseline was measured", "trained once"], ["evaluated on `others` only"]),
        (lambda recipe, results: None, ["evaluated on `photos` only"], ["trained once", "generated shapes"]),
    ],
)
def test_limits_follow_from_facts(make_run: MakeRun, change: Change, said: list[str], not_said: list[str]):
    limits = section(str(build_card(make_run(change))), "Limitations")
    assert all(words in limits for words in said) and not any(words in limits for words in not_said)
    assert "The training images were not examined for biases and sensitive content." in limits


def small_stem(recipe: dict[str, Any], results: dict[str, Any]) -> None:
    recipe["encoder"]["stem"] = "small"


def continued(recipe: dict[str, Any], results: dict[str, Any]) -> None:
    recipe["encoder"]["init_from"] = "lab/other"


def test_timm_is_named_where_it_can_build_the_encoder(make_run: MakeRun):
    assert '"hf-hub:lab/encoder"' in section(str(build_card(make_run(), repo_id="lab/encoder")), "How to use")
    assert "export encoder --to timm" in section(str(build_card(make_run(name="local"))), "How to use")
    small = section(str(build_card(make_run(small_stem, "small"))), "How to use")
    assert "timm cannot build this encoder: the small stem" in small and "import timm" not in small
    assert "timm" not in section(str(build_card(make_run(continued, "continued"))), "How to use")


def wide(value_range: Any) -> Change:
    def change(recipe: dict[str, Any], results: dict[str, Any]) -> None:
        recipe["data"]["value_range"] = value_range
        found = [120.0, 3891.5] if value_range == "auto" else value_range
        pixels = {"num_channels": 1, "eight_bit": False, "value_range": found, "mean": [0.25], "std": [0.125]}
        results["data"]["preprocessing"] = {"image_size": 32, "interpolation": "bicubic", **pixels}

    return change


@pytest.mark.parametrize(
    ("change", "said", "not_said"),
    [
        (
            lambda recipe, results: None,
            ["3 channels, 8-bit", "0 to 255 become 0 to 1", "resized to 35 pixels (bilinear", "crop_pct 0.9"]
            + ["cropped to 32 × 32", "| Mean | 0.5, 0.5, 0.5 |", "| Standard deviation | 0.2, 0.2, 0.2 |"],
            ["measured", "recipe"],
        ),
        (
            wide("auto"),
            ["1 channel, of more than 8 bits", "120 to 3,891.5 become 0 to 1", "clipped, measured by percentiles"]
            + ["32 pixels (bicubic", "| Mean | 0.25 |"],
            ["recipe"],
        ),
        (wide([0, 4095]), ["0 to 4,095 become 0 to 1", "clipped, as set in the recipe"], ["measured"]),
        (wide("dtype"), ["the full range of each image's type"], ["measured", "clipped"]),
        (bare, ["do not record the preprocessing"], ["| Mean"]),
    ],
)
def test_the_card_says_what_becomes_of_pixels(make_run: MakeRun, change: Change, said: list[str], not_said: list[str]):
    card = str(build_card(make_run(change)))
    images = section(card, "Preprocessing")
    assert all(words in images for words in said) and not any(words in images for words in not_said)
    assert ("another instrument" in section(card, "Limitations")) == ("clipped" in images and "255" not in images)


@pytest.mark.parametrize(("change", "name"), [(lambda *_: None, "photo.jpg"), (wide("auto"), "image.tif")])
def test_the_lines_name_a_file_that_the_encoder_takes(make_run: MakeRun, change: Change, name: str):
    use = section(str(build_card(make_run(change))), "How to use")
    assert f'processor("{name}"' in use and f'extract("{name}")' in use
    assert ("create_transform" in use) == (name == "photo.jpg")


# ---------------------------------------------------------------------------------------------------------------------
# Data sets of the Hub


def test_a_dataset_of_the_hub_is_metadata_and_gets_leaderboard_entries(make_run: MakeRun):
    run = make_run(named("uoft-cs/cifar10"))
    assert build_card(run).data.datasets == ["uoft-cs/cifar10"]
    assert {r.dataset_type for r in build_card(run).data.eval_results} == {"uoft-cs/cifar10"}
    files = card_files(run)
    entries = parse_eval_result_entries(yaml.safe_load(files[".eval_results/uoft-cs--cifar10.yaml"]))
    results = json.loads((run / "results.json").read_text())
    assert [e.value for e in entries] == [e["metrics"][e["headline"]]["mean"] for e in results["evaluations"]]
    assert {(e.dataset_id, e.task_id) for e in entries} == {("uoft-cs/cifar10", "default")}
    assert "top1_k20 in %, split test, protocol hash 53a583e01993" in entries[0].notes


@pytest.mark.parametrize(
    "name", ["photos", "shapes", "a/b/c", "lab/train-{000..009}.tar", "/data/lab/photos", "../x/y"]
)
def test_no_other_name_is_taken_for_a_dataset_of_the_hub(make_run: MakeRun, name: str):
    run = make_run(named(name))
    assert build_card(run).data.datasets is None and not any(p.startswith(".eval") for p in card_files(run))


def test_a_folder_is_no_dataset_of_the_hub(make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "data" / "photos").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert build_card(make_run(named("data/photos"))).data.datasets is None


# ---------------------------------------------------------------------------------------------------------------------
# Names that would be more than names


def named(name: str) -> Change:
    def change(recipe: dict[str, Any], results: dict[str, Any]) -> None:
        recipe["data"]["dataset"] = name
        results["data"]["name"] = name
        for entry in results["evaluations"]:
            entry["data"] = {side: {"name": name, "fingerprint": "f6be", "size": 60} for side in ("train", "test")}

    return change


def everywhere(name: str) -> Change:
    def change(recipe: dict[str, Any], results: dict[str, Any]) -> None:
        named(name)(recipe, results)
        recipe["data"] |= {"train_split": name, "test_split": name, "image_column": name}
        recipe["encoder"] |= {"init_from": name, "stem": name, "name": name, "model_args": {name: name}}
        recipe["training"]["optimizer"]["name"] = recipe["training"]["mixed_precision"] = name
        recipe["method"]["name"] = name
        results["collapse"]["notes"] = [name]
        results["weights"][name] = {"orthogonality_error": 1.0, "stable_rank": 1.0}
        results["environment"] |= {"device": name, "python": name, "packages": {name: name}}
        for entry in (*results["evaluations"], *results["baselines"]["untrained"]):
            entry |= {"protocol": name, "protocol_hash": name, "settings": {name: name}}
            entry["metrics"][name] = {"mean": 1.0, "std": None, "values": [1.0]}
        results["baselines"][name] = results["baselines"].pop("untrained")

    return change


NASTY = [
    "{{ 7 * 7 }}{% for x in [1, 2] %}loop{% endfor %}{# gone #}",
    "a\n---\nlicense: mit\ntags: [evil]\n---\n# Heading",
    "a | b | **c** | [link](https://evil.example) ![x](y)",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "`` ` ``` code\n```\n\n# Heading\n</details>",
    "</details> </summary> <!-- -->",
    "x: &a [*a, !!python/object/apply:os.system ['id']]",
    "\u202egnp.exe\u2066\x00\x1b[31m\ud800",
    "www.evil.example a@evil.example _x_ ~y~ $z$ \\( \\| \\`",
    "n" * 5000,
]


def skeleton(text: str) -> list[tuple[str, ...]]:
    """What a card is made of, names and words left out: blocks, and in the lines only what is not text."""
    body = text.split("\n---\n", 1)[1]
    blocks = []
    for token in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(body):
        inline = [child for child in token.children or [] if child.type not in ("text", "softbreak", "text_special")]
        kinds = [child.content if child.type == "html_inline" else child.type for child in inline]
        html = token.content if token.type == "html_block" else ""
        blocks.append((token.type, token.tag, html, *kinds))
    return blocks


@pytest.mark.parametrize("name", NASTY, ids=range(len(NASTY)))
def test_a_name_changes_no_structure(make_run: MakeRun, name: str):
    plain = build_card(make_run(everywhere("plain name"), "plain"))
    nasty_run = make_run(everywhere(name), "nasty")
    nasty = build_card(nasty_run)
    assert skeleton(str(nasty)) == skeleton(str(plain))
    front, harmless = (yaml.safe_load(str(card).split("---\n")[1]) for card in (nasty, plain))
    assert front.keys() == harmless.keys() and len(front["tags"]) == len(harmless["tags"])
    assert nasty.data.license is None and len(nasty.data.eval_results) == len(plain.data.eval_results)
    str(nasty).encode()  # holds nothing that UTF-8 cannot
    columns = [line.count("|") for line in comparison_table([make_run(everywhere("x"), "x")]).splitlines()]
    found = [re.sub(r"\\\|", "", line).count("|") for line in comparison_table([nasty_run]).splitlines()]
    assert found == columns


def test_a_block_of_code_holds_its_fences():
    (token,) = MarkdownIt("commonmark").parse(block("```\n# a\n~~~\n````\x1b[31m", "yaml"))
    assert token.type == "fence" and token.content == "```\n# a\n~~~\n````\N{REPLACEMENT CHARACTER}[31m\n"


def test_a_template_in_a_name_stays_text(make_run: MakeRun):
    text = str(build_card(make_run(everywhere(NASTY[0]))))
    assert f"`{NASTY[0]}`" in text and "looploop" not in text


FOLDER = "<b>run_1_ `x` [a](b) &amp; # ~~y~~ $z$ \\\\( a@b.example www.evil.example"


def test_a_folders_name_is_a_title_and_nothing_else(make_run: MakeRun):
    text = str(build_card(make_run(name=FOLDER)))
    title = next(line for line in text.split("\n---\n")[1].splitlines() if line)
    (_, inline, _) = MarkdownIt("commonmark").parse(title)
    assert {child.type for child in inline.children} <= {"text", "text_special"}
    assert "".join(child.content for child in inline.children) == FOLDER


# ---------------------------------------------------------------------------------------------------------------------
# Paths


PRIVATE = [
    "/home/alice/photos",
    "~alice/photos/",
    "../alice/photos",
    "C:\\Users\\alice\\photos",
    "\\\\alice\\photos",
    "file:///home/alice/photos",
    "https://alice:secret@alice.example/photos",
]


@pytest.mark.parametrize("path", PRIVATE)
def test_of_paths_only_the_last_part_is_told(make_run: MakeRun, path: str):
    def change(recipe: dict[str, Any], results: dict[str, Any]) -> None:
        named(path)(recipe, results)
        recipe["data"]["cache_dir"] = recipe["encoder"]["init_from"] = path
        recipe["evaluation_data"] = recipe["data"] | {}
        results["recipe"] = recipe

    run = make_run(change)
    for content in card_files(run).values():
        assert b"alice" not in content
    assert "images of `photos`" in str(build_card(run))


def test_what_is_no_path_stays():
    plain = {"a": ["uoft-cs/cifar10", "*.weight", "shapes", 3, None, 1e-6], "b": {"c": "data/photos", "d": ".bias"}}
    assert without_paths(plain) == plain
    assert without_paths(["/", "/a/b.tar", "~"]) == ["folder", "b.tar", "~"]


# ---------------------------------------------------------------------------------------------------------------------
# Damage


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("results.json", "{"),
        ("results.json", "[1]"),
        ("results.json", '{"run": {"steps": NaN}}'),
        ("results.json", '{"evaluations": [{}]}'),
        ("results.json", '{"evaluations": 3}'),
        ("results.json", '{"collapse": {"rankme": "<script>"}}'),
        ("recipe.yaml", "{"),
        ("recipe.yaml", "data: {dataset: x}"),
        ("recipe.yaml", "!!python/object/apply:os.system ['id']"),
        ("metrics.jsonl", '{"kind"\n{"kind": "train"}\n'),
        ("metrics.jsonl", '{"kind": "train", "step": 3}\n'),
        ("metrics.jsonl", "3\n\n"),
        ("metrics.jsonl", '{"kind"\n{"kind": "train", "step": 3, "images_per_second": 5.0}\n'),
        ("results.json", '{"weights": {"conv1": {"orthogonality_error": NaN, "stable_rank": 1.0}}}'),
    ],
)
def test_a_damaged_file_is_one_line(make_run: MakeRun, capsys: pytest.CaptureFixture[str], file: str, content: str):
    run = make_run()
    (run / file).write_text(content)
    assert main(["card", str(run)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(run) in error


def test_a_last_line_cut_off_is_left_out(make_run: MakeRun):
    run = make_run()
    before = str(build_card(run))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    assert str(build_card(run)) == before


def test_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["card", str(tmp_path)]) == 2
    assert "has no recipe.yaml" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Files and the command line


def test_a_card_is_made_again_from_its_own_folder(make_run: MakeRun, tmp_path: Path):
    written = write_card(make_run(named("/home/alice/photos")), tmp_path / "cards" / "mine", license="mit")
    names = {path.relative_to(tmp_path / "cards" / "mine").as_posix() for path in written}
    assert names == {"README.md", "recipe.yaml", "results.json", "metrics.jsonl", "figures/spectra.png"}
    text = (tmp_path / "cards" / "mine" / "README.md").read_text()
    assert str(build_card(tmp_path / "cards" / "mine", license="mit")) == text and "\n# mine\n" in text


def test_a_markdown_file_gets_its_figure(make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = make_run()
    assert main(["card", str(run), "--output", str(tmp_path / "a" / "card.md"), "--data-license", "mine"]) == 0
    assert (tmp_path / "a" / "card.md").read_text() == str(build_card(run, data_license="mine"))
    assert (tmp_path / "a" / "figures" / "spectra.png").is_file() and "card.md" in capsys.readouterr().out


def test_the_command_prints(make_run: MakeRun, capsys: pytest.CaptureFixture[str]):
    run = make_run()
    assert main(["card", str(run), "--license", "mit"]) == 0
    assert capsys.readouterr().out == f"{build_card(run, license='mit')}\n"
    assert main(["card", "--table", str(run), str(run)]) == 0
    assert capsys.readouterr().out == f"{comparison_table([run, run])}\n"
    assert main(["card", str(run), str(run)]) == 2
    assert "--table" in capsys.readouterr().err


def test_the_lines_of_a_card_run(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch):
    run = make_run()
    create_encoder("resnet18", channels=[4, 4, 8, 8], image_size=32).save_pretrained(run / "encoder")
    build_image_processor(Preprocessing(**PIXELS)).save_pretrained(run / "encoder")
    Image.new("RGB", (40, 30), "red").save(run / "photo.jpg")
    use = section(str(build_card(run)), "How to use")
    load, package, pipelines, fine_tune, timm = re.findall(r"```python\n(.*?)```", use, flags=re.DOTALL)
    stranger = "import sys; sys.modules['hf_ssl_or'] = None"
    tell = "import numpy; print(numpy.shape(features))"
    lines = "\n".join([stranger, load, tell, pipelines, tell, fine_tune, "print(model.num_labels)"])
    done = subprocess.run([sys.executable, "-c", lines], cwd=run, capture_output=True, text=True)
    assert done.stdout.split("\n") == ["torch.Size([1, 8])", "(1, 8)", "10", ""], done.stderr[-2000:]

    monkeypatch.chdir(run)
    names: dict[str, Any] = {}
    exec(package, names)
    assert type(names["encoder"]).__module__ == "hf_ssl_or.models.modeling_ssl_resnet"
    assert "`hf-ssl-or export encoder --to timm --output encoder-timm`" in use  # without its own check of the result
    Path("encoder-timm").mkdir()
    timm_export.write(read_portable("encoder"), Path("encoder-timm"))
    exec(timm, names)
    assert names["features"].shape == (1, 8)
