"""The proof of an export: the lines that its README shows, run in a fresh process that cannot import this package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from hf_ssl_or.data.shapes import ShapesSource
from hf_ssl_or.errors import InputError
from hf_ssl_or.hub.export.model import Lines, Portable
from hf_ssl_or.hub.sample_files import write_samples

TOLERANCE = 1e-5
_IMAGES, _SIDE, _TIMEOUT = 4, 48, 900
_SECRET = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_OIDC_RESOURCE")

_STRANGER = """
import json, sys
sys.modules["hf_ssl_or"] = None
import numpy as np, torch

folder = sys.argv[1]
torch.set_num_threads(int(sys.argv[2]))
given, found = np.load(folder + "/given.npz"), {}

def plain(values):
    return values.numpy() if torch.is_tensor(values) else np.asarray(values)

for i, lines in enumerate(json.load(open(folder + "/lines.json"))):
    names = {}
    exec("\\n".join(lines["imports"]), names)
    exec(lines["load"], names)
    for number, prepare in enumerate(lines["prepare"]):
        exec(prepare, names)
        found[f"{i}/picture{number}"] = plain(names["pixel_values"])[0]
    for kind in given.files:
        names["pixel_values"] = torch.from_numpy(given[kind]) if "torch" in names else given[kind]
        exec(lines["call"], names)
        for what in ("features", "logits"):
            if what in names:
                found[f"{i}/{kind}/{what}"] = plain(names.pop(what))
np.savez(folder + "/found.npz", **found)
"""


def compare(
    portable: Portable, folder: Path, every: Sequence[Lines], pictures: Sequence[np.ndarray] | None = None
) -> dict[str, dict[str, float]]:
    """Compares what libraries give from a folder with what the encoder gives here.

    Args:
        portable: The encoder.
        folder: What was written for the libraries.
        every: The lines of each library.
        pictures: Real images, each (H, W, 3) uint8 and all of one size, of which files of the encoder's kind are made;
            None takes drawings of the built-in image set.

    Returns:
        For each library the largest difference of "features", of "pixels", which are those of the prepared images, as
        a share of the range of values, and with a head of "logits". Differences of features and logits are relative
        to the largest one where that exceeds 1.

    Raises:
        InputError: The lines fail, or a difference is above 1e-5.
    """
    with tempfile.TemporaryDirectory(prefix="hf-ssl-or-parity-") as name:
        work = Path(name)
        files = write_samples(portable.preprocessing, pictures or _drawings(), work)
        given = _given(portable, files)
        expected = _expected(portable, given)
        np.savez(work / "given.npz", **cast(Any, given))
        (work / "lines.json").write_text(json.dumps([_in_place(lines, folder, files) for lines in every]))
        _run(work, portable.name, every)
        with np.load(work / "found.npz") as file:
            found = dict(file)
    differences: dict[str, dict[str, float]] = {lines.library: {} for lines in every}
    for key, value in found.items():
        i, _, rest = key.partition("/")
        of_library = differences[every[int(i)].library]
        difference = _difference(portable, rest, expected[rest], value)
        of_library[_kind(rest)] = max(of_library.get(_kind(rest), 0.0), difference)
    for library, values in differences.items():
        _check(portable, library, values, expected)
    return differences


def _drawings() -> list[np.ndarray]:
    source = ShapesSource(_IMAGES, seed=0, size=_SIDE)
    return [source.read(i) for i in range(_IMAGES)]


def _given(portable: Portable, files: Sequence[Path]) -> dict[str, np.ndarray]:
    """Returns noise, and files as the encoder's own image processor prepares them, (B, C, S, S) each."""
    size, channels = portable.config.image_size, portable.config.num_channels
    noise_BCHW = np.random.default_rng(0).standard_normal((_IMAGES, channels, size, size)).astype(np.float32)
    return {"random": noise_BCHW, "real": portable.prepare(files).numpy()}


@torch.no_grad()
def _expected(portable: Portable, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    expected = {}
    for kind in given:
        pixels_BCHW = torch.from_numpy(given[kind])
        expected[f"{kind}/features"] = portable.encoder(pixels_BCHW).pooler_output.numpy()
        if portable.labels is not None:
            expected[f"{kind}/logits"] = portable.model(pixels_BCHW).logits.numpy()
    for i, pixels_CHW in enumerate(given["real"]):
        expected[f"picture{i}"] = pixels_CHW
    return expected


def _kind(key: str) -> str:
    return "pixels" if key.startswith("picture") else key.rpartition("/")[2]


def _difference(portable: Portable, key: str, expected: np.ndarray, found: np.ndarray) -> float:
    if expected.shape != found.shape:
        return float("inf")
    difference = np.abs(expected - found)
    if _kind(key) == "pixels":
        return float((difference * np.reshape(portable.preprocessing.std, (-1, 1, 1))).max())
    return float(difference.max() / max(1.0, np.abs(expected).max()))


def _check(portable: Portable, library: str, differences: dict[str, float], expected: Iterable[str]) -> None:
    for what in sorted({_kind(key) for key in expected}):
        found = differences.get(what, float("inf"))
        if not found <= TOLERANCE:
            raise portable.refusal(library, f"its {what} differ by {found:.1e}, more than {TOLERANCE:.0e}", [])


def _in_place(lines: Lines, folder: Path, files: Sequence[Path]) -> dict[str, Any]:
    prepare = [at(lines.prepare, PHOTO=str(file)) for file in files]
    return {**lines._asdict(), "load": at(lines.load, FOLDER=str(folder.resolve())), "prepare": prepare}


def at(code: str, **places: str) -> str:
    """Puts paths into lines of Python, inside strings, where their names in capitals stand."""
    for name, path in places.items():
        code = code.replace(name, json.dumps(path, ensure_ascii=False)[1:-1])
    return code


def _run(work: Path, name: str, every: Sequence[Lines]) -> None:
    """Runs the lines without this package, without network, token and accelerator."""
    environment = {key: value for key, value in os.environ.items() if key not in _SECRET}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "hf"), "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"HF_MODULES_CACHE": str(work / "code"), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-I", "-B", "-c", _STRANGER, str(work), str(torch.get_num_threads())]
    libraries = " and ".join(lines.library for lines in every)
    try:
        result = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=_TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise InputError(f"{name}: the check with {libraries} did not end within {_TIMEOUT} s") from error
    if result.returncode:
        last = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1].strip()
        raise InputError(f"{name}: {libraries} cannot load it in a fresh process: {last[:300]}")
