"""A file has the same pixels, and the same features, wherever an encoder meets it; compared on real files."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import tifffile
import timm
import torch
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian
from torchvision.transforms import v2

from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.data.loading import load_images
from hf_ssl_or.hub import export as exporting
from hf_ssl_or.models.auto import create_encoder
from hf_ssl_or.models.image_conversion import Preprocessing
from hf_ssl_or.models.image_processing_ssl import build_image_processor

REPOSITORY = Path(__file__).resolve().parents[1]
SIDE = 32
COLOR_MEAN, COLOR_STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
ENCODERS = {
    "color": Preprocessing(image_size=SIDE, crop_pct=0.875, interpolation="bicubic", mean=COLOR_MEAN, std=COLOR_STD),
    "gray": Preprocessing(image_size=SIDE, num_channels=1, crop_pct=0.9, mean=(0.3,), std=(0.2,)),
    "deep": Preprocessing(
        image_size=SIDE,
        num_channels=1,
        crop_pct=0.8,
        eight_bit=False,
        value_range=(10, 4095),
        mean=(0.3,),
        std=(0.2,),
    ),
    "six": Preprocessing(
        image_size=SIDE,
        num_channels=6,
        crop_pct=0.8,
        eight_bit=False,
        value_range=(-1, 3),
        mean=tuple(0.1 * (k + 1) for k in range(6)),
        std=tuple(0.1 * (k + 2) for k in range(6)),
    ),
}
RNG = np.random.default_rng(0)
WIDE, TALL, SQUARE = (45, 90), (90, 45), (50, 50)
# How EXIF's orientation turns what is stored into what is upright.
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


# ---------------------------------------------------------------------------------------------------------------------
# Files: each is written to a path, and comes with the upright pixels (H, W, C) that it shows


def colors(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([255 * x / width, 255 * y / height, 127 + 100 * np.sin(x / 5)], -1)
    return (smooth + RNG.integers(-20, 21, smooth.shape)).clip(0, 255).astype(np.uint8)


def color(size: tuple[int, int]) -> Callable[[Path], np.ndarray]:
    def write(path: Path) -> np.ndarray:
        Image.fromarray(colors(*size)).save(path)
        return np.asarray(Image.open(path))

    return write


def turned(orientation: int) -> Callable[[Path], np.ndarray]:
    def write(path: Path) -> np.ndarray:
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(colors(*WIDE)).save(path, exif=exif)
        return UPRIGHT[orientation](np.asarray(Image.open(path)))

    return write


def palette(transparent: bool) -> Callable[[Path], np.ndarray]:
    def write(path: Path) -> np.ndarray:
        table = RNG.integers(0, 256, (4, 3), dtype=np.uint8)
        index = RNG.integers(0, 4, TALL, dtype=np.uint8)
        image = Image.fromarray(index, mode="P")
        image.putpalette(table.tobytes())
        image.save(path, **({"transparency": 2} if transparent else {}))
        if transparent:
            table[2] = 255
        return table[index]

    return write


def rgba(path: Path) -> np.ndarray:
    """Alpha is 0 or 255: between them PIL rounds in its own way."""
    pixels, alpha = colors(*WIDE), np.where(RNG.random(WIDE) < 0.5, 255, 0).astype(np.uint8)
    Image.fromarray(np.dstack([pixels, alpha])).save(path)
    return np.where(alpha[..., None] == 0, 255, pixels).astype(np.uint8)


def cmyk(path: Path) -> np.ndarray:
    Image.fromarray(colors(*WIDE)).convert("CMYK").save(path)
    return np.asarray(Image.open(path).convert("RGB"))


def gray(size: tuple[int, int], repeats: int = 1) -> Callable[[Path], np.ndarray]:
    def write(path: Path) -> np.ndarray:
        pixels = colors(*size)[..., :1]
        Image.fromarray(pixels[..., 0]).save(path)
        return np.repeat(pixels, repeats, axis=-1)

    return write


def deep(bits: int) -> Callable[[Path], np.ndarray]:
    def write(path: Path) -> np.ndarray:
        pixels = RNG.integers(0, 2**bits, WIDE, dtype=np.uint16)
        Image.fromarray(pixels).save(path)
        return pixels[..., None]

    return write


def float_tiff(path: Path) -> np.ndarray:
    pixels = RNG.uniform(-100, 5000, TALL).astype(np.float32)
    tifffile.imwrite(path, pixels)
    return pixels[..., None]


def six(path: Path) -> np.ndarray:
    pixels = RNG.uniform(-1.2, 3.2, (*TALL, 6)).astype(np.float32)
    np.save(path, pixels)
    return pixels


def dicom(photometric: str) -> Callable[[Path], np.ndarray]:
    def write(path: Path) -> np.ndarray:
        stored = RNG.integers(0, 4096, WIDE, dtype=np.uint16)
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = UID("1.2.840.10008.5.1.4.1.1.7")
        meta.MediaStorageSOPInstanceUID = UID("1.2.3")
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
        data.Rows, data.Columns, data.SamplesPerPixel = *stored.shape, 1
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
        data.PhotometricInterpretation, data.PixelData = photometric, stored.tobytes()
        pydicom.dcmwrite(path, data, enforce_file_format=True)
        return (4095 - stored if photometric == "MONOCHROME1" else stored)[..., None]

    return write


FILES: dict[str, tuple[str, Callable[[Path], np.ndarray]]] = {
    "square.png": ("color", color(SQUARE)),
    "exact.png": ("color", color((SIDE, SIDE))),
    "wide.png": ("color", color(WIDE)),
    "tall.jpg": ("color", color(TALL)),
    **{f"orientation{k}.jpg": ("color", turned(k)) for k in UPRIGHT},
    "palette.png": ("color", palette(False)),
    "palette_transparent.png": ("color", palette(True)),
    "rgba.png": ("color", rgba),
    "cmyk.jpg": ("color", cmyk),
    "cmyk.tif": ("color", cmyk),
    "gray_in_color.png": ("color", gray(WIDE, repeats=3)),
    "gray.png": ("gray", gray(WIDE)),
    **{f"bits{bits}.png": ("deep", deep(bits)) for bits in (8, 10, 12, 16)},
    "float.tif": ("deep", float_tiff),
    "monochrome1.dcm": ("deep", dicom("MONOCHROME1")),
    "monochrome2.dcm": ("deep", dicom("MONOCHROME2")),
    "six.npy": ("six", six),
}


# ---------------------------------------------------------------------------------------------------------------------
# References, which share no code with the package


def reference(pixels_HWC: np.ndarray, p: Preprocessing) -> torch.Tensor:
    """Makes what the encoder gets: by timm and torchvision of 8-bit pixels, by plain formulas of others."""
    if p.eight_bit and p.num_channels == 3:
        transform = timm.data.create_transform(
            input_size=(3, p.image_size, p.image_size),
            crop_pct=p.crop_pct,
            interpolation=p.interpolation,
            mean=p.mean,
            std=p.std,
        )
        return transform(Image.fromarray(np.ascontiguousarray(pixels_HWC)))
    if p.eight_bit:
        transform = v2.Compose([v2.Resize(int(p.image_size / p.crop_pct)), v2.CenterCrop(p.image_size)])
        x = np.asarray(transform(Image.fromarray(pixels_HWC[..., 0])), dtype=np.float64)[None] / 255
    else:
        x = center_crop(pixels_HWC.astype(np.float64), int(p.image_size / p.crop_pct), p.image_size).transpose(2, 0, 1)
        low, high = p.value_range
        x = ((x - low) / (high - low)).clip(0, 1)
    mean, std = (np.reshape(values, (-1, 1, 1)) for values in (p.mean, p.std))
    return torch.from_numpy((x - mean) / std).float()


def center_crop(x_HWC: np.ndarray, shorter: int, side: int) -> np.ndarray:
    """Resizes by antialiased bilinear interpolation, then cuts out the center."""
    height, width = x_HWC.shape[:2]
    size = [shorter * height // min(height, width), shorter * width // min(height, width)]
    x = np.einsum("ih,jw,hwc->ijc", triangles(height, size[0]), triangles(width, size[1]), x_HWC)
    top, left = (round((n - side) / 2) for n in size)
    return x[top : top + side, left : left + side]


def triangles(n: int, m: int) -> np.ndarray:
    """Weights of n pixels in each of m."""
    centers = (np.arange(m) + 0.5) * n / m
    weights = 1 - np.abs(np.arange(n) + 0.5 - centers[:, None]) / max(n / m, 1)
    weights = weights.clip(0, None)
    return weights / weights.sum(1, keepdims=True)


# ---------------------------------------------------------------------------------------------------------------------
# Fresh processes

ELSEWHERE = """
    import json, sys
    package, work = sys.argv[1:]
    if package:
        sys.path.insert(0, package)
        import hf_ssl_or
    else:
        sys.modules["hf_ssl_or"] = None  # not importable here
    import numpy as np, torch
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModel, pipeline

    torch.set_num_threads(1)
    trust = {} if package else {"trust_remote_code": True}
    found = {}
    for kind, files in json.load(open(work + "/files.json")).items():
        folder = f"{work}/{kind}"
        model = AutoModel.from_pretrained(folder, **trust).eval()
        processor = AutoImageProcessor.from_pretrained(folder, **trust)
        extract = pipeline("image-feature-extraction", model=folder, device="cpu", pool=True, **trust)
        assert type(extract).__module__.startswith("hf_ssl_or." if package else "transformers_modules.")
        for name, path in files.items():
            pixels = processor(path, return_tensors="pt").pixel_values
            found[f"{name}/processor/pixels"] = pixels.numpy()
            found[f"{name}/processor/features"] = model(pixels).pooler_output.detach().numpy()
            found[f"{name}/pipeline/features"] = np.array(extract(path))
            if kind in ("color", "gray"):
                found[f"{name}/pipeline of PIL/features"] = np.array(extract(Image.open(path)))
    np.savez(f"{work}/{'with' if package else 'without'}.npz", **found)
"""

# What a reader of the READMEs does, with another name of the image.
READER = """
    import json, sys
    sys.modules["hf_ssl_or"] = None
    import numpy as np, torch

    torch.set_num_threads(1)
    work, target = sys.argv[1:]
    found = {}
    for kind, files in json.load(open(work + "/files.json")).items():
        for number, (code, photo) in enumerate(json.load(open(f"{work}/{kind}-{target}.json"))):
            for name, path in files.items():
                names = {}
                exec(code.replace(f'"{photo}"', repr(path)), names)
                for what in ("pixels", "features"):
                    value = names["pixel_values" if what == "pixels" else what]
                    found[f"{name}/{target}, block {number}/{what}"] = np.asarray(value)
    np.savez(f"{work}/{target}.npz", **found)
"""


def run(code: str, work: Path, *arguments: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "hf"), "HF_MODULES_CACHE": str(work / "code")}
    environment |= {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", textwrap.dedent(code), *arguments]
    result = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.fixture(scope="module")
def shown() -> dict[str, np.ndarray]:
    """The upright pixels of each file, once it is written."""
    return {}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, shown: dict[str, np.ndarray]) -> Path:
    """A folder with every file, each alone in a folder of its own, and with an encoder of each kind."""
    work, torch_threads = tmp_path_factory.mktemp("work"), torch.get_num_threads()
    torch.set_num_threads(1)
    listed: dict[str, dict[str, str]] = {kind: {} for kind in ENCODERS}
    for name, (kind, write) in FILES.items():
        path = work / "files" / name.replace(".", "_") / name
        path.parent.mkdir(parents=True)
        shown[name] = write(path)
        listed[kind][name] = str(path)
    (work / "files.json").write_text(json.dumps(listed))
    for kind, preprocessing in ENCODERS.items():
        torch.manual_seed(0)
        options: dict[str, Any] = {"image_size": SIDE, "num_channels": preprocessing.num_channels}
        create_encoder("resnet18", layers=[1, 1, 1, 1], **options).save_pretrained(work / kind)
        build_image_processor(preprocessing).save_pretrained(work / kind)
    yield work
    torch.set_num_threads(torch_threads)


@pytest.fixture(scope="module")
def elsewhere(work: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for where, package in (("with", str(REPOSITORY)), ("without", "")):
        run(ELSEWHERE, work, package, str(work))
        with np.load(work / f"{where}.npz") as values:
            found |= {f"{where} the package/{key}": values[key] for key in values.files}
    return found


def exported_by(target: str, work: Path) -> dict[str, np.ndarray]:
    """Exports every encoder, and runs each README's lines on every file; what `compare` does is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        unchecked = lambda portable, folder, lines, pictures: {each.library: {"features": 0.0} for each in lines}  # noqa: E731
        patch.setattr(exporting, "compare", unchecked)
        for kind in ENCODERS:
            folder = exporting.export(work / kind, target, work / f"{kind}-{target}").folder
            blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
            photos = [re.search(r'"((?:photo|image)\.\w+)"', block)[1] for block in blocks]
            (work / f"{kind}-{target}.json").write_text(json.dumps(list(zip(blocks, photos, strict=True))))
    run(READER, work, str(work), target)
    with np.load(work / f"{target}.npz") as values:
        return dict(values)


def ways(found: dict[str, np.ndarray], name: str, what: str) -> Iterator[tuple[str, torch.Tensor]]:
    for key, value in found.items():
        way, _, last = key.rpartition("/")
        if f"/{way}/".find(f"/{name}/") >= 0 and last == what:
            yield way, torch.from_numpy(np.reshape(value, value.shape[-3:] if what == "pixels" else -1)).float()


def close(found: torch.Tensor, expected: torch.Tensor, way: str) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * scale, msg=lambda text: f"{way}: {text}")


def evaluated(path: Path, p: Preprocessing, **more: Any) -> tuple[Preprocessing, torch.Tensor]:
    """Prepares a file as the evaluation does."""
    settings: dict[str, Any] = {"image_size": p.image_size, "crop_pct": p.crop_pct, "interpolation": p.interpolation}
    settings |= {"mean": list(p.mean), "std": list(p.std), "cache": "none"}
    settings |= {} if p.eight_bit else {"value_range": list(p.value_range)}
    arguments = DataArguments(dataset=str(path.parent), **settings | more)
    images = load_images(arguments, "train", num_channels=p.num_channels, squares=True)
    assert len(images) == 1
    return images.preprocessing, next(iter(images.clean([np.array([0])])))[0]


# ---------------------------------------------------------------------------------------------------------------------


def expected_of(name: str, work: Path, shown: dict[str, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns pixels and features in the evaluation, after a comparison with the reference."""
    kind = FILES[name][0]
    preprocessing, pixels_CHW = evaluated(work / "files" / name.replace(".", "_") / name, ENCODERS[kind])
    assert preprocessing == ENCODERS[kind]
    close(pixels_CHW, reference(shown[name], preprocessing), "the evaluation")
    if kind == "color":
        assert torch.equal(pixels_CHW, reference(shown[name], preprocessing))
    encoder = create_encoder("resnet18", init_from=work / kind).eval()
    with torch.no_grad():
        return pixels_CHW, encoder(pixels_CHW[None]).pooler_output[0]


@pytest.mark.parametrize("name", FILES)
def test_one_way_from_a_file_to_pixels(
    name: str, work: Path, shown: dict[str, np.ndarray], elsewhere: dict[str, np.ndarray]
) -> None:
    """Evaluation, image processor and pipeline, with the package and by the code in the folder, and a reference."""
    pixels_CHW, features_F = expected_of(name, work, shown)
    of_pixels, of_features = (list(ways(elsewhere, name, what)) for what in ("pixels", "features"))
    assert (len(of_pixels), len(of_features)) == (2, 6 if FILES[name][0] in ("color", "gray") else 4)
    for way, found in of_pixels:
        assert torch.equal(found, pixels_CHW), way
    for way, found in of_features:
        close(found, features_F, way)


@pytest.mark.slow
@pytest.mark.parametrize("target", exporting.TARGETS)
def test_the_lines_of_every_export_give_these_pixels(target: str, work: Path, shown: dict[str, np.ndarray]) -> None:
    exported = exported_by(target, work)
    for name, (kind, _) in FILES.items():
        pixels_CHW, features_F = expected_of(name, work, shown)
        of_pixels, of_features = (list(ways(exported, name, what)) for what in ("pixels", "features"))
        assert len(of_pixels) == len(of_features) == (2 if target == "timm" else 1)
        for way, found in of_pixels:
            if kind != "color" or target in ("timm", "transformers"):
                assert torch.equal(found, pixels_CHW), way
            torch.testing.assert_close(
                found, pixels_CHW, rtol=0, atol=2e-6, msg=lambda text, way=way: f"{way}: {text}"
            )
        for way, found in of_features:
            close(found, features_F, way)


def test_a_measured_range_travels(work: Path, shown: dict[str, np.ndarray], tmp_path: Path) -> None:
    """With `data.value_range=auto` the range of the set is what the image processor uses."""
    path = work / "files" / "bits12_png" / "bits12.png"
    preprocessing, pixels_CHW = evaluated(path, ENCODERS["deep"], value_range="auto")
    low, high = preprocessing.value_range
    assert 0 <= low < 30 and 4065 < high <= 4095
    close(pixels_CHW, reference(shown["bits12.png"], replace(ENCODERS["deep"], value_range=(low, high))), "auto")
    build_image_processor(preprocessing).save_pretrained(tmp_path)
    processor = type(build_image_processor(preprocessing)).from_pretrained(tmp_path)
    assert torch.equal(processor(str(path), return_tensors="pt").pixel_values[0], pixels_CHW)
