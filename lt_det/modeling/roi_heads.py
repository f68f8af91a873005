"""Detectron2's three ROI heads with long-tail box predictor and mask head."""

from collections.abc import Callable

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import CascadeROIHeads, FastRCNNOutputLayers, Res5ROIHeads, StandardROIHeads
from detectron2.structures import Instances
from torch import Tensor

from .box_predictor import LongTailOutputLayers
from .mask_head import with_long_tail_mask_head
from .pooling import pool_by_points

# Of a stage of a cascade: its predictor, the scores and box deltas that it gave, the proposals (one Instances an
# image), and where the deltas lead.
StagePredictions = tuple[LongTailOutputLayers, tuple[Tensor, Tensor], list[Instances], list[Tensor]]


def run_cascade(
    heads: CascadeROIHeads, features: dict[str, Tensor], proposals: list[Instances]
) -> list[StagePredictions]:
    """What each stage of a cascade in evaluation says about the boxes of the stage before."""
    maps = [features[name] for name in heads.box_in_features]
    image_sizes = [p.image_size for p in proposals]
    stages: list[StagePredictions] = []
    for stage, predictor in enumerate(heads.box_predictor):
        if stage > 0:
            proposals = heads._create_proposals_from_boxes(stages[-1][3], image_sizes)
        predictions = heads._run_stage(maps, proposals, stage)
        stages.append((predictor, predictions, proposals, predictor.predict_boxes(predictions, proposals)))
    return stages


def detect_by_all(stages: list[StagePredictions]) -> tuple[list[Instances], list[Tensor]]:
    """Detections of a cascade: the boxes of its last stage by the mean probabilities of all, as Detectron2 rounds it.

    Returns:
        As :meth:`LongTailOutputLayers.detect`.
    """
    probabilities = [p.predict_probs(predictions, proposals) for p, predictions, proposals, _ in stages]
    means = [sum(of_image) * (1.0 / len(stages)) for of_image in zip(*probabilities)]
    predictor, _, proposals, boxes = stages[-1]
    return predictor.detect(boxes, means, [p.image_size for p in proposals])


def in_place_of(
    stock: list[FastRCNNOutputLayers], make: Callable[[FastRCNNOutputLayers], LongTailOutputLayers]
) -> list[LongTailOutputLayers]:
    """A long-tail box predictor for each of Detectron2's, which its ROI heads have made already.

    Where the layers are the same they take over the weights, and what is built next gets the random numbers that it
    would get in Detectron2: with the same seed a model starts as Detectron2's does.
    """
    state = torch.get_rng_state()
    made = [make(theirs) for theirs in stock]
    if all(ours.has_stock_layers for ours in made):
        torch.set_rng_state(state)
        with torch.no_grad():
            for ours, theirs in zip(made, stock):
                ours.cls_score.weight.copy_(theirs.cls_score.weight)
                ours.bbox_pred.weight.copy_(theirs.bbox_pred.weight)
    return made


@ROI_HEADS_REGISTRY.register()
class LongTailROIHeads(StandardROIHeads):
    """``StandardROIHeads`` (FPN, C5) with a long-tail box predictor."""

    # As Detectron2 says of its own class when it scripts: TorchScript then leaves out the code for what is off.
    mask_on: torch.jit.Final[bool]
    keypoint_on: torch.jit.Final[bool]

    @configurable
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        pool_by_points(self)

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        ret = super()._init_box_head(cfg, input_shape)
        shape = ret["box_head"].output_shape
        (ret["box_predictor"],) = in_place_of([ret["box_predictor"]], lambda _: LongTailOutputLayers(cfg, shape))
        return ret

    @classmethod
    def _init_mask_head(cls, cfg, input_shape):
        return super()._init_mask_head(with_long_tail_mask_head(cfg), input_shape)


@ROI_HEADS_REGISTRY.register()
class LongTailCascadeROIHeads(CascadeROIHeads):
    """``CascadeROIHeads`` with a long-tail box predictor in every stage."""

    @configurable
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        pool_by_points(self)
        for stage, predictor in enumerate(self.box_predictor):
            predictor.cascade_stage = stage

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        ret = super()._init_box_head(cfg, input_shape)
        shape = ret["box_heads"][0].output_shape
        ret["box_predictors"] = in_place_of(
            ret["box_predictors"],
            lambda stock: LongTailOutputLayers(cfg, shape, box2box_transform=stock.box2box_transform),
        )
        return ret

    @classmethod
    def _init_mask_head(cls, cfg, input_shape):
        return super()._init_mask_head(with_long_tail_mask_head(cfg), input_shape)

    def _forward_box(self, features, proposals, targets=None):
        if self.training:
            return super()._forward_box(features, proposals, targets)
        return detect_by_all(run_cascade(self, features, proposals))[0]


@ROI_HEADS_REGISTRY.register()
class LongTailRes5ROIHeads(Res5ROIHeads):
    """``Res5ROIHeads`` (C4) with a long-tail box predictor."""

    @configurable
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        pool_by_points(self)

    @classmethod
    def from_config(cls, cfg, input_shape):
        ret = super().from_config(with_long_tail_mask_head(cfg), input_shape)
        shape = ShapeSpec(channels=ret["box_predictor"].bbox_pred.in_features, height=1, width=1)
        (ret["box_predictor"],) = in_place_of([ret["box_predictor"]], lambda _: LongTailOutputLayers(cfg, shape))
        return ret
