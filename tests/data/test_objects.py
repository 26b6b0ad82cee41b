from __future__ import annotations

import io
import shutil

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from hf_ssl_or.data import map_style
from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.data.image_dataset import ImageSet
from hf_ssl_or.data.objects import load_dataset_object, load_eval_object
from hf_ssl_or.errors import InputError
from tests.data.image_writing import picture, save

N = 12
LABELS = [i % 3 for i in range(N)]


def arguments(**more: object) -> DataArguments:
    return DataArguments(**{"dataset": "given", "image_size": 8, "num_workers": 1, **more})


def images_of(n: int = N) -> list[Image.Image]:
    return [picture(10 * i, side=8 + i % 2) for i in range(n)]


def reds(images: ImageSet) -> list[int]:
    """The first value of each stored image."""
    store = images.load_full()
    return [int(store[i][0, 0, 0]) for i in range(len(images))]


def load(dataset: object, **more: object) -> ImageSet:
    keys = {key: more.pop(key) for key in ("split", "num_channels", "like") if key in more}
    return load_dataset_object(dataset, arguments(**more), **keys)


def table(**columns: object) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"image": images_of(), "label": LABELS, **columns})


class Items(torch.utils.data.Dataset):
    """A map-style set of whatever it is given."""

    def __init__(self, items: list[object], change=None) -> None:
        self.items, self.change = items, change or (lambda item: item)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> object:
        return self.change(self.items[i])


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from pairs()


def tensors() -> list[torch.Tensor]:
    return [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images_of()]


def pairs() -> list[tuple[Image.Image, int]]:
    return list(zip(images_of(), LABELS, strict=True))


def arrays() -> list[np.ndarray]:
    return [np.array(picture(10 * i)) for i in range(N)]


ARRAYS = datasets.Array3D((8, 8, 3), "uint8")


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


NAMED = datasets.ClassLabel(names=["a", "b", "c"])
KINDS = {
    "pairs": pairs,
    "table": table,
    "renamed": lambda: table().rename_columns({"image": "scan", "label": "kind"}).cast_column("kind", NAMED),
    "torch format": lambda: table().with_format("torch"),
    "transform": lambda: table().with_transform(lambda row: {"x": [0] * len(row["image"])}),
    "splits": lambda: datasets.DatasetDict({"training": table(), "other": table()}),
    "stream": lambda: table().to_iterable_dataset(num_shards=2),
    "stream of numpy": lambda: table().to_iterable_dataset().with_format("numpy"),
    "mapped stream": lambda: table().to_iterable_dataset().map(lambda row: row),
    "taken from endless": lambda: table().to_iterable_dataset().repeat(None).take(N),
    "torch stream": Stream,
    "tuples": lambda: Items([(image, label, "more") for image, label in pairs()]),
    "dicts": lambda: Items([{"img": image, "target": label} for image, label in pairs()]),
    "subset": lambda: torch.utils.data.Subset(Items(pairs() * 2), range(N)),
    "tensors": lambda: Items(list(zip(tensors(), torch.tensor(LABELS), strict=True))),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_object_gives_the_same_images_and_labels(kind, tmp_path):
    images = load(KINDS[kind](), cache_dir=str(tmp_path))
    assert reds(images) == [10 * i for i in range(N)] and images.labels.tolist() == LABELS
    again = load(KINDS[kind](), cache_dir=str(tmp_path))
    assert again.fingerprint == images.fingerprint
    assert images.preprocessing.mean == again.preprocessing.mean and images.preprocessing.eight_bit


@pytest.mark.parametrize(
    "make",
    [
        images_of,
        arrays,
        tensors,
        lambda: [{"image": encoded(image)} for image in images_of()],
        lambda: np.stack(arrays()),
        lambda: torch.from_numpy(np.stack(arrays())),
        lambda: Items(images_of()),
        lambda: datasets.Dataset.from_dict({"pixels": arrays()}),
        lambda: datasets.Dataset.from_dict({"pixels": arrays()}).to_iterable_dataset(),
        lambda: datasets.Dataset.from_dict({"pixels": arrays()}, datasets.Features({"pixels": ARRAYS})),
    ],
)
def test_images_without_labels(make, tmp_path):
    images = load(make(), cache_dir=str(tmp_path))
    assert reds(images) == [10 * i for i in range(N)] and images.labels is None


def test_paths_and_folders(tmp_path, monkeypatch):
    folder = save(tmp_path / "set", *(f"{'ab'[i % 2]}/{i}.png" for i in range(4)))
    paths = [folder / f"{'ab'[i % 2]}/{i}.png" for i in range(4)]
    assert reds(load(paths)) == reds(load([str(path) for path in paths])) == [0, 1, 2, 3]
    assert reds(load(str(folder))) == reds(load(folder)) == [0, 2, 1, 3]
    for column in (datasets.Value("string"), datasets.Image()):
        features = datasets.Features({"image": column})
        named = datasets.Dataset.from_dict({"image": list(map(str, paths))}, features=features)
        assert reds(load(named)) == [0, 1, 2, 3]
    folder_set = ImageFolder(folder)
    images = load(folder_set)
    assert reds(images) == [0, 2, 1, 3] and images.class_names == ["a", "b"] and "0.png" in images.describe(0)
    resized = load(ImageFolder(folder, v2.Resize(4)))
    assert resized.load_full()[0].shape == (4, 4, 3) and resized.class_names == ["a", "b"]


def test_streams_of_files(tmp_path):
    folder = save(tmp_path / "set", *(f"train/{'ab'[i % 2]}/{i}.png" for i in range(4)))
    stream = datasets.load_dataset(str(folder), split="train", streaming=True)
    archive = shutil.make_archive(str(tmp_path / "set"), "zip", folder)
    addresses = [f"zip://train/{'ab'[i % 2]}/{i}.png::{archive}" for i in range(4)]
    features = datasets.Features({"photo": datasets.Image()})
    for given, wanted in [
        (stream, [0, 2, 1, 3]),
        (datasets.Dataset.from_dict({"photo": addresses}, features).to_iterable_dataset(), [0, 1, 2, 3]),
        (
            datasets.IterableDataset.from_generator(lambda: ({"image": picture(i), "label": "x"} for i in range(3))),
            range(3),
        ),
    ]:
        assert reds(load(given, cache_dir=str(tmp_path / "cache"))) == list(wanted)
    assert load(stream, cache_dir=str(tmp_path / "cache")).class_names == ["a", "b"]

    def breaks():
        yield {"image": picture(1)}
        raise OSError("connection lost\nat 3 am")

    with pytest.raises(InputError, match="IterableDataset fails after 1 rows: connection lost$"):
        load(datasets.IterableDataset.from_generator(breaks), cache_dir=str(tmp_path / "cache"))
    missing = datasets.Dataset.from_dict({"photo": [*addresses[:1], str(folder / "gone.png")]}, features)
    with pytest.raises(InputError, match="row 1 of IterableDataset"):
        load(missing.to_iterable_dataset(), cache_dir=str(tmp_path / "cache"))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="data.cache_dir: cannot keep the images of this IterableDataset"):
        load(stream, cache_dir=str(tmp_path / "file"))


def test_tables_on_disk_and_in_any_order(tmp_path):
    table().save_to_disk(tmp_path / "saved")
    saved = datasets.load_from_disk(tmp_path / "saved")
    parts = saved.train_test_split(0.25, seed=0)
    for given in (saved, parts, saved.shuffle(seed=1), saved.with_format("numpy").select([3, 1])):
        images, chosen = load(given), given["train"] if isinstance(given, dict) else given
        wanted = [int(np.asarray(row["image"])[0, 0, 0]) for row in chosen]
        assert reds(images) == wanted and images.labels.tolist() == [int(row["label"]) for row in chosen]
    assert load(saved).fingerprint == load(table()).fingerprint != load(saved.shuffle(seed=1)).fingerprint


def test_kinds_of_numbers():
    rng = np.random.default_rng(0)
    unit = [torch.from_numpy(rng.random((3, 8, 8), np.float32)) for _ in range(N)]
    images = load(Items(unit))
    low, high = images.preprocessing.value_range
    assert not images.preprocessing.eight_bit and 0 <= low < 0.01 and 0.99 < high <= 1
    halves = load([image.bfloat16() for image in unit])
    assert halves.job.dtype == "float32"
    deep = load([rng.integers(0, 4096, (8, 8), np.uint16) for _ in range(N)], num_channels=1)
    assert deep.job.dtype == "uint16" and 4000 < deep.preprocessing.value_range[1] < 4096
    gray = load([rng.integers(0, 256, (8, 9), np.uint8) for _ in range(N)])
    assert gray.preprocessing.eight_bit and gray.load_full()[0].shape == (8, 9, 3)


def test_image_sets_come_back():
    images = load(images_of())
    assert load(images) is images
    other = load(images_of(), image_size=6)
    assert load(images, like=other.preprocessing).preprocessing == other.preprocessing
    with pytest.raises(InputError, match="3 channels for an encoder of 1"):
        load(images, num_channels=1)


def test_a_fraction_of_the_training_images():
    assert len(load(table(), fraction=0.5)) == N // 2 == len(set(load(table(), fraction=0.5).job.rows))


def test_items_that_differ_are_warned_of_once():
    noise = Items(
        images_of(), lambda image: np.array(image) // 2 + np.random.default_rng().integers(9, dtype=np.uint8)
    )
    with pytest.warns(UserWarning, match="Items: reads differently each time") as caught:
        load(noise)
    assert len(caught) == 1


def test_classes_have_the_names_of_the_set(monkeypatch):
    items = Items(pairs())
    items.classes = ["a", "b", "c", "d"]
    images = load(torch.utils.data.Subset(items, range(6)))
    assert images.class_names == ["a", "b", "c", "d"] and images.labels.tolist() == LABELS[:6]
    by_workers = load_in_workers(monkeypatch, items)
    assert by_workers.fingerprint == load(items).fingerprint and by_workers.labels.tolist() == LABELS
    with pytest.raises(InputError, match="item 1 of Items: NoneType") as caught:
        load_in_workers(monkeypatch, Items([picture(1), None]))
    assert "\n" not in str(caught.value)
    items.items = [(image, f"class {label}") for image, label in pairs()]
    assert load(items).class_names == ["class 0", "class 1", "class 2"]


def load_in_workers(monkeypatch: pytest.MonkeyPatch, dataset: object) -> ImageSet:
    with monkeypatch.context() as patch:
        patch.setattr(map_style, "_MANY", 1)
        return load(dataset, num_workers=2)


def test_an_unreadable_item_is_left_out():
    def read(i: int) -> tuple[np.ndarray, int]:
        if i == 3:
            raise OSError("broken sector")
        return np.full((8, 8, 3), i, np.uint8), i % 2

    images = load(Items(list(range(N)), read), max_corrupt=0.2)
    assert len(images) == N - 1 and images.labels.tolist() == [i % 2 for i in range(N) if i != 3]
    with pytest.raises(InputError, match="item 3 of Items: broken sector"):
        load(Items(list(range(N)), read))


BAD = {
    "text": (lambda: ["a cat", "a dog"], "image 0 of images: 'a cat' is text"),
    "text items": (lambda: Items(["a cat"]), "item 0 of Items: 'a cat' is text"),
    "text table": (lambda: datasets.Dataset.from_dict({"text": ["a"], "n": [1]}), "no column of images among text, n"),
    "text stream": (
        lambda: datasets.Dataset.from_dict({"text": ["a"]}).to_iterable_dataset(), "no column of images among text"
    ),
    "none": (lambda: [picture(1), None], "image 1 of images: NoneType is no PIL image"),
    "none item": (lambda: Items([picture(1), None]), "item 1 of Items: NoneType is no PIL image"),
    "none cell": (lambda: datasets.Dataset.from_dict({"image": [picture(1), None]}), "row 1 of .*: the cell is empty"),
    "number": (lambda: Items([3]), "item 0 of Items: int is no PIL image"),
    "rank": (lambda: [torch.zeros(2, 3, 8, 8)], r"image 0 of images: an image has the shape"),
    "rank of items": (lambda: Items([torch.zeros(8)]), "item 0 of Items: an image has the shape"),
    "features": (lambda: torch.zeros(5, 7), "3 or 4 dimensions"),
    "nan": (lambda: Items([torch.full((3, 8, 8), torch.nan)]), "item 0 of Items: NaN or infinite"),
    "complex": (lambda: [np.zeros((8, 8), complex)], "image 0 of images: an image is .* of complex128"),
    "no pixels": (lambda: [np.zeros((0, 8, 3), np.uint8)], "image 0 of images: an empty image"),
    "empty": (lambda: [], "images .list. holds no image"),
    "empty table": (lambda: table().select([]), "holds no image"),
    "empty item": (lambda: Items([()]), "item 0 of Items: an empty tuple"),
    "keys": (lambda: Items([{"a": 1, "b": 2}]), "item 0 of Items: no image under a, b"),
    "endless": (lambda: table().to_iterable_dataset().repeat(None), r"give .take\(n\)"),
    "split": (lambda: datasets.DatasetDict({"a": table(), "b": table()}), "without a split 'train'; available: a, b"),
    "loader": (lambda: torch.utils.data.DataLoader(Items(images_of())), "give its .dataset"),
    "generator": (lambda: iter(images_of()), "a list_iterator holds no images that can be read by number"),
    "other": (lambda: 3, "a int holds no images"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_wrong_objects_are_one_line(kind, tmp_path):
    make, message = BAD[kind]
    with pytest.raises(InputError, match=message) as caught:
        load(make(), cache_dir=str(tmp_path))
    assert "\n" not in str(caught.value)


def test_wrong_keys_and_settings_are_one_line():
    for dataset, more, message in [
        (table(), {"image_column": "x"}, "unknown data.image_column 'x'"),
        (Items([{"image": picture(1)}]), {"image_column": "x"}, "item 0 of Items: unknown data.image_column 'x'"),
        (table(), {"streaming": True}, "data.streaming: reads shards"),
    ]:
        with pytest.raises(InputError, match=message):
            load(dataset, **more)


def test_evaluation_takes_splits_pairs_or_one_set(tmp_path):
    other = table().select(range(6)).map(lambda row: {"label": "abc"[row["label"]]})
    named = table().map(lambda row: {"label": "xabc"[row["label"] + 1]})
    splits = datasets.DatasetDict({"train": named, "validation": other})
    for given in (splits, (named, other), (named, load(other))):
        train, test = load_eval_object(given, arguments(streaming=True))
        assert (len(train), len(test)) == (N, 6) and test.preprocessing == train.preprocessing
        assert test.labels.tolist() == LABELS[:6] and test.class_names == train.class_names == ["a", "b", "c"]
    train, test = load_eval_object(Items(pairs()), arguments(holdout=0.25))
    assert (len(train), sorted(test.labels.tolist())) == (9, [0, 1, 2])
    assert not set(train.job.rows) & set(test.job.rows)
    again = load_eval_object(Items(pairs()), arguments(holdout=0.25))[1]
    assert again.fingerprint == test.fingerprint
    folder = save(tmp_path, *(f"{'ab'[i % 2]}/{i}.png" for i in range(20)))
    assert [len(images) for images in load_eval_object(str(folder), arguments())] == [18, 2]
    assert [len(images) for images in load_eval_object((folder, folder), arguments())] == [20, 20]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda: images_of(), "images: has no labels"),
        (lambda: (table(), images_of()), "images: has no labels"),
        (lambda: table().select(range(2)), "2 images are too few"),
        (lambda: datasets.DatasetDict({"test": table()}), "without a split 'train'"),
    ],
)
def test_evaluation_without_labels_is_one_line(given, message):
    with pytest.raises(InputError, match=message):
        load_eval_object(given(), arguments())
