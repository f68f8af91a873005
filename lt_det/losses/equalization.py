"""Sigmoid losses that spare rare classes the gradients of negatives: EQL, EQL v2, DropLoss, ACSL."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lt_det.losses.base import LOSS_REGISTRY, ClassificationLoss, bias_for_probability, mean_over_rows
from lt_det.losses.distributed import all_reduce_sum
from lt_det.losses.kernels import binary_cross_entropy, column_sums
from lt_det.losses.sigmoid import SigmoidLoss


class _RareClassLoss(SigmoidLoss):
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
class EQL(_RareClassLoss):
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


@LOSS_REGISTRY.register()
class DropLoss(_RareClassLoss):
    """DropLoss: EQL, and the negatives of rare classes on background rows are dropped at random.

    Hsieh et al., "DropLoss for Long-Tail Instance Segmentation", AAAI 2021. A rare class's negative on a
    background row is kept with the probability that a foreground row of the batch is of a rare class; drawn
    for each row and class. A batch without foreground keeps them all, as the published code does.

    Args:
        rare_frequency: as in ``EQL``.
        bias_prior: probability that every class starts with.
    """

    config_node = "DROP_LOSS"

    def negative_weight(self, labels: Tensor) -> Callable[[Tensor, slice], Tensor]:
        """Which negatives count in this batch, drawn anew: (n, K) of 0 and 1 for the rows of a slice."""
        is_background = labels == self.num_classes
        rare_label = torch.cat([self.is_rare, self.is_rare.new_zeros(1)])[labels]
        num_foreground = (~is_background).sum()
        probability = torch.where(num_foreground > 0, rare_label.sum() / num_foreground.clamp(min=1), 1.0)
        # One byte for each row and rare class: drawn here, as the loss may be evaluated again for a second
        # derivative.
        rare = self.rare_classes
        kept = torch.rand(labels.numel(), rare.numel(), device=labels.device) < probability
        kept &= is_background[:, None]

        def weight(z: Tensor, rows: slice) -> Tensor:
            return torch.ones_like(z).index_copy_(1, rare, kept[rows].to(z.dtype))

        return weight

    def compute(self, scores: Tensor, labels: Tensor, roi_weights: Tensor | None) -> Tensor:
        losses = binary_cross_entropy(scores, labels, negative_weight=self.negative_weight(labels))
        return mean_over_rows(losses, roi_weights, scores)


class _ObjectnessSigmoidLoss(ClassificationLoss):
    """K + 1 sigmoids, of which the last is background's."""

    mutually_exclusive = False

    def __init__(self, num_classes: int, *, bias_prior: float, **common):
        super().__init__(num_classes, **common)
        self.bias_prior = float(bias_prior)
        self._bias = bias_for_probability(bias_prior)

    def initial_bias(self, num_classes: int) -> Tensor:
        return torch.full((num_classes + 1,), self._bias)

    def activation(self, scores: Tensor) -> Tensor:
        """Sigmoids of the classes, times one minus that of background."""
        probs = scores.sigmoid()
        return torch.cat([probs[:, :-1] * (1 - probs[:, -1:]), probs[:, -1:]], dim=1)


@LOSS_REGISTRY.register()
class EQLv2(_ObjectnessSigmoidLoss):
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


@LOSS_REGISTRY.register()
class ACSL(_ObjectnessSigmoidLoss):
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
        chosen = [random_rows(is_background, (num_background * f).floor()) for f in self.fractions]
        chosen = torch.stack([*chosen, is_background], dim=1)
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


def random_rows(candidates: Tensor, number: Tensor) -> Tensor:
    """(R,) bool: ``number`` of the rows that ``candidates`` (R,) marks, drawn at random without a sync."""
    order = torch.randperm(candidates.numel(), device=candidates.device)
    shuffled = candidates[order]
    chosen = torch.empty_like(candidates)
    chosen[order] = shuffled & (shuffled.cumsum(0) <= number)
    return chosen
