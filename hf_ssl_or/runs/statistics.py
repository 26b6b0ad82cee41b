"""Means and paired differences over seeds, with Student's intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hf_ssl_or.runs.results import Metric

MOST_SEEDS = 1000  # that `Difference.seeds_needed` counts to


def summarize(values: Sequence[float]) -> Metric:
    """Returns mean and standard deviation (of a sample, n - 1) of one value or more."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return Metric(mean=statistics.fmean(values), std=std, values=list(values))


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Paired differences over seeds.

    Attributes:
        seeds: The number n of pairs.
        mean: Of the differences.
        std: Their standard deviation, of a sample; None for one pair.
    """

    seeds: int
    mean: float
    std: float | None

    @property
    def half_width(self) -> float | None:
        """Half the width of the 95 % t interval of the mean; None for one pair."""
        return None if self.std is None else t_quantile(self.seeds - 1) * self.std / math.sqrt(self.seeds)

    @property
    def seeds_needed(self) -> int | None:
        """Seeds at which the interval reaches half the difference to either side, were both as measured.

        None without a standard deviation, and for more than `MOST_SEEDS`.
        """
        if self.std is None:
            return None
        low, high = 1, MOST_SEEDS + 1
        while high - low > 1:  # the interval shrinks with n
            n = (low + high) // 2
            narrow = t_quantile(n - 1) * self.std / math.sqrt(n) <= abs(self.mean) / 2
            low, high = (low, n) if narrow else (n, high)
        return high if high <= MOST_SEEDS else None

    def describe(self) -> str:
        """Returns the difference with its interval in words, and how many seeds a clear answer would take."""
        if (half := self.half_width) is None:
            return f"{self.mean:+.2f} (1 seed: no interval)"
        text = f"{self.mean:+.2f} [{self.mean - half:+.2f}, {self.mean + half:+.2f}]"
        if half <= abs(self.mean) / 2:
            return text
        needed = self.seeds_needed
        return (
            f"{text} (\N{PLUS-MINUS SIGN} half of it: {f'more than {MOST_SEEDS}' if needed is None else needed} seeds)"
        )


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """Returns ours minus theirs over the seeds that both have; None where they share none."""
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if not differences:
        return None
    metric = summarize(differences)
    return Difference(seeds=len(differences), mean=metric.mean, std=metric.std)


def t_quantile(freedom: int, confidence: float = 0.95) -> float:
    """Returns t such that |T| <= t with a probability of `confidence`, T of Student's distribution.

    Args:
        freedom: Degrees of freedom, 1 or more.
        confidence: Between 0 and 1.
    """
    low, high = 0.0, 1.0
    while _central_probability(high, freedom) < confidence:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _central_probability(middle, freedom) < confidence else (low, middle)
    return (low + high) / 2


def _central_probability(t: float, freedom: int) -> float:
    """P(|T| <= t), by the finite series for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    square, odd = math.cos(angle) ** 2, freedom % 2
    term, total = (math.cos(angle), 0.0) if odd else (1.0, 0.0)
    for k in range(1, freedom // 2 + 1):
        total += term
        term *= square * (2 * k - 1 + odd) / (2 * k + odd)
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
