"""FRACAL: calibration by frequency and by how evenly a class's objects lie in the image."""

from torch import Tensor

from lt_det.losses.functional import fracal_log_weights

from .base import CALIBRATOR_REGISTRY
from .prior import PriorCalibrator, weighted_odds


@CALIBRATOR_REGISTRY.register()
class FRACAL(PriorCalibrator):
    """Fractal calibration. Alexandridis et al., Fractal Calibration for Long-tailed Object Detection, CVPR 2025.

    Softmax losses: softmax(z_c - log10(K f_c)) / D_c^strength, renormalised; background has no shift and D = 1. f_c is
    the class's share of the counts and D_c the fractal dimension of its box centres
    (:func:`lt_det.data.fractal_dimensions`). Sigmoid losses: sigmoid(z_c) sigmoid(z_c - log10(K f_c) - log10(K D_c^s /
    sum_j D_j^s)). See :func:`lt_det.losses.functional.fracal_probabilities`.

    The published code takes f_c as images of the class over images of the set. Its shares sum to more than 1, so all
    its foreground scores are lower by one constant (0.56 on LVIS v1) against the background's.

    Args:
        strength: exponent of the fractal dimension, 2 as published. 0 is the model as trained, without the shift by
            frequency too.
    """

    parameter = "strength"

    def __init__(
        self,
        strength: float = 2.0,
        *,
        statistics=None,
        prior: str = "image_count",
        background: str = "keep",
        min_count: float = 0.0,
    ):
        super().__init__(strength, statistics=statistics, prior=prior, background=background, min_count=min_count)

    def log_weights_from(self, counts, statistics, *, mutually_exclusive):
        if statistics.fractal_dimension is None:
            raise ValueError(
                "FRACAL needs the boxes of the training set, and these class statistics are without; let "
                "DATASETS.TRAIN or MODEL.LONG_TAIL.STATISTICS name an annotation file"
            )
        share, dimensions = counts / counts.sum(), statistics.fractal_dimension
        return fracal_log_weights(share, dimensions, self.value, sigmoid=not mutually_exclusive).numpy()

    def independent(self, probs: Tensor, weights: Tensor) -> Tensor:
        return probs * weighted_odds(probs, weights)
