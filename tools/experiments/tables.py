"""Tables of results over seeds: mean, sample standard deviation, and differences paired by seed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from tabulate import tabulate

COLUMNS = ("AP", "APr", "APc", "APf")
UNCAPPED = ("AP-fixed", "APr-fixed", "AP-pool")


def mean_and_deviation(values: Sequence[float | None], *, sign: bool = False) -> str:
    """``"34.1 ± 0.1"``; of one value without a deviation; "-" where there is none."""
    known = [v for v in values if v is not None]
    if not known:
        return "-"
    text = f"{statistics.mean(known):{'+' if sign else ''}.1f}"
    return text + (f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else "")


def paired(row: dict, baseline: dict, task: str, metric: str) -> list[float | None]:
    """Differences of a metric to the baseline's, for the seeds that both have."""
    theirs = dict(zip(baseline["seeds"], baseline[task][metric]))
    pairs = [(ours, theirs[s]) for s, ours in zip(row["seeds"], row[task][metric]) if s in theirs]
    return [None if None in pair else pair[0] - pair[1] for pair in pairs]


def results_table(rows: Sequence[dict], *, baseline: str = "softmax + RFS", columns: Sequence[str] = COLUMNS) -> str:
    """The Markdown table of ``methods.json``'s rows, with what each adds to the baseline, paired by seed.

    AP-fixed and AP-pool, and the accuracy of the classifier on ground-truth boxes by group, where they were measured.
    """
    base = next((row for row in rows if row["method"] == baseline), None)
    uncapped = [m for m in UNCAPPED if any(v is not None for row in rows for v in row["segm"].get(m, ()))]
    headers = ["method", "seeds", *(f"mask {m}" for m in columns), "box AP", *(f"mask {m}" for m in uncapped)]
    groups = ("r", "c", "f") if any("box_accuracy" in row for row in rows) else ()
    headers += [f"accuracy {group}" for group in groups]
    headers += ["AP - baseline", "APr - baseline"] if base else []
    cells = []
    for row in rows:
        line = [row["method"], len(row["seeds"]), *(mean_and_deviation(row["segm"][m]) for m in columns)]
        line += [mean_and_deviation(row["bbox"]["AP"])]
        line += [mean_and_deviation(row["segm"].get(m, ())) for m in uncapped]
        accuracy = row.get("box_accuracy", {})
        line += [mean_and_deviation(accuracy.get(group, ())) for group in groups]
        if base:
            same = row is base
            line += ["" if same else mean_and_deviation(paired(row, base, "segm", m), sign=True) for m in ("AP", "APr")]
        cells.append([*line, "-" if row["seconds"] is None else f"{row['seconds'] / 60:.1f}"])
    return tabulate(cells, headers=[*headers, "minutes"], tablefmt="github", disable_numparse=True)
