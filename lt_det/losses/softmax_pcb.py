"""Softmax with pairwise class balance."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lt_det.losses.base import LOSS_REGISTRY, mean_over_rows
from lt_det.losses.kernels import adjusted_cross_entropy, compute_dtype
from lt_det.losses.pcb import PairwiseBalancedLoss


@LOSS_REGISTRY.register()
class SoftmaxPCB(PairwiseBalancedLoss):
    """Softmax with pairwise class balance in the last third: (1 - alpha) CE + alpha KL. He et al., CVPR 2022.

    The confusion matrix is of the K classes without background, and so are the soft labels; the softmax of the loss is
    over all K + 1. See :class:`lt_det.losses.pcb.PairwiseBalancedLoss`.

    Args:
        alpha: weight of the soft labels.
        start: share of the training after which they count.
        momentum: of the confusion matrix.
    """

    config_node = "SOFTMAX_PCB"

    def __init__(self, num_classes: int, *, alpha: float = 0.4, start: float = 2 / 3, momentum: float = 0.99, **common):
        super().__init__(num_classes, alpha=alpha, start=start, momentum=momentum, **common)

    def compute(self, scores: Tensor, labels: Tensor, roi_weights: Tensor | None) -> Tensor:
        rows = (labels < self.num_classes).nonzero().squeeze(1)
        foreground, own = scores[rows].to(compute_dtype(scores.dtype)), labels[rows]
        self.observe(foreground.detach()[:, :-1].softmax(dim=1), own)
        losses = adjusted_cross_entropy(scores, labels)
        if self.active:
            losses = losses.index_copy(0, rows, self.balanced_rows(F.log_softmax(foreground, dim=1), own))
        return mean_over_rows(losses, roi_weights, scores)
