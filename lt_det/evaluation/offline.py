"""Evaluation of a results file, or of results in memory, of any model."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lt_det.processes import usable_cores

from .ground_truth import GroundTruth
from .matching import Matches
from .metrics import Accumulated, summarize
from .result_collector import ResultCollector
from .results_io import ResultPart, read_results, results_from_dicts

__all__ = ["Evaluation", "evaluate_results"]

logger = logging.getLogger(__name__)


@dataclass
class Evaluation:
    """Result of :func:`evaluate_results`.

    Attributes:
        metrics: percent by IoU type, NaN where there is nothing to average.
        curves: by IoU type what they come from, "main" and maybe "fixed".
        matches: match flags by IoU type.
        num_results: number of results read, the skipped ones included.
        problems: number of skipped results by kind.
    """

    gt: GroundTruth
    metrics: OrderedDict[str, OrderedDict[str, float]]
    curves: dict[str, dict[str, Accumulated]]
    matches: dict[str, Matches]
    num_results: int
    problems: dict[str, int]

    def save(self, output_dir: str, *, plots: bool = True) -> None:
        """Writes metrics.json, per_category.csv, matches_<type>.npz and plots."""
        from .report import save_report

        save_report(output_dir, self.gt, self.metrics, self.details(), plots=plots)

    def details(self) -> dict[str, dict[str, Any]]:
        """By IoU type the curves, and the matches under "matches": what ``save_report`` takes."""
        return {task: {**curves, "matches": self.matches[task]} for task, curves in self.curves.items()}


def evaluate_results(
    gt: GroundTruth,
    results: str | os.PathLike | Sequence[dict[str, Any]],
    *,
    iou_types: Sequence[str] | None = None,
    max_dets: int | None = None,
    ap_fixed: bool = False,
    detections_per_category: int = 10000,
    segm_area: str = "official",
    skip_invalid: bool = False,
    boundary_dilation_ratio: float = 0.02,
    num_threads: int | None = None,
    progress: bool = False,
) -> Evaluation:
    """Evaluates results as the LVIS API would (COCO ground truth: as pycocotools).

    Args:
        gt: ground truth, with masks where ``iou_types`` has "segm" or "boundary".
        results: path of a results file (see :func:`lt_det.evaluation.read_results`), or a list of result dicts.
        iou_types: of "bbox", "segm", "boundary"; None: what the first result carries.
        max_dets: detections an image (LVIS, default 300), or an image and category (COCO, default 100).
        ap_fixed: add AP-fixed and AP-pool with ``detections_per_category`` over the data set and no cap by image.
        segm_area: what sorts a detected mask into small, medium, large, and drops it when 0. "official": the rule of
            the official API, the box's area when the results carry boxes, else the mask's; or "mask" (Detectron2's
            evaluator), or "box".
        skip_invalid: leave out results that cannot be evaluated; otherwise they raise.
        num_threads: for matching; by default the number of processors that this process may use, at most 8.
        progress: show progress bars.

    Raises:
        InvalidResultsError: results that cannot be evaluated, counted by kind.
        ValueError: an argument is wrong, or the file is not a results file.
    """
    parts, source = parts_of(results, gt, progress)
    collector = ResultCollector(gt, iou_types, segm_area, source=source)
    for part in parts:
        collector.add(part)
    collector.check(skip_invalid)
    if not collector.num_results:
        logger.warning("%s holds no results: every annotation counts as missed.", source)
    max_dets = max_dets or (300 if gt.federated else 100)
    matches = collector.match(
        max_dets=max_dets,
        per_category=detections_per_category if ap_fixed else None,
        boundary_ratio=boundary_dilation_ratio,
        num_threads=num_threads or min(usable_cores(), 8),
        progress=progress,
    )
    metrics: OrderedDict[str, OrderedDict[str, float]] = OrderedDict()
    curves = {}
    for task in collector.iou_types:
        metrics[task], curves[task] = summarize(gt, matches[task], max_dets)
    return Evaluation(gt, metrics, curves, matches, collector.num_results, dict(collector.problems))


def parts_of(results, gt: GroundTruth, progress: bool) -> tuple[Iterable[ResultPart], str]:
    """Results in parts, and what messages call them: a path, or dicts in memory."""
    if isinstance(results, (str, os.PathLike)):
        return read_results(results, category_ids=gt.category_ids, progress=progress), os.fspath(results)
    return [results_from_dicts(results)], "the results"
