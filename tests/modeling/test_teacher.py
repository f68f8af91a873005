"""A teacher's keys and the student that learns from them, on Detectron2's standard, cascade and C4 heads."""

import copy

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from lt_det.gml import MutualInformation, MutualInformationDetector, Teacher
from lt_det.gml.detector import _own_box, _Truth
from lt_det.modeling import box_predictors

NODE = "MODEL.LONG_TAIL.GML."


@pytest.fixture
def students(stock_cfg, swap, statistics_file):
    def build(kind, teacher_kind=None, momentum=None, **gml):
        torch.manual_seed(0)

        def detector(kind):
            cfg = swap(stock_cfg(kind), kind, "GML")
            options = {"QUEUE_SIZE": 60, "QUEUE_BASE": 2, "PROJECTION_DIM": 8, "HIDDEN_DIM": 16, "ALPHA": 1.0, **gml}
            cfg.merge_from_list([x for k, v in options.items() for x in (NODE + k, v)])
            cfg.MODEL.LONG_TAIL.STATISTICS = statistics_file
            return build_model(cfg)

        student = detector(kind)
        teacher = Teacher(detector(teacher_kind) if teacher_kind else copy.deepcopy(student))
        widths = teacher.widths
        branches = [
            MutualInformation(p.loss, p.cls_score.in_features, widths[min(i, len(widths) - 1)])
            for i, p in enumerate(box_predictors(student))
        ]
        return MutualInformationDetector(student, teacher, branches, momentum=momentum).train()

    return build


@pytest.mark.parametrize(
    "kind, teacher_kind",
    [("standard", None), ("cascade", None), ("c4", None), ("cascade", "standard"), ("standard", "c4")],
)
def test_every_head_has_its_losses_and_gradients(students, batch, kind, teacher_kind):
    module = students(kind, teacher_kind)
    with EventStorage():
        module(batch)  # the first look fills the queues with keys of this iteration
        losses = module(batch)  # which the second may be compared with: without gt_ids they are others' keys
    stages = [f"_stage{k}" for k in range(3)] if kind == "cascade" else [""]
    assert {f"{name}{s}" for name in ("loss_gml", "loss_distill") for s in stages} <= set(losses)
    assert all(torch.isfinite(value) for value in losses.values())
    assert sum(losses[f"loss_gml{s}"].item() for s in stages) > 0
    sum(losses.values()).backward()
    for branch in module.branches:
        assert branch.query_projection.hidden.weight.grad.abs().sum() > 0
        assert branch.key_projection.hidden.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in module.teacher.parameters())
    # Five boxes, twice: the queues of the rarest of these classes are of two keys at least.
    assert module.branches[0].queues.filled.sum() == 10 or not module.branches[0].queues.full


def test_only_the_student_is_evaluated_and_trained(students, batch):
    module = students("standard").eval()
    with torch.no_grad():
        assert [len(x["instances"]) for x in module(batch)] == [len(x["instances"]) for x in module.detector(batch)]
    module.train()
    assert not module.teacher.training and not any(m.training for m in module.teacher.modules())
    assert box_predictors(module.teacher.detector)[0].roi_observer is None


def test_keys_are_features_of_the_boxes(students, batch):
    """The teacher's features of ground truth are what its own box head gives for these boxes."""
    module = students("standard")
    boxes = [x["instances"].gt_boxes for x in batch]
    ((features, logits),) = module.teacher(batch, boxes, with_logits=True)
    detector = module.teacher.detector
    images = detector.preprocess_image(batch)
    with torch.no_grad():
        maps = detector.backbone(images.tensor)
        heads = detector.roi_heads
        expected = heads.box_head(heads.box_pooler([maps[f] for f in heads.box_in_features], boxes))
        cosines = heads.box_predictor.cls_score(expected)
    torch.testing.assert_close(features, expected)
    torch.testing.assert_close(logits.softmax(dim=1), (cosines * 30).softmax(dim=1))


def test_a_following_teacher_moves_by_its_momentum(students):
    module = students("standard", momentum=0.75)
    name = "roi_heads.box_head.fc1.weight"
    before = module.teacher.detector.state_dict()[name].clone()
    with torch.no_grad():
        for p in module.detector.parameters():
            p.add_(1.0)
    module.update_teacher()
    torch.testing.assert_close(module.teacher.detector.state_dict()[name], before + 0.25)
    module.teacher.follow(module.detector, 0.0)
    mine, theirs = module.teacher.detector.state_dict(), module.detector.state_dict()
    assert all(torch.equal(mine[k], theirs[k]) for k in theirs)


def test_rois_find_their_own_box():
    """By box and class: two annotations share a box here, and another class has none."""
    truth = _Truth(
        torch.tensor([[0.0, 0, 9, 9], [5, 5, 8, 8], [0, 0, 9, 9]]),
        torch.tensor([4, 1, 2]),
        torch.tensor([70, 71, 72]),
        first=10,
    )
    rois = Instances((20, 20))
    rois.gt_boxes = Boxes(torch.tensor([[0.0, 0, 9, 9], [5, 5, 8, 8], [0, 0, 9, 9], [5, 5, 8, 8]]))
    rois.gt_classes = torch.tensor([2, 1, 4, 20])  # the last is background
    assert _own_box(rois, truth).tolist() == [12, 11, 10, -1]
    empty = Instances((20, 20))
    empty.gt_classes = torch.tensor([20, 20])
    assert _own_box(empty, truth).tolist() == [-1, -1]
    none = _Truth(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), first=3)
    assert _own_box(rois, none).tolist() == [-1] * 4


@pytest.mark.parametrize("own_keys", ["seen", "hidden"])
def test_own_keys(students, batch, own_keys):
    """With the identity of objects known, a batch that looks at itself alone finds no key that is not its own."""
    module = students("standard", OWN_KEYS=own_keys)
    for i, x in enumerate(batch):
        x["instances"].gt_ids = torch.arange(len(x["instances"])) + 100 * i
        x["instances"].gt_classes = torch.arange(len(x["instances"])) + 3 * i  # all of different classes
    with EventStorage():
        for _ in range(2):
            losses = module(batch)
    assert (losses["loss_gml"] > 0) == (own_keys == "seen")
    sum(losses.values()).backward()
    # Its own keys teach a RoI, but say nothing of the temperature.
    assert module.branches[0].log_temperature.grad.abs().sum() == 0
