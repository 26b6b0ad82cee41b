"""A Hub on this machine, a finished run to push to it, and two ways to be its client: here, and in a fresh process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants

from hf_ssl_or.recipe import recipe_from_dict
from hf_ssl_or.run import pretrain
from tests.hub.hub_server import HubServer

TOKEN = "hf_WriterWriterWriterWriterWriter"
READER = "hf_ReaderReaderReaderReaderReader"
RECIPE = {
    "data": {"dataset": "shapes", "shapes_train": 64, "shapes_test": 32},
    "encoder": {"name": "resnet18", "stem": "small", "channels": [8, 8, 8, 8]},
    "training": {"batch_size": 16, "max_steps": 2, "log_every": 1, "monitor_every": 0, "device": "cpu"},
    "evaluation": {"protocols": ["knn"], "baselines": False},
}


@pytest.fixture(scope="session")
def running_hub() -> Iterator[HubServer]:
    with HubServer({TOKEN: ["ada", "ada", "lab"], READER: ["bob"]}) as hub:
        yield hub


@pytest.fixture
def hub(running_hub: HubServer) -> Iterator[HubServer]:
    """The Hub, empty and in order; at the end nothing may have sent a token to where the large files are."""
    running_hub.repositories.clear()
    running_hub.large.clear()
    running_hub.faults.clear()
    running_hub.log.clear()
    yield running_hub
    assert not running_hub.leaks


@pytest.fixture
def settings(hub: HubServer, tmp_path: Path) -> dict[str, str]:
    """Environment of a client of the Hub that is signed in and has cached nothing."""
    return {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }


@pytest.fixture
def signed_in(hub: HubServer, settings: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes this process such a client, though its libraries were imported long ago."""
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    address = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in (
        ("ENDPOINT", hub.endpoint),
        ("HUGGINGFACE_CO_URL_TEMPLATE", address),
        ("HF_HUB_CACHE", str(tmp_path / "hf" / "hub")),
        ("HF_HUB_OFFLINE", False),
        ("HF_HUB_DISABLE_XET", True),
    ):
        monkeypatch.setattr(constants, name, value)
    close_session()


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home-of-ada") / "secret-project"
    pretrain(recipe_from_dict(RECIPE), folder)
    return folder


@pytest.fixture
def run_folder(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, for one test."""
    return shutil.copytree(finished_run, tmp_path / "home-of-ada" / "secret-project")


@pytest.fixture
def fresh_process(settings: dict[str, str], tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command or, given code, a fresh interpreter, elsewhere, as a client of the Hub."""

    def run(*command: str, code: str = "", status: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-P", "-c", textwrap.dedent(code)] if code else list(command)
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir(exist_ok=True)
        environment = {**os.environ, **settings, "OMP_NUM_THREADS": "1", **more}
        result = subprocess.run(line, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == status, result.stdout[-2000:] + result.stderr[-4000:]
        return result

    return run
