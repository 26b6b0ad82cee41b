"""Run folders made by hand for the figures and the page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.run_folders import EVIL, write_run

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    def make(name: str, **settings: Any) -> Path:
        return write_run(tmp_path / name, **settings)

    return make


@pytest.fixture(scope="session")
def three_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A plain run, one whose names are attacks, and one that has not finished; tests leave them as they are."""
    base = tmp_path_factory.mktemp("three")
    evil = write_run(base / f"r<b>&amp;'\"x${{{'-long' * 30}", dataset=EVIL, seed=1)
    with (evil / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 99, "<script>alert(3)</script>": 1.5}\n')
    return [write_run(base / "none"), evil, write_run(base / "half", finished=False)]
