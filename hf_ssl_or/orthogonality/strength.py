"""How strongly an encoder is regularized: the paper's weights, and how a weight or a strength runs over the steps."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from hf_ssl_or.errors import InputError
from hf_ssl_or.models.configuration_ssl import OrthogonalityConfig

_logger = logging.getLogger(__name__)

# He, Du, Ma (NeurIPS 2024), Table 9, for the plain sum over matrices. It has no SRIP weight for vision transformers.
PAPER_WEIGHTS: dict[str, dict[str, float]] = {
    "resnet18": {"so": 1e-6, "srip": 1e-3},
    "resnet50": {"so": 1e-6, "srip": 1e-3},
    "wide_resnet28_2": {"so": 1e-6, "srip": 1e-4},
    "vit_tiny": {"so": 1e-5},
    "vit_small": {"so": 1e-5},
    "vit_base": {"so": 1e-6},
}

# Bansal, Chen, Wang (NeurIPS 2018), released code: (epoch of 200, factor from there on), latest first.
_STEP_DECAY = ((120, 0.0), (70, 1e-6), (50, 1e-4), (20, 1e-3), (0, 1.0))


def resolve_weight(encoder: nn.Module, config: OrthogonalityConfig) -> float:
    """Returns the configured weight, or for "auto" that of the paper for the encoder's `config.architecture`.

    Raises:
        InputError: The paper has no weight for this encoder and penalty, or not for this form of the penalty.
    """
    if config.weight != "auto":
        return float(config.weight)
    if config.target != "identity":
        raise InputError(
            "orthogonality.weight: the paper's weights are for target: identity; set a weight or strength"
        )
    if config.normalize:
        raise InputError("orthogonality.weight: the paper's weights are for normalize: false; set a number")
    architecture = getattr(getattr(encoder, "config", None), "architecture", None)
    if architecture is None:
        raise InputError("orthogonality.weight: 'auto' wants an encoder with config.architecture; set a number")
    for backbone, weights in PAPER_WEIGHTS.items():
        named = architecture == backbone or architecture.startswith((f"{backbone}_", f"{backbone}."))
        if named and config.penalty in weights:
            return weights[config.penalty]
    raise InputError(f"orthogonality.weight: the paper has none for {config.penalty} on {architecture}; set a number")


def schedule_factor(schedule: str, step: int, total_steps: int) -> float:
    """Returns the factor of the weight at a step of the run.

    Constant: 1. Step: 1, then 1e-3, 1e-4, 1e-6 and 0 from 10, 25, 35 and 60 % of the run on, after Bansal et al.
    Cosine: from 1 to 0.
    """
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        return (1 + math.cos(math.pi * min(step / total_steps, 1))) / 2
    return next(factor for epoch, factor in _STEP_DECAY if 200 * step >= epoch * total_steps)


class Course:
    """How a strength is spread over the steps of a run: as the learning rate, times the schedule.

    Args:
        schedule: As for `schedule_factor`.
        rate: The learning rate of each step from 0, in any unit; None for a constant one.
    """

    def __init__(self, schedule: str, rate: Callable[[int], float] | None = None) -> None:
        self._schedule, self._rate = schedule, rate
        self._sum = lru_cache(maxsize=1)(lambda total: math.fsum(self._at(step, total) for step in range(total)))

    def share(self, step: int, total_steps: int) -> float:
        """Returns a step's share of the run; the shares of all steps sum up to 1."""
        total = self._sum(total_steps)
        return self._at(min(step, total_steps - 1), total_steps) / total if total else 0.0

    def _at(self, step: int, total_steps: int) -> float:
        factor = schedule_factor(self._schedule, step, total_steps)
        return factor if self._rate is None else factor * self._rate(step)


def rate_of(scheduler: Any) -> Callable[[int], float] | None:
    """Returns the learning rate of each step of a torch scheduler, up to a factor; None where it cannot be foreseen.

    A `LambdaLR`, which all but two schedulers of transformers are, is a function of the step; with several groups of
    parameters that of the first is taken. Others know their next step only.
    """
    if isinstance(scheduler, LambdaLR):
        return scheduler.lr_lambdas[0]
    if scheduler is not None:
        _logger.warning(
            "orthogonality.strength: spread evenly over the run, since the course of a %s is not known beforehand; "
            "a LambdaLR is followed",
            type(scheduler).__name__,
        )
    return None
