"""The library as a notebook uses it: own encoder, own data, own callback, own optimizer; then AutoModel without us."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    Dinov2Config,
    Dinov2Model,
    EarlyStoppingCallback,
    PrinterCallback,
    TrainerCallback,
)
from transformers.integrations import TensorBoardCallback

from hf_ssl_or import OrthogonalityConfig, SSLTrainer, SSLTrainingArguments, ViewSpec, pretrain
from hf_ssl_or.errors import InputError
from hf_ssl_or.methods import BYOL, VICReg
from hf_ssl_or.training.optim import OptimizerArguments

IMAGES = 200


def pictures(count: int = IMAGES) -> datasets.Dataset:
    """Gray stripes of four directions, with noise: four classes."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:40, :36]
    waves = [np.sin(x), np.sin(y), np.sin(x + y), np.sin(x - y)]
    rows = [
        (waves[i % 4] * 80 + 128 + rng.normal(0, 20, (40, 36))).clip(0, 255).astype(np.uint8) for i in range(count)
    ]
    columns = {
        "picture": [Image.fromarray(np.repeat(row[..., None], 3, axis=2)) for row in rows],
        "kind": [i % 4 for i in range(count)],
    }
    kind = datasets.ClassLabel(names=["across", "down", "rising", "falling"])
    return datasets.Dataset.from_dict(columns, features=datasets.Features(picture=datasets.Image(), kind=kind))


def dinov2(seed: int = 0) -> Dinov2Model:
    torch.manual_seed(seed)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8, intermediate_size=64
    )
    return Dinov2Model(config)


class Notes(TrainerCallback):
    """Written against transformers alone."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.losses: list[float] = []
        self.measures: list[float] = []

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        assert sum(parameter.numel() for parameter in model.parameters()) > 0
        assert isinstance(optimizer, torch.optim.Optimizer) and args.num_train_epochs >= 1
        self.events.append("begin")

    def on_step_end(self, args, state, control, **kwargs):
        self.events.append("step")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.measures.append(metrics["eval_rankme"])

    def on_epoch_end(self, args, state, control, **kwargs):
        self.events.append("epoch")

    def on_save(self, args, state, control, **kwargs):
        self.events.append("save")


def trainer_of(folder: Path, *callbacks: object, max_steps: int | None = None, **more: object) -> SSLTrainer:
    torch.manual_seed(1)
    method = BYOL(dinov2(), projector_dim=16, projector_hidden=32)
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    optimizer = torch.optim.RMSprop(trained, lr=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=4, gamma=0.5)
    table = pictures()
    return SSLTrainer(
        model=method,
        args=SSLTrainingArguments(
            output_dir=folder,
            epochs=2,
            batch_size=40,
            log_every=1,
            monitor_every=1,
            save_every=1,
            device="cpu",
            **more,
        ),
        train_dataset=table,
        eval_dataset=table.train_test_split(0.25, seed=0),
        views=3,
        orthogonality=OrthogonalityConfig(penalty="so", weight=1e-3),
        evaluators=["knn"],
        callbacks=callbacks,
        optimizers=(optimizer, scheduler),
    )


LOAD = """
import sys
sys.modules["hf_ssl_or"] = None  # cannot be imported
import torch
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModel
model = AutoModel.from_pretrained(sys.argv[1]).eval()
assert type(model).__module__.startswith("transformers.models.dinov2"), type(model)
processor = AutoImageProcessor.from_pretrained(sys.argv[1])
torch.manual_seed(3)
pixels = torch.randn(4, 3, 32, 32)
with torch.no_grad():
    save_file({"pixels": pixels, "features": model(pixels).pooler_output.contiguous()}, sys.argv[2])
assert model.config.pretraining["method"] == "byol" and model.config.orthogonality["penalty"] == "so"
"""


def test_own_encoder_data_callback_and_optimizer(tmp_path: Path) -> None:
    notes = Notes()
    trainer = trainer_of(tmp_path / "run", notes)
    before = trainer.regularizer.errors()
    output = trainer.train()
    assert output.global_step == 10 and len(notes.losses) == 10 and notes.events[0] == "begin"
    assert notes.events.count("step") == 10 and notes.events.count("epoch") == 2 and notes.events.count("save") == 2
    assert len(notes.measures) == 2 and trainer.log_history[-1]["eval_rankme"] == notes.measures[-1]
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 0.5**2), "the scheduler that was given"
    after = trainer.regularizer.errors()
    assert before.keys() == after.keys() and all(np.isfinite(float(error)) for error in after.values())

    metrics = trainer.evaluate()
    assert 0 <= metrics["eval_knn_top1_k20"] <= 100 and metrics["eval_rankme"] > 1
    folder = trainer.save_model(tmp_path / "encoder")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"recipe.yaml", "metrics.jsonl", "results.json", "encoder", "checkpoints", "spectra"} <= names

    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder), str(tmp_path / "out.safetensors")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "out.safetensors")
    trainer.encoder.eval()
    with torch.no_grad():
        expected = trainer.encoder(pixel_values=found["pixels"]).pooler_output
    assert torch.equal(found["features"], expected)


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 3
        control.should_save = control.should_training_stop


def test_resume_equals_the_uninterrupted_run_bitwise(tmp_path: Path) -> None:
    full = trainer_of(tmp_path / "full")
    full.train()
    trainer_of(tmp_path / "resumed", save_steps=3, keep_last=None).train()
    for name in ("step-6", "step-9", "step-10"):
        for file in (tmp_path / "resumed" / "checkpoints" / name).iterdir():
            file.unlink()
        (tmp_path / "resumed" / "checkpoints" / name).rmdir()
    again = trainer_of(tmp_path / "resumed", save_steps=3, keep_last=None)
    again.train(resume_from_checkpoint=True)
    for name, weight in full.method.state_dict().items():
        assert torch.equal(weight, again.method.state_dict()[name]), name
    assert [line["step"] for line in again.log_history] == [line["step"] for line in full.log_history]
    from_path = trainer_of(tmp_path / "resumed", save_steps=3, keep_last=None)
    from_path.train(resume_from_checkpoint=tmp_path / "resumed" / "checkpoints" / "step-6")
    assert torch.equal(
        full.encoder.state_dict()["net.layernorm.weight"], from_path.encoder.state_dict()["net.layernorm.weight"]
    )


def test_callbacks_of_transformers_run_unchanged(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    stop = EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=1e9)
    trainer = trainer_of(tmp_path / "run", PrinterCallback, TensorBoardCallback, stop, keep_best="rankme")
    output = trainer.train()
    assert output.global_step == 10 and stop.early_stopping_patience_counter == 1
    assert "'loss'" in capsys.readouterr().out
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))

    early = trainer_of(tmp_path / "early", Stop)
    assert early.train().global_step == 3 and early.store.steps() == [3]
    assert early.train(resume_from_checkpoint=True).global_step == 3, "a run that a callback ended has ended"
    assert (tmp_path / "early" / "encoder" / "config.json").is_file()


def test_names_instead_of_objects(tmp_path: Path) -> None:
    trainer = SSLTrainer(
        method="vicreg",
        encoder="resnet18",
        args=SSLTrainingArguments(
            output_dir=tmp_path / "run", max_steps=1, batch_size=8, device="cpu", monitor_every=0
        ),
        train_dataset=[np.full((32, 32, 3), i, np.uint8) for i in range(16)],
        data={"image_size": 32},
        views=[ViewSpec(), ViewSpec(flip=0.0)],
    )
    assert isinstance(trainer.model, VICReg) and trainer.train().global_step == 1
    assert trainer.evaluate()["eval_rankme"] >= 1


def test_pretrain_takes_a_path_or_a_mapping(tmp_path: Path) -> None:
    tree = {
        "data": {"dataset": "shapes", "shapes_train": 40, "shapes_test": 40},
        "encoder": {"name": "resnet18", "stem": "small", "channels": [8, 8, 8, 8]},
        "training": {"max_steps": 1, "batch_size": 8, "device": "cpu", "monitor_every": 0},
        "evaluation": {"protocols": ["knn"]},
    }
    results = pretrain(tree, tmp_path / "mapping")
    assert results is not None and results.evaluations[0].protocol == "knn"


def refused(message: str, **changes: object) -> None:
    arguments = {
        "model": None,
        "args": SSLTrainingArguments(max_steps=1, batch_size=8, device="cpu"),
        "train_dataset": [np.zeros((32, 32, 3), np.uint8)] * 8,
        **changes,
    }
    with pytest.raises(InputError, match=message) as caught:
        SSLTrainer(**arguments)
    assert "\n" not in str(caught.value)


def test_bad_input_is_one_clear_line(tmp_path: Path) -> None:
    method, encoder = BYOL(dinov2(), projector_dim=16, projector_hidden=32), dinov2()
    refused("neither of model and method given")
    refused("both of model and method given", model=method, method="byol")
    refused("model has an encoder already", model=method, encoder=encoder)
    refused("model is a Dinov2Model, no method; give model=BYOL", model=encoder)
    refused("method= needs encoder=", method="byol")
    refused("unknown method 'boyl': did you mean 'byol'", method="boyl", encoder=encoder)
    refused("encoder: unknown", method="byol", encoder="resnet_eighteen_and_a_half")
    refused("train_dataset is missing", model=method, train_dataset=None)
    refused("views: at least 1", model=method, views=0)
    refused("views: a number, ViewSpec objects or callables", model=method, views="four")
    refused("callbacks: .* is no transformers.TrainerCallback", model=method, callbacks=[print])
    other = torch.optim.SGD(encoder.parameters(), lr=0.1)
    refused("of the optimizer's .* parameters are not the model's", model=method, optimizers=(other, None))
    refused("a scheduler needs its optimizer", model=method, optimizers=(None, object()))
    refused("orthogonality: unknown key 'penality'", model=method, orthogonality={"penality": "so"})
    with pytest.raises(InputError, match="'num_train_epochs': set training.epochs"):
        SSLTrainingArguments(num_train_epochs=3)
    with pytest.raises(InputError, match="'learning_rate': set training.optimizer.lr"):
        SSLTrainingArguments(learning_rate=0.1)
    with pytest.raises(InputError, match="'per_device_train_batch_size': set training.batch_size"):
        SSLTrainingArguments(per_device_train_batch_size=4)
    with pytest.raises(InputError, match="'learning_rate': set training.optimizer.lr"):
        OptimizerArguments(learning_rate=0.1)
