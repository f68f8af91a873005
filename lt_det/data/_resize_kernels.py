"""Bilinear enlarging of images, compiled. numba is imported here, so import this lazily."""

import numpy as np
from numba import njit

_BITS = 22  # of a weight's fraction, as in Pillow's Resample.c


@njit(cache=True, nogil=True)
def enlarge(pixels, columns, column_weights, rows, row_weights, reverse, out):
    """Resize ``pixels (H, W, 3)`` to ``out (3, h, w)``, both uint8: first along x, rounded to uint8, then along y.

    ``columns (2, w)`` int64 and ``column_weights (2, w)`` int32 are the two neighbours of each column and their weights
    in units of 2^-22; ``rows``, ``row_weights`` likewise. ``reverse``: the planes of ``out`` in reverse order.
    """
    half = np.int32(1 << (_BITS - 1))
    height, width = pixels.shape[0], out.shape[2]
    between = np.empty((height, width), np.uint8)
    for c in range(3):
        for y in range(height):
            for x in range(width):
                a = np.int32(pixels[y, columns[0, x], c]) * column_weights[0, x]
                b = np.int32(pixels[y, columns[1, x], c]) * column_weights[1, x]
                between[y, x] = np.uint8((half + a + b) >> _BITS)
        plane = out[2 - c if reverse else c]
        for y in range(out.shape[1]):
            above, below = between[rows[0, y]], between[rows[1, y]]
            weight_above, weight_below = row_weights[0, y], row_weights[1, y]
            for x in range(width):
                a = np.int32(above[x]) * weight_above
                b = np.int32(below[x]) * weight_below
                plane[y, x] = np.uint8((half + a + b) >> _BITS)
