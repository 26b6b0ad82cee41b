"""A `config.json` that says anything: an encoder comes of it, or a ValueError that says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given
from hypothesis import strategies as st
from mutations import damaged, fuzz, mutated, result_or_one_line

from hf_ssl_or.evaluation.encoder_loading import load_encoder
from hf_ssl_or.models.auto import create_encoder
from hf_ssl_or.models.configuration_ssl import SSLConfig, SSLResNetConfig, SSLViTConfig

SMALL: dict[type[SSLConfig], dict[str, Any]] = {
    SSLResNetConfig: {"architecture": "resnet18", "stem": "small", "channels": [4, 4, 8, 8], "image_size": 16}
    | {"model_args": {"layers": [1, 1, 1, 1]}, "orthogonality": {"penalty": "so", "weight": 0.1}},
    SSLViTConfig: {"architecture": "vit_tiny", "patch_size": 8, "image_size": 16, "pooling": "avg"}
    | {"model_args": {"embed_dim": 16, "depth": 1, "num_heads": 2}},
}
# Sizes are small: that a net of a terabyte does not fit is the machine's to say.
small_values = st.one_of(
    *(st.none(), st.booleans(), st.sampled_from([-1, 0, 1, 2, 3, 8, 0.5, float("nan")]), st.text(max_size=4)),
    *(st.lists(st.integers(-1, 9), max_size=4), st.dictionaries(st.text(max_size=4), st.integers(-1, 3), max_size=2)),
)


@pytest.mark.parametrize("family", SMALL, ids=lambda family: family.model_type)
@fuzz
@given(data=st.data())
def test_from_dict_and_from_a_folder(family: type[SSLConfig], data: st.DataObject, tmp_path: Path) -> None:
    tree = data.draw(mutated(SMALL[family], small_values))
    if isinstance(tree, dict):
        config = result_or_one_line(lambda: family.from_dict(tree), ValueError, StrictDataclassError)
        if config is not None:
            assert family.from_dict(config.to_dict()).to_dict() == config.to_dict()
    (tmp_path / "config.json").write_text(json.dumps(tree))
    result_or_one_line(lambda: family.from_pretrained(tmp_path), ValueError, StrictDataclassError, OSError)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    options = dict(SMALL[SSLResNetConfig])
    create_encoder(options.pop("architecture"), **options.pop("model_args"), **options).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@fuzz
@given(data=st.data())
def test_a_changed_folder_of_an_encoder(file: str, data: st.DataObject, folder: Path) -> None:
    path = folder / file
    whole = path.read_bytes()
    if file == "config.json":
        changed = json.dumps(data.draw(mutated(json.loads(whole), small_values))).encode()
    else:
        changed = data.draw(damaged(whole))
    path.write_bytes(changed)
    try:
        result_or_one_line(lambda: load_encoder(str(folder)))
        result_or_one_line(lambda: create_encoder("resnet18", init_from=folder), ValueError, OSError)
    finally:
        path.write_bytes(whole)
