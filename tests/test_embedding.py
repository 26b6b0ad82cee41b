"""Embeddings of folders, tables, streams and lists: what the file holds, kills, refusals, and what is found."""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from processes import Processes, command_line
from torch import Tensor, nn

from hf_ssl_or import embed, embedding
from hf_ssl_or.cli import main
from hf_ssl_or.data import loading
from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation.embeddings import Embeddings
from hf_ssl_or.evaluation.encoder_loading import load_encoder
from hf_ssl_or.evaluation.features import extract_features
from hf_ssl_or.models.auto import create_encoder
from hf_ssl_or.models.image_conversion import Preprocessing
from hf_ssl_or.models.image_processing_ssl import build_image_processor

SIZE = 12


class Pixels(nn.Module):
    """Returns the pixels as features, without their mean."""

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        x_BF = pixel_values.flatten(1)
        return SimpleNamespace(pooler_output=x_BF - x_BF.mean(1, keepdim=True))


def picture(seed: int, size: tuple[int, int] = (16, 14)) -> Image.Image:
    """Smooth noise, of which a resize or JPEG changes little."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders") / "tiny"
    torch.manual_seed(0)
    layers = {"layers": [1, 1, 1, 1]}
    create_encoder("resnet18", stem="small", channels=[4, 4, 8, 8], image_size=SIZE, **layers).save_pretrained(folder)
    build_image_processor(Preprocessing(image_size=SIZE, mean=(0.5,) * 3, std=(0.2,) * 3)).save_pretrained(folder)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Forty images of two classes, and two files that are none."""
    folder = tmp_path / "photos"
    for i in range(40):
        (folder / f"class {i % 2}").mkdir(parents=True, exist_ok=True)
        picture(i).save(folder / f"class {i % 2}" / f"{i:03d}.png")
    (folder / "class 0" / "004a.png").write_bytes(b"no image")
    (folder / "class 1" / "zz.jpg").write_bytes(b"")
    return folder


CORRUPT = "data.max_corrupt=0.1"


def run(*argv: object) -> int:
    return main(["embed", *map(str, argv)])


def columns(path: Path) -> dict[str, Any]:
    return pq.read_table(path).to_pydict()


# -- the file ---------------------------------------------------------------------------------------------------------


def test_parquet_of_a_folder(encoder: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "new" / "features.parquet"
    argv = [encoder, "--dataset", photos, "--output", output, "--batch-size", "7", CORRUPT, "--num-workers", 1]
    assert run(*argv) == 0
    found, expected = columns(output), [f"class {c}/{i:03d}.png" for c in (0, 1) for i in range(c, 40, 2)]
    assert found["file"] == expected
    assert found["row"] == [*range(3), *range(4, 41)]
    assert found["label"] == [0] * 20 + [1] * 20 and set(found["class_name"][:20]) == {"class 0"}
    frozen = load_encoder(str(encoder))
    images = loading.load_images(
        embedding.recipe_from_dict({"data": {"dataset": str(photos), "max_corrupt": 0.1}}, "test").data,
        "train",
        like=frozen.processing.exact,
        squares=True,
    )
    features = extract_features(frozen.model, images, batch_size=7, device="cpu", progress=False)
    assert torch.equal(torch.tensor(found["features"]), features) and found["row"] == images.job.rows.tolist()

    schema = pq.read_schema(output)
    metadata = json.loads(schema.metadata[b"hf_ssl_or"])
    assert str(schema.field("features").type) == "fixed_size_list<element: float>[8]"
    assert metadata["encoder"] == {"name": "tiny", "weights": frozen.key(), "features": "pooler output"}
    assert metadata["dataset"] == {"name": "photos", "fingerprint": images.fingerprint}
    assert metadata["preprocessing"]["image_size"] == SIZE and metadata["hf_ssl_or"] == "0.1.0"
    assert metadata["unreadable"]["count"] == 2 and "class 0/004a.png" in metadata["unreadable"]["named"][0]
    assert str(tmp_path).encode() not in output.read_bytes()
    shown = capsys.readouterr().out
    assert "40 images of photos by tiny" in shown and "left out 2 unreadable images: class 0/004a.png" in shown
    assert [path.name for path in output.parent.iterdir()] == ["features.parquet"]


@pytest.mark.parametrize("kind", ["photos.csv", "class */*.png"])
def test_files_of_a_list_and_of_a_pattern(encoder: Path, photos: Path, tmp_path: Path, kind: str) -> None:
    names = [f"class {i % 2}/{i:03d}.png" for i in range(6)]
    (photos / "photos.csv").write_text("path\n" + "\n".join(names) + "\n")
    (photos / "class 0" / "004a.png").unlink()
    found = embed(str(encoder), str(photos / kind), tmp_path / "f.parquet")
    assert found.files[:6] == names if kind == "photos.csv" else set(found.files) > set(names)
    assert str(tmp_path).encode() not in (tmp_path / "f.parquet").read_bytes()


def test_npz_holds_the_same_without_pickles(encoder: Path, photos: Path, tmp_path: Path) -> None:
    options = ["--dataset", photos, CORRUPT, "--neighbors", 3, "--duplicates", "--outliers", 4]
    for name in ("a.parquet", "a.npz", "b.npz"):
        assert run(encoder, *options, "--output", tmp_path / name) == 0
    table, arrays = columns(tmp_path / "a.parquet"), np.load(tmp_path / "a.npz", allow_pickle=False)
    names = {"files": "file", "rows": "row", "labels": "label"}
    for name in arrays.files:
        if name not in ("metadata", "class_names"):
            assert arrays[name].tolist() == table[names.get(name, name)], name
    assert arrays["class_names"].tolist() == ["class 0", "class 1"]
    assert json.loads(str(arrays["metadata"])) == json.loads(
        pq.read_schema(tmp_path / "a.parquet").metadata[b"hf_ssl_or"]
    )
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    both = [Embeddings.read(tmp_path / name) for name in ("a.parquet", "a.npz")]
    assert torch.equal(both[0].features, both[1].features) and both[0].features.dtype == torch.float32
    assert torch.equal(both[0].neighbor_rows, both[1].neighbor_rows) and both[0].files == both[1].files


def test_row_groups_have_a_few_thousand_images(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (9000, 4, 4, 3), dtype=np.uint8)
    processing = Preprocessing(image_size=4)
    found = embed(Pixels(), images, tmp_path / "f.parquet", preprocessing=processing, batch_size=100)
    file = pq.ParquetFile(tmp_path / "f.parquet")
    sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert sum(sizes) == 9000 and max(sizes) <= 5000 and len(sizes) == 2 + (sum(sizes[:2]) < 9000)
    values = images.astype(np.float32).transpose(0, 3, 1, 2).reshape(9000, -1) / np.float32(255)
    np.testing.assert_allclose(found.features, values - values.mean(1, keepdims=True), atol=1e-6)
    assert found.rows.tolist() == list(range(9000)) and found.labels is None and found.files[3] == "image 3 of images"


def test_images_that_are_decoded_in_each_pass_and_bf16(
    encoder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(encoder, "--dataset", photos, "--output", tmp_path / "a.parquet", CORRUPT) == 0
    assert run(encoder, "--dataset", photos, "--output", tmp_path / "c.parquet", CORRUPT, "--dtype", "bf16") == 0
    monkeypatch.setattr(loading, "_MEMORY_BYTES", 0)
    lazily = [CORRUPT, "data.cache=none", "data.num_workers=1"]
    assert run(encoder, "--dataset", photos, "--output", tmp_path / "b.parquet", *lazily) == 0
    a, b, c = (Embeddings.read(tmp_path / f"{name}.parquet") for name in "abc")
    assert torch.equal(a.features, b.features) and a.files == b.files
    assert not torch.equal(a.features, c.features) and torch.allclose(a.features, c.features, atol=0.05, rtol=0.05)


def write_shards(folder: Path, broken: tuple[int, ...]) -> Path:
    folder.mkdir()
    cells = []
    for i in range(60):
        file = io.BytesIO()
        picture(i).save(file, "PNG")
        cells.append({"bytes": b"broken" if i in broken else file.getvalue(), "path": None})
    for shard in range(2):
        table = embedding.pa.table({"image": cells[30 * shard : 30 * shard + 30]})
        pq.write_table(table, folder / f"train-{shard:05d}-of-00002.parquet", row_group_size=10)
    return folder


def test_a_stream_leaves_out_what_it_cannot_read(encoder: Path, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", broken=(3, 29, 59))
    output, whole = tmp_path / "stream.parquet", tmp_path / "whole.parquet"
    options = [encoder, "--dataset", shards, "data.max_corrupt=0.1", "--batch-size", 8, "--neighbors", 2]
    assert run(*options, "--output", output, "data.streaming=true", "--split", "train") == 0
    assert run(*options, "--output", whole) == 0
    a, b = Embeddings.read(output), Embeddings.read(whole)
    assert a.rows.tolist() == b.rows.tolist() == [i for i in range(60) if i not in (3, 29, 59)]
    torch.testing.assert_close(a.features, b.features)  # batches are cut elsewhere
    assert (
        a.metadata["unreadable"]["count"] == 3 and a.files[0] == "row 0 of row group 0 of train-00000-of-00002.parquet"
    )
    assert str(tmp_path) not in json.dumps(a.metadata) + "".join(a.files)


# -- kills ------------------------------------------------------------------------------------------------------------


def child(arguments: list[str], folder: str, die_at: int, log: str | None, pause: float) -> None:
    """Is a command in a process that dies before its n-th operation on a file of the folder, or counts them."""
    count = itertools.count()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir") and folder in str(arguments[0]):
            if next(count) == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if log is not None:
                with open(log, "a") as file:
                    file.write(".")
            time.sleep(pause)

    sys.addaudithook(hook)
    embedding._PART = 16
    command_line(arguments)


def start(argv: list[object], folder: Path, tmp_path: Path, *, die_at: int = -1, log: Path | None = None, pause=0.0):
    environment = {"HF_SSL_OR_CACHE": str(tmp_path / "cache")}
    arguments = [str(argument) for argument in ("embed", *argv)]
    line = (arguments, str(folder), die_at, None if log is None else str(log), pause)
    return Processes(child, *line, log=tmp_path / "stderr", environment=environment)


def arguments_of(encoder: Path, data: Path, output: Path, *more: object) -> list[object]:
    found = ["--neighbors", 2, "--duplicates", 0.9, "--outliers", 3, "data.num_workers=1"]
    return [encoder, "--dataset", data, "--output", output, "--batch-size", 8, CORRUPT, *found, *more]


@pytest.mark.parametrize(("ending", "streams"), [(".parquet", False), (".parquet", True), (".npz", False)])
def test_killed_before_any_file_operation_it_ends_as_if_it_had_not_been(
    encoder: Path, photos: Path, tmp_path: Path, ending: str, streams: bool
) -> None:
    data = write_shards(tmp_path / "shards", broken=(3, 29)) if streams else photos
    more = ["data.streaming=true"] if streams else []
    whole, log = tmp_path / "whole" / f"features{ending}", tmp_path / "operations"
    assert start(arguments_of(encoder, data, whole, *more), whole.parent, tmp_path, log=log).wait().statuses == [0]
    operations = len(log.read_text())
    assert operations > 20
    step = 9 if ending == ".parquet" and not streams else 25
    for die_at in {*range(0, operations, step), *range(operations - 4, operations)}:
        output = tmp_path / f"killed-{die_at}" / whole.name
        argv = arguments_of(encoder, data, output, *more)
        assert start(argv, output.parent, tmp_path, die_at=die_at).wait().statuses == [-9], die_at
        ended = start(argv, output.parent, tmp_path).wait()
        assert ended.statuses == [0], ended.errors
        assert output.read_bytes() == whole.read_bytes(), die_at
        assert output.with_suffix(".png").read_bytes() == whole.with_suffix(".png").read_bytes()
        assert {path.name for path in output.parent.iterdir()} == {whole.name, "features.png"}


def test_killed_at_random_instants_it_ends_as_if_it_had_not_been(encoder: Path, photos: Path, tmp_path: Path) -> None:
    whole, output = (tmp_path / name / "features.parquet" for name in ("whole", "killed"))
    seconds = start(arguments_of(encoder, photos, whole), whole.parent, tmp_path, pause=0.02).wait().seconds
    dice, killed = random.Random(0), 0
    for _ in range(4):
        running = start(arguments_of(encoder, photos, output), output.parent, tmp_path, pause=0.02)
        time.sleep(dice.uniform(0.3, 0.9) * seconds)
        running.kill()
        killed += running.wait().statuses == [-9]
    assert start(arguments_of(encoder, photos, output), output.parent, tmp_path).wait().statuses == [0]
    assert killed and output.read_bytes() == whole.read_bytes()


def test_what_is_done_is_not_done_again(
    encoder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "_PART", 8)
    options: dict[str, Any] = {"overrides": [CORRUPT], "batch_size": 8}
    output, encoded = tmp_path / "f.parquet", []
    clean = embedding.ImageSet.clean

    def counting(self: Any, indices: Any, device: Any = "cpu") -> Any:
        for x_BCHW in clean(self, indices, device):
            if len(encoded) == 3:
                raise KeyboardInterrupt
            encoded.append(len(x_BCHW))
            yield x_BCHW

    monkeypatch.setattr(embedding.ImageSet, "clean", counting)
    with pytest.raises(KeyboardInterrupt):
        embed(str(encoder), str(photos), output, **options)
    encoded.clear()
    monkeypatch.setattr(embedding.ImageSet, "clean", clean)
    rest = embed(str(encoder), str(photos), output, **options)
    assert len(rest.files) == 40 and not list(tmp_path.glob("*.part"))

    again = embed(str(encoder), str(photos), output, **options)
    assert again.images_per_second is None and torch.equal(again.features, rest.features)
    found = embed(str(encoder), str(photos), output, neighbors=2, **options)  # from the features of the file
    fresh = embed(str(encoder), str(photos), tmp_path / "fresh.parquet", neighbors=2, **options)
    assert found.images_per_second is None and fresh.images_per_second is not None
    assert output.read_bytes() == (tmp_path / "fresh.parquet").read_bytes() and (tmp_path / "f.png").exists()


# -- what is found ----------------------------------------------------------------------------------------------------


def jpeg(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return Image.open(io.BytesIO(file.getvalue()))


def test_planted_duplicates_and_outliers_of_real_images(real_data: Path, tmp_path: Path) -> None:
    table = pq.read_table(real_data / "imagenette64" / "test-00000-of-00001.parquet")["image"].take(
        list(range(0, 3900, 13))
    )
    images = [Image.open(io.BytesIO(cell["bytes"])).convert("RGB") for cell in table.to_pylist()]
    copies = [jpeg(image) for image in images[:10]]
    copies += [image.resize((96, 96), Image.Resampling.BICUBIC) for image in images[10:20]]
    odd = [np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8) for i in range(3)]
    found = embed("random:timm:resnet10t@64", [*images, *copies], duplicates="auto", sheet=tmp_path / "sheet.png")
    group = found.duplicate_group
    assert sum(int(group[i]) == int(group[len(images) + i]) >= 0 for i in range(20)) >= 19
    assert int((group[20 : len(images)] >= 0).sum()) <= 3  # and few others
    assert Image.open(tmp_path / "sheet.png").size[0] > 800
    pixels = Preprocessing(image_size=16, mean=(0.5,) * 3)
    found = embed(Pixels(), [*images, *odd], preprocessing=pixels, outliers=10)
    assert set(found.outlier_score.argsort(descending=True)[:3].tolist()) == {300, 301, 302}


@pytest.mark.parametrize(("channels", "dtype"), [(1, np.uint8), (1, np.uint16), (3, np.uint16), (5, np.float32)])
def test_objects_of_any_kind_and_their_sheet(channels: int, dtype: type, tmp_path: Path) -> None:
    top = np.iinfo(dtype).max if dtype is not np.float32 else 1
    source = np.random.default_rng(0).random((30, 20, 24, channels)) * top
    source[4] = source[9] = source[2]
    eight_bit = dtype is np.uint8
    processing = Preprocessing(
        image_size=8,
        num_channels=channels,
        eight_bit=eight_bit,
        value_range=(0, float(top)),
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
    )
    images = [image.astype(dtype) for image in source]
    found = embed(
        Pixels(),
        images,
        preprocessing=processing,
        neighbors=4,
        duplicates=0.99,
        outliers=3,
        sheet=tmp_path / "sheet.png",
    )
    assert found.duplicate_group.tolist() == [0 if i in (2, 4, 9) else -1 for i in range(30)]
    assert set(found.neighbor_rows[2, :2].tolist()) == {4, 9} and found.neighbor_similarities.shape == (30, 4)
    assert found.features.shape == (30, 64 * channels)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert len(np.unique(sheet.reshape(-1, 3), axis=0)) > 100


def test_a_module_with_its_image_processor_or_its_own_configuration(encoder: Path) -> None:
    frozen = load_encoder(str(encoder))
    images = [picture(i) for i in range(5)]
    named = embed(str(encoder), images)
    frozen.model.train()
    given = embed(frozen.model, images, preprocessing=build_image_processor(frozen.processing.exact))
    assert torch.equal(named.features, given.features) and frozen.model.training
    assert torch.equal(embed(frozen, images).features, named.features)
    frozen.model.config.preprocessing = frozen.processing.exact.to_dict()
    assert torch.equal(embed(frozen.model, images).features, named.features)
    with pytest.raises(InputError, match="preprocessing"):
        embed(Pixels(), images)
    with pytest.raises(InputError, match="pooler_output"):
        embed(nn.Identity(), images, preprocessing=Preprocessing(image_size=4))
    with pytest.raises(InputError, match="name the folder"):
        embed(str(encoder), ["a.png"])


def test_features_that_are_not_finite_are_refused_by_name() -> None:
    class Broken(Pixels):
        def forward(self, pixel_values: Tensor) -> SimpleNamespace:
            output = super().forward(pixel_values)
            output.pooler_output[2] = torch.nan
            return output

    with pytest.raises(InputError, match="NaN or infinite, first of image 2"):
        embed(Broken(), [picture(i) for i in range(5)], preprocessing=Preprocessing(image_size=4))


# -- refusals ---------------------------------------------------------------------------------------------------------


def refusal(capsys: pytest.CaptureFixture, *argv: object) -> str:
    capsys.readouterr()
    assert run(*argv) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line and "Loading weights" not in line]  # transformers' own bar
    assert len(lines) == 1 and lines[0].startswith("hf-ssl-or: error: "), error
    return lines[0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--output", "f.csv"], "ends in .parquet or .npz"),
        (["--output", "{file}/f.npz"], "cannot write to"),
        (["--duplicates", "1.5"], "at most 1, not '1.5'"),
        (["--duplicates", "no"], "at most 1, not 'no'"),
        (["--neighbors", "0"], "1 or more"),
        (["--neighbors", "40"], "40 nearest of 40 images"),
        (["--outliers", "50"], "50 nearest of 40 images"),
        (["--batch-size", "0"], "at least 1"),
        (["--sheet", "s.png"], "ask for one of them"),
        (["--neighbors", "2", "--sheet", "s.jpg"], "ends in .png"),
        (["--dataset", "/no/such/folder"], "/no/such/folder"),
        (["--split", "test"], "no split 'test'"),
        (["training.epochs=3"], "only data.* settings"),
        (["data.image_sise=3"], "image_size"),
    ],
)
def test_bad_arguments(
    encoder: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    more: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    more = [text.replace("{file}", str(tmp_path / "file")) for text in more]
    assert message in refusal(capsys, encoder, CORRUPT, "--dataset", photos, "--output", "f.parquet", *more)
    assert not list(tmp_path.glob("f.parquet*"))


def test_bad_encoders_and_missing_options(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--dataset", photos, "--output", tmp_path / "f.npz"]
    assert "no such folder" in refusal(capsys, "/no/such/encoder", *options)
    assert "resnet19" in refusal(capsys, "timm:resnet19", *options)
    assert "--dataset" in refusal(capsys, "random:resnet18@32", "--output", "f.npz")
    assert "--output" in refusal(capsys, "random:resnet18@32", "--dataset", photos)


def test_another_encoder_or_set_is_refused_unless_it_is_to_be_replaced(
    encoder: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "f.parquet"
    options = ["--output", output, CORRUPT]
    assert run(encoder, "--dataset", photos, *options) == 0
    before = output.read_bytes()
    assert "another encoder (tiny, not random:resnet18@16)" in refusal(
        capsys, "random:resnet18@16", "--dataset", photos, *options
    )
    assert "another dataset (photos, not shapes)" in refusal(
        capsys, encoder, "--dataset", "shapes", "data.shapes_train=20", *options
    )
    assert "another batch size (256, not 8)" in refusal(
        capsys, encoder, "--dataset", photos, *options, "--batch-size", 8
    )
    assert output.read_bytes() == before and not list(tmp_path.glob("*.part"))
    assert run("random:resnet18@16", "--dataset", photos, *options, "--overwrite") == 0
    assert Embeddings.read(output).metadata["encoder"]["name"] == "random:resnet18@16"
    output.write_bytes(b"precious")
    assert "holds no features" in refusal(capsys, encoder, "--dataset", photos, *options)
    assert output.read_bytes() == b"precious"


def test_the_part_of_another_interrupted_run_is_refused_unless_it_is_to_be_replaced(
    encoder: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output, part = tmp_path / "f.parquet", tmp_path / "f.parquet.part"
    part.mkdir()
    (part / "notes.txt").write_text("mine")
    assert "is in the way" in refusal(capsys, encoder, "--dataset", photos, "--output", output, CORRUPT)
    assert (part / "notes.txt").read_text() == "mine"
    (part / "notes.txt").unlink()
    with pytest.raises(InputError, match="NaN"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedding._Work, "_readable", lambda *_: (_ for _ in ()).throw(InputError("NaN")))
        embed(str(encoder), str(photos), output, overrides=[CORRUPT])
    assert (part / "made_from.json").exists()
    other = ["random:resnet18@16", "--dataset", photos, "--output", output, CORRUPT]
    assert "another encoder" in refusal(capsys, *other)
    assert run(*other, "--overwrite") == 0 and not part.exists()


def test_help_shows_an_example(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        run("--help")
    shown = capsys.readouterr().out
    assert "example: hf-ssl-or embed" in shown and "--duplicates" in shown
