"""The folder of a sweep: whose it is, and what each arm in it is a run of."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from hf_ssl_or.errors import InputError
from hf_ssl_or.recipe import recipe_from_dict
from hf_ssl_or.runs.results import SCHEMA_VERSION
from hf_ssl_or.runs.sweep_results import MARK
from hf_ssl_or.sweeps.plan import Arm, Plan
from hf_ssl_or.training.description import first_difference, identity, write_recipe

ARM = "arm.yaml"  # what an arm runs: its recipe, or its command
_OLD = ".old-"


def prepare(plan: Plan, root: Path, tell: Callable[[str], None]) -> None:
    """Makes a sweep's folder, and empties the folder of each arm that has changed since.

    Args:
        plan: The sweep.
        root: Its folder, new, empty or of an earlier call; the caller holds its lock.
        tell: Is told a line about each arm that has changed or has left the file.

    Raises:
        InputError: The folder holds something else, or another sweep.
    """
    _check_owner(plan, root)
    changed = {arm.name: what for arm in plan.arms if (what := _change(arm, root / arm.name)) is not None}
    kept = [arm for arm in plan.arms if arm.name not in changed and (root / arm.name / ARM).exists()]
    if len(changed) > 1 and not kept:
        name, what = next(iter(changed.items()))
        raise InputError(
            f"{root}: holds another sweep, as no arm is what it was (arm {name}: {what}); give another --output"
        )
    write_json({"schema_version": SCHEMA_VERSION, "name": plan.name}, root / MARK)
    for left in root.glob(f"{_OLD}*"):  # by a kill within what follows
        shutil.rmtree(left)
    for name, what in changed.items():
        tell(f"arm {name} has changed and runs again: {what}")
        (root / name).rename(root / f"{_OLD}{name}")
        shutil.rmtree(root / f"{_OLD}{name}")
    names = {arm.name for arm in plan.arms}
    for folder in sorted(path.parent.name for path in root.glob(f"*/{ARM}")):
        if folder not in names:
            tell(f"arm {folder} is not in the file any more; its runs stay in {root / folder}")
    for arm in plan.arms:
        (root / arm.name).mkdir(exist_ok=True)
        write_recipe(arm.description(), root / arm.name / ARM)


def _check_owner(plan: Plan, root: Path) -> None:
    mark = root / MARK
    if not mark.exists():
        others = [path.name for path in root.iterdir() if path.name != ".lock"]
        if others:
            raise InputError(f"{root}: holds {min(others)} and no sweep; give another --output")
        return
    try:
        found = json.loads(mark.read_text(encoding="utf-8"))
        name, version = found["name"], found["schema_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{mark}: cannot be read; give another --output") from error
    if version != SCHEMA_VERSION:
        raise InputError(f"{mark}: schema_version: is {version}, and {SCHEMA_VERSION} is what this version reads")
    if name != plan.name:
        raise InputError(f"{root}: holds another sweep, {name!r}, not {plan.name!r}; give another --output")


def _change(arm: Arm, folder: Path) -> str | None:
    """Says how an arm differs from what its folder has run; None for none, and for a new arm."""
    path = folder / ARM
    if not path.exists():
        if folder.exists() and any(folder.iterdir()):
            raise InputError(f"{folder}: holds something else than runs of arm {arm.name}; give another --output")
        return None
    try:
        old = yaml.safe_load(path.read_text(encoding="utf-8"))
        if "command" not in old:
            old = recipe_from_dict(old, str(path)).to_dict()  # settings that are newer have their defaults
        old = _without_seed(json.loads(json.dumps(old)))
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: is damaged or of another version; remove {folder} to run it again") from error
    return first_difference(old, _without_seed(json.loads(json.dumps(arm.description()))))


def _without_seed(description: dict[str, Any]) -> dict[str, Any]:
    """Returns what decides the weights of an arm's runs, the seed apart."""
    if "command" in description:
        return {"command": description["command"]}
    kept = identity(description)
    del kept["training"]["seed"]
    return kept


def write_json(tree: dict[str, Any], path: Path) -> None:
    """Writes plain data; a kill leaves the old file or the new one."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(tree) + "\n", encoding="utf-8")
    temporary.replace(path)
