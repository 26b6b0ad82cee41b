"""Keeps the results of the papers' sweeps, and writes their tables and figures into docs/papers/ from these alone.

    hf-ssl-or sweep recipes/papers/multiview/minutes-cpu.yaml --output runs/minutes --threads 1
    python benchmarks/papers.py --add runs/minutes          # keeps its results.json as the newest of that name
    python benchmarks/papers.py [--check]

Results are kept in benchmarks/results/<machine>/papers/<sweep>.json: every value of every seed. In documents they
stand between `<!-- sweep MACHINE NAME -->` and `<!-- end -->`; what was not run reads "Not measured". After
`<!-- times MACHINE NAME ARM -->` stands how soon arms are as good as that arm. `--check` writes nothing, and fails
where a document is not what the results say.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import cpu_name, rewrite

from hf_ssl_or.report import sweep_tables
from hf_ssl_or.report.style import style
from hf_ssl_or.report.sweep_plots import plot_sweep
from hf_ssl_or.runs.results import read_record
from hf_ssl_or.runs.sweep_results import SweepResults
from hf_ssl_or.runs.time_to import TimeTo

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs" / "papers"
FIGURES = DOCS / "figures"
RESULTS = ROOT / "benchmarks" / "results"
TIMES = re.compile(r"(<!-- times (\S+) (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
BLOCK = re.compile(r"(<!-- sweep (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def kept(machine: str, name: str) -> Path:
    """Returns where the results of a sweep are kept."""
    return RESULTS / machine / "papers" / f"{name}.json"


def add(root: Path, machine: str, *, untimed: bool) -> None:
    """Keeps the results of a sweep, with the machine and the day; without minutes, where other work ran beside it."""
    results = read_record(SweepResults, root / "results.json")
    if untimed:
        results.columns.remove("minutes")
        for run in (run for arm in results.arms for run in arm.runs):
            run.metrics.pop("minutes", None)
            run.curve.clear()
    path = kept(machine, results.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"cpu": cpu_name(), "cores": os.cpu_count()}
    results.write(path)  # with each list of numbers on one line
    head = f'{{\n  "machine": {json.dumps(about)},\n  "date": "{time.strftime("%Y-%m-%d")}",'
    path.write_text(path.read_text().replace("{", head, 1))
    print(f"kept as {path}")


def block(match: re.Match[str], folder: Path) -> str:
    """Returns the tables and figures of a sweep as Markdown; the figures go into a folder of its name."""
    start, machine, name, end = match.groups()
    path = kept(machine, name)
    if not path.exists():
        return f"{start}Not measured.\n{end}"
    results = read_record(SweepResults, path)
    (folder / name).mkdir(parents=True, exist_ok=True)
    with style():
        drawn = plot_sweep(results, folder / name)
    for figure in drawn:
        (folder / name / f"{figure.name}.svg").unlink()
    parts = [sweep_tables.markdown(results), f"({source(results, json.loads(path.read_text()))})\n"]
    parts += [f"![{figure.alt}](figures/{name}/{figure.name}.png)\n\n{figure.caption}\n" for figure in drawn]
    return "\n".join([start, *parts, end])


def times(match: re.Match[str]) -> str:
    """Returns how soon the arms of a sweep are as good as another one than the sweep names."""
    start, machine, name, arm, end = match.groups()
    path = kept(machine, name)
    if not path.exists():
        return f"{start}Not measured.\n{end}"
    results = read_record(SweepResults, path)
    assert results.time_to is not None
    timed = replace(results, time_to=TimeTo(metric=results.time_to.metric, arm=arm))
    table = sweep_tables.time_table(timed)
    assert table is not None
    return "\n".join([start, sweep_tables.table_markdown(table), end])


def source(results: SweepResults, kept_tree: dict[str, Any]) -> str:
    """Says in one line what a sweep's figures are from."""
    runs = [run for arm in results.arms for run in arm.runs if run.metrics]
    found = [run.environment for run in runs if run.environment is not None]
    threads = sorted({environment.threads or 0 for environment in found})
    versions = sorted({environment.packages["torch"] for environment in found})
    machine = kept_tree["machine"]
    where = f"{machine['cpu']}, {' or '.join(map(str, threads))} of {machine['cores']} cores per run"
    return f"{len(runs)} runs; {where}; torch {', '.join(versions)}; {kept_tree['date']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", type=Path, nargs="*", default=[], metavar="SWEEP", help="folders of sweeps to keep")
    parser.add_argument("--untimed", action="store_true", help="without minutes: other work ran beside the sweep")
    parser.add_argument("--machine", default="cpu", help="whose results they are")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    for root in args.add:
        add(root, args.machine, untimed=args.untimed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if args.check else FIGURES
        rewrite(
            sorted(DOCS.glob("*.md")),
            lambda page: TIMES.sub(times, BLOCK.sub(lambda match: block(match, folder), page)),
            script="papers",
            check=args.check,
        )


if __name__ == "__main__":
    main()
