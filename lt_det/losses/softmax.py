"""Softmax cross entropy."""

from __future__ import annotations

from torch import Tensor

from lt_det.losses.base import LOSS_REGISTRY, ClassificationLoss, mean_over_rows
from lt_det.losses.kernels import adjusted_cross_entropy


@LOSS_REGISTRY.register()
class Softmax(ClassificationLoss):
    """Softmax cross entropy over K + 1 classes: Detectron2's own loss."""

    config_node = "SOFTMAX"

    def compute(self, scores: Tensor, labels: Tensor, roi_weights: Tensor | None) -> Tensor:
        return mean_over_rows(adjusted_cross_entropy(scores, labels), roi_weights, scores)
