"""What the documents show works as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_ssl_or.data.loading import load_images
from hf_ssl_or.recipe import load_recipe, recipe_from_dict
from hf_ssl_or.run import build_trainer

REPOSITORY = Path(__file__).resolve().parent.parent


def test_the_method_of_the_contributing_guide_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    code = re.search(r"```python\n(.*?)```", (REPOSITORY / "CONTRIBUTING.md").read_text(), re.DOTALL)[1]
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").touch()
    (tmp_path / "my_package" / "my_method.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    recipe = recipe_from_dict(
        {
            "data": {"dataset": "shapes", "shapes_train": 32, "shapes_test": 0},
            "encoder": {"name": "resnet18", "stem": "small", "channels": [8, 8, 8, 8]},
            "method": {"name": "my_package.my_method", "projector_dim": 16},
            "views": {"count": 3},
            "training": {"batch_size": 16, "max_steps": 4, "monitor_every": 0, "device": "cpu", "log_every": 1},
        }
    )
    trainer = build_trainer(recipe, tmp_path / "run", load_images(recipe.data, "train"))
    trainer.train()
    assert "spread" in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_files_that_the_readme_names_exist():
    text = (REPOSITORY / "README.md").read_text() + (REPOSITORY / "CONTRIBUTING.md").read_text()
    for name in set(re.findall(r"(?:recipes|tests|hf_ssl_or|benchmarks)/[\w./-]*\w", text)):
        if (
            name.startswith("recipes/")
            and name.endswith(".yaml")
            and not name.startswith(("recipes/accelerate", "recipes/sweeps"))
        ):
            load_recipe(REPOSITORY / name)  # which may be a variant of a file
        elif name not in ("tests/methods/test_mean_square.py", "hf_ssl_or/methods/mean_square.py"):
            assert (REPOSITORY / name).exists(), name


def test_readme_has_no_gap():
    assert not re.search(r"@[A-Z]+@|TODO|FIXME", (REPOSITORY / "README.md").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("script", ["tables", "papers"])
def test_tables_and_figures_are_what_the_committed_results_say(script: str):
    done = subprocess.run(
        [sys.executable, REPOSITORY / "benchmarks" / f"{script}.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
