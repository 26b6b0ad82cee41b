"""What a finished run prints: accuracies beside their baselines, signs of collapse, and how to load the encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hf_ssl_or.data.image_dataset import ImageSet
from hf_ssl_or.data.loading import describe_images
from hf_ssl_or.evaluation.transfer import markdown_table, table_rows
from hf_ssl_or.training.checkpoint_choice import Choice

LOAD = """\
from transformers import AutoModel
import hf_ssl_or  # or, without this package: AutoModel.from_pretrained(..., trust_remote_code=True)
encoder = AutoModel.from_pretrained("{folder}")"""

COLLAPSE_MEANINGS = {
    "rankme": "RankMe (higher: more dimensions in use)",
    "effective_rank": "effective rank",
    "participation_ratio": "participation ratio",
    "alpha_req": "alpha-ReQ (near 1 is good)",
    "nesum": "NESum",
    "stable_rank": "stable rank",
    "feature_std": "feature standard deviation",
    "unit_std_relative": "spread of unit-length features (1: in all directions alike)",
    "dead_dimensions": "dimensions that never vary",
    "lidar": "LiDAR (higher is better)",
    "alignment": "alignment (lower: views closer)",
    "uniformity": "uniformity (lower: spread more evenly)",
}


def print_start(images: ImageSet) -> None:
    """Prints what a run trains on, on standard error."""
    console = Console(stderr=True, highlight=False)
    for line in describe_images(images):
        console.print(line, markup=False, soft_wrap=True)


def print_results(results: dict[str, Any], folder: Path) -> None:
    """Prints the results of a run."""
    console = Console(highlight=False)
    print_evaluation(results, console)
    console.print("\nLoad it:")
    console.print(LOAD.format(folder=folder / "encoder"), markup=False, soft_wrap=True)


def print_evaluation(results: dict[str, Any], console: Console | None = None) -> None:
    """Prints accuracies and collapse measures of `results.json`."""
    console = console or Console(highlight=False)
    if results["evaluations"]:
        console.print(_accuracies(results["evaluations"], results.get("baselines", {})))
    else:
        console.print("No labels: only label-free measures. Set evaluation_data to evaluate with kNN and probes.")
    console.print(_collapse(results["collapse"]))


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


def _accuracies(evaluations: list[dict[str, Any]], baselines: dict[str, Any]) -> Table:
    table = Table(title="Accuracy on the test images, %")
    table.add_column("protocol")
    table.add_column("measure")
    for name in ("encoder", *baselines):
        table.add_column({"untrained": "untrained encoder", "pixels": "raw pixels"}.get(name, name), justify="right")
    for entry in evaluations:
        for measure, value in entry["metrics"].items():
            if measure.startswith("train_"):
                continue
            spread = "" if value["std"] is None else f" ± {value['std']:.2f}"
            others = [_baseline(baselines[name], entry["protocol"], measure) for name in baselines]
            table.add_row(entry["protocol"], measure, f"{value['mean']:.2f}{spread}", *others)
    return table


def _baseline(entries: list[dict[str, Any]], protocol: str, measure: str) -> str:
    for entry in entries:
        if entry["protocol"] == protocol:
            return f"{entry['metrics'][measure]['mean']:.2f}"
    return ""


def _collapse(measures: dict[str, Any]) -> Table:
    table = Table(title=f"Collapse, {measures['samples']:.0f} images, {measures['dimension']:.0f} dimensions")
    table.add_column("measure")
    table.add_column("value", justify="right")
    for name, meaning in COLLAPSE_MEANINGS.items():
        if name in measures:
            table.add_row(meaning, f"{measures[name]:.3f}")
    table.caption = "\n".join(measures.get("notes", []))  # which measures are undefined, and why
    return table
