"""A detector's inference, halted where scores are about to become detections."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.roi_heads import CascadeROIHeads, Res5ROIHeads, StandardROIHeads
from detectron2.structures import Instances
from torch import Tensor

from .roi_heads import StagePredictions, detect_by_all, run_cascade


@dataclass
class RoIPredictions:
    """What the box head says about the RoIs of a batch of images, before any choice is made by scores.

    Attributes:
        detector: the detector that made them.
        features: its feature maps by name.
        stages: of each cascade stage (one without a cascade).
    """

    detector: GeneralizedRCNN
    features: dict[str, Tensor]
    stages: list[StagePredictions]

    @torch.no_grad()
    def detections(self) -> tuple[list[Instances], list[Tensor]]:
        """Detections with the predictors' present calibrators, as the detector itself makes them.

        Returns:
            For each image ``Instances`` with ``pred_boxes``, ``scores``, ``pred_classes`` in the coordinates of the
            network's input, and the RoI ``(n,)`` int64 that each came from.
        """
        return detect_by_all(self.stages)

    @torch.no_grad()
    def add_masks(self, detections: list[Instances]) -> list[Instances]:
        """Give ``pred_masks`` ``(n, 1, M, M)`` to detections, if the detector has a mask head."""
        return self.detector.roi_heads.forward_with_given_boxes(self.features, detections)


@torch.no_grad()
def predict_rois(detector: GeneralizedRCNN, batched_inputs: list[dict]) -> RoIPredictions:
    """Run a detector up to its box head's scores.

    Args:
        detector: in evaluation mode, with Detectron2's standard, cascade or C4 ROI heads (or subclasses) and long-tail
            box predictors.
        batched_inputs: as for the detector itself.

    Raises:
        ValueError: if the ROI heads are of another kind, or the detector is in training mode.
    """
    heads = detector.roi_heads
    if not isinstance(heads, (StandardROIHeads, Res5ROIHeads)):
        raise ValueError(f"only standard, cascade and C4 ROI heads are known, not {type(heads).__name__}")
    if detector.training:
        raise ValueError("the detector is in training mode; call eval() on it")
    images = detector.preprocess_image(batched_inputs)
    features = detector.backbone(images.tensor)
    if detector.proposal_generator is None:
        proposals = [x["proposals"].to(detector.device) for x in batched_inputs]
    else:
        proposals, _ = detector.proposal_generator(images, features, None)
    if isinstance(heads, CascadeROIHeads):
        return RoIPredictions(detector, features, run_cascade(heads, features, proposals))
    boxes = [p.proposal_boxes for p in proposals]
    if isinstance(heads, Res5ROIHeads):
        x = heads._shared_roi_transform([features[f] for f in heads.in_features], boxes).mean(dim=[2, 3])
    else:
        x = heads.box_head(heads.box_pooler([features[f] for f in heads.box_in_features], boxes))
    predictor, predictions = heads.box_predictor, heads.box_predictor(x)
    stage = predictor, predictions, proposals, predictor.predict_boxes(predictions, proposals)
    return RoIPredictions(detector, features, [stage])
