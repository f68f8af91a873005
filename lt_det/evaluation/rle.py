"""Tables of run-length encoded masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["RleTable", "encode_segmentations"]


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
    def empty(cls) -> RleTable:
        return cls(np.zeros(0, np.uint8), np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 2), np.int64))

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
            return cls.empty()
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
        text = self.text.tobytes()
        return [text[a:b] for a, b in zip(self.begin.tolist(), self.end.tolist())]


def encode_segmentations(segmentations: Sequence[Any], sizes: np.ndarray) -> RleTable:
    """Encodes COCO ``segmentation`` values: polygons, uncompressed or compressed run lengths.

    Args:
        segmentations: n values of a json's ``segmentation`` field.
        sizes: (n, 2) height and width of the image of each.

    Raises:
        ValueError: a value has none of these forms.
    """
    import pycocotools.mask as mask_utils

    strings: list[bytes] = []
    stated = np.array(sizes, np.int64).reshape(-1, 2)
    for i, segmentation in enumerate(segmentations):
        h, w = int(stated[i, 0]), int(stated[i, 1])
        if isinstance(segmentation, list):
            parts = mask_utils.frPyObjects(segmentation, h, w) if segmentation else []
            if not segmentation:
                raise ValueError("a 'segmentation' is an empty list; a mask is one polygon or more, or run lengths.")
            rle = parts[0] if len(parts) == 1 else mask_utils.merge(parts)
        elif isinstance(segmentation, dict) and isinstance(segmentation.get("counts"), list):
            rle = mask_utils.frPyObjects(segmentation, h, w)
        elif isinstance(segmentation, dict) and isinstance(segmentation.get("counts"), (str, bytes)):
            rle = segmentation
            stated[i] = segmentation.get("size", (h, w))
        else:
            raise ValueError(
                f"a 'segmentation' is {type(segmentation).__name__}; expected polygons or run lengths "
                "{'size': [height, width], 'counts': ...}."
            )
        counts = rle["counts"]
        strings.append(counts.encode("ascii") if isinstance(counts, str) else counts)
    return RleTable.from_strings(strings, stated)
