"""NorCal: normalised calibration."""

import numpy as np

from .base import CALIBRATOR_REGISTRY
from .prior import PriorCalibrator


@CALIBRATOR_REGISTRY.register()
class NorCal(PriorCalibrator):
    """Normalised calibration: w_c = N_c^-gamma. Pan et al., NeurIPS 2021.

    N_c is the count of the class itself and not its share, so the larger the data set, the more background gains:
    that is how the method is published (background has no count, weight 1, and takes part in the normalisation).
    The published code counts images.

    It is for softmax alone. On sigmoid losses the same rule is applied to each class and its own background, a softmax
    of z_c and 0: s_c w_c / (s_c w_c + 1 - s_c) = sigmoid(z_c - gamma log N_c) with s_c = sigmoid(z_c).

    Args:
        gamma: strength; 0 leaves the scores as they are.
    """

    parameter = "gamma"

    def __init__(
        self,
        gamma: float = 0.6,
        *,
        statistics=None,
        prior: str = "image_count",
        background: str = "keep",
        min_count: float = 0.0,
    ):
        super().__init__(gamma, statistics=statistics, prior=prior, background=background, min_count=min_count)

    def log_weights_from(self, counts, statistics, *, mutually_exclusive):
        return -self.value * np.log(counts)
