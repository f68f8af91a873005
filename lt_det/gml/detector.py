"""GML on a detector: what trains a student with a teacher's keys, and fills their queues before it begins."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn import functional as F

from lt_det.data import DatasetRecords, images_that_fill, pass_over
from lt_det.modeling import box_predictors

from .branch import MutualInformation
from .mixture import NO_BOX
from .teacher import Teacher

logger = logging.getLogger(__name__)


@dataclass
class _Truth:
    """Ground truth of an image: ``(N, 4)`` boxes, ``(N,)`` classes and ids; ``first`` boxes in images before."""

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
        momentum: of a teacher that follows the student; None: it is frozen.
    """

    state_name = "mutual_information"  # of training_state, in a checkpoint

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
        return self.detector(self.look(batched_inputs) if self.training else batched_inputs)

    @torch.no_grad()
    def look(self, batched_inputs: list[dict]) -> list[dict]:
        """Put the teacher's features of the ground-truth boxes into the queues.

        Returns:
            The inputs, whose instances have ``gt_index`` too, their number among all of the batch.
        """
        device = self.detector.device
        numbered: list[dict] = []
        self._truth, first = [], 0
        for x in batched_inputs:
            instances = x["instances"].to(device)
            ids = instances.gt_ids if instances.has("gt_ids") else self._new_ids(len(instances), device)
            self._truth.append(_Truth(instances.gt_boxes.tensor, instances.gt_classes, ids, first))
            instances.gt_index = torch.arange(first, first + len(instances), device=device)
            numbered.append({**x, "instances": instances})
            first += len(instances)
        self._teacher_logits = []
        if not batched_inputs:  # a rank whose images are all seen, while others go on
            none = torch.empty(0, dtype=torch.int64, device=device)
            for branch in self.branches:
                branch.insert(torch.empty(0, branch.queues.keys.shape[1], device=device), none, none)
            return numbered
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
        return numbered

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
    classes = proposal.gt_classes
    if len(truth.ids) == 0 or not proposal.has("gt_boxes"):
        return torch.full((len(proposal),), -1, dtype=torch.int64, device=classes.device)
    if proposal.has("gt_index"):  # handed on by standard and C4 heads, and in the first stage of a cascade
        own = proposal.gt_index
        return torch.where(truth.classes[own - truth.first] == classes, own, -1)  # background has an index too
    # Later stages of a cascade hand on boxes and classes alone. Two annotations may share a box.
    same = (proposal.gt_boxes.tensor[:, None] == truth.boxes).all(dim=2) & (classes[:, None] == truth.classes)
    found, index = same.to(torch.uint8).max(dim=1)
    return torch.where(found > 0, index + truth.first, -1)


def build_mutual_information(
    detector: GeneralizedRCNN, teacher: Teacher, *, momentum: float | None = None
) -> MutualInformationDetector:
    """What trains ``detector`` by GML, on its device.

    Args:
        momentum: of a teacher that follows the student; None: it is frozen.
    """
    widths = teacher.widths
    branches = []
    for stage, predictor in enumerate(box_predictors(detector)):
        width = widths[min(stage, len(widths) - 1)]
        branches.append(MutualInformation(predictor.loss, predictor.cls_score.in_features, width))
    module = MutualInformationDetector(detector, teacher, branches, momentum=momentum).to(detector.device)
    kind = "frozen" if momentum is None else f"a copy of the student, momentum {momentum:g}"
    logger.info("GML: teacher %s; %s", kind, branches[0].describe())
    return module


def fill_queues(
    module: MutualInformationDetector,
    records: DatasetRecords,
    mapper: Callable[[dict], dict | None],
    *,
    batch_size: int,
    num_workers: int,
    seed: int,
    amp: bool = False,
) -> None:
    """Let the teacher look at training images until the queues are full or there are no more; all ranks together.

    Args:
        records: the training set in Detectron2's format.
        mapper: makes of a record what the detector takes.
        batch_size: images, over all ranks.
        num_workers: processes that load images.
        seed: of the augmentation.
        amp: mixed precision.
    """
    queues = module.branches[0].queues
    chosen = images_that_fill(records, queues.sizes.tolist())

    def look(inputs: list[dict], count: int) -> None:
        module.look(inputs[:count])  # also with none left: ranks gather together

    pass_over(
        records.select(chosen), mapper, look, batch_size=batch_size, num_workers=num_workers, seed=seed, amp=amp,
        device=module.detector.device, description="Filling the queues",
    )  # fmt: skip
    logger.info(
        "GML: %d images filled %d of %d slots; %d of %d classes have a key",
        len(chosen), int(queues.filled.sum()), len(queues.keys), int((queues.filled > 0).sum()), queues.num_classes,
    )  # fmt: skip
