"""What an evaluation writes: tables, json, csv, match flags, plots, TensorBoard scalars."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from lt_det.io import write_atomically, write_csv_atomically, write_json_atomically

from .ground_truth import GroundTruth
from .matching import Matches, main_cap

__all__ = ["format_metrics", "per_category_rows", "save_report", "write_metrics", "write_tensorboard"]


def format_metrics(results: Mapping[str, Mapping[str, float]]) -> str:
    """Tables for the log: one row an IoU type, percent, "-" where there is nothing to average."""
    from tabulate import tabulate

    blocks = []
    for suffix in ("", "-fixed", "-pool"):
        columns: list[str] = []
        for metrics in results.values():
            columns += [k for k in metrics if _suffix(k) == suffix and k not in columns]
        if columns:
            rows = [[task] + [_percent(metrics.get(k)) for k in columns] for task, metrics in results.items()]
            names = [c[: len(c) - len(suffix)] if suffix else c for c in columns]
            title = {"": "", "-fixed": "AP-fixed (10,000 detections a category)\n", "-pool": "AP-pool\n"}[suffix]
            table = tabulate(rows, headers=[""] + names, tablefmt="pipe", disable_numparse=True, stralign="right")
            blocks.append(title + table)
    return "\n\n".join(blocks)


def _suffix(key: str) -> str:
    return next((s for s in ("-fixed", "-pool") if key.endswith(s)), "")


def _percent(value) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.2f}"


def write_metrics(path: str, results: Mapping[str, Mapping[str, float]]) -> None:
    """metrics.json: the metrics in percent, ``null`` in place of NaN."""
    numbers = {task: {k: float(v) for k, v in metrics.items()} for task, metrics in results.items()}
    write_json_atomically(path, numbers, indent=2)


def per_category_rows(gt: GroundTruth, details: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One dict a category: name, group, training counts, and by task AP, AP50, AR, AP-fixed and detections.

    ``details`` is by task what :func:`lt_det.evaluation.metrics.summarize` gave, with the matches under "matches". AP
    and AR are in percent, "" without annotations. Detections are those that count: in the image's cap and in an image
    that says something about the category.
    """
    gt_count = np.bincount(gt.annotation_category, minlength=gt.num_categories)
    rows: list[dict[str, Any]] = []
    columns: dict[str, np.ndarray] = {}
    for task, parts in details.items():
        columns[f"{task}_AP"] = parts["main"].per_category_ap()
        columns[f"{task}_AP50"] = parts["main"].per_category_ap(0.5)
        columns[f"{task}_AR"] = parts["main"].per_category_ar()
        if "fixed" in parts:
            columns[f"{task}_AP-fixed"] = parts["fixed"].per_category_ap()
        matches: Matches = parts["matches"]
        columns[f"{task}_detections"] = matches.count_by_category(gt.num_categories, main_cap(matches))
    for k in range(gt.num_categories):
        row: dict[str, Any] = {
            "category_id": int(gt.category_ids[k]),
            "name": gt.category_names[k],
            "group": gt.group_of(k),
            "image_count": int(gt.image_count[k]) if gt.image_count[k] >= 0 else "",
            "instance_count": int(gt.instance_count[k]) if gt.instance_count[k] >= 0 else "",
            "annotations": int(gt_count[k]),
        }
        for name, values in columns.items():
            value = values[k]
            if name.endswith("_detections"):
                row[name] = int(value)
            else:
                row[name] = "" if np.isnan(value) else round(100 * float(value), 4)
        rows.append(row)
    return rows


def save_report(
    output_dir: str,
    gt: GroundTruth,
    results: Mapping[str, Mapping[str, float]],
    details: Mapping[str, Mapping[str, Any]],
    *,
    plots: bool = False,
) -> None:
    """Writes metrics.json, per_category.csv, matches_<task>.npz (for compare_lvis) and, if asked, plots."""
    write_metrics(os.path.join(output_dir, "metrics.json"), results)
    rows = per_category_rows(gt, details)
    write_csv_atomically(os.path.join(output_dir, "per_category.csv"), rows, list(rows[0]))
    for task, parts in details.items():
        save_matches(os.path.join(output_dir, f"matches_{task}.npz"), gt, parts["matches"])
    if plots:
        from .plots import save_plots

        save_plots(output_dir, gt, results, details)


def save_matches(path: str, gt: GroundTruth, matches: Matches) -> None:
    """Match flags with dataset ids, so that they stay readable without this run."""
    columns = {
        "scores": matches.scores,
        "flags": matches.flags,
        "image_id": gt.image_ids[matches.image],
        "category_id": gt.category_ids[matches.category],
        "count": matches.count,
    }
    columns.update({f"prefix_{name}": value for name, value in matches.prefix.items()})
    write_atomically(path, lambda f: np.savez_compressed(f, **columns), mode="wb")


def write_tensorboard(log_dir: str, results: Mapping[str, Mapping[str, float]], step: int = 0) -> None:
    """Writes every metric that is not NaN as the scalar ``<task>/<metric>``, named as Detectron2's EvalHook does."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(log_dir) as writer:
        for task, metrics in results.items():
            for key, value in metrics.items():
                if not math.isnan(value):
                    writer.add_scalar(f"{task}/{key}", value, step)
