"""Lightly's side of the benchmarks: each method as its examples put it together, around timm's encoder.

A loop is a module that gives the loss of a list of views, and `after_step` for what follows the optimizer's step.
Heads and losses are lightly's, with its own defaults but for the sizes; each view is encoded by itself, as there.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightly import loss as losses
from lightly.models.modules import heads
from lightly.models.modules.nn_memory_bank import NNMemoryBankModule
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import Tensor, nn

# Settings that make this package's method the same one as lightly's: number of layers, queue, prototypes.
SAME: dict[str, dict[str, Any]] = {
    "barlow_twins": {"projector_layers": 3},
    "vicreg": {"projector_layers": 3},
    "simclr": {"projector_layers": 2},
    "dcl": {"projector_layers": 2},
    "dclw": {"projector_layers": 2},
    "frossl": {"projector_layers": 3},
    "byol": {"predictor_hidden": 1024},
    "moco_v2": {"projector_layers": 2, "queue_size": 4096, "symmetric": False},
    "simsiam": {"projector_layers": 3, "predictor_hidden": 512},
    "dino": {"projector_layers": 3, "prototypes": 4096},
    "swav": {"projector_layers": 2, "prototypes": 1024, "queue_size": 0},
    "nnclr": {"projector_layers": 3, "predictor_hidden": 1024, "queue_size": 4096},
}


class Projections(nn.Module):
    """Encoder, projector, and a loss of the two projections."""

    def __init__(self, encoder: nn.Module, projector: nn.Module, loss: nn.Module, *, as_list: bool = False) -> None:
        super().__init__()
        self.encoder, self.projector, self.criterion, self.as_list = encoder, projector, loss, as_list

    def forward(self, views: list[Tensor]) -> Tensor:
        """Returns the loss."""
        z = [self.projector(self.encoder(view)) for view in views]
        return self.criterion(z) if self.as_list else self.criterion(*z)

    def after_step(self) -> None:
        """Nothing follows."""


class WithPredictor(nn.Module):
    """SimSiam, and NNCLR with its queue of neighbors."""

    def __init__(self, encoder: nn.Module, projector: nn.Module, predictor: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.encoder, self.projector, self.predictor, self.criterion = encoder, projector, predictor, loss
        self.neighbors: nn.Module | None = None

    def forward(self, views: list[Tensor]) -> Tensor:
        """Returns the loss."""
        z = [self.projector(self.encoder(view)) for view in views]
        p = [self.predictor(x) for x in z]
        z = [x.detach() for x in z]
        if self.neighbors is not None:
            z = [self.neighbors(x, update=first) for x, first in zip(z, (True, False), strict=True)]
        return 0.5 * (self.criterion(z[0], p[1]) + self.criterion(z[1], p[0]))

    def after_step(self) -> None:
        """Nothing follows."""


class WithTeacher(nn.Module):
    """BYOL, MoCo and DINO: a momentum copy gives the targets."""

    def __init__(self, kind: str, encoder: nn.Module, projector: Callable[[], nn.Module], loss: nn.Module) -> None:
        super().__init__()
        self.kind, self.encoder, self.projector, self.criterion = kind, encoder, projector(), loss
        self.predictor: nn.Module = nn.Identity()
        self.teacher_encoder, self.teacher_projector = copy.deepcopy(encoder), projector()
        deactivate_requires_grad(self.teacher_encoder)
        deactivate_requires_grad(self.teacher_projector)

    def student(self, view: Tensor) -> Tensor:
        """Returns what is trained to match."""
        return self.predictor(self.projector(self.encoder(view)))

    @torch.no_grad()
    def teacher(self, view: Tensor) -> Tensor:
        """Returns what is to be matched."""
        return self.teacher_projector(self.teacher_encoder(view))

    def forward(self, views: list[Tensor]) -> Tensor:
        """Returns the loss."""
        if self.kind == "moco_v2":
            return self.criterion(self.student(views[0]), self.teacher(views[1]))
        p, t = [self.student(view) for view in views], [self.teacher(view) for view in views]
        if self.kind == "dino":
            return self.criterion(t, p, epoch=0)
        return 0.5 * (self.criterion(p[0], t[1]) + self.criterion(p[1], t[0]))

    def after_step(self) -> None:
        """Moves the teacher."""
        update_momentum(self.encoder, self.teacher_encoder, m=0.99)
        update_momentum(self.projector, self.teacher_projector, m=0.99)


class WithPrototypes(Projections):
    """SwAV: unit prototypes, codes by Sinkhorn's algorithm."""

    def __init__(self, encoder: nn.Module, projector: nn.Module, loss: nn.Module, dim: int, prototypes: int) -> None:
        super().__init__(encoder, projector, loss)
        self.prototypes = heads.SwaVPrototypes(dim, prototypes, 1)

    def forward(self, views: list[Tensor]) -> Tensor:
        """Returns the loss."""
        self.prototypes.normalize()
        z = [nn.functional.normalize(self.projector(self.encoder(view)), dim=1) for view in views]
        return self.criterion([self.prototypes(x, 1) for x in z], [])


def build(name: str, encoder: nn.Module, features: int, hidden: int, dim: int) -> nn.Module:
    """Builds lightly's loop of a method.

    Args:
        name: A key of `SAME`.
        encoder: Returns (B, features).
        features: Its width.
        hidden: Width of the projector's hidden layers.
        dim: Width of the projections.
    """
    settings = SAME[name]
    sizes = (features, hidden, dim)
    contrastive = {
        "barlow_twins": (heads.BarlowTwinsProjectionHead, losses.BarlowTwinsLoss, {}),
        "vicreg": (heads.VICRegProjectionHead, losses.VICRegLoss, {}),
        "simclr": (heads.SimCLRProjectionHead, losses.NTXentLoss, {"temperature": 0.2}),
        "dcl": (heads.SimCLRProjectionHead, losses.DCLLoss, {}),
        "dclw": (heads.SimCLRProjectionHead, losses.DCLWLoss, {}),
        "frossl": (heads.BarlowTwinsProjectionHead, losses.FroSSLLoss, {}),
    }
    if name in contrastive:
        head, loss, arguments = contrastive[name]
        return Projections(encoder, head(*sizes), loss(**arguments), as_list=name == "frossl")
    if name == "swav":
        projector = heads.SwaVProjectionHead(*sizes)
        return WithPrototypes(encoder, projector, losses.SwaVLoss(), dim, settings["prototypes"])
    if name == "simsiam":
        predictor = heads.SimSiamPredictionHead(dim, settings["predictor_hidden"], dim)
        projector = heads.SimSiamProjectionHead(*sizes)
        return WithPredictor(encoder, projector, predictor, losses.NegativeCosineSimilarity())
    if name == "nnclr":
        predictor = heads.NNCLRPredictionHead(dim, settings["predictor_hidden"], dim)
        loop = WithPredictor(encoder, heads.NNCLRProjectionHead(*sizes), predictor, losses.NTXentLoss(0.2))
        loop.neighbors = NNMemoryBankModule(size=(settings["queue_size"], dim))
        return loop
    return _with_teacher(name, encoder, sizes)


def _with_teacher(name: str, encoder: nn.Module, sizes: tuple[int, int, int]) -> WithTeacher:
    settings, (features, hidden, dim) = SAME[name], sizes
    if name == "moco_v2":
        loss = losses.NTXentLoss(0.2, memory_bank_size=(settings["queue_size"], dim))
        return WithTeacher(name, encoder, partial(heads.MoCoProjectionHead, *sizes), loss)
    if name == "dino":
        prototypes = settings["prototypes"]
        head = partial(heads.DINOProjectionHead, features, hidden, dim, prototypes)
        return WithTeacher(name, encoder, head, losses.DINOLoss(output_dim=prototypes))
    head = partial(heads.BYOLProjectionHead, *sizes)
    loop = WithTeacher(name, encoder, head, losses.NegativeCosineSimilarity())
    loop.predictor = heads.BYOLPredictionHead(dim, settings["predictor_hidden"], dim)
    return loop


class Loop:
    """A plain training loop around one of these modules.

    Args:
        module: From `build`.
        device: Where it computes.
        precision: "no" or "bf16" autocast.
    """

    def __init__(self, module: nn.Module, device: torch.device, precision: str = "no") -> None:
        self.module, self.device, self.precision = module.to(device).train(), device, precision
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=0.03, momentum=0.9, weight_decay=1e-4)

    def step(self, views: list[Tensor]) -> Tensor:
        """Takes one step."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            loss = self.module(views)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.module.after_step()
        return loss

    def epoch(self, loader: torch.utils.data.DataLoader, steps: int) -> None:
        """Takes the steps of one pass over a loader that gives a list of views and what else there is."""
        for views, *_ in itertools.islice(loader, steps):
            self.step([view.to(self.device, non_blocking=True) for view in views])
