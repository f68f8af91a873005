"""Gumbel sigmoid: probabilities exp(-exp(-z)), the distribution function of Gumbel's distribution."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lt_det.losses.base import LOSS_REGISTRY, mean_over_rows
from lt_det.losses.functional import GUMBEL_RANGE, gumbel_sigmoid_rows
from lt_det.losses.sigmoid import SigmoidLoss, with_zero_background


class GumbelLoss(SigmoidLoss):
    """Activation and initial bias of p = exp(-exp(-z)), z clamped to [-4, 10]."""

    clamp_range = GUMBEL_RANGE
    __constants__ = ["clamp_range"]  # so that torch.jit finds it

    def initial_bias(self, num_classes: int) -> Tensor:
        bias = -math.log(-math.log(self.bias_prior)) if self.bias_prior else 0.0
        return torch.full((self.num_outputs(num_classes),), bias)

    def activation(self, scores: Tensor) -> Tensor:
        """The probabilities; background is 0."""
        low, high = self.clamp_range
        return with_zero_background(scores.clamp(low, high).neg().exp().neg().exp())

    def summary(self) -> str:
        return super().summary().replace("sigmoids", "Gumbel sigmoids", 1)


@LOSS_REGISTRY.register()
class GumbelSigmoid(GumbelLoss):
    """Binary cross entropy of K probabilities p = exp(-exp(-z)), z clamped to [-4, 10], each element at most 20.

    Alexandridis et al., "Long-tailed Instance Segmentation using Gumbel Optimized Loss", ECCV 2022, eq. 5 to 7, with
    the clamps of their published code. Sum over classes, mean over rows.

    Args:
        bias_prior: probability that every class starts with; 0: no bias, which is a probability of 1 / e.
    """

    config_node = "GUMBEL_SIGMOID"

    def compute(self, scores: Tensor, labels: Tensor, roi_weights: Tensor | None) -> Tensor:
        return mean_over_rows(gumbel_sigmoid_rows(scores, labels), roi_weights, scores)
