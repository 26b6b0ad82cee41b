"""Fine-tuning beats chance, keeps what it was given, and its parts follow their formulas."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from accelerate import Accelerator
from PIL import Image
from processes import run_all
from test_features import Encoder, image_set
from transformers import (
    AutoModelForImageClassification,
    Dinov2Config,
    Dinov2Model,
    pipeline,
)

from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.data.image_dataset import ImageSet
from hf_ssl_or.data.loading import load_images
from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation.protocols.fine_tune import (
    FINE_TUNE_PROTOCOLS,
    FineTuneArguments,
    _Classifier,
    fine_tune,
    parameter_groups,
)
from hf_ssl_or.models.adapters import adapt_encoder
from hf_ssl_or.models.auto import create_encoder
from hf_ssl_or.models.configuration_ssl import OrthogonalityConfig, SSLResNetConfig, SSLViTConfig
from hf_ssl_or.models.image_conversion import Preprocessing
from hf_ssl_or.models.image_processing_ssl import build_image_processor
from hf_ssl_or.structures import ViewSpec

KINDS = ["disk", "triangle", "crescent"]
HASHES = {"fine-tune": "715fb7dce5c6", "fine-tune-layer-decay": "fd1508100c0a"}
GENTLE = ViewSpec(crop_scale=(0.6, 1.0), jitter=0, grayscale=0)


def slim_encoder():
    torch.manual_seed(0)
    return create_encoder(
        "resnet18", channels=[16, 32, 32, 32], image_size=32, layers=[1, 1, 1, 1], zero_init_last=False
    )


def shapes(split: str, n: int) -> ImageSet:
    images = load_images(DataArguments(dataset="shapes", shapes_train=1500, shapes_test=500, cache="none"), split)
    numbers = [images.class_names.index(kind) for kind in KINDS]
    chosen = images.subset(torch.isin(images.labels, torch.tensor(numbers)).nonzero()[:n, 0])
    labels = torch.tensor([numbers.index(label) for label in chosen.labels.tolist()])
    return dataclasses.replace(chosen, labels=labels, class_names=KINDS)


def quick(**changes) -> FineTuneArguments:
    return FineTuneArguments(**({"epochs": 2, "batch_size": 6, "learning_rate": 1e-3} | changes))


@pytest.mark.slow
def test_it_learns_and_what_it_saves_runs_in_a_pipeline(tmp_path) -> None:
    train, test, encoder = shapes("train", 400), shapes("test", 150), slim_encoder()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    arguments = FineTuneArguments(epochs=8, batch_size=40, learning_rate=1e-2, view=GENTLE)
    metrics = fine_tune(encoder, train, test, arguments, save_to=tmp_path)
    assert metrics["top1"] > 60 and metrics["top5"] == 100  # chance is 33
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert encoder.training and encoder.config.num_labels == 2
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert model.config.id2label == dict(enumerate(KINDS)) and model.config.label2id["crescent"] == 2
    classify = pipeline("image-classification", model=str(tmp_path))
    answers = classify([Image.fromarray(test.job.source.read(int(row))) for row in test.job.rows])
    correct = [answer[0]["label"] == KINDS[label] for answer, label in zip(answers, test.labels, strict=True)]
    assert 100 * np.mean(correct) == pytest.approx(metrics["top1"])


def test_the_seed_decides_and_every_test_image_counts() -> None:
    train, test = image_set(20), image_set(23)
    runs = [fine_tune(slim_encoder(), train, test, quick(), seed=seed) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] and runs[0]["train_loss"] != runs[2]["train_loss"]
    assert runs[0]["top1"] * 23 / 100 == pytest.approx(round(runs[0]["top1"] * 23 / 100))


def test_a_folder_brings_its_image_format_and_gets_a_new_head(tmp_path) -> None:
    encoder, train, test = slim_encoder(), image_set(20), image_set(8)
    encoder.save_pretrained(tmp_path)
    how = Preprocessing(image_size=16, crop_pct=0.9, interpolation="bicubic", mean=(0.5,) * 3, std=(0.25,) * 3)
    build_image_processor(how).save_pretrained(tmp_path)
    told = fine_tune(encoder, train.with_preprocessing(how), test.with_preprocessing(how), quick())
    assert fine_tune(tmp_path, train, test, quick()) == told != fine_tune(encoder, train, test, quick())
    fine_tune(tmp_path, train, test, quick(epochs=1), save_to=tmp_path / "tuned")
    two = dataclasses.replace(train, labels=train.labels % 2, class_names=None)
    fine_tune(tmp_path / "tuned", two, two, quick(epochs=1), save_to=tmp_path / "again")
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "again").config.id2label == {0: "0", 1: "1"}


def test_the_accelerator_of_a_run_goes_on_working() -> None:
    """Trainer resets accelerate's shared state; a pretraining that ends with this protocol still holds its own."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    fine_tune(slim_encoder(), image_set(12), image_set(6), quick(epochs=1))
    accelerator.wait_for_everyone()
    assert accelerator.is_main_process and accelerator.num_processes == 1 and accelerator.device.type == "cpu"
    layer = accelerator.prepare(torch.nn.Linear(2, 2))
    accelerator.backward(layer(torch.ones(1, 2)).sum())
    accelerator.end_training()


def tune(folder: Path, processes: int) -> None:
    """What torchrun starts: Trainer makes the process group from the environment."""
    rank = int(os.environ.get("RANK", "0"))
    where = str(folder / str(processes)) if rank == 0 else None
    metrics = fine_tune(slim_encoder(), image_set(26), image_set(11), quick(batch_size=8), save_to=where)
    (folder / f"{processes}-{rank}.json").write_text(json.dumps(metrics))
    if processes > 1:
        with pytest.raises(InputError, match="batch_size: 7 images cannot be shared out to 2 processes"):
            fine_tune(slim_encoder(), image_set(26), image_set(11), quick(batch_size=7))
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tmp_path) -> None:
    for processes in (1, 2):
        run_all(tune, tmp_path, processes, log=tmp_path / "log", count=processes)
    alone, first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert first == second and first == pytest.approx(alone, rel=1e-5)
    states = [AutoModelForImageClassification.from_pretrained(tmp_path / str(n)).state_dict() for n in (1, 2)]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_each_epoch_augments_anew_and_test_images_are_clean(monkeypatch) -> None:
    seen, views = [], ImageSet.views

    def watched(images, plans, device):
        for plan in plans:
            seen.append((plan.groups[0].epoch, *plan.index_B))
            yield from views(images, [plan], device)

    monkeypatch.setattr(ImageSet, "views", watched)
    fine_tune(slim_encoder(), image_set(18), image_set(9), quick(epochs=3))
    assert [epoch for epoch, *_ in seen] == [0] * 3 + [1] * 3 + [2] * 3
    for epoch in range(3):
        assert sorted(i for e, *rows in seen for i in rows if e == epoch) == list(range(18))


@pytest.mark.parametrize(
    ("config", "blocks", "position"),
    [
        (SSLResNetConfig(channels=[8] * 4, num_labels=3), 8, None),
        (SSLResNetConfig(architecture="wide_resnet28_2", num_labels=3), 12, None),
        (SSLViTConfig(architecture="vit_tiny", image_size=32, patch_size=8, model_args={"depth": 3}), 3, "pos_embed"),
    ],
)
def test_layer_decay_by_hand(config, blocks: int, position: str | None) -> None:
    """Depth is read off the names here; the head has the full rate, the stem decay^(blocks + 1) of it."""
    model = AutoModelForImageClassification.from_config(config)
    groups = parameter_groups(model, 0.1, 0.05, 0.5)
    group_of = {id(p): group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters())) == len(group_of)
    layers = {
        "classifier": blocks + 1,
        "stem" if "wide" in config.architecture else "patch_embed" if position else "timm_model.conv1": 0,
        "layer1.0": 1,
        "layer2.1": 4,
        "layer4.1": 8,
        "stages.0.blocks.0": 1,
        "stages.2.blocks.3": 12,
        "blocks.0.": 1,
        "blocks.2.": 3,
        "timm_model.norm.": blocks,
    }
    checked = set()
    for name, p in model.named_parameters():
        for part, layer in layers.items():
            if part in name and not (part.startswith("blocks") and "stages" in name):
                assert group_of[id(p)]["lr"] == pytest.approx(0.1 * 0.5 ** (blocks + 1 - layer)), name
                checked.add(layer)
        free = p.ndim == 1 or any(part in name for part in ("pos_embed", "cls_token"))
        assert group_of[id(p)]["weight_decay"] == (0.0 if free else 0.05), name
    assert {0, 1, blocks, blocks + 1} <= checked


def test_without_decay_all_layers_learn_alike() -> None:
    model = AutoModelForImageClassification.from_config(SSLResNetConfig(channels=[8] * 4))
    assert {group["lr"] for group in parameter_groups(model, 0.1, 0.05, 1)} == {0.1}


def test_any_encoder_is_fine_tuned() -> None:
    """A module with `pooler_output`, a model of transformers, and a timm net, whose layers are known, as adapted."""
    config = Dinov2Config(image_size=12, patch_size=6, hidden_size=12, num_hidden_layers=2, num_attention_heads=2)
    net = adapt_encoder(timm.create_model("resnet18", channels=[8] * 4), image_size=32)
    for encoder, decay in ((Encoder(), 1.0), (adapt_encoder(Dinov2Model(config)), 1.0), (net, 0.5)):
        before = {name: value.clone() for name, value in encoder.state_dict().items()}
        encoder.requires_grad_(False)
        metrics = fine_tune(encoder, image_set(6), image_set(9), quick(epochs=1, layer_decay=decay))
        assert list(metrics) == ["top1", "top5", "train_loss"] and metrics["top5"] == 100
        assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


class Wrapped(torch.nn.Module):
    """An encoder of this package that does not show what it is."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = slim_encoder()

    def forward(self, x):
        return self.inner(x)


def test_another_encoder_is_trained_like_one_of_this_package() -> None:
    data = image_set(20), image_set(23), quick(layer_decay=0.7)
    assert fine_tune(Wrapped(), *data) == pytest.approx(fine_tune(slim_encoder(), *data), rel=1e-6)


def test_parameters_of_another_net_are_grouped_by_kind() -> None:
    model = _Classifier(Dinov2Model(Dinov2Config(hidden_size=12, num_hidden_layers=1, num_attention_heads=2)), 12, 3)
    decays = {id(p): group["weight_decay"] for group in parameter_groups(model, 0.1, 0.05, 1) for p in group["params"]}
    assert len(decays) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        assert decays[id(p)] == (0.05 if p.ndim > 1 and name.endswith("weight") else 0.0), name
    assert not decays[id(model.encoder.embeddings.position_embeddings)]


def test_the_environment_does_not_decide(monkeypatch) -> None:
    """Trainer would take the precision of the launcher; what else a launcher asks for is refused."""
    run = functools.partial(fine_tune, slim_encoder(), image_set(12), image_set(6), quick(epochs=1))
    expected = run()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert run() == expected
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="ACCELERATE_USE_FSDP=true: the recipe decides, not the environment"):
        run()


def test_the_penalty_acts(tmp_path) -> None:
    errors = []
    for penalty in (None, OrthogonalityConfig(penalty="so", weight=1e-2)):
        fine_tune(slim_encoder(), image_set(24), image_set(8), quick(orthogonality=penalty), save_to=tmp_path)
        weight = AutoModelForImageClassification.from_pretrained(tmp_path).encoder.timm_model.layer4[0].conv1.weight
        matrix = weight.detach().flatten(1).double()
        errors.append(float((matrix @ matrix.T - torch.eye(len(matrix), dtype=torch.float64)).square().sum()))
    assert errors[1] < 0.9 * errors[0]


def test_the_protocols_are_pinned_and_run() -> None:
    assert {protocol.name: protocol.hash for protocol in FINE_TUNE_PROTOCOLS} == HASHES
    protocol = FINE_TUNE_PROTOCOLS[0]
    assert protocol.seeded and protocol.primary_metric == "top1"
    other = dataclasses.replace(protocol, arguments=quick())
    assert other.hash != protocol.hash and other.settings()["arguments"]["epochs"] == 2
    assert set(other.run_on_images(slim_encoder(), image_set(12), image_set(6))) == {"top1", "top5", "train_loss"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "fine_tune.epochs: at least 1, not 0"),
        ({"learning_rate": 0.0}, "fine_tune.learning_rate: more than 0"),
        ({"layer_decay": 1.5}, "fine_tune.layer_decay: at most 1, not 1.5"),
        ({"warmup": 1}, "fine_tune.warmup: a share from 0 to less than 1"),
    ],
)
def test_bad_arguments_are_refused(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        FineTuneArguments(**change)


def test_bad_input_is_refused(tmp_path) -> None:
    with pytest.raises(InputError, match="fine-tune: labels are needed"):
        fine_tune(slim_encoder(), image_set(8, labels=False), image_set(8))
    with pytest.raises(InputError, match="nothing: cannot be loaded as an encoder"):
        fine_tune(tmp_path / "nothing", image_set(8), image_set(8))
    with pytest.raises(InputError, match="a SSLResNetForImageClassification returns no pooler_output"):
        fine_tune(AutoModelForImageClassification.from_config(SSLResNetConfig()), image_set(8), image_set(8))
    with pytest.raises(InputError, match="save_to: a Encoder has no classifier that could be saved"):
        fine_tune(Encoder(), image_set(8), image_set(8), save_to=tmp_path)
    with pytest.raises(InputError, match="layer_decay: only timm's nets have numbered layers; leave it 1"):
        fine_tune(Encoder(), image_set(8), image_set(8), quick(layer_decay=0.5))
    with pytest.raises(InputError, match="the training diverged; lower learning_rate, 1e"):
        fine_tune(slim_encoder(), image_set(24), image_set(8), quick(learning_rate=1e30))
