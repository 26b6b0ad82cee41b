"""What is saved loads in a fresh process: by the code in the folder where our package is absent, else by ours."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoBackbone, AutoModel, AutoModelForImageClassification

from hf_ssl_or.models.image_conversion import Preprocessing
from hf_ssl_or.models.image_processing_ssl import build_image_processor
from tests.models.conftest import CONFIGS

REPOSITORY = Path(__file__).resolve().parents[2]
PIXELS = Preprocessing(image_size=32, crop_pct=0.9, mean=(0.5,) * 3, std=(0.25,) * 3)
AUTO_CLASSES = {"AutoConfig", "AutoModel", "AutoModelForImageClassification", "AutoBackbone"}

STRANGER = """
    import json, sys
    sys.modules["hf_ssl_or"] = None  # not importable here
    import numpy as np, torch
    from PIL import Image
    from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel
    from transformers import AutoModelForImageClassification, pipeline
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    torch.set_num_threads(1)
    for folder in sys.argv[1:]:
        trust = {"trust_remote_code": True}
        config = AutoConfig.from_pretrained(folder, **trust)
        assert config.orthogonality.penalty == "srip" and config.pretraining == {"steps": 3}
        model = AutoModel.from_pretrained(folder, **trust)
        classifier = AutoModelForImageClassification.from_pretrained(folder, **trust)
        processor = AutoImageProcessor.from_pretrained(folder, **trust)
        backbone_name = config.auto_map["AutoBackbone"]
        backbone = get_class_from_dynamic_module(backbone_name, folder).from_pretrained(folder)
        assert type(AutoBackbone.from_config(config, **trust)).__name__ == backbone_name.split(".")[1]
        image = Image.open(folder + "/image.png")
        pixels = processor(image, return_tensors="pt").pixel_values
        with torch.no_grad():
            found = {
                "pixels": pixels,
                "pooled": model(pixels).pooler_output,
                "logits": classifier(pixels).logits,
                "map": backbone(pixels).feature_maps[0],
            }
        np.savez(folder + "/found.npz", **{key: value.numpy() for key, value in found.items()})
        assert type(model).__module__.startswith("transformers_modules.")
        for task in ("image-classification", "image-feature-extraction"):
            run = pipeline(task, model=folder, **trust)
            assert type(run).__module__.startswith("transformers_modules.") and run.task == task
            assert len(run(image)) == {"image-classification": 3, "image-feature-extraction": 1}[task]
        run.save_pretrained(folder + "/piped")
        model.save_pretrained(folder + "/again")
        for saved in ("/", "/again/", "/piped/"):
            written = json.load(open(folder + saved + "config.json"))
            assert written["auto_map"] == config.auto_map and len(written["custom_pipelines"]) == 2
        assert open(folder + "/piped/pipeline_ssl.py").read() == open(folder + "/pipeline_ssl.py").read()
"""

FRIEND = """
    import sys
    sys.path.insert(0, sys.argv[1])
    import hf_ssl_or.models
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline

    for folder in sys.argv[2:]:
        loaded = [
            auto.from_pretrained(folder)
            for auto in (AutoConfig, AutoModel, AutoModelForImageClassification, AutoImageProcessor)
        ]
        loaded += [pipeline("image-classification", model=folder)]
        loaded += [pipeline("image-feature-extraction", model=loaded[1], image_processor=loaded[3])]
        assert all(type(part).__module__.startswith("hf_ssl_or.models.") for part in loaded)
"""


def run(code: str, tmp_path: Path, *arguments: str) -> None:
    """Runs code in a fresh interpreter elsewhere, which sees neither our sources nor this process's caches."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "HF_MODULES_CACHE": str(tmp_path / "code")}
    command = [sys.executable, "-I", "-c", textwrap.dedent(code), *arguments]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder per family: a classifier, an image processor and an image; moved away from where it was saved."""
    folders = {}
    for name, make_config in CONFIGS.items():
        saved, folder = tmp_path_factory.mktemp("saved"), tmp_path_factory.mktemp("moved") / name
        config = make_config(num_labels=3, orthogonality={"penalty": "srip"}, pretraining={"steps": 3})
        AutoModelForImageClassification.from_config(config).save_pretrained(saved)
        build_image_processor(PIXELS).save_pretrained(saved)
        pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(saved / "image.png")
        shutil.move(saved, folder)
        folders[name] = folder
    return folders


@torch.no_grad()
def test_loads_without_the_package(folders: dict[str, Path], tmp_path: Path) -> None:
    run(STRANGER, tmp_path, *map(str, folders.values()))
    for folder in folders.values():
        found = {key: torch.from_numpy(value) for key, value in np.load(folder / "found.npz").items()}
        image = Image.open(folder / "image.png")
        pixels = build_image_processor(PIXELS)(image, return_tensors="pt").pixel_values
        assert torch.equal(pixels, found["pixels"])
        assert torch.equal(AutoModel.from_pretrained(folder)(pixels).pooler_output, found["pooled"])
        classifier = AutoModelForImageClassification.from_pretrained(folder)
        assert torch.equal(classifier(pixels).logits, found["logits"])
        backbone = AutoBackbone._model_mapping[type(classifier.config)].from_pretrained(folder)
        assert torch.equal(backbone(pixels).feature_maps[0], found["map"])


def test_loads_with_the_package_and_no_trust(folders: dict[str, Path], tmp_path: Path) -> None:
    run(FRIEND, tmp_path, str(REPOSITORY), *map(str, folders.values()))


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForImageClassification, AutoBackbone])
def test_every_class_names_all(make_config, auto: type, tmp_path: Path) -> None:
    auto.from_config(make_config()).save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert set(auto_map) == AUTO_CLASSES
    for reference in auto_map.values():
        module, name = reference.split(".")
        assert f"class {name}(" in (tmp_path / f"{module}.py").read_text()


def test_the_folder_imports_nothing_of_ours(make_config, tmp_path: Path) -> None:
    AutoModel.from_config(make_config()).save_pretrained(tmp_path)
    sources = list(tmp_path.glob("*.py"))
    assert {"configuration_ssl.py", "modeling_ssl.py"} < {source.name for source in sources}
    assert not [source for source in sources if "hf_ssl_or" in source.read_text()]
