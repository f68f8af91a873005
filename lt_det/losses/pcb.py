"""Pairwise class balance (PCB): soft labels from a running confusion matrix, an add-on to other losses."""

from __future__ import annotations

import torch
from torch import Tensor

from lt_det.losses.base import ClassificationLoss
from lt_det.losses.distributed import gather_rows
from lt_det.losses.functional import pairwise_class_balance_rows


class PairwiseBalancedLoss(ClassificationLoss):
    """A loss whose foreground rows are regularised by pairwise class balance towards the end of training.

    He et al., CVPR 2022: row c of the confusion matrix M is a moving average of the probabilities over the K classes
    that RoIs of class c get. From ``start`` on, the cross entropy of a foreground row becomes
    (1 - alpha) CE + alpha KL(t_y || p), see ``functional.pairwise_class_balance_loss``. M is updated by a batch before
    its loss, over all ranks, and kept in the checkpoint (5.8 MB on LVIS), as is the number of training batches with
    foreground.

    Departures from the published code: its head refines each RoI three times, with alpha / 2 and alpha in the second
    and third round; here there is one round, with alpha. It waits until each class has been seen; here a class that has
    not been seen has no share in the soft labels.
    """

    needs_iterations = True
    shared_arguments = (*ClassificationLoss.shared_arguments, "iterations")

    def __init__(self, num_classes: int, *, alpha: float, start: float, momentum: float, iterations: int = 0, **common):
        """
        Args:
            alpha, start, momentum: see the losses.
            iterations: training iterations in all, of which ``start`` is a share; 0: not known, from the first on.
        """
        super().__init__(num_classes, **common)
        name = type(self).__name__
        for option, value in (("alpha", alpha), ("start", start)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name}: {option} must lie in [0, 1], got {value}")
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"{name}: momentum must lie in [0, 1), got {momentum}")
        self.alpha, self.start, self.momentum = float(alpha), float(start), float(momentum)
        self.first = round(self.start * iterations)
        self.register_buffer("confusion", torch.zeros(num_classes, num_classes))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    @property
    def active(self) -> bool:
        """Whether the batch that was seen last is regularised."""
        return int(self.batches) > self.first

    @torch.no_grad()
    def observe(self, probs: Tensor, labels: Tensor) -> None:
        """Take a training batch's foreground rows: probabilities (F, K) over the classes and labels (F,)."""
        if not self.training:
            return
        probs, labels = gather_rows(probs.to(self.confusion.dtype).contiguous(), labels)
        self.batches += int(labels.numel() > 0)
        present, position, number = torch.unique(labels, return_inverse=True, return_counts=True)
        mean = probs.new_zeros(present.numel(), self.num_classes).index_add_(0, position, probs)
        rows = self.confusion[present] * self.momentum + mean / number[:, None] * (1 - self.momentum)
        self.confusion[present] = rows / rows.sum(dim=1, keepdim=True)

    def balanced_rows(self, log_probs: Tensor, labels: Tensor) -> Tensor:
        """(F,) losses of foreground rows from log-probabilities (F, K or K + 1)."""
        return pairwise_class_balance_rows(log_probs, labels, self.confusion, self.alpha)

    def summary(self) -> str:
        own = super().summary()
        seen = int((self.confusion.diagonal() > 0).sum())
        return (
            f"{own}{', ' if own else ''}pairwise class balance of weight {self.alpha:g} from iteration {self.first} on"
            f" ({int(self.batches)} seen, {seen} of {self.num_classes} classes in the confusion matrix)"
        )
