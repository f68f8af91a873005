"""What a process of a model's evaluation does with an image, and keeps of it: match flags, scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .ground_truth import GroundTruth
from .matching import Matches, match_detections
from .metrics import add_cell_caps
from .predictions import ImagePredictions
from .submission import format_results

__all__ = ["ImagePredictions", "ImageResult", "ImageWork", "ScoreLog", "match_image"]


def rank_in_image(score: np.ndarray) -> np.ndarray:
    """(n,) place of each detection by descending score, ties as they came."""
    rank = np.empty(len(score), np.int64)
    rank[np.argsort(-score, kind="stable")] = np.arange(len(score))
    return rank


def match_image(
    gt: GroundTruth,
    predictions: ImagePredictions,
    iou_types: Sequence[str],
    max_dets: int,
    counts: tuple[np.ndarray, np.ndarray] | None,
    segm_area: str = "mask",
    boundary_ratio: float = 0.02,
) -> tuple[dict[str, Matches], np.ndarray]:
    """Matches one image.

    Args:
        counts: encodings of the masks of ``predictions.mask_index``; needed by "segm" and "boundary". Every detection
            in a ground-truth cell must have one.
        segm_area: "mask" or "box", what decides the area range of a mask.

    Returns:
        Matches by IoU type, and (n, 2) bool: whether the detection has no area as a box, as a mask.
    """
    n = len(predictions.score)
    image = np.full(n, predictions.image, np.int64)
    box_area = predictions.boxes[:, 2] * predictions.boxes[:, 3]
    empty = np.zeros((n, 2), bool)
    empty[:, 0] = ~((box_area > 0) & (box_area < np.inf))
    in_cap = rank_in_image(predictions.score) < max_dets
    if counts is not None:
        from ._rle_kernels import areas

        mask_area = np.zeros(n, np.float64)
        mask_area[predictions.mask_index] = areas(*counts)
        empty[predictions.mask_index, 1] = mask_area[predictions.mask_index] == 0
    out = {}
    for iou_type in iou_types:
        if iou_type == "bbox":
            part = slice(None)
            arguments = {"boxes": predictions.boxes, "area": box_area}
        else:
            part = predictions.mask_index
            arguments = {
                "mask_counts": counts,
                "area": (mask_area if segm_area == "mask" else box_area)[part],
            }
        matches = match_detections(
            gt,
            iou_type,
            image=image[part],
            category=predictions.category[part],
            score=predictions.score[part],
            caps={"image": in_cap[part]} if gt.federated else {},
            boundary_ratio=boundary_ratio,
            **arguments,
        )
        if not gt.federated:
            add_cell_caps(matches, max_dets)
        out[iou_type] = matches
    return out, empty


@dataclass
class ImageResult:
    """What :class:`ImageWork` makes of one image.

    Attributes:
        matches: by IoU type; {} where the ground truth has no annotations.
        empty: (n, 2) bool, see :func:`match_image`; None likewise.
        lines: detections as json, see :func:`format_results`; None unless asked for.
    """

    matches: dict[str, Matches]
    empty: np.ndarray | None
    lines: bytes | None


@dataclass(frozen=True)
class ImageWork:
    """Encodes and matches one image: a function of its predictions alone.

    Attributes:
        gt: the ground truth.
        box_types: IoU types of predictions without masks. mask_types: of predictions with masks.
        max_dets, segm_area, boundary_ratio: see :func:`match_image`.
        mask_threshold: see :meth:`ImagePredictions.encode`.
        write_lines: format the detections for a results file too.
    """

    gt: GroundTruth
    box_types: Sequence[str]
    mask_types: Sequence[str]
    max_dets: int
    segm_area: str
    mask_threshold: float
    boundary_ratio: float
    write_lines: bool

    def __call__(self, predictions: ImagePredictions) -> ImageResult:
        gt = self.gt
        height, width = gt.image_sizes[predictions.image].tolist()
        counts, iou_types = None, self.box_types
        if predictions.mask_index is not None:
            counts, iou_types = predictions.encode(height, width, self.mask_threshold), self.mask_types
        lines = None
        if self.write_lines:
            lines = format_results(gt, predictions, counts, (height, width))
        matches, empty = {}, None
        if gt.num_annotations:
            matches, empty = match_image(
                gt, predictions, iou_types, self.max_dets, counts, self.segm_area, self.boundary_ratio
            )
        return ImageResult(matches, empty, lines)


class ScoreLog:
    """Scores of all detections, for the cap of AP-fixed: so many a category over the whole data set.

    The cap counts detections that the federated rules drop later. What cannot be among the best of its category any
    more is forgotten, so that memory stays bounded.
    """

    def __init__(self, per_category: int, max_entries: int = 1 << 22):
        self.per_category = per_category
        self.max_entries = max_entries
        self._parts: list[tuple] = []
        self._size = 0
        self._limit = max_entries

    def add(self, image: np.ndarray, category: np.ndarray, score: np.ndarray, empty: np.ndarray) -> None:
        """image, category (n,) ranks; score (n,); empty (n, 2) as of :func:`match_image`."""
        self._parts.append((image.astype(np.int32), category.astype(np.int32), score, empty))
        self._size += len(score)
        if self._size > self._limit:
            self._parts = [self.best()]
            self._size = len(self._parts[0][0])
            self._limit = max(self.max_entries, 2 * self._size)

    def best(self) -> tuple:
        """The entries within the cap: image, category, score, empty. Ties: the lower image rank first."""
        if not self._parts:
            none = np.zeros(0, np.int32)
            return none, none, np.zeros(0), np.zeros((0, 2), bool)
        columns = tuple(np.concatenate(c) for c in zip(*self._parts))
        image, category, score, _ = columns
        order = np.lexsort((image, -score, category))
        sorted_category = category[order]
        first = np.searchsorted(sorted_category, sorted_category, side="left")
        order = order[np.arange(len(order)) - first < self.per_category]
        order.sort()
        return tuple(c[order] for c in columns)

    @staticmethod
    def add_cap(best: tuple, matches: Matches, num_categories: int, masks: bool) -> None:
        """Adds the "category" cap to ``matches`` from what :meth:`best` gave for all images."""
        image, category, _, empty = best
        counted = ~empty[:, int(masks)]
        key = image[counted].astype(np.int64) * num_categories + category[counted]
        unique, count = np.unique(key, return_counts=True)
        cell = matches.image.astype(np.int64) * num_categories + matches.category
        place = np.minimum(np.searchsorted(unique, cell), max(len(unique) - 1, 0))
        found = unique[place] == cell if len(unique) else np.zeros(len(cell), bool)
        kept = np.zeros(len(cell), np.int32)
        kept[found] = count[place[found]]
        matches.prefix["category"] = kept
