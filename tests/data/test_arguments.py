from __future__ import annotations

import pytest

from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.errors import InputError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": ""}, "data.dataset: name"),
        ({"image_size": 0}, "data.image_size: at least 1"),
        ({"cache_size": -3}, "data.cache_size: at least 1"),
        ({"num_workers": -1}, "data.num_workers: at least 0"),
        ({"fraction": 0}, "data.fraction: more than 0"),
        ({"fraction": 1.5}, "data.fraction: more than 0 and at most 1"),
        ({"max_corrupt": 1}, "data.max_corrupt: a share"),
        ({"mean": [0.5, 0.5, 0.5]}, "give both or neither"),
        ({"mean": [0.5], "std": [0.2, 0.3]}, "data.mean, data.std: one number per channel"),
        ({"crop_pct": 0}, "data.crop_pct: more than 0"),
        ({"crop_pct": 1.2}, "data.crop_pct: more than 0 and at most 1"),
        ({"holdout": 0}, "data.holdout: a share"),
        ({"value_range": [5, 5]}, "data.value_range: 'dtype' or two finite numbers"),
        ({"value_range": [0, float("inf")]}, "data.value_range: 'dtype' or two finite numbers"),
        ({"value_range": [0, 1, 2]}, "data.value_range: 'dtype' or two finite numbers"),
        ({"mean": [0, 0, 0], "std": [1, 0, 1]}, "data.std: more than 0"),
        ({"shapes_train": 1}, "data.shapes_train: at least 2"),
    ],
)
def test_bad_settings_name_the_field(settings, message):
    with pytest.raises(InputError, match=message):
        DataArguments(**{"dataset": "shapes", **settings})


@pytest.mark.parametrize(
    "settings",
    [{"value_range": "all"}, {"image_size": "32"}, {"cache": "maybe"}, {"fraction": "half"}],
)
def test_wrong_types_are_refused(settings):
    with pytest.raises(Exception, match=next(iter(settings))):
        DataArguments(dataset="shapes", **settings)


def test_cache_folder_follows_the_argument_then_the_environment(monkeypatch, tmp_path):
    for name in ("HF_SSL_OR_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(DataArguments(dataset="shapes").cache_folder()) == "/home/someone/.cache/huggingface/hf_ssl_or"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert str(DataArguments(dataset="shapes").cache_folder()) == "/xdg/huggingface/hf_ssl_or"
    monkeypatch.setenv("HF_HOME", "/hf")
    assert str(DataArguments(dataset="shapes").cache_folder()) == "/hf/hf_ssl_or"
    monkeypatch.setenv("HF_SSL_OR_CACHE", "/own")
    assert str(DataArguments(dataset="shapes").cache_folder()) == "/own"
    assert str(DataArguments(dataset="shapes", cache_dir=str(tmp_path)).cache_folder()) == str(tmp_path)
