"""Test-time augmentation as Detectron2's, with the fast suppression."""

from __future__ import annotations

import torch
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.structures import Instances
from torch import Tensor

from .fast_inference import fast_rcnn_inference_single_image

__all__ = ["LongTailRCNNWithTTA"]


class LongTailRCNNWithTTA(GeneralizedRCNNWithTTA):
    """``GeneralizedRCNNWithTTA`` whose detections of all augmentations are merged by the exact fast suppression."""

    def _merge_detections(
        self, all_boxes: Tensor, all_scores: list, all_classes: list, shape_hw: tuple[int, int]
    ) -> Instances:
        heads, limit = self.cfg.MODEL.ROI_HEADS, self.cfg.TEST.DETECTIONS_PER_IMAGE
        scores = torch.zeros(len(all_boxes), heads.NUM_CLASSES + 1, device=all_boxes.device)
        if len(all_boxes):
            rows = torch.arange(len(all_boxes), device=scores.device)
            scores[rows, torch.stack(list(all_classes))] = torch.stack(list(all_scores)).to(scores)
        # The threshold is Detectron2's: what the augmented images gave has passed the config's already.
        return fast_rcnn_inference_single_image(all_boxes, scores, shape_hw, 1e-8, heads.NMS_THRESH_TEST, limit)[0]
