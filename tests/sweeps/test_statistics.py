"""Student's quantiles and paired differences, against printed tables and formulas written out."""

from __future__ import annotations

import math

import pytest

from hf_ssl_or.runs.statistics import paired_difference, summarize, t_quantile

TABLE = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 9: 2.2622, 10: 2.2281, 30: 2.0423, 120: 1.9799}


@pytest.mark.parametrize("freedom", TABLE)
def test_quantiles_are_those_of_the_printed_table(freedom: int):
    assert t_quantile(freedom) == pytest.approx(TABLE[freedom], abs=5e-5)


def test_other_confidences_and_many_degrees():
    assert t_quantile(4, 0.99) == pytest.approx(4.6041, abs=5e-5)
    assert t_quantile(5, 0.9) == pytest.approx(2.0150, abs=5e-5)
    assert t_quantile(999) == pytest.approx(1.9623, abs=5e-5)


def test_the_interval_of_a_paired_difference():
    found = paired_difference({0: 3.0, 1: 5.0, 2: 4.0, 9: 1.0}, {0: 1.0, 1: 2.0, 2: 3.0, 7: 0.0})
    assert (found.seeds, found.mean, found.std) == (3, 2.0, 1.0)
    assert found.half_width == pytest.approx(4.3027 / math.sqrt(3), abs=1e-4)
    n = found.seeds_needed  # smallest n with t(n - 1) * 1 / sqrt(n) <= 1
    assert t_quantile(n - 1) / math.sqrt(n) <= 1 < t_quantile(n - 2) / math.sqrt(n - 1)
    assert found.describe() == f"+2.00 [-0.48, +4.48] (± half of it: {n} seeds)"


def test_few_seeds_and_no_difference_are_said():
    assert paired_difference({0: 1.5}, {0: 1.0}).describe() == "+0.50 (1 seed: no interval)"
    assert paired_difference({0: 1.5}, {1: 1.0}) is None
    assert "more than 1000 seeds" in paired_difference({0: 1.0, 1: -1.0}, {0: 0.0, 1: 0.0}).describe()
    assert summarize([2.0]).std is None
