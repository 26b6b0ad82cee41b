"""The orthogonality regulariser of an encoder: which weights, how strongly, and their gradients in a few batched products.

Which matrices. Every convolution and linear weight of the encoder, seen as (out, in * kh * kw). A grouped convolution
is as many matrices as it has groups, since groups share neither inputs nor outputs. With `split_qkv` a fused attention
weight (3 * d, d) is three matrices. Norms, biases, tokens and position tables are never touched, frozen weights are
left out while they are frozen.

How strongly. The penalty is weight * schedule * sum over matrices. For SO the plain sum pulls every singular value s by
4 weight s (s^2 - 1), whatever the size of its matrix; only the sum itself grows with the number of singular values.
With `normalize` SO and DSO of a matrix are divided by its number of singular values R = min(out, in * kh * kw), which
for SO gives the mean of (s^2 - 1)^2; SRIP and mutual coherence are one number for a matrix of any size and stay. All
are then divided by the number of matrices. So each matrix counts alike, and the penalty of a wide or deep encoder is
on the scale of that of a small one.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from hf_ssl_or.errors import InputError, unknown
from hf_ssl_or.models.configuration_ssl import OrthogonalityConfig
from hf_ssl_or.orthogonality import penalties
from hf_ssl_or.randomness import keyed_generator

# He, Du, Ma (NeurIPS 2024), Table 9; it has no entry for SRIP on vision transformers.
PAPER_WEIGHTS: dict[str, dict[str, float]] = {
    "resnet18": {"so": 1e-6, "srip": 1e-3},
    "resnet50": {"so": 1e-6, "srip": 1e-3},
    "wide_resnet28_2": {"so": 1e-6, "srip": 1e-4},
    "vit_tiny": {"so": 1e-5},
    "vit_small": {"so": 1e-5},
    "vit_base": {"so": 1e-6},
}
# Bansal, Chen, Wang (NeurIPS 2018), released code: from these epochs of 200 on, the weight times these factors.
_STEP_DECAY = ((120, 0.0), (70, 1e-6), (50, 1e-4), (20, 1e-3))

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@dataclass(frozen=True)
class _Site:
    """A layer whose weight is `parts` equal matrices, one below the other. The weight is read anew at each use."""

    name: str
    layer: nn.Module
    parts: int

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    @property
    def matrix_shape(self) -> tuple[int, int]:
        rows = self.weight.shape[0] // self.parts
        return rows, self.weight.numel() // self.weight.shape[0]

    def matrices(self) -> Tensor:
        """The weight as (parts, out, in * kh * kw), a view for contiguous and for channels-last weights."""
        return _channels_last_if_so(self.weight).reshape(self.parts, *self.matrix_shape)

    def like_weight(self, update_POI: Tensor) -> Tensor:
        """An update of `matrices()` in the shape, the memory order and the type of the weight."""
        weight = self.weight
        ordered = update_POI.reshape(_channels_last_if_so(weight).shape)
        return (ordered if weight.is_contiguous() else ordered.movedim(-1, 1)).to(weight.dtype)


def _channels_last_if_so(weight: Tensor) -> Tensor:
    """Moves the input channels last unless the weight is contiguous; penalties do not depend on the columns' order."""
    return weight if weight.is_contiguous() else weight.movedim(1, -1)


class OrthogonalityRegularizer:
    """Keeps the weight matrices of an encoder near orthogonal.

    In a loop of your own, per optimizer step: backward (and the all-reduce that comes with it), `set_progress`,
    `add_gradients`, clip, step. Penalty and gradient depend on the weights alone, so they are the same on every process
    and are added once, after gradients have been averaged and accumulated.

    SRIP holds a unit vector per matrix. `add_gradients` uses the vectors as `penalty` does and then refines them
    `power_iterations` times (see `penalties.refine_vectors`), ready for the next step; whoever uses `penalty` and
    autograd alone calls `advance` once a step. With `fresh_start` no vector is kept: each step draws its own from
    (seed, step) and takes the estimate of the paper, `penalties.srip_power`.

    Example:
        ```python
        regularizer = OrthogonalityRegularizer(encoder, OrthogonalityConfig(penalty="so", weight=1e-6))
        loss.backward()
        penalty = regularizer.add_gradients()
        optimizer.step()
        ```
    """

    def __init__(self, encoder: nn.Module, config: OrthogonalityConfig) -> None:
        """Selects the weights.

        Args:
            encoder: The module whose weights are regularised, all of it: hand over the backbone, not the method.
            config: The settings.

        Raises:
            InputError: A pattern matches no weight, nothing is selected, or the paper has no weight for the encoder.
        """
        self.config = config
        self._sites = [] if config.penalty == "none" else _select(encoder, config)
        self._weight = 0.0 if config.penalty == "none" else _resolve_weight(encoder, config)
        self._step, self._factor = 0, 1.0
        self._vectors = {site.name: self._start_vector(site) for site in self._sites} if self._keeps_vectors else {}

    @property
    def weight(self) -> float:
        """The weight that `auto` stands for, or the one that was set; without schedule and `every`."""
        return self._weight

    @property
    def names(self) -> list[str]:
        """Names of the regularised parameters, in the encoder's order."""
        return [site.name for site in self._sites]

    def set_progress(self, step: int, total_steps: int) -> None:
        """Tells the step of the run, from 0; the schedule, `every` and the fresh vectors of SRIP depend on it.

        Constant schedule: 1. Step: 1, then 1e-3, 1e-4, 1e-6 and 0 from 10, 25, 35 and 60 % of the run on (Bansal et
        al.). Cosine: from 1 to 0. With `every: k` the penalty acts at steps that k divides, k times as strongly, so
        that its mean stays.

        Raises:
            InputError: The step is negative, or there is no step in total.
        """
        if step < 0 or total_steps < 1:
            raise InputError(f"orthogonality: step {step} of {total_steps}: wants step >= 0 and total_steps >= 1")
        self._step = step
        self._factor = _schedule(self.config.schedule, step, total_steps)

    def penalty(self) -> Tensor:
        """Gives the penalty, weight, schedule and `every` included, as a scalar with autograd."""
        total = self._zero()
        for sites, w_LOI, scale in self._active_groups():
            total = total + scale * self._values(sites, w_LOI).sum()
        return total

    @torch.no_grad()
    def add_gradients(self) -> Tensor:
        """Adds the gradient of `penalty()` to the weights' `.grad`, in closed form, and advances SRIP's vectors.

        Same-shape matrices go through one batched product; there is no graph and no host synchronisation, and autocast
        is off. Call it where gradients are final: after the all-reduce, once for all accumulation steps, unscaled.

        Returns:
            The value of `penalty()`, detached.
        """
        total = self._zero()
        for sites, w_LOI, scale in self._active_groups():
            values_L, grad_LOI = self._values_and_grads(sites, w_LOI)
            total = total + scale * values_L.sum()
            updates = grad_LOI.split([site.parts for site in sites])
            for site in sites:
                if site.weight.grad is None:
                    site.weight.grad = torch.zeros_like(site.weight)
            torch._foreach_add_(
                [site.weight.grad for site in sites],
                [site.like_weight(update) for site, update in zip(sites, updates, strict=True)],
                alpha=scale,
            )
            self._refine(sites, w_LOI)
        return total

    @torch.no_grad()
    def advance(self, iterations: int | None = None) -> None:
        """Refines SRIP's vectors on the weights as they are; nothing to do for other penalties.

        Args:
            iterations: How many refinements; None for the configured number.
        """
        for sites, w_LOI in self._groups():
            self._refine(sites, w_LOI, iterations)

    @torch.no_grad()
    def exact_vectors(self) -> None:
        """Sets SRIP's vectors to the exact eigenvectors, by full decomposition: slow, for tests and measurements."""
        if self._keeps_vectors:
            for sites, w_LOI in self._groups():
                self._keep(sites, penalties.dominant_vectors(w_LOI))

    @torch.no_grad()
    def errors(self) -> dict[str, float]:
        """Gives ||G - I||_F of each weight, G its smaller Gram; of several matrices, the root of the sum of squares.

        Waits for the device: a diagnostic, not for every step.
        """
        squares = {}
        for sites, w_LOI in self._groups(frozen=True):
            parts = penalties.so(w_LOI).split([site.parts for site in sites])
            squares |= {site.name: part_P.sum() for site, part_P in zip(sites, parts, strict=True)}
        return {name: math.sqrt(squares[name]) for name in self.names} if self._sites else {}

    def state_dict(self) -> dict[str, Tensor]:
        """Gives a copy of SRIP's vectors by parameter name, (parts, R) each; empty for other penalties."""
        return {name: vector_PR.clone() for name, vector_PR in self._vectors.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes back what `state_dict` gave.

        Raises:
            InputError: A name is missing or unknown, or a shape differs.
        """
        for name in state.keys() - self._vectors.keys():
            raise InputError(f"orthogonality state: {name!r} is not a vector of this regulariser (another penalty?)")
        for name, vector_PR in self._vectors.items():
            if name not in state:
                raise InputError(f"orthogonality state: the vector of {name!r} is missing (another encoder or penalty?)")
            if state[name].shape != vector_PR.shape:
                found, wanted = tuple(state[name].shape), tuple(vector_PR.shape)
                raise InputError(f"orthogonality state: the vector of {name!r} has shape {found}, not {wanted}")
        self._vectors = {name: state[name].to(vector, copy=True) for name, vector in self._vectors.items()}

    # -----------------------------------------------------------------------------------------------------------------

    @property
    def _keeps_vectors(self) -> bool:
        return self.config.penalty == "srip" and not self.config.fresh_start

    def _zero(self) -> Tensor:
        return torch.zeros((), device=self._sites[0].weight.device if self._sites else None)

    def _active_groups(self) -> Iterator[tuple[list[_Site], Tensor, float]]:
        """Groups and the scale of their penalties at this step; none when the step has no penalty."""
        strength = self._weight * self._factor * self.config.every
        if strength == 0 or self._step % self.config.every:
            return
        count = sum(site.parts for site in self._sites)
        by_row = self.config.penalty in ("so", "dso")
        for sites, w_LOI in self._groups():
            size = count * (min(sites[0].matrix_shape) if by_row else 1) if self.config.normalize else 1
            yield sites, w_LOI, strength / size

    def _groups(self, frozen: bool = False) -> Iterator[tuple[list[_Site], Tensor]]:
        """Sites whose matrices have one shape, with these matrices as a stack in at least float32, autocast off."""
        groups = defaultdict(list)
        for site in self._sites:
            if frozen or site.weight.requires_grad:
                groups[site.matrix_shape, site.weight.dtype].append(site)
        for (_, dtype), sites in groups.items():
            parts = [site.matrices() for site in sites]
            w_LOI = torch.cat(parts) if len(parts) > 1 else parts[0]
            with torch.autocast(w_LOI.device.type, enabled=False):
                yield sites, w_LOI if dtype == torch.float64 else w_LOI.float()

    def _values(self, sites: list[_Site], w_LOI: Tensor) -> Tensor:
        match self.config.penalty:
            case "so":
                return penalties.so(w_LOI)
            case "dso":
                return penalties.dso(w_LOI)
            case "mutual_coherence":
                return penalties.mutual_coherence(w_LOI)
        if self.config.fresh_start:
            return penalties.srip_power(w_LOI, self._fresh_vectors(w_LOI), self.config.power_iterations)
        return penalties.srip_along(w_LOI, self._kept_vectors(sites, w_LOI))

    def _values_and_grads(self, sites: list[_Site], w_LOI: Tensor) -> tuple[Tensor, Tensor]:
        match self.config.penalty:
            case "so":
                return penalties.so_and_grad(w_LOI)
            case "dso":
                return penalties.dso_and_grad(w_LOI)
            case "mutual_coherence":
                return penalties.mutual_coherence_and_grad(w_LOI)
        if self.config.fresh_start:
            return penalties.srip_power_and_grad(w_LOI, self._fresh_vectors(w_LOI), self.config.power_iterations)
        return penalties.srip_along_and_grad(w_LOI, self._kept_vectors(sites, w_LOI))
