from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hf_ssl_or.models import SSLResNetConfig, SSLTimmConfig, SSLViTConfig

CONFIGS = {
    "resnet": lambda **more: SSLResNetConfig(stem="small", channels=[8, 16, 32, 64], **more),
    "wide_resnet": lambda **more: SSLResNetConfig(architecture="wide_resnet28_2", channels=[8, 16, 24], **more),
    "vit": lambda **more: SSLViTConfig(
        architecture="vit_tiny", image_size=32, patch_size=8, model_args={"depth": 2}, **more
    ),
    "timm": lambda **more: SSLTimmConfig(
        architecture="convnext_atto",
        image_size=32,
        model_args={"dims": [8, 16, 24, 32], "depths": [1, 1, 2, 1]},
        **more,
    ),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=list(CONFIGS))
def make_config(request: pytest.FixtureRequest):
    return CONFIGS[request.param]


@pytest.fixture
def images_BCHW() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
