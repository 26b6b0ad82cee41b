"""The proof that files hold an encoder: other libraries load them in a fresh process without this package.

The very lines that a card or a README shows are run there, and features, logits and prepared pixels are compared with
those of the encoder, computed here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
from torch import Tensor
from transformers import AutoModel

from hf_ssl_or.data.shapes import ShapesSource
from hf_ssl_or.errors import InputError
from hf_ssl_or.hub.export.model import Lines, Portable, read_portable, timm_lines
from hf_ssl_or.hub.export.pixels import OPEN_RGB
from hf_ssl_or.hub.sample_files import write_samples
from hf_ssl_or.hub.snippets import has_stock_processor
from hf_ssl_or.hub.upload_queue import file_sha256
from hf_ssl_or.hub.weight_files import weights_sha256
from hf_ssl_or.models.adapters import adapt_encoder
from hf_ssl_or.models.image_conversion import Preprocessing
from hf_ssl_or.runs.results import EncoderDescription

TOLERANCE = 1e-5
_IMAGES, _SIDE, _TIMEOUT = 4, 48, 900
_SECRET = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_OIDC_RESOURCE")
_proven: set[tuple[str, ...]] = set()

# The code in a folder is run with trust: it is about to be published as the user's own.
_TRUST = '.from_pretrained("FOLDER", trust_remote_code=True'
_PROCESSOR = f"processor = AutoImageProcessor{_TRUST})\n"
_STOCK_PROCESSOR = 'processor = AutoImageProcessor.from_pretrained("FOLDER")\n'
_FILE = '"PHOTO"'
_PREPARE = f'pixel_values = processor({_FILE}, return_tensors="pt").pixel_values\n'
REMOTE_CODE = Lines(
    library="transformers",
    packages="transformers timm",
    imports=("import torch", "from transformers import AutoImageProcessor, AutoModel"),
    load=f"model = AutoModel{_TRUST}, use_safetensors=True, dtype=torch.float32).eval()\n{_PROCESSOR}",
    prepare=_PREPARE,
    call="with torch.no_grad():\n    features = model(pixel_values).pooler_output\n",
)

_FRESH_PROCESS = """
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

Differences = dict[str, dict[str, float]]  # of "features", "logits" and "pixels", by library


@dataclass(frozen=True, kw_only=True)
class _Reference:
    """What is expected of a library: arrays by name, of given inputs and of image files."""

    name: str
    files: list[Path]
    given: dict[str, np.ndarray]
    expected: dict[str, np.ndarray]
    std: Sequence[float]


def compare(
    portable: Portable, folder: Path, every: Sequence[Lines], pictures: Sequence[np.ndarray] | None = None
) -> Differences:
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
    found = _differences(portable, folder, every, pictures)
    for library, values in found.items():
        for what, difference in values.items():
            if not difference <= TOLERANCE:
                reason = f"its {what} differ by {difference:.1e}, more than {TOLERANCE:.0e}"
                raise portable.refusal(library, reason, [])
    return found


def prove(pushed: Path, original: Path) -> float:
    """Compares two folders of an encoder of this package; what was proven once is not repeated in this process.

    Args:
        pushed: The folder that is to be pushed: transformers loads it with its code, and timm if it has timm's keys.
        original: The run's encoder.

    Returns:
        The largest difference of features, logits or pixels, see `compare`.

    Raises:
        InputError: They differ by more than 1e-5, or the pushed folder does not load.
    """
    if (fingerprint := _fingerprint(pushed)) in _proven:
        return 0.0
    portable = read_portable(original)
    channels = portable.preprocessing.num_channels
    if channels != portable.config.num_channels:
        raise InputError(
            f"{original}: its image processor makes {channels} channels, its model takes "
            f"{portable.config.num_channels}; not pushed"
        )
    in_timm = "pretrained_cfg" in json.loads((pushed / "config.json").read_text(encoding="utf-8"))
    found = _differences(portable, pushed, [REMOTE_CODE, *([timm_lines(portable)] if in_timm else [])], None)
    return _accepted(original, found, fingerprint)


def prove_as_itself(pushed: Path, original: Path, encoder: EncoderDescription) -> float:
    """Compares two folders of an encoder that is saved as its own library saves it.

    Models of transformers and timm are loaded by the lines of the card; of another module the weights are compared,
    since only its owner's code can build it.

    Args:
        pushed: The folder that is to be pushed.
        original: The run's encoder.
        encoder: How it is loaded.

    Returns:
        As for `prove`.

    Raises:
        InputError: As for `prove`.
    """
    if any("load_model(" in line for line in encoder.loading_lines):
        if weights_sha256(pushed) != weights_sha256(original):
            raise InputError(f"{original}: what would be pushed holds other weights; nothing was pushed")
        return 0.0
    if (fingerprint := (*_fingerprint(pushed), *encoder.loading_lines)) in _proven:
        return 0.0
    preprocessing = _preprocessing(original)
    stock = has_stock_processor(encoder, preprocessing)
    *load, inference, call = encoder.loading_lines
    lines = Lines(
        library=encoder.library,
        packages=encoder.library,
        imports=("import torch", "from PIL import Image, ImageOps", "from transformers import AutoImageProcessor"),
        load="\n".join([*load, _STOCK_PROCESSOR if stock else _PROCESSOR]),
        prepare=f"{OPEN_RGB}{_PREPARE.replace(_FILE, 'image')}" if stock else _PREPARE,
        call=f"{inference}\n{call}\n",
    )
    with tempfile.TemporaryDirectory(prefix="hf-ssl-or-proof-") as name:
        reference = _reference_as_itself(original, encoder, preprocessing, Path(name))
        found = _run_and_compare(reference, pushed, [lines], Path(name))
    return _accepted(original, found, fingerprint)


def _fingerprint(folder: Path) -> tuple[str, ...]:
    names = sorted(path for path in folder.iterdir() if path.is_file())
    return tuple(f"{path.name}:{file_sha256(path)}" for path in names)


def _accepted(original: Path, found: Differences, fingerprint: tuple[str, ...]) -> float:
    worst, what, library = max((value, what, of) for of, values in found.items() for what, value in values.items())
    if not worst <= TOLERANCE:
        raise InputError(
            f"{original}: what would be pushed gives other features than the run's encoder (by {library}, {what} "
            f"differ by {worst:.1e}, at most {TOLERANCE:.0e} is allowed); nothing was pushed: its .py or config files "
            "were changed, or its code is of another version; hf-ssl-or train RUN --resume writes the folder anew"
        )
    _proven.add(fingerprint)
    return worst


# ---------------------------------------------------------------------------------------------------------------------
# Here


def _differences(
    portable: Portable, folder: Path, every: Sequence[Lines], pictures: Sequence[np.ndarray] | None
) -> Differences:
    with tempfile.TemporaryDirectory(prefix="hf-ssl-or-proof-") as name:
        files = write_samples(portable.preprocessing, pictures or _drawings(), Path(name))
        reference = _reference(portable, files)
        return _run_and_compare(reference, folder, every, Path(name))


def _drawings() -> list[np.ndarray]:
    source = ShapesSource(_IMAGES, seed=0, size=_SIDE)
    return [source.read(i) for i in range(_IMAGES)]


@torch.no_grad()
def _reference(portable: Portable, files: list[Path]) -> _Reference:
    given = _given(portable.prepare(files))
    expected = {f"picture{i}": pixels_CHW for i, pixels_CHW in enumerate(given["real"])}
    for kind, pixels in given.items():
        expected[f"{kind}/features"] = portable.encoder(torch.from_numpy(pixels)).pooler_output.numpy()
        if portable.labels is not None:
            expected[f"{kind}/logits"] = portable.model(torch.from_numpy(pixels)).logits.numpy()
    return _Reference(name=portable.name, files=files, given=given, expected=expected, std=portable.preprocessing.std)


@torch.no_grad()
def _reference_as_itself(
    folder: Path, encoder: EncoderDescription, preprocessing: Preprocessing, work: Path
) -> _Reference:
    pooled = any(".pooler_output" in line for line in encoder.loading_lines)
    try:
        if encoder.library == "transformers":
            net = AutoModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32)
        else:
            net = timm.create_model(f"local-dir:{folder}", pretrained=True)
        size, channels = preprocessing.image_size, preprocessing.num_channels
        # A pooler that the training did not use is not used here.
        untrained = () if pooled else ("pooler",)
        model = adapt_encoder(net, image_size=size, num_channels=channels, untrained=untrained, trainable=False).eval()
    except Exception as error:  # transformers, safetensors and timm: what they raise cannot be listed
        raise InputError(f"{folder}: does not load: {' '.join(str(error).split())[:300]}") from error
    files = write_samples(preprocessing, _drawings(), work)
    given = _given(torch.stack([preprocessing.tensor(file) for file in files]))
    expected = {f"picture{i}": pixels_CHW for i, pixels_CHW in enumerate(given["real"])}
    for kind, pixels in given.items():
        expected[f"{kind}/features"] = model(torch.from_numpy(pixels)).pooler_output.numpy()
    return _Reference(name=str(folder), files=files, given=given, expected=expected, std=preprocessing.std)


def _preprocessing(encoder: Path) -> Preprocessing:
    try:
        return Preprocessing(**json.loads((encoder / "config.json").read_text(encoding="utf-8"))["preprocessing"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{encoder / 'config.json'}: does not say how images become pixels ({error!r})") from error


def _given(real_BCHW: Tensor) -> dict[str, np.ndarray]:
    """Returns noise, and images as the encoder's own image processor prepares them, (B, C, S, S) each."""
    shape = (_IMAGES, *real_BCHW.shape[1:])
    noise_BCHW = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return {"random": noise_BCHW, "real": real_BCHW.numpy()}


def _run_and_compare(reference: _Reference, folder: Path, every: Sequence[Lines], work: Path) -> Differences:
    np.savez(work / "given.npz", **cast(Any, reference.given))
    (work / "lines.json").write_text(json.dumps([_in_place(lines, folder, reference.files) for lines in every]))
    _run(work, reference.name, every)
    with np.load(work / "found.npz") as file:
        found = dict(file)
    differences: Differences = {}
    for i, lines in enumerate(every):
        values = differences.setdefault(lines.library, {})
        for key, expected in reference.expected.items():
            what = "pixels" if key.startswith("picture") else key.rpartition("/")[2]
            values[what] = max(
                values.get(what, 0.0), _difference(expected, found.get(f"{i}/{key}"), what, reference.std)
            )
    return differences


def _difference(expected: np.ndarray, found: np.ndarray | None, what: str, std: Sequence[float]) -> float:
    if found is None or expected.shape != found.shape or not np.isfinite(found).all():
        return float("inf")
    difference = np.abs(expected - found)
    if what == "pixels":
        return float((difference * np.reshape(std, (-1, 1, 1))).max())
    return float(difference.max() / max(1.0, np.abs(expected).max()))


# ---------------------------------------------------------------------------------------------------------------------
# In a fresh process


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
    command = [sys.executable, "-I", "-B", "-c", _FRESH_PROCESS, str(work), str(torch.get_num_threads())]
    libraries = " and ".join(lines.library for lines in every)
    try:
        result = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=_TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise InputError(f"{name}: the check with {libraries} did not end within {_TIMEOUT} s") from error
    if result.returncode:
        last = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1].strip()
        raise InputError(f"{name}: {libraries} cannot load it in a fresh process: {last[:300]}")
