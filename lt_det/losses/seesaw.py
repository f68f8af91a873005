"""Seesaw loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lt_det.losses.base import LOSS_REGISTRY, ClassificationLoss, foreground_rows, mean_over_rows
from lt_det.losses.distributed import all_reduce_sum
from lt_det.losses.functional import seesaw_rows
from lt_det.losses.kernels import compute_dtype


@LOSS_REGISTRY.register()
class Seesaw(ClassificationLoss):
    """Seesaw loss with an objectness branch. Wang et al., CVPR 2021.

    The classifier has K + 2 outputs: K classes, then foreground and background. The class part is the
    seesaw loss of foreground rows (summed, divided by R); the objectness part is a two-class softmax of all
    rows. Probabilities at inference are softmax over classes times objectness. There is no prior:
    background is the objectness branch's, and class counts are those of the RoIs seen so far, summed over
    ranks and kept in the checkpoint; as in MMDetection they are updated by a batch before its loss.
    (MMDetection counts on each rank by itself.)

    Args:
        p: exponent of the mitigation factor; 0: off.
        q: exponent of the compensation factor; 0: off.
        eps: lower bound of the label's probability in the compensation factor.

    Returns:
        ``{"loss_cls": classes, "loss_cls_objectness": objectness}``.
    """

    config_node = "SEESAW"

    def __init__(self, num_classes: int, *, p: float = 0.8, q: float = 2.0, eps: float = 1e-2, **common):
        super().__init__(num_classes, **common)
        if p < 0 or q < 0 or eps <= 0:
            raise ValueError(f"Seesaw: p and q must be >= 0 and eps > 0, got p={p}, q={q}, eps={eps}")
        self.p, self.q, self.eps = float(p), float(q), float(eps)
        self.register_buffer("accumulated_count", torch.zeros(num_classes, dtype=torch.float64))

    def num_outputs(self, num_classes: int) -> int:
        return num_classes + 2

    def activation(self, scores: Tensor) -> Tensor:
        classes, objectness = scores[:, :-2].softmax(dim=1), scores[:, -2:].softmax(dim=1)
        return torch.cat([classes * objectness[:, :1], objectness[:, 1:]], dim=1)

    def class_rows(self, labels: Tensor) -> Tensor:
        """Rows whose classes are looked at: all of foreground, and maybe others."""
        return foreground_rows(labels, self.num_classes)

    def class_losses(self, classes: Tensor, labels: Tensor) -> Tensor:
        """(F,) losses of rows with a class by their scores (F, K), with the counts as they are."""
        log_counts = self.accumulated_count.clamp(min=1.0).log().to(compute_dtype(classes.dtype))
        return seesaw_rows(classes, labels, log_counts, p=self.p, q=self.q, eps=self.eps)

    def compute(self, scores: Tensor, labels: Tensor, roi_weights: Tensor | None) -> dict[str, Tensor]:
        if self.training:
            counts = self.accumulated_count.new_zeros(self.num_classes + 1)
            counts.scatter_add_(0, labels, torch.ones_like(labels, dtype=counts.dtype))
            self.accumulated_count += all_reduce_sum(counts)[:-1]
        dtype = compute_dtype(scores.dtype)
        rows = self.class_rows(labels)
        classes, objectness_scores = _Split.apply(scores, rows)
        losses = self.class_losses(classes, labels[rows].clamp(max=self.num_classes - 1))
        losses = torch.where(labels[rows] < self.num_classes, losses, 0.0)
        if roi_weights is not None:
            losses = losses * roi_weights[rows].to(dtype)
        is_background = (labels == self.num_classes).long()
        objectness = F.cross_entropy(objectness_scores.to(dtype), is_background, reduction="none")
        return {
            "loss_cls": losses.sum() / max(1, labels.numel()),
            "loss_cls_objectness": mean_over_rows(objectness, roi_weights, scores),
        }

    def summary(self) -> str:
        return (
            f"p {self.p:g}, q {self.q:g}, eps {self.eps:g}, background by objectness branch, counts of RoIs"
            f" seen so far ({self.accumulated_count.sum().item():.0f})"
        )


class _Split(torch.autograd.Function):
    """(R, K + 2) scores to the classes of some rows (F, K) and the objectness of all (R, 2).

    Indexing gives the same, but its backward makes and adds up several (R, K + 2) tensors, mostly zero.
    """

    @staticmethod
    def forward(ctx, scores, rows):
        ctx.save_for_backward(rows)
        ctx.shape = scores.shape
        return scores.index_select(0, rows)[:, :-2].contiguous(), scores[:, -2:].clone()

    @staticmethod
    def backward(ctx, grad_classes, grad_objectness):
        (rows,) = ctx.saved_tensors
        grad = grad_classes.new_zeros(ctx.shape)
        grad[rows, :-2] = grad_classes
        grad[:, -2:] = grad_objectness
        return grad, None
