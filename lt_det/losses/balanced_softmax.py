"""Balanced softmax."""

from __future__ import annotations

from lt_det.losses.base import LOSS_REGISTRY
from lt_det.losses.logit_adjusted import LogitAdjusted


@LOSS_REGISTRY.register()
class BalancedSoftmax(LogitAdjusted):
    """Balanced Softmax: CE(z + a, y). Ren et al., NeurIPS 2020, eq. 4; ``LogitAdjusted`` with tau = 1.

    Args:
        background_fraction: with ``background="prior"``, the fraction of RoIs that are background; 0:
            measured.
    """

    config_node = "BALANCED_SOFTMAX"

    def __init__(self, num_classes: int, *, background_fraction: float = 0.0, **common):
        super().__init__(num_classes, tau=1.0, background_fraction=background_fraction, **common)
