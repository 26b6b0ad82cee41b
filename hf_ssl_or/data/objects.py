"""Whatever a program may hand over as its data: names, lists, arrays, data sets of Hugging Face and of torch."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.data.class_subset import keep_classes
from hf_ssl_or.data.hf_dataset import find_array_column, open_table, table_labels
from hf_ssl_or.data.image_dataset import ImageSet, same_labels
from hf_ssl_or.data.image_files import FileSource
from hf_ssl_or.data.image_source import ImageSource
from hf_ssl_or.data.in_memory import ListSource
from hf_ssl_or.data.iterable import read_stream
from hf_ssl_or.data.labels import encode_labels, hold_out
from hf_ssl_or.data.loading import load_images
from hf_ssl_or.data.map_style import MapSource, split_item
from hf_ssl_or.data.sources import list_splits
from hf_ssl_or.data.splits import TEST_SPLITS, find_split
from hf_ssl_or.errors import InputError
from hf_ssl_or.models.image_conversion import Preprocessing

_TAKEN = (
    "a Hub id, a folder, a list of images or paths, an array or tensor of images, a data set of `datasets` or a "
    "map-style one of torch"
)
_logger = logging.getLogger(__name__)


def load_dataset_object(
    dataset: Any,
    arguments: DataArguments,
    *,
    split: str = "train",
    num_channels: int = 3,
    like: Preprocessing | None = None,
    squares: bool = False,
) -> ImageSet:
    """Loads what a program hands over as images.

    Args:
        dataset: An `ImageSet`, which comes back as it is; what `data.dataset` takes, as words or a path; a list, an
            array or a tensor of images (PIL images, arrays, tensors, paths; or pairs of image and label); a
            `datasets.Dataset` or `IterableDataset`, of which the stored images are taken, not what a transform makes
            of them; a `DatasetDict`; a map-style `torch.utils.data.Dataset` whose items are images, tuples that
            begin with image and label, or dicts.
        arguments: Settings of the data; the object takes the place of `dataset`.
        split: Split of what has several.
        num_channels: Channels that the encoder takes.
        like: How pixels are treated; None measures it on these images.
        squares: Decodes what evaluation needs first, not what views need.

    Raises:
        InputError: The object holds no images, or none in that split.
    """
    if isinstance(dataset, ImageSet):
        wanted = like.num_channels if like is not None else num_channels
        if dataset.preprocessing.num_channels != wanted:
            found = dataset.preprocessing.num_channels
            raise InputError(f"{dataset.name}: images of {found} channels for an encoder of {wanted}")
        return dataset if like is None else dataset.with_preprocessing(like)
    if isinstance(dataset, Mapping):
        dataset = dataset[_known_split(dataset, split)]
        return load_dataset_object(
            dataset, arguments, split=split, num_channels=num_channels, like=like, squares=squares
        )
    source = None
    if isinstance(dataset, str | os.PathLike):
        arguments = replace(arguments, dataset=os.fspath(dataset))
    else:
        source = open_object(dataset, arguments, split=split, num_channels=num_channels)
        arguments = replace(arguments, dataset=source.name)
    return load_images(arguments, split, num_channels=num_channels, like=like, squares=squares, source=source)


def load_eval_object(
    dataset: Any, arguments: DataArguments, *, num_channels: int = 3, like: Preprocessing | None = None
) -> tuple[ImageSet, ImageSet]:
    """Loads the labeled images that probes are fit on, and those that they are tested on.

    Args:
        dataset: A tuple (train, test) of what `load_dataset_object` takes; something with splits, of which the test
            split, or else the validation split, is taken; or one set. Without a test split, a share of the images
            (`data.holdout`), chosen class by class by a seed, is tested on.
        arguments: Settings of the data; all images are used, whatever the `fraction`, and none is streamed.
        num_channels: Channels that the encoder takes.
        like: How pixels are treated; None measures it on the training images.

    Raises:
        InputError: There are no labels, or too few images to hold some out.
    """
    arguments = replace(arguments, fraction=1.0, streaming=False)
    is_pair = isinstance(dataset, tuple) and len(dataset) == 2
    train_part, test_part = dataset if is_pair else (dataset, dataset)
    train_split, test_split = arguments.train_split, _test_split(test_part, arguments)

    def load(part: Any, split: str, preprocessing: Preprocessing | None) -> ImageSet:
        images = load_dataset_object(
            part, arguments, split=split, num_channels=num_channels, like=preprocessing, squares=True
        )
        if images.labels is None:
            raise InputError(f"{images.name}: has no labels, or not for every image, which kNN and probes need")
        return images

    train = load(train_part, train_split, like)
    if test_split is None and not is_pair:
        return _held_out(train, float(arguments.holdout))
    test = load(test_part, test_split or train_split, train.preprocessing)
    return train, same_labels(train, test)


def _test_split(dataset: Any, arguments: DataArguments) -> str | None:
    """Returns the split that is tested on; None if there is none."""
    if isinstance(dataset, str | os.PathLike):
        splits = list_splits(replace(arguments, dataset=os.fspath(dataset)))
    elif isinstance(dataset, Mapping):
        splits = list(map(str, dataset))
    else:
        return None
    return next((split for split in (arguments.test_split, *TEST_SPLITS) if find_split(split, splits)), None)


def _held_out(images: ImageSet, share: float) -> tuple[ImageSet, ImageSet]:
    """Parts a labeled set."""
    assert images.labels is not None
    parts = hold_out(images.labels.numpy(), share)
    if parts is None:
        raise InputError(
            f"{images.name}: its {len(images)} images are too few, or of too few classes, to hold some out for the "
            "test; give a pair (train, test)"
        )
    train_rows, test_rows = parts
    _logger.warning(
        "%s has no test split: probes are tested on %d of its %d images, held out from their fit by a seed "
        "(data.holdout=%g)",
        *(images.name, len(test_rows), len(images), share),
    )
    return images.subset(train_rows), images.subset(test_rows)


def _known_split(dataset: Mapping, split: str) -> str:
    found = find_split(split, list(dataset))
    if found is None:
        raise InputError(
            f"data: a {type(dataset).__name__} without a split {split!r}; available: "
            f"{', '.join(map(str, dataset)) or 'none'} (data.train_split and data.test_split name them)"
        )
    return found


# ---------------------------------------------------------------------------------------------------------------------
# From an object to a source


def open_object(dataset: Any, arguments: DataArguments, *, split: str = "train", num_channels: int = 3) -> ImageSource:
    """Opens an object that holds images, see `load_dataset_object`.

    Raises:
        InputError: It is of no kind that holds images, or is empty.
    """
    kind = type(dataset).__name__
    if arguments.streaming:
        raise InputError(f"data.streaming: reads shards, not a {kind} in a program; leave it out, or name the shards")
    source: ImageSource
    if isinstance(dataset, datasets.Dataset):
        source = _open_dataset(dataset, arguments, split)
    elif isinstance(dataset, datasets.IterableDataset | torch.utils.data.IterableDataset):
        source = read_stream(dataset, arguments, num_channels)
    elif isinstance(dataset, list | tuple | np.ndarray | torch.Tensor):
        source = _open_list(dataset, arguments)
    elif _is_plain_folder(dataset):
        paths, labels = zip(*dataset.samples, strict=True)
        labels_N, class_names = encode_labels(labels, list(dataset.classes))
        source = FileSource(Path(dataset.root).name, Path(), paths, labels_N, class_names)
    elif hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and not isinstance(dataset, bytes | set):
        source = MapSource(dataset, arguments, kind)
    else:
        hint = "; give its .dataset" if isinstance(dataset, torch.utils.data.DataLoader) else ""
        raise InputError(f"data: a {kind} holds no images that can be read by number{hint}; give {_TAKEN}")
    if not len(source):
        raise InputError(f"data: {source.name} ({kind}) holds no image")
    return keep_classes(source, arguments.classes)


def _is_plain_folder(dataset: Any) -> bool:
    """Returns whether it is torchvision's folder of images without transforms: its files can be read here, faster."""
    folder = sys.modules.get("torchvision.datasets.folder")
    return (
        folder is not None
        and isinstance(dataset, folder.DatasetFolder)
        and type(dataset).__getitem__ is folder.DatasetFolder.__getitem__
        and dataset.loader is folder.default_loader
        and dataset.transform is dataset.target_transform is None
    )


def _open_list(items: Any, arguments: DataArguments) -> ListSource | FileSource:
    if isinstance(items, np.ndarray | torch.Tensor) and items.ndim < 3:
        raise InputError(f"data: an array of images has 3 or 4 dimensions, (n, H, W, C), not {tuple(items.shape)}")
    parts = [split_item(item, arguments, f"image {i} of images") for i, item in enumerate(items)]
    images, labels = [image for image, _ in parts], [label for _, label in parts]
    if images and all(isinstance(image, str | os.PathLike) for image in images):  # too many to read them all for a key
        return FileSource("images", Path(), list(map(os.fspath, images)), *encode_labels(labels))
    return ListSource(images, None if None in labels else labels)


def _open_dataset(table: datasets.Dataset, arguments: DataArguments, split: str) -> ImageSource:
    name = table.info.dataset_name or "Dataset"
    if table.format["type"] == "custom":
        _logger.warning(
            "%s: its transform is not applied: the stored images are read, and `views` makes the views", name
        )
    arguments = replace(arguments, dataset=name)
    if (array := find_array_column(table.features, arguments)) is None:
        return open_table(table, arguments, split, in_program=True)
    source = MapSource(_ArrayColumn(table, *array), arguments, f"{name}, column {array[0]!r}")
    source.labels, source.class_names = table_labels(table, arguments)
    return source


class _ArrayColumn:
    """Arrays of a column, by row."""

    def __init__(self, table: datasets.Dataset, column: str, dtype: str) -> None:
        self._cells, self._dtype = table.select_columns([column]).with_format("arrow"), np.dtype(dtype)

    def __len__(self) -> int:
        return len(self._cells)

    def __getitem__(self, i: int) -> np.ndarray:
        return np.array(self._cells[i : i + 1].column(0)[0].as_py(), dtype=self._dtype)
