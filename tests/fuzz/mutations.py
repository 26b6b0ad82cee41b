"""Changes to valid things: plain data at a random place, bytes at random places; and what must come of them."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from hf_ssl_or.errors import InputError

EXAMPLES = int(os.environ.get("HF_SSL_OR_FUZZ_EXAMPLES", "0"))

fuzz = settings(
    max_examples=EXAMPLES or 40,
    derandomize=not EXAMPLES,  # the suite tries the same examples each time, a long hunt new ones
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2, 3, 7, 16, 64, 2**63, 10**400]),
    st.sampled_from([0.0, -0.5, 0.5, 1e-300, 1e300, float("inf"), float("nan")]),
    st.sampled_from(["", ".", "..", "auto", "none", "no", "1e-6", "{{7*7}}", "a\nb", "\0", "\ud800", "x" * 300, "/"]),
    st.text(max_size=6),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Returns every container of plain data with each of its keys or indices."""
    if isinstance(tree, dict | list):
        for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
            yield tree, key
            yield from places(tree[key])


@st.composite
def mutated(draw: st.DrawFn, tree: Any, values: st.SearchStrategy[Any] = values) -> Any:
    """Draws a copy of plain data with one to three values replaced, removed or added."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(tree))
        if not found:
            return draw(values)
        container, key = draw(st.sampled_from(range(len(found))).map(found.__getitem__))
        kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
        if kind == "replace":
            container[key] = draw(values)
        elif kind == "remove":
            del container[key]
        elif isinstance(container, dict):
            container[draw(st.text(max_size=5))] = draw(values)
        else:
            container.insert(key, draw(values))
    return tree


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Draws bytes with some of them changed, cut out, doubled, or the end missing."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        if not data:
            break
        place = draw(st.integers(0, min(len(data), 64) - 1) | st.integers(0, len(data) - 1))
        length = draw(st.integers(1, 16))
        kind = draw(st.sampled_from(["bit", "bytes", "remove", "double", "cut"]))
        if kind == "bit":
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "bytes":
            data[place : place + length] = draw(st.binary(min_size=length, max_size=length))
        elif kind == "remove":
            del data[place : place + length]
        elif kind == "double":
            data[place:place] = data[place : place + length]
        else:
            del data[place:]
    return bytes(data)


def result_or_one_line(call: Callable[[], Any], *errors: type[Exception]) -> Any:
    """Calls; what is wrong must be an InputError, which the command line prints as one line, or one of `errors`."""
    try:
        return call()
    except InputError as error:
        assert 0 < len(" ".join(str(error).split())) < 50_000 and "Traceback" not in str(error), repr(str(error))[:500]
    except errors:
        pass
    return None
