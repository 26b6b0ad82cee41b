"""Minutes until a value, against closed forms, and how many times sooner an arm is than another."""

from __future__ import annotations

import math

import pytest

from hf_ssl_or.runs.sweep_results import ArmValues, RunValues, SweepResults
from hf_ssl_or.runs.time_to import TimeTo, first_minutes


def line(seed: int, slope: float, minutes: tuple[float, ...] = (1.0, 2.0, 4.0)) -> RunValues:
    """A run whose kNN is `slope` percent per minute."""
    return RunValues(seed=seed, curve=[{"minutes": x, "knn": slope * x} for x in minutes])


def results(time_to: TimeTo, **arms: list[RunValues]) -> SweepResults:
    made = [ArmValues(name=name, runs=runs) for name, runs in arms.items()]
    return SweepResults(name="times", arms=made, columns=[], time_to=time_to)


@pytest.mark.parametrize("value", [10.0, 13.0, 20.0, 33.3, 40.0])
def test_between_two_looks_minutes_are_linear(value: float):
    assert first_minutes(line(0, 10.0).curve, "knn", value) == pytest.approx(value / 10)


def test_the_first_look_counts_and_so_does_the_first_time():
    curve = [{"minutes": 1.0, "knn": 30.0}, {"minutes": 2.0, "knn": 20.0}, {"minutes": 3.0, "rankme": 9.0}]
    curve += [{"minutes": 4.0, "knn": 40.0}, {"minutes": 5.0, "knn": 10.0}, {"minutes": 6.0, "knn": 90.0}]
    assert first_minutes(curve, "knn", 25.0) == 1.0  # whatever it was before
    assert first_minutes(curve, "knn", 35.0) == pytest.approx(3.5)  # a look without the metric is none
    assert first_minutes(curve, "knn", 90.0) == 6.0 and first_minutes(curve, "knn", 90.1) is None
    assert first_minutes([], "knn", 0.0) is None and first_minutes(curve, "nesum", 0.0) is None


def test_the_threshold_is_the_last_look_of_the_same_seed():
    found = results(TimeTo(metric="knn", arm="slow"), fast=[line(0, 20.0)], slow=[line(0, 9.0), line(1, 11.0)])
    assert found.threshold == pytest.approx(40.0) and found.timed_against.name == "slow"
    fast, slow = found.arms
    assert found.thresholds == {0: pytest.approx(36.0), 1: pytest.approx(44.0)}
    assert found.minutes_to(fast) == {0: pytest.approx(1.8)}
    assert found.minutes_to(slow) == {0: pytest.approx(4.0), 1: pytest.approx(4.0)}  # at its end, by its nature
    sooner = found.times_sooner(fast)
    assert sooner is not None and math.exp(sooner.mean) == pytest.approx(20 / 9)
    never = results(TimeTo(metric="knn", arm="slow"), fast=[line(0, 2.0)], slow=[line(0, 9.0)])
    assert never.minutes_to(never.arms[0]) == {} and never.times_sooner(never.arms[0]) is None
    assert results(TimeTo(metric="knn", arm="slow"), slow=[RunValues(seed=0)]).threshold is None


def test_how_many_times_sooner_is_paired_over_seeds():
    slopes = {0: 10.0, 1: 6.0, 2: 1.0}
    arms = {"base": [line(s, k) for s, k in slopes.items()], "twice": [line(s, 2 * k) for s, k in slopes.items()]}
    found = results(TimeTo(metric="knn", value=20.0), **arms)
    logs = found.times_sooner(found.arms[1])
    assert logs is not None and logs.seeds == 2  # the third seed never gets there
    assert math.exp(logs.mean) == pytest.approx(2.0) and logs.half_width == pytest.approx(0.0, abs=1e-9)
    assert found.times_sooner(found.arms[0]) is None and found.timed_against is found.arms[0]


def test_results_of_before_are_read():
    tree = results(TimeTo(metric="knn", value=20.0), base=[line(0, 10.0)]).to_dict()
    assert SweepResults.from_dict(tree).to_dict() == tree
    del tree["time_to"], tree["arms"][0]["runs"][0]["curve"]
    old = SweepResults.from_dict(tree)
    assert old.time_to is None and old.arms[0].runs[0].curve == [] and old.threshold is None
