"""A run that is killed at a random instant and resumed ends bit by bit as the uninterrupted run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from kills import Kill, Reference, draw_kills, kill_and_resume

SEED = int(os.environ.get("HF_SSL_OR_FAULT_SEED", "0"))


@pytest.mark.parametrize("number", range(3))
def test_one_process(number: int, whole: Reference, tmp_path: Path) -> None:
    kill = list(draw_kills(SEED, 3, whole, within_writes=0.4))[number]
    print(f"HF_SSL_OR_FAULT_SEED={SEED}: {kill}")
    assert kill_and_resume(kill, whole, tmp_path / "run")[1] == [], kill


def test_two_processes(whole_of_two: Reference, tmp_path: Path) -> None:
    kill = next(draw_kills(SEED, 1, whole_of_two))
    print(f"HF_SSL_OR_FAULT_SEED={SEED}: {kill}")
    assert kill_and_resume(kill, whole_of_two, tmp_path / "run")[1] == [], kill


def test_a_kill_within_the_replacement_of_files(whole: Reference, tmp_path: Path) -> None:
    """Between the two halves of a write is where a promise breaks first; this operation exists in every run."""
    hit, problems = kill_and_resume(Kill(operation=whole.operations // 2), whole, tmp_path / "run")
    assert hit and problems == []
