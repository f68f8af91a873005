"""Stage 2 of decoupled training: only ``cls_score`` learns, so only what its gradient needs is computed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from detectron2.config import CfgNode
from detectron2.layers import cat
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import CascadeROIHeads
from detectron2.structures import Instances
from torch import Tensor, nn

from .box_predictor import LongTailOutputLayers
from .build import build_loss
from .roi_features import check_roi_heads, roi_features


@dataclass
class RoIBatch:
    """What one classifier sees of a batch of images.

    Attributes:
        predictor: the box predictor whose classifier this is.
        features: ``(R, D)`` RoI features, detached.
        gt_classes: ``(R,)`` int64 in [0, K], K the background.
        suffix: of the loss's name, ``"_stage0"`` ... in a cascade, else empty.
        per_image: number of rows of each image, in order.
    """

    predictor: LongTailOutputLayers
    features: Tensor
    gt_classes: Tensor
    suffix: str = ""
    per_image: tuple[int, ...] = ()

    def of_first(self, images: int) -> RoIBatch:
        """What it sees of the first ``images`` of them."""
        per_image = self.per_image[:images]
        rows = sum(per_image)
        return replace(self, features=self.features[:rows], gt_classes=self.gt_classes[:rows], per_image=per_image)


def box_predictors(model: nn.Module, *, required: bool = True) -> list[LongTailOutputLayers]:
    """The long-tail box predictors of a detector, one for each cascade stage.

    Raises:
        ValueError: if the detector has none and ``required``.
    """
    found = [m for m in model.modules() if isinstance(m, LongTailOutputLayers)]
    if required and not found:
        raise ValueError(
            "this model has no LongTailOutputLayers; set MODEL.ROI_HEADS.NAME to LongTailROIHeads, "
            "LongTailCascadeROIHeads or LongTailRes5ROIHeads"
        )
    return found


def freeze_trunk(model: nn.Module) -> None:
    """Leave gradients to the classifiers (``cls_score``) alone."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for predictor in box_predictors(model):
        for parameter in predictor.cls_score.parameters():
            parameter.requires_grad_(True)


def set_stage2_loss(cfg: CfgNode, model: nn.Module) -> None:
    """Exchange every box predictor's loss for that of ``DECOUPLE.LOSS``."""
    for predictor in box_predictors(model):
        predictor.set_loss(build_loss(cfg, stage=2), reinit=cfg.DECOUPLE.REINIT_CLASSIFIER)


class DecoupledClassifier(nn.Module):
    """A detector as stage 2 trains it: batch of images in, classification losses out.

    The trunk, the proposals and the box head run without gradient and with frozen batch-norm statistics; mask
    head and the losses of frozen parts are not computed. RoIs are sampled as in ordinary training.
    """

    def __init__(self, detector: GeneralizedRCNN):
        """
        Args:
            detector: a ``GeneralizedRCNN`` with (a subclass of) Detectron2's standard, cascade or C4 ROI heads and a
                long-tail box predictor. It is frozen but for its classifiers.

        Raises:
            ValueError: if the ROI heads are of another kind.
        """
        super().__init__()
        check_roi_heads(detector.roi_heads, "decoupled training")
        freeze_trunk(detector)
        self.detector = detector
        self._batch_norms = [m for m in detector.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor]:
        losses = {}
        for rois in self.roi_batches(batched_inputs):
            scores = rois.predictor.cls_score(rois.features)
            values = rois.predictor.classification_losses(scores, rois.gt_classes, features=rois.features)
            losses.update({name + rois.suffix: value for name, value in values.items()})
        return losses

    @torch.no_grad()
    def roi_batches(self, batched_inputs: list[dict]) -> list[RoIBatch]:
        """Detached RoI features and labels of a batch, one entry for each classifier of the detector.

        Inputs with ``roi_features`` (of the engine's feature cache) bring their RoIs along; the trunk does not run.
        """
        if "roi_features" in batched_inputs[0]:
            return self._cached(batched_inputs)
        # Evaluation sets the whole detector back to train mode; a frozen trunk keeps its statistics.
        for module in self._batch_norms:
            module.eval()
        detector = self.detector
        images = detector.preprocess_image(batched_inputs)
        targets = [x["instances"].to(detector.device) for x in batched_inputs]
        features = detector.backbone(images.tensor)
        proposals = self._proposals(images, features, batched_inputs, targets)
        heads = detector.roi_heads
        proposals = heads.label_and_sample_proposals(proposals, targets)
        if isinstance(heads, CascadeROIHeads):
            return self._cascade(heads, features, proposals, targets)
        x = roi_features(heads, features, [p.proposal_boxes for p in proposals])
        return [_roi_batch(heads.box_predictor, x, proposals)]

    def _cached(self, batched_inputs: list[dict]) -> list[RoIBatch]:
        predictors = box_predictors(self.detector)
        per_image = [tuple(len(c) for c in classes) for classes in zip(*(x["roi_classes"] for x in batched_inputs))]
        return [
            RoIBatch(
                predictor,
                torch.cat([x["roi_features"][k].to(predictor.cls_score.weight) for x in batched_inputs]),
                torch.cat([x["roi_classes"][k] for x in batched_inputs]).to(self.detector.device),
                f"_stage{k}" if len(predictors) > 1 else "",
                per_image[k],
            )
            for k, predictor in enumerate(predictors)
        ]

    def _proposals(self, images, features, batched_inputs, targets) -> list[Instances]:
        generator = self.detector.proposal_generator
        if generator is None:
            return [x["proposals"].to(self.detector.device) for x in batched_inputs]
        if not isinstance(generator, RPN):
            return generator(images, features, targets)[0]
        # RPN.forward in train mode would label anchors and compute losses for nothing; in eval mode it
        # would keep fewer proposals than training does.
        maps = [features[f] for f in generator.in_features]
        logits, deltas = generator.rpn_head(maps)
        logits = [x.permute(0, 2, 3, 1).flatten(1) for x in logits]
        box_dim = generator.anchor_generator.box_dim
        deltas = [
            x.view(x.shape[0], -1, box_dim, x.shape[-2], x.shape[-1]).permute(0, 3, 4, 1, 2).flatten(1, -2)
            for x in deltas
        ]
        return generator.predict_proposals(generator.anchor_generator(maps), logits, deltas, images.image_sizes)

    def _cascade(self, heads: CascadeROIHeads, features, proposals, targets) -> list[RoIBatch]:
        image_sizes = [p.image_size for p in proposals]
        batches: list[RoIBatch] = []
        boxes: list[Tensor] = []
        for stage in range(heads.num_cascade_stages):
            predictor = heads.box_predictor[stage]
            if stage > 0:
                proposals = heads._create_proposals_from_boxes(boxes, image_sizes)
                proposals = heads._match_and_label_boxes(proposals, stage, targets)
            x = roi_features(heads, features, [p.proposal_boxes for p in proposals], stage)
            batches.append(_roi_batch(predictor, x, proposals, suffix=f"_stage{stage}"))
            boxes = predictor.predict_boxes((None, predictor.bbox_pred(batches[-1].features)), proposals)
        return batches


def _roi_batch(predictor, features: Tensor, proposals: list[Instances], suffix: str = "") -> RoIBatch:
    classes = cat([p.gt_classes for p in proposals], dim=0)
    return RoIBatch(predictor, features, classes, suffix, tuple(len(p) for p in proposals))
