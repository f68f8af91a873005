"""Gumbel optimized loss."""

from __future__ import annotations

from torch import Tensor

from lt_det.losses.base import LOSS_REGISTRY, mean_over_rows
from lt_det.losses.drop_loss import DropLoss
from lt_det.losses.functional import gumbel_sigmoid_rows
from lt_det.losses.gumbel_sigmoid import GumbelLoss


@LOSS_REGISTRY.register()
class GOL(GumbelLoss, DropLoss):
    """Gumbel optimized loss: :class:`GumbelSigmoid`'s probabilities and loss inside :class:`DropLoss`'s masking.

    Alexandridis et al., ECCV 2022. Their recipe has the normalised mask head.

    Args:
        rare_frequency: as in ``EQL``.
        bias_prior: probability that every class starts with; 0: no bias, which is a probability of 1 / e.
    """

    config_node = "GOL"

    def compute(self, scores: Tensor, labels: Tensor, roi_weights: Tensor | None) -> Tensor:
        losses = gumbel_sigmoid_rows(scores, labels, negative_weight=self.negative_weight(labels))
        return mean_over_rows(losses, roi_weights, scores)
