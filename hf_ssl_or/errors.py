"""What the user is told when the input is wrong: one line that names the thing and says what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input from outside: a recipe, a file, an argument. The command line prints one line and exits with 2."""


class NonFiniteLossError(ArithmeticError):
    """The loss became NaN or infinite; the message names the step and the last good checkpoint."""


def unknown(kind: str, name: str, known: Iterable[str]) -> InputError:
    """Makes the error for an unknown name, with the nearest valid one."""
    options = sorted(known)
    near = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"one of: {', '.join(options)}"
    return InputError(f"unknown {kind} {name!r}: {hint}")
