"""The same recipe gives the same losses, weights and statistics on any number of processes and under accumulation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hf_ssl_or.methods import available_methods

REPOSITORY = Path(__file__).resolve().parent.parent.parent
WORKER = Path(__file__).with_name("world_worker.py")
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


def start(folder: Path, processes: int, accumulation: int) -> subprocess.Popen:
    folder.mkdir()
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return subprocess.Popen(
        [sys.executable, *launch, str(WORKER), str(folder), str(accumulation)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Five steps of every method: one process on the whole batch, two and four on shards, with accumulation or not."""
    root = tmp_path_factory.mktemp("world")
    os.environ["HF_SSL_OR_CACHE"] = str(root / "cache")
    settings = {"one": (1, 1), "one accumulated": (1, 2), "two accumulated": (2, 2), "four": (4, 1)}
    for names in (("one", "one accumulated"), ("two accumulated", "four")):
        running = {name: start(root / name, *settings[name]) for name in names}
        for name, process in running.items():
            output, _ = process.communicate(timeout=240)
            assert process.returncode == 0, f"{name}:\n{output[-4000:]}"
    return {name: root / name for name in settings}


CASES = [*((method, "global") for method in available_methods()), ("byol", "per_view")]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("method", "batch_norm"), CASES)
@pytest.mark.parametrize("setting", ["one accumulated", "two accumulated", "four"])
def test_equals_one_process_on_the_whole_batch(
    results: dict[str, Path], setting: str, method: str, batch_norm: str, dtype: str
):
    file = f"{method}-{batch_norm}-{dtype}.safetensors"
    want, got = load_file(results["one"] / file), load_file(results[setting] / file)
    assert want.keys() == got.keys()
    assert want["losses"].unique().numel() > 1, "nothing was trained"
    for name in want:
        wanted, found = want[name].double(), got[name].double()
        length = wanted.norm().clamp(min=1)  # a short weight that started at zero is made of rounding
        difference = ((found - wanted).norm() / length).item()
        assert difference <= TOLERANCE[dtype], f"{name}: {difference:.2e}"
