"""A run that is stopped and continues with another number of processes, and one that spans two machines.

Run as a script, this file is the worker: it trains, or continues with what is there, until a signal comes.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import run_all
from safetensors.torch import load_file
from world_worker import DTYPES, RESNET, without_kinks

from hf_ssl_or.data.loading import load_images
from hf_ssl_or.recipe import recipe_from_dict
from hf_ssl_or.run import build_method, view_specs
from hf_ssl_or.runs.reader import read_metrics
from hf_ssl_or.structures import MultiViewBatch, SSLOutput
from hf_ssl_or.training.signals import TrainingInterrupted
from hf_ssl_or.training.trainer import SSLTrainer

REPOSITORY = Path(__file__).resolve().parent.parent.parent
STEPS = 26
TREE = {
    "data": {"dataset": "shapes", "image_size": 16, "shapes_train": 80, "shapes_test": 0},
    "encoder": RESNET,
    "method": {"name": "byol", "projector_hidden": 32, "projector_dim": 16, "predictor_hidden": 32},
    "orthogonality": {"penalty": "srip", "weight": 1e-3},
    "training": {
        "batch_size": 16,
        "max_steps": STEPS,
        "log_every": 1,
        "monitor_every": 0,
        "save_every": 1000,
        "keep_last": None,
        "device": "cpu",
        "optimizer": {"name": "sgd", "lr": 0.01, "warmup_epochs": 1},
    },
}
TOLERANCE = {"float64": 1e-10}  # measured: 9e-15; 5e-6 in float32


class Stopped(SSLTrainer):
    """A trainer whose last process sends itself SIGTERM after a step."""

    stop_after = 0

    def training_step(self, batch: MultiViewBatch) -> SSLOutput:
        output = super().training_step(batch)
        last = self.accelerator.process_index == self.accelerator.num_processes - 1
        if last and batch.step + 1 == self.stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
        return output


def train(folder: Path, dtype: str, stop_after: int) -> None:
    recipe = recipe_from_dict(TREE)
    torch.set_default_dtype(DTYPES[dtype])
    try:
        method = build_method(recipe)
        without_kinks(method)
    finally:
        torch.set_default_dtype(torch.float32)
    images, views = load_images(recipe.data, "train"), view_specs(recipe)[0]
    args = replace(recipe.training, output_dir=str(folder))
    trainer = Stopped(method, args, images, views=views, orthogonality=recipe.orthogonality, recipe=recipe.to_dict())
    trainer.stop_after = stop_after
    if stop_after:
        with pytest.raises(TrainingInterrupted, match="SIGTERM|a signal to another process"):
            trainer.train(resume_from_checkpoint=True)
    else:
        trainer.train(resume_from_checkpoint=True)


def train_both(root: Path, stop_after: int) -> None:
    for dtype in TOLERANCE:
        train(root / dtype, dtype, stop_after)


def environment(**more: str) -> dict[str, str]:
    path = f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}"
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def assert_same_end(folder: Path, whole: Path, tolerance: float) -> None:
    for group in ("method", "optimizer", "orthogonality"):
        file = f"checkpoints/step-{STEPS}/{group}.safetensors"
        want, got = load_file(whole / file), load_file(folder / file)
        assert want.keys() == got.keys()
        for name, wanted in want.items():
            difference = (got[name].double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1)
            assert difference <= tolerance, f"{file}: {name}: {difference:.2e}"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As the worker has: the order of sums is the same."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run of one process."""
    root = tmp_path_factory.mktemp("elastic")
    os.environ["HF_SSL_OR_CACHE"] = str(root / "cache")
    train_both(root / "whole", 0)
    return root / "whole"


@pytest.fixture(scope="module")
def moved(whole: Path) -> Path:
    """One process until step 6, two until 16, four until 24, and one to the end."""
    folder = whole.parent / "moved"
    train_both(folder, 6)
    for processes, stop_after in ((2, 12), (4, 20)):  # processes agree every eighth step
        run_all(train_both, folder, stop_after, log=whole.parent / f"{processes}.log", count=processes)
    train_both(folder, 0)
    return folder


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_run_that_moves_between_1_2_and_4_processes_ends_as_the_uninterrupted_one(
    whole: Path, moved: Path, dtype: str
):
    stops = sorted(int(path.name.removeprefix("step-")) for path in (moved / dtype / "checkpoints").glob("step-*"))
    assert stops == [6, 16, 24, STEPS]
    assert [line["step"] for line in read_metrics(moved / dtype / "metrics.jsonl").lines] == list(range(STEPS))
    assert_same_end(moved / dtype, whole / dtype, TOLERANCE[dtype])


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Two network namespaces, each a machine of its own to the network, with a cable between them."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the ip command")
    names = [f"ssl{os.getpid()}n{rank}" for rank in range(2)]
    made: list[str] = []
    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for rank, name in enumerate(names):
            ip("-n", name, "address", "add", f"10.77.0.{rank + 1}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "delete", name], check=True)


def test_two_machines_train_as_one_process_does(whole: Path, machines: list[str], tmp_path: Path):
    accelerate = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "2", "--num_processes", "2"]
    address = ["--main_process_ip", "10.77.0.1", "--main_process_port", "29500", "--mixed_precision", "no"]
    started = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, *accelerate, *address, "--machine_rank", str(rank)]
            + ["--dynamo_backend", "no", __file__, str(tmp_path), "0"],
            env=environment(GLOO_SOCKET_IFNAME="cable"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, name in enumerate(machines)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(outputs)[-4000:]
    for dtype in TOLERANCE:
        assert_same_end(tmp_path / dtype, whole / dtype, TOLERANCE[dtype])


@pytest.mark.parametrize(("python", "job"), [(0, 0), (2, 102), (75, 0), (137, 137)])
def test_the_batch_script_queues_a_stopped_job_again_and_no_other(tmp_path: Path, python: int, job: int):
    stubs = {
        "srun": 'shift; SLURM_PROCID=3 SLURM_LOCALID=1 exec "$@"',
        "python": f"""echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $*" > called
            kill -TERM $PPID; exit {python}""",  # the shell that waits gets SLURM's signal too
        "scontrol": 'if [ "$1" = show ]; then printf "first\\nsecond\\n"; else echo "$@" > queued; fi',
    }
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "x", "SLURM_NTASKS": "4", "SLURM_NNODES": "2"}
    command = ["bash", str(REPOSITORY / "recipes" / "accelerate" / "slurm.sbatch"), "a recipe.yaml", "--output", "out"]
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, cwd=tmp_path, env={"PATH": path, **slurm}, timeout=60)
    assert (tmp_path / "called").read_text() == (
        "3 1 4 2 first -m hf_ssl_or train a recipe.yaml --output out --resume\n"
    )
    assert (tmp_path / "queued").exists() == (python == 75)
    assert done.returncode == job


if __name__ == "__main__":
    torch.set_num_threads(1)
    train_both(Path(sys.argv[1]), int(sys.argv[2]))
