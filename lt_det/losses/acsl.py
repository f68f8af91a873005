"""Adaptive class suppression loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lt_det.losses.base import LOSS_REGISTRY, mean_over_rows, random_rows
from lt_det.losses.kernels import binary_cross_entropy
from lt_det.losses.sigmoid import ObjectnessSigmoidLoss


@LOSS_REGISTRY.register()
class ACSL(ObjectnessSigmoidLoss):
    """Adaptive class suppression: on foreground rows only confident negatives count.

    Wang et al., "Adaptive Class Suppression Loss for Long-Tail Object Detection", CVPR 2021,
    with the background rule of their code. K + 1 sigmoids. On a foreground row a negative counts if its
    probability is at least ``threshold`` (background included). On a background row background counts
    always, frequent classes always, common classes on a random tenth and rare classes on a random hundredth
    of the batch's background rows (rounded down). Rare and common are by the training image counts of LVIS
    (up to 10, up to 100). Probabilities at inference are the plain sigmoids.

    Args:
        threshold: of the probability.
        rare_fraction, common_fraction: shares of background rows that suppress rare and common classes.
        bias_prior: probability that every output starts with.
    """

    config_node = "ACSL"
    needs_statistics = True
    prior_sources = ("image_count",)

    def __init__(
        self,
        num_classes: int,
        *,
        threshold: float = 0.7,
        rare_fraction: float = 0.01,
        common_fraction: float = 0.1,
        bias_prior: float = 0.01,
        **common,
    ):
        super().__init__(num_classes, bias_prior=bias_prior, **common)
        if not 0.0 < threshold < 1.0:
            raise ValueError(f"ACSL: threshold must lie in (0, 1), got {threshold}")
        if not (0.0 <= rare_fraction <= 1.0 and 0.0 <= common_fraction <= 1.0):
            raise ValueError(
                f"ACSL: fractions must lie in [0, 1], got rare_fraction {rare_fraction}, common_fraction"
                f" {common_fraction}"
            )
        self.threshold = float(threshold)
        self.fractions = (float(rare_fraction), float(common_fraction))
        # Columns: 0 rare, 1 common, 2 frequent and background.
        self.register_buffer("group", torch.full((num_classes + 1,), 2), persistent=False)

    def load_statistics(self, statistics) -> None:
        counts = self.class_counts("image_count", allow_zero=True)
        self.group[:-1] = (counts > 10).long().to(self.group.device) + (counts > 100).long().to(self.group.device)

    def activation(self, scores: Tensor) -> Tensor:
        return scores.sigmoid()

    def compute(self, scores: Tensor, labels: Tensor, roi_weights: Tensor | None) -> Tensor:
        is_background = labels == self.num_classes
        num_background = is_background.sum()
        drawn = [random_rows(is_background, (num_background * f).floor()) for f in self.fractions]
        chosen = torch.stack([*drawn, is_background], dim=1)
        logit = math.log(self.threshold / (1 - self.threshold))

        def weight(z: Tensor, rows: slice) -> Tensor:
            # Foreground rows are never chosen. A row's own term is the kernel's to set.
            suppressed = chosen[rows].to(z.dtype).index_select(1, self.group)
            confident = (z >= logit).to(z.dtype)
            return suppressed.addcmul_(confident, (~is_background[rows, None]).to(z.dtype))

        losses = binary_cross_entropy(scores, labels, negative_weight=weight)
        return mean_over_rows(losses, roi_weights, scores)

    def summary(self) -> str:
        sizes = torch.bincount(self.group[:-1], minlength=3).tolist()
        return (
            f"{self.num_classes} sigmoids and background's, threshold {self.threshold:g}, background"
            f" suppresses {sizes[0]} rare classes on {self.fractions[0]:g} and {sizes[1]} common ones on"
            f" {self.fractions[1]:g} of its rows, {sizes[2]} frequent ones on all, bias prior"
            f" {self.bias_prior:g}"
        )
