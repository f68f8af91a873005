"""From a run, or two, to the page and the thresholds beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lt_det.evaluation import GroundTruth
from lt_det.evaluation.calibration import write_thresholds
from lt_det.evaluation.compare import compare_runs
from lt_det.evaluation.errors import name_detections

from .evaluation import Run, classifier_norms, detections_of, image_files, image_summary, read_run
from .evaluation_page import evaluation_page
from .pictures import draw_pair

__all__ = ["thresholds_path", "write_report"]

Weights = tuple[Mapping[str, Any], Sequence[str] | None]  # state dict; names of its classes


def thresholds_path(output: str) -> str:
    """The csv of thresholds that is written beside a page."""
    return os.path.splitext(output)[0] + "_thresholds.csv"


def write_report(
    gt: GroundTruth,
    paths: Sequence[str],
    output: str,
    *,
    annotations: str = "",
    image_root: str = "",
    weights: Sequence[Weights | None] = (),
    iou_type: str = "",
    images: int = 6,
    replicates: int = 1000,
    title: str = "",
    progress: bool = False,
) -> list[Run]:
    """Write the page of one run or of two, and the csv of thresholds (of the last) beside it.

    Args:
        gt: the ground truth, with masks where the runs have any.
        paths: one or two of what :func:`~lt_det.report.evaluation.read_run` takes.
        output: the page's path.
        annotations, image_root: the json and the folder of the images, for pictures; without them there are none.
        weights: of each run, a model's state dict and the names of its classes (None: those of ``gt``, by id).
        iou_type: what charts are about, "bbox" or "segm"; by default masks where all runs have them.
        images: how many of the worst, and of the best, are shown.
        replicates: draws of the bootstrap that compares two runs.
        title: of the page.
        progress: show progress bars.

    Raises:
        FileNotFoundError, ValueError: what is named cannot be read, or does not belong together.
    """
    if len(paths) not in (1, 2):
        raise ValueError(f"a report is of one run, or of two side by side; {len(paths)} were named.")
    runs = [read_run(gt, path, progress=progress) for path in paths]
    shared = [t for t in ("segm", "bbox") if all(t in run.matches for run in runs)]
    main = iou_type or (shared[0] if shared else "")
    if main not in shared:
        have = " and ".join(", ".join(run.matches) for run in runs)
        raise ValueError(f"a report of {main or 'bbox or segm'} needs it of all runs; they have {have}.")
    if main == "segm" and gt.masks is None:
        raise ValueError("a report of masks needs the ground truth with its masks.")
    for run in runs:
        run.analyse(gt, main, progress=progress)
    for run, one in zip(runs, weights):
        if one is not None:
            run.norms = classifier_norms(one[0], gt, one[1])
    comparisons = None
    if len(runs) == 2:
        comparisons = {
            task: compare_runs(
                gt, runs[0].matches[task], runs[1].matches[task], replicates=replicates, progress=progress
            )
            for task in shared
        }
    pictures, reason = _pictures(gt, runs[-1], annotations, image_root, images)
    page = evaluation_page(
        gt, runs, comparisons=comparisons, pictures=pictures, title=title, without_pictures=reason
    )  # fmt: skip
    page.write(output)
    write_thresholds(thresholds_path(output), runs[-1].thresholds)
    return runs


def _pictures(gt: GroundTruth, run: Run, annotations: str, root: str, number: int):
    """Pictures by heading, or why there are none."""
    if not run.results:
        return {}, "Pictures need the detections: evaluate with TEST.REPORT True, or name the results file."
    if not (annotations and root):
        return {}, "Pictures need the images: name their folder (--image-root)."
    summary = image_summary(gt, run)
    worst, best = summary.worst(number), summary.best(number)
    best = [i for i in best if i not in worst]
    chosen = worst + best
    ids = gt.image_ids[chosen].tolist()
    files = image_files(annotations, root, ids)
    if not files:
        return {}, f"None of the images that are to be shown is in {root}."
    threshold = dict(zip(gt.category_ids.tolist(), run.threshold.tolist()))
    shown = [
        r for r in detections_of(gt, run.results, ids) if r["score"] >= threshold.get(r["category_id"], np.inf)
    ]  # fmt: skip
    if run.main == "segm":
        shown = [r for r in shown if "segmentation" in r]
    found = name_detections(gt, shown, iou_type=run.main)
    out = {}
    for heading, some in (("Worst", worst), ("Best", best)):
        out[f"{heading} images by F1. Left the annotations (red: missed), right the detections above their category's "
            "threshold (red: wrong, with the kind of error; grey: nothing is known about them)."] = [
            (draw_pair(gt, i, files[image], found), _caption(summary, i, image))
            for i in some
            if (image := int(gt.image_ids[i])) in files
        ]  # fmt: skip
    return out, ""


def _caption(summary, i: int, image: int) -> str:
    return (
        f"Image {image}: {int(summary.right[i])} of {int(summary.objects[i])} objects found, wrong detections: "
        f"{int(summary.wrong[i])}, F1 {100 * summary.f1[i]:.0f}."
    )
