"""Progressive resolution: the size of the views as a function of the epoch. Early epochs on smaller views cost less.

Crops are sampled in pixels of the originals, so a smaller view is the same view at fewer pixels: its geometry and
colors are sampled as ever, and its blur, whose width counts pixels of the view, shrinks with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hf_ssl_or.errors import InputError
from hf_ssl_or.structures import ViewSpec

_KEY = "views.size_schedule"


def check_size_schedule(steps: Any) -> list[list[Any]]:
    """Returns the steps of a schedule, [share of the run at which it begins, side of the global views in pixels] each.

    Raises:
        InputError: They are no such pairs, do not begin at 0, are not in order, or a size is none.
    """
    if not isinstance(steps, list | tuple) or not steps or not all(map(_is_pair, steps)):
        raise InputError(f"{_KEY}: pairs [share of the run, size] are wanted, [[0, 16], [0.5, 32]], not {steps!r:.80}")
    shares = [share for share, _ in steps]
    for share, size in steps:
        if not isinstance(size, int) or size < 1:
            raise InputError(f"{_KEY}: a size is a number of pixels, at least 1, not {size!r}")
        if not 0 <= share < 1:
            raise InputError(
                f"{_KEY}: a share of the run lies in [0, 1), not {share:g}; epoch 50 of 100 begins at 0.5"
            )
    if shares[0] != 0:
        raise InputError(f"{_KEY}: the first step begins at 0, not at {shares[0]:g}")
    if any(later <= earlier for earlier, later in zip(shares, shares[1:], strict=False)):
        raise InputError(
            f"{_KEY}: each step begins after the one before, not at {', '.join(f'{s:g}' for s in shares)}"
        )
    return [list(step) for step in steps]


def _is_pair(step: Any) -> bool:
    number = isinstance(step, list | tuple) and len(step) == 2 and isinstance(step[0], int | float)
    return number and not any(isinstance(value, bool) for value in step)


@dataclass(frozen=True, kw_only=True)
class SizeSchedule:
    """How large the views of each epoch are.

    Attributes:
        steps: See `check_size_schedule`.
        full_size: Side of the global views in pixels where there is no schedule.
        multiple: Sides of the smaller local views are rounded to multiples of so many pixels, a patch of the encoder.
    """

    steps: Sequence[Sequence[Any]]
    full_size: int
    multiple: int = 1

    @property
    def sizes(self) -> list[int]:
        """Returns the side of the global views in each step."""
        return [size for _, size in self.steps]

    def size(self, epoch: int, steps_per_epoch: int, total_steps: int) -> int:
        """Returns the side of an epoch's global views: all of an epoch has one size.

        It is that of the last step of the schedule that begins before the epoch ends. So the last size is always
        reached, and in a run of one epoch it is the only one.
        """
        end = (epoch + 1) * steps_per_epoch / total_steps
        return [size for share, size in self.steps if share < end][-1]

    def describe(self, steps_per_epoch: int, total_steps: int) -> str:
        """Says from which epoch on views have which size in a run of so many steps."""
        parts, last = [], None
        for epoch in range(-(-total_steps // steps_per_epoch)):
            if (size := self.size(epoch, steps_per_epoch, total_steps)) != last:
                parts.append(f"{size} pixels from epoch {epoch}")
                last = size
        return f"views of {', '.join(parts)}"

    def resized(self, specs: Sequence[ViewSpec], size: int, image_size: int) -> tuple[ViewSpec, ...]:
        """Returns the specs of views for the time when the global ones have a size.

        Args:
            specs: Specs of the run, of global or of local views, which shrink by the same factor.
            size: Side of the global views then.
            image_size: Side of views that name no size.
        """
        return tuple(self._resized(spec, size, image_size) for spec in specs)

    def _resized(self, spec: ViewSpec, size: int, image_size: int) -> ViewSpec:
        own, multiple = spec.size or image_size, self.multiple
        side = size if own == self.full_size else own * size / self.full_size
        side = max(multiple, int(side / multiple + 0.5) * multiple)
        low, high, factor = *spec.blur_sigma, side / own
        return replace(spec, size=side, blur_sigma=(low * factor, high * factor))


def full_size(views: Sequence[Any], image_size: int) -> int:
    """Returns the side of the first of some views where there is no schedule.

    Raises:
        InputError: A callable makes views, of a size of its own.
    """
    if not all(isinstance(view, ViewSpec) for view in views):
        raise InputError(f"{_KEY}: a callable makes views of its own size; give ViewSpec objects, or no schedule")
    return views[0].size or image_size
