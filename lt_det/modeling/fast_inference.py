"""Detectron2's ``fast_rcnn_inference``, to the same detections, without looking at every candidate.

With 1203 classes and a threshold of 1e-4 an image has up to a million candidates (box, class), of which 300 are kept.
Non-maximum suppression decides a class's candidates in the order of their scores, so whether one is kept depends on
higher ones alone: suppression among the m highest of all candidates keeps exactly what suppression among all keeps of
them. m grows until as many are kept as the caller wants.
"""

from __future__ import annotations

import torch
from detectron2.layers import batched_nms
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference_single_image as detectron2_single_image
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torchvision.ops import nms

__all__ = ["fast_rcnn_inference", "fast_rcnn_inference_single_image"]

# Up to so many candidates torchvision moves the classes apart and suppresses once, which rounds overlaps differently.
_APART = {"cpu": 1_000}
_APART_ELSEWHERE = 25_000
# Scores are looked at in blocks of so many classes: the m highest maxima of blocks bound the m highest scores.
_BLOCK = 16
# The first look is at so many candidates for each detection wanted, the next at so many times more.
_FIRST, _GROWTH = 2, 4


def fast_rcnn_inference(
    boxes: list[Tensor],
    scores: list[Tensor],
    image_shapes: list[tuple[int, int]],
    score_thresh: float,
    nms_thresh: float,
    topk_per_image: int,
) -> tuple[list[Instances], list[Tensor]]:
    """Detections of a batch: takes and returns what ``detectron2.modeling.roi_heads.fast_rcnn_inference`` does.

    Args:
        boxes: of each image, ``(R, 4)`` or, one for each class, ``(R, 4K)``.
        scores: of each image, ``(R, K + 1)``, background last.
        image_shapes: (height, width) of each image.
        score_thresh: only scores above it are candidates.
        nms_thresh: IoU above which the lower of two boxes of a class is dropped.
        topk_per_image: detections kept of an image; negative: all.

    Returns:
        For each image ``Instances`` with ``pred_boxes``, ``scores`` and ``pred_classes`` by descending score, and the
        rows of ``boxes`` that they come from; equal to Detectron2's bit for bit.
    """
    detections = [
        fast_rcnn_inference_single_image(b, s, shape, score_thresh, nms_thresh, topk_per_image)
        for b, s, shape in zip(boxes, scores, image_shapes)
    ]
    return [d[0] for d in detections], [d[1] for d in detections]


def fast_rcnn_inference_single_image(
    boxes: Tensor,
    scores: Tensor,
    image_shape: tuple[int, int],
    score_thresh: float,
    nms_thresh: float,
    topk_per_image: int,
) -> tuple[Instances, Tensor]:
    """One image of :func:`fast_rcnn_inference`."""
    if torch.jit.is_tracing() or torch.jit.is_scripting():
        # What is traced must not depend on how many candidates the example has.
        return detectron2_single_image(boxes, scores, image_shape, score_thresh, nms_thresh, topk_per_image)
    boxes, scores = _finite_rows(boxes, scores)
    scores = scores[:, :-1]
    count = int(torch.count_nonzero(scores > score_thresh))
    small = count <= _APART.get(boxes.device.type, _APART_ELSEWHERE)
    found = None
    if not small and topk_per_image >= 0:
        found = _highest(boxes, scores, image_shape, score_thresh, nms_thresh, topk_per_image, count)
    if found is None:
        row, cls = (scores > score_thresh).nonzero(as_tuple=True)
        candidates = _clipped(boxes, row, cls, image_shape)
        values = scores[row, cls]
        keep = (batched_nms if small else _nms_of_classes)(candidates, values, cls, nms_thresh)
        keep = keep[:topk_per_image] if topk_per_image >= 0 else keep
        found = candidates[keep], values[keep], row[keep], cls[keep]
    kept, values, row, cls = found
    result = Instances(image_shape)
    result.pred_boxes = Boxes(kept)
    result.scores = values
    result.pred_classes = cls
    return result, row


def _finite_rows(boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Without the rows in which a coordinate or a score is not finite."""
    # A sum is finite only if all its terms are: one pass instead of three.
    if torch.isfinite(boxes.sum()) & torch.isfinite(scores.sum()):
        return boxes, scores
    valid = torch.isfinite(boxes).all(dim=1) & torch.isfinite(scores).all(dim=1)
    return boxes[valid], scores[valid]


def _clipped(boxes: Tensor, row: Tensor, cls: Tensor, image_shape: tuple[int, int]) -> Tensor:
    """``(N, 4)`` boxes of candidates, inside the image."""
    of_class = boxes.shape[1] // 4
    chosen = Boxes(boxes[row] if of_class == 1 else boxes.view(-1, of_class, 4)[row, cls])
    chosen.clip(image_shape)
    return chosen.tensor


def _lower_bound(scores: Tensor, m: int) -> Tensor | None:
    """A score that at least ``m`` of (R, K) reach, and not many more; None if that cannot be said cheaply."""
    k = scores.shape[1]
    whole = k - k % _BLOCK
    maxima = scores[:, :whole].unflatten(1, (whole // _BLOCK, _BLOCK)).amax(dim=2).flatten()
    if whole < k:
        maxima = torch.cat([maxima, scores[:, whole:].amax(dim=1)])
    return None if m > maxima.numel() // 2 else maxima.topk(m, sorted=False).values.min()


def _highest(boxes, scores, image_shape, score_thresh, nms_thresh, topk, count):
    """Boxes, scores, rows and classes of the ``topk`` detections; None where all candidates must be looked at.

    That is where nearly all of them are suppressed, and where scores among the detections are equal: equal scores
    stand in the order in which a sort of everything that is kept puts them, which differs between processors.
    """
    m = max(_FIRST * topk, 1)
    while m < count // 2:
        bound = _lower_bound(scores, m)
        if bound is None:
            return None
        above = scores >= bound if bound > score_thresh else scores > score_thresh
        row, cls = above.nonzero(as_tuple=True)
        candidates, values = _clipped(boxes, row, cls, image_shape), scores[row, cls]
        keep = _nms_of_classes(candidates, values, cls, nms_thresh)
        if len(keep) > topk:
            ordered = values[keep[: topk + 1]]
            if (ordered[1:] == ordered[:-1]).any():
                return None
            keep = keep[:topk]
            return candidates[keep], values[keep], row[keep], cls[keep]
        m *= _GROWTH
    return None


def _nms_of_classes(boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float) -> Tensor:
    """``torchvision.ops.batched_nms`` as it is for many candidates, without a pass over all of them for each class."""
    order = classes.argsort(stable=True)
    counts = torch.bincount(classes).tolist()
    grouped_boxes, grouped_scores = boxes[order].float(), scores[order]
    keep = torch.ones(len(order), dtype=torch.bool, device=boxes.device)
    start = 0
    for count in counts:
        if count > 1:
            end = start + count
            kept = nms(grouped_boxes[start:end], grouped_scores[start:end], threshold)
            if len(kept) < count:
                keep[start:end] = False
                keep[start + kept] = True
        start += count
    # Detectron2's last step: what is kept, in the order of candidates, is sorted by score.
    kept = order[keep].sort().values
    return kept[scores[kept].sort(descending=True)[1]]
