"""Through the command line: a run on a streamed set, stopped and resumed, and a set on the Hub."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from processes import REPOSITORY
from safetensors.torch import load_file

from tests.data.range_server import RangeServer
from tests.data.stream_shards import SIDE, write_tables, write_tars
from tests.hub.hub_server import HubServer
from tests.training.test_resume import interrupt, run

STEPS = 24


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RangeServer]:
    write_tars(tmp_path / "served", [40, 37, 20])
    with RangeServer(tmp_path / "served") as running:
        yield running


def test_a_streamed_run_that_is_stopped_and_resumed_ends_the_same(
    server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_SSL_OR_CACHE", str(tmp_path / "cache"))
    data = {"dataset": f"{server.url}/{{split}}-{{000..002}}.tar", "streaming": True, "image_size": SIDE}
    recipe = {
        "data": {**data, "stream_window_mib": 2},
        "encoder": {"name": "resnet18", "stem": "small", "channels": [8, 8, 8, 8]},
        "method": {"name": "barlow_twins", "projector_dim": 16},
        "training": {"batch_size": 16, "max_steps": STEPS, "log_every": 1, "monitor_every": 0, "device": "cpu"},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe))
    finished = run(path, "--output", tmp_path / "whole", log=tmp_path / "log")
    assert finished.statuses == [0], finished.errors[-3000:]
    stopped = interrupt(path, tmp_path / "run", 7, signal.SIGTERM)
    assert stopped.statuses == [75], stopped.errors[-3000:]
    resumed = run(path, "--output", tmp_path / "run", "--resume", log=tmp_path / "log")
    assert resumed.statuses == [0], resumed.errors[-3000:]
    want, got = (load_file(tmp_path / name / "encoder" / "model.safetensors") for name in ("whole", "run"))
    assert all(want[key].equal(got[key]) for key in want)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["data"]["images"] == 97 and results["data"]["name"] == "{split}-{000..002}.tar"
    assert results["collapse"] and not results["evaluations"]


def test_a_set_on_the_hub_is_streamed(tmp_path: Path):
    files = {f"data/{path.name}": path.read_bytes() for path in write_tables(tmp_path / "files", [40, 37], 10)}
    code = """
    import numpy as np
    from hf_ssl_or.data.arguments import DataArguments
    from hf_ssl_or.data.loading import load_images
    from tests.data.stream_shards import rows_of
    images = load_images(DataArguments(dataset="ada/set", streaming=True, image_size=8), "train")
    assert images.name == "ada/set" and rows_of(*images.square_batches([np.arange(77)])) == list(range(77))
    print("read", len(images))
    """
    with HubServer({}) as hub:
        hub.put("ada/set", files, kind="dataset")
        settings = {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_SSL_OR_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }
        lines = "\n".join(line.strip() for line in code.strip().splitlines())
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **settings}
        done = subprocess.run(
            [sys.executable, "-c", lines], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout == "read 77\n"
        assert not list((tmp_path / "hf").rglob("*.parquet")), "nothing is copied"
