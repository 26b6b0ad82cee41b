"""The floors of the house: imports run downwards, rooms of one floor keep apart."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hf_ssl_or"
FLOORS = [
    {"errors", "settings", "structures", "randomness", "distributed", "launcher", "models", "runs"},
    {"data", "methods", "orthogonality"},
    {"evaluation"},
    {"training", "hub", "report"},
    {"recipe", "run", "embedding", "preview", "listing", "show", "cli", "__main__"},
]
APART = {"data", "methods", "orthogonality"}  # neighbors on one floor that must not know each other
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def complaints(path: Path, source: str) -> list[str]:
    here, found = room(path), []
    for name in imported_modules(ast.parse(source)):
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
        if FLOOR_OF[there] > FLOOR_OF[here]:
            found.append(f"imports upwards: {name}")
        if here in APART and there in APART and here != there and FLOOR_OF[here] == FLOOR_OF[there]:
            found.append(f"{here} imports its neighbor {there}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downwards(path: Path):
    assert complaints(path, path.read_text()) == []


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("data/views.py", "from hf_ssl_or.training.trainer import SSLTrainer", "imports upwards"),
        ("data/views.py", "from hf_ssl_or.methods.base import SSLMethod", "neighbor"),
        ("methods/x.py", "from hf_ssl_or import SSLTrainer", "package root"),
        ("models/x.py", "from hf_ssl_or.errors import InputError", "travel alone"),
        ("training/x.py", "from ..data import views", "relative"),
    ],
)
def test_the_check_sees_a_broken_floor(file: str, source: str, complaint: str):
    assert complaint in " ".join(complaints(PACKAGE / file, source))
