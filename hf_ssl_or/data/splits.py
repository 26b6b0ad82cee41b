"""Names of splits, as the `datasets` library reads them from folders and files."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from datasets import data_files

# Split -> words that stand for it. Sets such as STL-10 have images without labels beside the library's three splits.
_KEYWORDS = {str(split): tuple(words) for split, words in data_files.SPLIT_KEYWORDS.items()}
_UNLABELED = {"unlabeled": ("unlabeled", "unlabelled")}
TEST_SPLITS = ("test", "validation", "valid", "val")  # those that are tested on, best first
SPLITS = (*_KEYWORDS, *_UNLABELED)
_WORDS = {word: split for split, words in (_KEYWORDS | _UNLABELED).items() for word in words}
_NONE: frozenset[str] = frozenset()
_EDGES = "-._ 0123456789"  # what the library writes as "-._ 0-9"
_PATTERN = re.compile(f"({'|'.join(_WORDS)})(?=$|[{_EDGES}])")


def splits_in(name: str) -> frozenset[str]:
    """Returns the splits that the name of a folder or file reads like: "train" for "Training" and "cats-train_2020".

    The rule is that of the `datasets` library, in upper case as well: a keyword between the ends of the name, digits,
    and the signs "-._ ".
    """
    name = name.lower()
    # The edge before a word is checked last: millions of names are searched, and most have no word.
    found = [word for word in _PATTERN.finditer(name) if not word.start() or name[word.start() - 1] in _EDGES]
    return frozenset(_WORDS[word[1]] for word in found) if found else _NONE


def library_split(name: str) -> str:
    """Returns the library's name of a split: "validation" for "dev"; other names as they are."""
    return _WORDS.get(name.lower(), name)


def find_split(name: str, splits: Collection[str]) -> str | None:
    """Returns the split that is meant: of that name, of the library's, or the only one of another word for it."""
    for option in (name, library_split(name)):
        if option in splits:
            return option
    same = [split for split in splits if library_split(split) == library_split(name)]
    return same[0] if len(same) == 1 else None


def common_folders(folders: Sequence[tuple[str, ...]]) -> int:
    """Returns how many leading folders all paths share."""
    first, last = min(folders), max(folders)
    return next((k for k, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
