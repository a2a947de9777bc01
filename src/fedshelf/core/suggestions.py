"""Suggestions for misspelled names, for error messages."""

import difflib
from collections.abc import Iterable

_CUTOFF = 0.6


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name closest to `word`, ignoring case; None if none is close."""
    by_folded = {name.casefold(): name for name in known}
    found = difflib.get_close_matches(word.casefold(), by_folded, n=1, cutoff=_CUTOFF)
    return by_folded[found[0]] if found else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A suffix for an error message, `: did you mean 'rounds'?`; empty if no known name is close to `word`."""
    near = nearest(word, known)
    return f": did you mean {near!r}?" if near else ""
