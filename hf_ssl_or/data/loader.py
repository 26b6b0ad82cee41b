"""Steps of a run: which images, which views, for this process; a function of (seed, step) and nothing else."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from hf_ssl_or.data.augmentation_sampling import ViewGroup, ViewPlan
from hf_ssl_or.data.image_dataset import ImageSet
from hf_ssl_or.errors import InputError
from hf_ssl_or.structures import MultiViewBatch, ViewSpec


class ViewLoader:
    """Yields each step's views to one process of a run.

    An epoch takes the images in an order keyed by (seed, epoch), see `data.order`, in global batches; an incomplete
    last one is dropped. Process r takes the r-th contiguous part of each global batch. So the processes' batches
    together are the single process's batch, whatever their number, and any step can be the first after a restart.

    On a GPU the next step's views are rendered on a stream of their own while the current step runs.

    Args:
        images: The set.
        views: Global views, at least two.
        local_views: Smaller views, or none.
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
        InputError: The batch does not fit the set or the processes, or there are fewer than two views.
    """

    def __init__(
        self,
        images: ImageSet,
        views: Sequence[ViewSpec],
        *,
        local_views: Sequence[ViewSpec] = (),
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        prefetch: bool = True,
    ) -> None:
        _check(len(images), images.name, len(views), batch_size, world_size)
        self.device = torch.device(device)
        self.images = images
        self.views, self.local_views = tuple(views), tuple(local_views)
        self.batch_size, self.seed = batch_size, seed
        self.rank, self.world_size = rank, world_size
        self._order = images.order(batch_size, seed)
        self.steps_per_epoch = self._order.steps_per_epoch
        self.wait_s = 0.0
        self._prefetch = prefetch and self.device.type == "cuda"

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
        for step, rendered in zip(steps, self.images.views(map(self._plan, steps), self.device), strict=True):
            yield self._batch(step, *rendered)

    def _plan(self, step: int) -> ViewPlan:
        groups = [(self.views, 0)] + ([(self.local_views, len(self.views))] if self.local_views else [])
        epoch, size = step // self.steps_per_epoch, self.images.image_size
        return ViewPlan(
            self.indices(step),
            tuple(
                ViewGroup(specs=specs, size=size, seed=self.seed, epoch=epoch, first_view=first)
                for specs, first in groups
            ),
        )

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
