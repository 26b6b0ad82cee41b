"""Sharded training: weights, gradients and optimizer state in parts, and the result of one process that has them all.

Every case is trained for five steps and saves what came out; runs save checkpoints and continue from those of others.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_all
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from world_worker import RESNET, STEPS, VIT, recipe_of, without_kinks

from hf_ssl_or.data.loading import load_images
from hf_ssl_or.errors import InputError
from hf_ssl_or.recipe import recipe_from_dict
from hf_ssl_or.run import build_method, view_specs
from hf_ssl_or.runs.reader import read_metrics
from hf_ssl_or.training.arguments import SSLTrainingArguments
from hf_ssl_or.training.fsdp import gather_groups
from hf_ssl_or.training.optim import clip_gradients
from hf_ssl_or.training.trainer import SSLTrainer

DTYPES = {"float32": torch.float32, "float64": torch.float64}
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
SGD = {"name": "sgd", "lr": 0.001}
LARS = {"name": "lars", "lr": 0.02, "weight_decay": 0.01}
ADAMW = {"name": "adamw", "lr": 0.001, "eps": 1e-3}  # a larger eps: else the first steps divide rounding by itself
CASES: dict[str, dict[str, Any]] = {
    "byol-resnet-so": {"encoder": RESNET, "penalty": "so", "optimizer": LARS, "gradient_checkpointing": True},
    "byol-vit-srip": {"encoder": VIT, "penalty": "srip", "optimizer": ADAMW, "forward_chunks": 3},
    "dino-resnet-srip": {"encoder": RESNET, "penalty": "srip", "optimizer": SGD},
    "mae-vit-so": {"encoder": VIT, "penalty": "so", "optimizer": SGD},
    "byol-resnet-scaled": {"encoder": RESNET, "penalty": "so", "optimizer": SGD},
}
RUNS = [*((case, "float64") for case in CASES), ("byol-resnet-so", "float32"), ("byol-vit-srip", "float32")]


def build(case: str, fsdp: bool, dtype: torch.dtype, folder: Path, **training: Any) -> SSLTrainer:
    settings = CASES[case] | training
    tree = recipe_of(case.split("-")[0], 1, "global", 0.001)
    tree["encoder"] = settings.pop("encoder")
    form = {"target": "scaled", "strength": 1.0} if case.endswith("scaled") else {"weight": 1e-3}
    tree["orthogonality"] = {"penalty": settings.pop("penalty"), **form}
    tree["training"] |= {**settings, "fsdp": fsdp, "monitor_images": 16}
    recipe = recipe_from_dict(tree)
    images = load_images(recipe.data, "train")
    torch.set_default_dtype(dtype)
    try:
        method = build_method(recipe)
        without_kinks(method)
    finally:
        torch.set_default_dtype(torch.float32)
    views, local_views = view_specs(recipe)
    return SSLTrainer(
        method,
        replace(recipe.training, output_dir=str(folder)),
        images,
        views=views,
        local_views=local_views,
        orthogonality=recipe.orthogonality,
    )


def train(case: str, fsdp: bool, dtype: torch.dtype, folder: Path) -> tuple[dict[str, torch.Tensor], bool]:
    """Returns the losses, the state, the regularizer's view of the weights, and what part this process held."""
    trainer = build(case, fsdp, dtype, folder)
    losses = []
    for batch in trainer.loader.batches(0, STEPS):
        batch.views_VBCHW = batch.views_VBCHW.to(dtype)
        if batch.local_views_VBCHW is not None:
            batch.local_views_VBCHW = batch.local_views_VBCHW.to(dtype)
        losses.append(trainer.training_step(batch).loss.detach())
    groups = gather_groups(trainer._state()[0], keep=True)
    errors = trainer.regularizer.errors()
    penalty = trainer.regularizer.penalty()
    penalty.backward()  # by autograd, through the gathering, into the local parts
    gradients = {f"penalty/{name}": p.grad for name, p in trainer.trained.named_parameters() if p.grad is not None}
    gradients = gather_groups({"": gradients}, keep=True)[""]
    state = {f"{group}/{name}": x for group, tensors in groups.items() for name, x in tensors.items()}
    result = {"losses": torch.stack(losses), "errors": torch.tensor(list(errors.values())), **state, **gradients}
    sizes = [(p.to_local() if isinstance(p, DTensor) else p).numel() for p in trainer.trained.parameters()]
    result["share"] = torch.tensor(sum(sizes) / sum(p.numel() for p in trainer.trained.parameters()))
    return {name: x.contiguous().clone() for name, x in result.items()}, trainer.accelerator.is_main_process


def run(fsdp: bool, folder: Path, *, start: Path | None = None) -> None:
    """Six steps with checkpoints and a look, from the beginning or from another run's checkpoint after three."""
    trainer = build("byol-vit-srip", fsdp, torch.float64, folder, max_steps=6, save_steps=3, keep_last=None)
    if start is not None and trainer.accelerator.is_main_process:
        shutil.copytree(start / "checkpoints" / "step-3", folder / "checkpoints" / "step-3")
    trainer.accelerator.wait_for_everyone()
    trainer.train(resume_from_checkpoint=start is not None)
    if trainer.accelerator.is_main_process:
        trainer.method.encoder.save_pretrained(folder / "encoder")


def train_all(folder: Path, fsdp: bool) -> None:
    run(fsdp, folder / "whole")
    for case, name in RUNS:
        result, is_main = train(case, fsdp, DTYPES[name], folder / "run")
        if is_main:
            save_file(result, folder / f"{case}-{name}.safetensors")


def train_sharded(folder: Path, start: Path) -> None:
    run(True, folder / "resumed", start=start)
    train_all(folder, True)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As the worker has: the order of sums is the same."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process and two sharded ones leave, and what each makes of the other's checkpoint."""
    root = tmp_path_factory.mktemp("fsdp")
    one, two = root / "1", root / "2"
    os.environ["HF_SSL_OR_CACHE"] = str(root / "cache")
    train_all(one, False)
    run_all(train_sharded, two, one / "whole", log=root / "log", count=2)
    run(False, one / "resumed", start=two / "whole")
    return root


@pytest.mark.parametrize(("case", "dtype"), RUNS)
def test_sharded_processes_train_as_one_that_has_all(root: Path, case: str, dtype: str):
    want, got = (load_file(root / processes / f"{case}-{dtype}.safetensors") for processes in ("1", "2"))
    assert want.keys() == got.keys()
    assert want["losses"].unique().numel() > 1, "nothing was trained"
    assert want.pop("share") == 1 and got["share"] < 0.6, "each process has about half of the weights"
    for name, wanted in want.items():
        difference = (got[name].double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1)
        sums_of_gradients = dtype == "float32" and name.startswith("optimizer/")
        assert difference <= TOLERANCE[dtype] * (5 if sums_of_gradients else 1), f"{name}: {difference:.2e}"


@pytest.mark.parametrize("run", ["2/whole", "2/resumed", "1/resumed"])
def test_checkpoints_do_not_show_how_they_were_made(root: Path, run: str):
    for group in ("method", "optimizer", "orthogonality"):
        file = f"checkpoints/step-6/{group}.safetensors"
        want, got = load_file(root / "1" / "whole" / file), load_file(root / run / file)
        assert want.keys() == got.keys()
        for name, wanted in want.items():
            difference = (got[name].double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1)
            assert difference <= TOLERANCE["float64"], f"{file}: {name}: {difference:.2e}"


def test_looks_and_the_encoder_at_the_end_see_whole_weights(root: Path):
    want, got = (load_file(root / run / "encoder" / "model.safetensors") for run in ("1/whole", "2/whole"))
    assert want.keys() == got.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-9)
    lines = [read_metrics(root / run / "metrics.jsonl").lines for run in ("1/whole", "2/whole")]
    looks = [[line for line in some if line["kind"] == "monitor"][-1] for some in lines]
    for name in ("rankme", "effective_rank", "orthogonality_error"):
        assert looks[1][name] == pytest.approx(looks[0][name], rel=1e-6)


def test_one_process_has_nothing_to_shard(tmp_path: Path):
    trainer = build("byol-vit-srip", True, torch.float32, tmp_path)
    assert trainer.trained is trainer.method
    with pytest.raises(InputError, match=r"training\.mixed_precision: fp16 does not go with training\.fsdp"):
        SSLTrainingArguments(fsdp=True, mixed_precision="fp16")


@pytest.mark.parametrize("max_norm", [0.1, 100.0])
def test_clipping_is_that_of_torch(max_norm: float):
    torch.manual_seed(0)
    ours, theirs = ([torch.randn(5, 3, requires_grad=True), torch.zeros(2, requires_grad=True)] for _ in range(2))
    ours[0].grad = torch.randn(5, 3)
    theirs[0].grad = ours[0].grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    torch.testing.assert_close(clip_gradients(ours, max_norm), norm)
    torch.testing.assert_close(ours[0].grad, theirs[0].grad)
