"""How strongly an encoder is regularized: the paper's weights, and the course of the weight over a run."""

from __future__ import annotations

import math

from torch import nn

from hf_ssl_or.errors import InputError
from hf_ssl_or.models.configuration_ssl import OrthogonalityConfig

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
        InputError: The paper has no weight for this encoder and penalty, or not for normalized penalties.
    """
    if config.weight != "auto":
        return float(config.weight)
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
