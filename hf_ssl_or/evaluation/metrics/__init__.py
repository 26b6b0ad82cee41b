"""Metrics as modules of the `evaluate` library, through which the package computes its accuracies and ranks.

Each is a folder that `evaluate.load` reads without the network: it copies the script into its own cache and imports it
there. `evaluate` writes its inputs to an Arrow table and reads them back as Python numbers, about 5 microseconds a row
and 0.4 a number: a quarter of a second for the predicted classes of 50,000 images, but 40 seconds and gigabytes for
their features of 2,048 dimensions. So the package passes predicted classes and spectra, never features. Others may
pass features; both ways end in the same formula of `collapse.measures`.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from hf_ssl_or.errors import InputError, unknown

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


def compute_metric(name: str, **inputs: Any) -> dict[str, Any]:
    """Computes a metric by its module, which is loaded once per process.

    Args:
        name: Name of the metric.
        **inputs: As for the module's `compute`, see its card.

    Raises:
        InputError: What the metric refuses; or the caches of Hugging Face cannot be written.
    """
    module = _load(name)(keep_in_memory=True)  # a new one each time, so that no refused input stays in it
    return module.compute(**inputs)


@functools.cache
def _load(name: str) -> Any:
    """Loads the class of a metric's module."""
    import evaluate  # half a second, which the import of the package need not cost

    try:
        return type(evaluate.load(metric_path(name), keep_in_memory=True))
    except OSError as error:
        raise InputError(
            f"evaluate cannot write its caches ({error}); set HF_HOME, or HF_MODULES_CACHE and HF_METRICS_CACHE, to a "
            "folder that can be written"
        ) from error
