"""The orthogonality regularizer of a model: a penalty with autograd, and its gradient in a few batched products.

The penalty is weight * schedule * (sum over matrices). For SO this pulls every singular value s by 4 weight s (s^2 -
1), whatever the size of its matrix; only the sum itself grows with the number of singular values. With `normalize`
each matrix counts alike: SO and DSO are divided by the number of singular values R = min(out, in * kh * kw), which for
SO leaves the mean of (s^2 - 1)^2; SRIP and mutual coherence are the largest deviation whatever R is, and stay; and the
sum over matrices becomes the mean. So the value has the same scale for narrow and wide, shallow and deep encoders.
"""

from __future__ import annotations

import functools
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from hf_ssl_or.distributed import gather_full_tensors, local_part, rank, shard_like
from hf_ssl_or.errors import InputError
from hf_ssl_or.models.configuration_ssl import OrthogonalityConfig
from hf_ssl_or.orthogonality import penalties
from hf_ssl_or.orthogonality.selection import ROUTINE, Selection, Site, count_kinds, kind, select
from hf_ssl_or.orthogonality.strength import resolve_weight, schedule_factor
from hf_ssl_or.randomness import keyed_generator

_logger = logging.getLogger(__name__)

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
    """Keeps the weight matrices of a module near orthogonal.

    Which they are, `orthogonality.selection` says, and `skipped` why others are not; construction logs a summary.

    Per optimizer step: backward with its all-reduce, `set_progress`, `add_gradients`, clip, step. Penalty and gradient
    depend on the weights alone, so they are the same on every process, and they are added once, to gradients that have
    been averaged and accumulated. Weights that are frozen when a method is called are left out.

    Weights are looked up by name at each call, so they may be moved, cast, loaded or replaced by others of the same
    shape. One that has been parametrized, emptied or reshaped since is refused by name.

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
        encoder: The module whose weights are regularized: hand over the backbone, not the method. Heads that
            transformers or timm name as such are left out.
        config: The settings. With penalty "none" every method does nothing.

    Raises:
        InputError: A pattern matches no weight, nothing is selected, a weight is parametrized or flattened, or the
            paper has no weight for the encoder.
    """

    def __init__(self, encoder: nn.Module, config: OrthogonalityConfig) -> None:
        active = config.penalty != "none"
        self.config = config
        self.weight = resolve_weight(encoder, config) if active else 0.0
        self._selection = select(encoder, config) if active else Selection([], {})
        self._sites = self._selection.sites
        self._step, self._factor = 0, 1.0
        if active:
            self._penalty, self._penalty_and_grad = _FORMS[config.penalty + ("_fresh" if self._starts_fresh else "")]
        self._vectors: dict[str, Tensor] = {}
        if config.penalty == "srip" and not self._starts_fresh:
            self._draw_vectors()
        if active and rank() == 0:
            self._log_summary()

    @property
    def names(self) -> list[str]:
        """Names of the selected parameters, frozen ones too, in the encoder's order."""
        return [site.name for site in self._sites]

    def skipped(self) -> dict[str, str]:
        """Returns why each other parameter of at least two dimensions is not regularized, now, by its name.

        A reason is a kind, such as "embedding", "head" or "frozen", or a kind and its particulars: "tied: counted as
        'wte.weight'". A frozen weight is among `names` too, because its error is measured.
        """
        frozen = {site.name: "frozen: requires_grad is False" for site in self._sites if not site.weight.requires_grad}
        return self._selection.skipped | frozen

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
        """Returns the penalty as a scalar with autograd; weight, schedule and `every` are included."""
        total = self._zero()
        with self._full_precision():
            for sites, _, w_LOI, scale in self._active_groups():
                values_L = self._penalty(w_LOI, *self._arguments(sites, w_LOI))
                total = total + scale * values_L.sum().to(total.device)
        return total

    @torch.no_grad()
    def add_gradients(self) -> Tensor:
        """Adds the gradient of `penalty()` to the weights' `.grad`, in closed form, and advances SRIP's vectors.

        Matrices of one shape share batched products; there is no graph and no host synchronization. Call it where
        gradients are final: after the all-reduce, once for all accumulation steps, unscaled. At steps without penalty
        (`every`, a weight or factor of 0) it does nothing.

        Returns:
            The value of `penalty()`, a detached scalar.
        """
        total = self._zero()
        with self._full_precision():
            for sites, weights, w_LOI, scale in self._active_groups():
                values_L, grad_LOI = self._penalty_and_grad(w_LOI, *self._arguments(sites, w_LOI))
                total = total + scale * values_L.sum().to(total.device)
                _accumulate(sites, weights, grad_LOI, scale)
                self._iterate(sites, w_LOI)
        return total

    @torch.no_grad()
    def advance(self) -> None:
        """Iterates SRIP's vectors `power_iterations` times on the weights as they are; other penalties have none."""
        with self._full_precision():
            for sites, _, w_LOI in self._groups():
                self._iterate(sites, w_LOI)

    @torch.no_grad()
    def exact_vectors(self) -> None:
        """Sets SRIP's vectors to the exact eigenvectors by full decomposition: slow, for measuring and testing."""
        with self._full_precision():
            for sites, _, w_LOI in self._groups() if self._vectors else ():
                v_LR = penalties.dominant_vectors(w_LOI)
                self._keep(sites, torch.stack([v_LR, torch.zeros_like(v_LR)]))

    @torch.no_grad()
    def errors(self) -> dict[str, float]:
        """Returns ||G - I||_F of each matrix, G its smaller Gram, by the name of its parameter.

        Where a parameter holds several matrices, the name has a suffix: "[q]", "[k]" and "[v]" of fused attention
        weights; the gates of a recurrent one, "[i]", "[f]", "[g]" and "[o]" or "[r]", "[z]" and "[n]"; "[expert 3]"; a
        number where a bare parameter is a stack. Groups of a convolution have one value, the root of the sum of
        squares.

        Frozen weights are included. Waits for the device: a diagnostic, not for every step.
        """
        squares: dict[str, Tensor] = {}
        with self._full_precision():
            for sites, _, w_LOI in self._groups(frozen=True):
                for site, part_P in zip(sites, penalties.so(w_LOI).split([site.parts for site in sites]), strict=True):
                    values_P = part_P if site.layout.labels else part_P.sum()[None]
                    squares |= zip(site.matrix_names, values_P.unbind(), strict=True)
        names = [name for site in self._sites for name in site.matrix_names]
        values = torch.stack([squares[name].cpu() for name in names]).sqrt().tolist() if names else []
        return dict(zip(names, values, strict=True))

    def state_dict(self) -> dict[str, Tensor]:
        """Returns a copy of SRIP's vectors by parameter name; empty where none is kept.

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

    def _log_summary(self) -> None:
        """Says once what is regularized and what is not; a warning where that may surprise."""
        skipped = self.skipped()
        sites = [site for site in self._sites if site.name not in skipped]
        taken = f"{len(sites)} weights ({sum(site.parts for site in sites)} matrices) are regularized"
        routine = sites and all(kind(reason) in ROUTINE for reason in skipped.values())
        line = f"orthogonality: {taken}; left out: {count_kinds(skipped.values())} (see skipped())"
        _log_once(logging.INFO if routine else logging.WARNING, line)

    # Groups ----------------------------------------------------------------------------------------------------------

    def _groups(self, frozen: bool = False) -> Iterator[tuple[list[Site], list[nn.Parameter], Tensor]]:
        """Gathers the sites of one matrix shape, their weights, and the matrices as a stack, in at least float32.

        On a CPU a large matrix goes alone: there a batch saves it nothing, and the stack is a copy.
        """
        groups = defaultdict(list)
        for site in self._sites:
            weight = site.weight
            if frozen or weight.requires_grad:
                alone = weight.device.type == "cpu" and math.prod(site.matrix_shape) >= _LARGE
                key = site.matrix_shape, weight.dtype, weight.device, site.name if alone else ""
                groups[key].append((site, weight))
        for (_, dtype, *_), members in groups.items():
            sites, weights = [site for site, _ in members], [weight for _, weight in members]
            gathered = gather_full_tensors(weights)  # sharded ones: this group's alone, one at a time
            stacks = [site.matrices(weight) for site, weight in zip(sites, gathered, strict=True)]
            w_LOI = torch.cat(stacks) if len(stacks) > 1 else stacks[0]
            yield sites, weights, w_LOI.to(torch.promote_types(dtype, torch.float32))

    def _active_groups(self) -> Iterator[tuple[list[Site], list[nn.Parameter], Tensor, float]]:
        """The groups and the scale of each one's penalties at this step; nothing at a step without penalty."""
        strength = self.weight * self._factor * self.config.every
        if strength == 0 or self._step % self.config.every:
            return
        count = sum(site.parts for site in self._sites)
        for sites, weights, w_LOI in self._groups():
            rows = min(sites[0].matrix_shape) if self.config.penalty in ("so", "dso") else 1
            yield sites, weights, w_LOI, strength / (count * rows if self.config.normalize else 1)

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


def _accumulate(sites: list[Site], weights: list[nn.Parameter], grad_LOI: Tensor, scale: float) -> None:
    grads, updates = [], []
    parts = grad_LOI.split([site.parts for site in sites])
    for site, weight, update_POI in zip(sites, weights, parts, strict=True):
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        grads.append(local_part(weight.grad))
        updates.append(local_part(shard_like(site.like_weight(update_POI, weight), weight)))
    torch._foreach_add_(grads, updates, alpha=scale)


@functools.cache
def _log_once(level: int, line: str) -> None:
    _logger.log(level, line)
