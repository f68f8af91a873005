"""Names of categories, for pictures."""

import unicodedata
from collections.abc import Sequence


def short_names(names: Sequence[str]) -> list[str]:
    """The characters themselves where all categories are called by Unicode names of characters that fonts have, as
    those of glyph_lvis; else the names. (A seventh of LVIS's categories, as "owl" and "banana", are names of emoji.)"""
    characters = [_character(name) for name in names]
    return list(names) if "" in characters else characters


def _character(name: str) -> str:
    """Of this name, "" if there is none or it is a control character or an emoji."""
    try:
        found = unicodedata.lookup(name.replace("_", " "))
    except KeyError:
        return ""
    return found if unicodedata.category(found) != "Cc" and max(found) < "\U0001f000" else ""
