"""Compiled loops on run-length encoded masks.

A mask is its COCO run lengths: ``counts`` (uint32) of alternating zeros and ones over the pixels in column-major order,
the first count being zeros. Many masks lie one after another in a flat array, mask ``i`` in
``counts[start[i]:start[i + 1]]``. numba is imported by this module, so import it lazily.

All kernels release the GIL.
"""

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def _append(buffer, size, value):
    """``buffer`` with ``value`` at ``size``, grown when full."""
    if size == buffer.shape[0]:
        grown = np.empty(2 * size + 16, buffer.dtype)
        for i in range(size):  # a loop compiles far faster than a slice assignment
            grown[i] = buffer[i]
        buffer = grown
    buffer[size] = value
    return buffer


@njit(cache=True, nogil=True)
def decode_strings(text, begin, end):
    """COCO's compressed strings (a base-32 code with deltas to the count before the last) to counts.

    A string that stops in the middle of a number, or holds a negative count, gives the single count 2**32 - 1, which no
    image has, so that the size check of the caller reports it.
    """
    n = begin.shape[0]
    start = np.zeros(n + 1, np.int64)
    total = 0
    for i in range(n):
        total += end[i] - begin[i]
    counts = np.empty(total, np.uint32)
    size = 0
    for i in range(n):
        first = size
        p = begin[i]
        ok = True
        while p < end[i]:
            x = np.int64(0)
            shift = 0
            more = True
            while more:
                if p >= end[i] or shift > 35:
                    ok = False
                    break
                c = np.int64(text[p]) - 48
                p += 1
                x |= (c & 0x1F) << shift
                shift += 5
                more = (c & 0x20) != 0
                if not more and (c & 0x10):
                    x |= np.int64(-1) << shift
            if not ok:
                break
            if size - first > 2:
                x += np.int64(counts[size - 2])
            if x < 0 or x > 0xFFFFFFFF:
                ok = False
                break
            counts[size] = np.uint32(x)
            size += 1
        if not ok:
            size = first
            counts[size] = np.uint32(0xFFFFFFFF)
            size += 1
        start[i + 1] = size
    return counts[:size].copy(), start


@njit(cache=True, nogil=True)
def measure_strings(text, begin, end):
    """Areas, and numbers of pixels covered, of compressed strings, each (n,), without keeping the counts.

    A string that :func:`decode_strings` calls broken covers -1 pixels.
    """
    # The numbers are read as in decode_strings, written out again: a shared decoder of one number made both loops
    # 1.5 to 2.8 times as slow.
    n = begin.shape[0]
    area = np.zeros(n, np.int64)
    total = np.zeros(n, np.int64)
    for i in range(n):
        p = begin[i]
        place = 0
        last, before = np.int64(0), np.int64(0)
        while p < end[i]:
            x = np.int64(0)
            shift = 0
            more = True
            while more:
                if p >= end[i] or shift > 35:
                    break
                c = np.int64(text[p]) - 48
                p += 1
                x |= (c & 0x1F) << shift
                shift += 5
                more = (c & 0x20) != 0
                if not more and (c & 0x10):
                    x |= np.int64(-1) << shift
            if place > 2:
                x += before
            if more or x < 0 or x > 0xFFFFFFFF:
                total[i] = -1
                break
            total[i] += x
            if place & 1:
                area[i] += x
            before = last
            last = x
            place += 1
    return area, total


@njit(cache=True, nogil=True)
def encode_strings(counts, start):
    """Counts to COCO's compressed strings: bytes (uint8) and offsets (n + 1)."""
    n = start.shape[0] - 1
    offset = np.zeros(n + 1, np.int64)
    text = np.empty(3 * counts.shape[0] + 16, np.uint8)
    size = 0
    for i in range(n):
        for j in range(start[i], start[i + 1]):
            x = np.int64(counts[j])
            if j - start[i] > 2:
                x -= np.int64(counts[j - 2])
            more = True
            while more:
                c = x & 0x1F
                x >>= 5
                more = x != -1 if c & 0x10 else x != 0
                if more:
                    c |= 0x20
                text = _append(text, size, np.uint8(c + 48))
                size += 1
        offset[i + 1] = size
    return text[:size].copy(), offset


@njit(cache=True, nogil=True)
def areas(counts, start):
    """Number of ones in each mask (n,)."""
    n = start.shape[0] - 1
    out = np.zeros(n, np.int64)
    for i in range(n):
        for j in range(start[i] + 1, start[i + 1], 2):
            out[i] += np.int64(counts[j])
    return out


@njit(cache=True, nogil=True)
def bounding_boxes(counts, start, height):
    """Tight boxes (n, 4) as x, y, width, height in pixels; zeros for an empty mask. height (n,)."""
    n = start.shape[0] - 1
    out = np.zeros((n, 4), np.int64)
    for i in range(n):
        h = np.int64(height[i])
        x_min, y_min, x_max, y_max = np.int64(1) << 40, h, np.int64(-1), np.int64(-1)
        position = np.int64(0)
        for j in range(start[i], start[i + 1]):
            length = np.int64(counts[j])
            if (j - start[i]) % 2 == 1 and length > 0:
                last = position + length - 1
                xa, xb = position // h, last // h
                ya, yb = position - xa * h, last - xb * h
                if xa < x_min:
                    x_min = xa
                if xb > x_max:
                    x_max = xb
                if xb > xa:  # the run crosses a column border, where it fills the rows to the edge
                    y_min = 0
                    y_max = h - 1
                else:
                    if ya < y_min:
                        y_min = ya
                    if yb > y_max:
                        y_max = yb
            position += length
        if x_max >= 0:
            out[i, 0] = x_min
            out[i, 1] = y_min
            out[i, 2] = x_max - x_min + 1
            out[i, 3] = y_max - y_min + 1
    return out


@njit(cache=True, nogil=True)
def _intersection(a, i, a_end, b, j, b_end):
    """Number of pixels that are one in both of the masks a[i:a_end] and b[j:b_end]."""
    left_a = np.int64(a[i]) if i < a_end else np.int64(0)
    left_b = np.int64(b[j]) if j < b_end else np.int64(0)
    a_begin, b_begin = i, j
    out = np.int64(0)
    while i < a_end and j < b_end:
        step = left_a if left_a < left_b else left_b
        if (i - a_begin) & 1 and (j - b_begin) & 1:
            out += step
        left_a -= step
        left_b -= step
        if left_a == 0:
            i += 1
            if i < a_end:
                left_a = np.int64(a[i])
        if left_b == 0:
            j += 1
            if j < b_end:
                left_b = np.int64(b[j])
    return out


@njit(cache=True, nogil=True)
def cell_mask_ious(
    cell_det, cell_gt, cell_num_gt, cell_iou, counts, start, area, box,
    gt_counts, gt_start, gt_area, gt_box, gt_crowd, ious,
):  # fmt: skip
    """Mask IoU of every detection with every annotation of its cell, into the flat ``ious``.

    Cell ``c`` has detections ``cell_det[c]:cell_det[c + 1]`` and annotations ``cell_gt[c] + (0 .. G - 1)``, G =
    ``cell_num_gt[c]``; its (D, G) matrix starts at ``ious[cell_iou[c]]``. ``area`` and ``box`` are those of
    :func:`areas` and :func:`bounding_boxes`. With a crowd annotation the union is the detection (COCO's rule).
    """
    for c in range(cell_num_gt.shape[0]):
        num_gt = cell_num_gt[c]
        p = cell_iou[c]
        for d in range(cell_det[c], cell_det[c + 1]):
            x0, y0 = box[d, 0], box[d, 1]
            x1, y1 = x0 + box[d, 2], y0 + box[d, 3]
            for g in range(cell_gt[c], cell_gt[c] + num_gt):
                value = 0.0
                gx, gy = gt_box[g, 0], gt_box[g, 1]
                if x0 < gx + gt_box[g, 2] and gx < x1 and y0 < gy + gt_box[g, 3] and gy < y1:
                    overlap = _intersection(counts, start[d], start[d + 1], gt_counts, gt_start[g], gt_start[g + 1])
                    if overlap > 0:
                        union = area[d] if gt_crowd[g] else area[d] + gt_area[g] - overlap
                        value = overlap / union
                ious[p] = value
                p += 1


@njit(cache=True, nogil=True)
def _close(buffer, size, first, position, end):
    """Ends a mask: drops what follows its last one and adds the zeros up to ``end``."""
    if position < end or size == first:
        buffer = _append(buffer, size, np.uint32(end - position))
        size += 1
    return buffer, size


@njit(cache=True, nogil=True)
def _add_run(buffer, size, first, position, begin, end):
    """Adds the ones ``begin:end`` behind ``position``, joined to a run that ends at ``begin``."""
    if begin == position and size > first:
        buffer[size - 1] += np.uint32(end - begin)
    else:
        buffer = _append(buffer, size, np.uint32(begin - position))
        buffer = _append(buffer, size + 1, np.uint32(end - begin))
        size += 2
    return buffer, size


@njit(cache=True, nogil=True)
def encode_bitmaps(masks):
    """Binary masks (n, H, W), any non-zero value being one, to counts and offsets."""
    n, height, width = masks.shape
    start = np.zeros(n + 1, np.int64)
    buffer = np.empty(64 * n + 16, np.uint32)
    size = 0
    inside = np.empty(width, np.bool_)
    for i in range(n):
        # A first pass in memory order finds the box, so that the slow column-wise pass sees little.
        y_min, y_max = height, -1
        for x in range(width):
            inside[x] = False
        for y in range(height):
            found = False
            for x in range(width):
                if masks[i, y, x]:
                    inside[x] = True
                    found = True
            if found:
                if y < y_min:
                    y_min = y
                y_max = y
        first = size
        position = np.int64(0)
        for x in range(width):
            if not inside[x]:
                continue
            y = y_min
            while y <= y_max:
                while y <= y_max and not masks[i, y, x]:
                    y += 1
                begin = y
                while y <= y_max and masks[i, y, x]:
                    y += 1
                if y > begin:
                    buffer, size = _add_run(buffer, size, first, position, x * height + begin, x * height + y)
                    position = np.int64(x * height + y)
        buffer, size = _close(buffer, size, first, position, height * width)
        start[i + 1] = size
    return buffer[:size].copy(), start


@njit(cache=True, nogil=True)
def paste_and_encode(masks, boxes, height, width, threshold):
    """Pastes soft masks into their boxes and encodes what is at least ``threshold``.

    Args:
        masks: (n, M, M) float32 probabilities, one value a cell of the box.
        boxes: (n, 4) float32 x0, y0, x1, y1 in pixels of the output image.
        height, width: of the output image.

    The value of a pixel is the bilinear interpolation of the mask at the pixel's centre, zero outside of the mask: what
    ``detectron2.layers.paste_masks_in_image`` computes through ``grid_sample``, without an image.
    """
    n, rows, cols = masks.shape
    start = np.zeros(n + 1, np.int64)
    buffer = np.empty(64 * n + 16, np.uint32)
    size = 0
    one, half, two = np.float32(1), np.float32(0.5), np.float32(2)
    limit = np.float32(threshold)
    low = np.empty(height, np.int64)
    weight = np.empty(height, np.float32)
    column = np.zeros(rows + 2, np.float32)  # a row of zeros above and below the mask
    for i in range(n):
        x0, y0, x1, y1 = boxes[i, 0], boxes[i, 1], boxes[i, 2], boxes[i, 3]
        first = size
        position = np.int64(0)
        x_begin = max(0, int(np.floor(x0)) - 1)
        x_end = min(width, int(np.ceil(x1)) + 1)
        y_begin = max(0, int(np.floor(y0)) - 1)
        y_end = min(height, int(np.ceil(y1)) + 1)
        if x1 > x0 and y1 > y0:
            for y in range(y_begin, y_end):
                g = (np.float32(y) + half - y0) / (y1 - y0) * two - one
                g = ((g + one) * np.float32(rows) - one) / two
                f = np.floor(g)
                low[y] = min(max(int(f), -2), rows)
                weight[y] = g - f
            for x in range(x_begin, x_end):
                g = (np.float32(x) + half - x0) / (x1 - x0) * two - one
                g = ((g + one) * np.float32(cols) - one) / two
                f = np.floor(g)
                left = int(f)
                w = g - f
                if left < -1 or left >= cols:
                    continue
                for r in range(rows):
                    value = np.float32(0)
                    if left >= 0:
                        value += masks[i, r, left] * (one - w)
                    if left + 1 < cols:
                        value += masks[i, r, left + 1] * w
                    column[r + 1] = value
                begin = -1
                for y in range(y_begin, y_end):
                    t = low[y]
                    on = False
                    if -1 <= t < rows:
                        on = column[t + 1] * (one - weight[y]) + column[t + 2] * weight[y] >= limit
                    if on:
                        if begin < 0:
                            begin = y
                    elif begin >= 0:
                        buffer, size = _add_run(buffer, size, first, position, x * height + begin, x * height + y)
                        position = np.int64(x * height + y)
                        begin = -1
                if begin >= 0:
                    buffer, size = _add_run(buffer, size, first, position, x * height + begin, x * height + y_end)
                    position = np.int64(x * height + y_end)
        buffer, size = _close(buffer, size, first, position, height * width)
        start[i + 1] = size
    return buffer[:size].copy(), start


@njit(cache=True, nogil=True)
def boundaries(counts, start, box, height, width, distance):
    """The part of each mask within ``distance`` pixels (Chebyshev) of a zero or of the image's outside.

    This is mask - erosion(mask, (2 distance + 1) square) with zeros around the image, the boundary region of Cheng et
    al., Boundary IoU, CVPR 2021, sec. 4. ``box`` is that of :func:`bounding_boxes`; height, width and distance are (n,)
    int64.
    """
    n = start.shape[0] - 1
    out_start = np.zeros(n + 1, np.int64)
    buffer = np.empty(2 * counts.shape[0] + 16, np.uint32)
    size = 0
    for i in range(n):
        h, w, d = height[i], width[i], distance[i]
        first = size
        position = np.int64(0)
        x0, y0, bw, bh = box[i, 0], box[i, 1], box[i, 2], box[i, 3]
        if bw > 0:
            image = np.zeros((bw, bh), np.uint8)  # transposed: a column is contiguous
            p = np.int64(0)
            for j in range(start[i], start[i + 1]):
                length = np.int64(counts[j])
                if (j - start[i]) % 2 == 1:
                    q = p
                    while q < p + length:
                        x = q // h
                        stop = min((x + 1) * h, p + length)
                        for y in range(q - x * h - y0, stop - x * h - y0):
                            image[x - x0, y] = 1
                        q = stop
                p += length
            # last_zero[y]: the latest column whose vertical neighbourhood of (x, y) holds a zero.
            # A pixel (x, y) survives the erosion when no column in x - d .. x + d is such.
            last_zero = np.full(bh, np.int64(-1))
            interior = np.zeros((bw, bh), np.uint8)
            for x in range(bw):
                run = 0
                for y in range(bh + 1):
                    if y < bh and image[x, y]:
                        run += 1
                        continue
                    # the run y - run .. y - 1 ends; d pixels at each of its ends see a zero
                    for k in range(max(0, y - run), min(bh, y + 1)):
                        if k < y - run + d or k >= y - d:
                            last_zero[k] = x
                    run = 0
                centre = x - d
                if centre >= d:
                    for y in range(bh):
                        if last_zero[y] < centre - d:
                            interior[centre, y] = 1
            for x in range(bw):
                begin = -1
                for y in range(bh + 1):
                    on = y < bh and image[x, y] and not interior[x, y]
                    if on:
                        if begin < 0:
                            begin = y
                    elif begin >= 0:
                        offset = (x + x0) * h + y0
                        buffer, size = _add_run(buffer, size, first, position, offset + begin, offset + y)
                        position = offset + y
                        begin = -1
        buffer, size = _close(buffer, size, first, position, h * w)
        out_start[i + 1] = size
    return buffer[:size].copy(), out_start
