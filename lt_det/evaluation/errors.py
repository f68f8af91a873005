"""What is wrong with the detections: TIDE's six types of errors, and which class takes the objects of another.

Source: Bolya et al., TIDE: A General Toolbox for Identifying Object Detection Errors, ECCV 2020. A detection that is
not right at IoU 0.5 is, in this order, an error of

- localisation: it overlaps an object of its class with an IoU of 0.1 to 0.5;
- classification: it overlaps an object of another class with at least 0.5;
- duplicate: it overlaps an object of its class with at least 0.5, which a better one found;
- background: it overlaps no object with more than 0.1;
- both: the rest.

An object is missed where no detection found it, and none of the first two kinds could be mended to find it. The cost of
a type is the AP50 that is gained when its errors alone are mended.

LVIS annotates each image for some categories only. A detection of a category that the image says nothing about, or of
one not exhaustively annotated there, is no error here, whatever it overlaps: TIDE's own reader of LVIS and others count
some of these.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lt_det.progress import progress_bar

from .ground_truth import GroundTruth
from .matching import RECALL_THRESHOLDS
from .offline import parts_of
from .result_collector import ResultCollector, among_the_best
from .rle import RleTable

__all__ = ["ERROR_TYPES", "ErrorAnalysis", "NamedDetections", "analyse_errors", "name_detections"]

ERROR_TYPES = ("classification", "localisation", "both", "duplicate", "background", "missed")
_CLS, _LOC, _BOTH, _DUPLICATE, _BACKGROUND, _MISSED = range(6)
_RIGHT, _IGNORED = 6, 7  # of a detection that is no error


@dataclass
class ErrorAnalysis:
    """Result of :func:`analyse_errors`, by group: "" is all categories, then "r", "c", "f" where there are any.

    Attributes:
        iou_type: "bbox" or "segm".
        ap50: AP at the IoU threshold, percent.
        count: number of errors of each type. Detections belong to the group of the category that they name, missed
            objects to that of their own.
        cost: AP50 points that mending the errors of each type, in all groups, gains in the group.
        confusions: one dict for each pair of categories, most frequent first: "category" and "taken_by" (ranks),
            "count": objects of the category whose best-scored overlapping detection names the other, "objects" of the
            category, and "checked": those in images that are annotated for the other category.
        taken, found (K,): objects of each category whose best-scored overlapping detection names another or the right
            category; objects (K,): how many there are.
    """

    iou_type: str
    iou_threshold: float
    background_threshold: float
    ap50: dict[str, float]
    count: dict[str, dict[str, int]]
    cost: dict[str, dict[str, float]]
    confusions: list[dict[str, int]]
    taken: np.ndarray
    found: np.ndarray
    objects: np.ndarray


@dataclass
class NamedDetections:
    """Result of :func:`name_detections`, by image, then descending score.

    Attributes:
        image, category (N,): ranks; score (N,).
        kind: for each detection "right", "ignored" (the annotation says nothing about it), or its error's type.
        boxes (N, 4) float64 x, y, width, height for "bbox", masks for "segm"; the other is None.
        found: (number of annotations,) bool, whether a detection is right about the object.
    """

    image: np.ndarray
    category: np.ndarray
    score: np.ndarray
    kind: list[str]
    boxes: np.ndarray | None
    masks: RleTable | None
    found: np.ndarray


@dataclass
class _Detections:
    """Detections that count, by image, then descending score."""

    image: np.ndarray
    category: np.ndarray
    score: np.ndarray
    cell: np.ndarray
    boxes: np.ndarray | None
    masks: RleTable | None


def analyse_errors(
    gt: GroundTruth,
    results: str | os.PathLike | Sequence[dict[str, Any]],
    *,
    iou_type: str,
    max_dets: int | None = None,
    iou_threshold: float = 0.5,
    background_threshold: float = 0.1,
    segm_area: str = "official",
    skip_invalid: bool = False,
    progress: bool = False,
) -> ErrorAnalysis:
    """Sort the errors of a model.

    Args:
        gt: the ground truth, with masks for "segm".
        results: a results file, or a list of result dicts.
        iou_type: "bbox" or "segm".
        max_dets: detections an image (LVIS, default 300), or an image and category (COCO, default 100).
        iou_threshold, background_threshold: TIDE's t_f and t_b.
        segm_area, skip_invalid: as in :func:`lt_det.evaluation.evaluate_results`.
        progress: show progress bars, where the console is a terminal.

    Raises:
        ValueError: an argument is wrong, or the file is not a results file of this ground truth.
    """
    if iou_type not in ("bbox", "segm"):
        raise ValueError(f"iou_type is {iou_type!r}; errors are sorted by 'bbox' or 'segm'.")
    if not 0 < background_threshold < iou_threshold < 1:
        raise ValueError("the thresholds must satisfy 0 < background_threshold < iou_threshold < 1.")
    found = _read(gt, results, iou_type, max_dets, segm_area, skip_invalid, progress)
    kind, target, used, usable, best = _sort_images(gt, found, iou_type, iou_threshold, background_threshold, progress)
    return _summary(gt, found, iou_type, iou_threshold, background_threshold, kind, target, used, usable, best)


def name_detections(
    gt: GroundTruth, results: Sequence[dict[str, Any]], *, iou_type: str, max_dets: int | None = None
) -> NamedDetections:
    """Say of each detection whether it is right, or what its error is: for pictures of some images.

    Args:
        gt: the ground truth of the data set.
        results: result dicts of the images that are looked at.
        iou_type: "bbox" or "segm".
        max_dets: as in :func:`analyse_errors`.
    """
    seen = _read(gt, results, iou_type, max_dets, "official", False, False)
    kind, _, used, _, _ = _sort_images(gt, seen, iou_type, 0.5, 0.1, False)
    names = {**dict(enumerate(ERROR_TYPES)), _RIGHT: "right", _IGNORED: "ignored"}
    return NamedDetections(
        seen.image, seen.category, seen.score, [names[k] for k in kind.tolist()], seen.boxes, seen.masks, used
    )


def _read(gt, results, iou_type, max_dets, segm_area, skip_invalid, progress) -> _Detections:
    parts, source = parts_of(results, gt, progress)
    collector = ResultCollector(gt, (iou_type,), segm_area, all_masks=True, source=source)
    for part in parts:
        collector.add(part)
    collector.check(skip_invalid)
    if not collector.num_results:
        none = np.zeros(0, np.int64)
        return _Detections(none, none, np.zeros(0), none, np.zeros((0, 4)), None)
    max_dets = max_dets or (300 if gt.federated else 100)
    one = collector.collected(max_dets)
    if gt.federated:  # whose API drops detections without area
        keep = one.caps["image"] & (one.areas[iou_type] > 0) & (one.areas[iou_type] < np.inf)
    else:
        cells, group = np.unique(one.image.astype(np.int64) * gt.num_categories + one.category, return_inverse=True)
        keep = among_the_best(max_dets, group, len(cells), one.score)
    index = np.flatnonzero(keep)
    index = index[np.lexsort((-one.score[index], one.image[index]))]
    return _Detections(
        one.image[index].astype(np.int64), one.category[index].astype(np.int64), one.score[index], one.cell[index],
        one.boxes[index] if iou_type == "bbox" else None,
        one.masks(index) if iou_type == "segm" else None,
    )  # fmt: skip


def _ious(gt: GroundTruth, found: _Detections, iou_type: str, dets: slice, objects: slice, size) -> np.ndarray:
    """(D, G) IoUs of an image; with crowd regions the share of the detection that they cover."""
    if iou_type == "bbox":
        a, b = found.boxes[dets], gt.boxes[objects]
        low = np.maximum(a[:, None, :2], b[None, :, :2])
        high = np.minimum(a[:, None, :2] + a[:, None, 2:], b[None, :, :2] + b[None, :, 2:])
        inter = np.maximum(high - low, 0).prod(-1)
        area_a, area_b = a[:, 2] * a[:, 3], b[:, 2] * b[:, 3]
        union = np.where(gt.crowd[objects], area_a[:, None], area_a[:, None] + area_b - inter)
        return np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)
    import pycocotools.mask as mask_utils

    stated = [int(size[0]), int(size[1])]
    one, other = (
        [{"size": stated, "counts": s} for s in table.take(part).strings()]
        for table, part in ((found.masks, dets), (gt.masks, objects))
    )
    return np.asarray(mask_utils.iou(one, other, gt.crowd[objects].tolist())).reshape(len(one), len(other))


def _sort_images(gt, found, iou_type, t_f, t_b, progress):
    """Kind of each detection; object that a detection could be mended to (-1: none); whether each object was found and
    whether an error could be mended to find it; and which detection overlaps each object with the best score."""
    n, num_objects = len(found.score), gt.num_annotations
    kind = np.full(n, _BACKGROUND, np.int8)
    target = np.full(n, -1, np.int64)
    used, usable = np.zeros(num_objects, bool), np.zeros(num_objects, bool)
    best = np.full(num_objects, -1, np.int64)
    lenient = (
        gt.cell_lenient[np.maximum(found.cell, 0)] & (found.cell >= 0) if len(gt.cell_lenient) else np.zeros(n, bool)
    )
    det_start = np.searchsorted(found.image, np.arange(gt.num_images + 1))
    object_start = np.searchsorted(gt.annotation_image, np.arange(gt.num_images + 1))
    object_category = gt.annotation_category
    images = np.flatnonzero(np.diff(det_start))
    bar = progress_bar(images.tolist(), unit="img", desc=f"errors {iou_type}", show=progress)
    for i in bar:
        dets, objects = slice(*det_start[i : i + 2].tolist()), slice(*object_start[i : i + 2].tolist())
        if objects.start == objects.stop:
            kind[dets][lenient[dets]] = _IGNORED
            continue
        iou = _ious(gt, found, iou_type, dets, objects, gt.image_sizes[i])
        own = found.category[dets, None] == object_category[objects]
        real = ~gt.ignore[objects]
        kinds, targets = kind[dets], target[dets]
        matched = _match(iou, own, real, gt.crowd[objects], t_f)
        kinds[matched >= 0] = _RIGHT
        used[objects][matched[matched >= 0]] = True
        kinds[(matched == -2) | ((matched == -1) & lenient[dets])] = _IGNORED
        wrong = np.flatnonzero((matched == -1) & ~lenient[dets])
        _name_errors(iou, own, real, wrong, t_f, t_b, kinds, targets)
        # The best-scored detection over each object; detections stand by score. One that found another object, or
        # that nothing is known about, takes nothing away.
        over = (iou >= t_f) & real & (kinds != _IGNORED)[:, None]
        right = np.flatnonzero(matched >= 0)
        over[right] = False
        over[right, matched[right]] = True
        first = over.argmax(0)
        hit = over[first, np.arange(len(real))]
        best[objects][hit] = dets.start + first[hit]
        mend = targets >= 0
        targets[mend] += objects.start
        usable[targets[mend & np.isin(kinds, (_CLS, _LOC))]] = True
    return kind, target, used, usable & ~used, best


def _match(iou: np.ndarray, own: np.ndarray, real: np.ndarray, crowd: np.ndarray, t_f: float) -> np.ndarray:
    """Greedy matching as the LVIS and COCO APIs do. The object found by each detection, -1: none, -2: ignored."""
    matched = np.full(len(iou), -1, np.int64)
    able = own & (iou >= min(t_f, 1 - 1e-10))
    free = np.ones(iou.shape[1], bool)
    for d in np.flatnonzero(able.any(1)):
        for part, result in ((able[d] & real & free, None), (able[d] & ~real & (free | crowd), -2)):
            candidates = np.flatnonzero(part)
            if len(candidates):
                values = iou[d, candidates]
                g = candidates[len(values) - 1 - values[::-1].argmax()]  # the later of equal ones
                free[g] = False
                matched[d] = g if result is None else result
                break
    return matched


def _name_errors(iou, own, real, wrong, t_f, t_b, kinds, targets) -> None:
    """The kinds of the wrong detections of an image, and the objects that mending would make them find."""
    if not len(wrong):
        return
    if not real.any():
        kinds[wrong] = _BACKGROUND
        return
    every = np.where(real, iou[wrong], 0.0)
    same, other = np.where(own[wrong], every, 0.0), np.where(own[wrong], 0.0, every)
    at_same, at_other = same.argmax(1), other.argmax(1)
    best_same, best_other = same.max(1), other.max(1)
    localisation = (t_b <= best_same) & (best_same < t_f)
    classification = ~localisation & (best_other >= t_f)
    duplicate = ~localisation & ~classification & (best_same >= t_f)
    background = ~(localisation | classification | duplicate) & (every.max(1) <= t_b)
    kinds[wrong] = np.select(
        [localisation, classification, duplicate, background], [_LOC, _CLS, _DUPLICATE, _BACKGROUND], _BOTH
    )
    targets[wrong] = np.where(localisation, at_same, np.where(classification, at_other, -1))


def _summary(gt, found, iou_type, t_f, t_b, kind, target, used, usable, best) -> ErrorAnalysis:
    K = gt.num_categories
    object_category, real = gt.annotation_category, ~gt.ignore
    num_gt = np.bincount(object_category[real], minlength=K)
    right = kind == _RIGHT
    counts = kind != _IGNORED
    missed = real & ~used & ~usable
    # Of the errors that could be mended to find one object, the best-scored one is; the others are dropped.
    mendable = np.flatnonzero((target >= 0) & usable[np.maximum(target, 0)])
    order = mendable[np.argsort(-found.score[mendable], kind="stable")]
    _, first = np.unique(target[order], return_index=True)
    mended = np.zeros(len(kind), bool)
    mended[order[first]] = True

    def average(category, score, is_right, number):
        return 100 * _average_precision(category, score, is_right, number)

    plain = average(found.category[counts], found.score[counts], right[counts], num_gt)
    cost_by_category = []
    for error in range(len(ERROR_TYPES)):
        category, is_right, keep, number = found.category, right, counts, num_gt
        mine = kind == error
        if error == _MISSED:
            number = num_gt - np.bincount(object_category[missed], minlength=K)
        else:
            keep = counts & ~(mine & ~mended)
            is_right = right | (mine & mended)
            if error == _CLS:
                moved = mine & mended
                category = found.category.copy()
                category[moved] = object_category[target[moved]]
        mended_ap = average(category[keep], found.score[keep], is_right[keep], number)
        # Where every object of a category was missed nothing is left to find: TIDE counts 0.
        cost_by_category.append(np.where(np.isnan(mended_ap), 0.0, mended_ap) - plain)
    groups = gt.groups()
    ap50, count, cost = {}, {}, {}
    for name, members in groups.items():
        known = members & (num_gt > 0)
        ap50[name] = float(plain[known].mean()) if known.any() else float("nan")
        in_group = members[found.category]
        numbers = np.bincount(kind[in_group & (kind < _MISSED)], minlength=len(ERROR_TYPES))
        numbers[_MISSED] = int((missed & members[object_category]).sum())
        count[name] = dict(zip(ERROR_TYPES, numbers.tolist()))
        cost[name] = {
            error: max(float(by_category[known].mean()), 0.0) if known.any() else float("nan")
            for error, by_category in zip(ERROR_TYPES, cost_by_category)
        }
    confusions, taken, owned = _confusions(gt, found, kind, best, real, num_gt)
    return ErrorAnalysis(iou_type, t_f, t_b, ap50, count, cost, confusions, taken, owned, num_gt)


def _confusions(gt, found, kind, best, real, num_gt):
    K = gt.num_categories
    object_category, object_image = gt.annotation_category, gt.annotation_image
    hit = np.flatnonzero(real & (best >= 0))
    winner = found.category[best[hit]]
    loser = object_category[hit]
    owned = np.bincount(loser[winner == loser], minlength=K)
    wrong = winner != loser
    pairs = Counter(zip(loser[wrong].tolist(), winner[wrong].tolist()))
    taken = np.bincount(loser[wrong], minlength=K)
    cells = np.repeat(np.arange(gt.num_images), np.diff(gt.cell_start)) * K + gt.cell_category
    checked_cells = cells[~gt.cell_lenient]
    rows = []
    by_category = np.argsort(object_category, kind="stable")
    start = np.searchsorted(object_category[by_category], np.arange(K + 1))
    for (category, other), number in sorted(pairs.items(), key=lambda p: (-p[1], p[0])):
        mine = by_category[start[category] : start[category + 1]]
        images = object_image[mine[real[mine]]]
        if gt.federated:
            wanted = images * K + other
            place = np.minimum(np.searchsorted(checked_cells, wanted), len(checked_cells) - 1)
            checked = int((checked_cells[place] == wanted).sum())
        else:
            checked = len(images)
        rows.append({"category": category, "taken_by": other, "count": number, "objects": int(num_gt[category]),
                     "checked": checked})  # fmt: skip
    return rows, taken, owned


def _average_precision(category, score, is_right, num_gt) -> np.ndarray:
    """(K,) AP at one IoU threshold, 0..1: interpolated precision at 101 recalls; NaN without objects."""
    K = len(num_gt)
    order = np.lexsort((-score, category))
    category, is_right = category[order], is_right[order]
    start = np.searchsorted(category, np.arange(K + 1))
    out = np.where(num_gt > 0, 0.0, np.nan)
    for k in np.flatnonzero((num_gt > 0) & (np.diff(start) > 0)):
        found = np.cumsum(is_right[start[k] : start[k + 1]])
        if found[-1] == 0:
            continue
        precision = found / np.arange(1, len(found) + 1)
        precision = np.maximum.accumulate(precision[::-1])[::-1]
        place = np.searchsorted(found / num_gt[k], RECALL_THRESHOLDS, side="left")
        out[k] = np.where(place < len(precision), precision[np.minimum(place, len(precision) - 1)], 0.0).mean()
    return out
