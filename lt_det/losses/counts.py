"""The class counts of a run: sources, minimum, and what is said of classes without any. One place for all who ask."""

from __future__ import annotations

from typing import Any

import numpy as np

COUNT_SOURCES = ("image_count", "instance_count", "sampled")


def class_counts(
    statistics: Any,
    source: str,
    *,
    num_classes: int | None = None,
    min_count: float = 0.0,
    allow_zero: bool = False,
    wanted_by: str = "",
) -> np.ndarray:
    """(K,) float64 counts of the foreground classes, the prior of a loss or of a calibrator but for its scale.

    Args:
        statistics: a ``ClassStatistics``, or an object with ``image_count``, ``instance_count``, ``sampled_count`` (or
            ``prior("sampled")``) and ``names``.
        source: "image_count", "instance_count", or "sampled": the shares of the classes under the training sampler,
            times the number of instances.
        num_classes: what K must be.
        min_count: counts below it are raised to it.
        allow_zero: counts of 0 are no error.
        wanted_by: the loss or calibrator, which begins the error.

    Raises:
        ValueError: for an unknown source, counts that the statistics lack or that cannot be, another number of
            classes, or classes with a count of 0: one line with the remedy.
    """
    begin = f"{wanted_by}: " if wanted_by else ""
    if source not in COUNT_SOURCES:
        raise ValueError(f"{begin}unknown prior source {source!r}; choose one of {', '.join(COUNT_SOURCES)}")
    if not (np.isfinite(min_count) and min_count >= 0):
        raise ValueError(f"{begin}min_count must be finite and not negative, got {min_count}")
    counts = _counts_of(statistics, source)
    if counts is None:
        remedy = {
            "instance_count": "read the annotation file with ClassStatistics.from_json (Detectron2's built-in "
            "LVIS metadata has image counts alone), or take 'image_count'",
            "sampled": "statistics.with_sampled_counts(lt_det.data.expected_counts(...)) adds those of a sampler",
        }
        raise ValueError(f"{begin}the class statistics have no {source!r} counts: {remedy[source]}")
    if num_classes is not None and counts.shape != (num_classes,):
        raise ValueError(
            f"{begin}class statistics ({source}) have shape {counts.shape}, but MODEL.ROI_HEADS.NUM_CLASSES is "
            f"{num_classes}"
        )
    if not np.isfinite(counts).all() or (counts < 0).any():
        raise ValueError(f"{begin}class statistics ({source}) hold negative or non-finite counts")
    counts = np.maximum(counts, min_count)
    if not allow_zero and (counts == 0).any():
        indices = np.flatnonzero(counts == 0)
        names = getattr(statistics, "names", None)
        shown = ", ".join(str(i) if names is None else f"{i} ({names[i]})" for i in indices[:10])
        more = f" and {len(indices) - 10} more" if len(indices) > 10 else ""
        raise ValueError(
            f"{begin}classes without training data ({source} is 0) have no prior: {shown}{more}. Remove them, or set "
            "MODEL.LONG_TAIL.MIN_COUNT (min_count) to a positive number, which their counts are raised to"
        )
    return counts


def _counts_of(statistics: Any, source: str) -> np.ndarray | None:
    """The counts as the statistics state them; None where they do not."""
    if source != "sampled":
        counts = getattr(statistics, source)
        return None if counts is None else np.asarray(counts, dtype=np.float64)
    if hasattr(statistics, "sampled_count"):
        sampled = statistics.sampled_count
        if sampled is None:
            return None
        shares = np.asarray(sampled, dtype=np.float64)
        shares = shares / max(shares.sum(), np.finfo(np.float64).tiny)
    else:
        shares = np.asarray(statistics.prior("sampled"), dtype=np.float64)
    instances = statistics.instance_count
    return shares * (np.sum(sampled) if instances is None else np.sum(instances, dtype=np.float64))
