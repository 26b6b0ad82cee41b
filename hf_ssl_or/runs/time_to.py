"""How soon a run is as good as wanted: minutes of training until a measure of the monitor is at a value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from hf_ssl_or.runs.results import Record

MINUTES = "minutes"
CurvePoint = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class TimeTo(Record):
    """What arms are timed to.

    Attributes:
        metric: A measure of the monitor.
        arm: Name of the arm whose last value is to be reached, seed by seed; None for `value`.
        value: The value to be reached; None for that of `arm`.
    """

    metric: str
    arm: str | None = None
    value: float | None = None


def points(curve: Sequence[CurvePoint], metric: str) -> list[tuple[float, float]]:
    """Returns (minutes, value) of each evaluation that has a metric."""
    return [(point[MINUTES], point[metric]) for point in curve if metric in point]


def first_minutes(curve: Sequence[CurvePoint], metric: str, threshold: float) -> float | None:
    """Returns the minutes until a metric first is at a threshold or over it; None where it never is.

    They are linear between two evaluations; where the first is over it already, they are the first one's.
    """
    found = points(curve, metric)
    if found and found[0][1] >= threshold:
        return found[0][0]
    for (early, below), (late, above) in pairwise(found):
        if above >= threshold:
            return early + (threshold - below) / (above - below) * (late - early)
    return None
