"""Some classes of a labeled set, such as ImageNet-100."""

from __future__ import annotations

import re

import numpy as np
from PIL import Image
from timm.data import ImageNetInfo

from hf_ssl_or.data.image_source import ImageSource
from hf_ssl_or.data.labels import content_key
from hf_ssl_or.errors import InputError, unknown

# Of Tian et al., "Contrastive Multiview Coding" (ECCV 2020), imagenet100.txt in github.com/HobbitLong/CMC, sorted.
_IDS = """
n01558993 n01692333 n01729322 n01735189 n01749939 n01773797 n01820546 n01855672 n01978455 n01980166 n01983481
n02009229 n02018207 n02085620 n02086240 n02086910 n02087046 n02089867 n02089973 n02090622 n02091831 n02093428
n02099849 n02100583 n02104029 n02105505 n02106550 n02107142 n02108089 n02109047 n02113799 n02113978 n02114855
n02116738 n02119022 n02123045 n02138441 n02172182 n02231487 n02259212 n02326432 n02396427 n02483362 n02488291
n02701002 n02788148 n02804414 n02859443 n02869837 n02877765 n02974003 n03017168 n03032252 n03062245 n03085013
n03259280 n03379051 n03424325 n03492542 n03494278 n03530642 n03584829 n03594734 n03637318 n03642806 n03764736
n03775546 n03777754 n03785016 n03787032 n03794056 n03837869 n03891251 n03903868 n03930630 n03947888 n04026417
n04067472 n04099969 n04111531 n04127249 n04136333 n04229816 n04238763 n04336792 n04418357 n04429376 n04435653
n04485082 n04493381 n04517823 n04589890 n04592741 n07714571 n07715103 n07753275 n07831146 n07836838 n13037406
n13040303
"""
IMAGENET100 = _IDS.split()
CLASS_LISTS = {"imagenet100": IMAGENET100}


class ClassSubset:
    """The images of some classes of a source, in its order.

    Args:
        source: A labeled source.
        rows: Its images that are kept, ascending.
        labels: Their labels, int64.
        class_names: Names of these labels.
    """

    def __init__(self, source: ImageSource, rows: np.ndarray, labels: np.ndarray, class_names: list[str]) -> None:
        self.name = source.name
        self.labels: np.ndarray | None = labels
        self.class_names: list[str] | None = class_names
        self._source, self._rows = source, rows
        self.fingerprint = content_key(source.fingerprint, rows, labels)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, i: int) -> Image.Image | np.ndarray:
        """Opens image i."""
        return self._source.read(int(self._rows[i]))

    def describe(self, i: int) -> str:
        """Returns where image i is."""
        return self._source.describe(int(self._rows[i]))


def keep_classes(source: ImageSource, classes: str | list[str | int] | None) -> ImageSource:
    """Keeps the images of some classes, which are numbered in the order of the list.

    Args:
        source: The images.
        classes: What `data.classes` is; None keeps all.

    Raises:
        InputError: The images have no labels, or no such class.
    """
    if classes is None:
        return source
    if source.labels is None:
        raise InputError(f"data.classes: the images of {source.name} have no labels to choose by; leave it out")
    wanted = CLASS_LISTS[classes] if isinstance(classes, str) else list(map(str, classes))
    names = source.class_names or list(map(str, range(int(source.labels.max()) + 1)))
    numbers = _class_numbers(names, wanted)
    new_number_K = np.full(len(names), -1)
    for new, name in enumerate(wanted):
        if name not in numbers:
            raise unknown(f"class of {source.name} in data.classes", name, numbers)
        new_number_K[numbers[name]] = new
    labels = new_number_K[source.labels]
    rows = np.flatnonzero(labels >= 0)
    return ClassSubset(source, rows, labels[rows], wanted)


def _class_numbers(names: list[str], wanted: list[str]) -> dict[str, int]:
    """Numbers the classes by name; those of ImageNet, whatever they are called, also by WordNet id."""
    numbers = {name: i for i, name in enumerate(names)}
    are_ids = all(re.fullmatch(r"n\d{8}", name) for name in wanted)
    if are_ids and len(names) == 1000 and not numbers.keys() & set(wanted):
        return {name: i for i, name in enumerate(ImageNetInfo("imagenet-1k").label_names())}
    return numbers
