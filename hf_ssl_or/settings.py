"""The one way to declare settings: a keyword-only dataclass whose types are checked."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TypeVar, dataclass_transform, get_type_hints

from huggingface_hub.dataclasses import strict

C = TypeVar("C")


@dataclass_transform(kw_only_default=True)
def settings(cls: type[C]) -> type[C]:
    """Decorates a class of annotated fields: a wrong type or an unknown name is an error when an object is made.

    The Hub library's `strict` alone passes over annotations that are strings, as `from __future__ import annotations`
    makes them all; here they are resolved first.
    """
    cls = dataclass(kw_only=True)(cls)
    hints = get_type_hints(cls)
    for field in fields(cls):  # type: ignore[arg-type]
        field.type = hints[field.name]
    return strict(cls)
