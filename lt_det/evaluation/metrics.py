"""From match flags to average precision and recall."""

from __future__ import annotations

import functools
import logging
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from lt_det.processes import usable_cores

from .ground_truth import AREA_RANGES, FREQUENCY_GROUPS, GroundTruth
from .matching import IOU_THRESHOLDS, RECALL_THRESHOLDS, Matches, ranges

__all__ = [
    "Accumulated",
    "accumulate",
    "pool_categories",
    "summarize_coco",
    "summarize_lvis",
    "summarize_pool",
]

logger = logging.getLogger(__name__)

_SHARES = 8  # of the categories, each the work of one thread
_AREAS = {"all": 0, "small": 1, "medium": 2, "large": 3}


@dataclass
class Accumulated:
    """Precision and recall of K categories (or pools).

    Both are laid out as the official API's ``eval["precision"]`` and ``eval["recall"]``: float64 in 0..1, -1 where
    there is no annotation to find.

    Attributes:
        precision: (10 IoU thresholds, 101 recalls, K, 4 area ranges).
        recall: (10, K, 4).
    """

    precision: np.ndarray
    recall: np.ndarray

    def ap(self, *, threshold: float | None = None, area: str = "all", categories=slice(None)) -> float:
        """Mean precision over what exists, 0..1; NaN when nothing does."""
        return _mean(self._precision_over_recalls[_thresholds(threshold)][:, categories, _AREAS[area]])

    def ar(self, *, area: str = "all", categories=slice(None)) -> float:
        """Mean recall over what exists, 0..1; NaN when nothing does."""
        return _mean(self.recall[:, categories, _AREAS[area]])

    @functools.cached_property
    def _precision_over_recalls(self) -> np.ndarray:
        """(10, K, 4). Each mean above takes all recalls of a category or none."""
        return self.precision.mean(axis=1)

    def per_category_ap(self, threshold: float | None = None) -> np.ndarray:
        """(K,) AP over all areas, 0..1, NaN without annotations."""
        ap = self._precision_over_recalls[_thresholds(threshold)][..., 0].mean(axis=0)
        return np.where(self.recall[0, :, 0] < 0, np.nan, ap)

    def per_category_ar(self) -> np.ndarray:
        """(K,) average recall over all areas, 0..1, NaN without annotations."""
        return np.where(self.recall[0, :, 0] < 0, np.nan, self.recall[..., 0].mean(axis=0))


def _thresholds(threshold: float | None):
    if threshold is None:
        return slice(None)
    return np.flatnonzero(np.isclose(IOU_THRESHOLDS, threshold))


def _mean(values: np.ndarray) -> float:
    values = values[values > -1]
    return float(values.mean()) if values.size else float("nan")


def accumulate(gt: GroundTruth, matches: Matches, cap: str | None = None) -> Accumulated:
    """Precision and recall by category of the detections that ``cap`` leaves (all of them for ``None``)."""
    cut = matches.cut(cap)
    return _accumulate_groups(cut, cut.count_by_category(gt.num_categories), gt.num_gt())


def pool_categories(gt: GroundTruth, matches: Matches, cap: str | None = None) -> dict[str, Accumulated]:
    """AP-pool: detections of all categories, and of each frequency group, ranked in one list.

    Keys "" (all), "r", "c", "f". Source: Dave et al., Evaluating Large-Vocabulary Object Detectors: The Devil is in the
    Details, 2021, sec. 5.
    """
    cut = matches.cut(cap)
    # Equal scores: by image, then category (the reference implementation's order).
    order = np.lexsort((cut.category, cut.image))
    start = np.cumsum(cut.count, dtype=np.int64) - cut.count
    num_gt = gt.num_gt()
    out = {}
    for name in ("",) + FREQUENCY_GROUPS:
        members = gt.members(name)
        cells = order[members[cut.category[order]]]
        index = ranges(start[cells], cut.count[cells])
        part = Matches(cut.scores[index], cut.flags[index], cut.image[cells], cut.category[cells], cut.count[cells])
        out[name] = _accumulate_groups(part, np.array([len(index)]), num_gt[members].sum(0, keepdims=True))
    return out


def _accumulate_groups(matches: Matches, num_det: np.ndarray, num_gt: np.ndarray) -> Accumulated:
    """Detections of group k stand in the k-th of consecutive blocks of ``num_det``; num_gt is (K, A)."""
    from ._match_kernels import average_precision, sort_groups

    start = np.concatenate([[0], np.cumsum(num_det, dtype=np.int64)])
    order = np.arange(len(matches.scores), dtype=np.int64)
    scores, num_gt = np.ascontiguousarray(matches.scores), np.ascontiguousarray(num_gt, np.int64)
    tp, ignored = matches.tp_and_ignored()
    num_groups, num_areas = num_gt.shape
    shape = (len(IOU_THRESHOLDS), len(RECALL_THRESHOLDS), num_groups, num_areas)
    precision = np.empty(shape, np.float64)
    recall = np.empty(shape[:1] + shape[2:], np.float64)

    def work(first: int, last: int) -> None:
        part = slice(start[first], start[last])
        sort_groups(order, start[first : last + 1], scores)
        for bits in (tp, ignored):
            bits[part] = bits[order[part]]
        average_precision(
            first, last, start, tp, ignored, num_gt, RECALL_THRESHOLDS, len(AREA_RANGES), len(IOU_THRESHOLDS),
            precision, recall,
        )  # fmt: skip

    shares = np.searchsorted(start, np.linspace(0, start[-1], _SHARES + 1)[1:-1])
    borders = np.unique([0, *shares.tolist(), num_groups]).tolist()
    with ThreadPoolExecutor(min(usable_cores(), _SHARES)) as pool:
        list(pool.map(work, borders, borders[1:]))
    return Accumulated(precision, recall)


def _precision_metrics(gt: GroundTruth, result: Accumulated, suffix: str = "") -> OrderedDict[str, float]:
    out: OrderedDict[str, float] = OrderedDict()
    out["AP"] = result.ap()
    out["AP50"] = result.ap(threshold=0.5)
    out["AP75"] = result.ap(threshold=0.75)
    for name in ("small", "medium", "large"):
        out[f"AP{name[0]}"] = result.ap(area=name)
    for name in FREQUENCY_GROUPS:
        out[f"AP{name}"] = result.ap(categories=np.flatnonzero(gt.members(name)))
    return OrderedDict((key + suffix, 100 * value) for key, value in out.items())


def summarize_lvis(gt: GroundTruth, result: Accumulated, *, max_dets: int, suffix: str = "") -> dict[str, float]:
    """The 13 numbers of the LVIS API in percent, NaN where it has -1.

    AP, AP50, AP75, APs, APm, APl, APr, APc, APf, AR@N, ARs@N, ARm@N, ARl@N, N = ``max_dets``. With ``suffix`` (say
    "-fixed") it stands in place of "@N" and behind every AP.
    """
    out = _precision_metrics(gt, result, suffix)
    tail = suffix or f"@{max_dets}"
    out[f"AR{tail}"] = 100 * result.ar()
    for name in ("small", "medium", "large"):
        out[f"AR{name[0]}{tail}"] = 100 * result.ar(area=name)
    return out


def summarize_coco(gt: GroundTruth, results: dict[int, Accumulated]) -> dict[str, float]:
    """The 12 numbers of pycocotools and APr, APc, APf, in percent, of results by detections a cell (1, 10, 100)."""
    most = max(results)
    out = _precision_metrics(gt, results[most])
    for n in sorted(results):
        out[f"AR@{n}"] = 100 * results[n].ar()
    for name in ("small", "medium", "large"):
        out[f"AR{name[0]}@{most}"] = 100 * results[most].ar(area=name)
    return out


def summarize_pool(pools: dict[str, Accumulated]) -> dict[str, float]:
    """AP-pool, APr-pool, APc-pool, APf-pool in percent."""
    return OrderedDict((f"AP{name}-pool", 100 * result.ap()) for name, result in pools.items())


def summarize(
    gt: GroundTruth, matches: Matches, max_dets: int
) -> tuple[OrderedDict[str, float], dict[str, Accumulated]]:
    """All metrics that the caps in ``matches.prefix`` allow.

    Returns:
        The metrics in percent, and what they were computed from: "main", and "fixed" where there is a "category" cap.
    """
    metrics: OrderedDict[str, float] = OrderedDict()
    parts: dict[str, Accumulated] = {}
    if gt.federated:
        parts["main"] = accumulate(gt, matches, "image")
        metrics.update(summarize_lvis(gt, parts["main"], max_dets=max_dets))
    else:
        by_cap = {n: accumulate(gt, matches, f"cell{n}") for n in coco_caps(max_dets)}
        parts["main"] = by_cap[max_dets]
        metrics.update(summarize_coco(gt, by_cap))
    if "category" in matches.prefix:
        if gt.federated and len(matches.count) and (matches.prefix["image"] == matches.prefix["category"]).all():
            logger.warning(
                "AP-fixed equals AP: no detection that could count lies beyond the %d an image that AP counts. A model "
                "that gives no more has no room for AP-fixed; raise TEST.DETECTIONS_PER_IMAGE (test_topk_per_image).",
                max_dets,
            )
        parts["fixed"] = accumulate(gt, matches, "category")
        metrics.update(summarize_lvis(gt, parts["fixed"], max_dets=max_dets, suffix="-fixed"))
        metrics.update(summarize_pool(pool_categories(gt, matches, "category")))
    return metrics, parts


def coco_caps(max_dets: int) -> tuple[int, ...]:
    """Detections a category and image of pycocotools' AR@1, AR@10 and the rest."""
    return tuple(sorted({1, 10, max_dets}))


def add_cell_caps(matches: Matches, max_dets: int) -> None:
    """Adds the caps of :func:`coco_caps` to ``matches.prefix``."""
    for n in coco_caps(max_dets):
        matches.prefix[f"cell{n}"] = np.minimum(matches.count, n)
