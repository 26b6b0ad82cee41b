"""What the file of a sweep means, and one line for each thing that can be wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hf_ssl_or.errors import InputError
from hf_ssl_or.runs.time_to import TimeTo
from hf_ssl_or.sweeps.plan import read_plan

BASE: dict[str, Any] = {
    "data": {"dataset": "shapes", "image_size": 16},
    "method": {"name": "barlow_twins", "projector_dim": 32},
    "orthogonality": {"penalty": "so"},
}
REPOSITORY = Path(__file__).resolve().parents[2]


def sweep(**keys: Any) -> dict[str, Any]:
    return {"recipe": BASE, "arms": {"so": [], "none": ["orthogonality.penalty=none"]}} | keys


def test_arms_times_grid():
    plan = read_plan(sweep(grid={"method.projector_dim": [32, 64], "views.count": [2, 4]}, seeds=[0, 3]))
    assert [arm.name for arm in plan.arms[:2]] == ["so,projector_dim=32,count=2", "so,projector_dim=32,count=4"]
    assert len(plan.arms) == 8 and plan.seeds == (0, 3)
    last = plan.arms[-1].recipe
    assert (last.method.projector_dim, last.views.count, last.orthogonality.penalty) == (64, 4, "none")


def test_arms_whose_spectra_and_features_are_drawn():
    plan = read_plan(sweep(spectra=["none", "so"], umap=["so"]))
    assert (plan.spectra, plan.umap) == (("none", "so"), ("so",))
    cell = "so,projector_dim=32"
    assert read_plan(sweep(grid={"method.projector_dim": [32, 64]}, spectra=[cell])).spectra == (cell,)
    assert read_plan(sweep()).spectra == read_plan(sweep(umap=None)).umap == ()


def test_a_grid_alone_and_changes_as_a_mapping():
    plan = read_plan({"recipe": BASE, "grid": {"training.optimizer.lr": [1e-3, 2e-3]}})
    assert [arm.name for arm in plan.arms] == ["lr=0.001", "lr=0.002"]
    plan = read_plan(sweep(arms={"a": {"method": {"name": "byol", "projector_dim": 8}}, "b": []}))
    assert plan.arms[0].recipe.method_name == "byol" and plan.arms[1].recipe.method_name == "barlow_twins"


def test_a_recipe_beside_the_file_and_the_shipped_sweep(tmp_path: Path):
    (tmp_path / "own.yaml").write_text("recipe: base.yaml\ngrid: {views.count: [2, 3]}\n")
    (tmp_path / "base.yaml").write_text("data: {dataset: shapes}\n")
    assert len(read_plan(tmp_path / "own.yaml").arms) == 2
    for shipped in (REPOSITORY / "recipes" / "sweeps").glob("*.yaml"):
        assert len(read_plan(shipped).arms) > 2
    plan = read_plan(REPOSITORY / "recipes" / "sweeps" / "quick.yaml")
    assert [arm.name for arm in plan.arms] == ["none", "so", "srip"] and plan.select == "rankme"


def test_evaluation_replaces_protocols_or_adds_data_sets():
    plan = read_plan(sweep(evaluate={"protocols": ["knn"]}))
    assert plan.arms[0].recipe.evaluation.protocols == ["knn"]
    plan = read_plan(sweep(evaluate={"protocols": ["knn"], "datasets": ["shapes"]}))
    assert plan.arms[0].recipe.evaluation.protocols != ["knn"] and plan.datasets == ("shapes",)


def test_recipes_are_an_axis_along_which_arms_are_compared():
    other = BASE | {"method": "byol"}
    none = ["orthogonality.penalty=none"]
    tree = {
        "recipes": {"one": BASE, "two": other, "gone": None},
        "arms": {"none": none, "loop": {"command": COMMAND}, "so": []},
        "grid": {"views.count": [2, 3]},
    }
    plan = read_plan(tree | {"compare": "arm"})
    assert [arm.name for arm in plan.arms][:5] == [
        *("one,none,count=2", "one,none,count=3", "loop", "one,so,count=2", "one,so,count=3"),
    ]
    compared = {arm.name: (plan.reference(arm) or arm).name for arm in plan.arms}
    assert compared["two,so,count=3"] == "two,none,count=3" and compared["two,none,count=3"] == "two,none,count=3"
    assert compared["loop"] == "loop"
    plan = read_plan(tree | {"compare": "views.count"})
    compared = {arm.name: (plan.reference(arm) or arm).name for arm in plan.arms}
    assert compared["two,so,count=3"] == "two,so,count=2" and compared["loop"] == "loop"
    plan = read_plan(tree | {"compare": {"none": "so"}})
    compared = {arm.name: (plan.reference(arm) or arm).name for arm in plan.arms}
    assert compared["two,none,count=3"] == "two,so,count=3" and compared["two,so,count=3"] == "two,so,count=3"
    plan = read_plan(tree)
    assert [plan.reference(arm) for arm in plan.arms] == [None, *[plan.arms[0]] * 8]


def test_a_variant_in_the_name_of_the_file_may_leave_out_arms(tmp_path: Path):
    (tmp_path / "base.yaml").write_text("data: {dataset: shapes}\n")
    (tmp_path / "own.yaml").write_text(
        "recipe: base.yaml\narms: {a: [], b: [views.count=3], c: [views.count=4]}\n"
        "variants: {short: {arms: {b: null}, overrides: [training.epochs=1]}}\n"
    )
    assert [arm.name for arm in read_plan(tmp_path / "own.yaml").arms] == ["a", "b", "c"]
    plan = read_plan(tmp_path / "own-short.yaml")
    assert plan.name == "own-short" and [arm.name for arm in plan.arms] == ["a", "c"]
    assert plan.arms[1].recipe.training.epochs == 1


COMMAND = ["python", "loop.py", "{output}", "{seed}"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"arms": {"a": [], "b": ["orthogonality.penalty=so"]}}, "arms.b: changes nothing: orthogonality.penalty=so"),
        ({"arms": {"a": [], "b": []}}, "arms a, b: are the same run"),
        ({"arms": {"a": ["views.count=3", "views.count=4"]}}, "arms.a: sets views.count twice"),
        ({"arms": {"a": [], "A": ["views.count=3"]}}, "arms a, A: would share a folder"),
        ({"arms": {"a": "views.count=3"}}, "arms.a: a list of settings"),
        ({"arms": {"a/b": []}}, "arms.a/b: letters"),
        ({"arms": {"a": ["training.seed=3"]}}, "write seeds"),
        ({"arms": {}}, "arms, grid, recipes: name one"),
        ({"grid": {"training.max_step": [1, 2]}}, "did you mean 'max_steps'"),
        ({"grid": {"learning_rate": [1, 2]}}, "set training.optimizer.lr"),
        ({"grid": {"views.count": [2, 2]}}, "grid.views.count: has a value twice"),
        ({"grid": {"views.count": 2}}, "grid.views.count: a list of values"),
        ({"grid": {"orthogonality.penalty": ["so", "srip"]}}, "arms.none: sets orthogonality.penalty, which the grid"),
        ({"seeds": [0, 1, 0]}, "seeds: 0 is given twice"),
        ({"seeds": [True]}, "seeds: a list of whole numbers"),
        ({"sedes": [0]}, "did you mean 'seeds'"),
        ({"recipe": None}, "recipe: name a recipe"),
        ({"evaluate": {"dataset": ["x"]}}, "did you mean 'datasets'"),
        ({"evaluate": {"protocols": ["knm"]}}, "did you mean 'knn'"),
        ({"select": "knn/top1_k20"}, "may be measured on test images (arm so: split 'test')"),
        ({"arms": {"a": {"command": COMMAND[:3]}}}, "arms.a.command: has no {seed}"),
        ({"arms": {"a": {"command": "python x"}}}, "arms.a.command: a list of a program"),
        ({"arms": {"a": {"command": COMMAND, "views.count": 2}}}, "command goes with nothing else"),
        ({"compare": "arms"}, "compare: unknown axis 'arms': did you mean 'arm'"),
        ({"compare": {"so": "non"}}, "compare: unknown arm 'non': did you mean 'none'"),
        ({"recipes": {"a": BASE}}, "recipe, recipes: give one"),
        ({"recipes": ["a.yaml"]}, "recipes: names with recipes are wanted"),
        ({"figures": "knn"}, "figures: a list of names"),
        ({"time_to": "knn"}, "time_to: a metric with an arm or a value"),
        ({"time_to": {"metric": "knn", "arms": "so"}}, "did you mean 'arm'"),
        ({"time_to": {"metric": "kNN", "arm": "so"}}, "time_to.metric: unknown metric 'kNN'"),
        ({"time_to": {"metric": "alpha_req", "value": 1}}, "time_to.metric: unknown metric 'alpha_req'"),
        ({"time_to": {"metric": "knn", "arm": "nome"}}, "time_to.arm: unknown arm 'nome': did you mean 'none'"),
        ({"time_to": {"metric": "knn", "arm": "so", "value": 80}}, "time_to: give arm, whose last"),
        ({"time_to": {"metric": "knn"}}, "time_to: give arm, whose last"),
        ({"time_to": {"metric": "knn", "value": "80 %"}}, "time_to.value: a number is wanted, not '80 %'"),
        ({"time_to": {"metric": "knn", "value": float("nan")}}, "time_to.value: a number"),
        (
            {"time_to": {"metric": "knn", "value": 80}, "overrides": ["training.monitor_every=0"]},
            "time_to: arm so is not evaluated while it trains; set training.monitor_every",
        ),
        ({"spectra": ["non"]}, "spectra: unknown arm 'non': did you mean 'none'"),
        ({"umap": ["so", "so"]}, "umap: names one twice"),
        ({"spectra": "so"}, "spectra: a list of names is wanted"),
        ({"arms": {"a": [], "loop": {"command": COMMAND}}, "umap": ["loop"]}, "umap: arm loop is a command"),
        ({"name": "../x"}, "name: '../x'"),
    ],
)
def test_bad_input_is_one_line(keys: dict[str, Any], message: str):
    with pytest.raises(InputError) as told:
        read_plan(sweep(**keys))
    assert message in str(told.value) and "\n" not in str(told.value)


def test_what_arms_are_timed_to():
    assert read_plan(sweep(time_to={"metric": "rankme", "arm": "none"})).time_to == TimeTo(metric="rankme", arm="none")
    assert read_plan(sweep(time_to={"metric": "knn", "value": 80})).time_to == TimeTo(metric="knn", value=80)


def test_a_column_of_a_validation_split_may_select():
    validation = BASE | {"data": BASE["data"] | {"test_split": "validation"}}
    assert read_plan(sweep(recipe=validation, select="knn/top1_k20")).select == "knn/top1_k20"
    with pytest.raises(InputError, match="test images"):  # a data set of `evaluate` has its own test split
        read_plan(sweep(recipe=validation, select="dtd/knn/top1_k20"))
