"""Bar charts of AP by frequency group."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

GROUPS = {"AP": "all", "APr": "rare", "APc": "common", "APf": "frequent"}


def plot_frequency_groups(
    rows: Sequence[tuple[str, Mapping[str, float]]], path: str | Path, *, title: str = ""
) -> None:
    """Draw AP over all, rare, common and frequent categories, with a bar for each row.

    Args:
        rows: (name, metrics) pairs; metrics hold ``AP``, ``APr``, ``APc``, ``APf`` in percent, NaN or None for a group
            without categories (drawn as "n/a").
        path: of the picture; its suffix gives the format.
        title: above the chart.
    """
    # The object interface: a plot must not depend on, or change, the user's pyplot state and backend.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(rows)
    for i, (name, metrics) in enumerate(rows):
        values = [float("nan") if metrics.get(key) is None else metrics[key] for key in GROUPS]
        x = [j + (i - (len(rows) - 1) / 2) * width for j in range(len(GROUPS))]
        bars = axes.bar(x, [0.0 if math.isnan(v) else v for v in values], width * 0.92, label=name, zorder=2)
        axes.bar_label(bars, labels=["n/a" if math.isnan(v) else f"{v:.1f}" for v in values], fontsize=8, padding=2)
    axes.set_xticks(range(len(GROUPS)), [f"{key}\n({group})" for key, group in GROUPS.items()])
    axes.set_ylabel("AP (%)")
    axes.set_title(title)
    axes.margins(y=0.12)
    axes.grid(axis="y", alpha=0.3, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
