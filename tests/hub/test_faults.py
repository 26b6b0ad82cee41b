"""Networks fail and processes are killed: a push is on the Hub as a whole, or in the outbox as a whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hf_ssl_or.errors import InputError
from hf_ssl_or.hub import retries
from hf_ssl_or.hub.push import resume_pushes
from hf_ssl_or.hub.retries import HubRefusalError, PushKeptError
from hf_ssl_or.hub.upload import deliver
from hf_ssl_or.hub.upload_queue import Destination, Entry, Outbox
from hf_ssl_or.models.auto import create_encoder
from tests.hub.conftest import TOKEN
from tests.hub.hub_server import HubServer

FILES = {
    "README.md": b"---\nlicense: mit\n---\n# It\n",
    "config.json": b'{"a": 1}\n',
    "model.safetensors": bytes(range(256)) * 40,
    "figures/spectra.png": b"\x89PNG" * 100,
    ".eval_results/ada--birds.yaml": b"- value: 1\n",
}
TO = Destination(repo_id="ada/net", message="Upload")


def store(run: Path, to: Destination = TO, files: dict[str, bytes] = FILES) -> Entry:
    def fill(folder: Path) -> None:
        for path, content in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)

    run.mkdir(exist_ok=True)
    outbox = Outbox(run)
    with outbox.locked():
        return outbox.add(to, fill)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.0)


def check_whole(hub: HubServer, revision: str = "main") -> None:
    """One commit brought everything; before it there was nothing."""
    last, *before = hub.repository("ada/net").history(revision)
    assert {path: last.files[path].content for path in last.files if path != ".gitattributes"} == FILES
    assert [commit.title for commit in before] == ["initial commit"]


PASSING = [
    *[("POST", "/repos/create", what) for what in (502, "drop", "drop after")],
    *[("GET", "/api/models/ada/net/tree/", what) for what in (500, "drop")],
    *[("POST", "/preupload/", what) for what in (503, "drop")],
    *[("POST", "objects/batch", what) for what in (429, "drop")],
    *[("PUT", "/large/", what) for what in (500, "drop", "corrupt")],
    *[("POST", "/lfs/verify", what) for what in (500, 422)],
    *[("POST", "/commit/", what) for what in (500, 504, 429, 412, "drop", "drop after")],
]


@pytest.mark.usefixtures("signed_in")
@pytest.mark.parametrize(("method", "path", "what"), PASSING)
def test_a_passing_fault_changes_nothing(hub: HubServer, run: Path, method: str, path: str, what: int | str) -> None:
    hub.inject(method, path, what, Retry_After="0")
    delivery = deliver(store(run), sleep=lambda seconds: None)
    assert not any(fault.times for fault in hub.faults), "the fault was never met"
    check_whole(hub)
    assert delivery.commit == hub.repository("ada/net").refs["main"]


@pytest.mark.usefixtures("signed_in")
@pytest.mark.parametrize("what", [504, "drop", "drop after"])
def test_one_pull_request_though_its_answer_was_lost(hub: HubServer, run: Path, what: int | str) -> None:
    hub.inject("POST", "/commit/", what)
    to = Destination(repo_id="ada/net", message="Upload", create_pr=True)
    delivery = deliver(store(run, to), sleep=lambda seconds: None)
    assert delivery.pull_request == f"{hub.endpoint}/ada/net/discussions/1"
    assert hub.repository("ada/net").refs.keys() == {"main", "refs/pr/1"} and not hub.repository("ada/net").files
    check_whole(hub, "refs/pr/1")


@pytest.mark.usefixtures("signed_in")
def test_waits_double_and_obey_the_hub(hub: HubServer, run: Path) -> None:
    hub.inject("POST", "/commit/", 429, Retry_After="17")
    hub.inject("POST", "/commit/", 500, times=3)
    waits: list[float] = []
    deliver(store(run), sleep=waits.append)
    assert waits[0] == 17 and all(2**n <= wait <= 2 * 2**n for n, wait in enumerate(waits) if n > 0), waits
    assert len(waits) == 4 and hub.count("POST", "/commit/") == 5


@pytest.mark.usefixtures("signed_in", "impatient")
def test_what_cannot_be_sent_waits_for_resume(hub: HubServer, run: Path) -> None:
    entry = store(run)
    hub.inject("POST", "/commit/", 500, times=99)
    with pytest.raises(PushKeptError, match=r"the Hub answered 500.*run --resume") as caught:
        resume_pushes(run)
    assert caught.value.passing and "\n" not in str(caught.value)
    assert not hub.repository("ada/net").files and len(hub.repository("ada/net").history()) == 1
    assert {path: file.read_bytes() for path, file in Outbox(run).waiting()[0].files.items()} == FILES
    assert json.loads((entry.folder / "push.json").read_text())["destination"]["repo_id"] == "ada/net"
    hub.faults.clear()
    (result,) = resume_pushes(run)
    assert result.delivery is not None and result.delivery.changed
    check_whole(hub)
    assert not Outbox(run).folder.exists() and resume_pushes(run) == []


@pytest.mark.usefixtures("signed_in")
def test_offline_nothing_is_tried(hub: HubServer, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = store(run)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PushKeptError, match="this process is offline"):
        resume_pushes(run)
    assert entry.folder.is_dir() and not hub.log


@pytest.mark.usefixtures("signed_in", "impatient")
def test_an_expired_token_keeps_the_push(hub: HubServer, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(run)
    monkeypatch.setenv("HF_TOKEN", "hf_ExpiredExpiredExpiredExpired")
    with pytest.raises(PushKeptError, match="the token is not valid .*hf auth login") as caught:
        resume_pushes(run)
    assert not caught.value.passing and "hf_Expired" not in str(caught.value) and not hub.repositories
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    resume_pushes(run)
    check_whole(hub)


@pytest.mark.usefixtures("signed_in")
def test_the_token_never_shows(hub: HubServer, run: Path) -> None:
    hub.inject("POST", "/commit/", 400, X_Error_Message=f"cannot read Authorization: Bearer {TOKEN}")
    entry = store(run)
    with pytest.raises(HubRefusalError) as caught:
        deliver(entry)
    assert "Bearer hf_***" in caught.value.reason and TOKEN not in caught.value.reason
    everything = b"".join(path.read_bytes() for path in Outbox(run).folder.rglob("*") if path.is_file())
    assert FILES["model.safetensors"] in everything and TOKEN.encode() not in everything


KILLED = """
import sys
from pathlib import Path
sys.argv[0] = "hf-ssl-or"  # which loads no more than it needs
from hf_ssl_or.hub.upload import deliver
from hf_ssl_or.hub.upload_queue import Outbox
deliver(Outbox(Path(sys.argv[1])).waiting()[0])
"""


@pytest.mark.usefixtures("signed_in")
@pytest.mark.parametrize("path", ["/large/", "/commit/"])
def test_a_killed_push_is_resumed(hub: HubServer, run: Path, path: str) -> None:
    store(run)
    hub.inject("PUT" if path == "/large/" else "POST", path, "stall")
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(run)], env=dict(os.environ))
    end = time.monotonic() + 60
    while not any(status == -1 for _, _, status in hub.log) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not hub.repository("ada/net").files
    resume_pushes(run)
    check_whole(hub)


# ---------------------------------------------------------------------------------------------------------------------
# The outbox


def test_a_newer_push_replaces_an_older_one(run: Path) -> None:
    store(run, files={"a": b"old"})
    other = store(run, Destination(repo_id="ada/net", revision="v2"), {"a": b"other"})
    newer = store(run, files={"a": b"new"})
    assert [entry.folder for entry in Outbox(run).waiting()] == [other.folder, newer.folder]
    assert newer.files["a"].read_bytes() == b"new"


def test_a_damaged_entry_is_named(run: Path) -> None:
    entry = store(run)
    entry.files["config.json"].write_bytes(b'{"a": 2}\n')
    with pytest.raises(InputError, match=r"ada--net@main.1: is damaged \(config.json"):
        Outbox(run).waiting()
    note = entry.folder / "push.json"
    note.write_text(note.read_text().replace("config.json", "../../../run"))
    with pytest.raises(InputError, match="is damaged"):
        Outbox(run).waiting()


def test_a_failure_while_filling_leaves_the_older_push(run: Path) -> None:
    older, outbox = store(run), Outbox(run)

    def fail(folder: Path) -> None:
        (folder / "half").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="No space left on device"), outbox.locked():
        outbox.add(TO, fail)
    assert [path.name for path in outbox.folder.iterdir() if path.is_dir()] == [older.folder.name]


def test_leftovers_of_a_kill_are_swept_and_two_pushes_do_not_mix(run: Path) -> None:
    entry, outbox = store(run), Outbox(run)
    (outbox.folder / "ada--net@main.2.part" / "files").mkdir(parents=True)
    with outbox.locked():
        assert {path.name for path in outbox.folder.iterdir()} == {".lock", entry.folder.name}
        with pytest.raises(InputError, match="another push of this run is under way"), Outbox(run).locked():
            pass


# ---------------------------------------------------------------------------------------------------------------------
# Downloads


@pytest.fixture
def on_the_hub(hub: HubServer, finished_run: Path) -> str:
    hub.put("lab/net", {p.name: p.read_bytes() for p in (finished_run / "encoder").iterdir() if p.is_file()})
    return "lab/net"


@pytest.mark.usefixtures("signed_in")
def test_a_damaged_download_is_noticed(hub: HubServer, on_the_hub: str, finished_run: Path) -> None:
    hub.inject("GET", "/large/", "corrupt")
    with pytest.raises(ValueError, match=r"model.safetensors was damaged on its way"):
        create_encoder("resnet18", init_from=on_the_hub)
    encoder = create_encoder("resnet18", init_from=on_the_hub)
    expected = load_file(finished_run / "encoder" / "model.safetensors")
    assert all(tensor.equal(expected[name]) for name, tensor in encoder.state_dict().items())


@pytest.mark.usefixtures("signed_in")
@pytest.mark.parametrize("what", [500, "drop"])
def test_a_failed_download_leaves_nothing_behind(hub: HubServer, on_the_hub: str, what: int | str) -> None:
    hub.inject("GET", "/large/", what, times=1)
    try:
        create_encoder("resnet18", init_from=on_the_hub)
    except OSError:  # the client retries some faults, not all
        create_encoder("resnet18", init_from=on_the_hub)
    assert hub.faults[0].times == 0


@pytest.mark.usefixtures("signed_in")
def test_the_cache_serves_offline(hub: HubServer, on_the_hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    create_encoder("resnet18", init_from=f"{on_the_hub}@main")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.log.clear()
    create_encoder("resnet18", init_from=f"{on_the_hub}@main")
    assert not hub.log
    with pytest.raises(ValueError, match="not in the cache of this offline machine"):
        create_encoder("resnet18", init_from="lab/other")


@pytest.mark.usefixtures("signed_in")
def test_an_unknown_revision_is_named(on_the_hub: str) -> None:
    with pytest.raises(ValueError, match="lab/net has no revision 'v9'"):
        create_encoder("resnet18", init_from=f"{on_the_hub}@v9")
