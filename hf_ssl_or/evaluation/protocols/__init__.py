"""The evaluation protocols, by name."""

from __future__ import annotations

from collections.abc import Sequence

from hf_ssl_or.errors import InputError, unknown
from hf_ssl_or.evaluation.protocols.base import LabeledFeatures, Protocol
from hf_ssl_or.evaluation.protocols.few_shot import FEW_SHOT_PROTOCOLS
from hf_ssl_or.evaluation.protocols.fine_tune import FINE_TUNE_PROTOCOLS
from hf_ssl_or.evaluation.protocols.knn import KNN_PROTOCOLS
from hf_ssl_or.evaluation.protocols.linear_probe import LINEAR_PROTOCOLS

__all__ = ["LabeledFeatures", "Protocol", "available_protocols", "get_protocol", "resolve_protocols"]

_ALL: tuple[Protocol, ...] = (*KNN_PROTOCOLS, *LINEAR_PROTOCOLS, *FEW_SHOT_PROTOCOLS, *FINE_TUNE_PROTOCOLS)
_PROTOCOLS = {protocol.name: protocol for protocol in _ALL}


def available_protocols() -> list[str]:
    """Names of all protocols, sorted."""
    return sorted(_PROTOCOLS)


def get_protocol(name: str) -> Protocol:
    """Finds a protocol by its name.

    Raises:
        InputError: There is none of that name.
    """
    if name not in _PROTOCOLS:
        raise unknown("evaluation protocol", name, _PROTOCOLS)
    return _PROTOCOLS[name]


def resolve_protocols(evaluators: Sequence[Protocol | str]) -> list[Protocol]:
    """Returns protocol objects for names and objects.

    Raises:
        InputError: A name is unknown, something is neither, or two have one name.
    """
    if isinstance(evaluators, str):
        raise InputError(f"evaluators: a list is wanted; write [{evaluators!r}]")
    protocols = [get_protocol(each) if isinstance(each, str) else each for each in evaluators]
    for protocol in protocols:
        if not isinstance(protocol, Protocol):
            made = f"; make an object of it: {protocol.__name__}(...)" if isinstance(protocol, type) else ""
            raise InputError(f"evaluators: {protocol!r} is neither a Protocol nor the name of one{made}")
    names = [protocol.name for protocol in protocols]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"evaluators: two are named {twice[0]!r}; give one another name")
    return protocols
