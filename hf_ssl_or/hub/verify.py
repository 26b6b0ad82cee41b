"""The proof before a push: what is about to be pushed gives the same features on a machine without this package.

The folder is loaded by stock transformers in a fresh process where `hf_ssl_or` cannot be imported, and its features of
the same image files are compared with those of the run's encoder, loaded here by our own classes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoImageProcessor, AutoModel

from hf_ssl_or.errors import InputError
from hf_ssl_or.hub.sample_files import write_samples
from hf_ssl_or.hub.upload_queue import file_sha256
from hf_ssl_or.models.image_processing_ssl import preprocessing_of

TOLERANCE = 1e-5
_PICTURES, _TIMEOUT = 2, 900
_proven: set[tuple[str, ...]] = set()

# The code in the folder is run here with trust: it is about to be published as the user's own.
_STRANGER = """
import sys
sys.modules["hf_ssl_or"] = None
import numpy as np, torch
from transformers import AutoImageProcessor, AutoModel

folder, found, threads, *files = sys.argv[1:]
torch.set_num_threads(int(threads))
model = AutoModel.from_pretrained(folder, trust_remote_code=True, use_safetensors=True, dtype=torch.float32).eval()
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
pixels = processor(files, return_tensors="pt").pixel_values
with torch.no_grad():
    np.save(found, model(pixels).pooler_output.numpy())
"""


def prove(pushed: Path, original: Path) -> float:
    """Compares the features of two folders of an encoder; what was proven once is not repeated in this process.

    Args:
        pushed: The folder that is to be pushed.
        original: The run's encoder.

    Returns:
        The largest difference of a feature, relative to the largest feature where that exceeds 1.

    Raises:
        InputError: They differ by more than 1e-5, or the pushed folder does not load.
    """
    names = sorted(path for path in pushed.iterdir() if path.is_file())
    fingerprint = tuple(f"{path.name}:{file_sha256(path)}" for path in names)
    if fingerprint in _proven:
        return 0.0
    with tempfile.TemporaryDirectory(prefix="hf-ssl-or-proof-") as name:
        files, expected_BF = _features(original, Path(name))
        found_BF = _foreign_features(pushed, files, Path(name))
    if expected_BF.shape != found_BF.shape:
        raise InputError(f"{pushed}: gives features of shape {found_BF.shape}, not {expected_BF.shape}; not pushed")
    difference = float(np.abs(expected_BF - found_BF).max() / max(1.0, np.abs(expected_BF).max()))
    if not difference <= TOLERANCE:
        raise InputError(
            f"{original}: what would be pushed gives other features than the run's encoder (by {difference:.1e}, at "
            f"most {TOLERANCE:.0e} is allowed); nothing was pushed: its .py or config files were changed, or its code "
            "is of another version; hf-ssl-or train RUN --resume writes the folder anew"
        )
    _proven.add(fingerprint)
    return difference


@torch.no_grad()
def _features(folder: Path, work: Path) -> tuple[list[Path], np.ndarray]:
    """Encodes image files by our own classes; writes the files, of noise, to `work`."""
    try:
        model = AutoModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32).eval()
        processor = AutoImageProcessor.from_pretrained(folder)
        preprocessing = preprocessing_of(processor)
    except Exception as error:  # transformers, safetensors and timm: what they raise cannot be listed
        raise InputError(f"{folder}: does not load: {' '.join(str(error).split())[:300]}") from error
    if preprocessing.num_channels != model.config.num_channels:
        raise InputError(
            f"{folder}: its image processor makes {preprocessing.num_channels} channels, its model takes "
            f"{model.config.num_channels}; not pushed"
        )
    size = model.config.image_size
    noise = np.random.default_rng(0).integers(0, 256, (_PICTURES, size + 3, size + 5, 3), dtype=np.uint8)
    files = write_samples(preprocessing, list(noise), work)
    return files, model(processor(files, return_tensors="pt").pixel_values).pooler_output.numpy()


def _foreign_features(folder: Path, files: list[Path], work: Path) -> np.ndarray:
    """Encodes the same files in a fresh process, without this package, without network and without the token."""
    secret = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_OIDC_RESOURCE")
    environment = {key: value for key, value in os.environ.items() if key not in secret}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "hf"), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-P", "-c", _STRANGER, str(folder), str(work / "found.npy")]
    try:
        result = subprocess.run(
            [*command, str(torch.get_num_threads()), *map(str, files)],
            cwd=work,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
        )
    except subprocess.TimeoutExpired as error:
        raise InputError(f"{folder}: does not load within {_TIMEOUT} s in a fresh process; not pushed") from error
    if result.returncode:
        last = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
        raise InputError(f"{folder}: does not load in a fresh process without this package: {last}; not pushed")
    return np.load(work / "found.npy")
