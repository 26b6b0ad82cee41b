"""A process that dies ends the run in a clear way: the others end soon, say so in one line, and nothing hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from effects import die_at_step, kill_a_worker_at, streamed_images
from kills import Reference
from PIL import Image
from processes import REPOSITORY
from tiny_runs import differences, run, write_recipe

SOON_S = 60  # a loaded machine included; the collective library's own timeout is half an hour


@pytest.mark.parametrize("rank", [0, 1])
def test_the_other_process_ends_with_one_line(rank: int, whole_of_two: Reference, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fault = partial(die_at_step, 7, rank)
    line = ["train", whole_of_two.recipe, "--output", folder]
    ended = run(line, tmp_path / "log", processes=2, faults=[fault], timeout=SOON_S)
    assert ended.statuses[rank] == -signal.SIGKILL and ended.statuses[1 - rank] == 75, ended.errors[-2000:]
    assert "Traceback" not in ended.errors and len(ended.lines) == 1
    assert f"process {1 - rank}: another process of this run has ended" in ended.lines[0]
    assert f"train {folder} --resume" in ended.lines[0]
    assert run(["train", folder, "--resume"], tmp_path / "log2", processes=2).statuses == [0, 0]
    assert differences(folder, whole_of_two.folder) == []


def test_a_run_that_is_refused_ends_everywhere(whole_of_two: Reference, tmp_path: Path) -> None:
    line = ["train", whole_of_two.recipe, "--output", whole_of_two.folder]
    ended = run(line, tmp_path / "log", processes=2, timeout=SOON_S)
    assert ended.statuses == [2, 75], ended.errors[-2000:]
    assert "is not empty" in ended.errors and "Traceback" not in ended.errors and len(ended.lines) == 2


def test_under_torchrun(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "hf_ssl_or", "train"]
    variables = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "HF_SSL_OR_CACHE": str(tmp_path / "cache"),
    }
    line = [sys.executable, *launch, str(recipe), "training.max_steps=2000", "--output", str(folder)]
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(line, env=variables, stdout=log, stderr=log, cwd=tmp_path)
    try:
        deadline = time.monotonic() + 120
        while not (folder / "checkpoints" / "step-3").exists():
            assert launcher.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-2000:]
            time.sleep(0.02)
        os.kill(children(launcher.pid)[-1], signal.SIGKILL)
        assert launcher.wait(SOON_S) != 0
    finally:
        launcher.kill()
    assert not (folder / "results.json").exists()
    said = (tmp_path / "log").read_text()
    assert "another process of this run has ended" in said or "stopped by" in said, said[-3000:]


def children(process: int) -> list[int]:
    return [int(text) for text in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def test_a_dying_decode_worker_stops_the_run_with_one_line(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(48):
        Image.new("RGB", (16, 16), (5 * i, 255 - 5 * i, i)).save(pictures / f"{i:02d}.png")
    recipe = write_recipe(tmp_path / "tiny.yaml", data={"dataset": str(pictures), "cache": "none", "num_workers": 2})
    folder = tmp_path / "run"
    line, faults = ["train", recipe, "--output", folder], [streamed_images, partial(kill_a_worker_at, 7)]
    ended = run(line, tmp_path / "log", faults=faults, timeout=SOON_S)
    assert ended.statuses == [2] and len(ended.lines) == 1, ended.errors[-3000:]
    assert "a process that decodes images" in ended.lines[0] and "--resume" in ended.lines[0]
    undisturbed = tmp_path / "undisturbed"
    for arguments in (["train", recipe, "--output", undisturbed], ["train", folder, "--resume"]):
        assert run(arguments, tmp_path / "log2", faults=[streamed_images]).statuses == [0]
    assert differences(folder, undisturbed) == []
