"""Where a run's images come from and how they are stored, as one strict dataclass: every default stands here once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from hf_ssl_or.errors import InputError
from hf_ssl_or.models.image_conversion import check_value_range
from hf_ssl_or.settings import settings


@settings
class DataArguments:
    """Settings of the data.

    Attributes:
        dataset: A short name (cifar10, stl10, imagenet100 ..., see `hf-ssl-or list datasets`), of which settings that
            are left alone take what is known of the set; a Hub id; a folder in `$HF_SSL_OR_DATA`, by its name or the
            set's, which wins over the Hub; a folder of parquet files or of `save_to_disk`; a folder of images (flat,
            with a subfolder per class, or with split folders as the `datasets` library names them: train, training,
            dev, test ...); a pattern of images such as "photos/**/*.{jpg,png}"; a list of paths (.csv, .tsv, .jsonl
            with a column of paths, .txt with one per line), relative to its folder; a WebDataset pattern such as
            "shards/train-{000..009}.tar"; or the built-in "shapes". "{split}" in a path stands for the split's name.
            With `streaming` also a pattern of .parquet files, and of URLs of .tar or .parquet.
        dataset_config: Configuration of a Hub dataset that has several.
        train_split: Name of the split that is trained on: the folder's own, or the `datasets` library's name for it.
        test_split: Name of the split that is evaluated on, likewise.
        image_column: Column of the images or of their paths, "meta.img" for one in a struct; in tar files the field
            ("left.png"). None finds it where only one may be it.
        label_column: Column of the labels, likewise; None finds it, or goes without labels.
        classes: Keeps the images of these classes, by name, which are numbered in the order of this list; or
            "imagenet100", the 100 classes of Tian et al. (ECCV 2020) of a set with ImageNet's. None keeps all.
        image_size: Side of the square views in pixels, where a view does not say otherwise, and of the squares that
            the encoder gets in evaluation.
        crop_pct: Share of the shorter side that evaluation keeps: it is resized to `image_size / crop_pct`, and the
            center is cropped, as in timm.
        interpolation: Filter of that resize.
        value_range: Pixel values that become 0 and 1. "auto" takes 0 and 255 for 8-bit images and measures others by
            percentiles over a sample; [low, high] sets them; "dtype" takes each image's type's own range.
        fraction: Share of the training images that is used: a seeded subset, class by class if there are labels.
        fraction_seed: Key of that subset.
        holdout: Share of the training images that probes are tested on, where a labeled set has no test split.
        mean: Mean per channel of images in [0, 1]; None measures it on the training images in use.
        std: Standard deviation per channel; None measures it too.
        cache: "disk" decodes once into a file that later runs map into memory; "auto" does, unless the decoded set is
            small; "none" stores no pixels: views are cropped from the original file in every epoch, decoded as small
            as the crop allows. (What can be read, and its size, is checked once and noted.)
        cache_dir: Folder of these files; None: `$HF_SSL_OR_CACHE`, else `hf_ssl_or` beside the Hub's own cache.
        cache_size: Most pixels of the shorter side of the stored images, which keep their aspect ratio. None: so many
            that the median crop of the views has no fewer pixels than the view. Larger keeps more detail in small
            crops and costs disk by the square.
        max_corrupt: Share of the images that may be unreadable: they are left out and named.
        streaming: Reads training images where they are while training, for sets too large to copy or to decode in
            advance; for parquet and .tar files. Nothing but their index is stored. See docs/streaming.md.
        stream_window_mib: Encoded images that are shuffled at a time, over all processes; up to twice that is held.
        stream_lanes: Parts of a batch that read different shards: a multiple of the number of processes lets each read
            its own. The order of the images depends on it.
        num_workers: Threads or processes that decode; 0 takes one per core, up to 8.
        shapes_train: Training images of the built-in set.
        shapes_test: Test images of the built-in set.
    """

    dataset: str
    dataset_config: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    image_column: str | None = None
    label_column: str | None = None
    classes: Literal["imagenet100"] | list[str | int] | None = None
    image_size: int = 32
    crop_pct: float | int = 1.0
    interpolation: Literal["bilinear", "bicubic", "lanczos", "nearest"] = "bilinear"
    value_range: Literal["auto", "dtype"] | list[float | int] = "auto"
    fraction: float | int = 1.0
    fraction_seed: int = 0
    holdout: float | int = 0.1
    mean: list[float | int] | None = None
    std: list[float | int] | None = None
    cache: Literal["auto", "disk", "none"] = "auto"
    cache_dir: str | None = None
    cache_size: int | None = None
    max_corrupt: float | int = 0.01
    streaming: bool = False
    stream_window_mib: int = 512
    stream_lanes: int = 8
    num_workers: int = 0
    shapes_train: int = 10_000
    shapes_test: int = 2_000

    def __post_init__(self) -> None:
        least_values = {"num_workers": 0, "shapes_train": 2}
        for name in ("image_size", "cache_size", "num_workers", "shapes_train", "stream_window_mib", "stream_lanes"):
            value, least = getattr(self, name), least_values.get(name, 1)
            if value is not None and value < least:
                raise InputError(f"data.{name}: at least {least}, not {value}")
        if self.shapes_test < 0:
            raise InputError(f"data.shapes_test: at least 0, not {self.shapes_test}")
        if not 0 < self.fraction <= 1:
            raise InputError(f"data.fraction: more than 0 and at most 1, not {self.fraction}")
        if not 0 < self.crop_pct <= 1:
            raise InputError(f"data.crop_pct: more than 0 and at most 1, not {self.crop_pct}")
        if not 0 < self.holdout < 1:
            raise InputError(f"data.holdout: a share of more than 0 and less than 1, not {self.holdout}")
        if self.value_range != "auto":
            try:
                check_value_range(self.value_range)
            except ValueError as error:
                raise InputError(f"data.{error}") from error
        if not 0 <= self.max_corrupt < 1:
            raise InputError(f"data.max_corrupt: a share from 0 to less than 1, not {self.max_corrupt}")
        if (self.mean is None) != (self.std is None):
            raise InputError("data.mean, data.std: give both or neither")
        if self.mean is not None and self.std is not None and len(self.mean) != len(self.std):
            raise InputError(
                f"data.mean, data.std: one number per channel in both, not {len(self.mean)}, {len(self.std)}"
            )
        if self.std is not None and min(self.std) <= 0:
            raise InputError(f"data.std: more than 0 in each channel, not {min(self.std)}")
        if self.streaming and self.fraction != 1:
            raise InputError("data.fraction: a streamed set is used whole; list fewer shards in data.dataset")
        if isinstance(self.classes, list) and not 0 < len(self.classes) == len(set(map(str, self.classes))):
            raise InputError("data.classes: one or more names, each once; leave it out for all classes")
        if self.streaming and self.classes is not None:
            raise InputError(
                "data.classes: a streamed set is used whole; leave out data.streaming, or data.classes "
                "(imagenet100 is imagenet-1k with data.classes)"
            )
        if self.streaming and self.cache == "disk":
            raise InputError("data.cache: a streamed set is not stored; leave out data.cache, or data.streaming")
        if not self.dataset:
            raise InputError("data.dataset: name a Hub id, a folder, a list, a pattern of files, or 'shapes'")

    def workers(self) -> int:
        """Number of threads or processes that decode."""
        return self.num_workers or min(8, len(os.sched_getaffinity(0)))

    def cache_folder(self) -> Path:
        """Folder of the decoded images."""
        if self.cache_dir is not None:
            return Path(self.cache_dir).expanduser()
        if folder := os.environ.get("HF_SSL_OR_CACHE"):
            return Path(folder).expanduser()
        home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
        return Path(home).expanduser() / "hf_ssl_or"
