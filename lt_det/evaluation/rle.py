"""Tables of run-length encoded masks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lt_det.io.segmentations import (
    NO_POLYGON,
    coordinate_problems,
    is_sequence,
    polygon_problems,
    rle_problem,
    usable_polygons,
)

__all__ = ["RleTable", "by_problem", "encode_polygons", "encode_segmentations"]


@dataclass
class RleTable:
    """Masks in COCO's compressed string form, one after another in one buffer.

    Attributes:
        text: (B,) uint8, the strings.
        begin, end: (n,) int64, where the string of each mask stands in ``text``.
        size: (n, 2) int64, height and width that each encoding states.
    """

    text: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    size: np.ndarray

    def __len__(self) -> int:
        return len(self.begin)

    @classmethod
    def without_masks(cls, n: int) -> RleTable:
        """n empty strings."""
        none = np.zeros(n, np.int64)
        return cls(np.zeros(0, np.uint8), none, none.copy(), np.zeros((n, 2), np.int64))

    @classmethod
    def from_strings(cls, strings: Sequence[bytes], size: np.ndarray) -> RleTable:
        """From n strings and their (n, 2) heights and widths."""
        end = np.cumsum(np.fromiter((len(s) for s in strings), np.int64, len(strings)))
        begin = np.concatenate([[0], end[:-1]]).astype(np.int64) if len(strings) else end
        text = np.frombuffer(b"".join(strings), np.uint8)
        return cls(text, begin, end, np.asarray(size, np.int64).reshape(-1, 2))

    @classmethod
    def from_counts(cls, counts: np.ndarray, start: np.ndarray, size: np.ndarray) -> RleTable:
        from ._rle_kernels import encode_strings

        text, offset = encode_strings(counts, start)
        return cls(text, offset[:-1].copy(), offset[1:].copy(), np.asarray(size, np.int64).reshape(-1, 2))

    @classmethod
    def concatenate(cls, tables: Sequence[RleTable]) -> RleTable:
        if not tables:
            return cls.without_masks(0)
        shift = np.cumsum([0] + [len(t.text) for t in tables])
        return cls(
            np.concatenate([t.text for t in tables]),
            np.concatenate([t.begin + s for t, s in zip(tables, shift)]),
            np.concatenate([t.end + s for t, s in zip(tables, shift)]),
            np.concatenate([t.size for t in tables]),
        )

    def take(self, index) -> RleTable:
        """The masks of ``index`` (integers, a slice or a mask); the buffer is shared."""
        return RleTable(self.text, self.begin[index], self.end[index], self.size[index])

    def counts(self) -> tuple[np.ndarray, np.ndarray]:
        """Run lengths (uint32, flat) and their offsets (n + 1,), see ``_rle_kernels``."""
        from ._rle_kernels import decode_strings

        return decode_strings(self._writable_text(), *self._ranges())

    def areas_and_totals(self) -> tuple[np.ndarray, np.ndarray]:
        """(n,) ones of each mask, and (n,) pixels it covers, -1 for a broken string."""
        from ._rle_kernels import measure_strings

        return measure_strings(self._writable_text(), *self._ranges())

    def _ranges(self) -> tuple[np.ndarray, np.ndarray]:
        return np.ascontiguousarray(self.begin), np.ascontiguousarray(self.end)

    def _writable_text(self) -> np.ndarray:
        # frombuffer gives a read-only array, which numba would compile for a second time
        if not self.text.flags.writeable:
            self.text = self.text.copy()
        return self.text

    def strings(self) -> list[bytes]:
        text = memoryview(self.text)  # of a table of a few masks, the buffer may hold a million more
        return [bytes(text[a:b]) for a, b in zip(self.begin.tolist(), self.end.tolist())]


def encode_segmentations(segmentations: Sequence[Any], sizes: np.ndarray) -> tuple[RleTable, dict[int, str]]:
    """Encodes COCO ``segmentation`` values: polygons, uncompressed or compressed run lengths.

    Args:
        segmentations: n values of a json's ``segmentation`` field, whatever they are.
        sizes: (n, 2) height and width of the image of each.

    Returns:
        n masks, and what is wrong with those that could not be encoded (empty strings), by row. Of polygons, those of
        three points or more are taken. Whether a compressed text covers its image is not looked at.
    """
    import pycocotools.mask as mask_utils

    sizes = np.array(sizes, np.int64).reshape(-1, 2)
    strings: list[bytes] = [b""] * len(segmentations)
    problems: dict[int, str] = {}
    polygons: dict[int, list] = {}
    for i, segmentation in enumerate(segmentations):
        h, w = sizes[i].tolist()
        if isinstance(segmentation, list) and all(map(is_sequence, segmentation)):
            polygons[i] = usable_polygons(segmentation)
            if not polygons[i]:
                problems[i] = NO_POLYGON
        elif isinstance(segmentation, dict):
            problem = rle_problem(segmentation, h, w)
            if problem:
                problems[i] = problem
                continue
            counts = segmentation["counts"]
            if isinstance(counts, (list, tuple)):
                counts = mask_utils.frPyObjects({"size": [h, w], "counts": list(counts)}, h, w)["counts"]
            strings[i] = counts.encode("ascii") if isinstance(counts, str) else counts
        else:
            problems[i] = "a segmentation that is neither polygons [[x, y, ...], ...] nor run lengths"
    rows = [i for i in polygons if i not in problems]
    wrong = polygon_problems([polygons[i] for i in rows], sizes[rows])
    problems |= {rows[k]: problem for k, problem in wrong.items()}
    for i in rows:
        if i not in problems:
            strings[i] = _union(polygons[i], *sizes[i].tolist())
    return RleTable.from_strings(strings, sizes), problems


def encode_polygons(
    values: np.ndarray, ends: np.ndarray, parts: np.ndarray, sizes: np.ndarray
) -> tuple[list[bytes], dict[int, str]]:
    """The strings of :func:`encode_segmentations`, of usable polygons alone.

    Args:
        values: (V,) float64 coordinates x, y, x, y, ... of all polygons, which end before ``ends``, one after another.
        parts: (n,) polygons of each object, at least one.
        sizes: (n, 2) height and width of the image of each.
    """
    problems = coordinate_problems(values, ends, parts, sizes) if len(parts) else {}
    polygons = [values[a:b] for a, b in zip(np.insert(ends[:-1], 0, 0).tolist(), ends.tolist())]
    last = np.cumsum(parts)
    strings = [
        b"" if i in problems else _union(polygons[a:b], h, w)
        for i, (a, b, (h, w)) in enumerate(zip((last - parts).tolist(), last.tolist(), sizes.tolist()))
    ]
    return strings, problems


def by_problem(problems: Mapping[int, str], n: int) -> Iterator[tuple[str, np.ndarray]]:
    """Each of ``problems``, by row, once, with the rows that have it as (n,) bool."""
    for what in dict.fromkeys(problems.values()):
        rows = np.zeros(n, bool)
        rows[[i for i, problem in problems.items() if problem == what]] = True
        yield what, rows


def _union(polygons: list, height: int, width: int) -> bytes:
    import pycocotools.mask as mask_utils

    parts = mask_utils.frPyObjects(polygons, height, width)
    return (parts[0] if len(parts) == 1 else mask_utils.merge(parts))["counts"]
