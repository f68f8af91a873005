"""Plots of an evaluation. matplotlib is imported here, without a display."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lt_det.frequency import CURVE_NAMES, FREQUENCY_GROUPS, GROUP_COLOURS
from lt_det.io import write_atomically

from .ground_truth import GroundTruth
from .matching import RECALL_THRESHOLDS
from .metrics import Accumulated

__all__ = ["plot_ap_against_count", "plot_groups", "plot_precision_recall", "save_plots"]


def save_plots(
    output_dir: str,
    gt: GroundTruth,
    results: Mapping[str, Mapping[str, float]],
    details: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    """Writes groups.png, and ap_by_count_<task>.png and precision_recall_<task>.png of each task; their paths."""
    figures = {"groups.png": plot_groups(results)}
    for task, parts in details.items():
        if (gt.image_count > 0).any():
            figures[f"ap_by_count_{task}.png"] = plot_ap_against_count(gt, parts["main"], task)
        figures[f"precision_recall_{task}.png"] = plot_precision_recall(gt, parts["main"], task)
    paths = []
    for name, figure in figures.items():
        path = os.path.join(output_dir, name)
        write_atomically(path, lambda f, figure=figure: FigureCanvasAgg(figure).print_png(f), mode="wb")
        paths.append(path)
    return paths


def plot_groups(results: Mapping[str, Mapping[str, float]]) -> Figure:
    """Bars of AP by frequency group, one cluster a task."""
    groups = [("", "AP")] + [(g, f"AP{g}") for g in FREQUENCY_GROUPS]
    figure = Figure(figsize=(2.2 + 1.9 * len(results), 3.4), layout="constrained")
    axes = figure.add_subplot()
    for j, (group, key) in enumerate(groups):
        values = np.array([metrics[key] for metrics in results.values()], float)
        place = np.arange(len(results)) + (j - 1.5) * 0.2
        bars = axes.bar(place, np.nan_to_num(values), 0.19, color=GROUP_COLOURS[group], label=CURVE_NAMES[group])
        axes.bar_label(bars, ["-" if np.isnan(v) else f"{v:.1f}" for v in values], fontsize=8)
    axes.set_xticks(range(len(results)), list(results))
    axes.set_ylabel("AP (%)")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def plot_ap_against_count(gt: GroundTruth, result: Accumulated, task: str) -> Figure:
    """AP of every category against its number of training images, and medians of about a twelfth of the categories."""
    ap = 100 * result.per_category_ap()
    known = ~np.isnan(ap) & (gt.image_count > 0)
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for index, group in [(-1, "")] + list(enumerate(FREQUENCY_GROUPS)):
        part = known & (gt.group == index)
        if part.any():
            axes.scatter(
                gt.image_count[part], ap[part], s=9, alpha=0.5, lw=0, color=GROUP_COLOURS[group],
                label=f"{CURVE_NAMES[group] if group else 'no group'} ({part.sum()}): mean {ap[part].mean():.1f}",
            )  # fmt: skip
    x, y = gt.image_count[known], ap[known]
    edges = np.unique(np.quantile(x, np.linspace(0, 1, 13)))
    if len(edges) > 4:  # otherwise there are too few different counts for a trend
        place = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, len(edges) - 2)
        # Between two quantiles there need not be a category.
        middle = [(np.median(x[place == i]), np.median(y[place == i])) for i in np.unique(place)]
        axes.plot(*zip(*middle), color="black", lw=1.2, marker=".", label="median")
    axes.set_xscale("log")
    axes.set_ylim(-2, 102)
    axes.set_xlabel("training images of the category")
    axes.set_ylabel(f"{task} AP (%)")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def plot_precision_recall(gt: GroundTruth, result: Accumulated, task: str) -> Figure:
    """Interpolated precision over recall, mean over the categories of each group, at IoU 0.5 and over all
    thresholds."""
    figure = Figure(figsize=(7.6, 3.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, thresholds, title in (
        (panels[0], slice(0, 1), "IoU 0.5"),
        (panels[1], slice(None), "IoU 0.5:0.95"),
    ):
        for group in ("",) + FREQUENCY_GROUPS:
            members = gt.members(group) & (result.recall[0, :, 0] >= 0)
            if members.any():
                curve = result.precision[thresholds][:, :, members, 0].mean(axis=(0, 2))
                style = {"lw": 2, "ls": "--"} if not group else {"lw": 1.6}
                label = f"{CURVE_NAMES[group]}: {100 * curve.mean():.1f}"
                axes.plot(RECALL_THRESHOLDS, curve, color=GROUP_COLOURS[group], label=label, **style)
        axes.set_title(f"{task}, {title}", fontsize=10)
        axes.set_xlabel("recall")
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("precision")
    panels[0].set_ylim(0, 1.02)
    return figure
