"""Federated loss."""

from __future__ import annotations

import torch
from torch import Tensor

from lt_det.losses.base import LOSS_REGISTRY, mean_over_rows, reading_waits
from lt_det.losses.kernels import binary_cross_entropy
from lt_det.losses.sigmoid import DetectronSigmoidLoss


@LOSS_REGISTRY.register()
class Federated(DetectronSigmoidLoss):
    """Federated loss: sigmoids of the batch's classes and a random draw of others (``USE_FED_LOSS``).

    Zhou et al., "Probabilistic two-stage detection", 2021. Other classes are drawn with probability
    proportional to image_count^frequency_power until there are ``num_sampled`` in all (background, if it is
    among the labels, counts as one, as in Detectron2). Equals Detectron2's loss for the same random state,
    and on the CPU evaluates only the drawn classes.

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
        """(K,) bool, the classes of the loss: those of ``labels`` and the drawn ones."""
        present = torch.zeros(self.num_classes + 1, dtype=torch.bool, device=labels.device)
        present[labels] = True
        weight = torch.cat([self.sampling_weight.float(), self.sampling_weight.new_zeros(1).float()])
        weight = torch.where(present, 0.0, weight)
        # torch.multinomial without replacement takes the largest of these for its draw (and waits for the device).
        ordered, drawn = (weight / torch.empty_like(weight).exponential_(1)).sort(descending=True, stable=True)
        number = self.num_sampled - present.sum()
        kept = (torch.arange(weight.numel(), device=weight.device) < number) & (ordered > 0)
        return present.scatter(0, drawn, kept | present[drawn])[:-1]

    def compute(self, scores: Tensor, labels: Tensor, roi_weights: Tensor | None) -> Tensor:
        if labels.numel() == 0:
            return scores.float().sum() * 0.0
        kept = self.sample_classes(labels)
        if reading_waits(kept):  # for the number of classes
            weight = kept.to(torch.float32)
            losses = binary_cross_entropy(scores[:, : self.num_classes], labels, negative_weight=weight)
            return mean_over_rows(losses, roi_weights, scores)
        classes = kept.nonzero().squeeze(1)
        position = torch.full((self.num_classes + 1,), classes.numel(), dtype=torch.int64, device=labels.device)
        position[classes] = torch.arange(classes.numel(), device=labels.device)
        losses = binary_cross_entropy(scores.index_select(1, classes), position[labels])
        return mean_over_rows(losses, roi_weights, scores)

    def summary(self) -> str:
        return f"{super().summary()}, {self.num_sampled} classes a batch, drawn by image_count^{self.frequency_power:g}"
