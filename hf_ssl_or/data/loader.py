"""Steps of a run: which images, which views, for this process; a function of (seed, step) and nothing else."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from hf_ssl_or.data.augmentation_sampling import ViewGroup, ViewPlan, check_channels
from hf_ssl_or.data.callable_views import CallablePlan, CallableViews
from hf_ssl_or.data.image_dataset import ImageSet
from hf_ssl_or.data.size_schedule import SizeSchedule
from hf_ssl_or.errors import InputError
from hf_ssl_or.structures import MultiViewBatch, ViewSpec

View = ViewSpec | Callable[[Tensor], Tensor]


class ViewLoader:
    """Yields each step's views to one process of a run.

    An epoch takes the images in an order keyed by (seed, epoch), see `data.sampling`, in global batches; an incomplete
    last one is dropped. Process r takes the r-th contiguous part of each global batch. So the processes' batches
    together are the single process's batch, whatever their number, and any step can be the first after a restart.

    On a GPU the next step's views are rendered on a stream of their own while the current step runs.

    Args:
        images: The set.
        views: Global views, at least one: specs, or callables, see `callable_views`.
        local_views: Smaller views, likewise, or none.
        batch_size: Images per step over all processes.
        seed: Seed of the run.
        device: Where the views are wanted.
        rank: This process's number.
        world_size: Number of processes.
        prefetch: Renders one step ahead on a GPU.

    Attributes:
        steps_per_epoch: Steps in one pass over the images.
        wait_s: Seconds that the consumer has waited for batches in total (on a GPU: the host's part).

    Raises:
        InputError: The batch does not fit the set or the processes, there is no view, one needs other channels, or a
            callable returns something else than one view of an image.
    """

    def __init__(
        self,
        images: ImageSet,
        views: Sequence[View],
        *,
        local_views: Sequence[View] = (),
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        prefetch: bool = True,
    ) -> None:
        _check(len(images), images.name, len(views), batch_size, world_size)
        lists = [_ViewList(views, 0)] + ([_ViewList(local_views, len(views))] if local_views else [])
        specs = [spec for views in lists for spec in views.specs]
        if (problem := check_channels(specs, images.preprocessing.num_channels)) is not None:
            raise InputError(f"views: {problem}")
        self.device = torch.device(device)
        self.images = images
        self.views, self.local_views = tuple(views), tuple(local_views)
        self.batch_size, self.seed = batch_size, seed
        self.rank, self.world_size = rank, world_size
        self._lists = lists
        self._callables = [_callable_views(views, images, seed) for views in lists if views.functions]
        self._order = images.order(batch_size, seed)
        self.steps_per_epoch = self._order.steps_per_epoch
        self.wait_s = 0.0
        self._schedule: SizeSchedule | None = None
        self._total_steps = 0
        self._specs = {
            images.image_size: [views.specs for views in lists]
        }  # of each list, by size of the global views
        self._prefetch = prefetch and self.device.type == "cuda"

    def follow(self, schedule: SizeSchedule, total_steps: int) -> None:
        """Makes the size of the views a function of the epoch.

        Args:
            schedule: The sizes.
            total_steps: Steps of the whole run.
        """
        self._schedule, self._total_steps, side = schedule, total_steps, self.images.image_size
        self._specs = {
            size: [schedule.resized(views.specs, size, side) for views in self._lists] for size in schedule.sizes
        }

    def view_size(self, step: int) -> int:
        """Returns the side of a step's global views; without a schedule, that of views that name no size."""
        if self._schedule is None:
            return self.images.image_size
        return self._schedule.size(step // self.steps_per_epoch, self.steps_per_epoch, self._total_steps)

    def batches(self, start_step: int, stop_step: int) -> Iterator[MultiViewBatch]:
        """Yields the batches of global steps start_step, ..., stop_step - 1, over any number of epochs."""
        produced = self._render_ahead(start_step, stop_step) if self._prefetch else self._render(start_step, stop_step)
        while True:
            asked = time.perf_counter()
            batch = next(produced, None)
            self.wait_s += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def indices(self, step: int) -> np.ndarray:
        """Returns the indices of this process's images at a global step."""
        size = self.batch_size // self.world_size
        return self._order.indices(step, self.rank * size, size)

    def _render(self, start_step: int, stop_step: int) -> Iterator[MultiViewBatch]:
        steps = range(start_step, stop_step)
        plans = map(self._plan, steps)
        rendered = self._with_callables(steps) if self._callables else self.images.views(plans, self.device)
        for step, (views, index_B) in zip(steps, rendered, strict=True):
            yield self._batch(step, views, index_B)

    def _plan(self, step: int) -> ViewPlan:
        epoch, size = step // self.steps_per_epoch, self.view_size(step)
        return ViewPlan(
            self.indices(step),
            tuple(
                ViewGroup(specs=specs, size=size, seed=self.seed, epoch=epoch, first_view=views.first)
                for views, specs in zip(self._lists, self._specs[size], strict=True)
                if specs
            ),
        )

    def _with_callables(self, steps: range) -> Iterator[tuple[list[Tensor], np.ndarray]]:
        """Yields views of which callables return some: these come first, then those of specs, of the same images."""
        callable_plans = (CallablePlan(self.indices(step), step // self.steps_per_epoch) for step in steps)
        called = self.images.callable_views(callable_plans, self._callables, self.device)
        if not any(views.specs for views in self._lists):
            yield from called
            return
        waiting: deque[list[Tensor]] = deque()

        def plans() -> Iterator[ViewPlan]:
            for step, (made, index_B) in zip(steps, called, strict=True):
                waiting.append(made)
                yield replace(self._plan(step), index_B=index_B)

        for rendered, index_B in self.images.views(plans(), self.device):
            specs, made = iter(rendered), iter(waiting.popleft())
            yield [views.joined(specs, made) for views in self._lists], index_B

    def _batch(self, step: int, views: list[Tensor], index_B: np.ndarray) -> MultiViewBatch:
        labels, index = self.images.labels, torch.from_numpy(index_B.astype(np.int64))
        return MultiViewBatch(
            views_VBCHW=views[0],
            index_B=_to_device(index, self.device),
            labels_B=None if labels is None else _to_device(labels[index], self.device),
            local_views_VBCHW=views[1] if self.local_views else None,
            seed=self.seed,
            step=step,
        )

    def _render_ahead(self, start_step: int, stop_step: int) -> Iterator[MultiViewBatch]:
        """Renders step k + 1 on a side stream before step k is handed out."""
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        rendered, waiting = self._render(start_step, stop_step), None
        while True:
            with torch.cuda.stream(side):
                batch = next(rendered, None)
                done = side.record_event()
            if waiting is not None:
                yield _hand_over(*waiting, torch.cuda.current_stream(self.device))
            if batch is None:
                return
            waiting = batch, done


class _ViewList:
    """Views of one size, in order: which are specs, which are callables.

    Args:
        views: The views.
        first: Number of the first.
    """

    def __init__(self, views: Sequence[View], first: int) -> None:
        self.first, self._are_specs = first, [isinstance(view, ViewSpec) for view in views]
        self.specs = tuple(view for view in views if isinstance(view, ViewSpec))
        self.functions = {i: view for i, view in enumerate(views, start=first) if not isinstance(view, ViewSpec)}
        for i, view in self.functions.items():
            if not callable(view):
                raise InputError(f"views: view {i} is a {type(view).__name__}; give a ViewSpec, or a callable")

    def joined(self, specs: Iterator[Tensor], made: Iterator[Tensor]) -> Tensor:
        """Takes the list's views from those of specs and those of callables, (V, B, C, H, W) each, in its order."""
        if not self.functions or not self.specs:
            return next(specs if self.specs else made)
        parts = {True: iter(next(specs)), False: iter(next(made))}
        return torch.stack([next(parts[is_spec]) for is_spec in self._are_specs])


def _callable_views(views: _ViewList, images: ImageSet, seed: int) -> CallableViews:
    """Tries the callables of a list on an image."""
    called = CallableViews(
        list(views.functions.values()),
        list(views.functions),
        seed=seed,
        preprocessing=images.preprocessing,
        trial_HWC=images.full_image(0),
    )
    if views.specs:
        size = views.specs[0].size or images.image_size
        if called.size != (size, size):
            raise InputError(
                f"views: callables return views of {called.size[0]} x {called.size[1]} pixels, specs of {size} x "
                f"{size}; all views of a list have one size"
            )
    return called


def _hand_over(batch: MultiViewBatch, done: torch.cuda.Event, stream: torch.cuda.Stream) -> MultiViewBatch:
    """Makes `stream` wait for the batch, and the allocator wait for `stream` before it reuses the batch's memory."""
    stream.wait_event(done)
    for tensor in (batch.views_VBCHW, batch.local_views_VBCHW, batch.index_B, batch.labels_B):
        if tensor is not None:
            tensor.record_stream(stream)
    return batch


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _check(images: int, name: str, views: int, batch_size: int, world_size: int) -> None:
    if views < 1:
        raise InputError("views: each image gives at least 1 view, not 0")
    if batch_size < world_size or batch_size % world_size:
        raise InputError(
            f"training.batch_size: {batch_size} images do not divide among {world_size} processes; take a multiple"
        )
    if batch_size > images:
        raise InputError(f"training.batch_size: {batch_size} is more than the {images} images of {name}")
