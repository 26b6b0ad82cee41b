"""Writes the tables of docs/speed.md, docs/scale.md and others from the results, so that no figure is typed by hand.

    python benchmarks/tables.py [--check]

A table stands between `<!-- table MACHINE SCRIPT KEY -->` and `<!-- end -->`, and is made from the rows under KEY in
benchmarks/results/MACHINE/SCRIPT.json; without that file it reads "Not measured". `--check` changes nothing, and fails
where a table is not that of its results.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from common import rewrite

PAGES = [Path(__file__).parent.parent / "docs" / name for name in ("speed.md", "scale.md", "images.md", "encoders.md")]
RESULTS = Path(__file__).parent / "results"
BLOCK = re.compile(r"(<!-- table (\S+) (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
PEERS = {  # packages that a script compares with, by the name of their versions
    "step": ("lightly",),
    "losses": ("lightly",),
    "recipes": ("stable-pretraining", "lightning"),
    "views": ("kornia", "torchvision"),
    "loader": ("torchvision", "lightly"),
}
Columns = dict[str, tuple[str, str]]
GROWTH: Columns = {"name": ("method", ""), "size": ("size", "d"), "ours_ms": ("ms", ".0f"), "times": ("times", ".2f")}
TABLES: dict[tuple[str, str], Columns] = {
    ("penalty", "rows"): {
        "encoder": ("encoder", ""),
        "penalty": ("penalty", ""),
        "add_gradients_ms": ("ours, ms", ".1f"),
        "autograd_loop_ms": ("autograd loop, ms", ".1f"),
        "times_faster": ("times as fast", ".2f"),
        "share_of_step_at_512_images": ("share of a step of 512 images", ".2%"),
    },
    ("step", "steps"): {
        "name": ("method", ""),
        "encoder": ("encoder", ""),
        "dim": ("projector", "d"),
        "batch": ("images", "d"),
        "ours_ms": ("ours, ms", ".0f"),
        "lightly_ms": ("lightly, ms", ".0f"),
        "times_faster": ("times as fast", ".2f"),
        "ours_so_ms": ("ours with SO, ms", ".0f"),
    },
    ("step", "epochs"): {
        "name": ("method", ""),
        "encoder": ("encoder", ""),
        "ours_images_per_s": ("ours, images/s", ".0f"),
        "lightly_images_per_s": ("lightly, images/s", ".0f"),
        "times_faster": ("times as fast", ".2f"),
    },
    ("recipes", "steps"): {
        "name": ("method", ""),
        "encoder": ("encoder", ""),
        "dim": ("projector", "d"),
        "batch": ("images", "d"),
        "ours_ms": ("ours, ms", ".0f"),
        "stable_ms": ("stable-pretraining, ms", ".0f"),
        "times_faster": ("times as fast", ".2f"),
    },
    ("recipes", "epochs"): {
        "name": ("method", ""),
        "encoder": ("encoder", ""),
        "views": ("its views", ""),
        "ours_images_per_s": ("ours, images/s", ".0f"),
        "stable_images_per_s": ("stable-pretraining, images/s", ".0f"),
        "times_faster": ("times as fast", ".2f"),
    },
    ("views", "rows"): {
        "name": ("views by", ""),
        "size": ("px", "d"),
        "views_per_s": ("views/s", ",.0f"),
        "times_faster": ("ours is times as fast", ".2f"),
    },
    ("loader", "rows"): {
        "name": ("", ""),
        "ours": ("ours", ".1f"),
        "pil": ("PIL loop", ".1f"),
        "datasets": ("datasets and torchvision", ".1f"),
        "times_faster": ("times as fast as the latter", ".2f"),
    },
    ("loader", "photos"): {
        "name": ("an epoch of photos, by", ""),
        "pixels": ("photos", ""),
        "photos_per_s": ("photos/s", ".1f"),
        "times_faster": ("our first epoch is times as fast", ".2f"),
        "from_files_faster": ("from the files", ".2f"),
        "later_faster": ("later epochs", ".2f"),
    },
    ("wide_pictures", "rows"): {
        "name": ("pretrained on crops of", ""),
        "seeds": ("seeds", "d"),
        "knn": ("kNN on photos, %", ".2f"),
        "knn_std": ("+-", ".2f"),
    },
    ("checkpoint", "rows"): {
        "encoder": ("encoder", ""),
        "mebibytes": ("MiB", ".0f"),
        "stall_ms": ("the loop waits, ms", ".0f"),
        "write_ms": ("a thread writes, ms", ".0f"),
        "step_ms": ("a step, ms", ".0f"),
        "beside_ms": ("a step beside writing, ms", ".0f"),
    },
    ("losses", "rows"): {
        "method": ("method", ""),
        "images": ("images", "d"),
        "dim": ("dim", "d"),
        "ours_ms": ("ours, ms", ".1f"),
        "lightly_ms": ("lightly, ms", ".1f"),
        "times_faster": ("times as fast", ".2f"),
        "times_leaner": ("times as lean", ".2f"),
    },
    ("memory", "rows"): {
        "encoder": ("encoder", ""),
        "views": ("views", "d"),
        "plain_mib": ("plain", ".0f"),
        "blocks_mib": ("`gradient_checkpointing`", ".0f"),
        "parts_mib": ("parts", ".0f"),
        "gradient_difference": ("gradient against plain", ".0e"),
    },
    ("encoders", "rows"): {
        "name": ("encoder", ""),
        "features": ("features", "d"),
        "trained": ("trains 3 steps", ""),
        "resumed": ("resumed", ""),
        "stages": ("stages in the spectra", "d"),
        "errors": ("weights with an OR error", "d"),
        "transformers": ("loaded by transformers", ""),
        "timm": ("by timm", ""),
        "lines": ("by its own lines", ""),
        "notes": ("left out", ""),
    },
    **{("growth", key): GROWTH for key in ("views", "dims", "batches", "sides", "processes")},
}


def cell(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)


def table(rows: list[dict[str, Any]], columns: Columns) -> list[str]:
    heads = [head for head, _ in columns.values()]
    lines = [heads, ["---"] * len(heads)]
    lines += [[cell(row.get(key), form) for key, (_, form) in columns.items()] for row in rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def anatomy(rows: list[dict[str, Any]]) -> list[str]:
    """One column for each case, one line for each part."""
    heads = ["part of a step", *(f"{row['name']}, {row['encoder']}, {row['dim']}" for row in rows)]
    lines = [heads, ["---"] * len(heads), ["whole, ms", *(f"{row['total_ms']:.0f}" for row in rows)]]
    for part in rows[0]["parts_ms"]:
        lines.append([part, *(f"{row['parts_ms'][part] / row['total_ms']:.1%}" for row in rows)])
    return [f"| {' | '.join(line)} |" for line in lines]


SPECIAL = {"anatomy": anatomy}


def source(script: str, results: dict[str, Any]) -> str:
    """Says in one line what a script's figures are from."""
    machine, settings, versions = results["machine"], results["settings"], results["versions"]
    threads = f"{settings['threads']} thread{'s' if settings['threads'] > 1 else ''}"
    where = machine["gpu"] or f"{machine['cpu']}, {threads} of {machine['cores']} cores"
    quick = ", a quick run with small sizes" if settings["quick"] else ""
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", *PEERS.get(script, ())))
    return f"({where}; {packages}; {results['date']}{quick})"


def block(match: re.Match[str]) -> str:
    start, machine, script, key, end = match.groups()
    path = RESULTS / machine / f"{script}.json"
    if not path.exists():
        return f"{start}Not measured.\n{end}"
    results = json.loads(path.read_text())
    rows = results[key]
    lines = SPECIAL[script](rows) if script in SPECIAL else table(rows, TABLES[script, key])
    return "\n".join([start + "", *lines, "", source(script, results), "", end])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    rewrite(PAGES, lambda page: BLOCK.sub(block, page), script="tables", check=args.check)


if __name__ == "__main__":
    main()
