from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import shutil
import time
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from hf_ssl_or.errors import InputError
from hf_ssl_or.training import checkpoint
from hf_ssl_or.training.checkpoint import CheckpointStore, load_optimizer, optimizer_tensors, snapshot
from hf_ssl_or.training.fsdp import load_full
from hf_ssl_or.training.optim import OptimizerArguments, build_optimizer

OPTIMIZERS = [{"name": "adamw"}, {"name": "sgd"}, {"name": "sgd", "momentum": 0}, {"name": "lars", "nesterov": True}]


def tensors_of(step: int) -> dict[str, dict[str, Tensor]]:
    """Content that depends on the step, so that a mix of two checkpoints would be seen."""
    return {"method": {"w": torch.arange(4096.0) + step}, "optimizer": {"m": torch.full((64, 64), float(step))}}


def assert_loads(store: CheckpointStore, path: Path) -> int:
    groups, state = store.load(path)
    step = state["step"]
    assert path.name == f"step-{step}" and state["note"] == f"of {step}"
    for group, tensors in tensors_of(step).items():
        assert groups[group].keys() == tensors.keys()
        assert all(torch.equal(groups[group][name], tensor) for name, tensor in tensors.items())
    return step


def store_with(run_dir: Path, *steps: int, keep_last: int | None = None) -> CheckpointStore:
    store = CheckpointStore(run_dir, keep_last=keep_last)
    for step in steps:
        store.save(step, tensors_of(step), {"note": f"of {step}"})
    return store


def flip_a_bit(path: Path, where: int = -10) -> None:
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


# -- the optimizer's state --------------------------------------------------------------------------------------------


def trained(arguments: dict, seed: int, steps: int, dtype: torch.dtype = torch.float32):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 2)).to(dtype)
    net[0].to(memory_format=torch.channels_last)
    net[3].bias.requires_grad_(False)
    optimizer = build_optimizer(net, OptimizerArguments(lr=0.01, **arguments), batch_size=8)
    train(net, optimizer, range(steps))
    return net, optimizer


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        images = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(step)).to(net[2].weight.dtype)
        optimizer.zero_grad()
        output = net(images) if step % 2 else net[:3](images)  # the last layer has a gradient at odd steps only
        output.square().sum().backward()
        optimizer.step()


def assert_same_state(left: torch.optim.Optimizer, right: torch.optim.Optimizer) -> None:
    a, b = left.state_dict()["state"], right.state_dict()["state"]
    assert a.keys() == b.keys()
    for index in a:
        assert a[index].keys() == b[index].keys()
        for key, value in a[index].items():
            other = b[index][key]
            assert torch.equal(value, other) and value.dtype == other.dtype, key


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("arguments", OPTIMIZERS, ids=str)
def test_resumed_equals_uninterrupted_bitwise(tmp_path: Path, arguments: dict, dtype: torch.dtype) -> None:
    net, optimizer = trained(arguments, 0, 3, dtype)
    tensors, state = optimizer_tensors(optimizer)
    store = CheckpointStore(tmp_path)
    path = store.save(3, {"method": net.state_dict(), "optimizer": tensors}, {"optimizer": state})
    groups, loaded = store.load(path)
    other, fresh = trained(arguments, 1, 0, dtype)
    other.load_state_dict(groups["method"])
    load_optimizer(fresh, groups["optimizer"], loaded["optimizer"])
    assert_same_state(optimizer, fresh)
    train(net, optimizer, range(3, 7))
    train(other, fresh, range(3, 7))
    assert_same_state(optimizer, fresh)
    assert all(
        torch.equal(a, b) and a.isfinite().all() for a, b in zip(net.parameters(), other.parameters(), strict=True)
    )


def test_state_is_found_by_name_whatever_the_groups() -> None:
    net, optimizer = trained({"name": "adamw"}, 0, 3)
    tensors, state = optimizer_tensors(optimizer)
    backwards = [(name, p) for name, p in reversed(list(net.named_parameters())) if p.requires_grad]
    other = torch.optim.AdamW([{"params": backwards[:2]}, {"params": backwards[2:]}], fused=True)
    load_optimizer(other, tensors, state)
    for parameter, entries in optimizer.state.items():
        assert all(torch.equal(value, other.state[parameter][key]) for key, value in entries.items())


def test_loaded_state_is_a_copy_and_settings_stay() -> None:
    net, optimizer = trained({"name": "lars"}, 0, 2)
    tensors, state = optimizer_tensors(optimizer)
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    other, fresh = trained({"name": "lars", "momentum": 0.5}, 0, 0)
    load_optimizer(fresh, tensors, state)
    train(other, fresh, range(2))
    assert fresh.param_groups[0]["momentum"] == 0.5
    assert all(torch.equal(tensors[key], before[key]) for key in before)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t, s: s.update(optimizer="SGD"), "of SGD, this run has AdamW"),
        (lambda t, s: t.pop("2.weight/exp_avg"), "tensor '2.weight/exp_avg' is missing"),
        (lambda t, s: t.update(extra=torch.ones(1)), "tensor 'extra' is unexpected"),
        (lambda t, s: t.update({"2.weight/exp_avg": torch.ones(4, 5)}), r"'2.weight/exp_avg' has shape \(4, 5\)"),
        (lambda t, s: s["parameters"].pop("2.bias"), "parameter '2.bias' is missing"),
        (lambda t, s: s["parameters"].update(x={"tensors": [], "values": {}}), "parameter 'x' is unexpected"),
    ],
)
def test_state_that_does_not_fit_is_refused(damage, message: str) -> None:
    net, optimizer = trained({"name": "adamw"}, 0, 2)
    tensors, state = optimizer_tensors(optimizer)
    damage(tensors, state)
    with pytest.raises(InputError, match=message):
        load_optimizer(trained({"name": "adamw"}, 0, 0)[1], tensors, state)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"weight": torch.zeros(2, 3)}, "'bias' is missing"),
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "old": torch.zeros(2)}, "'old' is unknown"),
        ({"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}, "'weight' is of another shape"),
    ],
)
def test_weights_that_do_not_fit_are_refused(state: dict[str, Tensor], message: str) -> None:
    net = nn.Linear(3, 2)
    before = net.weight.detach().clone()
    with pytest.raises(InputError, match=message):
        load_full(net, state)
    assert torch.equal(net.weight, before)


def test_loaded_state_has_the_layout_of_its_parameter() -> None:
    net, optimizer = trained({"name": "adamw"}, 0, 2)
    other, fresh = trained({"name": "adamw"}, 1, 0)
    load_optimizer(fresh, *optimizer_tensors(optimizer))
    assert fresh.state[other[0].weight]["exp_avg"].is_contiguous(memory_format=torch.channels_last)


# -- round trips ------------------------------------------------------------------------------------------------------


def test_tensors_of_every_kind_come_back_bitwise(tmp_path: Path) -> None:
    base = torch.randn(6, 4)
    tensors = {
        "alias_1": base,
        "alias_2": base,
        "view": base[2:, :2],
        "transposed": base.T,
        "expanded": torch.ones(1, 3).expand(5, 3),
        "channels_last": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 7),
        "int64": torch.tensor([2**62, -1]),
        "bool": torch.tensor([True, False]),
        "bfloat16": torch.randn(5).bfloat16(),
        "float64": torch.tensor([torch.nan, -0.0, torch.inf, 1 / 3], dtype=torch.float64),
        "generator": torch.Generator().manual_seed(3).get_state(),
        "with.dots/and slash": torch.ones(1, requires_grad=True),
    }
    store = CheckpointStore(tmp_path)
    groups, _ = store.load(store.save(1, {"method": tensors, "orthogonality": {}}, {}))
    assert groups.keys() == {"method", "orthogonality"} and groups["orthogonality"] == {}
    assert groups["method"].keys() == tensors.keys()
    for name, tensor in tensors.items():
        found = groups["method"][name]
        assert found.dtype == tensor.dtype and found.shape == tensor.shape, name
        assert found.numpy(force=True).tobytes() == tensor.numpy(force=True).tobytes() if name != "bfloat16" else True
        assert torch.equal(found, tensor) or name == "float64", name
    groups["method"]["alias_1"].add_(1)  # writable, and nobody else's memory
    assert torch.equal(groups["method"]["alias_2"], base)


def test_state_comes_back_with_the_step(tmp_path: Path) -> None:
    state = {"recipe": {"lr": 1 / 3, "tiny": 5e-324, "names": ["é", None, True]}, "scale": 65536.0, "big": 2**70}
    store = CheckpointStore(tmp_path)
    assert store.load(store.save(12, {}, state)) == ({}, {**state, "step": 12})
    _, found = store.load(store.save(13, {}, {10: "ten", 9: "nine"}))
    assert found == {"10": "ten", "9": "nine", "step": 13}


def test_snapshot_is_a_copy() -> None:
    weight = torch.ones(3)
    copy = snapshot({"method": {"w": weight}})["method"]["w"]
    weight.add_(1)
    assert torch.equal(copy, torch.ones(3))


def test_the_files_are_plain_safetensors_and_json(tmp_path: Path) -> None:
    path = store_with(tmp_path, 5).latest()
    assert sorted(file.name for file in path.iterdir()) == [
        "method.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    assert torch.equal(safetensors.torch.load_file(path / "method.safetensors")["w"], tensors_of(5)["method"]["w"])
    assert len({file.stat().st_mode for file in path.iterdir()}) == 1, "all as the user's umask wants"
    content = json.loads((path / "state.json").read_text())
    assert content["format"] == 1 and content["step"] == 5 and content["state"] == {"note": "of 5"}
    assert content["files"]["method.safetensors"]["size"] == (path / "method.safetensors").stat().st_size


@pytest.mark.parametrize("group", ["../method", "a/b", ".hidden", ""])
def test_a_group_is_a_plain_word(tmp_path: Path, group: str) -> None:
    store = store_with(tmp_path, 1)
    with pytest.raises(ValueError, match="plain word"):
        store.save(2, {group: {}}, {})
    assert sorted(os.listdir(store.folder)) == ["step-1"]


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "damage", "problem"),
    [
        ("optimizer.safetensors", flip_a_bit, "damaged"),
        ("optimizer.safetensors", lambda path: flip_a_bit(path, 3), "damaged"),
        ("method.safetensors", truncate, "incomplete"),
        ("method.safetensors", Path.unlink, "No such file"),
        ("state.json", Path.unlink, "No such file"),
        ("state.json", truncate, "not JSON"),
        ("state.json", lambda path: path.write_bytes(b"\xff\xfe"), "not JSON"),
        ("state.json", lambda path: path.write_text("[]"), "damaged"),
        ("state.json", lambda path: path.write_text(path.read_text().replace("of 20", "of 21")), "damaged"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path: Path, file: str, damage, problem: str) -> None:
    store = store_with(tmp_path, 10, 20)
    damage(store.folder / "step-20" / file)
    with pytest.raises(InputError, match=f"step-20/{file}: .*{problem}"):
        store.load(store.folder / "step-20")
    with pytest.warns(UserWarning, match=f"step-20/{file}: .*{problem}.*using .*step-10 instead"):
        path = store.latest()
    assert assert_loads(store, path) == 10


def test_no_valid_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.latest() is None and store.steps() == [] and store.best() is None
    truncate(store_with(tmp_path, 1).folder / "step-1" / "state.json")
    with pytest.warns(UserWarning, match="step-1.*no other checkpoint is left"):
        assert store.latest() is None
    with pytest.raises(InputError, match="nowhere/state.json: cannot be read"):
        store.load(tmp_path / "nowhere")


def forge(folder: Path, **changes) -> None:
    content = json.loads((folder / "state.json").read_text()) | changes
    del content["sha256"]
    content["sha256"] = checkpoint._json_digest(content)
    (folder / "state.json").write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/../b.safetensors", ".."])
def test_file_names_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    store = store_with(tmp_path, 1)
    forge(store.folder / "step-1", files={name: {"size": 0, "sha256": ""}})
    with pytest.raises(InputError, match="not the name of a file in this folder"):
        store.load(store.folder / "step-1")


def test_another_format_stops_instead_of_going_back(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1, 2)
    forge(store.folder / "step-2", format=99)
    with pytest.raises(InputError, match="format 99"):
        store.latest()


# -- interrupted and failing writes -----------------------------------------------------------------------------------


def test_leftovers_of_a_kill_are_ignored_then_removed(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1, 2)
    shutil.copytree(store.folder / "step-2", store.folder / ".tmp-step-3")
    shutil.copytree(store.folder / "step-2", store.folder / ".tmp-gone-0")
    shutil.copytree(store.folder / "step-1", store.folder / ".old-step-2")
    assert store.steps() == [1, 2] and assert_loads(store, store.latest()) == 2
    store_with(tmp_path, 3)
    assert sorted(os.listdir(store.folder)) == ["step-1", "step-2", "step-3"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    store = store_with(tmp_path, 2)
    os.replace(store.folder / "step-2", store.folder / ".old-step-2")
    assert store.steps() == [2] and store.load(store.latest())[1]["note"] == "of 2"
    store_with(tmp_path, 3)
    assert sorted(os.listdir(store.folder)) == ["step-2", "step-3"] and assert_loads(store, store.folder / "step-2")


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    store = store_with(tmp_path, 7)
    store.save(7, {"method": {"w": torch.zeros(2)}}, {"note": "second"})
    groups, state = store.load(store.latest())
    assert state == {"note": "second", "step": 7} and list(groups) == ["method"]
    assert os.listdir(store.folder) == ["step-7"]


def assert_save_fails(store: CheckpointStore, reason: str) -> None:
    before = sorted(os.listdir(store.folder))
    with pytest.raises(
        InputError, match=f"step 2 cannot be saved .*{reason}.*last good checkpoint: .*step-1"
    ) as caught:
        store.save(2, tensors_of(2), {"note": "of 2"})
    assert "\n" not in str(caught.value) and str(store.folder) in str(caught.value)
    assert sorted(os.listdir(store.folder)) == before
    assert assert_loads(store, store.latest()) == 1


@pytest.mark.parametrize("call", ["fsync", "replace", "mkdir"])
def test_a_full_disk_leaves_what_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    store = store_with(tmp_path, 1, keep_last=1)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        assert_save_fails(store, "No space left on device")
    assert assert_loads(store, store.save(2, tensors_of(2), {"note": "of 2"})) == 2


def test_state_that_is_not_json_leaves_what_was(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1)
    with pytest.raises(TypeError, match="not JSON serializable"):
        store.save(2, tensors_of(2), {"bad": object()})
    assert os.listdir(store.folder) == ["step-1"]


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(InputError, match="checkpoints: step 1 cannot be saved .*last good checkpoint: none"):
        CheckpointStore(tmp_path).save(1, {}, {})


def forked(target, *arguments: object) -> multiprocessing.Process:
    """Starts a child at once, without importing torch anew."""
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


def save_under_a_limit(run_dir: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    assert_save_fails(CheckpointStore(run_dir), "File too large")


def test_a_real_failing_write_leaves_what_was(tmp_path: Path) -> None:
    """A limit on file sizes cuts the first file short in the kernel, as a full disk would."""
    store_with(tmp_path, 1)
    process = forked(save_under_a_limit, tmp_path)
    process.join(60)
    assert process.exitcode == 0


def save_forever(run_dir: Path, step: int, saved) -> None:
    store = CheckpointStore(run_dir, keep_last=1)
    while True:
        step += 1
        for _ in range(2):  # new, then in place of itself
            store.save(step, tensors_of(step), {"note": f"of {step}"})
            saved.value = step


def test_sigkill_at_any_instant_leaves_a_valid_checkpoint(tmp_path: Path) -> None:
    store, saved = (
        CheckpointStore(tmp_path, keep_last=1),
        multiprocessing.get_context("fork").Value("i", 0, lock=False),
    )
    for attempt in range(25):
        start = saved.value
        process = forked(save_forever, tmp_path, start, saved)
        while saved.value == start:
            assert process.is_alive()
        time.sleep(attempt * 0.00037)
        process.kill()
        process.join(60)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # not even a warning: nothing half-written bears a checkpoint's name
            groups, state = store.load(store.latest())
        assert saved.value <= state["step"] <= saved.value + 1
        assert torch.equal(groups["method"]["w"], tensors_of(state["step"])["method"]["w"])
        saved.value = state["step"]
    assert_loads(store, store.save(10**6, tensors_of(10**6), {"note": f"of {10**6}"}))
    assert os.listdir(store.folder) == ["step-1000000"]


# -- pruning and the best ---------------------------------------------------------------------------------------------


def test_the_newest_are_kept(tmp_path: Path) -> None:
    assert store_with(tmp_path / "all", 1, 2, 3).steps() == [1, 2, 3]
    assert store_with(tmp_path / "two", 9, 10, 100, keep_last=2).steps() == [10, 100]
    with pytest.raises(InputError, match="keep_last"):
        CheckpointStore(tmp_path, keep_last=0)


def test_what_was_just_saved_is_never_pruned(tmp_path: Path) -> None:
    """A run that went back before a damaged checkpoint saves an earlier step than that."""
    store = store_with(tmp_path, 10, 20)
    truncate(store.folder / "step-20" / "state.json")
    store_with(tmp_path, 12, keep_last=1)
    assert store.steps() == [12, 20]
    with pytest.warns(UserWarning, match="step-12 instead"):
        assert store.latest() == store.folder / "step-12"


def test_the_best_is_kept_until_a_better_one_comes(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1, 2, keep_last=1)
    store.mark_best(2, 5.0, "rankme")
    store = store_with(tmp_path, 3, 4, keep_last=1)
    store.mark_best(4, 4.0, "rankme")
    assert store.best() == {"step": 2, "value": 5.0, "name": "rankme"} and store.steps() == [2, 4]
    store.mark_best(4, float("nan"), "rankme")
    assert store.best()["step"] == 2
    store = store_with(tmp_path, 5, keep_last=1)
    store.mark_best(5, 6.0, "rankme")
    assert store.best()["step"] == 5 and store.steps() == [5]
    store.mark_best(5, 0.3, "knn")
    assert store.best() == {"step": 5, "value": 0.3, "name": "knn"}


def test_a_best_that_is_gone_or_never_was(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1, 2)
    with pytest.raises(InputError, match="step 3 has no checkpoint"):
        store.mark_best(3, 1.0, "rankme")
    store.mark_best(2, 9.0, "rankme")
    shutil.rmtree(store.folder / "step-2")
    assert store.best() is None
    store.mark_best(1, 1.0, "rankme")
    assert store.best()["step"] == 1
    (store.folder / "best.json").write_text("{")
    with pytest.raises(InputError, match=r"best\.json: damaged"):
        store.best()
