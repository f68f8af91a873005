"""Sigmoid losses: one binary classifier a class, background is where all are off."""

from __future__ import annotations

import torch
from torch import Tensor

from lt_det.losses.base import LOSS_REGISTRY, ClassificationLoss, bias_for_probability, mean_over_rows
from lt_det.losses.functional import balanced_sigmoid_rows
from lt_det.losses.kernels import binary_cross_entropy


class SigmoidLoss(ClassificationLoss):
    """K sigmoids; the sum over classes, the mean over rows.

    Args:
        bias_prior: probability that every class starts with, by the classifier's bias; 0: no bias.
    """

    mutually_exclusive = False

    def __init__(self, num_classes: int, *, bias_prior: float = 0.001, **common):
        super().__init__(num_classes, **common)
        self.bias_prior = bias_prior
        self._bias = bias_for_probability(bias_prior)

    def num_outputs(self, num_classes: int) -> int:
        return num_classes

    def initial_bias(self, num_classes: int) -> Tensor:
        return torch.full((self.num_outputs(num_classes),), self._bias)

    def activation(self, scores: Tensor) -> Tensor:
        """Sigmoids; the background column, which Detectron2 drops, is 0."""
        probs = scores[:, : self.num_classes].sigmoid()
        return torch.cat([probs, probs.new_zeros(probs.shape[0], 1)], dim=1)

    def summary(self) -> str:
        return f"{self.num_classes} sigmoids, background: no shift, bias prior {self.bias_prior:g}"


class DetectronSigmoidLoss(SigmoidLoss):
    """Sigmoid losses that Detectron2 has too, with an output for background that it never trains."""

    def __init__(self, num_classes: int, *, bias_prior: float, background_column: bool, **common):
        super().__init__(num_classes, bias_prior=bias_prior, **common)
        self.background_column = background_column

    def num_outputs(self, num_classes: int) -> int:
        return num_classes + 1 if self.background_column else num_classes

    def activation(self, scores: Tensor) -> Tensor:
        return scores.sigmoid() if self.background_column else super().activation(scores)


@LOSS_REGISTRY.register()
class Sigmoid(DetectronSigmoidLoss):
    """Binary cross entropy of K sigmoids: Detectron2's ``USE_SIGMOID_CE``, and the stage 1 of BALMS on LVIS.

    Args:
        bias_prior: probability that every class starts with (BALMS's code: 0.001; Detectron2: 0, no bias).
        background_column: keep Detectron2's unused (K + 1)th output, so that its checkpoints fit.
    """

    config_node = "SIGMOID"

    def __init__(self, num_classes: int, *, bias_prior: float = 0.001, background_column: bool = False, **common):
        super().__init__(num_classes, bias_prior=bias_prior, background_column=background_column, **common)

    def compute(self, scores: Tensor, labels: Tensor, roi_weights: Tensor | None) -> Tensor:
        return mean_over_rows(binary_cross_entropy(scores[:, : self.num_classes], labels), roi_weights, scores)


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
