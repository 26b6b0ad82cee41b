"""How soon a run is as good as wanted: minutes of training until a measure of the monitor's looks is at a value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from hf_ssl_or.runs.results import Record

MINUTES = "minutes"
Look = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class TimeTo(Record):
    """What arms are timed to.

    Attributes:
        metric: A measure of the monitor's looks.
        arm: Name of the arm whose last value is to be reached, seed by seed; None for `value`.
        value: The value to be reached; None for that of `arm`.
    """

    metric: str
    arm: str | None = None
    value: float | None = None


def points(curve: Sequence[Look], metric: str) -> list[tuple[float, float]]:
    """Returns (minutes, value) of each look that has a metric."""
    return [(look[MINUTES], look[metric]) for look in curve if metric in look]


def first_minutes(curve: Sequence[Look], metric: str, threshold: float) -> float | None:
    """Returns the minutes until a metric first is at a threshold or over it; None where it never is.

    They are linear between two looks; where the first look is over it already, they are the first look's.
    """
    found = points(curve, metric)
    if found and found[0][1] >= threshold:
        return found[0][0]
    for (early, below), (late, above) in pairwise(found):
        if above >= threshold:
            return early + (threshold - below) / (above - below) * (late - early)
    return None
