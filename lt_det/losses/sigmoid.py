"""Sigmoid losses: one binary classifier a class, background is where all are off."""

from __future__ import annotations

import torch
from torch import Tensor

from lt_det.losses.base import LOSS_REGISTRY, ClassificationLoss, bias_for_probability, mean_over_rows
from lt_det.losses.kernels import binary_cross_entropy


def with_zero_background(probs: Tensor) -> Tensor:
    """(R, K) probabilities with a background column of zeros, which Detectron2 drops."""
    return torch.cat([probs, probs.new_zeros(probs.shape[0], 1)], dim=1)


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
        """Sigmoids; background is 0."""
        return with_zero_background(scores[:, : self.num_classes].sigmoid())

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
        """As the base class, but for a background column that is there."""
        probs = scores.sigmoid()
        return probs if self.background_column else with_zero_background(probs)


class ObjectnessSigmoidLoss(ClassificationLoss):
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
