"""Losses that re-weight or sub-sample: focal, class-balanced, federated."""

from __future__ import annotations

import torch
from torch import Tensor

from lt_det.losses.base import LOSS_REGISTRY, mean_over_rows
from lt_det.losses.class_weights import ClassWeightedLoss
from lt_det.losses.functional import effective_number_weights
from lt_det.losses.kernels import (
    adjusted_cross_entropy,
    binary_cross_entropy,
    one_hot_foreground,
    rowwise_loss,
    softplus,
)
from lt_det.losses.sigmoid import DetectronSigmoidLoss, SigmoidLoss


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
        return scores.softmax(dim=1) if self.base == "softmax" else super().activation(scores)

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


@LOSS_REGISTRY.register()
class Federated(DetectronSigmoidLoss):
    """Federated loss: sigmoids of the batch's classes and a random draw of others (``USE_FED_LOSS``).

    Zhou et al., "Probabilistic two-stage detection", 2021. Other classes are drawn with probability
    proportional to image_count^frequency_power until there are ``num_sampled`` in all (background, if it is
    among the labels, counts as one, as in Detectron2). Equals Detectron2's loss for the same random state,
    and evaluates only the drawn classes.

    Args:
        num_sampled: number of classes kept (Detectron2's FED_LOSS_NUM_CLASSES).
        frequency_power: Detectron2's FED_LOSS_FREQ_WEIGHT_POWER.
        bias_prior: probability that every class starts with (Detectron2: 0, no bias).
        background_column: keep Detectron2's unused (K + 1)th output, so that its checkpoints fit.
    """

    config_node = "FEDERATED"
    needs_statistics = True
    prior_sources = ("image_count",)

    def __init__(
        self,
        num_classes: int,
        *,
        num_sampled: int = 50,
        frequency_power: float = 0.5,
        bias_prior: float = 0.0,
        background_column: bool = False,
        **common,
    ):
        super().__init__(num_classes, bias_prior=bias_prior, background_column=background_column, **common)
        if num_sampled < 1:
            raise ValueError(f"Federated: num_sampled must be positive, got {num_sampled}")
        self.num_sampled = int(num_sampled)
        self.frequency_power = float(frequency_power)
        self.register_buffer("sampling_weight", torch.zeros(num_classes), persistent=False)

    def load_statistics(self, statistics) -> None:
        counts = self.class_counts("image_count", allow_zero=True)
        # In float32 from the start, as Detectron2 does: the same random state must give the same draw.
        self.sampling_weight.copy_(counts.to(torch.float32) ** self.frequency_power)

    def sample_classes(self, labels: Tensor) -> Tensor:
        """Foreground classes of the loss: those of ``labels`` and the drawn ones, increasing."""
        present = torch.unique(labels)
        kept = torch.zeros(self.num_classes + 1, dtype=torch.bool, device=labels.device)
        kept[present] = True
        number = self.num_sampled - present.numel()
        if number > 0:
            weight = torch.cat([self.sampling_weight.float(), self.sampling_weight.new_zeros(1).float()])
            weight[present] = 0
            available = int((weight > 0).sum())
            if available:
                kept[torch.multinomial(weight, min(number, available), replacement=False)] = True
        return kept[:-1].nonzero().squeeze(1)

    def compute(self, scores: Tensor, labels: Tensor, roi_weights: Tensor | None) -> Tensor:
        if labels.numel() == 0:
            return scores.float().sum() * 0.0
        classes = self.sample_classes(labels)
        position = torch.full((self.num_classes + 1,), classes.numel(), dtype=torch.int64, device=labels.device)
        position[classes] = torch.arange(classes.numel(), device=labels.device)
        losses = binary_cross_entropy(scores.index_select(1, classes), position[labels])
        return mean_over_rows(losses, roi_weights, scores)

    def summary(self) -> str:
        return f"{super().summary()}, {self.num_sampled} classes a batch, drawn by image_count^{self.frequency_power:g}"
