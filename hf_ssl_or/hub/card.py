"""The model card of a run, written from the run's files and never by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from jinja2 import Environment, StrictUndefined

from hf_ssl_or.errors import InputError
from hf_ssl_or.hub import card_sections
from hf_ssl_or.hub.citations import BANSAL_2018, GHOSH_2024, HE_2024
from hf_ssl_or.hub.limitations import limits
from hf_ssl_or.hub.markdown import block, clean, code, escape, table
from hf_ssl_or.hub.run_record import FIGURE, RunFacts, hub_dataset, read_facts, read_log, without_paths
from hf_ssl_or.hub.snippets import usage

_TEMPLATE = Path(__file__).with_name("card_template.md")
_LICENSE = re.compile(r"[A-Za-z0-9][\w.+-]*")


def build_card(
    run_folder: Path, *, repo_id: str | None = None, license: str | None = None, data_license: str | None = None
) -> ModelCard:
    """Writes the card of a run.

    Args:
        run_folder: Folder of the run; `figures/spectra.png` in it, which `hf-ssl-or report` draws, is linked.
        repo_id: Where the encoder goes on the Hub, "owner/name"; None writes about the local folder.
        license: The Hub's identifier of the model's license, say "apache-2.0"; None says that none was stated.
        data_license: The license of the training images in any words; None likewise.

    Raises:
        InputError: A file of the run is missing or damaged, or a name is none that the Hub takes.
    """
    facts = read_facts(Path(run_folder))
    _check(repo_id, license)
    with _readable(facts.folder):
        title = facts.name if repo_id is None else repo_id.split("/")[-1]
        data = _metadata(facts, clean(title), license)
        body = _render(facts, title, repo_id, license, data_license)
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")


def card_files(
    run_folder: Path, *, repo_id: str | None = None, license: str | None = None, data_license: str | None = None
) -> dict[str, bytes]:
    """Returns the card and everything that it was made from, as files by their path in a repository.

    Paths in the settings are shortened to their last part. The card of a folder of these files is this card again.

    Args:
        run_folder: As for `build_card`, like the others.
        repo_id: Likewise.
        license: Likewise.
        data_license: Likewise.
    """
    folder = Path(run_folder)
    card = build_card(folder, repo_id=repo_id, license=license, data_license=data_license)
    facts = read_facts(folder)
    files = {"README.md": str(card), "recipe.yaml": yaml.safe_dump(facts.recipe, sort_keys=False, width=119)}
    if facts.results:
        files["results.json"] = json.dumps(facts.results, indent=2) + "\n"
    if lines := read_log(folder):
        files["metrics.jsonl"] = "".join(json.dumps(without_paths(line)) + "\n" for line in lines)
    for dataset, entries in _leaderboard_entries(facts).items():
        path = f".eval_results/{dataset.replace('/', '--')}.yaml"
        files[path] = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
    contents = {path: text.encode() for path, text in files.items()}
    if (folder / FIGURE).is_file():
        contents[FIGURE] = (folder / FIGURE).read_bytes()
    return contents


def write_card(
    run_folder: Path, output: Path, *, license: str | None = None, data_license: str | None = None
) -> list[Path]:
    """Writes the card of a run; returns the files written.

    Args:
        run_folder: As for `build_card`.
        output: A Markdown file, which is written with the figure that it shows; or a folder, which gets the card,
            named after the folder, with everything that it was made from.
        license: As for `build_card`.
        data_license: Likewise.
    """
    stated: dict[str, Any] = {"license": license, "data_license": data_license}
    files = card_files(run_folder, **stated)
    if output.suffix == ".md":
        folder, files = output.parent, {output.name: files["README.md"], **_only(files, FIGURE)}
        written = _write(folder, files)
    else:
        written = _write(output, files)
        written[0].write_bytes(card_files(output, **stated)["README.md"])
    return written


def comparison_table(run_folders: Sequence[Path]) -> str:
    """Returns a table of runs: what was run, the headline of each protocol, signs of collapse, and the time."""
    runs = [read_facts(Path(folder)) for folder in run_folders]
    found = []
    for facts in runs:
        with _readable(facts.folder):
            found.append(
                {
                    _headline(entry): card_sections.spread(entry["metrics"][entry["headline"]])
                    for entry in facts.evaluations
                }
            )
    columns = list(dict.fromkeys(key for headlines in found for key in headlines))
    rows = []
    for facts, headlines in zip(runs, found, strict=True):
        with _readable(facts.folder):
            rows.append(_comparison_row(facts, [headlines.get(key, card_sections.NONE) for key in columns]))
    heads = [
        f"{code(protocol)} {card_sections.measure(name)}, % ({code(digest)})" for protocol, name, digest in columns
    ]
    words, numbers = ["Encoder", "Method", "Penalty"], ["Views", "Epochs", *heads, "RankMe", "alpha-ReQ", "Minutes"]
    return table([*words, *numbers], rows, words=3)


def _headline(entry: dict[str, Any]) -> tuple[str, str, str]:
    return entry["protocol"], entry["headline"], entry["protocol_hash"]


def _comparison_row(facts: RunFacts, headlines: Sequence[str]) -> list[str]:
    recipe, collapse = facts.recipe, facts.results.get("collapse", {})
    seconds = facts.step_seconds
    return [
        code(recipe["encoder"]["name"]),
        code(recipe["method"]["name"]),
        code(recipe["orthogonality"]["penalty"]),
        f"{recipe['views']['count']:d}",
        f"{recipe['training']['epochs']:g}",
        *headlines,
        *(f"{collapse[name]:.4g}" if name in collapse else card_sections.NONE for name in ("rankme", "alpha_req")),
        card_sections.NONE if seconds is None else f"{seconds / 60:.1f}",
    ]


def _check(repo_id: str | None, license: str | None) -> None:
    try:
        if repo_id is not None:
            validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"repository: {repo_id!r} is no Hub id such as owner/name: {error}") from error
    if license is not None and not _LICENSE.fullmatch(license):
        raise InputError(f"license: {license!r} is no identifier of the Hub; give one such as apache-2.0, or other")


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Turns what a damaged or foreign file of a run causes into one line."""
    try:
        yield
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise InputError(
            f"{folder}: its recipe, results or metrics do not hold what hf-ssl-or train writes: {error!r}"
        ) from error


def _only(files: dict[str, bytes], path: str) -> dict[str, bytes]:
    return {path: files[path]} if path in files else {}


def _write(folder: Path, files: dict[str, bytes]) -> list[Path]:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return [folder / path for path in files]


# ---------------------------------------------------------------------------------------------------------------------
# Metadata


def _metadata(facts: RunFacts, name: str, license: str | None) -> ModelCardData:
    recipe, dataset = facts.recipe, hub_dataset(facts.recipe["data"]["dataset"])
    penalty = recipe["orthogonality"]["penalty"]
    penalties = [] if penalty == "none" else ["orthogonality-regularization", clean(penalty)]
    return ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=["hf_ssl_or", "self-supervised-learning", clean(recipe["method"]["name"]), *penalties],
        datasets=[dataset] if dataset else None,
        model_name=name,
        eval_results=list(eval_results(facts)) or None,
    )


def eval_results(facts: RunFacts) -> Iterator[EvalResult]:
    """Yields every measure of every evaluation as an entry of the card's `model-index`, in % as in `results.json`."""
    for entry in facts.evaluations:
        dataset = entry["data"]["test"]["name"]
        for name, value in card_sections.shown_metrics(entry):
            how: dict[str, Any] = {key: clean(entry[key]) for key in ("protocol", "protocol_hash")}
            how |= {"seeds": entry["seeds"]} if entry["seeds"] else {}
            how |= {"std": value["std"]} if value["std"] is not None else {}
            yield EvalResult(
                task_type="image-classification",
                task_name="Image classification on frozen features",
                dataset_type=hub_dataset(dataset) or clean(dataset),
                dataset_name=clean(dataset),
                dataset_split=clean(facts.evaluation_data["test_split"]),
                metric_type="accuracy",
                metric_name=f"{clean(entry['protocol'])} {clean(name)}, %",
                metric_value=value["mean"],
                metric_args=how,
            )


def _leaderboard_entries(facts: RunFacts) -> dict[str, list[EvalResultEntry]]:
    """Returns the headline of each protocol, by data set of the Hub, for the `.eval_results` folder."""
    found: dict[str, list[EvalResultEntry]] = {}
    for entry in facts.evaluations:
        if dataset := hub_dataset(entry["data"]["test"]["name"]):
            notes = f"frozen features, {clean(entry['protocol'])} {clean(entry['headline'])} in %, split "
            notes += f"{clean(facts.evaluation_data['test_split'])}, protocol hash {clean(entry['protocol_hash'])}"
            value = entry["metrics"][entry["headline"]]["mean"]
            result = EvalResultEntry(dataset_id=dataset, task_id="default", value=value, notes=notes)
            found.setdefault(dataset, []).append(result)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Text


def _render(facts: RunFacts, title: str, repo_id: str | None, license: str | None, data_license: str | None) -> str:
    """Fills the template. It is rendered once, so text of the run that looks like a template stays text."""
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    layers_summary, layers = card_sections.layers(facts)
    evaluated = bool(facts.evaluations)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        title=escape(title),
        summary=card_sections.summary(facts),
        repo_id=repo_id,
        **usage(facts, repo_id),
        pixels=card_sections.pixels(facts),
        evaluated_on=card_sections.evaluated_on(facts) if evaluated else "",
        evaluation=card_sections.evaluation(facts) if evaluated else "",
        reading=card_sections.reading(facts) if evaluated else "",
        protocols=card_sections.protocols(facts) if evaluated else "",
        collapse=card_sections.collapse(facts),
        figure=FIGURE if (facts.folder / FIGURE).is_file() else "",
        layers_summary=layers_summary,
        layers=layers,
        training=card_sections.training(facts),
        recipe=block(yaml.safe_dump(facts.recipe, sort_keys=False, width=119), "yaml"),
        compute=card_sections.compute(facts),
        limits="\n".join(f"- {limit}" for limit in limits(facts)),
        license=code(license) if license else "no license was stated",
        data_license=escape(data_license) if data_license else "no license was stated",
        generated=facts.recipe["data"]["dataset"] == "shapes",
        citations=block("\n\n".join(_citations(facts)), "bibtex"),
    )


def _citations(facts: RunFacts) -> list[str]:
    penalty, papers = facts.recipe["orthogonality"]["penalty"], [card_sections.method_of(facts)[1]]
    if penalty in ("so", "srip"):
        papers.append(HE_2024)
    if penalty != "none":
        papers.append(BANSAL_2018)
    if facts.recipe["views"]["count"] > 2:
        papers.append(GHOSH_2024)
    return [paper for paper in papers if paper]
