"""Balanced group softmax."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lt_det.losses.base import LOSS_REGISTRY, ClassificationLoss, random_rows
from lt_det.losses.kernels import rowwise_loss


@LOSS_REGISTRY.register()
class BAGS(ClassificationLoss):
    """Balanced group softmax: one softmax for each group of classes with similar counts.

    Li et al., "Overcoming Classifier Imbalance for Long-Tail Object Detection with Balanced Group
    Softmax", CVPR 2020.

    Classes are grouped by training instances at ``bin_edges``; each group's softmax has an "others" output,
    and a group of its own tells foreground from background. In a class group all rows of its classes count,
    and ``others_ratio`` times as many random other rows (none if it has no row); each group's loss is a
    mean over the rows that count, and the losses are added up. Probability at inference: that of the class
    in its group, times that of foreground.

    The groups are kept in the checkpoint. The classifier's outputs are: K classes in their order, "others"
    of each group, foreground, background.

    Args:
        bin_edges: increasing instance counts; a class with n instances is in the group of the number of
            edges <= n.
        others_ratio: rows of other classes for each row of a group's own.
    """

    config_node = "BAGS"
    needs_statistics = True
    mutually_exclusive = False
    prior_sources = ("image_count", "instance_count")

    def __init__(
        self,
        num_classes: int,
        *,
        bin_edges: Sequence[float] = (10, 100, 1000),
        others_ratio: float = 8.0,
        **common,
    ):
        super().__init__(num_classes, **common)
        if list(bin_edges) != sorted(set(bin_edges)):
            raise ValueError(f"BAGS: bin_edges must increase, got {tuple(bin_edges)}")
        if others_ratio < 0:
            raise ValueError(f"BAGS: others_ratio must not be negative, got {others_ratio}")
        self.bin_edges = tuple(float(edge) for edge in bin_edges)
        self.others_ratio = float(others_ratio)
        self.num_groups = len(self.bin_edges) + 1
        # Part of the model: inference needs it, and must not need the training annotations. -1: not known
        # yet.
        self.register_buffer("group", torch.full((num_classes,), -1))
        self._columns_of = None

    def num_outputs(self, num_classes: int) -> int:
        return num_classes + self.num_groups + 2

    def load_statistics(self, statistics) -> None:
        counts = self.class_counts("instance_count", allow_zero=True)
        edges = torch.tensor(self.bin_edges, dtype=counts.dtype)
        self.group.copy_(torch.bucketize(counts, edges, right=True))

    @torch.jit.unused
    def _columns(self) -> list[Tensor]:
        """As :meth:`_find_columns`, found once."""
        state = (self.group._version, self.group.device)  # changes when a checkpoint is loaded
        if self._columns_of is None or self._columns_of[0] != state:
            if (self.group < 0).any():
                self.prepare()
            self._columns_of = ((self.group._version, self.group.device), self._find_columns())
        return self._columns_of[1]

    def _find_columns(self) -> list[Tensor]:
        """For each class group, its columns in the scores, "others" first."""
        others = torch.arange(self.num_groups, device=self.group.device) + self.num_classes
        return [torch.cat([others[g : g + 1], (self.group == g).nonzero().squeeze(1)]) for g in range(self.num_groups)]

    def activation(self, scores: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            groups = self._find_columns()
        else:
            groups = self._columns()
        probs = torch.zeros(scores.shape[0], self.num_classes + 1, dtype=scores.dtype, device=scores.device)
        objectness = scores[:, -2:].softmax(dim=1)
        for columns in groups:
            probs[:, columns[1:]] = scores[:, columns].softmax(dim=1)[:, 1:] * objectness[:, :1]
        probs[:, -1] = objectness[:, 1]
        return probs

    def compute(self, scores: Tensor, labels: Tensor, roi_weights: Tensor | None) -> Tensor:
        if labels.numel() == 0:
            return scores.float().sum() * 0.0
        num_classes, columns = self.num_classes, self._columns()
        group_of_label = torch.cat([self.group, self.group.new_full((1,), -1)])[labels]
        # Position of each class's column in its group; 0 is "others".
        position = torch.zeros(num_classes + 1, dtype=torch.int64, device=scores.device)
        targets, weights = [], []
        for g, members in enumerate(columns):
            position[members[1:]] = torch.arange(1, members.numel(), device=scores.device)
            own = group_of_label == g
            counted = own | random_rows(~own, (own.sum() * self.others_ratio).floor())
            targets.append(torch.where(own, position[labels], 0))
            weights.append(counted / counted.sum().clamp(min=1))
        targets.append((labels == num_classes).long())
        weights.append(torch.full_like(weights[0], 1.0 / labels.numel()))
        columns = [
            *columns,
            torch.arange(num_classes + self.num_groups, scores.shape[1], device=scores.device),
        ]
        rows = group_rows(scores, columns, targets, weights)
        return (rows if roi_weights is None else rows * roi_weights.to(rows.dtype)).sum()

    def summary(self) -> str:
        sizes = torch.bincount(self.group, minlength=self.num_groups).tolist()
        return (
            f"groups of {sizes} classes by instances at {self.bin_edges}, background by a group of its own,"
            f" others_ratio {self.others_ratio:g}"
        )


def group_rows(logits: Tensor, columns: list[Tensor], targets: list[Tensor], weights: list[Tensor]) -> Tensor:
    """(R,) sums over groups of the group's weights (R,) times the cross entropy of its columns.

    Args:
        columns: for each group, its columns in the logits; each column is in one group.
        targets: for each group, (R,) positions among its columns.
        weights: for each group, (R,) weights of the rows.
    """
    inverse = torch.cat(columns).argsort()  # where each column of the logits stands among the groups' columns

    def function(z: Tensor, rows: slice, gradient: Tensor | None) -> Tensor:
        loss = torch.zeros(z.shape[0], dtype=z.dtype, device=z.device)
        derivatives = []
        for c, t, w in zip(columns, targets, weights):
            y, w = t[rows, None], w[rows, None].to(z.dtype)
            scores = z.index_select(1, c)
            if gradient is None:
                own = scores.gather(1, y)
                loss.add_((w * (scores.logsumexp(dim=1, keepdim=True) - own)).squeeze(1))
            else:
                derivatives.append(scores.softmax(dim=1).mul_(w).scatter_add_(1, y, -w))
        if gradient is not None:
            torch.index_select(torch.cat(derivatives, dim=1), 1, inverse, out=gradient)
        return loss

    def plain(z: Tensor) -> Tensor:
        parts = [
            F.cross_entropy(z[:, c], t, reduction="none") * w.to(z.dtype) for c, t, w in zip(columns, targets, weights)
        ]
        return torch.stack(parts).sum(dim=0)

    return rowwise_loss(logits, function, plain)
