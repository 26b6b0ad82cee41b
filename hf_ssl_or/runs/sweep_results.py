"""What a sweep's `results.json` is: every value of every run, by arm and seed."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

from hf_ssl_or.runs.labels import MetricLabel, metric_label, printable
from hf_ssl_or.runs.representations import Representations
from hf_ssl_or.runs.results import SCHEMA_VERSION, Environment, Metric, Record
from hf_ssl_or.runs.statistics import Difference, paired_difference, summarize
from hf_ssl_or.runs.time_to import CurvePoint, TimeTo, first_minutes, points

MARK = "sweep.json"  # the file that makes a folder a sweep's
TABLE = "table.md"


@dataclass(frozen=True, kw_only=True)
class RunValues(Record):
    """One run.

    Attributes:
        seed: Its seed.
        metrics: Values by column; none for a run that has failed or has not been run.
        curve: What the monitor has measured at each evaluation, with the `minutes` of training until then.
        failure: Why it has failed.
        environment: Software and kind of device; None for a command, and where there are no metrics.
        weights_sha256: Hash of the weights that were evaluated.
        representations: What figures show of it, where the sweep asks for that.
    """

    seed: int
    metrics: dict[str, float] = field(default_factory=dict)
    curve: list[CurvePoint] = field(default_factory=list)
    failure: str | None = None
    environment: Environment | None = None
    weights_sha256: str | None = None
    representations: Representations | None = None


@dataclass(frozen=True, kw_only=True)
class ArmValues(Record):
    """The runs of one arm, or of one cell of the grid.

    Attributes:
        name: Its name.
        recipe: Name of its base recipe, where there are several.
        changes: Settings that make it differ from the base recipe, as overrides.
        cell: Values of the grid's axes.
        command: What was run in place of a recipe.
        compared_to: Name of the arm that its differences are to; None for what others are compared with.
        runs: One per seed.
    """

    name: str
    recipe: str | None = None
    changes: list[str] = field(default_factory=list)
    cell: dict[str, Any] = field(default_factory=dict)
    command: list[str] | None = None
    compared_to: str | None = None
    runs: list[RunValues]

    def values(self, column: str) -> dict[int, float]:
        """Returns the values of a column by seed."""
        return {run.seed: run.metrics[column] for run in self.runs if column in run.metrics}

    def metric(self, column: str) -> Metric | None:
        """Returns mean and standard deviation of a column over seeds; None without a value."""
        values = list(self.values(column).values())
        return summarize(values) if values else None

    def points(self, metric: str) -> dict[int, list[tuple[float, float]]]:
        """Returns (minutes, value) of every evaluation by seed, of the seeds that have any."""
        found = {run.seed: points(run.curve, metric) for run in self.runs}
        return {seed: curve for seed, curve in found.items() if curve}

    @property
    def failure(self) -> str | None:
        """Why a run of the arm has failed, the first one."""
        failed = [run for run in self.runs if run.failure is not None]
        return f"seed {failed[0].seed}: {failed[0].failure}" if failed else None


@dataclass(frozen=True, kw_only=True)
class SweepResults(Record):
    """A sweep, finished or not.

    Attributes:
        schema_version: Version of this form.
        name: Its name.
        arms: By recipe, then in the order of the file.
        grid: Values of each axis by dotted setting.
        columns: What tables show: the headline of each protocol, label-free measures, minutes.
        select: The column by which an arm is selected.
        figures: Columns to draw; None takes those of `columns` that are accuracies.
        time_to: What the arms are timed to.
    """

    schema_version: int = SCHEMA_VERSION
    name: str
    arms: list[ArmValues]
    grid: dict[str, list[Any]] = field(default_factory=dict)
    columns: list[str]
    select: str | None = None
    figures: list[str] | None = None
    time_to: TimeTo | None = None

    @property
    def selected(self) -> str | None:
        """Name of the arm with the best mean of the column `select`; None without."""
        if self.select is None:
            return None
        goodness = column_label(self.select).goodness
        means = {arm.name: metric.mean for arm in self.arms if (metric := arm.metric(self.select)) is not None}
        return max(means, key=lambda name: goodness(means[name]), default=None)

    @property
    def failures(self) -> dict[str, str]:
        """Why a run has failed, by arm."""
        return {arm.name: arm.failure for arm in self.arms if arm.failure is not None}

    def difference(self, arm: ArmValues, column: str) -> Difference | None:
        """Returns the paired difference to the arm it is compared with; None without one or a seed that both have."""
        other = next((one for one in self.arms if one.name == arm.compared_to), None)
        return None if other is None else paired_difference(arm.values(column), other.values(column))

    @property
    def thresholds(self) -> dict[int, float]:
        """The values that runs are timed to by seed: where the arm that gives them ends with the same seed."""
        if self.time_to is None:
            return {}
        if self.time_to.value is not None:
            return {run.seed: self.time_to.value for arm in self.arms for run in arm.runs}
        arm = next((one for one in self.arms if one.name == self.time_to.arm), None)
        return {} if arm is None else {seed: curve[-1][1] for seed, curve in arm.points(self.time_to.metric).items()}

    @property
    def threshold(self) -> float | None:
        """The mean of `thresholds`; None without, and while no run of the arm that gives them has been evaluated."""
        return statistics.fmean(self.thresholds.values()) if self.thresholds else None

    def minutes_to(self, arm: ArmValues) -> dict[int, float]:
        """Returns the minutes of training until the threshold of the seed, of the seeds that reach it."""
        if self.time_to is None:
            return {}
        curves, metric = {run.seed: run.curve for run in arm.runs}, self.time_to.metric
        found = {seed: first_minutes(curves.get(seed, []), metric, value) for seed, value in self.thresholds.items()}
        return {seed: minutes for seed, minutes in found.items() if minutes is not None}

    @property
    def timed_against(self) -> ArmValues:
        """The arm that others are sooner or later than: the one that gives the threshold, else the first."""
        named = None if self.time_to is None else self.time_to.arm
        return next((arm for arm in self.arms if arm.name == named), self.arms[0])

    def times_sooner(self, arm: ArmValues) -> Difference | None:
        """Returns the logarithm of how many times sooner than `timed_against` an arm is at the threshold, over seeds.

        None for that arm itself, and where no seed of both reaches the threshold.
        """
        if arm is self.timed_against:
            return None
        logs = [
            {seed: math.log(minutes) for seed, minutes in self.minutes_to(one).items()}
            for one in (self.timed_against, arm)
        ]
        return paired_difference(*logs)


def column_label(column: str) -> MetricLabel:
    """Returns how a column is shown: "knn/top1_k20" is top-1 of the protocol knn, "dtd/knn/top1_k20" that on dtd."""
    *where, measure = column.split("/")
    label = metric_label(measure)
    name = printable(" ".join([*where, label.name]))
    return MetricLabel(name, label.meaning, label.better, label.unit)
