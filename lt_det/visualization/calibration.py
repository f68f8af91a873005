"""AP against the strength of a calibrator."""

from __future__ import annotations

import os
from collections.abc import Sequence

from lt_det.io import atomic_path

_LINES = (("AP", "black", "-"), ("APr", "tab:red", "--"), ("APc", "tab:orange", "--"), ("APf", "tab:blue", "--"))
_TITLES = {"bbox": "box", "segm": "mask", "boundary": "boundary"}


def plot_calibration_sweep(
    rows: Sequence[dict], path: str | os.PathLike, *, title: str = "", parameter: str = "value"
) -> None:
    """Draw AP, APr, APc and APf against the value, one panel for each task.

    Args:
        rows: ``{"value": float, task: {"AP": percent, ...}, ...}``, ascending by value.
        path: of the picture; its ending decides the format.
        title: above the panels.
        parameter: name of the value.
    """
    from matplotlib.figure import Figure

    tasks = [key for key in rows[0] if key != "value"]
    figure = Figure(figsize=(5.5 * len(tasks), 4), layout="constrained")
    values = [row["value"] for row in rows]
    for axis, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks):
        for metric, color, style in _LINES:
            axis.plot(values, [row[task][metric] for row in rows], style, color=color, marker="o", ms=4, label=metric)
        axis.set_title(f"{_TITLES.get(task, task)} AP")
        axis.set_xlabel(parameter)
        axis.set_ylabel("percent")
        axis.grid(alpha=0.3)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    if title:
        figure.suptitle(title)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
