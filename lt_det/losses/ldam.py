"""LDAM with deferred re-weighting."""

from __future__ import annotations

import torch
from torch import Tensor

from lt_det.losses.base import LOSS_REGISTRY, mean_over_rows
from lt_det.losses.class_weights import ClassWeightedLoss
from lt_det.losses.functional import effective_number_weights, ldam_margins, ldam_rows
from lt_det.losses.kernels import compute_dtype


@LOSS_REGISTRY.register()
class LDAM(ClassWeightedLoss):
    """LDAM: CE(s (cos - m_y onehot_y), y), m_c proportional to n_c^(-1/4); with deferred re-weighting (DRW).

    Cao et al., NeurIPS 2019, with algorithm 1. Scores are cosines. Background has margin 0 and weight 1. While DRW is
    active, rows are weighted by the effective number of their class, in proportion to (1 - beta) / (1 - beta^n_c) and
    with a mean of 1 over foreground RoIs (the paper's sum of K belongs to a problem without background, see
    :class:`ClassWeightedLoss`), and the mean is the weighted mean of ``F.cross_entropy``. The trainer switches it on
    by :meth:`set_drw`, from the iteration at which the phase starts (algorithm 1 also cuts the learning rate there,
    which is the trainer's part).

    Args:
        max_margin: largest margin, that of the rarest class.
        scale: s, which multiplies the cosines.
        beta: of the effective number.
        drw: re-weight from the start, without a phase.
        roi_shares: where the classes' shares of foreground RoIs come from: "statistics" or "online".
    """

    config_node = "LDAM"
    wants_cosine = True
    needs_statistics = True
    prior_sources = ("image_count", "instance_count", "sampled")

    def __init__(
        self,
        num_classes: int,
        *,
        max_margin: float = 0.5,
        scale: float = 30.0,
        beta: float = 0.9999,
        drw: bool = False,
        roi_shares: str = "statistics",
        **common,
    ):
        super().__init__(num_classes, roi_shares=roi_shares, **common)
        self.max_margin = float(max_margin)
        self.scale = float(scale)
        self.beta = float(beta)
        self.drw_active = bool(drw)
        self.register_buffer("margins", torch.zeros(num_classes + 1), persistent=False)

    def set_drw(self, active: bool) -> None:
        """Switch deferred re-weighting. Not in the checkpoint: the phase sets it again on resuming."""
        self.drw_active = bool(active)

    def load_statistics(self, statistics) -> None:
        counts = self.class_counts()
        self.margins[:-1] = ldam_margins(counts, self.max_margin).to(self.margins)
        self.set_class_weights(effective_number_weights(counts, self.beta))

    def activation(self, scores: Tensor) -> Tensor:
        return (scores * self.scale).softmax(dim=1)

    def compute(self, scores: Tensor, labels: Tensor, roi_weights: Tensor | None) -> Tensor:
        self.observe(labels)
        dtype = compute_dtype(scores.dtype)
        losses = ldam_rows(scores, labels, self.margins.to(dtype), self.scale)
        if not self.drw_active or losses.numel() == 0:
            return mean_over_rows(losses, roi_weights, scores)
        weights = self.class_weights.to(dtype)[labels]
        normaliser = weights.sum()
        if roi_weights is not None:
            weights = weights * roi_weights.to(dtype)
        return (losses * weights).sum() / normaliser

    def summary(self) -> str:
        foreground = self.margins[:-1]
        return (
            f"scale {self.scale:g}, margins from {foreground.min():.3f} to {foreground.max():.3f} by prior"
            f" {self.prior!r} over {self.num_classes} classes, background margin 0, DRW"
            f" {'on' if self.drw_active else 'off'} with weights from {self.class_weights[:-1].min():.3g} to"
            f" {self.class_weights[:-1].max():.3g} (mean 1 over foreground RoIs, background 1)"
        )
