"""Views that a program's callables return, of one image at a time, under random states that the image keys.

A transform of torchvision that is called on a batch samples one set of parameters for all of its images, so a callable
is called once for each image and view. What it takes from the global random states of torch (on the CPU), Python and
numpy depends on (seed, epoch, view, image) alone: views depend neither on the number of processes nor on when a run
was resumed. The states are restored afterwards.
"""

from __future__ import annotations

import contextlib
import pickle
import random
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from hf_ssl_or.data.decode import DecodeJob, decode, first_readable
from hf_ssl_or.data.pixel_store import PixelStore
from hf_ssl_or.errors import InputError
from hf_ssl_or.models.image_conversion import Preprocessing, scale_pixels
from hf_ssl_or.randomness import hashed_seed

_SLACK = 1e-3  # by which a filter may leave [0, 1]


@dataclass(frozen=True)
class CallablePlan:
    """What a step wants of callables: the places of its images in their set, and the pass over the data."""

    index_B: np.ndarray
    epoch: int


class CallableViews:
    """The callables of one list of views.

    They are tried on one image: whether they take its bytes, and how large their views are.

    Args:
        functions: Each takes one image as a batch (1, C, H, W), at its own aspect ratio: uint8 where the set has 8
            bits, else float32 in [0, 1]. (One that refuses uint8, as those of kornia do, gets float32 too.) It returns
            one view (1, C, h, w), uint8 or floats in [0, 1], which is normalized after it.
        numbers: Number of each view.
        seed: Seed of the run.
        preprocessing: Range of the values.
        trial_HWC: The pixels of an image.

    Attributes:
        size: Height and width of the views.

    Raises:
        InputError: A function fails, or returns something else than one view.
    """

    def __init__(
        self,
        functions: Sequence[Callable[[Tensor], Tensor]],
        numbers: Sequence[int],
        *,
        seed: int,
        preprocessing: Preprocessing,
        trial_HWC: np.ndarray,
    ) -> None:
        self._functions, self._numbers = tuple(functions), tuple(numbers)
        self._seed, self._preprocessing, self.size = seed, preprocessing, (0, 0)
        self._takes_bytes = [True] * len(functions)
        with _kept_random_states(), torch.no_grad():
            for i, function in enumerate(functions):
                size = self._try(i, function, trial_HWC)
                if i and size != self.size:
                    raise InputError(
                        f"views: {_name(function)} makes views of {_sides(size)} pixels, {_name(functions[0])} of "
                        f"{_sides(self.size)}; all views of a list have one size"
                    )
                self.size = size

    def __len__(self) -> int:
        return len(self._functions)

    @property
    def picklable(self) -> bool:
        """Whether worker processes can call the functions."""
        try:
            pickle.dumps(self._functions)
        except Exception:  # pickle fails in more ways than can be listed
            return False
        modules = [function for function in self._functions if isinstance(function, nn.Module)]
        return not any(tensor.is_cuda for module in modules for tensor in module.state_dict().values())

    def render(self, pixels_HWC: np.ndarray, index: int, epoch: int) -> Tensor:
        """Makes all views of an image: (V, C, h, w), float32 in [0, 1].

        Args:
            pixels_HWC: The image as it is stored.
            index: Its place in the set.
            epoch: Pass over the data.
        """
        with torch.no_grad():
            views = [self._call(i, pixels_HWC, index, epoch) for i in range(len(self))]
        for view_1CHW, function in zip(views, self._functions, strict=True):
            if (size := tuple(view_1CHW.shape[2:])) != self.size:
                raise InputError(
                    f"views: {_name(function)} makes a view of {_sides(size)} pixels of image {index}, of others "
                    f"{_sides(self.size)}; end it with a crop or a resize to one size"
                )
        return torch.cat(views)

    def _try(self, i: int, function: Callable[[Tensor], Tensor], trial_HWC: np.ndarray) -> tuple[int, int]:
        try:
            view_1CHW = self._call(i, trial_HWC, 0, 0)
        except InputError as first_error:
            if not self._gives_bytes(trial_HWC, i):
                raise
            self._takes_bytes[i] = False
            try:
                view_1CHW = self._call(i, trial_HWC, 0, 0)
            except InputError:
                raise first_error from first_error.__cause__
        height, width = view_1CHW.shape[2:]
        return height, width

    def _gives_bytes(self, pixels_HWC: np.ndarray, i: int) -> bool:
        return self._takes_bytes[i] and pixels_HWC.dtype == np.uint8 and self._preprocessing.value_range == (0, 255)

    def _call(self, i: int, pixels_HWC: np.ndarray, index: int, epoch: int) -> Tensor:
        """Makes one view of an image, and checks it."""
        function, channels = self._functions[i], pixels_HWC.shape[2]
        image_1CHW = torch.from_numpy(pixels_HWC.transpose(2, 0, 1)[None].copy())  # which functions may write to
        if not self._gives_bytes(pixels_HWC, i):
            image_1CHW = scale_pixels(image_1CHW, self._preprocessing.value_range)
        _seed_random_states(hashed_seed(self._seed, "callable view", epoch, self._numbers[i], index))
        try:
            view = function(image_1CHW)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"views: {_name(function)} fails on image {index}: {reason}") from error
        return _checked(view, _name(function), channels)


def _checked(view: Any, name: str, channels: int) -> Tensor:
    """Returns a view as float32 in [0, 1] on the CPU."""
    if not isinstance(view, Tensor):
        raise InputError(f"views: {name} returns {type(view).__name__}, not a tensor (1, C, h, w)")
    if view.ndim != 4 or len(view) != 1 or not view.numel():
        raise InputError(f"views: {name} returns {tuple(view.shape)} for one image; return one view, (1, C, h, w)")
    if view.shape[1] != channels:
        raise InputError(f"views: {name} returns {view.shape[1]} channels for an image of {channels}")
    if view.dtype != torch.uint8 and not view.is_floating_point():
        raise InputError(f"views: {name} returns {view.dtype}; return uint8, or floats in [0, 1]")
    view = view.detach().cpu().as_subclass(Tensor)
    if view.dtype == torch.uint8:
        return view.float() / 255
    low, high = (float(bound) for bound in view.aminmax())
    if not (low >= -_SLACK and high <= 1 + _SLACK):  # of NaN both comparisons are false
        raise InputError(
            f"views: {name} returns values from {low:.3g} to {high:.3g}, not in [0, 1]; leave normalization to the "
            "trainer"
        )
    return view.float().clamp(0, 1)


def _name(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _sides(size: Sequence[int]) -> str:
    return f"{size[0]} x {size[1]}"


@contextlib.contextmanager
def _kept_random_states() -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _seed_random_states(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


@dataclass(frozen=True)
class Failure:
    """An error of a worker process, which torch would wrap in many lines."""

    message: str
    cause: BaseException | None

    @classmethod
    def of(cls, error: InputError) -> Failure:
        """Takes the error's cause along: one of Python's own as it is, of any other its traceback as text.

        An exception of somebody's own class may not come back from the worker's queue.
        """
        cause = error.__cause__
        plain = cause is None or all(isinstance(value, str | int | float | None) for value in cause.args)
        if plain and type(cause).__module__ == "builtins":
            return cls(str(error), cause)
        return cls(str(error), RuntimeError("".join(traceback.format_exception(cause))))


def render_all(
    images: Sequence[np.ndarray], plan: CallablePlan, lists: Sequence[CallableViews]
) -> list[Tensor] | Failure:
    """Makes the callable views of a batch: (V, B, C, h, w) float32 in [0, 1] for each list."""
    with _kept_random_states():
        try:
            return [
                torch.stack(
                    [
                        views.render(pixels, int(index), plan.epoch)
                        for pixels, index in zip(images, plan.index_B, strict=True)
                    ],
                    dim=1,
                )
                for views in lists
            ]
        except InputError as error:
            return Failure.of(error)


class CallableViewMaker(Dataset):
    """Reads the images of a batch and calls the functions.

    Args:
        job: The images.
        store: The images as they are stored; None decodes them.
        lists: The functions.
    """

    def __init__(self, job: DecodeJob, store: PixelStore | None, lists: Sequence[CallableViews]) -> None:
        self._job, self._store, self._lists = job, store, lists

    def __getitem__(self, plan: CallablePlan) -> tuple[list[Tensor] | Failure, np.ndarray, dict[int, str]]:
        failures: dict[int, str] = {}
        if self._store is not None:
            return render_all([self._store[int(i)] for i in plan.index_B], plan, self._lists), plan.index_B, failures
        found = [
            first_readable(self._job, int(i), lambda row: decode(self._job.source, row, self._job), failures)
            for i in plan.index_B
        ]
        made = render_all([image.pixels for image, _ in found], plan, self._lists)
        return made, np.array([place for _, place in found]), failures
