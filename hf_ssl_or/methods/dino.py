"""DINO (Caron et al., ICCV 2021): the student's assignment of a view to prototypes follows the teacher's of others.

With s_v the student's cosines of view v with K prototypes, and g_u the momentum teacher's of view u:

    t_u  = softmax((g_u - c) / teacher temperature),   p_v = softmax(s_v / student temperature)
    loss = mean_{u, v != u} -sum_k t_uk log p_vk

over images and pairs. The teacher sees the V global views, the student those and the local ones. The center c follows
the mean of g over the global batch, so that no prototype wins everywhere, and the teacher's low temperature keeps its
targets from being uniform. The mean over all pairs is the published loss, for two global views and any number of local
ones, and stays it for more; its cost is that of the views, as `swapped_cross_entropy` says.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from hf_ssl_or.distributed import mean_over_ranks
from hf_ssl_or.methods.base import require_at_least, require_positive, require_share
from hf_ssl_or.methods.base_methods import ASYMMETRIC_VIEWS, MomentumConfig, MomentumMethod
from hf_ssl_or.methods.functional import full_precision, global_mean
from hf_ssl_or.methods.heads import PrototypeHead, swapped_cross_entropy
from hf_ssl_or.settings import settings
from hf_ssl_or.structures import MultiViewBatch, SSLOutput


@settings
class DINOConfig(MomentumConfig):
    """Settings of DINO.

    Attributes:
        projector_norm: Batch normalization in the projector.
        prototypes: K, their number.
        freeze_prototypes_steps: In how many first steps the prototypes stay as they are.
        student_temperature: Divides the student's cosines.
        teacher_temperature: Divides the teacher's centered cosines at first.
        final_teacher_temperature: The same after the warm-up, which is linear.
        teacher_temperature_warmup: The warm-up's share of the training.
        center_momentum: Share of itself that the center keeps in a step.
    """

    projector_hidden: int | Literal["same"] = 2048  # the paper; solo-learn, CIFAR
    projector_dim: int = 256  # the paper; solo-learn, CIFAR
    projector_layers: int = 3  # the paper; solo-learn
    projector_norm: bool = False  # the paper; solo-learn
    prototypes: int = 4096  # solo-learn, CIFAR; the paper, ImageNet: 65536
    freeze_prototypes_steps: int = 195  # the authors' code; solo-learn: one epoch, here of 50,000 images in 256s
    student_temperature: float | int = 0.1
    teacher_temperature: float | int = 0.04
    final_teacher_temperature: float | int = 0.07  # the paper; solo-learn
    teacher_temperature_warmup: float | int = 0.05  # solo-learn, CIFAR: 50 of 1000 epochs; the paper: 30 epochs
    center_momentum: float | int = 0.9
    momentum: float | int = 0.9995  # solo-learn, CIFAR, a batch of 256; the paper, 1024: 0.996

    def validate_ranges(self) -> None:
        """Checks that sizes, temperatures and shares make sense."""
        require_positive(self, "student_temperature", "teacher_temperature", "final_teacher_temperature")
        require_at_least(self, 2, "prototypes")
        require_at_least(self, 0, "freeze_prototypes_steps")
        require_share(self, "teacher_temperature_warmup", "center_momentum")


@full_precision
def dino_loss(
    scores_SBK: Tensor,
    teacher_VBK: Tensor,
    center_K: Tensor,
    student_temperature: float,
    teacher_temperature: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Returns the loss and the mean confidence of the targets; means over images, so those of shards can be averaged.

    Args:
        scores_SBK: The student's cosines with the prototypes, of the V global views and then of the local views.
        teacher_VBK: The teacher's, of the global views.
        center_K: Is subtracted from the teacher's.
        student_temperature: Divides the student's.
        teacher_temperature: Divides the teacher's, once centered.
    """
    targets_VBK = ((teacher_VBK - center_K) / teacher_temperature).softmax(-1)
    return swapped_cross_entropy(scores_SBK, targets_VBK, student_temperature)


def warmed_up_temperature(config: DINOConfig, step: int, total_steps: int) -> float:
    """Returns the teacher's temperature in a step: linear over the warm-up, then constant."""
    start, end, share = config.teacher_temperature, config.final_teacher_temperature, config.teacher_temperature_warmup
    progress = min(1.0, step / (share * total_steps)) if share else 1.0
    return start + (end - start) * progress


class DINO(MomentumMethod):
    """DINO for any number of global and local views.

    Example:
        method = DINO(encoder, prototypes=1024)
        batch = MultiViewBatch(views_VBCHW=views, local_views_VBCHW=local_views, index_B=index)
    """

    config_class = DINOConfig
    takes_local_views = True
    views = ASYMMETRIC_VIEWS
    citation = """@inproceedings{caron2021emerging,
  title = {Emerging Properties in Self-Supervised Vision Transformers},
  author = {Caron, Mathilde and Touvron, Hugo and Misra, Ishan and J{\\'e}gou, Herv{\\'e} and Mairal, Julien and
            Bojanowski, Piotr and Joulin, Armand},
  booktitle = {IEEE/CVF International Conference on Computer Vision},
  year = {2021}
}"""

    projector: nn.Sequential
    center_K: Tensor
    teacher_temperature: Tensor

    def build_heads(self) -> None:
        """Adds the center and the teacher's temperature."""
        super().build_heads()
        self.register_buffer("center_K", torch.zeros(self.config.prototypes))
        self.register_buffer("teacher_temperature", torch.tensor(warmed_up_temperature(self.config, 0, 1)))

    def build_projector(self) -> nn.Module:
        """Builds the MLP and the prototypes as one module, of which the teacher has a copy."""
        config = self.config
        mlp = self.projection_head(norm=config.projector_norm, gelu=True)
        return nn.Sequential(mlp.apply(_initialize), PrototypeHead(self.projection_dim, config.prototypes))

    def forward(self, batch: MultiViewBatch) -> SSLOutput:
        """Compares the student's assignments of all views with the teacher's of the global views."""
        config = self.config
        mlp, prototypes = self.projector
        z_SBD = mlp(self.encode_with_local_views(batch))
        scores_SBK = prototypes(z_SBD, frozen=batch.step < config.freeze_prototypes_steps)
        teacher_VBK = self.targets(batch.views_VBCHW)
        self.teacher_mean_K = teacher_VBK.mean((0, 1))
        loss_and_confidence = dino_loss(
            scores_SBK, teacher_VBK, self.center_K, config.student_temperature, self.teacher_temperature
        )
        loss, confidence = global_mean(torch.stack(loss_and_confidence)).unbind()
        return self.output(loss, {"target_confidence": confidence}, z_SBD)

    def on_step_end(self, step: int, total_steps: int) -> None:
        """Moves the teacher, the center and the teacher's temperature."""
        super().on_step_end(step, total_steps)
        self.center_K.lerp_(mean_over_ranks(self.teacher_mean_K), 1 - self.config.center_momentum)
        self.teacher_temperature.fill_(warmed_up_temperature(self.config, step + 1, total_steps))


def _initialize(module: nn.Module) -> None:
    """Initializes linear layers as the authors' code does."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
