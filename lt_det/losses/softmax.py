"""Softmax cross entropy."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from lt_det.losses.base import LOSS_REGISTRY, ClassificationLoss, mean_over_rows
from lt_det.losses.kernels import adjusted_cross_entropy, compute_dtype


@LOSS_REGISTRY.register()
class Softmax(ClassificationLoss):
    """Softmax cross entropy over K + 1 classes: Detectron2's own loss."""

    config_node = "SOFTMAX"

    def compute(self, scores: Tensor, labels: Tensor, roi_weights: Tensor | None) -> Tensor:
        if roi_weights is None and len(scores):
            # What Detectron2 calls, so that default options give its losses to the last bit.
            return F.cross_entropy(scores.to(compute_dtype(scores.dtype)), labels)
        return mean_over_rows(adjusted_cross_entropy(scores, labels), roi_weights, scores)
