"""The methods: one file each. The file's name is the method's name; nothing else needs to be registered.

`from hf_ssl_or.methods import BYOL, BYOLConfig` works for the class and the settings of every file.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import Any

from hf_ssl_or.errors import InputError, unknown
from hf_ssl_or.methods.base import SSLMethod
from hf_ssl_or.methods.whitening import WhiteningConfig

__all__ = ["SSLMethod", "WhiteningConfig", "available_methods", "get_method"]

_SHARED = {"base", "base_methods", "decoder", "functional", "heads", "queue", "teacher", "whitening"}


def available_methods() -> list[str]:
    """Lists the names that `get_method` knows, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _SHARED)


def get_method(name: str) -> type[SSLMethod]:
    """Finds a method's class.

    Args:
        name: A name of `available_methods()`, or the dotted path of any importable module that defines one subclass
            of `SSLMethod`.

    Raises:
        InputError: There is no such method.
    """
    if "." not in name and name not in available_methods():
        raise unknown("method", name, available_methods())
    path = name if "." in name else f"{__name__}.{name}"
    try:
        module = import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise  # the module is there, something that it imports is not
        raise InputError(f"method.name: {name}: there is no module {error.name!r} to import") from error
    found = [value for value in vars(module).values() if _is_method(value) and value.__module__ == path]
    if len(found) != 1:
        names = ", ".join(method.__name__ for method in found) or "none"
        raise InputError(f"method.name: {name}: the module must define one subclass of SSLMethod, not {names}")
    return found[0]


def _is_method(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, SSLMethod) and hasattr(value, "config_class")


def __getattr__(name: str) -> Any:
    files = {file.replace("_", ""): file for file in available_methods()}
    file = None if name.islower() else files.get(name.removesuffix("Config").lower())  # files are lower-case: no class
    for found in (get_method(file), get_method(file).config_class) if file else ():
        if found.__name__ == name:
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    methods = [get_method(name) for name in available_methods()]
    return sorted([*__all__, *(cls.__name__ for method in methods for cls in (method, method.config_class))])
