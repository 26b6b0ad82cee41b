"""The methods: one file each. The file's name is the method's name; nothing else needs to be registered."""

from __future__ import annotations

import pkgutil
from importlib import import_module

from hf_ssl_or.errors import InputError, unknown
from hf_ssl_or.methods.base import SSLMethod

_SHARED = {"base", "decoder", "families", "heads", "queue", "teacher", "terms", "whitening"}


def available_methods() -> list[str]:
    """Lists the names that `get_method` knows, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _SHARED)


def get_method(name: str) -> type[SSLMethod]:
    """Finds a method's class.

    Args:
        name: A name of `available_methods()`, or the dotted path of any importable module that defines `Method`.

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
    method = getattr(module, "Method", None)
    if not (isinstance(method, type) and issubclass(method, SSLMethod)):
        raise InputError(f"method.name: {name}: the module must define a class Method(SSLMethod)")
    return method
