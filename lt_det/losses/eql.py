"""Equalization loss."""

from __future__ import annotations

import torch
from torch import Tensor

from lt_det.losses.base import LOSS_REGISTRY, mean_over_rows
from lt_det.losses.kernels import binary_cross_entropy
from lt_det.losses.sigmoid import SigmoidLoss


class RareClassLoss(SigmoidLoss):
    """K sigmoids; classes in fewer than ``rare_frequency`` of the training images are rare."""

    needs_statistics = True
    prior_sources = ("image_count",)

    def __init__(self, num_classes: int, *, rare_frequency: float = 0.0010062, bias_prior: float = 0.001, **common):
        super().__init__(num_classes, bias_prior=bias_prior, **common)
        if not 0.0 <= rare_frequency <= 1.0:
            raise ValueError(f"{type(self).__name__}: rare_frequency must lie in [0, 1], got {rare_frequency}")
        self.rare_frequency = float(rare_frequency)
        self.register_buffer("is_rare", torch.zeros(num_classes, dtype=torch.bool), persistent=False)
        # Their indices: known once, so that no batch makes a GPU wait for their number.
        self.register_buffer("rare_classes", torch.zeros(0, dtype=torch.int64), persistent=False)

    def load_statistics(self, statistics) -> None:
        frequency = self.class_counts("image_count", allow_zero=True) / statistics.num_images
        self.is_rare.copy_(frequency < self.rare_frequency)
        self.rare_classes = self.is_rare.nonzero().squeeze(1)

    def summary(self) -> str:
        return (
            f"{super().summary()}, {int(self.is_rare.sum())} of {self.num_classes} classes are rare (in fewer"
            f" than {self.rare_frequency:g} of the images)"
        )


@LOSS_REGISTRY.register()
class EQL(RareClassLoss):
    """Equalization loss: BCE with weights 1 - E(r) T(f_c) (1 - y_c). Tan et al., CVPR 2020.

    On foreground rows (E = 1) the negatives of rare classes (T = 1) are left out; background rows suppress
    every class.

    Args:
        rare_frequency: lambda; the default keeps LVIS v1's rare and common classes (up to 100 of 100,170
            images); the paper has 1.76e-3 for LVIS v0.5.
        bias_prior: probability that every class starts with.
    """

    config_node = "EQL"

    def compute(self, scores: Tensor, labels: Tensor, roi_weights: Tensor | None) -> Tensor:
        kept = torch.stack([~self.is_rare, torch.ones_like(self.is_rare)])  # by row: foreground, background
        kind = (labels == self.num_classes).long()

        def weight(z: Tensor, rows: slice) -> Tensor:
            return kept.to(z.dtype).index_select(0, kind[rows])

        losses = binary_cross_entropy(scores, labels, negative_weight=weight)
        return mean_over_rows(losses, roi_weights, scores)
