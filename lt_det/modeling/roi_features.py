"""The features of boxes as the box predictor sees them, for each kind of ROI heads."""

from __future__ import annotations

from collections.abc import Mapping

from detectron2.modeling.roi_heads import CascadeROIHeads, Res5ROIHeads, StandardROIHeads
from detectron2.structures import Boxes
from torch import Tensor, nn


def check_roi_heads(heads: nn.Module, purpose: str) -> None:
    """Raise ``ValueError`` for ROI heads that :func:`roi_features` does not know.

    Args:
        purpose: what wants them, for the message.
    """
    if not isinstance(heads, (StandardROIHeads, Res5ROIHeads)):
        raise ValueError(f"{purpose} knows standard, cascade and C4 ROI heads, not {type(heads).__name__}")


def roi_features(heads: nn.Module, maps: Mapping[str, Tensor], boxes: list[Boxes], stage: int = 0) -> Tensor:
    """``(R, D)`` features of the boxes of all images, in order: the input of the box predictor.

    Args:
        heads: Detectron2's standard, cascade or C4 ROI heads, or a subclass.
        maps: the backbone's feature maps by name.
        boxes: of each image.
        stage: of a cascade.
    """
    if isinstance(heads, Res5ROIHeads):
        return heads._shared_roi_transform([maps[f] for f in heads.in_features], boxes).mean(dim=[2, 3])
    pooled = heads.box_pooler([maps[f] for f in heads.box_in_features], boxes)
    head = heads.box_head[stage] if isinstance(heads, CascadeROIHeads) else heads.box_head
    return head(pooled).flatten(start_dim=1)
