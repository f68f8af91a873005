"""What a mask must be before pycocotools gets it, which crashes, or takes all memory, over what is wrong."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = [
    "MAX_OUTLINE",
    "MAX_SIDE",
    "NO_POLYGON",
    "REACH",
    "coordinate_problems",
    "has_usable_polygons",
    "is_sequence",
    "outline_steps",
    "polygon_problems",
    "rle_problem",
    "rle_totals",
    "usable_polygons",
]

MAX_SIDE = 1 << 17
"""Largest width and height of an image, in pixels. Masks are rasterised at that size."""
REACH = 10
"""A polygon that reaches further beyond its image (in image sides) is a mistake; rasterising it takes all memory."""
MAX_OUTLINE = 4_000_000
"""Longest outline of an object in pixels: rasterising one takes about 150 bytes for each."""
NO_POLYGON = "no polygon of three points or more"


def is_sequence(value: Any) -> bool:
    return isinstance(value, (list, tuple, np.ndarray))


def usable_polygons(polygons: Sequence[Sequence[float]]) -> list[Sequence[float]]:
    """Those of three points or more, which Detectron2's loaders keep."""
    return [p for p in polygons if len(p) >= 6 and len(p) % 2 == 0]


def has_usable_polygons(segmentation: Any) -> bool:
    """False only where polygons are given and none of them has three points: Detectron2's loaders skip such objects."""
    if not isinstance(segmentation, list) or not segmentation:
        return True
    # What is no list of polygons is an error of its own.
    return not all(map(is_sequence, segmentation)) or bool(usable_polygons(segmentation))


def polygon_problems(objects: Sequence[Sequence[Sequence[float]]], sizes: np.ndarray) -> dict[int, str]:
    """What is wrong with polygons.

    Args:
        objects: n lists of usable polygons (at least one each).
        sizes: ``(n, 2)`` height and width of the image of each.

    Returns:
        What object i has that cannot be rasterised, for those that have something.
    """
    if not objects:
        return {}
    flat = list(itertools.chain.from_iterable(objects))
    values = _numbers(flat)
    if values is None:
        if len(objects) == 1:
            return {0: "a polygon with something that is not a number"}
        return {i: p[0] for i, o in enumerate(objects) if (p := polygon_problems([o], sizes[i : i + 1]))}
    ends = np.cumsum(np.fromiter(map(len, flat), np.int64, len(flat)))
    return coordinate_problems(values, ends, np.fromiter(map(len, objects), np.int64, len(objects)), sizes)


def coordinate_problems(values: np.ndarray, ends: np.ndarray, parts: np.ndarray, sizes: np.ndarray) -> dict[int, str]:
    """:func:`polygon_problems` of flat arrays.

    Args:
        values: ``(V,)`` coordinates of all polygons, which end before ``ends``, one after another.
        parts: ``(n,)`` polygons of each object, at least one.
        sizes: as there.
    """
    ends = ends // 2  # in points
    starts = np.insert(ends[:-1], 0, 0)
    begin = starts[np.cumsum(parts) - parts]  # first point of each object
    points = values.reshape(-1, 2)
    with np.errstate(invalid="ignore", over="ignore"):
        reach = np.maximum.reduceat(np.abs(points).max(1), begin)  # NaN stays NaN
        outline = np.add.reduceat(outline_steps(points, ends), begin)
        tests = (
            (~np.isfinite(reach), "a polygon with a number that is not finite"),
            (
                reach > REACH * np.asarray(sizes).max(1),
                f"a polygon that reaches beyond {REACH} times the size of its image",
            ),
            (outline > MAX_OUTLINE, f"an outline longer than {MAX_OUTLINE:,} pixels"),
        )  # fmt: skip
    problems: dict[int, str] = {}
    for bad, what in tests:
        for i in np.flatnonzero(bad).tolist():
            problems.setdefault(i, what)
    return problems


def outline_steps(points: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """``(P,)`` pixels that rasterising takes from each point of polygons to the next.

    Args:
        points: ``(P, 2)`` of all polygons; polygon k ends before ``ends[k]``.
    """
    following = np.arange(1, len(points) + 1)
    following[ends - 1] = np.insert(ends[:-1], 0, 0)
    return np.abs(points - points[following]).max(1)


def _numbers(polygons: Sequence[Sequence[float]]) -> np.ndarray | None:
    values = list(itertools.chain.from_iterable(polygons))
    if not all(issubclass(t, (int, float, np.integer, np.floating)) and t is not bool for t in set(map(type, values))):
        return None
    try:
        return np.array(values, np.float64)
    except OverflowError:  # an integer of hundreds of digits
        return np.array([v if isinstance(v, float) or abs(v) < 2**1000 else np.inf for v in values], np.float64)


def rle_problem(rle: Mapping[str, Any], height: int, width: int) -> str | None:
    """What is wrong with run lengths, ``{"size": [height, width], "counts": ...}``, or None. What a text stands for is
    seen by :func:`rle_totals`."""
    size, counts = rle.get("size"), rle.get("counts")
    if not (isinstance(size, (list, tuple)) and len(size) == 2 and all(_is_whole(v) for v in size)):
        return f"an RLE mask whose size is {str(size)[:50]}; [height, width] is needed"
    if tuple(size) != (height, width):
        return "an RLE mask whose size is not that of its image"
    if isinstance(counts, (str, bytes)):
        return None if counts.isascii() else "an RLE mask whose counts have characters that are not ASCII"
    if not isinstance(counts, (list, tuple)) or not all(_is_whole(v) and 0 <= v < 2**32 for v in counts):
        return "an RLE mask whose counts are neither a text nor whole numbers"
    if sum(counts) != height * width:
        return "an RLE mask whose counts do not cover its image"
    return None


def _is_whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def rle_totals(texts: Sequence[bytes]) -> np.ndarray:
    """``(n,)`` int64, the pixels that COCO's compressed run lengths cover; -1 where a text is none.

    A count is a signed number of digits to the base of 32, lowest first, one a character, 48 + digit, and + 32 where
    another digit follows. From the fourth on it is the difference to the count before the last.
    """
    total = np.full(len(texts), -1, np.int64)
    length = np.fromiter(map(len, texts), np.int64, len(texts))
    digit = np.frombuffer(b"".join(texts), np.uint8).astype(np.int64) - 48
    if not len(digit):
        return np.where(length == 0, 0, total)
    owner = np.repeat(np.arange(len(texts)), length)
    bad = np.zeros(len(texts), bool)
    bad[owner[(digit < 0) | (digit > 63)]] = True
    is_last = (digit & 32) == 0
    ends = np.cumsum(length)
    bad[(length > 0) & ~is_last[ends - 1]] = True
    # A number ends where no digit follows, or with its text.
    stop = is_last.copy()
    stop[ends[length > 0] - 1] = True
    stops = np.flatnonzero(stop)
    starts = np.insert(stops[:-1] + 1, 0, 0)
    place = np.arange(len(digit)) - np.repeat(starts, stops - starts + 1)
    bad[owner[place > 6]] = True  # of 2^32 pixels no count takes more
    place = np.minimum(place, 6)
    value = np.add.reduceat((digit & 31) << (5 * place), starts)
    value -= np.where(digit[stops] & 16, 1, 0) << (5 * (place[stops] + 1))
    of = owner[stops]
    first = np.searchsorted(of, np.arange(len(texts)))
    index = np.arange(len(of)) - first[of]
    # Counts 1, 3, 5, ... and 2, 4, 6, ... are two chains of differences; count 0 stands alone.
    order = np.lexsort((index, np.where(index == 0, -1, index & 1), of))
    chain_start = (index[order] <= 2) | (of[order] != np.insert(of[order][:-1], 0, -1))
    running = np.cumsum(value[order])
    begin = np.flatnonzero(chain_start)
    before = running[begin] - value[order][begin]
    count = running - np.repeat(before, np.diff(np.append(begin, len(order))))
    bad[of[order][(count < 0) | (count >= 2**32)]] = True
    pixels = np.bincount(of[order], weights=count, minlength=len(texts))
    return np.where(bad, -1, pixels).astype(np.int64)
