"""The file of a sweep: a base recipe, named changes to it, a grid, seeds, and what is compared."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_ssl_or.errors import InputError, unknown
from hf_ssl_or.evaluation.protocols import get_protocol
from hf_ssl_or.recipe import Recipe, load_recipe, read_variant, recipe_from_dict, with_defaults
from hf_ssl_or.runs.labels import metric_label
from hf_ssl_or.runs.time_to import TimeTo
from hf_ssl_or.settings import unknown_setting
from hf_ssl_or.training.checkpoint_choice import MEASURES

KEYS = (
    *("name", "recipe", "recipes", "overrides", "arms", "grid", "seeds"),
    *("evaluate", "compare", "select", "figures", "time_to", "spectra", "umap"),
)
LABEL_FREE = tuple(measure for measure in MEASURES if measure not in ("knn", "lidar"))  # what results.json holds
TIMED = ("knn", *(measure for measure in LABEL_FREE if metric_label(measure).better == "higher"))
VALIDATION = ("validation", "valid", "val", "dev")
BASE = "base"  # name of the only arm where there is just a grid, or just recipes
ARM, RECIPE = "arm", "recipe"  # what `compare` calls these axes
_NAME = re.compile(r"\w[\w.+-]*")
_UNSAFE = re.compile(r"[^\w.=+-]+")

_WANTED = {"arms": "lists of changes", "recipes": "recipes"}

Load = Callable[[Sequence[str]], Recipe]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """An arm, with one of the recipes and in one cell of the grid.

    Attributes:
        name: Its name, which is its folder's.
        axes: Its place: which arm ("arm"), which recipe ("recipe"), and the values of the grid by dotted setting.
        changes: What it changes in the base recipe, as overrides.
        recipe: The recipe, but for the seed; None for a command.
        command: Arguments of a program with {output} and {seed}; None for a recipe.
    """

    name: str
    axes: Mapping[str, Any]
    changes: tuple[str, ...] = ()
    recipe: Recipe | None = None
    command: tuple[str, ...] | None = None

    @property
    def cell(self) -> dict[str, Any]:
        """Values of the grid's axes by dotted setting."""
        return {key: value for key, value in self.axes.items() if key not in (ARM, RECIPE)}

    def description(self) -> dict[str, Any]:
        """Returns plain data that says what is run."""
        return {"command": list(self.command)} if self.recipe is None else self.recipe.to_dict()  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A sweep, read and checked.

    Attributes:
        name: Name of the file, or what its `name` says.
        arms: What is run.
        seeds: Each arm runs once with every seed.
        grid: Values by dotted setting.
        datasets: Data sets that the encoders are evaluated on besides their own; none for no transfer.
        protocols: How they are evaluated there; None takes the default protocols.
        compare: The axis along which differences are taken, "arm", "recipe" or one of the grid; or names of arms, each
            with the one that it is compared with; None compares each arm with the first of all.
        select: The column by which an arm is selected.
        figures: Columns to draw; None takes the headlines.
        time_to: What the arms are timed to.
        spectra: Arms whose spectra and filters are drawn.
        umap: Arms whose features are drawn in two dimensions.
    """

    name: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    grid: Mapping[str, list[Any]]
    datasets: tuple[str, ...] = ()
    protocols: tuple[str, ...] | None = None
    compare: str | Mapping[str, str] | None = None
    select: str | None = None
    figures: tuple[str, ...] | None = None
    time_to: TimeTo | None = None
    spectra: tuple[str, ...] = ()
    umap: tuple[str, ...] = ()

    def reference(self, arm: Arm) -> Arm | None:
        """Returns the arm that another is compared with; None for what others are compared with."""
        if self.compare is None:
            return None if arm is self.arms[0] else self.arms[0]
        if isinstance(self.compare, Mapping):
            wanted = {**arm.axes, ARM: self.compare.get(arm.axes[ARM])}
            return next((one for one in self.arms if one.axes == wanted), None)
        others = {key: value for key, value in arm.axes.items() if key != self.compare}
        alike = [one for one in self.arms if one.axes.keys() == arm.axes.keys() and {**one.axes, **others} == one.axes]
        first = alike[0] if self.compare in arm.axes else arm
        return None if first is arm else first


def read_plan(source: str | Path | Mapping[str, Any]) -> Plan:
    """Reads a sweep.

    Args:
        source: A YAML file, or its content.

    Raises:
        InputError: A key, an arm or the grid is wrong; the message names it.
    """
    if isinstance(source, Mapping):
        return _Reader(dict(source), str(source.get("name", "sweep")), Path()).plan()
    path = Path(source)
    return _Reader(read_variant(path), str(path), path.parent, path.stem).plan()


class _Reader:
    def __init__(self, tree: dict[str, Any], source: str, folder: Path, name: str = "sweep") -> None:
        self.tree, self.source, self.folder = tree, source, folder
        for key in tree:
            if key not in KEYS:
                raise self.error(unknown_setting("key", str(key), list(KEYS)))
        self.name = str(tree.get("name", name))
        if not _NAME.fullmatch(self.name):
            raise self.error(f"name: {self.name!r}: letters, digits and . + - _ only, as it is a folder's")

    def error(self, problem: object) -> InputError:
        return InputError(f"{self.source}: {problem}")

    def plan(self) -> Plan:
        evaluate = self._evaluate()
        grid = self._grid()
        arms = tuple(self._arms(grid, evaluate))
        self._refuse_twins(arms)
        select = self.tree.get("select")
        if select is not None:
            self._check_select(select, arms)
        figures = self._words("figures") if self.tree.get("figures") is not None else None
        return Plan(
            name=self.name,
            arms=arms,
            seeds=self._seeds(arms),
            grid=grid,
            datasets=evaluate.get("datasets", ()),
            protocols=evaluate.get("protocols"),
            compare=self._compare(arms),
            select=select,
            figures=figures,
            time_to=self._time_to(arms),
            spectra=self._drawn_arms("spectra", arms),
            umap=self._drawn_arms("umap", arms),
        )

    # -- the keys -----------------------------------------------------------------------------------------------------

    def _words(self, key: str, value: Any = None) -> tuple[str, ...]:
        value = self.tree.get(key) if value is None else value
        if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
            raise self.error(f"{key}: a list of names is wanted, not {value!r:.80}")
        if len(set(value)) < len(value):
            raise self.error(f"{key}: names one twice: {', '.join(value)}")
        return tuple(value)

    def _evaluate(self) -> dict[str, Any]:
        value = self.tree.get("evaluate") or {}
        if not isinstance(value, Mapping):
            raise self.error(f"evaluate: datasets and protocols are wanted, not {value!r:.80}")
        for key in value:
            if key not in ("datasets", "protocols"):
                raise self.error(unknown_setting("key in evaluate", str(key), ["datasets", "protocols"]))
        found = {key: self._words(f"evaluate.{key}", names) for key, names in value.items() if names is not None}
        for name in found.get("protocols", ()):
            try:
                get_protocol(name)
            except InputError as error:
                raise self.error(f"evaluate.protocols: {error}") from error
        return found

    def _grid(self) -> dict[str, list[Any]]:
        grid = self.tree.get("grid") or {}
        if not isinstance(grid, Mapping):
            raise self.error(f"grid: dotted settings with lists of values are wanted, not {grid!r:.80}")
        for key, values in grid.items():
            self._refuse_seed(f"grid.{key}", str(key))
            if not isinstance(values, list) or not values:
                raise self.error(f"grid.{key}: a list of values is wanted, not {values!r:.80}")
            if len({json.dumps(value, sort_keys=True, default=str) for value in values}) < len(values):
                raise self.error(f"grid.{key}: has a value twice: {values}")
        return {str(key): values for key, values in grid.items()}

    def _seeds(self, arms: Sequence[Arm]) -> tuple[int, ...]:
        recipes = [arm.recipe for arm in arms if arm.recipe is not None]
        seeds = self.tree.get("seeds", [recipes[0].training.seed if recipes else 0])
        if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
            raise self.error(f"seeds: a list of whole numbers of 0 or more is wanted, not {seeds!r:.80}")
        if twice := [seed for seed in dict.fromkeys(seeds) if seeds.count(seed) > 1]:
            raise self.error(f"seeds: {twice[0]} is given twice")
        return tuple(seeds)

    def _drawn_arms(self, key: str, arms: Sequence[Arm]) -> tuple[str, ...]:
        """Returns the arms that a key names, each of which runs a recipe."""
        if self.tree.get(key) is None:
            return ()
        known = {arm.name: arm for arm in arms}
        names = self._words(key)
        for name in names:
            if name not in known:
                raise self.error(f"{key}: {unknown('arm', name, known)}")
            if known[name].recipe is None:
                raise self.error(f"{key}: arm {name} is a command, which leaves numbers only; name arms of a recipe")
        return names

    def _compare(self, arms: Sequence[Arm]) -> str | Mapping[str, str] | None:
        compare = self.tree.get("compare")
        if isinstance(compare, Mapping):
            names = [arm.axes[ARM] for arm in arms]
            for name in [str(name) for pair in compare.items() for name in pair]:
                if name not in names:
                    raise self.error(f"compare: {unknown('arm', name, names)}")
            return compare
        axes = list(dict.fromkeys(axis for arm in arms for axis in arm.axes))
        if compare is not None and compare not in axes:
            raise self.error(f"compare: {unknown('axis', str(compare), axes)}")
        return compare

    def _check_select(self, select: Any, arms: Sequence[Arm]) -> None:
        """Refuses a column of test images: who selects by it reports the best of many, not a result."""
        if select in LABEL_FREE or select == "monitor/knn":  # on held-out training images
            return
        for arm in arms:
            data = None if arm.recipe is None else arm.recipe.evaluation_data or arm.recipe.data
            is_own = isinstance(select, str) and select.count("/") < 2  # not of a data set of `evaluate`
            if not is_own or data is None or data.test_split not in VALIDATION:
                split = "" if data is None else f" (arm {arm.name}: split {data.test_split!r})"
                raise self.error(
                    f"select: {select!r} may be measured on test images{split}; take one of {', '.join(LABEL_FREE)}, "
                    "or set data.test_split: validation"
                )

    def _time_to(self, arms: Sequence[Arm]) -> TimeTo | None:
        value, keys = self.tree.get("time_to"), ["metric", "arm", "value"]
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.error(f"time_to: a metric with an arm or a value is wanted, not {value!r:.80}")
        for key in value:
            if key not in keys:
                raise self.error(unknown_setting("key in time_to", str(key), keys))
        metric, arm, threshold = (value.get(key) for key in keys)
        if metric not in TIMED:
            raise self.error(f"time_to.metric: {unknown('metric', str(metric), TIMED)}")
        if (arm is None) == (threshold is None):
            raise self.error("time_to: give arm, whose last value is to be reached, or value: one of them")
        names = [one.name for one in arms]
        if arm is not None and arm not in names:
            raise self.error(f"time_to.arm: {unknown('arm', str(arm), names)}")
        if threshold is not None and (type(threshold) not in (int, float) or not -1e300 < threshold < 1e300):
            raise self.error(f"time_to.value: a number is wanted, not {threshold!r:.80}")
        for one in arms:
            if one.recipe is not None and not one.recipe.training.monitor_every:
                raise self.error(
                    f"time_to: arm {one.name} is not evaluated while it trains; set training.monitor_every"
                )
        return TimeTo(metric=metric, arm=arm, value=threshold)

    # -- arms ---------------------------------------------------------------------------------------------------------

    def _arms(self, grid: Mapping[str, list[Any]], evaluate: Mapping[str, Any]) -> Iterator[Arm]:
        named = {name: value for name, value in self._named("arms").items() if value is not None}
        recipes = {name: path for name, path in self._named("recipes").items() if path is not None}
        if not named and not grid and not recipes:
            raise self.error("arms, grid, recipes: name one of them, there is nothing to compare")
        named = named or {BASE: []}
        loads: dict[str, Load] = {}
        if any(not _is_command(value) for value in named.values()):
            loads = self._loads(recipes, evaluate)
        bases = {recipe: load([]) for recipe, load in loads.items()}
        changes = {
            name: self._arm_changes(name, value, loads, bases, grid)
            for name, value in named.items()
            if not _is_command(value)
        }
        for i, recipe in enumerate(loads or [""]):
            for name, value in named.items():
                if name in changes:
                    yield from self._cells(name, changes[name], recipe, loads[recipe], grid)
                elif i == 0:
                    yield self._command(name, value)

    def _arm_changes(
        self, name: str, value: Any, loads: dict[str, Load], bases: dict[str, Recipe], grid: Mapping[str, list[Any]]
    ) -> dict[str, str]:
        """Returns what an arm changes, unless that changes no recipe at all, or what the grid changes too."""
        changes = self._changes(f"arms.{name}", value)
        if changes and all(self._load(load, changes, f"arms.{name}") == bases[key] for key, load in loads.items()):
            told = ", ".join(f"{key}={text}" for key, text in changes.items())
            raise self.error(f"arms.{name}: changes nothing: {told} is the base recipe; write [] for the base itself")
        if both := changes.keys() & grid.keys():
            raise self.error(f"arms.{name}: sets {min(both)}, which the grid sets too")
        return changes

    def _cells(
        self, name: str, changes: dict[str, str], recipe: str, load: Load, grid: Mapping[str, list[Any]]
    ) -> Iterator[Arm]:
        """Returns an arm of one recipe in every cell of the grid."""
        for values in itertools.product(*grid.values()):
            cell = dict(zip(grid, values, strict=True))
            all_changes = changes | {key: _text(value) for key, value in cell.items()}
            own_name = "" if name == BASE and (recipe or cell) else name
            full = ",".join([*filter(None, [recipe, own_name]), *_cell_parts(cell)])
            yield Arm(
                name=full,
                axes={ARM: name} | ({RECIPE: recipe} if recipe else {}) | cell,
                changes=tuple(f"{key}={text}" for key, text in all_changes.items()),
                recipe=self._load(load, all_changes, full if recipe or cell else f"arms.{name}"),
            )

    def _named(self, key: str) -> dict[str, Any]:
        """Returns what `arms` or `recipes` names."""
        named = self.tree.get(key) or {}
        if not isinstance(named, Mapping):
            raise self.error(f"{key}: names with {_WANTED[key]} are wanted, not {named!r:.80}")
        for name in named:
            if not _NAME.fullmatch(str(name)):
                raise self.error(f"{key}.{name}: letters, digits and . + - _ only, as the name is a folder's")
        return {str(name): value for name, value in named.items()}

    def _loads(self, recipes: Mapping[str, Any], evaluate: Mapping[str, Any]) -> dict[str, Load]:
        """Returns what loads each base recipe with further changes, by its name; the only one of `recipe` has none."""
        base = self.tree.get("recipe")
        if recipes and base is not None:
            raise self.error("recipe, recipes: give one of them")
        if not recipes and not isinstance(base, str | Mapping):
            raise self.error("recipe: name a recipe that the arms change, or write it here")
        overrides = [f"{key}={text}" for key, text in self._changes("overrides", self.tree.get("overrides")).items()]
        if "protocols" in evaluate and "datasets" not in evaluate:
            overrides.append(f"evaluation.protocols={_text(list(evaluate['protocols']))}")
        where = {name: f"recipes.{name}" for name in recipes} or {"": "recipe"}
        return {name: self._loader(where[name], recipe, overrides) for name, recipe in (recipes or {"": base}).items()}

    def _loader(self, where: str, recipe: Any, overrides: list[str]) -> Load:
        if isinstance(recipe, Mapping):
            tree = with_defaults(recipe, self.folder)
            return lambda changes: recipe_from_dict(tree, f"{self.source}: {where}", [*overrides, *changes])
        if not isinstance(recipe, str):
            raise self.error(f"{where}: name a recipe, or write it here, not {recipe!r:.80}")
        beside = self.folder / recipe
        path = beside if any(beside.parent.glob(f"{beside.stem.partition('-')[0]}*")) else Path(recipe)
        return lambda changes: load_recipe(path, [*overrides, *changes])

    def _load(self, load: Load, changes: Mapping[str, str], where: str) -> Recipe:
        try:
            return load([f"{key}={text}" for key, text in changes.items()])
        except InputError as error:
            raise self.error(f"{where}: {error}") from error

    def _changes(self, where: str, value: Any) -> dict[str, str]:
        """Returns YAML text by dotted setting, of a list of overrides or a mapping."""
        if isinstance(value, Mapping):
            changes = {str(key): _text(item) for key, item in value.items()}
        elif isinstance(value, list) and all(isinstance(item, str) and "=" in item for item in value):
            pairs = [item.partition("=") for item in value]
            changes = {key: text for key, _, text in pairs}
            if len(changes) < len(pairs):
                keys = [key for key, _, _ in pairs]
                raise self.error(f"{where}: sets {next(key for key in keys if keys.count(key) > 1)} twice")
        elif value is None:
            changes = {}
        else:
            raise self.error(f"{where}: a list of settings like training.epochs=5 is wanted, not {value!r:.80}")
        for key in changes:
            self._refuse_seed(where, key)
        return changes

    def _refuse_seed(self, where: str, key: str) -> None:
        if key in ("training.seed", "training.output_dir"):
            raise self.error(f"{where}: {key} is the sweep's; write seeds: [0, 1, 2] instead")

    def _command(self, name: str, value: Mapping[str, Any]) -> Arm:
        where, command = f"arms.{name}.command", value["command"]
        if len(value) > 1:
            raise self.error(f"arms.{name}: command goes with nothing else, not {', '.join(map(str, value))}")
        if (
            not isinstance(command, list)
            or not command
            or not all(type(item) in (str, int, float) for item in command)
        ):
            raise self.error(f"{where}: a list of a program and its arguments is wanted, not {command!r:.80}")
        words = tuple(map(str, command))
        for place in ("{output}", "{seed}"):
            if not any(place in word for word in words):
                raise self.error(f"{where}: has no {place}, so its runs would all be the same one")
        return Arm(name=name, axes={ARM: name}, command=words)

    def _refuse_twins(self, arms: Sequence[Arm]) -> None:
        runs: dict[str, str] = {}
        folders: dict[str, str] = {}
        for arm in arms:
            run = json.dumps(arm.description(), sort_keys=True)
            if (other := runs.setdefault(run, arm.name)) != arm.name:
                raise self.error(f"arms {other}, {arm.name}: are the same run; leave one out")
            if folders.setdefault(arm.name.lower(), run) != run:
                other = next(one.name for one in arms if one.name.lower() == arm.name.lower())
                raise self.error(f"arms {other}, {arm.name}: would share a folder; give them names in arms")


def _is_command(arm: Any) -> bool:
    return isinstance(arm, Mapping) and "command" in arm


def _text(value: Any) -> str:
    return json.dumps(value)  # which is YAML, with words in quotes


def _cell_parts(cell: Mapping[str, Any]) -> list[str]:
    """Names a cell, "projector_dim=64" for each axis: the last part of its key, or all of it where two end alike."""
    lasts = [key.rpartition(".")[2] for key in cell]
    parts = []
    for key, last in zip(cell, lasts, strict=True):
        value = cell[key] if isinstance(cell[key], str) else _text(cell[key])
        parts.append(f"{last if lasts.count(last) == 1 else key}={value}")
    return [_UNSAFE.sub("-", part).strip("-") for part in parts]
