"""Data sets that have a short name: where the Hub has them, what their columns and splits are called, local copies."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.data.splits import find_split

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PublishedDataset:
    """A data set of the Hub, as its page there describes it.

    Attributes:
        hub_id: Its name on the Hub.
        config: Its configuration, where it has several.
        image_column: Column of the images; None where it was not looked up, and is found.
        label_column: Column of the labels, likewise.
        splits: Its names for the default splits, where these are others.
        part_of: Short name of the set that it is a part of, where it has no repository of its own.
        classes: What `data.classes` is for that part.
        num_classes: Number of classes.
        images: Number of images in each split.
        side: Pixels, "varies" where it does.
        note: License, gating and what else to know.
    """

    hub_id: str
    config: str | None = None
    image_column: str | None = "image"
    label_column: str | None = "label"
    splits: Mapping[str, str] = field(default_factory=dict)
    part_of: str | None = None
    classes: Literal["imagenet100"] | None = None
    num_classes: int
    images: Mapping[str, int]
    side: str = "varies"
    note: str = ""

    def describe(self) -> str:
        """Returns one line for a list."""
        images = ", ".join(f"{split} {count:,}" for split, count in self.images.items())
        where = f"{self.hub_id}{f' ({self.config})' if self.config else ''}"
        facts = [where, f"{self.num_classes} classes", images, f"side {self.side}", self.note]
        return "; ".join(fact for fact in facts if fact)


_IMAGENET = "gated: accept its terms on the Hub and log in; non-commercial research"
_BOXES = "for detection; its boxes are not in the form that docs/detection.py takes; without labels per image"
PUBLISHED = {
    "cifar10": PublishedDataset(
        hub_id="uoft-cs/cifar10",
        image_column="img",
        num_classes=10,
        images={"train": 50_000, "test": 10_000},
        side="32",
        note="license unknown",
    ),
    "cifar100": PublishedDataset(
        hub_id="uoft-cs/cifar100",
        image_column="img",
        label_column="fine_label",  # beside coarse_label, of 20 classes
        num_classes=100,
        images={"train": 50_000, "test": 10_000},
        side="32",
        note="license unknown",
    ),
    "stl10": PublishedDataset(
        hub_id="jxie/stl10",
        num_classes=10,
        images={"unlabeled": 100_000, "train": 5_000, "test": 8_000},
        side="96",
        note="pretrain with data.train_split=unlabeled; its images are of ImageNet",
    ),
    "imagenet-1k": PublishedDataset(
        hub_id="ILSVRC/imagenet-1k",
        splits={"test": "validation"},  # the labels of its test split were never published
        num_classes=1000,
        images={"train": 1_281_167, "validation": 50_000},
        note=_IMAGENET,
    ),
    "imagenet100": PublishedDataset(
        hub_id="ILSVRC/imagenet-1k",
        splits={"test": "validation"},
        part_of="imagenet-1k",
        classes="imagenet100",
        num_classes=100,
        images={"train": 126_689, "validation": 5_000},
        note=f"data.classes=imagenet100 of imagenet-1k; {_IMAGENET}",
    ),
    "food101": PublishedDataset(
        hub_id="ethz/food101",
        splits={"test": "validation"},
        num_classes=101,
        images={"train": 75_750, "validation": 25_250},
    ),
    "flowers102": PublishedDataset(
        hub_id="dpdl-benchmark/oxford_flowers102",
        image_column=None,
        label_column=None,
        num_classes=102,
        images={"train": 1_020, "validation": 1_020, "test": 6_149},
    ),
    "dtd": PublishedDataset(
        hub_id="tanganke/dtd",
        num_classes=47,
        images={"train": 3_760, "test": 1_880},
        note="its training and validation images in one split",
    ),
    "gtsrb": PublishedDataset(
        hub_id="tanganke/gtsrb",
        num_classes=43,
        images={"train": 26_640, "test": 12_630},
        note="fewer training images than the final release (39,209)",
    ),
    "voc07": PublishedDataset(
        hub_id="fuliucansheng/pascal_voc",
        config="voc2007_main",
        image_column=None,
        label_column=None,
        num_classes=20,
        images={"train": 2_501, "validation": 2_510, "test": 4_952},
        note=_BOXES,
    ),
    "voc12": PublishedDataset(
        hub_id="fuliucansheng/pascal_voc",
        config="voc2012_main",
        image_column=None,
        label_column=None,
        num_classes=20,
        images={"train": 5_717, "validation": 5_823},
        note=_BOXES,
    ),
}


def find_published(name: str) -> PublishedDataset | None:
    """Returns what is known of a set by its short name or its Hub id; None of others, and of paths."""
    if _is_path(name):
        return None
    of_hub = (known for known in PUBLISHED.values() if name == known.hub_id and not known.config and not known.part_of)
    return PUBLISHED.get(name) or next(of_hub, None)


def resolve_dataset(arguments: DataArguments) -> DataArguments:
    """Puts where a set is in place of its name, and what is known of it in place of settings that were left alone.

    It is a copy in the folder `$HF_SSL_OR_DATA`, by its name ("org/name" there, else "name") or its Hub id, or else on
    the Hub. Columns and splits, which a copy need not have, are left to `known_columns` and `own_split`.
    """
    name = arguments.dataset
    if _is_path(name):
        return arguments
    known, copy = find_published(name), _find_copy(name)
    if copy is None and known is not None and (whole := known.part_of) is not None:
        arguments = replace(arguments, classes=arguments.classes or known.classes)
        known, copy = PUBLISHED[whole], _find_copy(whole)
    if copy is None and known is not None and known.config is None:
        copy = _find_copy(known.hub_id)
    if copy is not None:
        _tell(name, copy)
        return replace(arguments, dataset=copy)
    if known is None:
        return arguments
    return replace(arguments, dataset=known.hub_id, dataset_config=arguments.dataset_config or known.config)


def known_columns(name: str, columns: Collection[str], arguments: DataArguments) -> DataArguments:
    """Names the columns of a published set where the arguments do not, and the set has them."""
    known = find_published(name)
    changes: dict[str, Any] = {}
    for setting in ("image_column", "label_column"):
        column = getattr(known, setting, None)
        if getattr(arguments, setting) is None and column in columns:
            changes[setting] = column
    return replace(arguments, **changes)


def own_split(name: str, split: str, splits: Collection[str]) -> str:
    """Returns what a published set calls a default split, where it is among its splits; other names as they are."""
    known = find_published(name)
    own = known.splits.get(split, split) if known else split
    return own if find_split(own, splits) else split


@functools.cache
def _tell(name: str, copy: str) -> None:
    """Logs once that a copy is read."""
    _logger.info("%s: read from the copy in %s", name, copy)


def _is_path(name: str) -> bool:
    """Returns whether a name is that of a file or folder, or looks like one, rather than that of a data set."""
    is_path = name.startswith((".", "~", os.sep)) or name.count("/") > 1 or Path(name).expanduser().exists()
    return is_path or name in ("", "shapes")


def _find_copy(name: str) -> str | None:
    folder = os.environ.get("HF_SSL_OR_DATA")
    copies = (Path(folder) / name, Path(folder) / name.rpartition("/")[2]) if folder else ()
    return next((str(copy) for copy in copies if copy.is_dir()), None)
