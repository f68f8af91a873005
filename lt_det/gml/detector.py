"""GML on a detector: a teacher that turns ground-truth boxes into keys, and what trains a student with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.roi_heads import CascadeROIHeads
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn import functional as F

from lt_det.modeling import LongTailOutputLayers, box_predictors
from lt_det.modeling.roi_features import check_roi_heads, roi_features

from .branch import MutualInformation
from .mixture import NO_BOX


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


@dataclass
class _Truth:
    """Ground truth of an image: ``(N, 4)`` boxes, ``(N,)`` classes and ids, and the boxes of images before."""

    boxes: Tensor
    classes: Tensor
    ids: Tensor
    first: int


class MutualInformationDetector(nn.Module):
    """A detector as GML trains it: its own losses, and those of a mutual-information branch for each classifier.

    In training mode each batch passes the teacher first, whose features of the ground-truth boxes enter the queues; the
    student's RoIs are then compared with what the queues hold. In evaluation mode it is the detector.

    Attributes:
        detector: the student.
        teacher: frozen, or following the student.
        branches: of each classifier.
    """

    def __init__(
        self,
        detector: GeneralizedRCNN,
        teacher: Teacher,
        branches: Sequence[MutualInformation],
        *,
        momentum: float | None = None,
    ):
        """
        Args:
            momentum: of a teacher that follows the student (:meth:`update_teacher`); None: it is frozen.
        """
        super().__init__()
        self.detector, self.teacher, self.branches = detector, teacher, nn.ModuleList(branches)
        self.momentum = momentum
        self._serial = 0  # numbers boxes without an id
        self._truth: list[_Truth] = []
        self._teacher_logits: list[Tensor | None] = []
        for stage, predictor in enumerate(box_predictors(detector)):
            predictor.roi_observer = partial(self._observe, stage)

    def forward(self, batched_inputs: list[dict]):
        if self.training:
            self.look(batched_inputs)
        return self.detector(batched_inputs)

    @torch.no_grad()
    def look(self, batched_inputs: list[dict]) -> None:
        """Put the teacher's features of the ground-truth boxes into the queues."""
        device = self.detector.device
        self._truth, first = [], 0
        for x in batched_inputs:
            instances = x["instances"].to(device)
            ids = instances.gt_ids if instances.has("gt_ids") else self._new_ids(len(instances), device)
            self._truth.append(_Truth(instances.gt_boxes.tensor, instances.gt_classes, ids, first))
            first += len(instances)
        self._teacher_logits = []
        if not batched_inputs:  # a rank whose images are all seen, while others go on
            none = torch.empty(0, dtype=torch.int64, device=device)
            for branch in self.branches:
                branch.insert(torch.empty(0, branch.queues.keys.shape[1], device=device), none, none)
            return
        boxes = [Boxes(truth.boxes) for truth in self._truth]
        with_logits = any(branch.distils for branch in self.branches)
        results = self.teacher(batched_inputs, boxes, with_logits=with_logits)
        labels = torch.cat([truth.classes for truth in self._truth])
        ids = torch.cat([truth.ids for truth in self._truth])
        # The last entry is for RoIs without a ground-truth box.
        self._box_ids = torch.cat([ids, ids.new_full((1,), NO_BOX)])
        for stage, branch in enumerate(self.branches):
            features, logits = results[min(stage, len(results) - 1)]
            branch.insert(features, labels, ids)
            self._teacher_logits.append(logits)

    def _new_ids(self, count: int, device: torch.device) -> Tensor:
        # With a mapper that gives no gt_ids an object is known within its batch alone: keys of it from
        # earlier iterations are others' to it.
        numbers = torch.arange(self._serial, self._serial + count, device=device)
        self._serial += count
        return numbers * comm.get_world_size() + comm.get_rank()

    def _observe(self, stage: int, features: Tensor, scores: Tensor, proposals: list[Instances]) -> dict[str, Tensor]:
        labels, own = [], []
        for proposal, truth in zip(proposals, self._truth):
            labels.append(proposal.gt_classes)
            own.append(_own_box(proposal, truth))
        labels, own = torch.cat(labels).to(torch.int64), torch.cat(own)
        box_ids = self._box_ids[own]
        logits = self._teacher_logits[stage]
        if logits is not None:
            logits = F.pad(logits, (0, 0, 0, 1))[own]
        return self.branches[stage](features, labels, box_ids, scores=scores, teacher_logits=logits)

    def update_teacher(self) -> None:
        """Let a teacher that follows the student take a step."""
        if self.momentum is not None:
            self.teacher.follow(self.detector, self.momentum)

    def training_state(self) -> dict:
        """What a resumed run needs beside the detector. A frozen teacher has its own file."""
        return {
            "branches": self.branches.state_dict(),
            "teacher": None if self.momentum is None else self.teacher.state_dict(),
            "serial": self._serial,
        }

    def load_training_state(self, state: dict) -> None:
        self.branches.load_state_dict(state["branches"])
        if state["teacher"] is not None:
            self.teacher.load_state_dict(state["teacher"])
        self._serial = state["serial"]


def _own_box(proposal: Instances, truth: _Truth) -> Tensor:
    """``(R,)`` index, over all images of the batch, of the box that each RoI was matched to; -1 for background."""
    if len(truth.ids) == 0 or not proposal.has("gt_boxes"):
        return torch.full((len(proposal),), -1, dtype=torch.int64, device=proposal.gt_classes.device)
    # By box and class: ROI heads hand on no index, and two annotations may share a box.
    same = (proposal.gt_boxes.tensor[:, None] == truth.boxes).all(dim=2) & (
        proposal.gt_classes[:, None] == truth.classes
    )
    found, index = same.to(torch.uint8).max(dim=1)
    return torch.where(found > 0, index + truth.first, -1)
