"""The box predictor: Detectron2's, with the classification loss, the classifier and its activation exchangeable."""

# Annotations are no strings in this file: torch.jit reads those of the methods that it compiles.

from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec, cat
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference as detectron2_inference
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from lt_det.losses import LOSS_REGISTRY, ClassificationLoss

from .build import build_calibrator, build_loss
from .calibrators import Calibrator
from .classifiers import build_classifier
from .fast_inference import fast_rcnn_inference


class _Predictions(tuple):
    """Scores and box deltas, with the features ``(R, D)`` that they were made of: what losses want of a predictor's own
    output, which Detectron2's heads hand on as it is."""

    features: Tensor


class LongTailOutputLayers(FastRCNNOutputLayers):
    """``FastRCNNOutputLayers`` whose classification is given by a long-tail loss.

    Parameters keep Detectron2's names (``cls_score``, ``bbox_pred``), so a stock checkpoint loads, and box
    regression is Detectron2's. The loss owns whatever depends on its form: the number of outputs, the initial
    bias and the activation at inference. With the default options and the same seed, weights, losses and detections are
    Detectron2's to the last bit.
    """

    # Of no use in a scripted module, which only detects.
    __jit_ignored_attributes__ = ["roi_observer", "cascade_stage"]
    __jit_unused_properties__ = ["has_stock_layers"]

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        num_classes: int,
        loss: ClassificationLoss | str = "Softmax",
        classifier: Callable[[int, int], nn.Module] | str = "",
        classifier_options: dict[str, Any] | None = None,
        calibrator: Calibrator | None = None,
        class_statistics=None,
        **kwargs,
    ):
        """
        Args:
            input_shape: shape of a RoI's feature.
            num_classes: number of foreground classes, K.
            loss: a loss, or a name in ``LOSS_REGISTRY`` (built with ``class_statistics`` and its defaults).
            classifier: ``"linear"``, ``"cosine"``, a callable from (in_features, num_outputs) to a module, or
                ``""``: the one that the loss asks for. A loss that scales cosines itself (``wants_cosine``) gets a
                cosine classifier of scale 1, any other a linear one.
            classifier_options: keyword arguments of the named classifier (``scale``, ``learn_scale``, ``bias``). A
                cosine classifier has a bias, asked for or not, where the loss starts with one.
            calibrator: acts on a trained model at inference only; see ``lt_det.modeling.calibrators``.
            class_statistics: a ``ClassStatistics`` or a callable returning one; only read when ``loss`` is a name.
            kwargs: of ``FastRCNNOutputLayers``.
        """
        for key in ("use_sigmoid_ce", "use_fed_loss"):
            if kwargs.get(key):
                raise ValueError(
                    f"MODEL.ROI_BOX_HEAD.{key.upper()} has no effect on LongTailOutputLayers; unset it and choose "
                    'MODEL.LONG_TAIL.LOSS: "Sigmoid" or "Federated" instead'
                )
        super().__init__(input_shape, num_classes=num_classes, **kwargs)
        self._in_features = self.cls_score.in_features
        self._classifier = classifier or "linear"
        self._classifier_options = dict(classifier_options or {})
        if isinstance(loss, str):
            loss = LOSS_REGISTRY.get(loss)(num_classes, statistics=class_statistics)
        self.loss = loss
        self.loss.remember_features(self._in_features)
        # Sees the RoIs of each training batch and adds its losses: called with their features (R, D), scores and
        # proposals, returns a dict. What trains with it, and is no part of the detector, sets it.
        self.roi_observer: Callable[[Tensor, Tensor, list[Instances]], dict[str, Tensor]] | None = None
        # Of a cascade; LongTailCascadeROIHeads numbers its predictors.
        self.cascade_stage: int | None = None
        if self.has_stock_layers:
            # Detectron2's classifier stays: drawing another would change all that is drawn after it.
            self._set_initial_bias(self.cls_score)
        else:
            self.reset_classifier()
        self.set_calibrator(calibrator)

    @classmethod
    def from_config(cls, cfg, input_shape):
        ret = super().from_config(cfg, input_shape)
        if "LONG_TAIL" not in cfg.MODEL:
            return ret  # a config of Detectron2's, and its loss
        node = cfg.MODEL.LONG_TAIL.CLASSIFIER
        ret["loss"] = build_loss(cfg)
        ret["classifier"] = node.NAME
        ret["classifier_options"] = {"scale": node.SCALE, "learn_scale": node.LEARN_SCALE, "bias": node.BIAS}
        ret["calibrator"] = build_calibrator(cfg)
        return ret

    def set_calibrator(self, calibrator: Calibrator | None) -> None:
        """Exchange the calibrator; None: probabilities are the loss's.

        Raises:
            ValueError: if it cannot work on this loss or classifier.
        """
        if calibrator is not None:
            calibrator.check(self)
        self.calibrator = calibrator

    def __prepare_scriptable__(self) -> "LongTailOutputLayers":
        """Called by ``torch.jit.script``, which cannot read class statistics or files later.

        The calibrator stays the object that it is: torch remembers by ``id`` which modules it has seen, Detectron2 has
        just replaced its FPN by a copy, and a new module may get the address of the old one, and be taken for it.
        """
        if self.calibrator is not None:
            self.calibrator.prepare(self)
        return self

    @property
    def has_stock_layers(self) -> bool:
        """Whether both layers are as Detectron2's but for the initial bias."""
        is_linear = self._classifier == "linear" and not self.loss.wants_cosine
        return is_linear and self.loss.num_outputs(self.num_classes) == self.num_classes + 1

    def reset_classifier(self) -> None:
        """Start ``cls_score`` afresh, as wide and with the bias that the loss asks for, on the same device."""
        old = self.cls_score.weight
        num_outputs = self.loss.num_outputs(self.num_classes)
        if self.loss.wants_cosine:
            classifier = build_classifier("cosine", self._in_features, num_outputs, scale=1.0)
        elif isinstance(self._classifier, str):
            options = {}
            if self._classifier == "cosine":
                options = dict(self._classifier_options)
                # Without a bias a loss of sigmoids would start with every class at 1/2, whatever its bias_prior says.
                if self.loss.initial_bias(self.num_classes).any():
                    options["bias"] = True
            classifier = build_classifier(self._classifier, self._in_features, num_outputs, **options)
        else:
            classifier = self._classifier(self._in_features, num_outputs)
        self._set_initial_bias(classifier)
        self.cls_score = classifier.to(device=old.device, dtype=old.dtype)

    def _set_initial_bias(self, classifier: nn.Module) -> None:
        if getattr(classifier, "bias", None) is not None:
            with torch.no_grad():
                classifier.bias.copy_(self.loss.initial_bias(self.num_classes))

    def check_fit(self, loss: ClassificationLoss) -> None:
        """Raise ``ValueError`` if a classifier trained with the present loss cannot be trained on with ``loss``."""
        old, k = self.loss, self.num_classes
        if loss.wants_cosine != old.wants_cosine or loss.num_outputs(k) != old.num_outputs(k):
            raise ValueError(
                f"a classifier trained with {type(old).__name__} does not fit {type(loss).__name__}: they differ in "
                "the number of outputs or in cosine scores. Choose MODEL.LONG_TAIL.LOSS and DECOUPLE.LOSS of one "
                "family (softmax with softmax, sigmoid with sigmoid), or set DECOUPLE.REINIT_CLASSIFIER True"
            )

    def set_loss(self, loss: ClassificationLoss, *, reinit: bool = False) -> None:
        """Exchange the loss, as stage 2 of decoupled training does.

        Args:
            loss: the new loss; it moves to this module's device.
            reinit: start the classifier afresh; otherwise it must fit (``check_fit``).
        """
        if not reinit:
            self.check_fit(loss)
        if getattr(self.loss, "drw_active", False) and hasattr(loss, "set_drw"):
            loss.set_drw(True)  # re-weighting that has begun goes on in stage 2
        loss.remember_features(self._in_features)
        self.loss = loss.to(self.cls_score.weight.device)
        self.loss.train(self.training)
        if reinit:
            self.reset_classifier()
        self.set_calibrator(self.calibrator)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """RoI features ``(R, ...)`` to scores ``(R, num_outputs)`` and box deltas ``(R, 4)`` or ``(R, 4K)``."""
        if x.dim() > 2:
            x = torch.flatten(x, start_dim=1)
        predictions = self.cls_score(x), self.bbox_pred(x)
        if torch.jit.is_scripting():
            return predictions
        else:
            return self._with_features(predictions, x)

    @torch.jit.unused
    def _with_features(self, predictions: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        if self.training and (self.loss.wants_features or self.roi_observer is not None):
            predictions = _Predictions(predictions)
            predictions.features = x
        return predictions

    def classify(self, features: Tensor) -> Tensor:
        """Scores ``(R, num_outputs)`` of features ``(R, D)`` that were kept, on whatever device and in whatever
        precision."""
        return self.cls_score(features.to(self.cls_score.weight))

    def classification_losses(
        self, scores: Tensor, gt_classes: Tensor, *, features: Tensor | None = None, roi_weights: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The loss as a dict with ``loss_cls`` in it, logging the accuracy over foreground RoIs.

        Args:
            scores: ``(R, num_outputs)``.
            gt_classes: ``(R,)`` int64 in [0, K], K the background.
            features: ``(R, D)``, for losses that want them.
            roi_weights: ``(R,)``, a weight for each RoI's loss.
        """
        self._log_accuracy(scores, gt_classes)
        extra = {"features": features, "classify": self.classify} if self.loss.wants_features else {}
        value = self.loss(scores, gt_classes, roi_weights=roi_weights, **extra)
        losses = value if isinstance(value, dict) else {"loss_cls": value}
        return {k: v * self.loss_weight.get(k, 1.0) for k, v in losses.items()}

    @torch.no_grad()
    def _log_accuracy(self, scores: Tensor, gt_classes: Tensor) -> None:
        foreground = (gt_classes >= 0) & (gt_classes < self.num_classes)
        if scores.shape[0] == 0:
            return
        hit = scores[:, : self.num_classes].argmax(dim=1) == gt_classes
        hit, total = torch.stack([(hit & foreground).sum(), foreground.sum()]).tolist()  # the device is waited for once
        if total:
            # Among foreground classes only: what a classifier's re-training changes.
            get_event_storage().put_scalar("fast_rcnn/fg_class_accuracy", hit / total)

    def losses(self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]) -> dict[str, Tensor]:
        """As ``FastRCNNOutputLayers.losses``, with the long-tail loss for classification."""
        scores, proposal_deltas = predictions
        if len(proposals):
            gt_classes = cat([p.gt_classes for p in proposals], dim=0)
            proposal_boxes = cat([p.proposal_boxes.tensor for p in proposals], dim=0)
            # A proposal without gt_boxes is background: its box is never read.
            gt_boxes = cat([(p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes).tensor for p in proposals], dim=0)
        else:
            gt_classes = torch.empty(0, dtype=torch.int64, device=scores.device)
            proposal_boxes = gt_boxes = proposal_deltas.new_empty((0, 4))
        features = getattr(predictions, "features", None)
        losses = self.classification_losses(scores, gt_classes, features=features)
        box_reg = self.box_reg_loss(proposal_boxes, gt_boxes, proposal_deltas, gt_classes)
        losses["loss_box_reg"] = box_reg * self.loss_weight.get("loss_box_reg", 1.0)
        if self.roi_observer is not None:
            losses.update(self.roi_observer(features, scores, proposals))
        return losses

    def predict_probs(self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]) -> list[Tensor]:
        """Per image, ``(Ri, K + 1)`` probabilities, background last."""
        scores, _ = predictions
        if self.calibrator is None:
            probs = self.loss.activation(scores)
        elif torch.jit.is_scripting():
            probs = self.loss.activation(self.calibrator.adjust_scores(scores))
            probs = self.calibrator.adjust_probabilities(probs)
        else:
            probs = self.calibrator(scores, self)
        # Not len(p), whose int a trace would take for a constant.
        return probs.split([p.__len__() for p in proposals], dim=0)

    def inference(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> tuple[list[Instances], list[Tensor]]:
        """As ``FastRCNNOutputLayers.inference``."""
        boxes, scores = self.predict_boxes(predictions, proposals), self.predict_probs(predictions, proposals)
        image_shapes = [p.image_size for p in proposals]
        if torch.jit.is_scripting():
            return detectron2_inference(
                boxes, scores, image_shapes, self.test_score_thresh, self.test_nms_thresh, self.test_topk_per_image
            )
        else:
            return self.detect(boxes, scores, image_shapes)

    def detect(
        self, boxes: list[Tensor], scores: list[Tensor], image_sizes: list[tuple[int, int]]
    ) -> tuple[list[Instances], list[Tensor]]:
        """Detections of boxes and probabilities, see :func:`fast_rcnn_inference`."""
        return fast_rcnn_inference(
            boxes, scores, image_sizes, self.test_score_thresh, self.test_nms_thresh, self.test_topk_per_image
        )
