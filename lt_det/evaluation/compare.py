"""Two runs side by side, with a paired bootstrap over images."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from lt_det.processes import usable_cores
from lt_det.progress import progress_bar

from .ground_truth import AREA_RANGES, FREQUENCY_GROUPS, GroundTruth
from .matching import IOU_THRESHOLDS, IOU_TYPES, RECALL_THRESHOLDS, Matches, main_cap
from .metrics import accumulate

__all__ = ["Comparison", "bootstrap_ap", "compare_runs", "load_matches", "load_run_matches"]


def load_matches(path: str | os.PathLike, gt: GroundTruth) -> Matches:
    """Reads a ``matches_<type>.npz`` that an evaluation wrote.

    Raises:
        ValueError: it belongs to other ground truth, or is damaged.
    """
    try:
        content = dict(np.load(path))
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, TypeError) as error:
        raise ValueError(
            f"{os.fspath(path)} is damaged or cut off ({str(error)[:80]}); evaluate the run anew with "
            "tools/evaluate_lvis.py."
        ) from None
    if "image_id" not in content:
        raise ValueError(f"{os.fspath(path)} holds no matches; evaluate the run with tools/evaluate_lvis.py.")
    image, category = gt.image_ranks(content["image_id"]), gt.category_ranks(content["category_id"])
    if (image < 0).any() or (category < 0).any():
        raise ValueError(f"{os.fspath(path)} has images or categories that the annotations have not.")
    return Matches(
        scores=content["scores"],
        flags=content["flags"],
        image=image.astype(np.int32),
        category=category.astype(np.int32),
        count=content["count"],
        prefix={k[len("prefix_") :]: v for k, v in content.items() if k.startswith("prefix_")},
    )


def load_run_matches(path: str, gt: GroundTruth, tasks: Sequence[str] = IOU_TYPES) -> tuple[str, dict[str, Matches]]:
    """The matches by IoU type, of ``tasks``, that an evaluation wrote, and their folder: ``path``, or where that is a
    run's OUTPUT_DIR the ``inference`` in it.

    Raises:
        ValueError: there are none; or see :func:`load_matches`.
    """
    for folder in (path, os.path.join(path, "inference")):
        files = {task: os.path.join(folder, f"matches_{task}.npz") for task in tasks}
        found = {task: load_matches(file, gt) for task, file in files.items() if os.path.isfile(file)}
        if found:
            return folder, found
    raise ValueError(
        f"{path} holds no matches_<type>.npz; name the folder that an evaluation wrote (OUTPUT_DIR/inference), or a "
        "results file."
    )


@dataclass
class Comparison:
    """Result of :func:`compare_runs`; all numbers in percent.

    Attributes:
        groups: by "AP", "APr", "APc", "APf", "AP50": dict of "a", "b", "difference" (b - a), "low", "high" (limits of
            the interval), "error" (standard error of the difference), "p" (two-sided, that there is no difference) and
            "images" (that hold annotations of the group: below some 20 a bootstrap over them says little).
        categories: one dict a category that has annotations, by difference.
        replicates, level: of the bootstrap.
    """

    groups: OrderedDict[str, dict[str, float]]
    categories: list[dict[str, Any]]
    replicates: int
    level: float


def compare_runs(
    gt: GroundTruth,
    a: Matches,
    b: Matches,
    *,
    replicates: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    num_threads: int | None = None,
    progress: bool = False,
) -> Comparison:
    """Compares two runs on the same ground truth.

    Images are drawn with replacement, as many as there are; both runs are evaluated on each draw, so that what makes an
    image easy or hard for both cancels in the difference. Intervals are percentiles of the differences. They tell
    whether another set of images would give the same verdict, not whether another training run would.

    Args:
        a, b: matches of the two runs, of the same IoU type.
        replicates: number of draws. level: of the intervals.
    """
    exact = [accumulate(gt, m, main_cap(m)) for m in (a, b)]
    weights = np.random.default_rng(seed).multinomial(
        gt.num_images, np.full(gt.num_images, 1 / gt.num_images), size=replicates
    )
    ap = [
        bootstrap_ap(gt, m, weights, num_threads=num_threads, progress=f"run {i + 1} of 2" if progress else None)
        for i, m in enumerate((a, b))
    ]
    members = {f"AP{name}": gt.members(name) for name in ("", *FREQUENCY_GROUPS)}
    gt_image, gt_category = gt.annotation_image, gt.annotation_category
    groups: OrderedDict[str, dict[str, float]] = OrderedDict()
    tail = 100 * (1 - level) / 2
    for name in list(members) + ["AP50"]:
        fifty = name == "AP50"
        part = members["AP" if fifty else name]
        point = [100 * e.ap(categories=np.flatnonzero(part), threshold=0.5 if fifty else None) for e in exact]
        draws = [100 * _nanmean(r[:, part, 0] if fifty else r[:, part].mean(axis=2), axis=1) for r in ap]
        difference = draws[1] - draws[0]
        difference = difference[~np.isnan(difference)]
        row: dict[str, float] = {
            "images": len(np.unique(gt_image[part[gt_category]])),
            "a": point[0],
            "b": point[1],
            "difference": point[1] - point[0],
        }
        if len(difference):
            low, high = np.percentile(difference, [tail, 100 - tail])
            below, above = (difference <= 0).sum() + 1, (difference >= 0).sum() + 1
            p = min(1.0, 2 * min(below, above) / (len(difference) + 1))
            row.update(low=float(low), high=float(high), error=float(difference.std()), p=float(p))
        else:
            row.update(low=np.nan, high=np.nan, error=np.nan, p=np.nan)
        groups[name] = row
    return Comparison(groups, _category_rows(gt, exact, ap, tail), replicates, level)


def _category_rows(gt: GroundTruth, exact, ap, tail: float) -> list[dict[str, Any]]:
    point = [100 * e.per_category_ap() for e in exact]
    draws = 100 * (ap[1].mean(axis=2) - ap[0].mean(axis=2))
    annotations = np.bincount(gt.annotation_category, minlength=gt.num_categories)
    rows = []
    for k in np.flatnonzero(~np.isnan(point[0])):
        known = draws[:, k][~np.isnan(draws[:, k])]
        low, high = np.percentile(known, [tail, 100 - tail]) if len(known) else (np.nan, np.nan)
        rows.append(
            {
                "category_id": int(gt.category_ids[k]),
                "name": gt.category_names[k],
                "group": gt.group_of(k),
                "annotations": int(annotations[k]),
                "a": float(point[0][k]),
                "b": float(point[1][k]),
                "difference": float(point[1][k] - point[0][k]),
                "low": float(low),
                "high": float(high),
            }
        )
    return sorted(rows, key=lambda r: r["difference"])


def _nanmean(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean of what is not NaN, NaN where nothing is."""
    known = ~np.isnan(values)
    count = known.sum(axis)
    total = np.where(known, values, 0).sum(axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def bootstrap_ap(
    gt: GroundTruth,
    matches: Matches,
    weights: np.ndarray,
    *,
    num_threads: int | None = None,
    progress: str | None = None,
) -> np.ndarray:
    """AP by category with images counted several times.

    Args:
        weights: (B, I) how often each image counts.

    Returns:
        (B, K, 10 IoU thresholds) float32 AP, 0..1, NaN where a draw has no annotation of the category. A weight of 1
        for all images gives the plain AP. Copies of an image are ranked as one detection of that weight.
    """
    from ._match_kernels import sort_groups, weighted_ap

    cut = matches.cut(main_cap(matches))
    start = np.concatenate([[0], np.cumsum(cut.count_by_category(gt.num_categories))])
    order = np.arange(len(cut.scores), dtype=np.int64)
    sort_groups(order, start, np.ascontiguousarray(cut.scores))
    tp, ignored = (bits[order] & 0x3FF for bits in cut.tp_and_ignored())
    image = np.repeat(cut.image, cut.count)[order].astype(np.int64)
    counts = (gt.areas >= AREA_RANGES[0, 0]) & (gt.areas <= AREA_RANGES[0, 1]) & ~gt.ignore
    gt_image = gt.annotation_image[counts]
    gt_category = gt.annotation_category[counts]
    by_category = np.argsort(gt_category, kind="stable")
    gt_image = np.ascontiguousarray(gt_image[by_category])
    gt_start = np.searchsorted(gt_category[by_category], np.arange(gt.num_categories + 1)).astype(np.int64)
    weights = np.ascontiguousarray(weights, np.int64)
    out = np.empty((len(weights), gt.num_categories, len(IOU_THRESHOLDS)), np.float32)

    def work(i: int) -> None:
        weighted_ap(start, tp, ignored, image, gt_start, gt_image, weights[i], RECALL_THRESHOLDS, out[i])

    with ThreadPoolExecutor(num_threads or min(usable_cores(), 8)) as pool:
        done = pool.map(work, range(len(weights)))
        for _ in progress_bar(done, total=len(weights), desc=progress, show=progress is not None):
            pass
    return out
