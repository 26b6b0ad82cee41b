from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from hf_ssl_or.errors import InputError
from hf_ssl_or.methods import available_methods, get_method
from hf_ssl_or.recipe import _parse, load_recipe, recipe_from_dict, recipe_variants
from hf_ssl_or.run import build_method, view_specs
from hf_ssl_or.training.description import identity, write_recipe

MINIMAL = {"data": {"dataset": "shapes"}}


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_overrides_win_and_are_read_as_yaml(tmp_path: Path):
    path = write(tmp_path / "r.yaml", "data: {dataset: shapes}\ntraining: {epochs: 3, optimizer: {lr: 0.1}}\n")
    recipe = load_recipe(path, ["training.epochs=5", "training.optimizer.lr=1e-3", "method=vicreg", "views.count=4"])
    assert recipe.training.epochs == 5
    assert recipe.training.optimizer.lr == 1e-3 and isinstance(recipe.training.optimizer.lr, float)
    assert recipe.method_name == "vicreg" and recipe.views.count == 4


def test_numbers_in_scientific_notation_are_numbers(tmp_path: Path):
    recipe = load_recipe(write(tmp_path / "r.yaml", "data: {dataset: shapes}\northogonality: {weight: 1e-6}\n"))
    assert recipe.orthogonality.weight == 1e-6


def test_no_is_a_word_and_true_is_not():
    assert _parse("{a: no, b: true, c: off, d: False}", "x") == {"a": "no", "b": True, "c": "off", "d": False}


def test_defaults_are_merged_key_by_key(tmp_path: Path):
    write(tmp_path / "base.yaml", "data: {dataset: shapes, image_size: 48}\ntraining: {epochs: 3, seed: 4}\n")
    (tmp_path / "sub").mkdir()
    path = write(tmp_path / "sub" / "r.yaml", "defaults: ../base.yaml\ntraining: {epochs: 7}\n")
    recipe = load_recipe(path)
    assert (recipe.data.image_size, recipe.training.epochs, recipe.training.seed) == (48, 7, 4)


def test_what_was_resolved_reads_back_as_the_same_recipe(tmp_path: Path):
    tree = {
        **MINIMAL,
        "method": {"name": "byol"},
        "views": {
            "count": 3,
            "specs": [{"blur": 0.5, "crop_scale": [0.1, 1]}],
            "size_schedule": [[0, 16], [0.5, 32]],
        },
        "orthogonality": {"penalty": "srip", "weight": 0.001},
        "encoder": {"name": "resnet18", "channels": [8, 16, 32, 64], "stem": "small"},
    }
    recipe = recipe_from_dict(tree)
    write_recipe(recipe.to_dict(), tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


def test_identity_leaves_out_what_cannot_change_the_weights():
    quiet, loud = (
        recipe_from_dict(MINIMAL),
        recipe_from_dict({**MINIMAL, "training": {"log_every": 3, "save_every": 1}}),
    )
    assert identity(quiet.to_dict()) == identity(loud.to_dict())
    for more in (
        {"training": {"seed": 1}},
        {"training": {"optimizer": {"weight_decay_end": 0.4}}},
        {"views": {"size_schedule": [[0, 32]]}},
    ):
        assert identity(quiet.to_dict()) != identity(recipe_from_dict({**MINIMAL, **more}).to_dict())


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, "data is missing"),
        ({**MINIMAL, "trainning": {}}, "did you mean 'training'"),
        ({"data": {"dataset": "shapes", "imagesize": 3}}, "did you mean 'image_size'"),
        ({**MINIMAL, "training": {"optimizer": {"learning_rate": 1}}}, "unknown key in training.optimizer"),
        ({**MINIMAL, "training": {"epochs": "many"}}, "epochs"),
        ({**MINIMAL, "training": {"epochs": 0}}, "training.epochs: at least 1"),
        ({**MINIMAL, "training": 3}, "training: key: value pairs are wanted"),
        ({**MINIMAL, "method": "byoll"}, "did you mean 'byol'"),
        ({**MINIMAL, "method": {"name": "byol", "tempo": 3}}, "unknown key in method"),
        ({**MINIMAL, "views": {"count": 0}}, "views.count: at least 1 view, not 0"),
        ({**MINIMAL, "views": {"specs": {"blur": 1}}}, "a list is wanted"),
        ({**MINIMAL, "views": {"size_schedule": [[0, 16], [0, 32]]}}, "views.size_schedule: each step begins after"),
        ({**MINIMAL, "views": {"size_schedule": [[0, 0]]}}, "views.size_schedule: a size is a number of pixels"),
        ({**MINIMAL, "views": {"size_schedule": [[0, 16], [50, 32]]}}, "views.size_schedule: a share of the run"),
        ({**MINIMAL, "views": {"size_schedule": 16}}, "views.size_schedule"),
        ({**MINIMAL, "views": {"train_size_schedule": []}}, "set views.size_schedule"),
        ({**MINIMAL, "training": {"optimizer": {"weight_decay_end": -1}}}, "optimizer.weight_decay_end: at least 0"),
        ({**MINIMAL, "views": {"specs": [{"blur": 2}]}}, "blur: a probability"),
        ({**MINIMAL, "views": {"specs": [{"blur": "much"}]}}, "views.specs[0]"),
        ({**MINIMAL, "orthogonality": {"penalty": "sso"}}, "penalty"),
        ({**MINIMAL, "orthogonality": {"weight": -1}}, "weight"),
    ],
)
def test_bad_settings_end_in_one_line_that_names_them(tree: dict, message: str):
    with pytest.raises(InputError) as caught:
        recipe_from_dict(tree, "r.yaml")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith("r.yaml: ")


def test_a_bad_file_is_named(tmp_path: Path):
    write(tmp_path / "good.yaml", "data: {dataset: shapes}")
    with pytest.raises(InputError, match="missing.yaml.*good.yaml"):
        load_recipe(tmp_path / "missing.yaml")
    with pytest.raises(InputError, match="not valid YAML"):
        load_recipe(write(tmp_path / "bad.yaml", "data: [1"))
    with pytest.raises(InputError, match="looks like training.epochs=5"):
        load_recipe(tmp_path / "good.yaml", ["epochs"])


def test_yaml_cannot_make_python_objects(tmp_path: Path):
    with pytest.raises(InputError, match="not valid YAML"):
        load_recipe(write(tmp_path / "evil.yaml", "data: !!python/object/apply:os.system ['true']"))


RECIPES = Path(__file__).parent.parent / "recipes"
NO_RUNS = {"accelerate", "sweeps", "papers"}
RUNS = [
    path
    for path in sorted(RECIPES.rglob("*.yaml"))
    if not NO_RUNS & set(path.parts) and not path.name.startswith("defaults")
]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: str(path.relative_to(RECIPES).with_suffix("")))
def test_every_recipe_of_the_repository_loads_and_builds(path: Path):
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    command = next(line for line in head if " train recipes/" in line)
    named = RECIPES.parent / re.search(r"recipes/\S+", command)[0]
    assert named.parent == path.parent and named.stem.startswith(path.stem), "the command names another recipe"
    assert any("xpect" in line for line in head), "expectation"
    load_recipe(named)
    recipe = load_recipe(path, ["encoder.init_from=null"])
    for name in recipe_variants(path):
        load_recipe(path.with_stem(f"{path.stem}-{name}"))
    with torch.device("meta"):
        assert build_method(recipe).num_views == recipe.views.count
    view_specs(recipe)


def test_papers_recipes_have_their_settings():
    def load(name: str):
        return load_recipe(RECIPES / f"{name}.yaml")

    for method in ("moco_v2", "moco_v3", "dino", "nnbyol", "byol"):
        small, large, wide = (
            load(f"cifar100/{method}/{encoder}") for encoder in ("resnet18", "resnet50", "wide_resnet28_2")
        )
        assert (small.data.dataset, small.training.epochs, small.training.batch_size) == ("cifar100", 1000, 256)
        assert small.orthogonality.penalty == "so" and small.method_name == method
        assert large.encoder.name == "resnet50" and wide.encoder.name == "wide_resnet28_2"
        assert large.encoder.stem == "small" and large.training == wide.training == small.training
    byol, barlow = load("imagenet1k/byol/resnet50"), load("cifar10/barlow_twins/resnet50")
    assert (byol.training.epochs, byol.training.batch_size, byol.data.dataset) == (100, 2048, "imagenet-1k")
    assert barlow.training.optimizer.schedule == "constant" and barlow.training.batch_size == 512
    assert load("cifar10/barlow_twins/resnet50-4views").training.batch_size == 128
    swav = load("stl10/swav/resnet50-6local")
    assert (swav.views.local_count, swav.views.local_specs[0].size, swav.data.train_split) == (6, 32, "unlabeled")
    assert swav.evaluation_data is not None and swav.evaluation_data.train_split == "train"


def test_every_method_has_a_recipe_with_every_penalty():
    folder = RECIPES / "cifar10"
    vits = [folder / "dino" / f"vit-{size}.yaml" for size in ("tiny", "small", "base")]
    for name in available_methods():
        encoder = "vit-tiny" if get_method(name).needs_patches else "resnet18"
        for file in [folder / name / f"{encoder}.yaml", *(vits if name == "dino" else [])]:
            for penalty in ("none", "so", "srip"):
                recipe = load_recipe(file.with_stem(f"{file.stem}-{penalty}"))
                assert (recipe.method_name, recipe.orthogonality.penalty) == (name, penalty)


def test_variants_are_read_from_the_name_of_the_file(tmp_path: Path):
    write(tmp_path / "defaults.yaml", "variants: {many: {views: {count: 8}}, srip: {orthogonality: {penalty: srip}}}")
    write(
        tmp_path / "a-b.yaml",
        "defaults: defaults.yaml\ndata: {dataset: shapes}\nvariants: {srip: {views: {count: 3}}}",
    )
    assert load_recipe(tmp_path / "a-b.yaml").views.count == 2
    both = load_recipe(tmp_path / "a-b-srip-many.yaml", ["training.epochs=7"])
    assert (both.views.count, both.orthogonality.penalty, both.training.epochs) == (8, "srip", 7)
    assert load_recipe(tmp_path / "a-b-many-srip.yaml").views.count == 3  # the last word wins
    with pytest.raises(
        InputError, match=r"a-b-strip\.yaml: unknown variant of a-b\.yaml 'strip': did you mean 'srip'"
    ):
        load_recipe(tmp_path / "a-b-strip.yaml")
    with pytest.raises(InputError, match=r"c-srip\.yaml: cannot be read"):
        load_recipe(tmp_path / "c-srip.yaml")
    write(tmp_path / "a-b-srip.yaml", "data: {dataset: shapes}")
    assert load_recipe(tmp_path / "a-b-srip.yaml").orthogonality.penalty != "srip"  # a file of that name is that file
