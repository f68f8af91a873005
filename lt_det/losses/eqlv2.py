"""Equalization loss v2."""

from __future__ import annotations

import torch
from torch import Tensor

from lt_det.losses.base import LOSS_REGISTRY, mean_over_rows
from lt_det.losses.distributed import all_reduce_sum
from lt_det.losses.kernels import binary_cross_entropy, column_sums
from lt_det.losses.sigmoid import ObjectnessSigmoidLoss


@LOSS_REGISTRY.register()
class EQLv2(ObjectnessSigmoidLoss):
    """Equalization loss v2: BCE re-weighted by each class's ratio of positive to negative gradients.

    Tan et al., "Equalization Loss v2", CVPR 2021: with the ratio g_c of the accumulated
    gradients, negatives have weight r_c = 1 / (1 + exp(-gamma (g_c - mu))) and positives 1 + alpha (1 -
    r_c). Accumulated gradients are those of the weighted loss (as in the published code), summed over
    ranks, kept in the checkpoint; before the first batch g_c is 100. The (K + 1)th sigmoid is objectness,
    with weight 1; at inference the classes are multiplied by one minus it.

    Args:
        gamma, mu: slope and centre of the negative weight.
        alpha: largest extra weight of positives.
        bias_prior: probability that every class starts with.
    """

    config_node = "EQLV2"

    def __init__(
        self,
        num_classes: int,
        *,
        gamma: float = 12.0,
        mu: float = 0.8,
        alpha: float = 4.0,
        bias_prior: float = 0.001,
        **common,
    ):
        super().__init__(num_classes, bias_prior=bias_prior, **common)
        self.gamma, self.mu, self.alpha = float(gamma), float(mu), float(alpha)
        self.register_buffer("positive_gradient", torch.zeros(num_classes, dtype=torch.float64))
        self.register_buffer("negative_gradient", torch.zeros(num_classes, dtype=torch.float64))

    def class_weights(self) -> tuple[Tensor, Tensor]:
        """(K + 1,) weights of positives and of negatives, by the gradients so far."""
        ratio = self.positive_gradient / (self.negative_gradient + 1e-10)
        untouched = (self.positive_gradient == 0) & (self.negative_gradient == 0)
        negative = torch.sigmoid(self.gamma * (torch.where(untouched, 100.0, ratio) - self.mu))
        negative = torch.cat([negative, negative.new_ones(1)])
        return 1 + self.alpha * (1 - negative), negative

    def compute(self, scores: Tensor, labels: Tensor, roi_weights: Tensor | None) -> Tensor:
        positive, negative = (w.to(torch.float32) for w in self.class_weights())
        losses, gradient = binary_cross_entropy(
            scores, labels, negative_weight=negative, positive_weight=positive, return_gradient=True
        )
        if self.training:
            self._accumulate(gradient, labels)
        return mean_over_rows(losses, roi_weights, scores)

    @torch.no_grad()
    def _accumulate(self, gradient: Tensor, labels: Tensor) -> None:
        own = -gradient.gather(1, labels[:, None]).squeeze(1)  # a positive's gradient is negative
        sums = torch.zeros(2, self.num_classes + 1, dtype=torch.float64, device=gradient.device)
        sums[0].scatter_add_(0, labels, own.to(sums.dtype))
        # In float64: a rare class's few large positives must cancel to the last digit of its many small
        # negatives.
        sums[1] = column_sums(gradient) + sums[0]
        all_reduce_sum(sums)
        self.positive_gradient += sums[0, :-1]
        self.negative_gradient += sums[1, :-1]

    def summary(self) -> str:
        _, negative = self.class_weights()
        return (
            f"{self.num_classes} sigmoids and objectness, gamma {self.gamma:g}, mu {self.mu:g}, alpha"
            f" {self.alpha:g}, background: no shift, weights of negatives now from {negative.min():.3g} to"
            f" {negative.max():.3g}, bias prior {self.bias_prior:g}"
        )
