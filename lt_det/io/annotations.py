"""Annotations of an LVIS or COCO json as columns, a block of the file at a time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["AnnotationBlock", "scan_annotations"]

NONE, FLOATS, INTEGERS, OTHER = 0, 1, 2, 255  # what the segmentation of an object is
ID, IMAGE, CATEGORY, BOX, AREA, CROWD, IGNORE, SEGMENTATION = 1, 2, 4, 8, 16, 32, 64, 128  # fields, as bits
ODD = 256  # a field is not as usual, or there are key points

# Below, loading the compiled code takes longer than a library takes for the text.
_SCANNED_FROM_BYTES = 1 << 20


@dataclass
class AnnotationBlock:
    """n annotations as they stand in the text.

    Attributes:
        identifier, image, category, crowd, ignore: (n,) int64; -1 for ``iscrowd`` and 0 for ``ignore`` that is absent.
        area: (n,) float64. box: (n, 4) float64. box_integer: (n,) uint8, bit k: number k is an integer.
        reach: (n,) float64, the largest absolute coordinate of the polygons in ``values``.
        fields: (n,) uint16, bits of what is there: ``ID``, ``IMAGE`` ... and ``ODD``.
        kind: (n,) uint8, ``NONE``, ``FLOATS``, ``INTEGERS`` or ``OTHER``: no mask, polygons of three points or more
            with such coordinates, something else.
        parts: (n,) int32, polygons of each. part_end: (P,) int64, where each polygon ends in ``values``.
        values: (V,) float64, coordinates of all polygons.
    """

    identifier: np.ndarray
    image: np.ndarray
    category: np.ndarray
    crowd: np.ndarray
    ignore: np.ndarray
    area: np.ndarray
    reach: np.ndarray
    box: np.ndarray
    box_integer: np.ndarray
    fields: np.ndarray
    kind: np.ndarray
    parts: np.ndarray
    part_end: np.ndarray
    values: np.ndarray
    _text: bytes
    _span: np.ndarray

    def __len__(self) -> int:
        return len(self.fields)

    def element(self, i: int) -> dict[str, Any]:
        """Annotation i by the library."""
        begin, end = self._span[i].tolist()
        return json.loads(self._text[begin:end])

    def segmentation(self, i: int) -> Any:
        """The segmentation of annotation i by the library; None if it has none."""
        return None if self.kind[i] == NONE else self.element(i).get("segmentation")


def scan_annotations(text: bytes) -> AnnotationBlock | None:
    """The annotations of a json array; None for what a library has to read: a short text, or an unusual one."""
    if len(text) < _SCANNED_FROM_BYTES:
        return None
    from . import annotation_kernels as kernels
    from .json_kernels import PADDING

    padded = np.frombuffer(text + bytes(PADDING), np.uint8)
    most = len(text) // 16 + 1  # what is not written takes no memory
    numbers, area, reach, box = np.empty((5, most), np.int64), np.empty(most), np.empty(most), np.empty((most, 4))
    box_integer, fields, kind = np.empty(most, np.uint8), np.empty(most, np.uint16), np.empty(most, np.uint8)
    parts, span = np.empty(most, np.int32), np.empty((most, 2), np.int64)
    part_end, values = np.empty(len(text) // 2 + 1, np.int64), np.empty(len(text) // 2 + 1)
    n, num_parts, num_values = kernels.scan_annotations(
        padded, numbers, area, reach, box, box_integer, fields, kind, parts, span, part_end, values
    )
    if n < 0:
        return None
    identifier, image, category, crowd, ignore = numbers[:, :n].copy()
    area, reach, box, box_integer, fields, kind, parts, span = (
        column[:n].copy() for column in (area, reach, box, box_integer, fields, kind, parts, span)
    )
    part_end, values = part_end[:num_parts].copy(), values[:num_values].copy()
    return AnnotationBlock(
        identifier, image, category, crowd, ignore, area, reach, box, box_integer, fields, kind, parts, part_end,
        values, text, span,
    )  # fmt: skip
