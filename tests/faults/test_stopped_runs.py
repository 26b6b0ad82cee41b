"""Signals, slow disks, odd clocks and a second run in the same folder change nothing in a run's end."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path

from effects import jumping_clock, signal_at_operation, slow_disk
from kills import Reference
from tiny_runs import STEPS, Started, differences, run


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*"))


def test_sigterm_in_mid_save_finishes_the_step_and_saves(whole: Reference, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fault = partial(signal_at_operation, "os.rename", ".tmp-step-9", signal.SIGTERM)
    stopped = run(["train", whole.recipe, "--output", folder], tmp_path / "log", faults=[fault])
    assert stopped.statuses == [75] and len(stopped.lines) == 1, stopped.errors[-2000:]
    done = saved_steps(folder)[-1]
    assert done in (9, 10) and f"stopped by SIGTERM after step {done}; its state is saved" in stopped.lines[0]
    assert run(["train", folder, "--resume"], tmp_path / "log2").statuses == [0]
    assert differences(folder, whole.folder) == []


def test_sigterm_then_sigkill_at_a_deadline_in_mid_save_loses_one_save_at_most(
    whole: Reference, tmp_path: Path
) -> None:
    """As a scheduler does: the save that SIGTERM asked for takes longer than it waits."""
    folder = tmp_path / "run"
    faults = [partial(slow_disk, 0.1), partial(signal_at_operation, "os.mkdir", ".tmp-step-9", signal.SIGTERM)]
    started = Started(["train", whole.recipe, "--output", folder], tmp_path / "log", faults=faults)
    assert started.wait_for((folder / "checkpoints" / ".tmp-step-9").exists)
    started.processes[0].join(0.15)
    started.kill()
    assert started.wait().statuses == [-signal.SIGKILL]
    assert saved_steps(folder) == [3, 6] and (folder / "checkpoints" / ".tmp-step-9").exists()
    resumed = run(["train", folder, "--resume"], tmp_path / "log2")
    assert resumed.statuses == [0] and "damaged" not in resumed.errors
    assert differences(folder, whole.folder) == []


def test_a_slow_disk_changes_only_the_time(whole: Reference, tmp_path: Path) -> None:
    slow = run(
        ["train", whole.recipe, "--output", tmp_path / "run"], tmp_path / "log", faults=[partial(slow_disk, 0.05)]
    )
    assert slow.statuses == [0] and differences(tmp_path / "run", whole.folder) == []


def test_a_clock_that_goes_backwards_changes_nothing(whole: Reference, tmp_path: Path) -> None:
    odd = run(
        ["train", whole.recipe, "--output", tmp_path / "run"], tmp_path / "log", faults=[partial(jumping_clock, 3600)]
    )
    assert odd.statuses == [0] and differences(tmp_path / "run", whole.folder) == []
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert text.count("images_per_second") == STEPS and '"images_per_second": -' not in text


def test_a_second_run_in_the_folder_is_refused_and_does_no_harm(whole: Reference, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fault = partial(signal_at_operation, "os.mkdir", ".tmp-step-6", signal.SIGSTOP)
    first = Started(["train", whole.recipe, "--output", folder], tmp_path / "log", faults=[fault])
    assert first.wait_for((folder / "checkpoints" / "step-3").exists)
    recipe = (folder / "recipe.yaml").read_bytes()
    for more, message in ((["--resume"], "in use by process"), ([], "is not empty")):
        line = ["train", whole.recipe, "training.log_every=2", "--output", folder, *more]
        second = run(line, tmp_path / f"second{len(more)}")
        assert second.statuses == [2] and len(second.lines) == 1 and message in second.lines[0], second.errors[-2000:]
    assert (folder / "recipe.yaml").read_bytes() == recipe, "what a refused run wants is not written down"
    first.kill(signal.SIGCONT)
    assert first.wait().statuses == [0]
    assert differences(folder, whole.folder) == []


def test_a_refused_recipe_leaves_the_run_resumable(whole: Reference, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fault = partial(signal_at_operation, "os.rename", ".tmp-step-9", signal.SIGTERM)
    assert run(["train", whole.recipe, "--output", folder], tmp_path / "log", faults=[fault]).statuses == [75]
    refused = run(["train", folder, "training.seed=7", "--resume"], tmp_path / "log2")
    assert refused.statuses == [2] and "training.seed was 0, is 7" in refused.lines[0]
    assert run(["train", folder, "--resume"], tmp_path / "log3").statuses == [0]
    assert differences(folder, whole.folder) == []
