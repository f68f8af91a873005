"""Balanced sigmoid."""

from __future__ import annotations

import torch
from torch import Tensor

from lt_det.losses.base import LOSS_REGISTRY, mean_over_rows
from lt_det.losses.functional import balanced_sigmoid_rows
from lt_det.losses.sigmoid import SigmoidLoss


@LOSS_REGISTRY.register()
class BalancedSigmoid(SigmoidLoss):
    """BALMS as its authors trained it on LVIS: BCE(z - log((1 - f) / f)) on foreground rows.

    f is the fraction of training images with the class. Background rows are not shifted (this is the loss's
    only background rule, "keep" standing for it), and inference uses the sigmoid of z as it is. The formula
    is that of the published detection code of Ren et al., NeurIPS 2020; their paper's eq. 4 is the softmax
    form.

    f is clamped to [0.5 / N, 1 - 0.5 / N] with N training images, so that a class in every image stays
    finite.

    Args:
        bias_prior: probability that every class starts with.
    """

    config_node = "BALANCED_SIGMOID"
    needs_statistics = True
    prior_sources = ("image_count",)

    def __init__(self, num_classes: int, *, bias_prior: float = 0.001, **common):
        super().__init__(num_classes, bias_prior=bias_prior, **common)
        self.register_buffer("log_odds", torch.zeros(num_classes), persistent=False)

    def load_statistics(self, statistics) -> None:
        f = image_frequency(self.class_counts("image_count"), statistics.num_images)
        self.log_odds.copy_(torch.log1p(-f) - f.log())

    def compute(self, scores: Tensor, labels: Tensor, roi_weights: Tensor | None) -> Tensor:
        return mean_over_rows(balanced_sigmoid_rows(scores, labels, self.log_odds), roi_weights, scores)

    def summary(self) -> str:
        shift = -self.log_odds
        return (
            f"{self.num_classes} sigmoids, shift of foreground rows from {shift.min().item():+.2f} to"
            f" {shift.max().item():+.2f} by prior 'image_count', background rows not shifted, bias prior"
            f" {self.bias_prior:g}"
        )


def image_frequency(image_count: Tensor, num_images: int) -> Tensor:
    """Fraction of images with each class, kept half an image away from 0 and 1."""
    if num_images <= 0 or image_count.max() > num_images:
        raise ValueError(
            f"class statistics have num_images {num_images}, but a class is in {image_count.max().item():g} images"
        )
    margin = 0.5 / num_images
    return (image_count / num_images).clamp(min=margin, max=1 - margin)
