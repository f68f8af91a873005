"""Compiled loops of matching and of average precision. numba is imported here, so import this lazily.

Terms: a *cell* is one (image, category) pair. Match flags of a detection are two 40-bit integers, bit
``area_range * 10 + threshold``: ``tp`` (counts as a true positive) and ``ignored`` (counts as nothing); a detection
with neither bit is a false positive.
"""

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def find_cells(image, category, cell_start, cell_category, num_categories):
    """Index of the ground-truth cell of each detection, -1 where there is none.

    ``image``, ``category`` (n,) int32 ranks, -1 where unknown; ``cell_start`` (I + 1,) and ``cell_category`` (C,) list
    the cells image by image.
    """
    n = image.shape[0]
    out = np.empty(n, np.int32)
    table = np.full(num_categories, np.int32(-1))
    current = -1
    for i in range(n):
        if image[i] < 0 or category[i] < 0:
            out[i] = -1
            continue
        if image[i] != current:
            if current >= 0:
                for c in range(cell_start[current], cell_start[current + 1]):
                    table[cell_category[c]] = -1
            current = image[i]
            for c in range(cell_start[current], cell_start[current + 1]):
                table[cell_category[c]] = c
        out[i] = table[category[i]]
    return out


@njit(cache=True, nogil=True)
def group_order(key, num_keys):
    """Stable counting sort: indices that sort ``key`` (values 0 .. num_keys - 1), and group offsets."""
    start = np.zeros(num_keys + 1, np.int64)
    for k in key:
        start[k + 1] += 1
    for k in range(num_keys):
        start[k + 1] += start[k]
    cursor = start[:-1].copy()
    order = np.empty(key.shape[0], np.int64)
    for i in range(key.shape[0]):
        order[cursor[key[i]]] = i
        cursor[key[i]] += 1
    return order, start


@njit(cache=True, nogil=True)
def sort_groups(order, start, score):
    """Sorts ``order`` inside each group by descending score; equal scores keep their order.

    Insertion sort on runs of 16, which are then merged: written out because compiling ``np.argsort`` takes seconds.
    """
    run = 16
    spare = np.empty(order.shape[0], np.int64)
    for group in range(start.shape[0] - 1):
        a, b = start[group], start[group + 1]
        for first in range(a, b, run):
            for i in range(first + 1, min(first + run, b)):
                index = order[i]
                value = score[index]
                j = i
                while j > first and score[order[j - 1]] < value:
                    order[j] = order[j - 1]
                    j -= 1
                order[j] = index
        width = run
        while width < b - a:
            for low in range(a, b, 2 * width):
                middle = min(low + width, b)
                high = min(low + 2 * width, b)
                i, j = low, middle
                for k in range(low, high):
                    if i < middle and (j >= high or score[order[i]] >= score[order[j]]):
                        spare[k] = order[i]
                        i += 1
                    else:
                        spare[k] = order[j]
                        j += 1
            for k in range(a, b):
                order[k] = spare[k]
            width *= 2


@njit(cache=True, nogil=True)
def cell_box_ious(cell_det, cell_gt, cell_num_gt, cell_iou, boxes, gt_boxes, gt_crowd, ious):
    """Box IoU within each cell, boxes as x, y, width, height (float64). Layout: see ``cell_mask_ious``."""
    for c in range(cell_num_gt.shape[0]):
        num_gt = cell_num_gt[c]
        g0 = cell_gt[c]
        position = cell_iou[c]
        for d in range(cell_det[c], cell_det[c + 1]):
            dx, dy, dw, dh = boxes[d, 0], boxes[d, 1], boxes[d, 2], boxes[d, 3]
            for g in range(g0, g0 + num_gt):
                value = 0.0
                gx, gy, gw, gh = gt_boxes[g, 0], gt_boxes[g, 1], gt_boxes[g, 2], gt_boxes[g, 3]
                w = min(dx + dw, gx + gw) - max(dx, gx)
                if w > 0:
                    h = min(dy + dh, gy + gh) - max(dy, gy)
                    if h > 0:
                        overlap = w * h
                        union = dw * dh if gt_crowd[g] else dw * dh + gw * gh - overlap
                        value = overlap / union
                ious[position] = value
                position += 1


@njit(cache=True, nogil=True)
def match_cells(
    cell_det,
    cell_gt,
    cell_num_gt,
    cell_iou,
    cell_lenient,
    ious,
    det_area,
    gt_area,
    gt_ignore,
    gt_crowd,
    gt_void,
    thresholds,
    area_ranges,
    tp,
    ignored,
):
    """Greedy matching of each cell's detections, which stand in descending score order.

    As the LVIS API and pycocotools do: every detection takes the free annotation of highest IoU that reaches the
    threshold (the later of equal ones), ignored annotations only when no other fits; crowd annotations stay free. An
    unmatched detection is ignored when its area is out of the range or the cell is *lenient* (not exhaustively
    annotated). ``gt_void`` marks annotations whose id is 0: both APIs take the id for the match flag, so that their
    detections count as unmatched.
    """
    num_areas, num_thresholds = area_ranges.shape[0], thresholds.shape[0]
    size = 1
    for c in range(cell_num_gt.shape[0]):
        size = max(size, cell_num_gt[c])
    order = np.empty(size, np.int64)
    taken = np.empty(size, np.bool_)
    for c in range(cell_num_gt.shape[0]):
        first, last = cell_det[c], cell_det[c + 1]
        num_gt = cell_num_gt[c]
        g0 = cell_gt[c]
        base = cell_iou[c]
        best = 0.0
        for p in range(base, base + (last - first) * num_gt):
            best = max(best, ious[p])
        for a in range(num_areas):
            low, high = area_ranges[a, 0], area_ranges[a, 1]
            for d in range(first, last):
                tp[d] &= ~(np.int64(0x3FF) << (a * num_thresholds))
                if cell_lenient[c] or det_area[d] < low or det_area[d] > high:
                    ignored[d] |= np.int64(0x3FF) << (a * num_thresholds)
            if best < thresholds[0]:
                continue
            valid = 0
            for g in range(num_gt):
                if not (gt_ignore[g0 + g] or gt_area[g0 + g] < low or gt_area[g0 + g] > high):
                    order[valid] = g
                    valid += 1
            k = valid
            for g in range(num_gt):
                if gt_ignore[g0 + g] or gt_area[g0 + g] < low or gt_area[g0 + g] > high:
                    order[k] = g
                    k += 1
            for t in range(num_thresholds):
                if best < thresholds[t]:
                    break
                for k in range(num_gt):
                    taken[k] = False
                bit = np.int64(1) << (a * num_thresholds + t)
                for d in range(first, last):
                    row = base + (d - first) * num_gt
                    iou = min(thresholds[t], 1 - 1e-10)
                    match = -1
                    for k in range(num_gt):
                        g = order[k]
                        if taken[k] and not gt_crowd[g0 + g]:
                            continue
                        if match > -1 and match < valid and k >= valid:
                            break
                        if ious[row + g] < iou:
                            continue
                        iou = ious[row + g]
                        match = k
                    if match == -1:
                        continue
                    taken[match] = True
                    if match >= valid:
                        ignored[d] |= bit
                    elif not gt_void[g0 + order[match]]:
                        ignored[d] &= ~bit
                        tp[d] |= bit


@njit(cache=True, nogil=True)
def average_precision(
    first, last, group_start, tp, ignored, num_gt, recall_thresholds, num_areas, num_thresholds,
    precision, recall,
):  # fmt: skip
    """Interpolated precision and recall of each group of detections, sorted by descending score.

    Args:
        first, last: the groups to handle, ``last`` excluded.
        group_start: (K + 1,) offsets of the groups (categories, or pools of them).
        tp, ignored: (N,) int64 match flags.
        num_gt: (K, A) annotations that count in each area range.
        precision: (T, R, K, A), filled: the largest precision at a recall of at least the threshold, 0 where that
            recall is not reached, -1 where ``num_gt`` is 0.
        recall: (T, K, A), filled likewise.
    """
    bits = num_areas * num_thresholds
    num_recalls = recall_thresholds.shape[0]
    for k in range(first, last):
        most = 1
        for a in range(num_areas):
            most = max(most, num_gt[k, a])
        curve = np.empty((bits, most), np.float64)
        num_tp = np.zeros(bits, np.int64)
        num_fp = np.zeros(bits, np.int64)
        for i in range(group_start[k], group_start[k + 1]):
            hit = tp[i]
            miss = ~(tp[i] | ignored[i])
            for b in range(bits):
                num_fp[b] += (miss >> b) & 1
            b = 0
            while hit:
                if hit & 1:
                    count = num_tp[b] + 1
                    curve[b, num_tp[b]] = count / (np.float64(num_fp[b]) + np.float64(count) + 2.220446049250313e-16)
                    num_tp[b] = count
                hit >>= 1
                b += 1
        for a in range(num_areas):
            for t in range(num_thresholds):
                if num_gt[k, a] == 0:
                    for r in range(num_recalls):
                        precision[t, r, k, a] = -1
                    recall[t, k, a] = -1
                    continue
                b = a * num_thresholds + t
                for i in range(num_tp[b] - 1, 0, -1):
                    if curve[b, i] > curve[b, i - 1]:
                        curve[b, i - 1] = curve[b, i]
                recall[t, k, a] = num_tp[b] / num_gt[k, a]
                r = 0
                for i in range(num_tp[b]):
                    reached = (i + 1) / num_gt[k, a]
                    while r < num_recalls and recall_thresholds[r] <= reached:
                        precision[t, r, k, a] = curve[b, i]
                        r += 1
                while r < num_recalls:
                    precision[t, r, k, a] = 0
                    r += 1


@njit(cache=True, nogil=True)
def weighted_ap(group_start, tp, ignored, image, gt_start, gt_image, weight, recall_thresholds, out):
    """AP of each category over all areas with images of integer weight, into ``out`` (K, T), NaN without annotations.

    ``image`` (N,) of the detections, sorted as for ``average_precision``; annotations of category k are
    ``gt_image[gt_start[k]:gt_start[k + 1]]``; ``weight`` (I,).
    """
    num_thresholds = out.shape[1]
    num_recalls = recall_thresholds.shape[0]
    for k in range(group_start.shape[0] - 1):
        num_gt = 0
        for g in range(gt_start[k], gt_start[k + 1]):
            num_gt += weight[gt_image[g]]
        if num_gt == 0:
            for t in range(num_thresholds):
                out[k, t] = np.nan
            continue
        size = gt_start[k + 1] - gt_start[k]
        precision = np.empty((num_thresholds, size), np.float64)
        reached = np.empty((num_thresholds, size), np.int64)
        length = np.zeros(num_thresholds, np.int64)
        num_tp = np.zeros(num_thresholds, np.int64)
        num_fp = np.zeros(num_thresholds, np.int64)
        for i in range(group_start[k], group_start[k + 1]):
            w = weight[image[i]]
            if w == 0:
                continue
            for t in range(num_thresholds):
                bit = np.int64(1) << t
                if tp[i] & bit:
                    num_tp[t] += w
                    precision[t, length[t]] = num_tp[t] / (num_fp[t] + num_tp[t])
                    reached[t, length[t]] = num_tp[t]
                    length[t] += 1
                elif not ignored[i] & bit:
                    num_fp[t] += w
        for t in range(num_thresholds):
            for i in range(length[t] - 1, 0, -1):
                if precision[t, i] > precision[t, i - 1]:
                    precision[t, i - 1] = precision[t, i]
            total = 0.0
            r = 0
            for i in range(length[t]):
                recall = reached[t, i] / num_gt
                while r < num_recalls and recall_thresholds[r] <= recall:
                    total += precision[t, i]
                    r += 1
            out[k, t] = total / num_recalls


@njit(cache=True, nogil=True)
def _rank(ids, table, wanted):
    """Place of ``wanted`` in the ascending ``ids``, -1 where it is not; from the table if there is one."""
    if table.shape[0]:
        place = wanted - ids[0]
        return np.int32(-1) if place < 0 or place >= table.shape[0] else table[place]
    low, high = 0, ids.shape[0]
    while low < high:
        middle = (low + high) // 2
        if ids[middle] < wanted:
            low = middle + 1
        else:
            high = middle
    return np.int32(low) if low < ids.shape[0] and ids[low] == wanted else np.int32(-1)


@njit(cache=True, nogil=True)
def check_results(
    image_id, category_id, fields, score, boxes, image_ids, image_table, category_ids, category_table,
    required, image, category, problem,
):  # fmt: skip
    """Ranks of image and category of each result (-1 where unknown), and what is wrong with it first.

    ``image_table``, ``category_table``: see :func:`lt_det.evaluation.ground_truth.rank_table`. ``required``:
    bits of ``fields`` that a result must have. ``image``, ``category`` (n,) int32 and ``problem`` (n,) uint8
    are filled; ``problem`` is 0 for none, else 1 no image_id, 2 no category_id, 3 no score, 4 unknown
    image_id, 5 unknown category_id, 6 score is not finite, 7 bbox is not finite, 8 no bbox, 9 no segmentation.
    """
    for i in range(image_id.shape[0]):
        if i and image_id[i] == image_id[i - 1]:
            image[i] = image[i - 1]
        else:
            image[i] = _rank(image_ids, image_table, image_id[i])
        category[i] = _rank(category_ids, category_table, category_id[i])
        missing = required & ~fields[i]
        what = 0
        if missing & 7:
            what = 1 if missing & 1 else 2 if missing & 2 else 3
        elif image[i] < 0:
            what = 4
        elif category[i] < 0:
            what = 5
        elif not np.isfinite(score[i]):
            what = 6
        elif fields[i] & 8 and not (
            np.isfinite(boxes[i, 0])
            and np.isfinite(boxes[i, 1])
            and np.isfinite(boxes[i, 2])
            and np.isfinite(boxes[i, 3])
        ):
            what = 7
        elif missing & 24:
            what = 8 if missing & 8 else 9
        problem[i] = what
