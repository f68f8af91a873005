"""Detection results of a json text as columns."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["ResultColumns", "scan_results"]

IMAGE, CATEGORY, SCORE, BOX, MASK = 1, 2, 4, 8, 16  # fields of a result, as bits
UNCERTAIN = 32  # a number of it is left to a library


@dataclass
class ResultColumns:
    """n results as they stand in the text.

    Attributes:
        image, category: (n,) int64. score: (n,) float64, NaN where missing. boxes: (n, 4) float64.
        fields: (n,) uint8, bits of what is there, and ``UNCERTAIN``.
        masks: (B,) uint8, the strings of compressed run lengths one after another. end: (n,) int64, where each ends in
            it. size: (n, 2) int64, height and width.
    """

    image: np.ndarray
    category: np.ndarray
    score: np.ndarray
    boxes: np.ndarray
    fields: np.ndarray
    end: np.ndarray
    size: np.ndarray
    masks: np.ndarray
    _text: bytes
    _span: np.ndarray

    def element(self, i: int) -> dict[str, Any]:
        """Result i by the library."""
        begin, end = self._span[i].tolist()
        return json.loads(self._text[begin:end])


def scan_results(text: bytes) -> ResultColumns | None:
    """The results of a json array; None for an unusual text, which a library has to read."""
    from . import result_kernels as kernels
    from .json_kernels import PADDING

    padded = np.frombuffer(text + bytes(PADDING), np.uint8)
    most = len(text) // 20 + 1  # a shorter result is unusual
    ids, score, boxes = np.empty((2, most), np.int64), np.empty(most), np.empty((most, 4))
    fields, end = np.empty(most, np.uint8), np.empty(most, np.int64)
    size, span = np.empty((most, 2), np.int64), np.empty((most, 2), np.int64)
    masks = np.empty(len(text), np.uint8)
    n, written = kernels.scan_results(padded, ids[0], ids[1], score, boxes, fields, end, size, masks, span)
    if n < 0:
        return None
    image, category = ids[:, :n].copy()
    score, boxes, fields, end, size, span = (c[:n].copy() for c in (score, boxes, fields, end, size, span))
    return ResultColumns(image, category, score, boxes, fields, end, size, masks[:written].copy(), text, span)
