from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from hf_ssl_or.callbacks.metrics_log import flatten
from hf_ssl_or.data.loading import load_images
from hf_ssl_or.errors import InputError, NonFiniteLossError
from hf_ssl_or.models.configuration_ssl import OrthogonalityConfig
from hf_ssl_or.orthogonality.regularizer import OrthogonalityRegularizer
from hf_ssl_or.recipe import recipe_from_dict
from hf_ssl_or.run import build_trainer
from hf_ssl_or.runs.reader import read_metrics
from hf_ssl_or.training.checkpoint import CheckpointStore
from hf_ssl_or.training.description import first_difference, identity
from hf_ssl_or.training.optim import learning_rate
from hf_ssl_or.training.trainer import SSLTrainer


def tree(**training: object) -> dict:
    return {
        "data": {"dataset": "shapes", "shapes_train": 48, "shapes_test": 16},
        "encoder": {"name": "resnet18", "stem": "small", "channels": [8, 8, 8, 8]},
        "method": {"name": "barlow_twins", "projector_dim": 32, "projector_hidden": 32},
        "orthogonality": {"penalty": "so", "weight": 1e-4},
        "training": {
            **{
                "batch_size": 16,
                "epochs": 2,
                "log_every": 1,
                "monitor_every": 1,
                "monitor_images": 32,
                "device": "cpu",
            },
            **{"optimizer": {"name": "sgd", "lr": 0.05}},
            **training,
        },
    }


def make(folder: Path, recipe: dict | None = None, *, labeled: bool = True) -> SSLTrainer:
    resolved = recipe_from_dict(recipe or tree())
    images = load_images(resolved.data, "train")
    test = load_images(resolved.data, "test", like=images.preprocessing) if labeled else None
    return build_trainer(resolved, folder, images, labeled=(images, test) if test is not None else None)


def test_a_run_leaves_metrics_spectra_and_checkpoints(tmp_path: Path):
    trainer = make(tmp_path)
    before = {name: value.clone() for name, value in trainer.encoder.named_parameters()}
    trainer.train()
    assert any(not before[name].equal(value) for name, value in trainer.encoder.named_parameters())
    lines = read_metrics(tmp_path / "metrics.jsonl").lines
    steps = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in steps] == list(range(6))
    for name in ("loss", "invariance", "redundancy", "penalty", "lr", "images_per_second", "data_wait_percent"):
        assert np.isfinite(steps[0][name]), name
    looks = [line for line in lines if line["kind"] == "monitor"]
    assert [line["step"] for line in looks] == [2, 5]
    assert {"rankme", "effective_rank", "orthogonality_error", "knn"} <= looks[0].keys()
    with np.load(tmp_path / "spectra" / "step-6.npz") as spectra:
        assert "representation" in spectra and len(spectra) >= 5, "the representation and the last conv of four stages"
    assert CheckpointStore(tmp_path).steps()[-1] == 6


def test_label_free_runs_need_no_labels(tmp_path: Path):
    make(tmp_path, labeled=False).train()
    looks = [line for line in read_metrics(tmp_path / "metrics.jsonl").lines if line["kind"] == "monitor"]
    assert "rankme" in looks[0] and "knn" not in looks[0]
    with pytest.raises(InputError, match="keep_best: knn needs labeled"):
        make(tmp_path / "other", tree(keep_best="knn"), labeled=False)


def test_checkpoints_are_not_chosen_on_test_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The leak is planted: any look at the test images fails, and the run ends all the same."""
    trainer = make(tmp_path, tree(epochs=2, keep_best="knn"))
    _, test = trainer.labeled
    for name in ("square_batches", "clean", "subset", "sample"):
        monkeypatch.setattr(test, name, lambda *_, **__: pytest.fail("saw the test images"))
    trainer.train()
    assert CheckpointStore(tmp_path).best()["name"] == "knn"
    with pytest.raises(pytest.fail.Exception, match="saw the test images"):
        trainer.evaluate()


def test_the_best_checkpoint_without_labels_is_kept(tmp_path: Path):
    make(tmp_path, tree(epochs=4, keep_last=1, keep_best="rankme"), labeled=False).train()
    looks = [line for line in read_metrics(tmp_path / "metrics.jsonl").lines if line["kind"] == "monitor"]
    best = max(looks, key=lambda line: line["rankme"])
    store = CheckpointStore(tmp_path)
    assert store.best()["step"] == best["step"] + 1
    assert set(store.steps()) == {best["step"] + 1, 12}


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_last_good_checkpoint(tmp_path: Path):
    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 3:
                control.should_save = False
                with torch.no_grad():
                    next(model.encoder.parameters()).fill_(float("nan"))

    trainer = make(tmp_path, tree(epochs=3, save_every=2, monitor_every=0))
    trainer.add_callback(Poison)
    with pytest.raises(NonFiniteLossError, match="step 4; .*no checkpoint was saved yet"):
        trainer.train()
    trainer = make(tmp_path / "later", tree(epochs=2, save_steps=2, monitor_every=0))
    trainer.add_callback(Poison)
    with pytest.raises(NonFiniteLossError, match="step [34]; .*last good checkpoint: .*step-2"):
        trainer.train()
    trainer = make(tmp_path / "later", tree(epochs=2, save_steps=2))
    with pytest.raises(InputError, match="holds a run; train\\(resume_from_checkpoint=True\\) continues it"):
        trainer.train()
    assert CheckpointStore(tmp_path / "later").steps() == [2], "nothing was overwritten"


def test_the_penalty_acts_on_the_encoder_alone_and_its_share_does_not_depend_on_accumulation(tmp_path: Path):
    strong = tree(max_steps=2)
    strong["orthogonality"] = {"penalty": "so", "weight": 0.1}
    plain = tree(max_steps=2)
    plain["orthogonality"] = {"penalty": "none"}
    errors = {}
    for name, recipe in (("strong", strong), ("none", plain)):
        trainer = make(tmp_path / name, recipe)
        trainer.train()
        reg = OrthogonalityRegularizer(trainer.encoder, OrthogonalityConfig(penalty="so", weight=1))
        errors[name] = sum(reg.errors().values())
    assert errors["strong"] < 0.95 * errors["none"]


STRENGTH = {"penalty": "so", "target": "scaled", "strength": 1.0}


def test_the_step_of_a_strength_follows_the_learning_rate_and_ignores_skipped_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = tree(optimizer={"name": "sgd", "lr": 0.05, "warmup_epochs": 1})
    recipe["orthogonality"] = STRENGTH
    trainer = make(tmp_path, recipe)
    wanted = copy.deepcopy(trainer.encoder)
    monkeypatch.setattr(trainer.wrapped_optimizer, "step", lambda: None)  # as a loss scaler that overflows does
    trainer.train()
    reg = OrthogonalityRegularizer(wanted, OrthogonalityConfig(**STRENGTH))
    for step in range(6):
        rate = learning_rate(step, 6, 3, trainer.args.optimizer)
        total = sum(learning_rate(other, 6, 3, trainer.args.optimizer) for other in range(6))
        reg.set_progress(step, 6)
        reg.follow(lambda other, step=step, rate=rate, total=total: rate if other == step else (total - rate) / 5)
        reg.step()
    for (name, got), p in zip(trainer.encoder.named_parameters(), wanted.named_parameters(), strict=True):
        torch.testing.assert_close(got, p[1], rtol=1e-5, atol=1e-6, msg=name)
    lines = [line["penalty"] for line in read_metrics(tmp_path / "metrics.jsonl").lines if line["kind"] == "train"]
    assert len(lines) == 6 and 0 < lines[-1] < lines[0]


@pytest.mark.parametrize("penalty", ["so", "srip"])
def test_a_run_with_a_strength_resumes_bitwise(tmp_path: Path, penalty: str):
    recipe = tree(monitor_every=0, save_steps=3)
    recipe["orthogonality"] = {**STRENGTH, "penalty": penalty}
    ends = []
    for folder in ("whole", "resumed"):
        trainer = make(tmp_path / folder, recipe)
        trainer.train()
        if folder == "resumed":
            shutil.rmtree(tmp_path / folder / "checkpoints" / "step-6")
            trainer = make(tmp_path / folder, recipe)
            assert trainer.train(resume_from_checkpoint=True).global_step == 6
        ends.append(trainer.method.state_dict() | trainer.regularizer.state_dict())
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_checkpoints_of_runs_that_knew_no_target_resume(tmp_path: Path):
    make(tmp_path, tree(monitor_every=0, save_steps=3)).train()
    _, state = CheckpointStore(tmp_path).load(tmp_path / "checkpoints" / "step-3")
    for key in ("strength", "target", "band"):
        state["recipe"]["orthogonality"].pop(key, None)
    trainer = make(tmp_path / "other", tree(monitor_every=0, save_steps=3))
    assert first_difference(state["recipe"], identity(trainer.recipe)) is None
    scaled = tree(monitor_every=0, save_steps=3)
    scaled["orthogonality"] |= {"target": "scaled"}
    found = first_difference(state["recipe"], identity(make(tmp_path / "scaled", scaled).recipe))
    assert found == "orthogonality.target was None, is 'scaled'"


def test_trackers_get_the_numbers(tmp_path: Path):
    make(tmp_path, tree(max_steps=1, trackers=["tensorboard"])).train()
    assert list(tmp_path.rglob("events.out.tfevents*"))


def test_a_run_folder_in_use_is_refused(tmp_path: Path):
    from hf_ssl_or.training.lock import RunLock

    with RunLock(tmp_path), pytest.raises(InputError, match="in use"):
        make(tmp_path).train()


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path):
    make(tmp_path, tree(save_steps=3)).train()
    newest = tmp_path / "checkpoints" / "step-6" / "method.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    trainer = make(tmp_path, tree(save_steps=3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert trainer._resume(True) == (3, False)
    assert any("method.safetensors" in str(warning.message) for warning in caught)


def test_first_difference_names_the_key():
    assert first_difference({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}) == "a.c was 2, is 3"
    assert first_difference({"a": 1}, json.loads('{"a": 1}')) is None
    assert flatten({"a": {"b": 1, "c": [1]}}) == {"a.b": 1, "a.c": "[1]"}


def test_resuming_with_other_images_is_said(tmp_path: Path):
    make(tmp_path, tree(max_steps=1)).train()
    again = make(tmp_path, tree(max_steps=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again.train(resume_from_checkpoint=True)
    again.images = again.images.subset(np.arange(48)[::-1].copy())
    with pytest.warns(UserWarning, match="shapes: other images than those that .*step-1 was trained on"):
        again.train(resume_from_checkpoint=True)
