"""Calibrators: they change the scores of a trained model at inference, and nothing else.

A calibrator has no parameters and no buffers, so it leaves the state dict as it is and works on any checkpoint,
stock Detectron2's included. In a cascade each stage is calibrated before the stages' probabilities are averaged.
"""

from .base import CALIBRATOR_REGISTRY, Calibrator
from .fracal import FRACAL
from .logit_adjustment import LogitAdjustment
from .logn import LogitMoments, LogN, classifier_key, moments_path, read_moments, write_moments
from .norcal import NorCal
from .prior import PriorCalibrator
from .tau_norm import TauNorm

__all__ = [
    "CALIBRATOR_REGISTRY",
    "FRACAL",
    "Calibrator",
    "LogN",
    "LogitAdjustment",
    "LogitMoments",
    "NorCal",
    "PriorCalibrator",
    "TauNorm",
    "classifier_key",
    "moments_path",
    "read_moments",
    "write_moments",
]
