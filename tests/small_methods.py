"""Settings that make any method small: what the tests of all methods share."""

from __future__ import annotations

import dataclasses
from typing import Any

from hf_ssl_or.methods import get_method

OVERRIDES: dict[str, dict[str, Any]] = {  # what a batch of 16 images asks for, beyond the rule of `small_settings`
    "wmse": {"projector_dim": 4},
}


def small_settings(name: str) -> dict[str, Any]:
    """Widths, queues and the like above 64 shrink to 32; everything else is the default."""
    fields = dataclasses.fields(get_method(name).config_class)
    large = [field.name for field in fields if type(field.default) is int and field.default > 64]
    return dict.fromkeys(large, 32) | OVERRIDES.get(name, {})
