"""Binary masks to LVIS polygons and back."""

import cv2
import numpy as np
import pycocotools.mask as mask_util


def mask_to_polygons(mask: np.ndarray) -> list[list[float]]:
    """
    Polygons [x0, y0, x1, y1, ...] along pixel edges, which pycocotools rasterises to exactly `mask`, `(H, W)` uint8 of
    0 and 1. LVIS polygons cannot have holes: a mask with a hole is cut in two through the hole.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if len(rows) == 0:
        return []
    top, left = rows[0], columns[0]
    outlines = _edge_polygons(mask[top : rows[-1] + 1, left : columns[-1] + 1])
    # Floats, though whole: Detectron2 scales polygons in the type they come in, and would truncate integers.
    return [(outline + (left, top)).astype(float).ravel().tolist() for outline in outlines]


def polygons_to_rle(polygons: list[list[float]], height: int, width: int) -> dict:
    return mask_util.merge(mask_util.frPyObjects(polygons, height, width))


def polygons_to_mask(polygons: list[list[float]], height: int, width: int) -> np.ndarray:
    """`(height, width)` uint8, as pycocotools (and so the LVIS API) rasterises the union of polygons."""
    return mask_util.decode(polygons_to_rle(polygons, height, width))


def _edge_polygons(mask: np.ndarray) -> list[np.ndarray]:
    """Outlines along pixel edges, integers `(N, 2)` each."""
    # On the doubled grid each pixel has four cells, one a corner, and cell (x, y) belongs to the pixel corner
    # ((x + 1) // 2, (y + 1) // 2). So a contour through cells is a contour along pixel edges.
    doubled = np.repeat(np.repeat(mask, 2, axis=0), 2, axis=1)
    contours, hierarchy = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    for contour, (_, _, _, parent) in zip(contours, hierarchy[0] if contours else ()):
        if parent >= 0:
            column = int(contour[:, 0, 0].min() + contour[:, 0, 0].max() + 2) // 4
            column = min(max(column, 1), mask.shape[1] - 1)
            left, right = mask.copy(), mask.copy()
            left[:, column:] = 0
            right[:, :column] = 0
            return _edge_polygons(left) + _edge_polygons(right)
    return [_drop_collinear((contour[:, 0] + 1) // 2) for contour in contours]


def _drop_collinear(points: np.ndarray) -> np.ndarray:
    points = points[np.any(points != np.roll(points, 1, axis=0), axis=1)]
    before, after = points - np.roll(points, 1, axis=0), np.roll(points, -1, axis=0) - points
    return points[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]]
