"""How evenly the objects of a class are spread over the image plane."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

__all__ = ["fractal_dimensions"]


def fractal_dimensions(centers: Any, classes: Any, num_classes: int, max_grid: int = 64) -> np.ndarray:
    """Box-counting dimension of each class's box centres: 2 if they fill the image, 1 or less if they lie on a line.

    The image is cut into g x g cells for g = 1, 2, ... up to ``max_grid`` and to the square root of n_c, the class's
    number of objects (finer grids must leave cells empty). The dimension is the slope of the least-squares line of
    log(cells with a centre in them) on log(g), at least 1, and 1 for classes with fewer than 4 objects.

    Source: Alexandridis et al., Fractal Calibration for Long-tailed Object Detection, CVPR 2025, section 3.3.

    Args:
        centers: ``(N, 2)`` box centres (x, y) divided by the image's width and height, in [0, 1).
        classes: ``(N,)`` class indices in [0, num_classes).
        num_classes: K.
        max_grid: the finest grid.

    Returns:
        ``(K,)`` float64.

    Raises:
        ValueError: shapes that disagree, centres outside [0, 1), or classes outside [0, num_classes).
    """
    centers = np.asarray(centers, dtype=np.float64)
    classes = np.asarray(classes)
    if centers.size == 0 and classes.size == 0:
        return np.ones(num_classes)
    if centers.ndim != 2 or centers.shape[1] != 2 or classes.shape != centers.shape[:1]:
        raise ValueError(f"centers must be (N, 2) and classes (N,), got {centers.shape} and {classes.shape}.")
    if classes.dtype.kind not in "iu" or classes.min() < 0 or classes.max() >= num_classes:
        raise ValueError(f"classes must be integers in [0, {num_classes}).")
    if not ((centers >= 0) & (centers < 1)).all():
        raise ValueError("centers must lie in [0, 1): divide them by the image's width and height.")
    if max_grid < 1:
        raise ValueError(f"max_grid must be at least 1, got {max_grid}.")

    # Frequent classes first: those that a grid is fine enough for are then the first ones, at any g.
    count = np.bincount(classes, minlength=num_classes)
    by_count = np.argsort(-count, kind="stable")
    rank = np.empty(num_classes, dtype=np.int64)
    rank[by_count] = np.arange(num_classes)
    order = np.argsort(rank[classes], kind="stable")
    rank_of, x, y = rank[classes][order], centers[order, 0], centers[order, 1]
    objects_before = np.concatenate(([0], np.cumsum(count[by_count])))
    descending = -count[by_count]

    grids = np.arange(1, max_grid + 1)
    log_cells = np.zeros((num_classes, max_grid))  # rows in the order of `by_count`
    for first, end in _groups(objects_before):
        objects = slice(objects_before[first], objects_before[end])
        rank_here, x_here, y_here = rank_of[objects] - first, x[objects], y[objects]
        for g in grids[grids**2 <= -descending[first]]:
            fine = int(np.searchsorted(descending[first:end], -(g * g), side="right"))  # classes
            n = objects_before[first + fine] - objects_before[first]
            cell = rank_here[:n] * (g * g) + (y_here[:n] * g).astype(np.int64) * g + (x_here[:n] * g).astype(np.int64)
            # No more bytes than objects: each class has g * g or more.
            occupied = np.zeros(fine * g * g, dtype=bool)
            occupied[cell] = True
            log_cells[first : first + fine, g - 1] = np.log(occupied.reshape(fine, -1).sum(1))

    used = grids**2 <= count[by_count][:, None]
    number = used.sum(1, keepdims=True).clip(1)
    log_grid = np.where(used, np.log(grids), 0.0)
    deviation = np.where(used, log_grid - log_grid.sum(1, keepdims=True) / number, 0.0)
    variance = (deviation**2).sum(1)
    slope = np.divide((deviation * log_cells).sum(1), variance, out=np.ones(num_classes), where=variance > 0)
    result = np.ones(num_classes)
    result[by_count] = np.maximum(slope, 1.0)
    return result


def _groups(before: np.ndarray, at_most: int = 1 << 15) -> Iterator[tuple[int, int]]:
    """Neighbouring classes (first, end) with so many objects in all as a processor's cache holds, or one with more."""
    first = 0
    while first < len(before) - 1:
        end = max(first + 1, int(np.searchsorted(before, before[first] + at_most, side="right")) - 1)
        yield first, end
        first = end
