"""Text of any origin in Markdown: it shows as it is, and is never read as Markdown, HTML, a link or a table's edge."""

from __future__ import annotations

import re
from collections.abc import Sequence

_LONGEST = 200
# Control characters and line ends; marks that turn or hide text; surrogates, which UTF-8 cannot hold.
_UNSHOWABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]+")
# What Markdown, HTML and mathematics would read, and the dots and colons that would make a link.
_ACTIVE = re.compile(r"[`*_\[\]#~!$]|[&<>@\\]|(?i:(?<=\bwww)\.)|:(?=//)")
_BY_NUMBER = frozenset("&<>@\\.:")  # where a backslash would not do


def clean(text: object) -> str:
    """Returns one line that can be shown, of at most 200 characters."""
    line = _UNSHOWABLE.sub("\N{REPLACEMENT CHARACTER}", str(text)).strip()
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}\N{HORIZONTAL ELLIPSIS}"


def escape(text: object) -> str:
    """Returns text for the middle of a line, with everything that Markdown and HTML would read made literal."""
    return _ACTIVE.sub(_literal, clean(text))


def code(text: object) -> str:
    """Returns text as code in a line."""
    plain = clean(text) or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", plain)), default=0))
    space = " " if plain[0] == "`" or plain[-1] == "`" else ""
    return f"{fence}{space}{plain}{space}{fence}"


def block(text: str, language: str) -> str:
    """Returns lines as a block of code."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    lines = "\n".join(_UNSHOWABLE.sub("\N{REPLACEMENT CHARACTER}", line) for line in text.strip("\n").splitlines())
    return f"{fence}{language}\n{lines}\n{fence}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> str:
    """Returns a table.

    Args:
        head: Names of the columns.
        rows: Cells of Markdown, as many as columns.
        words: So many columns hold words, on the left; numbers follow, on the right.
    """
    rule = ["---" if i < words else "---:" for i in range(len(head))]
    lines = ([cell.replace("|", "\\|") for cell in row] for row in (head, rule, *rows))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _literal(found: re.Match[str]) -> str:
    return f"&#{ord(found[0])};" if found[0] in _BY_NUMBER else f"\\{found[0]}"
