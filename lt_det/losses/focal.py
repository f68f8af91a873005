"""Focal loss of sigmoids."""

from __future__ import annotations

import torch
from torch import Tensor

from lt_det.losses.base import LOSS_REGISTRY, mean_over_rows
from lt_det.losses.kernels import one_hot_foreground, rowwise_loss, softplus
from lt_det.losses.sigmoid import SigmoidLoss


def focal_rows(logits: Tensor, labels: Tensor, *, alpha: float, gamma: float) -> Tensor:
    """(R,) focal losses of C sigmoids, summed over classes; labels of C and above have no positive class."""
    positive_weight, negative_weight = (alpha, 1 - alpha) if alpha >= 0 else (1.0, 1.0)
    num_classes = logits.shape[1]

    def term(x: Tensor) -> tuple[Tensor, Tensor]:
        # 1 - p_t = sigmoid(x) with x = -z for the positive and z else, so the loss is sigmoid(x)^gamma
        # softplus(x).
        s, value = torch.sigmoid(x), softplus(x)
        power = s.pow(gamma)
        derivative = (1 - s).mul_(value).mul_(gamma).add_(s).mul_(power)
        return value.mul_(power), derivative

    def function(z: Tensor, rows: slice, gradient: Tensor | None) -> Tensor:
        y = labels[rows, None]
        index, is_class = y.clamp(max=num_classes - 1), y < num_classes
        value, derivative = term(z)
        own_value, own_derivative = term(-z.gather(1, index))
        value.mul_(negative_weight)
        value.scatter_(1, index, torch.where(is_class, own_value * positive_weight, value.gather(1, index)))
        if gradient is not None:
            torch.mul(derivative, negative_weight, out=gradient)
            own_derivative = torch.where(is_class, own_derivative * -positive_weight, gradient.gather(1, index))
            gradient.scatter_(1, index, own_derivative)
        return value.sum(dim=1)

    def plain(z: Tensor) -> Tensor:
        target = one_hot_foreground(labels, num_classes, z.dtype)
        x = z * (1 - 2 * target)
        weight = positive_weight * target + negative_weight * (1 - target)
        return (torch.sigmoid(x).pow(gamma) * softplus(x) * weight).sum(dim=1)

    return rowwise_loss(logits, function, plain, keep_gradient=True)


@LOSS_REGISTRY.register()
class Focal(SigmoidLoss):
    """Focal loss of K sigmoids: -alpha_t (1 - p_t)^gamma log p_t. Lin et al., ICCV 2017, eq. 5.

    Summed over classes, mean over rows as the other losses of the box head (RetinaNet divides by the number
    of foreground anchors instead).

    Args:
        alpha: weight of positives, 1 - alpha of negatives; negative: no weights.
        gamma: focusing exponent.
        bias_prior: probability that every class starts with.
    """

    config_node = "FOCAL"

    def __init__(
        self, num_classes: int, *, alpha: float = 0.25, gamma: float = 2.0, bias_prior: float = 0.01, **common
    ):
        super().__init__(num_classes, bias_prior=bias_prior, **common)
        if alpha > 1 or gamma < 0:
            raise ValueError(f"Focal: alpha must be <= 1 and gamma >= 0, got alpha={alpha}, gamma={gamma}")
        self.alpha, self.gamma = float(alpha), float(gamma)

    def compute(self, scores: Tensor, labels: Tensor, roi_weights: Tensor | None) -> Tensor:
        return mean_over_rows(focal_rows(scores, labels, alpha=self.alpha, gamma=self.gamma), roi_weights, scores)

    def summary(self) -> str:
        return f"{super().summary()}, alpha {self.alpha:g}, gamma {self.gamma:g}"
