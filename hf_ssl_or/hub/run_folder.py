"""What of a run may leave the machine, and nothing else: a list of what is taken, never of what is left out."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel

from hf_ssl_or.errors import InputError
from hf_ssl_or.hub.card import card_files
from hf_ssl_or.hub.export.model import CONVERSION
from hf_ssl_or.hub.export.timm import add_timm_files
from hf_ssl_or.hub.published_run import hub_dataset, published_run
from hf_ssl_or.hub.redaction import refuse_secrets, scrubbed_text, without_paths
from hf_ssl_or.hub.snippets import described_encoder
from hf_ssl_or.hub.verify import prove, prove_as_itself
from hf_ssl_or.hub.weight_files import WEIGHTS, weight_files, weights_sha256
from hf_ssl_or.models import auto
from hf_ssl_or.runs import layout
from hf_ssl_or.runs.results import OWN_LIBRARY, read_results

_CODE = tuple(path.name for path in CONVERSION.parent.glob("*.py"))
_SETTINGS = ("config.json", "preprocessor_config.json")
_CARD_FILES = ("README.md", "recipe.yaml", "results.json")
_OF_IMAGES = ("views", "neighbors")  # figures that show images of the data set
SHARD_SIZE = "5GB"


@dataclass(frozen=True, kw_only=True)
class Statements:
    """What only the user can say about an encoder.

    Attributes:
        license: The Hub's identifier of the model's license, say "apache-2.0".
        data_license: The license of the training images in any words.
    """

    license: str | None = None
    data_license: str | None = None


def collect(run_folder: Path, to: Path, *, repo_id: str, statements: Statements) -> None:
    """Copies what is to be pushed, and proves that it is what the run made.

    Args:
        run_folder: A run that has written its encoder.
        to: An empty folder, which becomes the repository's content.
        repo_id: The repository, for the card.
        statements: Licenses, for the card.

    Raises:
        InputError: The run holds no encoder, its results are of another encoder, the copy gives other features, or a
            file holds a secret.
        OSError: The disk is full.
    """
    encoder = _encoder_folder(run_folder)
    _check_results(run_folder, encoder)
    _copy_encoder(encoder, to)
    described = described_encoder(published_run(run_folder))
    if described.library != OWN_LIBRARY:
        prove_as_itself(to, encoder, described)
    else:
        if (to / WEIGHTS).is_file():  # timm reads no shards
            add_timm_files(to, check=False)
        prove(to, encoder)
    _write_card(run_folder, to, repo_id, statements)
    _copy_figures(run_folder, to)
    files = {path.relative_to(to).as_posix(): path for path in sorted(to.rglob("*")) if path.is_file()}
    refuse_secrets(files, run_folder)


@contextmanager
def run_at_checkpoint(run_folder: Path, checkpoint: Path, template: Path) -> Iterator[Path]:
    """Returns a run that is under way the form of one that ended at a checkpoint and was not evaluated.

    Args:
        run_folder: The run.
        checkpoint: One of its checkpoints.
        template: An encoder of the run with any weights.
    """
    with tempfile.TemporaryDirectory(prefix="hf-ssl-or-push-") as name:
        folder = Path(name) / run_folder.resolve().name
        shutil.copytree(template, folder / "encoder", ignore=shutil.ignore_patterns("*.safetensors*"))
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        config = json.loads((folder / "encoder" / "config.json").read_text(encoding="utf-8"))
        config["pretraining"]["steps"] = state["step"]
        (folder / "encoder" / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        with safe_open(checkpoint / "method.safetensors", framework="pt") as tensors:
            names = [name for name in tensors.keys() if name.startswith("encoder.")]  # noqa: SIM118 - no mapping
            weights = {name.removeprefix("encoder."): tensors.get_tensor(name) for name in names}
        _save_weights(weights, template, folder / layout.ENCODER)
        for file in (layout.RECIPE, layout.METRICS):
            if (run_folder / file).is_file():
                shutil.copyfile(run_folder / file, folder / file)
        yield folder


def _save_weights(weights: dict[str, Tensor], template: Path, folder: Path) -> None:
    """Writes an encoder's weights as its template has them: an encoder saved as itself is wrapped while it trains."""
    config = json.loads((template / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type", "").startswith("ssl_"):
        save_torch_state_dict(weights, folder, max_shard_size=SHARD_SIZE)
        return
    weights = {name.removeprefix("net."): tensor for name, tensor in weights.items()}
    if "model_type" in config:
        model = AutoModel.from_pretrained(template, use_safetensors=True)
        model.load_state_dict(weights)
        model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        return
    with safe_open(template / WEIGHTS, framework="pt") as tensors:  # shared weights are stored once
        names = list(tensors.keys())
    save_file({name: weights[name].contiguous() for name in names}, folder / WEIGHTS, {"format": "pt"})


def _encoder_folder(run_folder: Path) -> Path:
    if not run_folder.is_dir():
        raise InputError(f"{run_folder}: there is no such folder; give one that hf-ssl-or train made")
    encoder = run_folder / "encoder"
    for file in (run_folder / "recipe.yaml", *(encoder / name for name in _SETTINGS)):
        if not file.is_file():
            raise InputError(
                f"{run_folder}: there is no encoder to push ({file.relative_to(run_folder)} is missing); let "
                "hf-ssl-or train end there first"
            )
    return encoder


def _check_results(run_folder: Path, encoder: Path) -> None:
    """Refuses results that were measured on other weights; a run without results has nothing to check."""
    path = run_folder / layout.RESULTS
    if not path.is_file():
        return
    evaluated, found = read_results(path).weights_sha256, weights_sha256(encoder)
    if evaluated != found:
        what = "is of another encoder than encoder/" if evaluated else "does not say which weights it evaluated"
        raise InputError(f"{path}: {what}; hf-ssl-or train {run_folder} --resume measures anew; nothing was pushed")


def _copy_encoder(encoder: Path, to: Path) -> None:
    """Copies settings, weights, and the code that this package saves with an encoder."""
    for name in _SETTINGS:
        try:
            settings = json.loads((encoder / name).read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise InputError(f"{encoder / name}: cannot be read: {error}") from error
        (to / name).write_text(json.dumps(without_paths(settings), indent=2, sort_keys=True) + "\n")
    code = [encoder / name for name in _CODE if (encoder / name).is_file()]
    weights = weight_files(encoder)
    index = [] if weights == [encoder / WEIGHTS] else [encoder / auto.SHARD_INDEX]
    for file in (*code, *weights, *index):
        if file.is_symlink():
            raise InputError(f"{file}: is a link, which is not followed; put the file itself there")
        shutil.copyfile(file, to / file.name)


def _write_card(run_folder: Path, to: Path, repo_id: str, statements: Statements) -> None:
    stated: dict[str, Any] = {"license": statements.license, "data_license": statements.data_license}
    for path, content in card_files(run_folder, repo_id=repo_id, **stated).items():
        if path in _CARD_FILES or path.startswith(".eval_results/"):
            (to / path).parent.mkdir(exist_ok=True)
            (to / path).write_text(scrubbed_text(content.decode(), run_folder), encoding="utf-8")


def _copy_figures(run_folder: Path, to: Path) -> None:
    """Copies the figures; those that show images of somebody's own folder stay at home."""
    dataset = published_run(run_folder).recipe["data"]["dataset"]
    public = dataset == "shapes" or hub_dataset(dataset) is not None
    for figure in sorted((run_folder / "figures").glob("*.png")):
        if figure.is_file() and not figure.is_symlink() and (public or not figure.stem.startswith(_OF_IMAGES)):
            (to / "figures").mkdir(exist_ok=True)
            shutil.copyfile(figure, to / "figures" / figure.name)
