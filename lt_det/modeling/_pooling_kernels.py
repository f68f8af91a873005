"""RoIAlign, compiled. numba is imported here, so import this lazily."""

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def _neighbours(at, length):
    """Of a point along one axis: the two cells beside it and their weights; outside of the map the weights are 0."""
    real = type(at)
    if at < -1 or at > length:
        return 0, 0, real(0), real(0)
    at = max(at, real(0))
    low = int(at)
    if low >= length - 1:
        return length - 1, length - 1, real(1), real(0)
    fraction = at - real(low)
    return low, low + 1, real(1) - fraction, fraction


@njit(cache=True, nogil=True)
def _grid(roi, scale, ratio, shift, smallest, rows, columns):
    """Of a RoI: its top and left side on the map, the sides of a cell, and the points along these."""
    left, top = roi[1] * scale - shift, roi[2] * scale - shift
    across = max(roi[3] * scale - shift - left, smallest)
    down = max(roi[4] * scale - shift - top, smallest)
    real = type(scale)
    cell_height, cell_width = down / real(rows), across / real(columns)
    points_down = ratio if ratio > 0 else int(np.ceil(cell_height))
    points_across = ratio if ratio > 0 else int(np.ceil(cell_width))
    return top, left, cell_height, cell_width, points_down, points_across


@njit(cache=True, nogil=True)
def _point(start, cell, side, i, points):
    """Where the ``i``-th point of a cell lies along one axis."""
    real = type(start)
    return start + real(cell) * side + (real(i) + real(0.5)) * side / real(points)


@njit(cache=True, nogil=True)
def roi_align(maps, rois, scale, ratio, shift, smallest, out):
    """``torchvision.ops.roi_align`` of ``maps (B, H, W, C)`` and ``rois (R, 5)`` to ``out (R, C, h, w)``, all of one
    real type.

    Each sum has its terms in the order of torchvision's, so its rounding; but a point's channels are read together.

    ``ratio``: points along a side of a cell, 0: as many as the cell has pixels. ``shift``: 0.5 where RoIs are aligned,
    else 0; ``smallest``: the smallest side of a RoI in pixels of the map, where it has one.
    """
    height, width, channels = maps.shape[1:]
    rows, columns = out.shape[2:]
    real = maps.dtype.type
    sums = np.empty((rows * columns, channels), maps.dtype)
    for r in range(len(rois)):
        image = maps[int(rois[r, 0])]
        grid = _grid(rois[r], scale, ratio, shift, smallest, rows, columns)
        top, left, cell_height, cell_width, points_down, points_across = grid
        count = real(max(points_down * points_across, 1))
        for row in range(rows):
            for column in range(columns):
                total = sums[row * columns + column]
                total[:] = real(0)
                for i in range(points_down):
                    y = _point(top, row, cell_height, i, points_down)
                    above, below, weight_above, weight_below = _neighbours(y, height)
                    for j in range(points_across):
                        x = _point(left, column, cell_width, j, points_across)
                        before, after, weight_before, weight_after = _neighbours(x, width)
                        a, b = image[above, before], image[above, after]
                        c, d = image[below, before], image[below, after]
                        wa, wb = weight_above * weight_before, weight_above * weight_after
                        wc, wd = weight_below * weight_before, weight_below * weight_after
                        for k in range(channels):
                            total[k] += wa * a[k] + wb * b[k] + wc * c[k] + wd * d[k]
                for k in range(channels):
                    total[k] /= count
        flat = out[r].reshape(channels, rows * columns)
        for k in range(channels):
            for cell in range(rows * columns):
                flat[k, cell] = sums[cell, k]


@njit(cache=True, nogil=True)
def roi_align_backward(grads, rois, scale, ratio, shift, smallest, out):
    """Add to ``out (B, H, W, C)`` the gradient of :func:`roi_align`'s maps, of ``grads (R, C, h, w)``; terms and their
    order as torchvision's."""
    height, width, channels = out.shape[1:]
    rows, columns = grads.shape[2:]
    real = out.dtype.type
    by_cell = np.empty((rows * columns, channels), out.dtype)
    for r in range(len(rois)):
        image = out[int(rois[r, 0])]
        flat = grads[r].reshape(channels, rows * columns)
        for k in range(channels):
            for cell in range(rows * columns):
                by_cell[cell, k] = flat[k, cell]
        grid = _grid(rois[r], scale, ratio, shift, smallest, rows, columns)
        top, left, cell_height, cell_width, points_down, points_across = grid
        count = real(points_down * points_across)
        for row in range(rows):
            for column in range(columns):
                grad = by_cell[row * columns + column]
                for i in range(points_down):
                    y = _point(top, row, cell_height, i, points_down)
                    above, below, weight_above, weight_below = _neighbours(y, height)
                    if weight_above + weight_below == real(0):
                        continue  # outside of the map
                    for j in range(points_across):
                        x = _point(left, column, cell_width, j, points_across)
                        before, after, weight_before, weight_after = _neighbours(x, width)
                        if weight_before + weight_after == real(0):
                            continue
                        _add(image[above, before], grad, weight_above * weight_before, count)
                        _add(image[above, after], grad, weight_above * weight_after, count)
                        _add(image[below, before], grad, weight_below * weight_before, count)
                        _add(image[below, after], grad, weight_below * weight_after, count)


@njit(cache=True, nogil=True)
def _add(to, grad, weight, count):
    for k in range(len(grad)):
        to[k] += grad[k] * weight / count
