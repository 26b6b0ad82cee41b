"""Sizes of views and weight decay that change over a run: exact under resume and on any number of processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes import run_all
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback
from world_worker import RESNET, VIT, recipe_of, without_kinks

from hf_ssl_or import SSLTrainer, SSLTrainingArguments
from hf_ssl_or.data.loading import load_images
from hf_ssl_or.data.pixel_kind import default_bound
from hf_ssl_or.errors import InputError
from hf_ssl_or.methods import BYOL, DINO, SimCLR
from hf_ssl_or.models.auto import create_encoder
from hf_ssl_or.recipe import recipe_from_dict
from hf_ssl_or.run import build_trainer, load_training_images
from hf_ssl_or.runs.reader import read_metrics
from hf_ssl_or.structures import ViewSpec
from hf_ssl_or.training.fsdp import gather_groups
from hf_ssl_or.training.optim import weight_decay

STEPS = 12  # epochs of 3 steps; views of 8 pixels in two of them
SIZES = [[0, 8], [0.5, 16]]
ADAMW = {"name": "adamw", "lr": 0.003, "eps": 1e-3, "weight_decay": 0.04, "weight_decay_end": 0.4}


def tree(**training: object) -> dict:
    return {
        "data": {"dataset": "shapes", "image_size": 16, "shapes_train": 48, "shapes_test": 0},
        "encoder": RESNET,
        "method": {"name": "byol", "projector_hidden": 32, "projector_dim": 16, "predictor_hidden": 32},
        "views": {"size_schedule": SIZES, "specs": [{"blur": 0.5}]},
        "training": {
            "batch_size": 16,
            "epochs": 4,
            "log_every": 1,
            "monitor_every": 0,
            "save_steps": 1,
            "keep_last": None,
            "device": "cpu",
            "optimizer": ADAMW,
            **training,
        },
    }


def make(folder: Path, **training: object) -> SSLTrainer:
    recipe = recipe_from_dict(tree(**training))
    return build_trainer(recipe, folder, load_training_images(recipe))


class Killed(RuntimeError):
    pass


class Kill(TrainerCallback):
    """Ends a run in the middle of a step, after those before have been saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("schedules") / "whole"
    make(folder).train()
    return folder


def assert_same_end(folder: Path, whole: Path) -> None:
    for group in ("method", "optimizer", "orthogonality"):
        file = f"checkpoints/step-{STEPS}/{group}.safetensors"
        want, got = load_file(whole / file), load_file(folder / file)
        assert want.keys() == got.keys()
        assert all(want[name].equal(got[name]) for name in want), file


@pytest.mark.parametrize("step", [5, 6, 8], ids=["before", "at", "within an epoch after"])
def test_a_run_killed_around_a_boundary_and_resumed_ends_bitwise_as_the_uninterrupted_one(
    step: int, whole: Path, tmp_path: Path
):
    killed = make(tmp_path)
    killed.add_callback(Kill(step))
    with pytest.raises(Killed):
        killed.train()
    resumed = make(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.log_history[0]["step"] == 1 and resumed.state.global_step == STEPS
    assert_same_end(tmp_path, whole)


def test_what_changes_is_logged(whole: Path):
    lines = [line for line in read_metrics(whole / "metrics.jsonl").lines if line["kind"] == "train"]
    assert [line["view_size"] for line in lines] == [8] * 6 + [16] * 6
    settings = recipe_from_dict(tree()).training.optimizer
    assert [line["weight_decay"] for line in lines] == [weight_decay(step, STEPS, settings) for step in range(STEPS)]


def test_what_does_not_change_is_not_logged_and_another_schedule_is_another_run(whole: Path, tmp_path: Path):
    plain = recipe_from_dict(tree(max_steps=1, optimizer={"name": "sgd"}))
    plain.views.size_schedule = None
    build_trainer(plain, tmp_path, load_training_images(plain)).train()
    (line,) = (line for line in read_metrics(tmp_path / "metrics.jsonl").lines if line["kind"] == "train")
    assert not {"view_size", "weight_decay"} & line.keys()
    other = recipe_from_dict({**tree(), "views": {**tree()["views"], "size_schedule": [[0, 8], [0.75, 16]]}})
    with pytest.raises(InputError, match=r"views\.size_schedule was \[\[0, 8\], \[0\.5, 16\]\], is"):
        build_trainer(other, whole, load_training_images(other)).train(resume_from_checkpoint=True)
    with pytest.raises(InputError, match=r"training\.optimizer\.weight_decay_end was 0\.4, is None"):
        make(whole, optimizer={**ADAMW, "weight_decay_end": None}).train(resume_from_checkpoint=True)


# -- any number of processes ------------------------------------------------------------------------------------------


def train_both(folder: Path, fsdp: bool, parts: int) -> None:
    """Is a target: a ResNet, and a ViT with local views, over two epochs of two steps each, in float64."""
    torch.set_num_threads(1)
    for name, encoder in (("dino", VIT), ("byol", RESNET)):
        one = recipe_of(name, parts, "global", 0.02, steps=4)
        one["data"]["shapes_train"] = 32
        one["encoder"], one["views"]["size_schedule"] = encoder, SIZES
        one["training"] |= {"fsdp": fsdp, "optimizer": ADAMW}
        recipe = recipe_from_dict(one)
        images = load_images(recipe.data, "train")
        torch.set_default_dtype(torch.float64)
        try:
            trainer = build_trainer(recipe, folder / "run", images)
        finally:
            torch.set_default_dtype(torch.float32)
        if not fsdp:
            without_kinks(trainer.method)
        losses, sizes = [], []
        for batch in trainer.loader.batches(0, 4):
            sizes.append([x.shape[-1] for x in (batch.views_VBCHW, batch.local_views_VBCHW) if x is not None])
            batch.views_VBCHW = batch.views_VBCHW.double()
            if batch.local_views_VBCHW is not None:
                batch.local_views_VBCHW = batch.local_views_VBCHW.double()
            losses.append(trainer.training_step(batch).loss.detach())
        state = gather_groups({"": trainer.trained.state_dict()}, keep=True)[""]
        result = {"losses": torch.stack(losses), "sizes": torch.tensor(sizes), **state}
        if trainer.accelerator.is_main_process:
            save_file({key: x.contiguous().clone() for key, x in result.items()}, folder / f"{name}.safetensors")


def test_two_processes_in_parts_and_sharded_do_as_one_across_a_boundary(tmp_path: Path):
    cache = {"HF_SSL_OR_CACHE": str(tmp_path / "cache")}
    for setting, count, fsdp, parts in (("one", 1, False, 1), ("parts", 2, False, 2), ("sharded", 2, True, 1)):
        (tmp_path / setting).mkdir()
        log = tmp_path / f"{setting}.log"
        run_all(train_both, tmp_path / setting, fsdp, parts, log=log, count=count, environment=cache)
    for name, sizes in (("dino", [[8, 4], [8, 4], [16, 8], [16, 8]]), ("byol", [[8], [8], [16], [16]])):
        want = load_file(tmp_path / "one" / f"{name}.safetensors")
        assert want["sizes"].tolist() == sizes
        for setting in ("parts", "sharded"):
            if (setting, name) == ("sharded", "byol"):
                continue  # its ReLUs could not be replaced before it was sharded
            got = load_file(tmp_path / setting / f"{name}.safetensors")
            assert want.keys() == got.keys()
            for key, wanted in want.items():
                wanted = wanted.double()
                difference = (got[key].double() - wanted).norm() / wanted.norm().clamp(min=1)
                assert difference <= 1e-10, f"{setting}, {name}, {key}: {difference:.1e}"


# -- from Python ------------------------------------------------------------------------------------------------------


def trainer_of(method: object, folder: Path, **more: object) -> SSLTrainer:
    optimizer = more.pop("optimizer", {})
    args = SSLTrainingArguments(output_dir=folder, batch_size=16, epochs=2, monitor_every=0, device="cpu", **optimizer)
    data = {"image_size": 16, "shapes_train": 32, "shapes_test": 0}
    return SSLTrainer(method, args, "shapes", data=data, **more)


def small_resnet() -> nn.Module:
    return create_encoder("resnet18", stem="small", image_size=16, channels=[8, 8, 8, 8])


def small_vit() -> nn.Module:
    return create_encoder("vit_tiny", image_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2)


def test_the_trainer_takes_a_schedule(tmp_path: Path):
    settings = {"projector_hidden": 32, "projector_dim": 16, "prototypes": 16}
    trainer = trainer_of(
        DINO(small_vit(), **settings),
        tmp_path,
        size_schedule=[(0, 8), (0.5, 20)],
        local_views=[ViewSpec(size=8, crop_scale=(0.1, 0.4))],
    )
    assert trainer.recipe["views"]["size_schedule"] == [[0, 8], [0.5, 20]]
    batches = list(trainer.loader.batches(0, 4))
    assert [b.views_VBCHW.shape[-1] for b in batches] == [8, 8, 20, 20]
    assert [b.local_views_VBCHW.shape[-1] for b in batches] == [4, 4, 12, 12]  # 10 pixels are two and a half patches
    assert trainer.images.job.bound == default_bound(20, trainer.views), "stored as large as the largest views need"
    trainer.train()


class OneSize(nn.Module):
    """Takes images of 16 pixels alone."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 16 * 16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.flatten(1))


@pytest.mark.parametrize(
    ("encoder", "more", "message"),
    [
        (small_vit, {}, "6 is no multiple of the side of the encoder's patches, 4"),
        (OneSize, {}, r"the encoder takes no views of 6 x 6 pixels \(.*\); give other sizes"),
        (small_resnet, {"views": [lambda x: x[..., :16, :16]] * 2}, "a callable makes views of its own size"),
        (small_resnet, {"size_schedule": [(0, 16), (2, 32)]}, r"a share of the run lies in \[0, 1\), not 2"),
    ],
)
def test_sizes_that_do_not_fit_are_one_line(encoder: type, more: dict, message: str, tmp_path: Path):
    method = SimCLR(encoder(), projector_hidden=16, projector_dim=8)
    with pytest.raises(InputError, match=rf"^views\.size_schedule: {message}") as caught:
        trainer_of(method, tmp_path, **{"size_schedule": [(0, 6), (0.5, 16)], **more})
    assert "\n" not in str(caught.value)


def test_the_decay_of_an_optimizer_of_ones_own_is_ones_own(tmp_path: Path):
    method = BYOL(small_resnet(), projector_hidden=16, projector_dim=8, predictor_hidden=16)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    own = {"optimizer": recipe_from_dict(tree()).training.optimizer}
    with pytest.raises(InputError, match=r"^training\.optimizer\.weight_decay_end: .*leave it at null"):
        trainer_of(method, tmp_path, optimizers=(optimizer, None), optimizer=own)
