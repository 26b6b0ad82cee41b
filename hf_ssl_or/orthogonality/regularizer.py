"""The orthogonality regulariser of an encoder: a penalty with autograd, and its gradient in a few batched products.

The penalty is weight * schedule * (sum over matrices). For SO this pulls every singular value s by 4 weight s (s^2 -
1), whatever the size of its matrix; only the sum itself grows with the number of singular values. With `normalize`
each matrix counts alike: SO and DSO are divided by the number of singular values R = min(out, in * kh * kw), which for
SO leaves the mean of (s^2 - 1)^2; SRIP and mutual coherence are the largest deviation whatever R is, and stay; and the
sum over matrices becomes the mean. So the value has the same scale for narrow and wide, shallow and deep encoders.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from hf_ssl_or.distributed import local_part, shard_like, whole_each
from hf_ssl_or.errors import InputError
from hf_ssl_or.models.configuration_ssl import OrthogonalityConfig
from hf_ssl_or.orthogonality import penalties
from hf_ssl_or.orthogonality.selection import Site, select_sites
from hf_ssl_or.orthogonality.strength import resolve_weight, schedule_factor
from hf_ssl_or.randomness import keyed_generator

_LARGE = 2**20  # numbers of a matrix

# Each penalty of stacks (L, O, I): with autograd, and with the gradient in closed form. SRIP takes vectors besides.
_FORMS: dict[str, tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor]]]] = {
    "so": (penalties.so, penalties.so_and_grad),
    "dso": (penalties.dso, penalties.dso_and_grad),
    "mutual_coherence": (penalties.mutual_coherence, penalties.mutual_coherence_and_grad),
    "srip": (penalties.srip_along, penalties.srip_along_and_grad),
    "srip_fresh": (penalties.srip_power, penalties.srip_power_and_grad),
}


class OrthogonalityRegularizer:
    """Keeps the weight matrices of an encoder near orthogonal.

    Per optimizer step: backward with its all-reduce, `set_progress`, `add_gradients`, clip, step. Penalty and gradient
    depend on the weights alone, so they are the same on every process, and they are added once, to gradients that have
    been averaged and accumulated. Weights that are frozen when a method is called are left out.

    Sharded weights (FSDP2) are gathered for the matrices of one shape at a time, and each process adds its part of the
    gradient. Every method is a collective call then, which all processes make.

    SRIP keeps a unit vector v per matrix from step to step, and is read off along the best vector of the plane of v
    and M v (`penalties.ritz_vectors`), a constant for the gradient. `add_gradients` ends with `power_iterations` more
    iterations of v, for the next step (`penalties.power_iterate`); a loop that uses `penalty` and autograd alone calls
    `advance` once a step. With `fresh_start` nothing is kept: each step draws vectors from (seed, step) for the
    estimate `penalties.srip_power`, with two power iterations that of the paper.

    Example:
        ```python
        regularizer = OrthogonalityRegularizer(encoder, OrthogonalityConfig(penalty="so", weight=1e-6))
        loss.backward()
        penalty = regularizer.add_gradients()
        optimizer.step()
        ```

    Args:
        encoder: The module whose weights are regularised, all of it: hand over the backbone, not the method.
        config: The settings. With penalty "none" every method does nothing.

    Raises:
        InputError: A pattern matches no weight, nothing is selected, or the paper has no weight for the encoder.
    """

    def __init__(self, encoder: nn.Module, config: OrthogonalityConfig) -> None:
        active = config.penalty != "none"
        self.config = config
        self.weight = resolve_weight(encoder, config) if active else 0.0
        self._sites = select_sites(encoder, config) if active else []
        self._step, self._factor = 0, 1.0
        if active:
            self._penalty, self._penalty_and_grad = _FORMS[config.penalty + ("_fresh" if self._starts_fresh else "")]
        self._vectors: dict[str, Tensor] = {}
        if config.penalty == "srip" and not self._starts_fresh:
            self._draw_vectors()

    @property
    def names(self) -> list[str]:
        """Names of the regularised parameters, in the encoder's order."""
        return [site.name for site in self._sites]

    def set_progress(self, step: int, total_steps: int) -> None:
        """Tells the step of the run, from 0, on which the schedule, `every` and the fresh vectors of SRIP depend.

        With `every: k` the penalty acts at the steps that k divides, k times as strongly, so that its mean stays. For
        the schedules see `strength.schedule_factor`.

        Raises:
            InputError: The step is negative, or the run has no steps.
        """
        if step < 0 or total_steps < 1:
            raise InputError(f"orthogonality: step {step} of {total_steps}; wants step >= 0 and total_steps >= 1")
        self._step = step
        self._factor = schedule_factor(self.config.schedule, step, total_steps)

    def penalty(self) -> Tensor:
        """Gives the penalty as a scalar with autograd; weight, schedule and `every` are included."""
        total = self._zero()
        with self._full_precision():
            for sites, w_LOI, scale in self._active_groups():
                total = total + scale * self._penalty(w_LOI, *self._arguments(sites, w_LOI)).sum()
        return total

    @torch.no_grad()
    def add_gradients(self) -> Tensor:
        """Adds the gradient of `penalty()` to the weights' `.grad`, in closed form, and advances SRIP's vectors.

        Matrices of one shape share batched products; there is no graph and no host synchronisation. Call it where
        gradients are final: after the all-reduce, once for all accumulation steps, unscaled. At steps without penalty
        (`every`, a weight or factor of 0) it does nothing.

        Returns:
            The value of `penalty()`, a detached scalar.
        """
        total = self._zero()
        with self._full_precision():
            for sites, w_LOI, scale in self._active_groups():
                values_L, grad_LOI = self._penalty_and_grad(w_LOI, *self._arguments(sites, w_LOI))
                total = total + scale * values_L.sum()
                _accumulate(sites, grad_LOI, scale)
                self._iterate(sites, w_LOI)
        return total

    @torch.no_grad()
    def advance(self) -> None:
        """Iterates SRIP's vectors `power_iterations` times on the weights as they are; other penalties have none."""
        with self._full_precision():
            for sites, w_LOI in self._groups():
                self._iterate(sites, w_LOI)

    @torch.no_grad()
    def exact_vectors(self) -> None:
        """Sets SRIP's vectors to the exact eigenvectors by full decomposition: slow, for measuring and testing."""
        with self._full_precision():
            for sites, w_LOI in self._groups() if self._vectors else ():
                v_LR = penalties.dominant_vectors(w_LOI)
                self._keep(sites, torch.stack([v_LR, torch.zeros_like(v_LR)]))

    @torch.no_grad()
    def errors(self) -> dict[str, float]:
        """Gives ||G - I||_F of each weight, G its smaller Gram; over several matrices, the root of the sum of squares.

        Frozen weights are included. Waits for the device: a diagnostic, not for every step.
        """
        squares: dict[str, Tensor] = {}
        with self._full_precision():
            for sites, w_LOI in self._groups(frozen=True):
                parts = penalties.so(w_LOI).split([site.parts for site in sites])
                squares |= {site.name: part_P.sum() for site, part_P in zip(sites, parts, strict=True)}
        values = torch.stack([squares[name] for name in self.names]).sqrt().tolist() if squares else []
        return dict(zip(self.names, values, strict=True))

    def state_dict(self) -> dict[str, Tensor]:
        """Gives a copy of SRIP's vectors by parameter name; empty where none is kept.

        Each is (2, parts, R): the vectors of the weight's matrices, and the ones before.
        """
        return {name: v_2PR.clone() for name, v_2PR in self._vectors.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes back what `state_dict` gave.

        Raises:
            InputError: A name is missing or unknown, or a shape differs.
        """
        for name in [*self._vectors, *state]:
            if name not in state or name not in self._vectors:
                what = "missing" if name not in state else "not expected"
                raise InputError(f"orthogonality state: the vector of {name!r} is {what}; other encoder or settings?")
            found, wanted = tuple(state[name].shape), tuple(self._vectors[name].shape)
            if found != wanted:
                raise InputError(f"orthogonality state: the vector of {name!r} has shape {found}, wanted {wanted}")
        self._vectors = {name: state[name].to(v_2PR, copy=True) for name, v_2PR in self._vectors.items()}

    # Groups ----------------------------------------------------------------------------------------------------------

    def _groups(self, frozen: bool = False) -> Iterator[tuple[list[Site], Tensor]]:
        """Gathers the sites of one matrix shape with their matrices as a stack, in at least float32.

        On a CPU a large matrix goes alone: there a batch saves it nothing, and the stack is a copy.
        """
        groups = defaultdict(list)
        for site in self._sites:
            if frozen or site.weight.requires_grad:
                alone = site.weight.device.type == "cpu" and math.prod(site.matrix_shape) >= _LARGE
                groups[site.matrix_shape, site.weight.dtype, site.name if alone else ""].append(site)
        for (_, dtype, _), sites in groups.items():
            weights = whole_each([site.weight for site in sites])  # sharded ones: this group's alone, one at a time
            stacks = [site.matrices(weight) for site, weight in zip(sites, weights, strict=True)]
            w_LOI = torch.cat(stacks) if len(stacks) > 1 else stacks[0]
            yield sites, w_LOI if dtype == torch.float64 else w_LOI.float()

    def _active_groups(self) -> Iterator[tuple[list[Site], Tensor, float]]:
        """The groups and the scale of each one's penalties at this step; nothing at a step without penalty."""
        strength = self.weight * self._factor * self.config.every
        if strength == 0 or self._step % self.config.every:
            return
        count = sum(site.parts for site in self._sites)
        for sites, w_LOI in self._groups():
            rows = min(sites[0].matrix_shape) if self.config.penalty in ("so", "dso") else 1
            yield sites, w_LOI, strength / (count * rows if self.config.normalize else 1)

    def _zero(self) -> Tensor:
        return torch.zeros((), device=self._sites[0].weight.device if self._sites else None)

    def _full_precision(self) -> torch.autocast:
        """Turns autocast off: G - I is a small difference of numbers near 1."""
        return torch.autocast(self._sites[0].weight.device.type if self._sites else "cpu", enabled=False)

    # SRIP's vectors --------------------------------------------------------------------------------------------------

    @property
    def _starts_fresh(self) -> bool:
        return self.config.penalty == "srip" and self.config.fresh_start

    def _arguments(self, sites: list[Site], w_LOI: Tensor) -> tuple[Tensor | int, ...]:
        """What the penalty takes besides the matrices."""
        if self._starts_fresh:
            generator = keyed_generator("srip", self.config.seed, self._step, *w_LOI.shape, device=w_LOI.device)
            shape = len(w_LOI), min(w_LOI.shape[1:])
            v_LR = torch.randn(shape, generator=generator, device=w_LOI.device, dtype=w_LOI.dtype)
            return v_LR, self.config.power_iterations
        return (penalties.ritz_vectors(w_LOI, self._stacked(sites, w_LOI)[0]),) if self._vectors else ()

    def _draw_vectors(self) -> None:
        for site in self._sites:
            generator = keyed_generator("srip", self.config.seed, site.name)
            v_PR = torch.randn(site.parts, min(site.matrix_shape), generator=generator, dtype=torch.float64)
            dtype = torch.promote_types(site.weight.dtype, torch.float32)
            v_2PR = torch.stack([nn.functional.normalize(v_PR, dim=1), torch.zeros_like(v_PR)])
            self._vectors[site.name] = v_2PR.to(site.weight.device, dtype)

    def _stacked(self, sites: list[Site], w_LOI: Tensor) -> Tensor:
        return torch.cat([self._vectors[site.name].to(w_LOI) for site in sites], dim=1)

    def _iterate(self, sites: list[Site], w_LOI: Tensor) -> None:
        if self._vectors:
            stacked_2LR = self._stacked(sites, w_LOI)
            self._keep(sites, penalties.power_iterate(w_LOI, stacked_2LR, self.config.power_iterations))

    def _keep(self, sites: list[Site], v_2LR: Tensor) -> None:
        parts = v_2LR.split([site.parts for site in sites], dim=1)
        self._vectors |= {site.name: v_2PR for site, v_2PR in zip(sites, parts, strict=True)}


def _accumulate(sites: list[Site], grad_LOI: Tensor, scale: float) -> None:
    grads, updates = [], []
    for site, update_POI in zip(sites, grad_LOI.split([site.parts for site in sites]), strict=True):
        weight = site.weight
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        grads.append(local_part(weight.grad))
        updates.append(local_part(shard_like(site.like_weight(update_POI), weight)))
    torch._foreach_add_(grads, updates, alpha=scale)
