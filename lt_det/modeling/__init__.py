"""Box predictor, classifiers, calibrators, ROI heads and mask head."""

from .box_predictor import LongTailOutputLayers
from .build import build_calibrator, build_loss, calibrator_options
from .calibrators import (
    CALIBRATOR_REGISTRY,
    FRACAL,
    Calibrator,
    LogitAdjustment,
    LogitMoments,
    LogN,
    NorCal,
    TauNorm,
)
from .classifiers import CosineClassifier, build_classifier
from .decoupled import DecoupledClassifier, RoIBatch, box_predictors, set_stage2_loss
from .fast_inference import fast_rcnn_inference
from .mask_head import LongTailMaskHead, NormalizedMaskRCNNConvUpsampleHead
from .pooling import LongTailROIAlign
from .roi_heads import LongTailCascadeROIHeads, LongTailRes5ROIHeads, LongTailROIHeads
from .statistics import dataset_statistics, statistics_from_config
from .tta import LongTailRCNNWithTTA

__all__ = [
    "CALIBRATOR_REGISTRY",
    "FRACAL",
    "Calibrator",
    "CosineClassifier",
    "DecoupledClassifier",
    "LogN",
    "LogitAdjustment",
    "LogitMoments",
    "LongTailCascadeROIHeads",
    "LongTailMaskHead",
    "LongTailOutputLayers",
    "LongTailRCNNWithTTA",
    "LongTailROIAlign",
    "LongTailROIHeads",
    "LongTailRes5ROIHeads",
    "NorCal",
    "NormalizedMaskRCNNConvUpsampleHead",
    "RoIBatch",
    "TauNorm",
    "box_predictors",
    "build_calibrator",
    "build_classifier",
    "build_loss",
    "calibrator_options",
    "dataset_statistics",
    "fast_rcnn_inference",
    "set_stage2_loss",
    "statistics_from_config",
]
