"""The one way to declare settings: a keyword-only dataclass whose names and types are checked."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from functools import wraps
from typing import Any, TypeVar, dataclass_transform, get_type_hints

from huggingface_hub.dataclasses import strict

from hf_ssl_or.errors import InputError, unknown
from hf_ssl_or.habits import HABITS

C = TypeVar("C")


def unknown_setting(kind: str, name: str, known: list[str]) -> InputError:
    """Makes the error for an unknown setting: what it is called here, where another library has a name for it."""
    ours = HABITS.get(name.replace("-", "_"))
    return unknown(kind, name, known) if ours is None else InputError(f"unknown {kind} {name!r}: set {ours}")


@dataclass_transform(kw_only_default=True)
def settings(cls: type[C]) -> type[C]:
    """Decorates a class of annotated fields: a wrong type or an unknown name is an error when an object is made.

    The class also gets `to_dict()` and `to_json_string()`, with plain values, as callbacks and trackers expect.

    The Hub library's `strict` alone passes over annotations that are strings, as `from __future__ import annotations`
    makes them all; here they are resolved first.
    """
    cls = dataclass(kw_only=True)(cls)
    hints = get_type_hints(cls)
    for field in fields(cls):  # type: ignore[arg-type]
        field.type = hints[field.name]
    names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    cls = strict(cls)
    make = cls.__init__

    @wraps(make)
    def __init__(self: Any, *args: Any, **values: Any) -> None:
        for name in values:
            if name not in names:
                raise unknown_setting(f"setting of {cls.__name__}", name, names)
        make(self, *args, **values)

    def to_dict(self: Any) -> dict[str, Any]:
        """Returns plain values."""
        return asdict(self)

    def to_json_string(self: Any) -> str:
        """Returns the settings as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    cls.__init__ = __init__  # type: ignore[method-assign]
    for function in (to_dict, to_json_string):
        if function.__name__ not in vars(cls):
            setattr(cls, function.__name__, function)
    return cls
