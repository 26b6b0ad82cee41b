"""From the folders of a sweep's runs to its results: what each run measured, in columns."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation.transfer import short_names
from hf_ssl_or.recipe import Recipe, recipe_from_dict
from hf_ssl_or.runs import layout
from hf_ssl_or.runs.labels import printable
from hf_ssl_or.runs.reader import read_run
from hf_ssl_or.runs.results import Evaluation, read_results
from hf_ssl_or.runs.sweep_results import ArmValues, RunValues, SweepResults
from hf_ssl_or.runs.time_to import MINUTES, CurvePoint
from hf_ssl_or.sweeps.plan import LABEL_FREE, RECIPE, Arm, Plan
from hf_ssl_or.training.description import identity

TRANSFER = "transfer"  # within a run's folder
_SHOWN = ("rankme", "minutes")


def run_folder(root: Path, arm: Arm, seed: int) -> Path:
    """Returns the folder of a run."""
    return root / arm.name / f"seed-{seed}"


def is_trained(arm: Arm, seed: int, folder: Path) -> bool:
    """Says whether a run has ended and its results are those of the arm's recipe, evaluation included.

    Raises:
        InputError: Its results are of another version or damaged.
    """
    if not (folder / layout.RESULTS).is_file():
        return False
    if arm.recipe is None:
        try:
            return bool(_command_results(folder))
        except InputError:
            return False  # the command is started again, and what it leaves then counts
    path = folder / layout.RESULTS
    found = recipe_from_dict(read_results(path).recipe, f"{path}: recipe")  # newer settings get defaults
    return _decides(found) == _decides(arm.recipe.override([f"training.seed={seed}"]))


def is_transferred(plan: Plan, folder: Path) -> bool:
    """Says whether a run's encoder has been evaluated on all data sets of the sweep."""
    try:
        evaluations = _transfer(folder)
    except InputError:
        return False
    have = {(entry.dataset, entry.protocol) for entry in evaluations}
    names = short_names(plan.datasets, "data set")
    protocols = plan.protocols or tuple(dict.fromkeys(protocol for _, protocol in have))
    return bool(protocols) and have == {(name, protocol) for name in names for protocol in protocols}


def _decides(recipe: Recipe) -> Any:
    """Returns the part of a recipe that decides what a run measures."""
    tree = json.loads(json.dumps(recipe.to_dict()))  # as it comes back from JSON
    return identity(tree), tree["evaluation"], tree["evaluation_data"]


def gather(plan: Plan, root: Path, failures: dict[tuple[str, int], str]) -> SweepResults:
    """Reads what the runs of a sweep have measured so far.

    Args:
        plan: The sweep.
        root: Its folder.
        failures: Why a run has failed, by arm and seed.
    """
    arms, columns = [], dict[str, None]()
    for arm in plan.arms:
        runs = []
        for seed in plan.seeds:
            folder, failure = run_folder(root, arm, seed), failures.get((arm.name, seed))
            values = RunValues(seed=seed, failure=failure)
            if failure is None and is_trained(arm, seed, folder):
                values, headlines = _values(arm, seed, folder)
                columns.update(dict.fromkeys(headlines))
            runs.append(values)
        changes = list(arm.changes)
        command = None if arm.command is None else list(arm.command)
        reference = plan.reference(arm)
        arms.append(
            ArmValues(
                name=arm.name,
                recipe=arm.axes.get(RECIPE),
                changes=changes,
                cell=arm.cell,
                command=command,
                compared_to=None if reference is None else reference.name,
                runs=runs,
            )
        )
    if plan.select is not None:
        columns.setdefault(plan.select)
    last = [name for name in _SHOWN if name in columns]
    return SweepResults(
        name=plan.name,
        arms=arms,
        grid=dict(plan.grid),
        columns=[*(name for name in columns if name not in last), *last],
        select=plan.select,
        figures=None if plan.figures is None else list(plan.figures),
        time_to=plan.time_to,
    )


def _values(arm: Arm, seed: int, folder: Path) -> tuple[RunValues, list[str]]:
    """Returns what a run measured, and the columns that a table shows."""
    if arm.recipe is None:
        metrics, curve = _command_results(folder)
        return RunValues(seed=seed, metrics=metrics, curve=curve), list(metrics)
    record = read_run(folder)
    results = record.results
    assert results is not None  # is_trained has read them
    metrics, headlines = {}, []
    for entry in [*results.evaluations, *_transfer(folder)]:
        place = f"{entry.protocol}/" if entry.dataset is None else f"{entry.dataset}/{entry.protocol}/"
        metrics |= {f"{place}{name}": metric.mean for name, metric in entry.test_metrics()}
        headlines.append(f"{place}{entry.headline}")
    metrics |= {name: value for name, value in results.collapse.measures.items() if name in LABEL_FREE}
    if record.monitor and (knn := record.monitor[-1].get("knn")) is not None:
        metrics["monitor/knn"] = knn
    if (seconds := record.step_seconds) is not None:
        metrics["minutes"] = seconds / 60
    values = RunValues(
        seed=seed,
        metrics=metrics,
        curve=record.curve,
        environment=results.environment,
        weights_sha256=results.weights_sha256,
    )
    return values, [*headlines, *(name for name in _SHOWN if name in metrics)]


def _transfer(folder: Path) -> list[Evaluation]:
    path = folder / TRANSFER / layout.RESULTS
    if not path.is_file():
        return []
    entries = _json(path).get("evaluations")
    if not isinstance(entries, list):
        raise InputError(f"{path}: evaluations: is no list")
    return [Evaluation.from_dict(entry, f"{path}: evaluations") for entry in entries]


def _command_results(folder: Path) -> tuple[dict[str, float], list[CurvePoint]]:
    """Reads what a command measured: its metrics and, where it left one, its curve.

    Raises:
        InputError: It left no JSON, or none with finite numbers under "metrics", or a curve that is none.
    """
    path = folder / layout.RESULTS
    tree = _json(path)
    metrics, curve = tree.get("metrics"), tree.get("curve", [])
    if not isinstance(metrics, dict) or not metrics:
        raise InputError(f'{path}: holds no {{"metrics": {{name: number}}}}')
    if not isinstance(curve, list) or not all(isinstance(point, dict) and MINUTES in point for point in curve):
        raise InputError(f'{path}: curve: is no list of {{"minutes": number, name: number}}')
    points = [_numbers(point, f"{path}: curve.{i}") for i, point in enumerate(curve)]
    for i, (before, after) in enumerate(pairwise([0.0, *(point[MINUTES] for point in points)])):
        if after <= before:
            raise InputError(f"{path}: curve.{i}.minutes: {after:g} is not above {before:g}; minutes must increase")
    return _numbers(metrics, f"{path}: metrics"), points


def _numbers(tree: dict[str, Any], where: str) -> dict[str, float]:
    for name, value in tree.items():
        if type(value) not in (int, float) or not -1e308 < value < 1e308:
            raise InputError(f"{where}.{printable(name)}: is no finite number")
    return {printable(name): float(value) for name, value in tree.items()}


def _json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read: {printable(error)}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path}: holds no object")
    return tree


def command_problem(arm: Arm, folder: Path) -> str | None:
    """Says what is wrong with what a command left; None for what can be read, and for runs of recipes."""
    if arm.recipe is not None:
        return None
    try:
        _command_results(folder)
    except InputError as error:
        return str(error)
    return None
