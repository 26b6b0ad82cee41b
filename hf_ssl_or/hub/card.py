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
from hf_ssl_or.hub.limitations import limitations
from hf_ssl_or.hub.markdown import block, clean, code, escape, table
from hf_ssl_or.hub.published_run import hub_dataset, published_run
from hf_ssl_or.hub.redaction import without_paths
from hf_ssl_or.hub.snippets import usage
from hf_ssl_or.runs import layout
from hf_ssl_or.runs.labels import metric_label
from hf_ssl_or.runs.reader import RunRecord
from hf_ssl_or.runs.results import Evaluation

_TEMPLATE = Path(__file__).with_name("card_template.md")
_COMPARED = ("rankme", "alpha_req")
_LICENSE = re.compile(r"[A-Za-z0-9][\w.+-]*")


def build_card(
    run_folder: Path, *, repo_id: str | None = None, license: str | None = None, data_license: str | None = None
) -> ModelCard:
    """Writes the card of a run.

    Args:
        run_folder: Folder of the run; `figures/spectra.png` in it, which `hf-ssl-or report` plots, is linked.
        repo_id: Where the encoder goes on the Hub, "owner/name"; None writes about the local folder.
        license: The Hub's identifier of the model's license, say "apache-2.0"; None says that none was stated.
        data_license: The license of the training images in any words; None likewise.

    Raises:
        InputError: A file of the run is missing or damaged, or a name is none that the Hub takes.
    """
    run = published_run(Path(run_folder))
    _check(repo_id, license)
    with _readable(run.folder):
        title = run.name if repo_id is None else repo_id.split("/")[-1]
        data = _metadata(run, clean(title), license)
        body = _render(run, title, repo_id, license, data_license)
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
    run = published_run(folder)
    files = {"README.md": str(card), layout.RECIPE: yaml.safe_dump(run.recipe, sort_keys=False, width=119)}
    if run.results is not None:
        files[layout.RESULTS] = json.dumps(run.results.to_dict(), indent=2) + "\n"
    if lines := run.metrics.lines:
        files[layout.METRICS] = "".join(json.dumps(without_paths(line)) + "\n" for line in lines)
    for dataset, entries in _leaderboard_entries(run).items():
        path = f".eval_results/{dataset.replace('/', '--')}.yaml"
        files[path] = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
    contents = {path: text.encode() for path, text in files.items()}
    if (folder / layout.SPECTRA_FIGURE).is_file():
        contents[layout.SPECTRA_FIGURE] = (folder / layout.SPECTRA_FIGURE).read_bytes()
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
        folder, files = output.parent, {output.name: files["README.md"], **_only(files, layout.SPECTRA_FIGURE)}
        written = _write(folder, files)
    else:
        written = _write(output, files)
        written[0].write_bytes(card_files(output, **stated)["README.md"])
    return written


def comparison_table(run_folders: Sequence[Path]) -> str:
    """Returns a table of runs: what was run, the headline of each protocol, signs of collapse, and the time."""
    runs = [published_run(Path(folder)) for folder in run_folders]
    found = [{_headline(entry): entry.headline_metric.describe() for entry in run.evaluations} for run in runs]
    columns = list(dict.fromkeys(key for headlines in found for key in headlines))
    rows = []
    for run, headlines in zip(runs, found, strict=True):
        with _readable(run.folder):
            rows.append(_comparison_row(run, [headlines.get(key, card_sections.NONE) for key in columns]))
    heads = [
        f"{code(protocol)} {card_sections.measure(name)}, % ({code(digest)})" for protocol, name, digest in columns
    ]
    labels = [metric_label(name).name for name in _COMPARED]
    words, numbers = ["Encoder", "Method", "Penalty"], ["Views", "Epochs", *heads, *labels, "Minutes"]
    return table([*words, *numbers], rows, words=3)


def _headline(entry: Evaluation) -> tuple[str, str, str]:
    return entry.protocol, entry.headline, entry.protocol_hash


def _comparison_row(run: RunRecord, headlines: Sequence[str]) -> list[str]:
    recipe, measures = run.recipe, {} if run.results is None else run.results.collapse.measures
    return [
        code(recipe["encoder"]["name"]),
        code(recipe["method"]["name"]),
        code(recipe["orthogonality"]["penalty"]),
        f"{recipe['views']['count']:d}",
        f"{recipe['training']['epochs']:g}",
        *headlines,
        *(f"{measures[name]:.4g}" if name in measures else card_sections.NONE for name in _COMPARED),
        card_sections.NONE if run.step_seconds is None else f"{run.step_seconds / 60:.1f}",
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


def _metadata(run: RunRecord, name: str, license: str | None) -> ModelCardData:
    recipe, dataset = run.recipe, hub_dataset(run.recipe["data"]["dataset"])
    penalty = recipe["orthogonality"]["penalty"]
    penalties = [] if penalty == "none" else ["orthogonality-regularization", clean(penalty)]
    return ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=["hf_ssl_or", "self-supervised-learning", clean(recipe["method"]["name"]), *penalties],
        datasets=[dataset] if dataset else None,
        model_name=name,
        eval_results=list(eval_results(run)) or None,
    )


def eval_results(run: RunRecord) -> Iterator[EvalResult]:
    """Yields every measure of every evaluation as an entry of the card's `model-index`, in % as in `results.json`."""
    for entry, dataset in _evaluated(run):
        for name, value in entry.test_metrics():
            how: dict[str, Any] = {"protocol": clean(entry.protocol), "protocol_hash": clean(entry.protocol_hash)}
            how |= {"seeds": entry.seeds} if entry.seeds else {}
            how |= {"std": value.std} if value.std is not None else {}
            yield EvalResult(
                task_type="image-classification",
                task_name="Image classification on frozen features",
                dataset_type=hub_dataset(dataset) or clean(dataset),
                dataset_name=clean(dataset),
                dataset_split=clean(card_sections.evaluation_settings(run)["test_split"]),
                metric_type="accuracy",
                metric_name=f"{clean(entry.protocol)} {clean(name)}, %",
                metric_value=value.mean,
                metric_args=how,
            )


def _leaderboard_entries(run: RunRecord) -> dict[str, list[EvalResultEntry]]:
    """Returns the headline of each protocol, by data set of the Hub, for the `.eval_results` folder."""
    found: dict[str, list[EvalResultEntry]] = {}
    for entry, name in _evaluated(run):
        if dataset := hub_dataset(name):
            notes = f"frozen features, {clean(entry.protocol)} {clean(entry.headline)} in %, split "
            notes += f"{clean(card_sections.evaluation_settings(run)['test_split'])}, "
            notes += f"protocol hash {clean(entry.protocol_hash)}"
            value = entry.headline_metric.mean
            result = EvalResultEntry(dataset_id=dataset, task_id="default", value=value, notes=notes)
            found.setdefault(dataset, []).append(result)
    return found


def _evaluated(run: RunRecord) -> list[tuple[Evaluation, str]]:
    """Returns the evaluations that name their test images, with that name."""
    return [(entry, entry.data.test.name) for entry in run.evaluations if entry.data is not None]


# ---------------------------------------------------------------------------------------------------------------------
# Text


def _render(run: RunRecord, title: str, repo_id: str | None, license: str | None, data_license: str | None) -> str:
    """Fills the template. It is rendered once, so text of the run that looks like a template stays text."""
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    layers_summary, layers = card_sections.layers(run)
    evaluated = bool(run.evaluations)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        title=escape(title),
        summary=card_sections.summary(run),
        repo_id=repo_id,
        **usage(run, repo_id),
        pixels=card_sections.pixels(run),
        evaluated_on=card_sections.evaluated_on(run) if evaluated else "",
        evaluation=card_sections.evaluation(run) if evaluated else "",
        reading=card_sections.reading(run) if evaluated else "",
        protocols=card_sections.protocols(run) if evaluated else "",
        collapse=card_sections.collapse(run),
        skipped=card_sections.skipped(run),
        figure=layout.SPECTRA_FIGURE if (run.folder / layout.SPECTRA_FIGURE).is_file() else "",
        layers_summary=layers_summary,
        layers=layers,
        training=card_sections.training(run),
        recipe=block(yaml.safe_dump(run.recipe, sort_keys=False, width=119), "yaml"),
        compute=card_sections.compute(run),
        limitations="\n".join(f"- {limitation}" for limitation in limitations(run)),
        license=code(license) if license else "no license was stated",
        data_license=escape(data_license) if data_license else "no license was stated",
        generated=run.recipe["data"]["dataset"] == "shapes",
        citations=block("\n\n".join(_citations(run)), "bibtex"),
    )


def _citations(run: RunRecord) -> list[str]:
    penalty, papers = run.recipe["orthogonality"]["penalty"], [card_sections.method_of(run)[1]]
    if penalty in ("so", "srip"):
        papers.append(HE_2024)
    if penalty != "none":
        papers.append(BANSAL_2018)
    if run.recipe["views"]["count"] > 2:
        papers.append(GHOSH_2024)
    return [paper for paper in papers if paper]
