"""Effective class margins."""

from __future__ import annotations

import torch
from torch import Tensor

from lt_det.losses.base import LOSS_REGISTRY, mean_over_rows
from lt_det.losses.functional import add_vector
from lt_det.losses.kernels import binary_cross_entropy, compute_dtype
from lt_det.losses.sigmoid import ObjectnessSigmoidLoss


@LOSS_REGISTRY.register()
class ECM(ObjectnessSigmoidLoss):
    """Effective class margins: BCE of K + 1 sigmoids with margins from the ratio of positives to negatives.

    Cho and Krahenbuhl, "Long-tail Detection with Effective Class-Margins", ECCV 2022, as in their published
    code: with n_c images of class c, ``background_ratio`` times their sum for background, N the sum of all,
    and a_c = (N - n_c) / n_c, the probability is sigmoid(2 z_c - log(a_c) / 4) (the effective
    margins w+ and w-) and the class weight is a_c log((1 + a_c) / a_c). Inference takes sigmoid(z_c) times
    one minus background's.

    Args:
        background_ratio: background samples for each foreground sample (6.3313 measured with Mask R-CNN by
            the authors).
        bias_prior: probability that every output starts with; 0: no bias, as published.
    """

    config_node = "ECM"
    needs_statistics = True
    prior_sources = ("image_count", "instance_count", "sampled")

    def __init__(self, num_classes: int, *, background_ratio: float = 6.3313, bias_prior: float = 0.0, **common):
        super().__init__(num_classes, bias_prior=bias_prior, **common)
        if background_ratio <= 0:
            raise ValueError(f"ECM: background_ratio must be positive, got {background_ratio}")
        self.background_ratio = float(background_ratio)
        self.register_buffer("margin", torch.zeros(num_classes + 1), persistent=False)
        self.register_buffer("class_weights", torch.ones(num_classes + 1), persistent=False)

    def load_statistics(self, statistics) -> None:
        counts = self.class_counts()
        counts = torch.cat([counts, counts.sum(dim=0, keepdim=True) * self.background_ratio])
        a = (counts.sum() - counts) / counts
        self.margin.copy_(-a.log() / 4)
        self.class_weights.copy_(a * torch.log1p(1 / a))

    def compute(self, scores: Tensor, labels: Tensor, roi_weights: Tensor | None) -> Tensor:
        dtype = compute_dtype(scores.dtype)
        weights = self.class_weights.to(dtype)
        losses = binary_cross_entropy(
            scores,
            labels,
            scale=2.0,
            adjust=add_vector(self.margin.to(dtype)),
            negative_weight=weights,
            positive_weight=weights,
        )
        return mean_over_rows(losses, roi_weights, scores)

    def summary(self) -> str:
        foreground = self.margin[:-1]
        return (
            f"margins from {foreground.min():+.2f} to {foreground.max():+.2f} by prior {self.prior!r} over"
            f" {self.num_classes} classes, background a class of its own ({self.background_ratio:g} times the"
            f" foreground, margin {self.margin[-1].item():+.2f}), weights from {self.class_weights.min():.3g}"
            f" to {self.class_weights.max():.3g}"
        )
