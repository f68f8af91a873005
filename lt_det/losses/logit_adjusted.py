"""Logit-adjusted softmax."""

from __future__ import annotations

from torch import Tensor

from lt_det.losses.base import LOSS_REGISTRY, mean_over_rows
from lt_det.losses.kernels import adjusted_cross_entropy, compute_dtype
from lt_det.losses.prior_adjusted import PriorAdjustedLoss


@LOSS_REGISTRY.register()
class LogitAdjusted(PriorAdjustedLoss):
    """Logit-adjusted softmax: CE(z + tau a, y). Menon et al., ICLR 2021, eq. 10.

    The adjustment a, its prior and its background rules are those of :class:`PriorAdjustedLoss`.

    Args:
        tau: strength of the adjustment.
        background_fraction: with ``background="prior"``, the fraction of RoIs that are background; 0:
            measured.
    """

    config_node = "LOGIT_ADJUSTED"

    def __init__(self, num_classes: int, *, tau: float = 1.0, background_fraction: float = 0.0, **common):
        super().__init__(num_classes, tau=tau, background_fraction=background_fraction, **common)

    def compute(self, scores: Tensor, labels: Tensor, roi_weights: Tensor | None) -> Tensor:
        self.observe(labels)
        adjust = self.adjuster(labels, compute_dtype(scores.dtype))
        return mean_over_rows(adjusted_cross_entropy(scores, labels, adjust=adjust), roi_weights, scores)
