"""The same recipe gives the same losses, weights and statistics on any number of processes and under accumulation.

A test run takes three steps, in which a queue of two batches is filled and begun anew; the table that this file prints
as a script is that of five.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from processes import run_all
from safetensors.torch import load_file
from world_worker import CASES, DTYPES, STEPS, main

TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
SETTINGS = {"one": (1, 1), "two accumulated": (2, 2), "four": (4, 1)}  # processes, parts of a batch
# Four processes take minutes: a test run has them for methods that share queues, prototypes, sub-batches or teachers.
FOUR = [case for case in CASES if case[0] in ("barlow_twins", "byol", "dino", "moco_v2", "swav", "wmse")]
COMPARED = [("two accumulated", "float32", case) for case in CASES] + [("four", "float64", case) for case in FOUR]
REST = [("two accumulated", "float64", case) for case in CASES]
REST += [("four", "float64", case) for case in CASES if case not in FOUR]

Compared = tuple[str, str, tuple[str, str]]


def train_all(root: Path, compared: list[Compared], steps: int) -> None:
    """Some steps of methods: one process on the whole batch, two and four on shards, in parts of the batch or not."""
    cache = {"HF_SSL_OR_CACHE": str(root / "cache")}
    for name, (processes, parts) in SETTINGS.items():
        (root / name).mkdir()
        wanted = {dtype: [c for s, d, c in compared if d == dtype and name in ("one", s)] for dtype in DTYPES}
        runs = {dtype: list(dict.fromkeys(cases)) for dtype, cases in wanted.items()}
        run_all(main, root / name, parts, steps, runs, log=root / f"{name}.log", count=processes, environment=cache)


def differences(root: Path, setting: str, case: str) -> dict[str, float]:
    """Largest difference of losses, weights, statistics and queues from those of one process, relative to length."""
    file = f"{case}.safetensors"
    want, got = load_file(root / "one" / file), load_file(root / setting / file)
    assert want.keys() == got.keys()
    assert want["losses"].unique().numel() > 1, "nothing was trained"
    found = {}
    for name in want:
        wanted = want[name].double()
        length = wanted.norm().clamp(min=1)  # a short weight that started at zero is made of rounding
        found[name] = ((got[name].double() - wanted).norm() / length).item()
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    root = tmp_path_factory.mktemp("world")
    more = REST if request.config.getoption("exhaustive") else []
    train_all(root, COMPARED + more, steps=3)
    return root


@pytest.mark.parametrize(
    ("setting", "dtype", "case"),
    [*COMPARED, *(pytest.param(*c, marks=pytest.mark.exhaustive) for c in REST)],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_equals_one_process_on_the_whole_batch(root: Path, setting: str, dtype: str, case: tuple[str, str]):
    method, batch_norm = case
    found = differences(root, setting, f"{method}-{batch_norm}-{dtype}")
    for name, difference in found.items():
        assert difference <= TOLERANCE[dtype], f"{name}: {difference:.2e}"


def print_table(root: Path) -> None:
    """Prints the table of docs/methods.md."""
    print("| method | batch norm | 2 processes, float32 | 4, float32 | 2, float64 | 4, float64 |")
    print("|---|---|---|---|---|---|")
    for method, batch_norm in CASES:
        cells = [
            max(differences(root, setting, f"{method}-{batch_norm}-{dtype}").values())
            for dtype in TOLERANCE
            for setting in ("two accumulated", "four")
        ]
        print(f"| `{method}` | {batch_norm} | {' | '.join(f'{cell:.1e}' for cell in cells)} |")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        every = [(setting, dtype, c) for setting in SETTINGS for dtype in TOLERANCE for c in CASES]
        train_all(Path(folder), every, STEPS)
        print_table(Path(folder))
