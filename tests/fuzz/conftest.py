from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_ssl_or.recipe import recipe_from_dict
from hf_ssl_or.run import pretrain


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a real run of two steps, evaluated with labels; tests take copies."""
    torch.set_num_threads(1)
    recipe = recipe_from_dict(
        {
            "data": {"dataset": "shapes", "image_size": 16, "shapes_train": 48, "shapes_test": 24},
            "encoder": {"name": "resnet18", "stem": "small", "channels": [4, 4, 8, 8]},
            "method": {"name": "barlow_twins", "projector_dim": 16, "projector_hidden": 16},
            "training": {"batch_size": 16, "max_steps": 3, "log_every": 1, "monitor_every": 1, "device": "cpu"},
            "evaluation": {"protocols": ["knn"]},
        }
    )
    folder = tmp_path_factory.mktemp("finished") / "run"
    pretrain(recipe, folder)
    return folder
