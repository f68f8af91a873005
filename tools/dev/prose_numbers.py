"""Numbers in sentences of docs/source/, from the json files of docs/results/.

``{{ APr: Seesaw }}``
    mean of mask APr over seeds, "39.1".
``{{ AP ±: Seesaw above cosine softmax; seeds 1 2 }}``
    mean difference, paired by seed, with its deviation, "2.3 ± 1.0". ``below`` turns it round. Both fail where the
    difference does not have that sign, so that no sentence says "ahead" of a method that later runs put behind.
``{{ AP ±: tried/EQLv2 + RFS minus EQLv2 }}``
    with its sign, "+8.1" or "-0.1", whatever it is. ``FILE/`` names another file than methods.json.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from tables import mean_and_deviation, paired

MARKER = re.compile(r"\{\{\s+(AP[rcf]?(?:-fixed|-pool)?)(\s+±)?:\s+(.+?)(?:;\s+seeds\s+([\d\s]+?))?\s+\}\}", re.DOTALL)
SIGNS = {"above": 1, "below": -1, "minus": 1}


def _row(name: str, rows_of: Callable[[str], Sequence[dict]], seeds: set[int] | None) -> dict:
    """The row ``FILE/METHOD``, of these seeds alone."""
    file, _, method = name.rpartition("/")
    file = file or "methods"
    row = next((row for row in rows_of(file) if row["method"] == method), None)
    if row is None:
        raise ValueError(f"docs/results/{file}.json has no row {method!r}")
    at = [k for k, seed in enumerate(row["seeds"]) if seeds is None or seed in seeds]
    segm = {metric: [values[k] for k in at] for metric, values in row["segm"].items()}
    return {"seeds": [row["seeds"][k] for k in at], "segm": segm}


def number(
    metric: str, deviation: bool, expression: str, seeds: set[int] | None, rows_of: Callable[[str], Sequence[dict]]
) -> str:
    """The text of one marker.

    Raises:
        ValueError: a row is not there, nothing of it was measured, or the difference has the other sign.
    """
    first, word, second = (re.split(r" (above|below|minus) ", expression) + [None, None])[:3]
    row = _row(first, rows_of, seeds)
    values = row["segm"][metric] if second is None else paired(row, _row(second, rows_of, seeds), "segm", metric)
    known = [SIGNS.get(word, 1) * v for v in values if v is not None]
    if not known:
        raise ValueError(f"no seed has {metric} of {expression}")
    text = mean_and_deviation(known, sign=word == "minus")
    if word in ("above", "below") and not float(text.split(" ")[0]) > 0:
        raise ValueError(f"{metric}: {expression} does not hold, by {text}: change the sentence")
    return text if deviation else text.split(" ")[0]


def with_numbers(text: str, rows_of: Callable[[str], Sequence[dict]]) -> str:
    """Text with the markers filled in; rows_of gives the rows of a file of docs/results/."""

    def fill(match: re.Match) -> str:
        seeds = {int(seed) for seed in match[4].split()} if match[4] else None
        return number(match[1], bool(match[2]), " ".join(match[3].split()), seeds, rows_of)

    return MARKER.sub(fill, text)
