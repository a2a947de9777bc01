"""Words for a person that every layer needs: counted nouns, and the name that was probably meant."""

import difflib
from collections.abc import Iterable

_SUGGESTION_CUTOFF = 0.6


def count(number: int, noun: str) -> str:
    """A number with its noun in the singular or the plural: `1 store`, `2,048 stores`, `3 classes`, `2 copies`."""
    return f"{number:,} {noun if number == 1 else plural(noun)}"


def plural(noun: str) -> str:
    """The plural of a regular English noun; of several words, the last one changes."""
    if noun.endswith(("s", "x", "ch", "sh")):
        return f"{noun}es"
    if noun.endswith("y") and noun[-2:-1] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}s"


def some(names: Iterable[str], most: int) -> str:
    """The first `most` of several names, and how many more there are: `lyon, oslo and 3 more`."""
    names = list(names)
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`: did you mean 'rounds'?`, to be put after an error; empty where nothing known is close to `word`."""
    close = nearest(word, known)
    return f": did you mean {close!r}?" if close else ""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name that is closest to `word`, whatever the case; None where none is close."""
    by_folded = {name.casefold(): name for name in known}
    found = difflib.get_close_matches(word.casefold(), by_folded, n=1, cutoff=_SUGGESTION_CUTOFF)
    return by_folded[found[0]] if found else None
