"""The images of a run: full, for views, and as the squares that an encoder gets in evaluation."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hf_ssl_or.data.augmentation_sampling import ViewGroup, ViewPlan, without_color
from hf_ssl_or.data.callable_views import CallablePlan, CallableViewMaker, CallableViews, Failure
from hf_ssl_or.data.decode import Decoded, DecodeJob, decode, decode_for_boxes, first_readable, note_unreadable
from hf_ssl_or.data.in_memory import ListSource
from hf_ssl_or.data.pixel_store import PixelStore, decode_to_disk, decode_to_memory
from hf_ssl_or.data.sampling import Order, ShuffledOrder
from hf_ssl_or.data.views import clean_views, crop_views, normalize_views, render_views, sample_parameters
from hf_ssl_or.errors import InputError
from hf_ssl_or.models.image_conversion import Preprocessing
from hf_ssl_or.randomness import keyed_permutation
from hf_ssl_or.structures import ViewSpec

_DEVICE_BYTES = 4 * 2**30  # sets of images of one size that are no larger move to the GPU's memory
_MATRIX_SIDE = 128  # pixels up to which matrices crop faster than PIL on a CPU

# What a step gets: its views, group by group, and the places of the images that they are of.
Rendered = tuple[list[Tensor], np.ndarray]


@dataclass(frozen=True)
class Storage:
    """Where decoded images are kept.

    Attributes:
        mode: "memory", "disk", or "on_the_fly": they are decoded again each time.
        folder: Folder of the files of "disk".
    """

    mode: Literal["memory", "disk", "on_the_fly"]
    folder: Path | None = None


@dataclass(kw_only=True)
class ImageSet:
    """Images of a run.

    Attributes:
        job: Which images there are, and how full ones are decoded.
        labels: int64, (n,), or None for unlabeled images.
        class_names: Names of the labels, or None.
        preprocessing: What becomes of the pixels, mean and standard deviation included.
        name: What the user calls the data set.
        full_storage: Where full images are kept.
        square_storage: Where squares are kept.
        full: The full images, once they are decoded.
        squares: The squares, once they are decoded.
        left_out: Images of the source that could not be read when the set was loaded: row -> what is wrong.
        failures: Images of the set that could not be read later: row -> what is wrong.
    """

    job: DecodeJob
    labels: Tensor | None
    class_names: list[str] | None
    preprocessing: Preprocessing
    name: str
    full_storage: Storage = Storage("memory")
    square_storage: Storage = Storage("memory")
    full: PixelStore | None = field(default=None, repr=False)
    squares: PixelStore | None = field(default=None, repr=False)
    left_out: dict[int, str] = field(default_factory=dict, repr=False)
    failures: dict[int, str] = field(default_factory=dict, repr=False)
    _on_device: dict[Any, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def from_arrays(
        cls,
        images: Sequence[Any] | np.ndarray,
        labels: Tensor | None = None,
        *,
        class_names: list[str] | None = None,
        name: str = "images",
        preprocessing: Preprocessing,
        bound: int | None = None,
        dtype: str = "uint8",
    ) -> ImageSet:
        """Makes a set of images in memory, PIL images or arrays (H, W, C).

        Args:
            images: The images.
            labels: Their labels.
            class_names: Names of the labels.
            name: Name of the set.
            preprocessing: What becomes of the pixels.
            bound: Most pixels of the shorter side of full images.
            dtype: Type of the pixels.
        """
        source = ListSource(images, name=name)
        job = DecodeJob(
            source=source, rows=np.arange(len(source)), preprocessing=preprocessing, bound=bound, dtype=dtype
        )
        return cls(job=job, labels=labels, class_names=class_names, preprocessing=preprocessing, name=name)

    def __len__(self) -> int:
        return len(self.job.rows)

    @property
    def image_size(self) -> int:
        """Side of the squares, and of views that name no size."""
        return self.preprocessing.image_size

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel that images are normalized with, of values in [0, 1]."""
        return self.preprocessing.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel, likewise."""
        return self.preprocessing.std

    @property
    def fingerprint(self) -> str:
        """Key of the content: the source, which images of it, and the range of their values."""
        kind = (self.preprocessing.num_channels, self.preprocessing.value_range)
        digest = hashlib.blake2b(f"{self.job.source.fingerprint}/{kind}/".encode(), digest_size=12)
        digest.update(self.job.rows.astype("<i8").tobytes())
        return digest.hexdigest()

    def describe(self, i: int) -> str:
        """Returns where image i is: a path, or a row."""
        return self.job.source.describe(int(self.job.rows[i]))

    # -----------------------------------------------------------------------------------------------------------------
    # Evaluation: the squares that the shipped image processor makes

    def clean(self, indices: Iterable[np.ndarray], device: torch.device | str = "cpu") -> Iterator[Tensor]:
        """Yields batches as an encoder gets them in evaluation: (B, C, S, S) float32, normalized."""
        for squares_BHWC in self.square_batches(indices, device):
            yield clean_views(squares_BHWC, self.preprocessing)

    def unit_squares(self, index_B: np.ndarray) -> Tensor:
        """Returns images with values in [0, 1], not normalized: (B, C, S, S) float32 on the CPU."""
        channels = self.preprocessing.num_channels
        plain = dataclasses.replace(self.preprocessing, mean=(0.0,) * channels, std=(1.0,) * channels)
        return torch.cat([clean_views(squares, plain) for squares in self.square_batches([index_B])])

    def square_batches(self, indices: Iterable[np.ndarray], device: torch.device | str = "cpu") -> Iterator[Tensor]:
        """Yields batches of squares (B, S, S, C), of the type that they are stored in."""
        store = self.load_squares()
        if store is not None:
            pixels, device = store.dense(), torch.device(device)
            for index_B in indices:
                yield _select(pixels, index_B, device)
            return
        for images, _ in self._loader(indices, _SquareDecoder(self.square_job), device):
            yield images.to(device, non_blocking=True)

    def load_squares(self) -> PixelStore | None:
        """Decodes the squares unless it is done; None if they are decoded each time."""
        if self.squares is None and self.square_storage.mode != "on_the_fly":
            self.squares = self._own_squares() or _load(self.square_job, self.square_storage)[0]
        return self.squares

    def _own_squares(self) -> PixelStore | None:
        """Returns the full images where they are such squares already, as small images often are."""
        size = self.preprocessing.image_size
        if self.full is None or self.preprocessing.resize_to != size:
            return None
        return self.full if self.full.uniform_sizes == ((size, size), (size, size)) else None

    @property
    def square_job(self) -> DecodeJob:
        """How squares are decoded: those of others than 8-bit images keep the resize's fractions."""
        dtype = "uint8" if self.job.dtype == "uint8" else "float32"
        return dataclasses.replace(self.job, square=True, preprocessing=self.preprocessing, bound=None, dtype=dtype)

    # -----------------------------------------------------------------------------------------------------------------
    # Views

    def views(self, plans: Iterable[ViewPlan], device: torch.device | str = "cpu") -> Iterator[Rendered]:
        """Yields the views of one plan after the other, each group (V, B, C, size, size) float32, normalized.

        An image that cannot be read any more is replaced by the next one of the set.
        """
        device = torch.device(device)
        self.load_full()
        pixels = self._matrix_pixels(device)
        if pixels is not None:
            assert self.full is not None and self.full.uniform_sizes is not None
            stored, original = self.full.uniform_sizes
            for plan in plans:
                images_BHWC = _select(pixels, plan.index_B, device)
                sources = [images_BHWC] * len(plan.groups)
                yield render_groups(sources, plan, self.preprocessing, original, stored), plan.index_B
            return
        yield from self._views_of_crops(plans, device)

    def callable_views(
        self, plans: Iterable[CallablePlan], lists: Sequence[CallableViews], device: torch.device | str = "cpu"
    ) -> Iterator[Rendered]:
        """Yields the views that callables make, plan by plan, normalized: (V, B, C, h, w) for each list.

        Worker processes call them ahead of time, where they can be pickled.

        Raises:
            InputError: A callable fails, or does not return one view.
        """
        maker = CallableViewMaker(self.job, self.load_full(), lists)
        workers = None if all(views.picklable for views in lists) else 0
        for made, index_B in self._loader(plans, maker, device, workers=workers):
            yield self._normalized(made, device), index_B

    def _normalized(self, made: list[Tensor] | Failure, device: torch.device | str) -> list[Tensor]:
        """Moves callable views to the device and normalizes them."""
        if isinstance(made, Failure):
            raise InputError(made.message) from made.cause
        return [normalize_views(x.to(device, non_blocking=True), self.preprocessing) for x in made]

    def full_image(self, place: int) -> np.ndarray:
        """Returns the pixels of an image as it is stored, or of the next one that can be read: (H, W, C)."""
        if (store := self.load_full()) is not None:
            return store[place]
        image, _ = first_readable(self.job, place, lambda row: decode(self.job.source, row, self.job), {})
        return image.pixels

    def suited(self, specs: Sequence[ViewSpec]) -> tuple[ViewSpec, ...]:
        """Returns specs as they are for RGB images, else without what needs colors."""
        return tuple(specs) if self.preprocessing.num_channels == 3 else tuple(map(without_color, specs))

    def load_full(self) -> PixelStore | None:
        """Decodes the full images unless it is done; None if they are decoded each time."""
        if self.full is None and self.full_storage.mode != "on_the_fly":
            self.full = _load(self.job, self.full_storage)[0]
        return self.full

    def _matrix_pixels(self, device: torch.device) -> Tensor | None:
        """Returns all images as one tensor, on the device if they fit, where matrices on it crop faster than PIL."""
        if device not in self._on_device:
            sizes = self.full.uniform_sizes if self.full is not None else None
            if self.full is None or sizes is None or (device.type == "cpu" and max(sizes[0]) > _MATRIX_SIDE):
                return None
            pixels = self.full.dense()
            self._on_device[device] = pixels.to(device) if self.full.nbytes <= _DEVICE_BYTES else pixels
        return self._on_device[device]

    def _views_of_crops(self, plans: Iterable[ViewPlan], device: torch.device) -> Iterator[Rendered]:
        """Yields views whose crops worker processes cut ahead of time; for a CPU they make all of the view."""
        maker = _ViewMaker(self.job, self.full, self.preprocessing if device.type == "cpu" else None)
        plans, ahead = (plans, plans) if isinstance(plans, list) else itertools.tee(plans)
        for plan, (groups, index_B) in zip(plans, self._loader(ahead, maker, device), strict=True):
            if device.type != "cpu":
                crops = [x.to(device, non_blocking=True) for x in groups]
                groups = render_groups(crops, plan, self.preprocessing)
            yield groups, index_B

    def _loader(
        self, items: Iterable[Any], maker: Dataset, device: torch.device | str, *, workers: int | None = None
    ) -> Iterator[Any]:
        """Makes one batch after the other in worker processes that run ahead, and counts what could not be read."""
        # Processes are not worth starting for one batch.
        one = isinstance(items, list) and len(items) == 1
        workers = 0 if one else self.job.workers if workers is None else workers
        loader = DataLoader(
            maker,
            batch_size=None,
            sampler=cast(Any, items),
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=torch.device(device).type == "cuda",
        )
        for result, index_B, failures in _watched(loader):
            note_unreadable(self.failures, failures, self.job.source.name, len(self), self.job.max_corrupt)
            yield result, index_B

    # -----------------------------------------------------------------------------------------------------------------
    # Parts of the set

    def subset(self, indices: Tensor | np.ndarray) -> ImageSet:
        """Returns a set of some of the images, with the same statistics; what is decoded is not decoded again."""
        index = torch.as_tensor(indices).cpu().numpy()
        small = len(index) * self.image_size**2 * self.preprocessing.num_channels <= 2**30
        return dataclasses.replace(
            self,
            job=dataclasses.replace(self.job, rows=self.job.rows[index]),
            labels=None if self.labels is None else self.labels[torch.from_numpy(index)],
            full=None if self.full is None else self.full.select(index),
            squares=None if self.squares is None else self.squares.select(index),
            square_storage=Storage("memory") if small else self.square_storage,
            _on_device={},
        )

    def with_preprocessing(self, preprocessing: Preprocessing) -> ImageSet:
        """Returns the same images for an encoder that wants them otherwise."""
        mine = self.preprocessing
        kind = ("num_channels", "eight_bit", "value_range")
        same_kind = all(getattr(mine, name) == getattr(preprocessing, name) for name in kind)
        if mine == preprocessing:
            return self
        job = dataclasses.replace(self.job, preprocessing=preprocessing)
        if not same_kind:
            job = dataclasses.replace(job, dtype="uint8" if preprocessing.eight_bit else "float32")
        return dataclasses.replace(
            self,
            job=job,
            preprocessing=preprocessing,
            full=self.full if same_kind else None,
            squares=None,
            _on_device={},
        )

    def sample(self, size: int, *key: int | str) -> ImageSet:
        """Returns a set of at most `size` images, at random by the key, in the order of the set."""
        return self.subset(np.sort(keyed_permutation(len(self), *key)[:size]))

    def order(self, batch_size: int, seed: int) -> Order:
        """Returns the order in which a run takes the images."""
        return ShuffledOrder(len(self), batch_size, seed)


def same_labels(train: ImageSet, test: ImageSet) -> ImageSet:
    """Numbers the classes of the test images as those of the training images, by their names.

    Words are numbered split by split, so a class that one split lacks would shift the others. Classes that only the
    test images have come after all others.
    """
    ours, theirs = train.class_names, test.class_names
    if test.labels is None or ours is None or theirs is None or ours == theirs:
        return test
    names = [*ours, *(name for name in theirs if name not in set(ours))]
    place = {name: i for i, name in enumerate(names)}
    number_K = torch.tensor([place[name] for name in theirs], dtype=torch.int64)
    return dataclasses.replace(test, labels=number_K[test.labels], class_names=names)


def _load(job: DecodeJob, storage: Storage) -> tuple[PixelStore, Any]:
    """Decodes all images of a job that an earlier pass has found to be readable."""
    store, tally = decode_to_memory(job) if storage.mode == "memory" else decode_to_disk(job, _folder(storage))
    if tally.unreadable:
        raise job.too_many(list(tally.unreadable.values()))
    return store, tally


def _folder(storage: Storage) -> Path:
    assert storage.folder is not None, "a storage on disk names its folder"
    return storage.folder


def _select(pixels: Tensor, index_B: np.ndarray, device: torch.device) -> Tensor:
    """Returns images by index on a device, through pinned memory where they leave the host: it need not wait."""
    index = torch.as_tensor(index_B)
    if pixels.device.type == "cpu" and device.type == "cuda":
        out = torch.empty(len(index), *pixels.shape[1:], dtype=pixels.dtype, pin_memory=True)
        return torch.index_select(pixels, 0, index, out=out).to(device, non_blocking=True)
    if pixels.device.type == "cuda":
        index = index.pin_memory().to(pixels.device, non_blocking=True)
    return pixels.index_select(0, index)


def empty_crops(plan: ViewPlan, job: DecodeJob, device: torch.device | str) -> list[Tensor]:
    """Makes room for the crops of a plan, pinned where they go to a GPU."""
    dtype = torch.uint8 if job.dtype == "uint8" else torch.float32
    shapes = [(len(g.specs), len(plan.index_B), g.size, g.size, job.preprocessing.num_channels) for g in plan.groups]
    return [torch.empty(shape, dtype=dtype, pin_memory=torch.device(device).type == "cuda") for shape in shapes]


def render_groups(
    sources: Sequence[Tensor],
    plan: ViewPlan,
    preprocessing: Preprocessing,
    original_size: tuple[int, int] | None = None,
    stored_size: tuple[int, int] | None = None,
) -> list[Tensor]:
    """Renders the groups of a plan, from full images of one size, or from crops: see `render_views`."""
    channels = preprocessing.num_channels
    return [
        render_views(
            source,
            sample_parameters(
                group, plan.index_B, num_channels=channels, original_size=original_size, stored_size=stored_size
            ),
            preprocessing,
        )
        for source, group in zip(sources, plan.groups, strict=True)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# What worker processes do


def _watched(loader: Iterable[Any]) -> Iterator[Any]:
    """Raises one error of one line where a worker died, which torch reports in several ways."""
    try:
        yield from loader
    except (RuntimeError, ConnectionError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        raise InputError(
            "data: a process that decodes images was killed (often for want of memory); "
            "set fewer data.num_workers and continue with --resume"
        ) from error


def _as_it_is(made: Any) -> Any:
    return made


class _SquareDecoder(Dataset):
    """Decodes batches of squares."""

    def __init__(self, job: DecodeJob) -> None:
        self.job = job

    def __getitem__(self, index_B: np.ndarray) -> tuple[Tensor, None, dict[int, str]]:
        images = [decode(self.job.source, int(self.job.rows[i]), self.job) for i in index_B]
        for image in images:
            if isinstance(image, str):  # another image in its place would have the wrong label
                raise InputError(f"data.dataset: {image}; it could be read before")
        pixels = [image.pixels for image in images if isinstance(image, Decoded)]
        return torch.from_numpy(np.stack(pixels)), None, {}


class _ViewMaker(Dataset):
    """Cuts the crops of a batch, out of what is stored or out of the files, and renders them for a CPU.

    Args:
        job: The images.
        store: The images as they are stored; None decodes them.
        preprocessing: How views are rendered; None leaves crops as they are.
    """

    def __init__(self, job: DecodeJob, store: PixelStore | None, preprocessing: Preprocessing | None) -> None:
        self.job, self.store, self.preprocessing = job, store, preprocessing

    def __getitem__(self, plan: ViewPlan) -> tuple[list[Tensor], np.ndarray, dict[int, str]]:
        outs, failures = empty_crops(plan, self.job, "cpu"), dict[int, str]()
        places = [self._crop(plan, b, outs, failures) for b in range(len(plan.index_B))]
        if self.preprocessing is not None:
            outs = render_groups(outs, plan, self.preprocessing)
        return outs, np.array(places), failures

    def _crop(self, plan: ViewPlan, b: int, outs: list[Tensor], failures: dict[int, str]) -> int:
        """Cuts the crops of an image, or of the next one that can be read; returns its place in the set."""
        place = int(plan.index_B[b])
        one = ViewPlan(plan.index_B[b : b + 1], plan.groups)
        if self.store is not None:
            height, width = (int(side) for side in self.store.originals_N2[place])
            write_crops(cut(Decoded(self.store[place], (height, width)), self.job, one), b, outs)
            return place
        crops, place = first_readable(
            self.job, place, lambda row: crop_file(row, self.job.source, self.job, one), failures
        )
        write_crops(crops, b, outs)
        return place


def write_crops(crops: list[np.ndarray], b: int, outs: list[Tensor]) -> None:
    """Writes the crops of one image to its place in those of a batch."""
    for out, crop in zip(outs, crops, strict=True):
        out.numpy()[:, b] = crop[:, 0]


def crop_file(row: int, source: Any, job: DecodeJob, plan: ViewPlan) -> list[np.ndarray] | str:
    """Cuts the views of one image out of its file, decoded as small as they allow.

    Args:
        row: Which image of the source.
        source: Where it is.
        job: How it is decoded.
        plan: The views of this one image.

    Returns:
        (V, 1, size, size, C) for each group, or what is wrong with the file.
    """

    def least_side(original: tuple[int, int]) -> int:
        return max(_least_side(group, plan.index_B, original) for group in plan.groups)

    image = decode_for_boxes(source, row, job, least_side)
    return image if isinstance(image, str) else cut(image, job, plan)


def cut(image: Decoded, job: DecodeJob, plan: ViewPlan) -> list[np.ndarray]:
    """Cuts the views of one decoded image: (V, 1, size, size, C) for each group."""
    outs = [out.numpy() for out in empty_crops(plan, job, "cpu")]
    for group, out in zip(plan.groups, outs, strict=True):
        boxes_V14 = group.boxes(plan.index_B, np.array([image.original_size]))
        crop_views(image.pixels, image.original_size, boxes_V14[:, 0], group.size, out[:, 0])
    return outs


def _least_side(group: ViewGroup, index_B: np.ndarray, original: tuple[int, int]) -> int:
    """Returns the shorter side at which the smallest crop still has the pixels of its view."""
    boxes_V14 = group.boxes(index_B, np.array([original]))
    return int(np.ceil(min(original) * group.size / max(1, int(boxes_V14[..., 2:].min()))))
