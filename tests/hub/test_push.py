"""What a push sends, what it leaves at home, and what it refuses; against the Hub of these tests, over HTTP."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from transformers import AutoModel

from hf_ssl_or.cli import main
from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation.encoder_loading import load_encoder
from hf_ssl_or.hub import background, retries, run_folder
from hf_ssl_or.hub.push import push_to_hub
from hf_ssl_or.hub.upload_queue import Outbox
from hf_ssl_or.hub.weight_files import weights_sha256
from hf_ssl_or.models.auto import create_encoder
from hf_ssl_or.recipe import recipe_from_dict
from hf_ssl_or.run import pretrain
from tests.hub.conftest import READER, RECIPE, TOKEN
from tests.hub.hub_server import HubServer

pytestmark = pytest.mark.usefixtures("signed_in")

FILES = {
    *("README.md", "config.json", "preprocessor_config.json", "model.safetensors", "recipe.yaml", "results.json"),
    *("configuration_ssl.py", "modeling_ssl.py", "modeling_ssl_resnet.py", "image_processing_ssl.py"),
    *("blocks.py", "image_conversion.py", "pipeline_ssl.py"),
    "figures/views.png",
}


@pytest.fixture
def unproven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the proofs, each of which takes a fresh process, where they are not what is tested."""
    monkeypatch.setattr(run_folder, "prove", lambda pushed, original: 0.0)


def change(path: Path, edit: Callable[[str], str]) -> None:
    path.write_text(edit(path.read_text()))


def move_data(run: Path, dataset: str) -> None:
    """Makes a run say that it was trained on another data set."""
    for name in ("recipe.yaml", "results.json", "encoder/config.json"):
        change(
            run / name, lambda text: re.sub(r'\bshapes"?(?=[,\n])', lambda m: m[0].replace("shapes", dataset), text)
        )


# ---------------------------------------------------------------------------------------------------------------------
# What is sent


@pytest.mark.usefixtures("unproven")
def test_one_commit_of_what_belongs_there(hub: HubServer, run_folder: Path) -> None:
    photos = run_folder.parent / "photos"
    move_data(run_folder, str(photos))
    for name in ("token.txt", "encoder/notes.txt", "encoder/helper.py", "encoder/optimizer.safetensors"):
        (run_folder / name).write_text("mine")
    shutil.copy(run_folder / "figures" / "views.png", run_folder / "figures" / "spectra.png")
    (run_folder / "figures" / "link.png").symlink_to(run_folder / "token.txt")
    result = push_to_hub(run_folder, "ada/net", license="mit")
    repository = hub.repository("ada/net")
    # The photographs that views.png shows stay at home.
    assert set(repository.files) == FILES - {"figures/views.png"} | {"figures/spectra.png"} == set(result.files)
    assert result.delivery is not None and result.delivery.commit == repository.refs["main"]
    assert [len(commit.files) for commit in repository.history()] == [len(FILES) + 1, 1]
    assert repository.files["model.safetensors"] == (run_folder / "encoder" / "model.safetensors").read_bytes()
    assert yaml.safe_load(repository.files["recipe.yaml"])["data"]["dataset"] == "photos"
    assert json.loads(repository.files["config.json"])["pretraining"]["dataset"] == "photos"
    assert json.loads(repository.files["results.json"])["weights_sha256"] == weights_sha256(run_folder / "encoder")
    assert "license: mit" in repository.files["README.md"].decode()
    check_no_secret(repository.files, run_folder)

    hub.log.clear()
    again = push_to_hub(run_folder, "ada/net", license="mit")
    assert again.delivery is not None and not again.delivery.changed and "nothing changed" in again.describe()
    assert hub.count("POST", "/commit/") == 0 and len(repository.history()) == 2
    assert not Outbox(run_folder).folder.exists()


def check_no_secret(files: dict[str, bytes], run: Path) -> None:
    """Looks at every byte that was pushed."""
    secrets = [TOKEN, str(run), str(run.parent), os.path.expanduser("~") + "/", os.getcwd(), "home-of-ada"]
    for path, content in files.items():
        assert not [secret for secret in secrets if secret.encode() in content], path
        if not path.endswith((".png", ".safetensors")):
            assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", content.decode()), path


@pytest.mark.usefixtures("unproven")
def test_branch_pull_request_and_privacy(hub: HubServer, run_folder: Path) -> None:
    push_to_hub(run_folder, "lab/net", private=True, revision="try/1", message="First try")
    repository = hub.repository("lab/net")
    assert repository.private and not repository.files and repository.at("try/1").title == "First try"
    opened = push_to_hub(run_folder, "lab/net", private=True, create_pr=True)
    assert f"opened {hub.endpoint}/lab/net/discussions/1" in opened.describe() and not repository.files
    assert set(repository.at("refs/pr/1").files) == {*FILES, ".gitattributes"}
    push_to_hub(run_folder, "lab/net")
    assert set(repository.files) == FILES and repository.private


@pytest.mark.usefixtures("unproven")
def test_shards_and_leftovers(hub: HubServer, run_folder: Path) -> None:
    push_to_hub(run_folder, "ada/net")
    repository, encoder = hub.repository("ada/net"), run_folder / "encoder"
    model = AutoModel.from_pretrained(encoder)
    (encoder / "model.safetensors").unlink()
    model.save_pretrained(encoder, max_shard_size="30KB")
    push_to_hub(run_folder, "ada/net")
    shards = {path for path in repository.files if path.endswith(".safetensors")}
    assert len(shards) > 1 and "model.safetensors" not in shards and "model.safetensors.index.json" in repository.files
    last = repository.at("main")
    files = {**last.files, "LICENSE": last.files["README.md"]}  # somebody else's file, which stays
    repository.refs["main"] = repository.add(files, "Add license", "", last.sha)
    for path in encoder.glob("model*"):
        path.unlink()
    model.save_pretrained(encoder)
    push_to_hub(run_folder, "ada/net")
    assert set(repository.files) == FILES | {"LICENSE"}


@pytest.mark.usefixtures("unproven")
def test_a_run_that_was_not_evaluated(hub: HubServer, run_folder: Path) -> None:
    (run_folder / "results.json").unlink()
    push_to_hub(run_folder, "ada/net")
    files = hub.repository("ada/net").files
    assert set(files) == FILES - {"results.json"} and "Nothing was measured" in files["README.md"].decode()


@pytest.mark.usefixtures("unproven")
def test_dry_run_asks_nobody(hub: HubServer, run_folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["push", str(run_folder), "ada/net", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert all(path in shown for path in FILES) and "nothing was sent" in shown and not hub.log


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def refusal(capsys: pytest.CaptureFixture, *argv: object, status: int = 2) -> str:
    """Runs a push that must fail with one line, which must not hold a token."""
    capsys.readouterr()
    assert main(["push", *map(str, argv)]) == status
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hf-ssl-or:")]
    assert len(error) == 1 and "hf_Writer" not in error[0] and "hf_Reader" not in error[0], error
    return error[0]


@pytest.mark.usefixtures("unproven")
def test_accounts_and_names(
    hub: HubServer, run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.0)
    hub.put("ada/birds", {"data.parquet": b"1"}, kind="dataset")
    hub.put("ada/public", {"README.md": b"1"})
    assert "is a dataset on the Hub" in refusal(capsys, run_folder, "ada/birds")
    assert "is public on the Hub" in refusal(capsys, run_folder, "ada/public", "--private")
    assert "write owner/name" in refusal(capsys, run_folder, "net")
    assert "no Hub id" in refusal(capsys, run_folder, "ada/net/x")
    assert "--resume" in refusal(capsys, run_folder) and "--resume" in refusal(capsys, run_folder, "a/b", "--resume")
    assert not Outbox(run_folder).folder.exists()
    assert "answered 403" in refusal(capsys, run_folder, "bob/net")
    monkeypatch.setenv("HF_TOKEN", READER)
    assert "answered 403" in refusal(capsys, run_folder, "ada/public")
    monkeypatch.setenv("HF_TOKEN", "hf_ReaderButExpired")
    assert "not valid (expired" in refusal(capsys, run_folder, "ada/net")
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in refusal(capsys, run_folder, "ada/net")
    assert set(hub.repositories) == {("dataset", "ada/birds"), ("model", "ada/public")}
    assert hub.repository("ada/public").files == {"README.md": b"1"}


def test_nothing_to_push(tmp_path: Path, run_folder: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "empty").mkdir()
    assert "there is no encoder to push (recipe.yaml is missing)" in refusal(capsys, tmp_path / "empty", "ada/net")
    assert "there is no such folder" in refusal(capsys, tmp_path / "none", "ada/net")
    shutil.rmtree(run_folder / "encoder")
    assert "encoder/config.json is missing" in refusal(capsys, run_folder, "ada/net")


def test_results_of_another_encoder(hub: HubServer, run_folder: Path, capsys: pytest.CaptureFixture) -> None:
    weights = run_folder / "encoder" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "results.json: is of another encoder" in refusal(capsys, run_folder, "ada/net")
    weights.write_bytes(content)
    change(run_folder / "results.json", lambda text: text.replace("weights_sha256", "x"))
    assert "does not say which weights" in refusal(capsys, run_folder, "ada/net")
    change(run_folder / "results.json", lambda text: text[:100])
    assert "results.json: cannot be read" in refusal(capsys, run_folder, "ada/net")
    assert not hub.log


def test_other_features_in_a_fresh_process(hub: HubServer, run_folder: Path, capsys: pytest.CaptureFixture) -> None:
    code = run_folder / "encoder" / "modeling_ssl.py"
    change(code, lambda text: text.replace("pixel_values.to(self.dtype)", "1.001 * pixel_values.to(self.dtype)"))
    assert "gives other features" in refusal(capsys, run_folder, "ada/net")
    assert not hub.log and not Outbox(run_folder).folder.exists()


@pytest.mark.usefixtures("unproven")
@pytest.mark.parametrize("name", ["../../outside.safetensors", "/etc/outside.safetensors", "weights.bin", 7])
def test_an_index_that_points_elsewhere(run_folder: Path, name: object, capsys: pytest.CaptureFixture) -> None:
    encoder = run_folder / "encoder"
    shutil.move(encoder / "model.safetensors", run_folder.parent / "outside.safetensors")
    (encoder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    assert "which is no safetensors file beside it" in refusal(capsys, run_folder, "ada/net")
    with pytest.raises(ValueError, match="no safetensors file beside it"):
        create_encoder("resnet18", init_from=encoder)
    with pytest.raises(InputError, match="no safetensors file beside it"):
        load_encoder(str(encoder))


@pytest.mark.usefixtures("unproven")
def test_pickles(run_folder: Path, capsys: pytest.CaptureFixture) -> None:
    encoder = run_folder / "encoder"
    shutil.move(encoder / "model.safetensors", encoder / "pytorch_model.bin")
    assert "only safetensors are read and pushed" in refusal(capsys, run_folder, "ada/net")
    with pytest.raises(ValueError, match="only safetensors are read"):
        create_encoder("resnet18", init_from=encoder)
    with pytest.raises(InputError, match="cannot be loaded as an encoder"):
        load_encoder(str(encoder))


@pytest.mark.usefixtures("unproven")
def test_secrets_in_a_file(hub: HubServer, run_folder: Path, capsys: pytest.CaptureFixture) -> None:
    views = run_folder / "figures" / "views.png"
    views.write_bytes(views.read_bytes() + TOKEN.encode())
    assert "figures/views.png: holds an access token" in refusal(capsys, run_folder, "ada/net")
    views.write_bytes(b"PNG of " + str(run_folder).encode())
    assert "figures/views.png: holds the path" in refusal(capsys, run_folder, "ada/net")
    assert not hub.log and not Outbox(run_folder).folder.exists()


@pytest.mark.usefixtures("unproven")
def test_no_token_in_a_traceback(hub: HubServer, run_folder: Path, capsys: pytest.CaptureFixture) -> None:
    hub.inject("POST", "/commit/", 400, X_Error_Message=f"cannot read Authorization: Bearer {TOKEN}")
    assert main(["push", str(run_folder), "ada/net", "--traceback"]) == 2
    shown = capsys.readouterr()
    assert "Traceback" in shown.err and "Bearer hf_***" in shown.err and TOKEN not in shown.out + shown.err


@pytest.mark.usefixtures("unproven")
def test_a_full_disk(hub: HubServer, run_folder: Path, capsys: pytest.CaptureFixture) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))  # the weights are larger
    try:
        assert "make room there" in refusal(capsys, run_folder, "ada/net")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not hub.log and not Outbox(run_folder).folder.exists()


@pytest.mark.usefixtures("unproven")
def test_out_of_reach_then_resumed(
    hub: HubServer, run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.0)
    hub.inject("POST", "/commit/", "drop", times=99)
    line = refusal(capsys, "--traceback", run_folder, "ada/net", status=75)
    assert "cannot be reached" in line and f"hf-ssl-or push {run_folder} --resume" in line
    assert not hub.repository("ada/net").files
    shutil.rmtree(run_folder)  # the outbox has all that it takes
    run_folder.mkdir()
    hub.faults.clear()
    assert main(["push", str(run_folder), "--resume"]) == 0
    assert set(hub.repository("ada/net").files) == FILES
    assert main(["push", str(run_folder), "--resume"]) == 0 and "nothing waits" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# While a run trains


def test_every_checkpoint_and_the_end(
    hub: HubServer, tmp_path: Path, unproven: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "_LOOK_EVERY", 0.02)
    training = {**RECIPE["training"], "max_steps": 3, "save_steps": 1, "push": "every", "push_to": "lab/net"}
    folder = tmp_path / "run"
    pretrain(recipe_from_dict({**RECIPE, "training": training}), folder)
    titles = [commit.title for commit in hub.repository("lab/net").history()]
    assert re.fullmatch(r"Upload encoder with hf_ssl_or \S+", titles[0]), (folder / "push.log").read_text()
    assert len(titles) > 2 and all(re.fullmatch(r"Upload encoder after step [123]", title) for title in titles[1:-1])
    early = hub.repository("lab/net").history()[-2]
    step = int(early.title[-1])
    assert json.loads(early.files["config.json"].content)["pretraining"]["steps"] == step
    assert "results.json" not in early.files and not (folder / ".push").exists()
    (tmp_path / "early.safetensors").write_bytes(early.files["model.safetensors"].content)
    kept = folder / "checkpoints" / f"step-{step}" / "method.safetensors"
    if kept.exists():  # else the trainer has pruned it, and the push had its own link
        expected = load_file(kept)
        for name, tensor in load_file(tmp_path / "early.safetensors").items():
            assert tensor.equal(expected[f"encoder.{name}"])
    assert (folder / "push.log").read_text().splitlines()[-1].startswith("pushed ")


def test_a_run_ends_well_though_its_push_fails(
    hub: HubServer, tmp_path: Path, unproven: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.0)
    hub.inject("POST", "/api/repos/create", 500, times=99)
    training = {**RECIPE["training"], "max_steps": 1, "push": "end", "push_to": "lab/net"}
    assert pretrain(recipe_from_dict({**RECIPE, "training": training}), tmp_path / "run") is not None
    assert "all of it waits in" in (tmp_path / "run" / "push.log").read_text()
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match="hf auth login"):  # told before the first step
        pretrain(recipe_from_dict({**RECIPE, "training": training}), tmp_path / "other")


def test_the_settings_go_together() -> None:
    with pytest.raises(InputError, match=r"training.push_to: give both"):
        recipe_from_dict({**RECIPE, "training": {"push": "end"}})
