"""What `hf-ssl-or list` shows."""

from __future__ import annotations

import fnmatch
from importlib import import_module
from pathlib import Path

from hf_ssl_or.errors import InputError


def names_and_notes(what: str, pattern: str = "*") -> list[tuple[str, str]]:
    """Returns (name, one-line note) of all of a kind whose name matches `pattern`."""
    return [row for row in KINDS[what]() if fnmatch.fnmatch(row[0], pattern)]


def _methods() -> list[tuple[str, str]]:
    from hf_ssl_or.methods import available_methods, get_method

    documents = {name: import_module(get_method(name).__module__).__doc__ or "" for name in available_methods()}
    return [(name, document.strip().partition("\n")[0]) for name, document in documents.items()]


def _encoders() -> list[tuple[str, str]]:
    from hf_ssl_or.models.auto import list_encoders

    return [(name, "") for name in list_encoders()]  # no net is built: there are more than a thousand


def _protocols() -> list[tuple[str, str]]:
    from hf_ssl_or.evaluation.protocols import available_protocols, get_protocol

    return [(name, f"hash {get_protocol(name).hash}") for name in available_protocols()]


def _datasets() -> list[tuple[str, str]]:
    from hf_ssl_or.data.published import PUBLISHED

    return [(name, known.describe()) for name, known in PUBLISHED.items()]


def _recipes() -> list[tuple[str, str]]:
    folder = Path("recipes")
    if not folder.is_dir():
        raise InputError("recipes: no such folder here; run this in a clone of the repository")
    paths = sorted(path for path in folder.rglob("*.yaml") if _is_run(path))
    return [(str(path), _first_comment(path) + _variants(path)) for path in paths]


def _first_comment(path: Path) -> str:
    return path.read_text().partition("\n")[0].lstrip("# ")


def _variants(path: Path) -> str:
    from hf_ssl_or.recipe import recipe_variants

    names = recipe_variants(path)
    return f" (variants: {' '.join(f'-{name}' for name in names)})" if names else ""


def _is_run(path: Path) -> bool:
    return not path.name.startswith("defaults") and not {"accelerate", "sweeps"} & set(path.parts)


KINDS = {
    "methods": _methods,
    "encoders": _encoders,
    "datasets": _datasets,
    "protocols": _protocols,
    "recipes": _recipes,
}
