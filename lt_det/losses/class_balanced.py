"""Class-balanced loss."""

from __future__ import annotations

import torch
from torch import Tensor

from lt_det.losses.base import LOSS_REGISTRY, mean_over_rows
from lt_det.losses.class_weights import ClassWeightedLoss
from lt_det.losses.focal import focal_rows
from lt_det.losses.functional import effective_number_weights
from lt_det.losses.kernels import adjusted_cross_entropy, binary_cross_entropy
from lt_det.losses.sigmoid import SigmoidLoss, with_zero_background


@LOSS_REGISTRY.register()
class ClassBalanced(ClassWeightedLoss, SigmoidLoss):
    """Class-balanced loss: rows weighted by the effective number of their class.

    Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019.

    The weight of class c is proportional to (1 - beta) / (1 - beta^n_c), with a mean of 1 over foreground RoIs (the
    paper's sum of K belongs to a problem without background, see :class:`ClassWeightedLoss`); background has weight 1.
    The mean is over rows, not divided by the weights.

    Args:
        base: "softmax" (K + 1 outputs), "sigmoid" or "focal" (K outputs).
        beta: of the effective number.
        gamma: focusing exponent of "focal" (without alpha: the class weights stand for it).
        bias_prior: probability that every sigmoid starts with.
        roi_shares: where the classes' shares of foreground RoIs come from: "statistics" or "online".
    """

    config_node = "CLASS_BALANCED"
    needs_statistics = True
    prior_sources = ("image_count", "instance_count", "sampled")
    bases = ("softmax", "sigmoid", "focal")

    def __init__(
        self,
        num_classes: int,
        *,
        base: str = "softmax",
        beta: float = 0.9999,
        gamma: float = 2.0,
        bias_prior: float = 0.001,
        roi_shares: str = "statistics",
        **common,
    ):
        super().__init__(num_classes, bias_prior=bias_prior, roi_shares=roi_shares, **common)
        if base not in self.bases:
            raise ValueError(f"ClassBalanced: base is {base!r}; choose one of {', '.join(self.bases)}")
        self.base, self.beta, self.gamma = base, float(beta), float(gamma)
        self.mutually_exclusive = base == "softmax"

    def load_statistics(self, statistics) -> None:
        self.set_class_weights(effective_number_weights(self.class_counts(), self.beta))

    def num_outputs(self, num_classes: int) -> int:
        return num_classes + 1 if self.base == "softmax" else num_classes

    def initial_bias(self, num_classes: int) -> Tensor:
        return torch.zeros(num_classes + 1) if self.base == "softmax" else super().initial_bias(num_classes)

    def activation(self, scores: Tensor) -> Tensor:
        if self.base == "softmax":
            return scores.softmax(dim=1)
        return with_zero_background(scores.sigmoid())

    def compute(self, scores: Tensor, labels: Tensor, roi_weights: Tensor | None) -> Tensor:
        self.observe(labels)
        if self.base == "softmax":
            losses = adjusted_cross_entropy(scores, labels)
        elif self.base == "sigmoid":
            losses = binary_cross_entropy(scores, labels)
        else:
            losses = focal_rows(scores, labels, alpha=-1.0, gamma=self.gamma)
        return mean_over_rows(losses * self.class_weights.to(losses.dtype)[labels], roi_weights, scores)

    def summary(self) -> str:
        weights = self.class_weights[:-1]
        return (
            f"base {self.base!r}, beta {self.beta:g}, weights from {weights.min():.3g} to {weights.max():.3g}"
            f" by prior {self.prior!r} over {self.num_classes} classes, mean 1 over foreground RoIs, background 1"
        )
