"""Metrics in the form of the `evaluate` library, each a folder that `evaluate.load` reads without the network.

`evaluate` copies the script of a folder into its cache and imports it there; the script needs this package installed.
Nothing else in the package imports `evaluate`.
"""

from __future__ import annotations

from pathlib import Path

from hf_ssl_or.errors import unknown

_FOLDER = Path(__file__).parent


def available_metrics() -> list[str]:
    """Names of all metrics, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*/*.py") if path.stem == path.parent.name)


def metric_path(name: str) -> str:
    """Returns the folder of a metric, for `evaluate.load(metric_path("rankme"))`.

    Raises:
        InputError: There is none of that name.
    """
    if name not in available_metrics():
        raise unknown("metric", name, available_metrics())
    return str(_FOLDER / name)
