"""Seesaw loss with pairwise class balance."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lt_det.losses.base import LOSS_REGISTRY
from lt_det.losses.functional import seesaw_adjustment
from lt_det.losses.kernels import compute_dtype
from lt_det.losses.pcb import PairwiseBalancedLoss
from lt_det.losses.seesaw import Seesaw


@LOSS_REGISTRY.register()
class SeesawPCB(PairwiseBalancedLoss, Seesaw):
    """Seesaw loss with pairwise class balance in the last third. He et al., CVPR 2022; Wang et al., CVPR 2021.

    p in (1 - alpha) CE + alpha KL(t_y || p) is Seesaw's, with its mitigation and compensation of the label, as in the
    published code; the confusion matrix is of the plain softmax over the K classes. The objectness branch stays as it
    is. See :class:`lt_det.losses.pcb.PairwiseBalancedLoss`.

    Args:
        p, q, eps: as in ``Seesaw``.
        alpha: weight of the soft labels.
        start: share of the training after which they count.
        momentum: of the confusion matrix.
    """

    config_node = "SEESAW_PCB"

    def __init__(
        self,
        num_classes: int,
        *,
        p: float = 0.8,
        q: float = 2.0,
        eps: float = 1e-2,
        alpha: float = 0.05,
        start: float = 2 / 3,
        momentum: float = 0.99,
        **common,
    ):
        super().__init__(num_classes, p=p, q=q, eps=eps, alpha=alpha, start=start, momentum=momentum, **common)

    def class_rows(self, labels: Tensor) -> Tensor:
        # The confusion matrix takes foreground alone.
        return (labels < self.num_classes).nonzero().squeeze(1)

    def class_losses(self, classes: Tensor, labels: Tensor) -> Tensor:
        z = classes.to(compute_dtype(classes.dtype))
        self.observe(z.detach().softmax(dim=1), labels)
        if not self.active:
            return super().class_losses(classes, labels)
        log_counts = self.accumulated_count.clamp(min=1.0).log().to(z.dtype)
        adjusted = z.detach().clone()
        seesaw_adjustment(labels, log_counts, p=self.p, q=self.q, eps=self.eps)(adjusted, slice(0, len(labels)))
        return self.balanced_rows(F.log_softmax(z + (adjusted - z.detach()), dim=1), labels)
