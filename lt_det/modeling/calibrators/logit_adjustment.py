"""Post-hoc logit adjustment."""

import numpy as np

from .base import CALIBRATOR_REGISTRY
from .prior import PriorCalibrator


@CALIBRATOR_REGISTRY.register()
class LogitAdjustment(PriorCalibrator):
    """Post-hoc logit adjustment: z_c - tau log(K pi_c). Menon et al., ICLR 2021, eq. 9, with w_c = (K pi_c)^-tau.

    The background's score stays: the label shift from the training prior of the foreground to a uniform one, as
    in ``LogitAdjusted`` with the background rule "keep". Uniform counts change nothing.

    Args:
        tau: strength; 1 assumes that the validation set is uniform over classes, 0 that it is as the training set.
    """

    def __init__(
        self,
        tau: float = 1.0,
        *,
        statistics=None,
        prior: str = "image_count",
        background: str = "keep",
        min_count: float = 0.0,
    ):
        super().__init__(tau, statistics=statistics, prior=prior, background=background, min_count=min_count)

    def log_weights_from(self, counts, statistics, *, mutually_exclusive):
        return -self.value * np.log(counts * (len(counts) / counts.sum()))
