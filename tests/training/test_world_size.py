"""The same recipe gives the same losses, weights and statistics on any number of processes and under accumulation."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from safetensors.torch import load_file
from world_worker import CASES

REPOSITORY = Path(__file__).resolve().parent.parent.parent
WORKER = Path(__file__).with_name("world_worker.py")
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


SETTINGS = {"one": (1, 1), "two accumulated": (2, 2), "four": (4, 1)}  # processes, accumulation steps
# What a test run compares; four processes take minutes for each type, and the stricter one shows more.
COMPARED = [("two accumulated", "float32"), ("two accumulated", "float64"), ("four", "float64")]


def start(folder: Path, processes: int, accumulation: int, dtypes: list[str]) -> subprocess.Popen:
    folder.mkdir()
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return subprocess.Popen(
        [sys.executable, *launch, str(WORKER), str(folder), str(accumulation), *dtypes],
        env={
            **os.environ,
            "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}",
            "OMP_NUM_THREADS": "1",
            "HF_SSL_OR_CACHE": str(folder.parent / "cache"),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def train_all(root: Path, pairs: list[tuple[str, str]]) -> None:
    """Five steps of every method: one process on the whole batch, two and four on shards, with accumulation or not."""
    for name, setting in SETTINGS.items():
        process = start(root / name, *setting, [dtype for other, dtype in pairs if other == name])
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, f"{name}:\n{output[-4000:]}"


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
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    train_all(root, COMPARED)
    return root


@pytest.mark.parametrize(("method", "batch_norm"), CASES)
@pytest.mark.parametrize(("setting", "dtype"), COMPARED)
def test_equals_one_process_on_the_whole_batch(root: Path, setting: str, method: str, batch_norm: str, dtype: str):
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
        train_all(Path(folder), [])
        print_table(Path(folder))
