"""The base classes of most methods: a loss of all projections, and a student with a momentum teacher.

A base class holds what its methods would repeat: settings, heads, the forward. A method adds its loss.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from hf_ssl_or.distributed import gather_batch
from hf_ssl_or.methods.base import SSLMethod, require_at_least, require_positive, require_share
from hf_ssl_or.methods.heads import ProjectionHead
from hf_ssl_or.methods.teacher import MomentumTeacher, cosine_momentum
from hf_ssl_or.settings import settings
from hf_ssl_or.structures import MultiViewBatch, SSLOutput, ViewSpec

ASYMMETRIC_VIEWS = (  # solo-learn, CIFAR
    ViewSpec(crop_scale=(0.08, 1.0)),
    ViewSpec(crop_scale=(0.08, 1.0), solarize=0.2),
)


@settings
class ProjectorConfig:
    """Settings of every method with a projector.

    Attributes:
        projector_hidden: Width of the projector's hidden layers; "same" is that of the projections.
        projector_dim: D, the width of the projections.
        projector_layers: Number of linear layers; 0 for no projector: the loss is one of the encoder's features then,
            and D their width, whatever `projector_dim` says.
    """

    projector_hidden: int | Literal["same"] = 2048
    projector_dim: int = 256
    projector_layers: int = 2

    def validate_projector(self) -> None:
        """Checks that the projector's sizes make sense."""
        require_at_least(self, 0, "projector_layers")
        require_positive(self, "projector_dim", *(["projector_hidden"] if self.projector_hidden != "same" else []))


class ProjectionMethod(SSLMethod, abstract=True):
    """A method whose loss is a function of the projections of the global batch, `loss`.

    Its `config_class` is a `ProjectorConfig`.
    """

    def build_heads(self) -> None:
        """Builds the projector."""
        self.projector = self.build_projector()

    def build_projector(self) -> nn.Module:
        """Builds the projector, F -> D; a method with another one overrides this."""
        return self.projection_head()

    @property
    def projection_dim(self) -> int:
        """D, the width of what the loss compares."""
        return self.config.projector_dim if self.config.projector_layers else self.feature_size

    def projection_head(self, **form: bool) -> nn.Module:
        """Builds a head of the settings' sizes, or none for no layers; `form` goes to `ProjectionHead`."""
        config = self.config
        if not config.projector_layers:
            return nn.Identity()
        hidden = config.projector_dim if config.projector_hidden == "same" else config.projector_hidden
        sizes = self.feature_size, hidden, config.projector_dim
        return ProjectionHead(*sizes, layers=config.projector_layers, **form)

    def forward(self, batch: MultiViewBatch) -> SSLOutput:
        """Compares the projections of the views."""
        z_VBD = self.projector(self.encode(batch.views_VBCHW))
        loss, terms = self.loss(gather_batch(z_VBD, dim=1), batch)
        return self.output(loss, terms, z_VBD)

    def loss(self, z_VND: Tensor, batch: MultiViewBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss and its terms from the projections of the global batch; `batch` has seed and step."""
        raise NotImplementedError


@settings
class MomentumConfig(ProjectorConfig):
    """Settings of every method with a momentum teacher.

    Attributes:
        momentum: Share of itself that the teacher keeps in the first step.
        final_momentum: The same at the end of training; the way there is half a cosine.
    """

    momentum: float | int = 0.99
    final_momentum: float | int = 1.0

    def validate_momentum(self) -> None:
        """Checks that the momenta are shares."""
        require_share(self, "momentum", "final_momentum")


class MomentumMethod(ProjectionMethod, abstract=True):
    """A method with a momentum teacher, whose `config_class` is a `MomentumConfig`; it defines its own `forward`."""

    def build_heads(self) -> None:
        """Adds the teacher."""
        super().build_heads()
        self.teacher = MomentumTeacher(self.encoder, self.projector)

    @torch.no_grad()
    def targets(self, views_VBCHW: Tensor) -> Tensor:
        """Returns the teacher's projections of this process's views, without gradient: (V, B, D)."""
        return self.teacher.projector(self.encode(views_VBCHW, self.teacher.encoder))

    def on_step_end(self, step: int, total_steps: int) -> None:
        """Moves the teacher towards the student."""
        momentum = cosine_momentum(self.config.momentum, self.config.final_momentum, step, total_steps)
        self.teacher.update(self.encoder, self.projector, momentum)
