"""DropLoss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lt_det.losses.base import LOSS_REGISTRY, mean_over_rows
from lt_det.losses.eql import RareClassLoss
from lt_det.losses.kernels import binary_cross_entropy


@LOSS_REGISTRY.register()
class DropLoss(RareClassLoss):
    """DropLoss: EQL, and the negatives of rare classes on background rows are dropped at random.

    Hsieh et al., "DropLoss for Long-Tail Instance Segmentation", AAAI 2021. A rare class's negative on a
    background row is kept with the probability that a foreground row of the batch is of a rare class; drawn
    for each row and class. A batch without foreground keeps them all, as the published code does.

    Args:
        rare_frequency: as in ``EQL``.
        bias_prior: probability that every class starts with.
    """

    config_node = "DROP_LOSS"

    def negative_weight(self, labels: Tensor) -> Callable[[Tensor, slice], Tensor]:
        """Which negatives count in this batch, drawn anew: (n, K) of 0 and 1 for the rows of a slice."""
        is_background = labels == self.num_classes
        rare_label = torch.cat([self.is_rare, self.is_rare.new_zeros(1)])[labels]
        num_foreground = (~is_background).sum()
        probability = torch.where(num_foreground > 0, rare_label.sum() / num_foreground.clamp(min=1), 1.0)
        # One byte for each row and rare class: drawn here, as the loss may be evaluated again for a second
        # derivative.
        rare = self.rare_classes
        kept = torch.rand(labels.numel(), rare.numel(), device=labels.device) < probability
        kept &= is_background[:, None]

        def weight(z: Tensor, rows: slice) -> Tensor:
            return torch.ones_like(z).index_copy_(1, rare, kept[rows].to(z.dtype))

        return weight

    def compute(self, scores: Tensor, labels: Tensor, roi_weights: Tensor | None) -> Tensor:
        losses = binary_cross_entropy(scores, labels, negative_weight=self.negative_weight(labels))
        return mean_over_rows(losses, roi_weights, scores)
