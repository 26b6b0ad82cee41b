"""Sweeps of tiny runs as real processes: killed and continued, changed, failing, and of other programs."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from hf_ssl_or.cli import main
from hf_ssl_or.errors import InputError
from hf_ssl_or.report.sweep_page import write_sweep_report
from hf_ssl_or.runs.sweep_results import ArmValues, RunValues, SweepResults
from hf_ssl_or.sweeps import processes
from hf_ssl_or.sweeps.gather import command_problem
from hf_ssl_or.sweeps.plan import Arm
from hf_ssl_or.sweeps.progress import Progress
from hf_ssl_or.sweeps.sweep import list_runs, sweep
from tests.processes import Ended, Processes, command_line

SEED = int(os.environ.get("HF_SSL_OR_FAULT_SEED", "0"))
TINY: dict[str, Any] = {
    "data": {"dataset": "shapes", "image_size": 16, "shapes_train": 40, "shapes_test": 20, "num_workers": 1},
    "encoder": {"name": "resnet18", "stem": "small", "channels": [8, 8, 8, 8], "model_args": {"layers": [1, 1, 1, 1]}},
    "method": {"name": "barlow_twins", "projector_dim": 16, "projector_hidden": 16},
    "training": {"batch_size": 20, "max_steps": 2, "log_every": 1, "save_steps": 1, "monitor_every": 1},
    "evaluation": {"protocols": ["knn"]},
}
TINY["training"] |= {"device": "cpu", "optimizer": {"name": "adamw", "lr": 0.003}}
ARMS = {"so": [], "none": ["orthogonality.penalty=none"], "wide": ["method.projector_dim=32"]}


class Forked:
    """A process forked from this one, which has imported everything and computed nothing; like `subprocess.Popen`."""

    def __init__(self, line: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self.pid = os.fork()
        if self.pid:
            return
        try:
            os.setsid()
            processes.die_with_parent()
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            for descriptor in (1, 2):
                os.dup2(output, descriptor)
            os.environ.update(environment)
            command_line(list(line[1:]))
        except SystemExit as end:
            os._exit(int(end.code or 0))
        finally:
            os._exit(70)

    def poll(self) -> int | None:
        found, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if found else None

    def wait(self) -> None:
        os.waitpid(self.pid, 0)

    def terminate(self) -> None:
        os.kill(self.pid, 15)


def be_a_sweep(line: list[str]) -> None:
    real = processes.start_process

    def start(words: Sequence[str], log: Path, environment: Mapping[str, str]) -> Any:
        return (Forked if words[0] == "hf-ssl-or" else real)(words, log, environment)

    processes.start_process = start  # type: ignore[assignment]
    command_line(line)


def started(file: Path, root: Path, *more: str) -> Processes:
    line = ["sweep", str(file), "--output", str(root), *more]
    environment = {"HF_SSL_OR_CACHE": str(root.parent / "cache")}
    return Processes(be_a_sweep, line, log=root.with_suffix(".log"), environment=environment)


def run(file: Path, root: Path, *more: str) -> Ended:
    return started(file, root, *more).wait(120)


def write(path: Path, **keys: Any) -> Path:
    path.write_text(
        yaml.safe_dump({"recipe": TINY, "arms": ARMS, "seeds": [0, 1], "select": "rankme"} | keys, sort_keys=False)
    )
    return path


def measured(root: Path) -> Any:
    """Every value of a sweep that does not depend on time."""
    arms = json.loads((root / "results.json").read_text())["arms"]
    for one in (run for arm in arms for run in arm["runs"]):
        assert one["metrics"].pop("minutes") > 0 and all(look.pop("minutes") > 0 for look in one["curve"])
    return arms


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, float]:
    """An uninterrupted sweep: its file, its folder, its seconds."""
    folder = tmp_path_factory.mktemp("sweep")
    timed = {"metric": "knn", "arm": "none"}
    file = write(folder / "tiny.yaml", time_to=timed, spectra=["none", "so"], umap=["so"])
    ended = run(file, folder / "whole")
    assert ended.statuses == [0], ended.errors[-3000:]
    return file, folder / "whole", ended.seconds


def test_killed_five_times_and_continued(whole: tuple[Path, Path, float], tmp_path: Path):
    file, reference, seconds = whole
    dice, root = random.Random(SEED), tmp_path / "killed"
    for _ in range(5):
        sweeping = started(file, root)
        time.sleep(dice.random() * seconds / 3)
        sweeping.kill()
        sweeping.wait()
    ended = run(file, root)
    assert ended.statuses == [0], ended.errors[-3000:]
    assert measured(root) == measured(reference), f"HF_SSL_OR_FAULT_SEED={SEED}"
    before = (root / "so" / "seed-0" / "results.json").stat().st_mtime_ns
    again = run(file, root)
    assert "0 of them to do" in again.errors and (root / "so/seed-0/results.json").stat().st_mtime_ns == before


def test_a_signal_saves_the_runs_and_ends_with_75(tmp_path: Path):
    file, root = write(tmp_path / "tiny.yaml", overrides=["training.max_steps=2000"]), tmp_path / "root"
    sweeping = started(file, root)
    assert sweeping.wait_for(lambda: (root / "so" / "seed-0" / "metrics.jsonl").exists())
    sweeping.kill(signal.SIGTERM)
    ended = sweeping.wait()
    assert ended.statuses == [75] and "stopped by SIGTERM; the same command continues" in ended.errors
    assert "--resume" in (root / "so" / "seed-0.log").read_text() and (root / "results.json").exists()


def test_the_live_table():
    runs = [RunValues(seed=0, metrics={"knn/top1": 40.0}), RunValues(seed=1)]
    arms = [
        ArmValues(name="so", runs=runs),
        ArmValues(name="none", runs=[RunValues(seed=0, failure="status 2: full")]),
    ]
    console = Console(width=100, record=True, force_terminal=True, file=io.StringIO())
    with Progress(jobs=2, console=console) as progress:
        progress.show(SweepResults(name="tiny", arms=arms, columns=["knn/top1"]), [])
    text = console.export_text()
    assert all(word in text for word in ("so", "1/2", "40.00", "seed 0: status 2: full", "minutes left"))


def test_what_is_written(whole: tuple[Path, Path, float], capsys: pytest.CaptureFixture[str]):
    _, root, _ = whole
    results = json.loads((root / "results.json").read_text())
    assert results["schema_version"] == 1 and results["columns"][-2:] == ["rankme", "minutes"]
    one = results["arms"][0]["runs"][0]
    assert one["environment"]["packages"]["torch"] and {"rankme", "minutes"} < one["metrics"].keys()
    looks = one["curve"]
    assert [look["step"] for look in looks] == [2] and {"knn", "rankme"} < looks[0].keys()
    assert looks[-1]["minutes"] == pytest.approx(one["metrics"]["minutes"])
    assert looks[-1]["knn"] == one["metrics"]["monitor/knn"]
    assert "| times sooner than none |" in (root / "table.md").read_text()
    values, differences = (root / "table.md").read_text().split("Differences to so")
    assert "| none" in values and "±" in values and "(selected by RankMe)" in values
    assert "95 % t interval" in differences and "| wide |" in differences
    page = root / "report.html"
    first = page.read_text()
    page.unlink()
    assert main(["report", str(root)]) == 0 and "figures" in capsys.readouterr().out
    assert page.read_text() == first and {path.name for path in (root / "figures").iterdir()} >= {
        "arms.png",
        "time.svg",
    }
    kept = {arm["name"]: arm["runs"][0].get("representations") for arm in results["arms"]}
    weights = [key for key in kept["none"]["spectra"] if key.startswith("weight/")]
    assert len(weights) == 4 and kept["none"]["filters"]["layer"] == weights[-1].removeprefix("weight/")
    assert len(kept["so"]["embedding"]["x"]) == 20 and "embedding" not in kept["none"] and kept["wide"] is None
    assert 'id="figure-spectra-compared"' in first and 'id="figure-filters"' in first
    assert '<h2 id="arms-heading">' in first and first.count("<svg") >= 2


def test_a_changed_arm_runs_again_alone(whole: tuple[Path, Path, float], copied: Callable[[Path], Path]):
    file, reference, _ = whole
    root = copied(reference)
    changed = write(root.parent / "tiny.yaml", arms=ARMS | {"wide": ["method.projector_dim=24"]}, seeds=[0])
    ended = run(changed, root)
    assert "arm wide has changed and runs again: method.projector_dim was 32, is 24" in ended.errors
    assert "3 runs in" in ended.errors and "1 of them to do" in ended.errors
    assert not (root / "wide" / "seed-1").exists() and (root / "so" / "seed-1").exists()


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    return lambda root: Path(shutil.copytree(root, tmp_path / root.name))


def test_folders_of_others(whole: tuple[Path, Path, float], copied: Callable[[Path], Path], tmp_path: Path):
    file, reference, _ = whole
    with pytest.raises(InputError, match=r"holds another sweep, 'tiny', not 'other'"):
        sweep(write(tmp_path / "other.yaml"), reference)
    with pytest.raises(InputError, match="no arm is what it was"):
        sweep(write(tmp_path / "tiny.yaml", overrides=["training.batch_size=10"]), reference)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(InputError, match="holds thesis.tex and no sweep"):
        sweep(file, tmp_path / "mine")
    with pytest.raises(InputError, match="jobs: 1 or more"):
        sweep(file, reference, jobs=0)
    root = copied(reference)
    of_another_version = root / "none" / "seed-1" / "results.json"
    for path in (of_another_version, root / "results.json"):
        path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 0'))
    with pytest.raises(InputError, match=r"seed-1/results.json: schema_version: is 0"):
        sweep(file, root)
    with pytest.raises(InputError, match=r"results.json: schema_version: is 0"):
        write_sweep_report(root)


def test_the_list_has_a_command_per_missing_run(tmp_path: Path):
    file = write(tmp_path / "tiny.yaml", evaluate={"datasets": ["shapes"], "protocols": ["knn"]})
    lines = list_runs(file, tmp_path / "root")
    assert len(lines) == 6 and len(set(lines)) == 6
    root = tmp_path / "root"
    assert lines[0] == (
        f"hf-ssl-or train {root}/so/arm.yaml training.seed=0 --output {root}/so/seed-0 --resume && "
        f"hf-ssl-or evaluate {root}/so/seed-0 --datasets shapes --protocols knn --output {root}/so/seed-0/transfer"
    )


LOOP = """
import json, pathlib, sys
folder, seed = pathlib.Path(sys.argv[1]), int(sys.argv[2])
if seed == 1 and sys.argv[3] == "fails":
    sys.exit("the loop ran out of luck")
measured = {"metrics": {"top1": 40.0 + seed}, "curve": [{"minutes": 2 + seed, "knn": 9}]}
(folder / "results.json").write_text(json.dumps(measured))
"""


def test_commands_and_an_arm_that_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "loop.py").write_text(LOOP)
    command = [sys.executable, str(tmp_path / "loop.py"), "{output}", "{seed}"]
    arms = {"ours": {"command": [*command, "works"]}, "theirs": {"command": [*command, "fails"]}}
    arms["silent"] = {"command": [sys.executable, "-c", "print('{output}{seed}')"]}
    arms["missing"] = {"command": ["no-such-program", "{output}", "{seed}"]}
    file = write(tmp_path / "loops.yaml", recipe=None, arms=arms, select=None)
    assert main(["sweep", str(file), "--output", str(tmp_path / "root"), "--jobs", "2"]) == 1
    told = capsys.readouterr().err
    assert "arm theirs has failed: seed 1: status 1: the loop ran out of luck" in told
    values = {arm["name"]: arm["runs"] for arm in json.loads((tmp_path / "root/results.json").read_text())["arms"]}
    assert [one["metrics"] for one in values["ours"]] == [{"top1": 40.0}, {"top1": 41.0}]
    assert values["theirs"][0]["metrics"] == {"top1": 40.0} and "luck" in values["theirs"][1]["failure"]
    assert [one["curve"] for one in values["ours"]] == [[{"minutes": 2 + seed, "knn": 9}] for seed in (0, 1)]
    assert "results.json: cannot be read" in values["silent"][0]["failure"]
    assert values["missing"][0]["failure"].startswith("no-such-program: No such file")
    table = (tmp_path / "root" / "table.md").read_text()
    assert "| ours | 2/2 | 40.50 ± 0.71 |" in table and "ran out of luck" in table


@pytest.mark.parametrize(
    ("curve", "problem"),
    [
        ({"minutes": 1}, "curve: is no list of"),
        ([{"knn": 1}], "curve: is no list of"),
        ([{"minutes": 1, "knn": "9"}], "curve.0.knn: is no finite number"),
        ([{"minutes": 1}, {"minutes": float("nan")}], "curve.1.minutes: is no finite number"),
        ([{"minutes": 1}, {"minutes": 1}], "curve.1.minutes: 1 is not above 1; minutes must increase"),
        ([{"minutes": 0}], "curve.0.minutes: 0 is not above 0"),
        ([{"minutes": 1, "knn": 10**400}], "curve.0.knn: is no finite number"),
    ],
)
def test_a_curve_that_is_none(curve: Any, problem: str, tmp_path: Path):
    (tmp_path / "results.json").write_text(json.dumps({"metrics": {"top1": 1}, "curve": curve}))
    told = command_problem(Arm(name="loop", axes={}, command=("loop",)), tmp_path)
    assert told is not None and problem in told and "\n" not in told
