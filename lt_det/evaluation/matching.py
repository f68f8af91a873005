"""Matching of detections with ground truth: one sparse pass, of which every metric is a cut.

The greedy matching of the LVIS and COCO APIs handles the detections of an (image, category) cell in descending score
order, and the fate of one does not depend on those after it. Every cap on the number of detections (300 an image,
10,000 a category, 100 a cell) keeps a prefix of that order. So the match is done once, without a cap, and a metric is
defined by the length of the prefix that it takes of each cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from .ground_truth import AREA_RANGES, GroundTruth
from .rle import RleTable

__all__ = ["IOU_THRESHOLDS", "IOU_TYPES", "RECALL_THRESHOLDS", "Matches", "boundary_distance", "match_detections"]

IOU_TYPES = ("bbox", "segm", "boundary")  # what the overlap is of
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALL_THRESHOLDS = np.linspace(0.0, 1.0, 101)

_FLAG_BYTES = 5  # 4 area ranges x 10 thresholds = 40 bits
_MAX_IOUS = 1 << 22  # of one batch: bounds the memory of the IoU table to 32 MB


@dataclass
class Matches:
    """Scores and match flags of the detections in cells that count, 18 bytes a detection.

    Attributes:
        scores: (N,) float64, descending inside each cell.
        flags: (N, 10) uint8: 40 bits "true positive", then 40 bits "ignored", bit ``area range * 10 + IoU threshold``
            of a little-endian integer.
        image, category, count (C,) int32: image rank, category rank, and number of detections of each cell.
        prefix: for each cap by name, how many detections (C,) int32 it leaves of each cell.
    """

    scores: np.ndarray
    flags: np.ndarray
    image: np.ndarray
    category: np.ndarray
    count: np.ndarray
    prefix: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def empty(cls, caps: Sequence[str] = ()) -> Matches:
        none = np.zeros(0, np.int32)
        return cls(np.zeros(0), np.zeros((0, 2 * _FLAG_BYTES), np.uint8), none, none, none, dict.fromkeys(caps, none))

    @classmethod
    def concatenate(cls, parts: Sequence[Matches]) -> Matches:
        if not parts:
            return cls.empty()
        names = ("scores", "flags", "image", "category", "count")
        columns = {name: np.concatenate([getattr(p, name) for p in parts]) for name in names}
        prefix = {cap: np.concatenate([p.prefix[cap] for p in parts]) for cap in parts[0].prefix}
        return cls(**columns, prefix=prefix)

    def tp_and_ignored(self) -> tuple[np.ndarray, np.ndarray]:
        """The flags as two (N,) int64 arrays of 40 bits."""
        out = []
        for begin in (0, _FLAG_BYTES):
            wide = np.zeros((len(self.flags), 8), np.uint8)
            wide[:, :_FLAG_BYTES] = self.flags[:, begin : begin + _FLAG_BYTES]
            out.append(wide.view("<i8")[:, 0].astype(np.int64, copy=False))
        return out[0], out[1]

    def count_by_category(self, num_categories: int, cap: str | None = None) -> np.ndarray:
        """(K,) int64 number of detections that ``cap`` leaves."""
        out = np.zeros(num_categories, np.int64)
        np.add.at(out, self.category, self.count if cap is None else self.prefix[cap])
        return out

    def cut(self, cap: str | None = None) -> Matches:
        """Cells by category, then image, with only the detections that ``cap`` leaves."""
        count = self.count if cap is None else self.prefix[cap]
        order = np.lexsort((self.image, self.category))
        order = order[count[order] > 0]
        start = np.concatenate([[0], np.cumsum(self.count, dtype=np.int64)])[:-1]
        index = ranges(start[order], count[order])
        return replace(
            self,
            scores=self.scores[index],
            flags=self.flags[index],
            image=self.image[order],
            category=self.category[order],
            count=count[order],
            prefix={},
        )


def main_cap(matches: Matches) -> str:
    """The cap of the plain AP: by image (LVIS), or the largest by cell (COCO)."""
    if "image" in matches.prefix:
        return "image"
    return max((c for c in matches.prefix if c.startswith("cell")), key=lambda c: int(c[4:]))


def ranges(start: np.ndarray, count: np.ndarray) -> np.ndarray:
    """``start[0] .. start[0] + count[0] - 1, start[1] ..`` as one int64 array."""
    end = np.cumsum(count, dtype=np.int64)
    total = int(end[-1]) if len(end) else 0
    return np.arange(total, dtype=np.int64) + np.repeat(np.asarray(start, np.int64) - (end - count), count)


def of_cells(values: np.ndarray, cell: np.ndarray) -> np.ndarray:
    """``values[cell]``, and 0 where ``cell`` is -1."""
    out = np.zeros(len(cell), values.dtype)
    known = cell >= 0
    out[known] = values[cell[known]]
    return out


def boundary_distance(sizes: np.ndarray, ratio: float = 0.02) -> np.ndarray:
    """(n,) width in pixels of the boundary region of images of (n, 2) height, width.

    ``ratio`` of the image diagonal, rounded half to even, at least 1 (Cheng et al., CVPR 2021; the official code's
    ``int(round(ratio * diagonal))``).
    """
    sizes = np.asarray(sizes, np.int64).reshape(-1, 2)
    return np.maximum(np.round(ratio * np.sqrt((sizes**2).sum(1))), 1).astype(np.int64)


def match_detections(
    gt: GroundTruth,
    iou_type: str,
    *,
    image: np.ndarray,
    category: np.ndarray,
    score: np.ndarray,
    area: np.ndarray,
    caps: dict[str, np.ndarray],
    boxes: np.ndarray | None = None,
    masks: RleTable | None = None,
    mask_counts: tuple[np.ndarray, np.ndarray] | None = None,
    cell: np.ndarray | None = None,
    boundary_ratio: float = 0.02,
) -> Matches:
    """Matches detections of a batch of whole images.

    Args:
        gt: the ground truth.
        iou_type: "bbox", "segm" or "boundary".
        image, category: (n,) ranks in ``gt``. All detections of an (image, category) cell must come in one call. Their
            order is the order of equal scores.
        score: (n,) float64. area: (n,) float64, square pixels, decides the area range.
        caps: by name, (n,) bool: whether the cap keeps the detection. It must keep the best of each cell.
        boxes: (n, 4) float64 x, y, width, height (iou_type "bbox").
        masks, or mask_counts: the masks, as a table or as flat run lengths and offsets (other types).
        cell: (n,) ground-truth cell of each detection as ``find_cells`` gives it, if already known.

    Detections that say nothing under the rules of the data set are left out.
    """
    from . import _match_kernels as kernels

    if cell is None:
        cell = kernels.find_cells(
            np.ascontiguousarray(image, np.int32),
            np.ascontiguousarray(category, np.int32),
            gt.cell_start,
            gt.cell_category,
            gt.num_categories,
        )
    keep = (cell >= 0) & (area > 0) & (area < np.inf) if gt.federated else np.ones(len(cell), bool)
    kept = np.flatnonzero(keep)
    if len(kept) == 0:
        return Matches.empty(tuple(caps))

    # Order: cells together, in each by descending score, ties as they came.
    key = image[kept].astype(np.int64) * gt.num_categories + category[kept]
    unique, group = np.unique(key, return_inverse=True)
    order, det_start = kernels.group_order(group.ravel().astype(np.int64), len(unique))
    score_kept = np.ascontiguousarray(score[kept], np.float64)
    kernels.sort_groups(order, det_start, score_kept)
    sorted_index = kept[order]
    first = sorted_index[det_start[:-1]]
    gt_cell = cell[first]
    num_gt = of_cells(gt.cell_num_gt, gt_cell)
    num_det = np.diff(det_start)
    parts: list[np.ndarray] = []
    tp = np.zeros(len(sorted_index), np.int64)
    ignored = np.zeros(len(sorted_index), np.int64)
    sorted_area = np.ascontiguousarray(area[sorted_index], np.float64)
    lenient = of_cells(gt.cell_lenient, gt_cell)
    gt_first = of_cells(gt.cell_gt, gt_cell)
    pairs = np.concatenate([[0], np.cumsum(num_det * num_gt)])

    begin = 0
    num_cells = len(unique)
    while begin < num_cells:
        end = int(np.searchsorted(pairs, pairs[begin] + _MAX_IOUS, side="right")) - 1
        end = min(max(end, begin + 1), num_cells)
        cells = slice(begin, end)
        a, b = int(det_start[begin]), int(det_start[end])
        cell_iou = pairs[begin:end] - pairs[begin]
        ious = np.zeros(int(pairs[end] - pairs[begin]), np.float64)
        if len(ious):
            index = sorted_index[a:b]
            cell_det = det_start[begin : end + 1] - a
            if iou_type == "bbox":
                box = np.ascontiguousarray(boxes[index], np.float64)
                kernels.cell_box_ious(cell_det, gt_first[cells], num_gt[cells], cell_iou, box, gt.boxes, gt.crowd, ious)
            else:
                size = gt.image_sizes[unique[cells] // gt.num_categories]
                ious[:] = _mask_ious(
                    gt, iou_type, cell_det, gt_first[cells], num_gt[cells], cell_iou, size, index, masks,
                    mask_counts,
                    len(ious), boundary_ratio,
                )  # fmt: skip
        kernels.match_cells(
            det_start[begin : end + 1] - a,
            gt_first[cells],
            num_gt[cells],
            cell_iou,
            lenient[cells],
            ious,
            sorted_area[a:b],
            gt.areas,
            gt.ignore,
            gt.crowd,
            gt.void,
            IOU_THRESHOLDS,
            AREA_RANGES,
            tp[a:b],
            ignored[a:b],
        )
        begin = end

    for bits in (tp, ignored):
        parts.append(bits.astype("<i8", copy=False).view(np.uint8).reshape(-1, 8)[:, :_FLAG_BYTES])
    prefix = {
        name: np.add.reduceat(kept_by_cap[sorted_index].astype(np.int32), det_start[:-1])
        for name, kept_by_cap in caps.items()
    }
    return Matches(
        scores=score[sorted_index].astype(np.float64, copy=False),
        flags=np.concatenate(parts, axis=1),
        image=(unique // gt.num_categories).astype(np.int32),
        category=(unique % gt.num_categories).astype(np.int32),
        count=num_det.astype(np.int32),
        prefix=prefix,
    )


def _mask_ious(
    gt,
    iou_type,
    cell_det,
    cell_gt,
    cell_num_gt,
    cell_iou,
    size,
    index,
    masks,
    mask_counts,
    num_ious,
    boundary_ratio,
) -> np.ndarray:
    """IoUs of the cells, flat; only detections of cells that have annotations are decoded."""
    from . import _rle_kernels as kernels

    num_det = np.diff(cell_det)
    needed = (cell_num_gt > 0) & (num_det > 0)
    num_det, gt_first, num_gt = num_det[needed], cell_gt[needed], cell_num_gt[needed]
    det_index = index[ranges(cell_det[:-1][needed], num_det)]
    if mask_counts is not None:
        counts, start = _take_counts(*mask_counts, det_index)
    else:
        counts, start = masks.take(det_index).counts()
    gt_index = ranges(gt_first, num_gt)
    gt_counts, gt_start = gt.masks.take(gt_index).counts()
    local_det = np.concatenate([[0], np.cumsum(num_det)])
    local_gt = np.cumsum(num_gt) - num_gt
    height = np.ascontiguousarray(size[needed, 0])
    width = np.ascontiguousarray(size[needed, 1])
    crowd = gt.crowd[gt_index]
    layout = (local_det, local_gt, num_gt, cell_iou[needed])
    det_height, gt_height = np.repeat(height, num_det), np.repeat(height, num_gt)

    def pair_ious(dets, gts):
        (c, s), (gc, gs) = dets, gts
        boxes, gt_boxes = kernels.bounding_boxes(c, s, det_height), kernels.bounding_boxes(gc, gs, gt_height)
        ious = np.zeros(num_ious, np.float64)
        kernels.cell_mask_ious(
            *layout, c, s, kernels.areas(c, s), boxes, gc, gs, kernels.areas(gc, gs), gt_boxes, crowd, ious
        )
        return ious, boxes, gt_boxes

    ious, boxes, gt_boxes = pair_ious((counts, start), (gt_counts, gt_start))
    if iou_type == "boundary":
        distance = boundary_distance(np.stack([height, width], 1), boundary_ratio)
        edges = kernels.boundaries(
            counts, start, boxes, det_height, np.repeat(width, num_det), np.repeat(distance, num_det)
        )
        gt_edges = kernels.boundaries(
            gt_counts, gt_start, gt_boxes, gt_height, np.repeat(width, num_gt), np.repeat(distance, num_gt)
        )
        edge_ious, _, _ = pair_ious(edges, gt_edges)
        # The official code takes the smaller of the two, and the mask IoU alone for crowd annotations.
        if crowd.any():
            is_crowd = np.concatenate([np.tile(crowd[g : g + n], d) for g, n, d in zip(local_gt, num_gt, num_det)])
            edge_ious[is_crowd] = np.inf
        ious = np.minimum(ious, edge_ious)
    return ious


def _take_counts(counts: np.ndarray, start: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    length = start[index + 1] - start[index]
    return counts[ranges(start[index], length)], np.concatenate([[0], np.cumsum(length)])
