"""Test-time augmentation as Detectron2's, with the fast suppression."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import get_cfg
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Instances
from torch import Tensor, nn

from .fast_inference import fast_rcnn_inference_single_image

__all__ = ["LongTailRCNNWithTTA"]


class LongTailRCNNWithTTA(GeneralizedRCNNWithTTA):
    """``GeneralizedRCNNWithTTA`` whose detections of all augmentations are merged by the exact fast suppression."""

    @classmethod
    def from_model(
        cls, model: nn.Module, *, min_sizes: Sequence[int], max_size: int, flip: bool
    ) -> LongTailRCNNWithTTA:
        """For a detector that no yaml config describes: threshold, limit and classes are its box predictor's (of a
        cascade the last one's).

        Args:
            min_sizes, max_size, flip: what an image is tried at, as ``TEST.AUG`` says.

        Raises:
            ValueError: for no sizes, or where the backbone pads every image to a square that is smaller.
        """
        if not len(min_sizes) or min(min_sizes) < 1 or max_size < 1:
            raise ValueError(
                f"test-time augmentation needs positive min_sizes and max_size, got {list(min_sizes)} and {max_size}"
            )
        model = getattr(model, "module", model)
        square = model.backbone.padding_constraints.get("square_size", 0)
        if 0 < square < max_size:
            raise ValueError(
                f"test-time augmentation to max_size {max_size}, but the backbone pads images to {square} x {square}; "
                f"set max_size to {square}"
            )
        predictor = [m for m in model.roi_heads.modules() if isinstance(m, FastRCNNOutputLayers)][-1]
        cfg = get_cfg()
        cfg.MODEL.MASK_ON = model.roi_heads.mask_on
        cfg.MODEL.KEYPOINT_ON = getattr(model.roi_heads, "keypoint_on", False)
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = predictor.num_classes
        cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST = predictor.test_nms_thresh
        cfg.TEST.DETECTIONS_PER_IMAGE = predictor.test_topk_per_image
        cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.MAX_SIZE, cfg.TEST.AUG.FLIP = tuple(min_sizes), max_size, flip
        return cls(cfg, model)

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
