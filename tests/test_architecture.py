"""The layers of the package: imports run downwards, without cycles, and modules of one layer keep apart where told."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hf_ssl_or"
LAYERS = [
    {"errors", "habits", "settings", "structures", "randomness", "distributed", "launcher", "models", "runs"},
    {"data", "methods", "orthogonality"},
    {"evaluation"},
    {"hub", "report", "callbacks", "training"},
    {"recipe", "run", "evaluate", "embedding", "listing", "show", "sweeps", "cli", "__main__"},
]
APART = {"data", "methods", "orthogonality"}  # of one layer, and they do not know each other
LAYER_OF = {name: layer for layer, names in enumerate(LAYERS) for name in names}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_name(path: Path) -> str:
    return ".".join(("hf_ssl_or", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def imported_modules(tree: ast.AST) -> Iterator[tuple[str, list[str]]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), [alias.name for alias in node.names]


def complaints(path: Path, source: str) -> list[str]:
    here, found = part(path), []
    for name, _ in imported_modules(ast.parse(source)):
        if name.startswith("."):
            if here != "models" or name.startswith(".."):
                found.append(f"relative import {name}")
            continue
        if name.split(".")[0] != "hf_ssl_or":
            continue
        if name == "hf_ssl_or":
            found.append("imports the package root")
            continue
        there = name.split(".")[1]
        if here == "models" and there != "models":
            found.append(f"models imports {name}: it must travel alone")
        if LAYER_OF[there] > LAYER_OF[here]:
            found.append(f"imports upwards: {name}")
        if here in APART and there in APART and here != there:
            found.append(f"{here} imports {there} of its own layer")
    return found


def import_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Which module imports which, also within functions; `from package import module` imports the module."""
    graph: dict[str, set[str]] = {name: set() for name in sources}
    for name, source in sources.items():
        for module, names in imported_modules(ast.parse(source)):
            if module.startswith("."):
                module = f"{name.rpartition('.')[0]}{module if module != '.' else ''}".rstrip(".")
            submodules = [f"{module}.{item}" for item in names if f"{module}.{item}" in sources]
            graph[name] |= {target for target in submodules or [module] if target in sources and target != name}
    return graph


def cycle(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downwards(path: Path):
    assert complaints(path, path.read_text()) == []


def test_no_module_imports_itself_by_way_of_others():
    assert cycle(import_graph({module_name(path): path.read_text() for path in FILES})) == []


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("data/views.py", "from hf_ssl_or.training.trainer import SSLTrainer", "imports upwards"),
        ("data/views.py", "from hf_ssl_or.methods.base import SSLMethod", "of its own layer"),
        ("runs/results.py", "from hf_ssl_or.evaluation.features import extract_features", "imports upwards"),
        ("methods/x.py", "from hf_ssl_or import SSLTrainer", "package root"),
        ("models/x.py", "from hf_ssl_or.errors import InputError", "travel alone"),
        ("training/x.py", "from ..data import views", "relative"),
    ],
)
def test_the_check_sees_a_broken_layer(file: str, source: str, complaint: str):
    assert complaint in " ".join(complaints(PACKAGE / file, source))


def test_the_check_sees_a_cycle():
    sources = {"hf_ssl_or.a": "from hf_ssl_or import b", "hf_ssl_or.b": "def f():\n    import hf_ssl_or.a\n"}
    assert cycle(import_graph(sources))
