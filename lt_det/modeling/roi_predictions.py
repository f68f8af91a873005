"""A detector's inference, halted where scores are about to become detections."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.roi_heads import CascadeROIHeads, Res5ROIHeads, StandardROIHeads
from detectron2.structures import Instances
from torch import Tensor

from .box_predictor import LongTailOutputLayers
from .fast_inference import fast_rcnn_inference


@dataclass
class RoIPredictions:
    """What the box head says about the RoIs of a batch of images, before any choice is made by scores.

    Attributes:
        detector: the detector that made them.
        features: its feature maps by name.
        stages: for each cascade stage (one without a cascade), the predictor, its scores and box deltas, and the
            proposals, one ``Instances`` an image.
    """

    detector: GeneralizedRCNN
    features: dict[str, Tensor]
    stages: list[tuple[LongTailOutputLayers, tuple[Tensor, Tensor], list[Instances]]]

    @torch.no_grad()
    def detections(self) -> tuple[list[Instances], list[Tensor]]:
        """Detections with the predictors' present calibrators, as the detector itself makes them.

        Returns:
            For each image ``Instances`` with ``pred_boxes``, ``scores``, ``pred_classes`` in the coordinates of the
            network's input, and the RoI ``(n,)`` int64 that each came from.
        """
        predictor, predictions, proposals = self.stages[-1]
        if len(self.stages) == 1:
            return predictor.inference(predictions, proposals)
        by_stage = [p.predict_probs(scores, props) for p, scores, props in self.stages]
        probs = [sum(list(stages)) * (1.0 / len(self.stages)) for stages in zip(*by_stage)]
        return fast_rcnn_inference(
            predictor.predict_boxes(predictions, proposals),
            probs,
            [p.image_size for p in proposals],
            predictor.test_score_thresh,
            predictor.test_nms_thresh,
            predictor.test_topk_per_image,
        )

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
        maps = [features[f] for f in heads.box_in_features]
        sizes, stages = [p.image_size for p in proposals], []
        for k in range(heads.num_cascade_stages):
            if k > 0:
                proposals = heads._create_proposals_from_boxes(boxes, sizes)  # noqa: F821  # of the stage before
            predictions = heads._run_stage(maps, proposals, k)
            boxes = heads.box_predictor[k].predict_boxes(predictions, proposals)
            stages.append((heads.box_predictor[k], predictions, proposals))
        return RoIPredictions(detector, features, stages)
    boxes = [p.proposal_boxes for p in proposals]
    if isinstance(heads, Res5ROIHeads):
        x = heads._shared_roi_transform([features[f] for f in heads.in_features], boxes).mean(dim=[2, 3])
    else:
        x = heads.box_head(heads.box_pooler([features[f] for f in heads.box_in_features], boxes))
    return RoIPredictions(detector, features, [(heads.box_predictor, heads.box_predictor(x), proposals)])
