"""Names of categories, for pictures."""

import unicodedata


def short_name(name: str) -> str:
    """The character itself where a category is called by its Unicode name, as those of glyph_lvis are."""
    try:
        return unicodedata.lookup(name.replace("_", " "))
    except KeyError:
        return name
