"""Whether scores are probabilities, and where to cut them: calibration by frequency group, thresholds by category."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lt_det.io import write_csv_atomically

from .ground_truth import FREQUENCY_GROUPS, GroundTruth
from .matching import IOU_THRESHOLDS, Matches, main_cap

__all__ = [
    "Calibration",
    "best_thresholds",
    "calibrate",
    "read_thresholds",
    "write_thresholds",
]

_FIELDS = ("category_id", "name", "group", "threshold", "f1", "precision", "recall", "annotations", "source")


@dataclass
class Calibration:
    """Scores against precision in B bins of equal width; all numbers in 0..1.

    Attributes:
        count (B,): detections in each bin that count, those that are neither right nor wrong left out.
        score (B,): their mean score; precision (B,): the share of them that are right. NaN in an empty bin.
        error: D-ECE, sum over the bins of ``count / sum(count) * |precision - score|``: the expected difference between
            the score of a detection and the chance that it is right. NaN without detections.
        largest: the largest difference of a bin with at least one in a thousand of the detections.
    """

    count: np.ndarray
    score: np.ndarray
    precision: np.ndarray
    error: float
    largest: float


def _right_and_wrong(
    gt: GroundTruth, matches: Matches, iou_threshold: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Category, score, and whether it is right, of all detections under the cap that are not ignored."""
    index = np.flatnonzero(np.isclose(IOU_THRESHOLDS, iou_threshold))
    if len(index) != 1:
        raise ValueError(f"iou_threshold is {iou_threshold}; matches are kept for {IOU_THRESHOLDS.round(2).tolist()}.")
    cut = matches.cut(main_cap(matches))
    right, ignored = ((bits >> index[0]) & 1 for bits in cut.tp_and_ignored())  # area range 0: all
    counts = ignored == 0
    return np.repeat(cut.category, cut.count)[counts], cut.scores[counts], right[counts] > 0


def calibrate(
    gt: GroundTruth, matches: Matches, *, bins: int = 20, iou_threshold: float = 0.5, min_score: float = 0.0
) -> dict[str, Calibration]:
    """Calibration of all detections ("") and of those of each frequency group.

    Source: Kueppers et al., Multivariate Confidence Calibration for Object Detection, CVPR Workshops 2020: D-ECE with
    the score alone. Detections that LVIS's federated annotation says nothing about are left out.

    Args:
        gt: the ground truth of the matches.
        bins: number of bins of equal width over 0..1.
        iou_threshold: with which IoU a detection is right, one of 0.5, 0.55, ..., 0.95.
        min_score: detections below it are left out.
    """
    category, score, right = _right_and_wrong(gt, matches, iou_threshold)
    keep = score >= min_score
    category, score, right = category[keep], score[keep], right[keep]
    bin_ = np.clip((score * bins).astype(np.int64), 0, bins - 1)
    out = {}
    for name, members in gt.groups().items():
        part = members[category]
        count = np.bincount(bin_[part], minlength=bins)
        safe = np.where(count > 0, count, np.nan)
        mean = np.bincount(bin_[part], weights=score[part], minlength=bins) / safe
        precision = np.bincount(bin_[part], weights=right[part], minlength=bins) / safe
        gap, total = np.abs(precision - mean), count.sum()
        error = float(np.nansum(gap * count) / total) if total else float("nan")
        common = gap[(count > 0) & (count * 1000 >= total)]
        largest = float(common.max()) if len(common) else float("nan")
        out[name] = Calibration(count, mean, precision, error, largest)
    return out


def best_thresholds(gt: GroundTruth, matches: Matches, *, iou_threshold: float = 0.5) -> list[dict[str, Any]]:
    """The score threshold of best F1 for each category.

    Detections with a score at or above the threshold are kept; of several thresholds with the best F1 the highest is
    taken. A category without annotations or without a right detection has no best F1: it gets the threshold that is
    best for its frequency group's detections together ("source" is "group" there, else "category").

    Returns:
        One dict a category, in the order of ids: category_id, name, group, threshold, f1, precision, recall (at the
        threshold, 0..1, NaN where "source" is "group"), annotations, source.
    """
    category, score, right = _right_and_wrong(gt, matches, iou_threshold)
    num_gt = gt.num_gt()[:, 0]
    of_group = {-1: 1.0}
    for i in range(-1, len(FREQUENCY_GROUPS)):
        members = gt.group == i
        part = members[category]
        found = _best_cut(score[part], right[part], int(num_gt[members].sum()))
        of_group[i] = found[0] if found else 1.0
    order = np.argsort(category, kind="stable")
    start = np.searchsorted(category[order], np.arange(gt.num_categories + 1))
    rows = []
    for k in range(gt.num_categories):
        part = order[start[k] : start[k + 1]]
        found = _best_cut(score[part], right[part], int(num_gt[k]))
        threshold, f1, precision, recall = found or (of_group[int(gt.group[k])], *[float("nan")] * 3)
        rows.append({
            "category_id": int(gt.category_ids[k]), "name": gt.category_names[k],
            "group": gt.group_of(k), "threshold": threshold, "f1": f1,
            "precision": precision, "recall": recall, "annotations": int(num_gt[k]),
            "source": "category" if found else "group",
        })  # fmt: skip
    return rows


def _best_cut(score: np.ndarray, right: np.ndarray, num_gt: int) -> tuple[float, float, float, float] | None:
    """Threshold, F1, precision and recall of the best cut; None where no cut has a right detection."""
    if not right.any() or num_gt == 0:
        return None
    order = np.argsort(-score, kind="stable")
    score, found = score[order], np.cumsum(right[order])
    kept = np.arange(1, len(score) + 1)
    # A cut keeps all detections of equal score.
    last = np.flatnonzero(np.append(score[1:] != score[:-1], True))
    f1 = 2 * found[last] / (kept[last] + num_gt)
    best = last[np.argmax(f1)]
    return float(score[best]), float(f1.max()), float(found[best] / kept[best]), float(found[best] / num_gt)


def write_thresholds(path: str | os.PathLike, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows of :func:`best_thresholds` as a csv, which ``tools/predict.py --thresholds`` takes."""
    # Thresholds are scores themselves, and are written with all their digits: none is rounded above its score.
    rows = [{k: "" if isinstance(v, float) and np.isnan(v) else v for k, v in row.items()} for row in rows]
    write_csv_atomically(path, rows, _FIELDS)


def read_thresholds(path: str | os.PathLike) -> dict[str, float]:
    """Threshold by category name, from a csv with the columns "name" and "threshold".

    Raises:
        FileNotFoundError, ValueError: no such file, or not such a csv; the message names the line.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no thresholds file {os.fspath(path)}.")
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if not {"name", "threshold"} <= set(reader.fieldnames or ()):
            raise ValueError(f"{os.fspath(path)} is not a csv with the columns 'name' and 'threshold'.")
        out = {}
        for row in reader:
            try:
                value = float(row["threshold"])
            except (TypeError, ValueError):
                value = float("nan")
            if not 0 <= value <= 1:
                raise ValueError(
                    f"{os.fspath(path)}, line {reader.line_num}: threshold {row['threshold']!r} of {row['name']!r} is "
                    "not a number in 0..1."
                )
            out[row["name"]] = value
    return out
