"""The orthogonality regularizer of a model: a penalty with autograd, and its gradient in a few batched products.

The penalty is weight * schedule * (sum over matrices). For SO this pulls every singular value s by 4 weight s (s^2 -
1), whatever the size of its matrix; only the sum itself grows with the number of singular values. With `normalize`
each matrix counts alike: SO and DSO are divided by the number of singular values R = min(out, in * kh * kw), which for
SO leaves the mean of (s^2 - 1)^2; SRIP and mutual coherence are the largest deviation whatever R is, and stay; and the
sum over matrices becomes the mean. So the value has the same scale for narrow and wide, shallow and deep encoders.

With a `strength` there is no weight, and no optimizer rescales the penalty: after the optimizer's step each matrix
moves by A <- A - a_t (G - I) A (A is W, or W^T where that is wide), for SRIP along its vector alone. A small deviation
from orthogonality shrinks by 1 - 2 a_t, so a_t = strength / 2 * (the step's share of the run) leaves exp(-strength) of
it at the end; the share is the learning rate's (`strength.Course`). A step further than 0.5 / max(1, ||G - I||_2)
could overshoot: there a_t is bounded, matrix by matrix, by a norm that is at least as large, Frobenius' for SO. With
other targets something else stands for G - I, and the same holds.
"""

from __future__ import annotations

import functools
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_ssl_or.distributed import gather_full_tensors, local_part, rank, shard_like
from hf_ssl_or.errors import InputError
from hf_ssl_or.models.configuration_ssl import OrthogonalityConfig
from hf_ssl_or.orthogonality import penalties
from hf_ssl_or.orthogonality.selection import ROUTINE, Selection, Site, count_kinds, kind, select
from hf_ssl_or.orthogonality.strength import Course, resolve_weight, schedule_factor
from hf_ssl_or.randomness import keyed_generator

_logger = logging.getLogger(__name__)

_LARGE = 2**20  # numbers of a matrix
_SCALE_FREE = ("scaled", "relaxed")  # targets of W / sqrt(c)
_BAND = (0.5, 1.5)

# Each penalty of stacks (L, O, I): with autograd, and with the gradient in closed form. SRIP takes vectors besides,
# "relaxed" its band, "start" the first Grams.
_FORMS: dict[str, tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor]]]] = {
    "so": (penalties.so, penalties.so_and_grad),
    "dso": (penalties.dso, penalties.dso_and_grad),
    "mutual_coherence": (penalties.mutual_coherence, penalties.mutual_coherence_and_grad),
    "srip": (penalties.srip_along, penalties.srip_along_and_grad),
    "srip_fresh": (penalties.srip_power, penalties.srip_power_and_grad),
    "relaxed": (penalties.relaxed, penalties.relaxed_and_grad),
    "start": (penalties.so_from, penalties.so_from_and_grad),
}


class OrthogonalityRegularizer:
    """Keeps the weight matrices of a module near orthogonal.

    Which they are, `orthogonality.selection` says, and `skipped` why others are not; construction logs a summary.

    Per optimizer step: backward with its all-reduce, `set_progress`, `add_gradients`, clip, the optimizer's step, and
    `step`. With a weight `add_gradients` does the work and `step` nothing, with a strength the other way round. Both
    depend on the weights alone, so they are the same on every process; gradients are added once, to those that have
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

        ```python
        regularizer = OrthogonalityRegularizer(encoder, OrthogonalityConfig(penalty="so", strength=2.0))
        for step, images in enumerate(batches):
            ...
            optimizer.step()
            regularizer.set_progress(step, len(batches))
            regularizer.step()
        ```

    Args:
        encoder: The module whose weights are regularized: hand over the backbone, not the method. Heads that
            transformers or timm name as such are left out.
        config: The settings. With penalty "none" every method does nothing.

    Raises:
        InputError: A pattern matches no weight, nothing is selected, a weight is parametrized or flattened, the paper
            has no weight for the encoder, or with target "start" the encoder is new.
    """

    def __init__(self, encoder: nn.Module, config: OrthogonalityConfig) -> None:
        active = config.penalty != "none"
        self.config = config
        self.decoupled = active and config.strength is not None
        self.weight = resolve_weight(encoder, config) if active and not self.decoupled else 0.0
        self._selection = select(encoder, config) if active else Selection([], {})
        self._sites = self._selection.sites
        self._step, self._factor = 0, 1.0
        self._total_steps: int | None = None
        self._course = Course(config.schedule)
        self._bounded: dict[tuple[str, ...], Tensor] = {}  # by the sites of a group: in how many steps, by matrix
        self._step_count = 0
        if active:
            name = config.penalty + ("_fresh" if self._starts_fresh else "")
            self._penalty, self._penalty_and_grad = _FORMS.get(config.target, _FORMS[name])
        self._vectors: dict[str, Tensor] = {}
        if config.penalty == "srip" and not self._starts_fresh:
            self._draw_vectors()
        self._starts: dict[str, Tensor] = {}
        if active and config.target == "start":
            _check_loaded(encoder)
            self._keep_starts()
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
        self._step, self._total_steps = step, total_steps
        self._factor = schedule_factor(self.config.schedule, step, total_steps)

    def follow(self, rate: Callable[[int], float] | None) -> None:
        """Spreads a strength over the run as the learning rate is, instead of evenly.

        Args:
            rate: The learning rate of each step from 0 to the last, in any unit; None for a constant one.
                `strength.rate_of` finds that of a scheduler.
        """
        self._course = Course(self.config.schedule, rate)

    def penalty(self) -> Tensor:
        """Returns the penalty as a scalar with autograd; weight, schedule and `every` are included.

        With a strength, which has no weight, it is the plain sum over matrices at every step.
        """
        total = self._zero()
        with self._full_precision():
            for sites, _, w_LOI, scale in self._active_groups():
                unit_LOI, _ = self._unit_scale(w_LOI)
                values_L = self._penalty(unit_LOI, *self._arguments(sites, unit_LOI))
                total = total + scale * values_L.sum().to(total.device)
        return total

    @torch.no_grad()
    def add_gradients(self) -> Tensor:
        """Adds the gradient of `penalty()` to the weights' `.grad`, in closed form, and advances SRIP's vectors.

        Matrices of one shape share batched products; there is no graph and no host synchronization. Call it where
        gradients are final: after the all-reduce, once for all accumulation steps, unscaled. At steps without penalty
        (`every`, a weight or factor of 0), and with a strength, it does nothing.

        Returns:
            The value of `penalty()`, a detached scalar; 0 where nothing was done.
        """
        total = self._zero()
        with self._full_precision():
            for sites, weights, w_LOI, scale in self._active_groups() if not self.decoupled else ():
                values_L, grad_LOI = self._values_and_grad(sites, w_LOI)
                total = total + scale * values_L.sum().to(total.device)
                _accumulate(sites, weights, grad_LOI, scale)
                self._iterate(sites, w_LOI)
        return total

    @torch.no_grad()
    def step(self) -> Tensor:
        """Takes the step of a strength, after the optimizer's; with a weight it does nothing.

        It does not look at the gradient: it is taken too where a loss scaler skips the optimizer's, because the
        strength is the sum over all steps. The run's last step warns of layers that were bounded in most steps.

        Returns:
            The sum of the penalties before the step, a detached scalar; 0 where nothing was done.

        Raises:
            InputError: `set_progress` was not called, so the length of the run is not known.
        """
        total = self._zero()
        if not self.decoupled:
            return total
        size = self._step_size() * self.config.every
        if size and self._step % self.config.every == 0:
            self._step_count += 1
            with self._full_precision():
                for sites, weights, w_LOI in self._groups():
                    values_L, update_LOI, bounded_L = self._decoupled_update(sites, w_LOI, size)
                    total = total + values_L.sum().to(total.device)
                    self._iterate(sites, w_LOI)
                    _move(sites, weights, update_LOI)
                    names = tuple(site.name for site in sites)
                    self._bounded[names] = self._bounded.get(names, 0) + bounded_L
        if self._step + 1 == self._total_steps:
            self._warn_of_bounds()
        return total

    @torch.no_grad()
    def step_sizes(self) -> dict[str, float]:
        """Returns how far the penalty moves each parameter at this step, as a length (the mean over `every` steps).

        With a strength it is that of `step`, to be compared with the optimizer's; with a weight that of the gradient
        which `add_gradients` adds, before the optimizer makes a step of it. Nothing is moved. Waits for the device: a
        diagnostic, not for every step.
        """
        squares: dict[str, Tensor] = {}
        with self._full_precision():
            for sites, _, w_LOI in self._groups():
                if self.decoupled:
                    _, update_LOI, _ = self._decoupled_update(sites, w_LOI, self._step_size())
                else:
                    _, grad_LOI = self._values_and_grad(sites, w_LOI)
                    update_LOI = self._scale(sites) / self.config.every * grad_LOI
                squares_L = update_LOI.abs().square().sum((1, 2))
                parts = squares_L.split([site.parts for site in sites])
                squares |= {site.name: part_P.sum() for site, part_P in zip(sites, parts, strict=True)}
        lengths = torch.stack([square.cpu() for square in squares.values()]).sqrt().tolist() if squares else []
        return dict(zip(squares, lengths, strict=True))

    def bounded(self) -> dict[str, float]:
        """Returns in which share of the steps so far, since start or resume, a parameter's step had to be bounded.

        Waits for the device: a diagnostic, not for every step.
        """
        parts = {site.name: site.parts for site in self._sites}
        shares: dict[str, float] = {}
        for names, count_L in self._bounded.items():
            counts = count_L.cpu().split([parts[name] for name in names])
            shares |= {
                name: count_P.max().item() / self._step_count for name, count_P in zip(names, counts, strict=True)
            }
        return shares

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
                v_LR = penalties.dominant_vectors(self._unit_scale(w_LOI)[0])
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
        """Returns a copy of what is kept by parameter name: SRIP's vectors, the Grams of target "start", or nothing.

        Vectors are (2, parts, R): those of the weight's matrices, and the ones before. Grams are (parts, R, R).
        """
        return {name: kept.clone() for name, kept in (self._vectors | self._starts).items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes back what `state_dict` gave.

        Raises:
            InputError: A name is missing or unknown, or a shape differs.
        """
        own, word = (self._starts, "Gram") if self._starts else (self._vectors, "vector")
        for name in [*own, *state]:
            if name not in state or name not in own:
                what = "missing" if name not in state else "not expected"
                raise InputError(f"orthogonality state: the {word} of {name!r} is {what}; other encoder or settings?")
            found, wanted = tuple(state[name].shape), tuple(own[name].shape)
            if found != wanted:
                raise InputError(f"orthogonality state: the {word} of {name!r} has shape {found}, wanted {wanted}")
        own |= {name: state[name].to(kept, copy=True) for name, kept in own.items()}

    def _log_summary(self) -> None:
        """Says once what is regularized and what is not; a warning where that may surprise."""
        skipped = self.skipped()
        sites = [site for site in self._sites if site.name not in skipped]
        taken = f"{len(sites)} weights ({sum(site.parts for site in sites)} matrices) are regularized"
        routine = sites and all(kind(reason) in ROUTINE for reason in skipped.values())
        line = f"orthogonality: {taken}; left out: {count_kinds(skipped.values())} (see skipped())"
        _log_once(logging.INFO if routine else logging.WARNING, line)

    def _warn_of_bounds(self) -> None:
        often = [name for name, share in self.bounded().items() if share > 0.5]
        if often and rank() == 0:
            _logger.warning(
                "orthogonality: strength %g was too much for a run of %d steps: more than half of the steps had to be "
                "bounded in %d layers (%s); take more steps or a smaller strength",
                self.config.strength,
                self._total_steps,
                len(often),
                ", ".join(often),
            )

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
        if not self.decoupled and (self.weight * self._factor == 0 or self._step % self.config.every):
            return
        for sites, weights, w_LOI in self._groups():
            yield sites, weights, w_LOI, self._scale(sites)

    def _scale(self, sites: list[Site]) -> float:
        """What the penalties of a group are multiplied with at a step at which they act."""
        if self.decoupled:
            return 1.0
        strength = self.weight * self._factor * self.config.every
        if not self.config.normalize:
            return strength
        rows = min(sites[0].matrix_shape) if self.config.penalty in ("so", "dso") else 1
        return strength / (sum(site.parts for site in self._sites) * rows)

    def _zero(self) -> Tensor:
        return torch.zeros((), device=self._sites[0].weight.device if self._sites else None)

    def _full_precision(self) -> torch.autocast:
        """Turns autocast off: G - I is a small difference of numbers near 1."""
        return torch.autocast(self._sites[0].weight.device.type if self._sites else "cpu", enabled=False)

    # One group -------------------------------------------------------------------------------------------------------

    def _unit_scale(self, w_LOI: Tensor) -> tuple[Tensor, Tensor | float]:
        """The matrices at which the penalty is evaluated, and the factor by which those of the model are larger."""
        return penalties.unit_scale(w_LOI) if self.config.target in _SCALE_FREE else (w_LOI, 1.0)

    def _values_and_grad(self, sites: list[Site], w_LOI: Tensor) -> tuple[Tensor, Tensor]:
        unit_LOI, root = self._unit_scale(w_LOI)
        values_L, grad_LOI = self._penalty_and_grad(unit_LOI, *self._arguments(sites, unit_LOI))
        if self.config.target in _SCALE_FREE:
            grad_LOI = penalties.without_scale(grad_LOI, unit_LOI)[0] / root
        return values_L, grad_LOI

    def _decoupled_update(self, sites: list[Site], w_LOI: Tensor, size: float) -> tuple[Tensor, Tensor, Tensor]:
        """Values; what the step takes away from the matrices; which matrices' steps are bounded.

        For SO, with M = G - I, a step of size 1 takes away M A, a quarter of the gradient, and ||M||_F is the root of
        the value. SRIP's is that along its vector v, (v^T M v) v v^T A: half of the gradient times the value, which is
        ||M||_2.
        """
        unit_LOI, root = self._unit_scale(w_LOI)
        values_L, grad_LOI = self._penalty_and_grad(unit_LOI, *self._arguments(sites, unit_LOI))
        if self.config.penalty == "srip":
            factor_L, norm_L = values_L / 2, values_L
        else:
            factor_L, norm_L = torch.full_like(values_L, 0.25), values_L.sqrt()
        if self.config.target in _SCALE_FREE:
            grad_LOI, along_L = penalties.without_scale(grad_LOI, unit_LOI)
            norm_L = norm_L + factor_L * along_L.abs()  # of M minus a multiple of I
        elif self.config.target == "start":  # relative to c of G_0, so that a strength means the same at any scale
            start_LRR = self._stacked_starts(sites, w_LOI)
            c_L = start_LRR.diagonal(dim1=1, dim2=2).real.mean(1).clamp_min(torch.finfo(values_L.dtype).tiny)
            factor_L = factor_L / c_L
            norm_L = (norm_L + start_LRR.abs().sum(2).amax(1)) / c_L  # at least ||G||_2 as well as ||G - G_0||_2
        bound_L = 0.5 / norm_L.clamp_min(1)
        scale_L11 = (bound_L.clamp_max(size) * factor_L)[:, None, None] * root
        return values_L, grad_LOI.mul_(scale_L11), bound_L < size

    def _step_size(self) -> float:
        """a_t, without `every`."""
        if self._total_steps is None:
            raise InputError(
                "orthogonality.strength: the length of the run is not known; call set_progress before step"
            )
        assert self.config.strength is not None, "a regularizer with a weight has no step"
        return self.config.strength / 2 * self._course.share(self._step, self._total_steps)

    # What target "start" keeps ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def _keep_starts(self) -> None:
        with self._full_precision():
            for sites, _, w_LOI in self._groups(frozen=True):
                grams = penalties.gram(w_LOI).split([site.parts for site in sites])
                self._starts |= {site.name: g_PRR.clone() for site, g_PRR in zip(sites, grams, strict=True)}

    def _stacked_starts(self, sites: list[Site], w_LOI: Tensor) -> Tensor:
        for site in sites:
            self._starts[site.name] = self._starts[site.name].to(w_LOI)  # once, after the model was moved
        return torch.cat([self._starts[site.name] for site in sites])

    # SRIP's vectors --------------------------------------------------------------------------------------------------

    @property
    def _starts_fresh(self) -> bool:
        return self.config.penalty == "srip" and self.config.fresh_start

    def _arguments(self, sites: list[Site], w_LOI: Tensor) -> tuple[Tensor | float, ...]:
        """What the penalty takes besides the matrices."""
        if self._starts_fresh:
            generator = keyed_generator("srip", self.config.seed, self._step, *w_LOI.shape, device=w_LOI.device)
            shape = len(w_LOI), min(w_LOI.shape[1:])
            v_LR = torch.randn(shape, generator=generator, device=w_LOI.device, dtype=w_LOI.dtype)
            return v_LR, self.config.power_iterations
        if self.config.target == "relaxed":
            low, high = self.config.band or _BAND
            return low, high
        if self.config.target == "start":
            return (self._stacked_starts(sites, w_LOI),)
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
            unit_LOI, _ = self._unit_scale(w_LOI)
            stacked_2LR = self._stacked(sites, w_LOI)
            self._keep(sites, penalties.power_iterate(unit_LOI, stacked_2LR, self.config.power_iterations))

    def _keep(self, sites: list[Site], v_2LR: Tensor) -> None:
        parts = v_2LR.split([site.parts for site in sites], dim=1)
        self._vectors |= {site.name: v_2PR for site, v_2PR in zip(sites, parts, strict=True)}


def _accumulate(sites: list[Site], weights: list[nn.Parameter], grad_LOI: Tensor, scale: float) -> None:
    grads = []
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        grads.append(local_part(weight.grad))
    torch._foreach_add_(grads, _local_updates(sites, weights, grad_LOI), alpha=scale)


def _move(sites: list[Site], weights: list[nn.Parameter], update_LOI: Tensor) -> None:
    torch._foreach_sub_([local_part(weight) for weight in weights], _local_updates(sites, weights, update_LOI))


def _local_updates(sites: list[Site], weights: list[nn.Parameter], update_LOI: Tensor) -> list[Tensor]:
    """Each weight's part of a stack, in its form and sharded as it is."""
    parts = update_LOI.split([site.parts for site in sites])
    return [
        local_part(shard_like(site.like_weight(update_POI, weight), weight))
        for site, weight, update_POI in zip(sites, weights, parts, strict=True)
    ]


def _check_loaded(encoder: nn.Module) -> None:
    """Refuses a model of transformers or of this package that says it is new; other modules do not say."""
    if not isinstance(encoder, PreTrainedModel):
        return
    config: Any = encoder.config
    if not config.name_or_path and not getattr(config, "pretraining", None):
        raise InputError(
            "orthogonality.target: start keeps the Gram matrices of loaded weights, and these are new; load some "
            "(encoder.init_from, from_pretrained), or say where they are from in encoder.config.name_or_path"
        )


@functools.cache
def _log_once(level: int, line: str) -> None:
    _logger.log(level, line)
