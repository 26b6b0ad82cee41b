"""Any text or plain data is a recipe or is refused in one line; what is a recipe can be written and read again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from mutations import fuzz, mutated, result_or_one_line

from hf_ssl_or.errors import InputError
from hf_ssl_or.recipe import Recipe, load_recipe, recipe_from_dict
from hf_ssl_or.training.description import write_recipe

VALID = recipe_from_dict(
    {
        "data": {"dataset": "shapes", "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]},
        "encoder": {"name": "resnet18", "channels": [8, 8, 16, 16], "model_args": {"layers": [1, 1, 1, 1]}},
        "method": {"name": "dino"},
        "views": {"count": 2, "specs": [{"size": 16}], "local_count": 2, "local_specs": [{"size": 8}]},
        "orthogonality": {"penalty": "so", "weight": 1e-3},
    }
).to_dict()

FRAGMENTS = (
    *(
        "data:",
        "\n",
        "\n  ",
        "dataset: shapes",
        "method: byol",
        "defaults: recipe.yaml",
        "variants:",
        "training:",
        " ",
    ),
    *("lr: .nan", "2001-13-45", "2001-01-01", "0x", "0b", "1:99:99", "1e9", "[", "]", "{", "}", ",", ":", "- ", "? "),
    *("&a", "*a", "<<: *a", "!!binary x", "!!python/object/apply:os.system ['exit 1']", "!!set", "!!timestamp x", "|"),
    *("%YAML 9.9", "---", "\t", "'", '"', "#", "\\", "!!float x", "!!int x", "=", "9" * 5000, "é", "null"),
)


def reads_back(recipe: Recipe, folder: Path) -> None:
    """A checkpoint stores the recipe as JSON and compares it on resume; a run's folder stores it as YAML."""
    plain = recipe.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    write_recipe(recipe.to_dict(), folder / "resolved.yaml")
    assert load_recipe(folder / "resolved.yaml").to_dict() == plain


@fuzz
@given(text=st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=4), max_size=14).map("".join))
def test_any_text(text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text.encode(errors="surrogatepass"))
    recipe = result_or_one_line(lambda: load_recipe(path))
    if recipe is not None:
        reads_back(recipe, tmp_path)


@fuzz
@given(tree=mutated(VALID))
def test_any_change_of_a_valid_recipe(tree: object, tmp_path: Path) -> None:
    (tmp_path / "tree.yaml").write_text(yaml.safe_dump(tree), errors="replace")
    recipe = result_or_one_line(lambda: load_recipe(tmp_path / "tree.yaml"))
    if isinstance(tree, dict):
        recipe = result_or_one_line(lambda: recipe_from_dict(tree)) or recipe
    if recipe is not None:
        reads_back(recipe, tmp_path)


@fuzz
@given(
    override=st.lists(st.sampled_from([*FRAGMENTS, "method.name=", "views.", "data=", "."]), max_size=5).map("".join)
)
def test_any_override(override: str, tmp_path: Path) -> None:
    recipe = result_or_one_line(lambda: recipe_from_dict(VALID).override([override]))
    if recipe is not None:
        reads_back(recipe, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("defaults: recipe.yaml", "leads back to itself"),
        ("data: &a {dataset: shapes, dataset_config: *a}", "contains itself"),
        ("data: {dataset: shapes}\nencoder: {model_args: {when: 2001-01-01}}", "encoder.model_args.when"),
        ("data: {dataset: shapes}\nencoder: {model_args: {1: 2}}", "encoder.model_args"),
        ("data: {dataset: shapes}\nencoder: {model_args: {drop_rate: .nan}}", "encoder.model_args.drop_rate"),
        ("data: {dataset: shapes}\nencoder: {model_args: {n: 2001-13-45}}", "not valid YAML"),
        ("[" * 5000, "nested"),
        ("defaults: 'a\\0b'", "cannot be read"),
    ],
)
def test_traps(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        load_recipe(tmp_path / "recipe.yaml")


def test_ten_lines_that_stand_for_a_billion_words_are_refused(tmp_path: Path) -> None:
    lines = ["data: {dataset: shapes}", "encoder:", "  model_args:", "    a0: &a0 [x, x, x, x, x, x, x, x]"]
    lines += [f"    a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]" for i in range(1, 10)]
    (tmp_path / "recipe.yaml").write_text("\n".join(lines))
    with pytest.raises(InputError, match="more than"):
        load_recipe(tmp_path / "recipe.yaml")


def test_the_short_form_of_a_method_keeps_its_name_under_an_override(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("data: {dataset: shapes}\nmethod: byol\n")
    recipe = load_recipe(tmp_path / "recipe.yaml", ["method.projector_dim=48"])
    assert recipe.method_name == "byol" and recipe.method.projector_dim == 48
    (tmp_path / "more.yaml").write_text("defaults: recipe.yaml\nmethod: {projector_dim: 40}\n")
    assert load_recipe(tmp_path / "more.yaml").method_name == "byol"
