"""Stable-pretraining's side of the benchmarks: its methods around timm's encoder, and its way of training them.

A step is its method's module in the same plain loop as lightly's. An epoch is a fit of Lightning's Trainer: its
`Module` takes the steps, its transforms draw the views, either of each image in the workers of a DataLoader or of a
batch on the device. Of the callbacks that it adds to every Trainer only those that training needs are left: no bars,
no summaries, no sampling of the hardware, no logs and no checkpoints.
"""

from __future__ import annotations

import logging
import sys
import threading
import types
import warnings
from functools import partial
from typing import Any

import torch
from ours import MEAN, STD
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms.functional import to_pil_image

try:
    import stable_pretraining as spt
except ModuleNotFoundError:
    print("stable-pretraining is not installed: pip install stable-pretraining", file=sys.stderr)
    sys.exit(2)
else:
    spt.set(verbose="ERROR")
from lightning.pytorch import Callback, Trainer
from stable_pretraining import methods
from stable_pretraining.callbacks import TeacherStudentCallback
from stable_pretraining.callbacks.registry import ModuleRegistryCallback
from stable_pretraining.data import gpu_transforms, transforms

from hf_ssl_or.structures import ViewSpec

# Settings that make this package's method the same one as stable-pretraining's.
SAME: dict[str, dict[str, Any]] = {
    "barlow_twins": {"projector_layers": 3, "beta": 0.0051},
    "vicreg": {"projector_layers": 3},
    "simclr": {"projector_layers": 2},
    "byol": {"projector_layers": 2, "predictor_hidden": 1024},
    "simsiam": {"projector_layers": 3, "predictor_hidden": 512},
    "moco_v2": {"projector_layers": 2, "queue_size": 4096, "symmetric": False},
    "nnclr": {"projector_layers": 3, "predictor_hidden": 1024, "queue_size": 4096},
    "swav": {"projector_layers": 2, "prototypes": 1024, "queue_size": 0, "freeze_prototypes_steps": 0},
    "dino": {"projector_layers": 3, "prototypes": 4096, "freeze_prototypes_steps": 0},
}
SGD = partial(torch.optim.SGD, lr=0.03, momentum=0.9, weight_decay=1e-4)


def build(name: str, encoder: nn.Module, hidden: int, dim: int) -> spt.Module:
    """Builds stable-pretraining's module of a method, with its queue full where it has one.

    Args:
        name: A key of `SAME`.
        encoder: Returns (B, F).
        hidden: Width of the projector's hidden layers; SimSiam has that of the projections.
        dim: Width of the projections.
    """
    same = SAME[name]
    if name in ("barlow_twins", "vicreg"):
        kind = methods.BarlowTwins if name == "barlow_twins" else methods.VICReg
        return kind(encoder, (hidden, hidden, dim))
    if name == "simclr":
        return methods.SimCLR(encoder, (hidden, dim), temperature=0.2)
    if name == "byol":
        return methods.BYOL(encoder, (hidden, dim), (same["predictor_hidden"], dim))
    if name == "simsiam":
        return methods.SimSiam(encoder, dim, same["predictor_hidden"])
    if name == "swav":
        return methods.SwAV(encoder, (hidden, dim), same["prototypes"])
    if name == "dino":
        return methods.DINO(encoder, hidden, dim, same["prototypes"])
    queue: dict[str, Any] = {"queue_length": same["queue_size"], "temperature": 0.2}
    if name == "moco_v2":
        module = methods.MoCov2(encoder, (hidden, dim), **queue)
    else:
        module = methods.NNCLR(encoder, (hidden, dim), same["predictor_hidden"], **queue)
    module.queue.append(nn.functional.normalize(torch.randn(same["queue_size"], dim)))
    return module


def loss_of(module: spt.Module, views: list[Tensor]) -> Tensor:
    """Returns the loss of a method's own forward, whatever stands in its place for a fit."""
    forward = partial(type(module).forward, module)
    output = forward(global_views=views) if isinstance(module, methods.DINO) else forward(*views)
    return output.loss


class GivenViews(nn.Module):
    """Its module as `lightly_loops.Loop` wants it.

    Args:
        module: From `build`.
    """

    def __init__(self, module: spt.Module) -> None:
        super().__init__()
        self.module = module
        self.teachers = [part for part in module.modules() if isinstance(part, spt.TeacherStudentWrapper)]

    def forward(self, views: list[Tensor]) -> Tensor:
        """Returns the loss."""
        return loss_of(self.module, views)

    def after_step(self) -> None:
        """Moves the teachers."""
        for teacher in self.teachers:
            teacher.update_teacher()


def view_loader(
    pixels: Tensor, side: int, spec: ViewSpec, batch: int, *, workers: int, batched: bool, pinned: bool
) -> DataLoader:
    """Builds its loader of two views.

    Args:
        pixels: Images (n, H, W, 3), uint8; each is a PIL image of its dataset.
        side: Of the views.
        spec: How they are sampled.
        batch: Images per step.
        workers: Processes, which live on between epochs.
        batched: Draws the views of a batch on the device, in place of one by one in the workers.
        pinned: Copies batches to pinned memory.
    """
    draws = _batched(side, spec) if batched else None
    transform = transforms.ToImage(rgb=True) if batched else transforms.MultiViewTransform([_single(side, spec)] * 2)
    images = [(to_pil_image(image), i) for i, image in enumerate(pixels.permute(0, 3, 1, 2))]
    return DataLoader(
        spt.data.FromTorchDataset(images, ["image", "label"], transform, draws),
        batch,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pinned,
    )


def _single(side: int, spec: ViewSpec) -> transforms.Compose:
    return transforms.Compose(
        transforms.RGB(),
        transforms.RandomResizedCrop((side, side), scale=spec.crop_scale),
        transforms.RandomHorizontalFlip(spec.flip),
        transforms.ColorJitter(spec.brightness, spec.contrast, spec.saturation, spec.hue, p=spec.jitter),
        transforms.RandomGrayscale(spec.grayscale),
        transforms.ToImage(mean=MEAN, std=STD),
    )


def _batched(side: int, spec: ViewSpec) -> nn.Module:
    chain = [
        gpu_transforms.GPURandomResizedCrop(side, scale=spec.crop_scale),
        gpu_transforms.GPURandomHorizontalFlip(spec.flip),
        gpu_transforms.GPUColorJitter(spec.brightness, spec.contrast, spec.saturation, spec.hue, p=spec.jitter),
        gpu_transforms.GPURandomGrayscale(spec.grayscale),
        gpu_transforms.GPUNormalize(MEAN, STD),
    ]
    return gpu_transforms.StackedMultiView(gpu_transforms.GPUCompose(chain), n_views=2)


class Fit(Callback):
    """A fit that waits at the start of each epoch until it is asked for: `epoch` takes one, `close` ends the fit.

    The fit has a thread of its own, as it does not return between epochs. What comes before its first epoch and after
    its last one is therefore in no call of `epoch`; waiting for the first batch of an epoch is.

    Args:
        module: From `build`.
        loader: From `view_loader`.
        device: Where it computes.
        precision: "no" or "bf16" autocast.
    """

    def __init__(self, module: spt.Module, loader: DataLoader, device: torch.device, precision: str = "no") -> None:
        for name in ("lightning.fabric", "lightning.pytorch"):
            logging.getLogger(name).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module="lightning|lance")
        module.forward = types.MethodType(_forward, module)
        module.optim = {"optimizer": SGD, "scheduler": {"type": "ConstantLR", "factor": 1.0}}
        self.asked, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.trainer = Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            precision="bf16-mixed" if precision == "bf16" else "32-true",
            max_epochs=1_000_000,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            callbacks=[TeacherStudentCallback(), self],
        )
        needed = (ModuleRegistryCallback, TeacherStudentCallback, Fit)
        self.trainer.callbacks = [each for each in self.trainer.callbacks if isinstance(each, needed)]
        data = spt.data.DataModule(train=loader)
        self.thread = threading.Thread(target=self._run, args=(module, data), daemon=True)
        self.failure: BaseException | None = None
        self.thread.start()

    def _run(self, module: spt.Module, data: spt.data.DataModule) -> None:
        try:
            self.trainer.fit(module, data)
        except BaseException as failure:
            self.failure = failure
        self.done.release()

    def on_train_epoch_start(self, *_: Any) -> None:
        """Waits."""
        self.asked.acquire()

    def on_train_epoch_end(self, *_: Any) -> None:
        """Reports."""
        self.done.release()

    def epoch(self) -> None:
        """Takes one epoch."""
        self.asked.release()
        self.done.acquire()
        if self.failure is not None:
            raise self.failure

    def close(self) -> None:
        """Ends the fit."""
        self.trainer.should_stop = True
        self.asked.release()
        self.thread.join()


def _forward(module: spt.Module, batch: dict[str, Any], stage: str) -> dict[str, Tensor]:
    return {"loss": loss_of(module, [view["image"] for view in batch["views"]])}
