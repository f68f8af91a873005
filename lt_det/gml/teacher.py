"""The teacher of GML: a frozen detector that turns ground-truth boxes into keys, and the three ways to come by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.roi_heads import CascadeROIHeads
from detectron2.structures import Boxes
from torch import Tensor, nn

from lt_det.modeling import LongTailOutputLayers
from lt_det.modeling.roi_features import check_roi_heads, roi_features


@dataclass(frozen=True)
class FollowingTeacher:
    """A copy of the student that follows it.

    Attributes:
        momentum: share of its own weights that it keeps at each step.
        fill_queues: before the student's first step it looks at training images, until the queues are full.
    """

    momentum: float = 0.999
    fill_queues: bool = True

    def __post_init__(self):
        if not 0 <= self.momentum <= 1:
            raise ValueError(f"a teacher's momentum must lie in [0, 1], got {self.momentum}")


@dataclass(frozen=True)
class FrozenTeacher:
    """A finished detector, of whatever backbone and ROI heads, with the student's classes.

    Attributes:
        model: the detector, or what makes it.
        weights: its checkpoint.
        fill_queues: as :class:`FollowingTeacher`.
    """

    model: nn.Module | Callable[[], nn.Module]
    weights: str
    fill_queues: bool = True


@dataclass(frozen=True)
class TrainedTeacher:
    """A detector of the student's own kind, trained first in the run, by L_cls alone; the student then starts afresh.

    Attributes:
        max_iter: iterations that it is trained for.
        evaluate: evaluate it then.
        fill_queues: as :class:`FollowingTeacher`.
    """

    max_iter: int
    evaluate: bool = True
    fill_queues: bool = True

    def __post_init__(self):
        if self.max_iter < 1:
            raise ValueError(f"a teacher is trained for at least 1 iteration, got max_iter {self.max_iter}")


class Teacher(nn.Module):
    """A frozen detector that turns ground-truth boxes into features.

    It may be of another backbone than the student, and of other ROI heads; in a cascade each classifier of the student
    has the teacher's features of the same stage, or of its last.
    """

    def __init__(self, detector: GeneralizedRCNN):
        """
        Raises:
            ValueError: for ROI heads other than Detectron2's standard, cascade and C4 ones.
        """
        super().__init__()
        check_roi_heads(detector.roi_heads, "a teacher")
        self.detector = detector.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Teacher:
        """A teacher does not train: its batch-norm statistics stay."""
        return super().train(False)

    @property
    def predictors(self) -> list[nn.Module]:
        """The box predictors, one for each cascade stage."""
        heads = self.detector.roi_heads
        return list(heads.box_predictor) if isinstance(heads, CascadeROIHeads) else [heads.box_predictor]

    @property
    def widths(self) -> list[int]:
        """Width of the features of each stage."""
        return [p.cls_score.in_features for p in self.predictors]

    @torch.no_grad()
    def forward(
        self, batched_inputs: list[dict], boxes: list[Boxes], *, with_logits: bool = False
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Features ``(N, D)`` of the boxes of all images, for each stage, and ``(N, K + 1)`` logits if asked for.

        Args:
            batched_inputs: the images as the student gets them.
            boxes: of each image, in its coordinates, on this module's device.

        Raises:
            ValueError: if logits are asked of a teacher whose classes do not exclude each other.
        """
        detector = self.detector
        images = detector.preprocess_image(batched_inputs)
        maps = detector.backbone(images.tensor)
        results = []
        for stage, predictor in enumerate(self.predictors):
            features = roi_features(detector.roi_heads, maps, boxes, stage)
            results.append((features, _logits(predictor, features) if with_logits else None))
        return results

    @torch.no_grad()
    def follow(self, student: nn.Module, momentum: float) -> None:
        """Move each weight and statistic towards the student's: ``momentum`` times its own, the rest the student's."""
        theirs = student.state_dict()
        for name, mine in self.detector.state_dict().items():
            if mine.is_floating_point() and momentum > 0:
                mine.lerp_(theirs[name].to(mine.dtype), 1.0 - momentum)
            else:
                mine.copy_(theirs[name])


def _logits(predictor: nn.Module, features: Tensor) -> Tensor:
    """Logits up to a constant of each row, which no softmax of them sees."""
    scores = predictor.cls_score(features)
    if not isinstance(predictor, LongTailOutputLayers):
        return scores
    if not predictor.loss.mutually_exclusive:
        raise ValueError(
            f"MODEL.LONG_TAIL.GML.ALPHA distils softmax logits, and the teacher was trained with "
            f"{type(predictor.loss).__name__}; set ALPHA to 0 or take a teacher trained with a softmax loss"
        )
    return predictor.loss.activation(scores.float()).clamp_min(torch.finfo(torch.float32).tiny).log()
