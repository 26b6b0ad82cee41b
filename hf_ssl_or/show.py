"""What a finished run prints: accuracies beside their baselines, label-free measures, and how to load the encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hf_ssl_or.data.image_dataset import ImageSet
from hf_ssl_or.data.loading import describe_images
from hf_ssl_or.evaluation.transfer import markdown_table, table_rows
from hf_ssl_or.report.sweep_tables import differences_table, values_table
from hf_ssl_or.report.tables import Table as ReportTable
from hf_ssl_or.runs import layout
from hf_ssl_or.runs.labels import baseline_label, metric_label
from hf_ssl_or.runs.results import Collapse, EncoderResults, Evaluation, Results
from hf_ssl_or.runs.sweep_results import SweepResults
from hf_ssl_or.training.checkpoint_choice import Choice

LOAD = """\
from transformers import AutoModel
import hf_ssl_or  # or, without this package: AutoModel.from_pretrained(..., trust_remote_code=True)
encoder = AutoModel.from_pretrained("{folder}")"""


def print_start(images: ImageSet, *more: str) -> None:
    """Prints what a run trains on, and further lines, on standard error."""
    console = Console(stderr=True, highlight=False)
    for line in (*describe_images(images), *more):
        console.print(line, markup=False, soft_wrap=True)


def print_results(results: Results, folder: Path) -> None:
    """Prints the results of a run."""
    console = Console(highlight=False)
    print_evaluation(results, console)
    console.print("\nLoad it:")
    console.print(LOAD.format(folder=folder / layout.ENCODER), markup=False, soft_wrap=True)


def print_evaluation(results: Results | EncoderResults, console: Console | None = None) -> None:
    """Prints accuracies and label-free measures."""
    console = console or Console(highlight=False)
    if results.evaluations:
        console.print(_accuracies(results))
    else:
        console.print("No labels: only label-free measures. Set evaluation_data to evaluate with kNN and probes.")
    console.print(_collapse(results.collapse))


def print_transfer(results: dict[str, Any], *, markdown: bool = False) -> None:
    """Prints the table of encoders by data sets and protocols."""
    console = Console(highlight=False)
    if markdown:
        console.print(markdown_table(results), markup=False, soft_wrap=True, end="")
        return
    heads, rows = table_rows(results)
    table = Table(title="Accuracy on the test images, %")
    table.add_column(heads[0], overflow="fold")
    for head in heads[1:]:
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def print_sweep(results: SweepResults) -> None:
    """Prints the tables of a sweep."""
    for shown in (values_table(results), differences_table(results)):
        if shown is not None:
            print_table(shown)


def print_table(shown: ReportTable) -> None:
    """Prints a table of a report."""
    table = Table(title=shown.caption)
    for head, numeric in zip(shown.head, shown.numeric, strict=True):
        table.add_column(head, justify="right" if numeric else "left", overflow="fold")
    for row in shown.rows:
        table.add_row(*(cell.text for cell in row))
    Console(highlight=False).print(table)


def print_choice(choice: Choice, folder: Path | None) -> None:
    """Prints what `--select` measured, the choice marked, and how to load it."""
    console = Console(highlight=False)
    table = Table(title=f"{choice.measure} of the kept checkpoints, from {choice.source}")
    table.add_column("step", justify="right")
    table.add_column(choice.measure, justify="right")
    table.add_column("")
    for step, value in choice.values.items():
        shown = "undefined" if value is None else f"{value:.4f}"
        table.add_row(str(step), shown, "chosen" if step == choice.step else "")
    console.print(table)
    if len(choice.values) == 1:
        console.print("Only one checkpoint was kept: set training.keep_last to keep more.")
    if folder is not None:
        console.print("\nLoad it:")
        console.print(LOAD.format(folder=folder), markup=False, soft_wrap=True)


def _accuracies(results: Results | EncoderResults) -> Table:
    table = Table(title="Accuracy on the test images, %")
    table.add_column("protocol")
    table.add_column("measure")
    baselines = list(results.baselines) if isinstance(results, Results) else []
    for name in ("encoder", *(baseline_label(name).lower() for name in baselines)):
        table.add_column(name, justify="right")
    for entry in results.evaluations:
        for measure, value in entry.test_metrics():
            others = [_baseline(results, name, entry, measure) for name in baselines]
            table.add_row(entry.protocol, metric_label(measure).name, value.describe(), *others)
    return table


def _baseline(results: Results | EncoderResults, name: str, entry: Evaluation, measure: str) -> str:
    found = results.baseline(name, entry, measure) if isinstance(results, Results) else None
    return "" if found is None else f"{found.mean:.2f}"


def _collapse(collapse: Collapse) -> Table:
    table = Table(title=f"Label-free measures of {collapse.samples} images, {collapse.dimension} features")
    table.add_column("measure")
    table.add_column("value", justify="right")
    for name, value in collapse.measures.items():
        table.add_row(metric_label(name).title, f"{value:.4g}")
    table.caption = "\n".join(collapse.notes)  # which measures are undefined, and why
    return table
