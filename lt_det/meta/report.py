"""Learned class rates for people: by group, in a line, in a table, in a picture."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lt_det.data import ClassStatistics, group_letters
from lt_det.frequency import GROUP_COLOURS, GROUP_NAMES
from lt_det.io import write_atomically

__all__ = ["plot_rates", "rates_by_group", "summary_of_rates", "write_rates"]

# For those who cannot tell the colours apart.
_MARKERS = {"r": "o", "c": "s", "f": "^"}


def rates_by_group(rates: Tensor, statistics: ClassStatistics) -> dict[str, float]:
    """Mean rate of each frequency group that has classes, by the letters ``r``, ``c``, ``f``."""
    groups = statistics.frequency_groups
    return {g: rates[torch.as_tensor(np.asarray(groups[g]))].mean().item() for g in GROUP_NAMES if len(groups[g])}


def summary_of_rates(rates: Tensor, statistics: ClassStatistics) -> str:
    """One line: group means, and the classes at both ends."""
    means = ", ".join(f"{GROUP_NAMES[g]} {rate:.3f}" for g, rate in rates_by_group(rates, statistics).items())
    order = rates.argsort().tolist()
    names = statistics.names
    low, high = ([f"{names[i]} {rates[i]:.3f}" for i in ends] for ends in (order[:3], order[:-4:-1]))
    return f"mean rates: {means} (all began at 0.500); highest {', '.join(high)}; lowest {', '.join(low)}"


def write_rates(rates: Tensor, statistics: ClassStatistics, path: str | os.PathLike) -> None:
    """Write a csv with a row for each class: index, name, group, image_count, instance_count, rate."""
    letters = group_letters(statistics.frequency_groups, len(rates))
    names = statistics.names

    def write(file):
        table = csv.writer(file)
        table.writerow(["class", "name", "frequency", "image_count", "instance_count", "rate"])
        for i, rate in enumerate(rates.tolist()):
            # The metadata of Detectron2's LVIS v1 has image counts alone.
            instances = "" if statistics.instance_count is None else int(statistics.instance_count[i])
            table.writerow([i, names[i], letters[i], int(statistics.image_count[i]), instances, f"{rate:.6f}"])

    write_atomically(path, write, mode="w")


def plot_rates(rates: Tensor, statistics: ClassStatistics, path: str | os.PathLike) -> np.ndarray:
    """Draw the rates against the training image counts, both logarithmic.

    Returns:
        The picture, ``(3, H, W)`` uint8.
    """
    # The object interface: a plot must not depend on, or change, the user's pyplot state and backend.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    values = rates.double().numpy()
    for group, indices in statistics.frequency_groups.items():
        if len(indices):
            counts = np.maximum(np.asarray(statistics.image_count)[indices], 1)  # a class without images stands at 1
            axes.plot(
                counts,
                values[indices],
                _MARKERS[group],
                color=GROUP_COLOURS[group],
                ms=4,
                alpha=0.7,
                label=f"{GROUP_NAMES[group]} ({len(indices)})",
            )
    axes.axhline(0.5, color="0.5", lw=0.8, ls="--", label="start")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="training images with the class",
        ylabel="learned rate",
        title="Class rates",
    )
    axes.legend(fontsize=8)
    write_atomically(path, lambda file: figure.savefig(file, format=Path(path).suffix[1:] or "png"), mode="wb")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].transpose(2, 0, 1).copy()
