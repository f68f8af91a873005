"""Detections of the fast suppression are those of Detectron2's own function, bit for bit."""

import pytest
import torch
from detectron2.modeling import GeneralizedRCNNWithTTA, build_model
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference as detectron2_inference
from hypothesis import given, settings
from hypothesis import strategies as st

from lt_det.modeling import LongTailRCNNWithTTA, fast_inference, fast_rcnn_inference

SHAPE = (96, 128)


def same(boxes, scores, thresh=1e-4, nms_thresh=0.5, topk=300):
    shapes = [SHAPE] * len(boxes)
    # Detectron2 clips its input in place.
    theirs, their_rows = detectron2_inference([b.clone() for b in boxes], scores, shapes, thresh, nms_thresh, topk)
    ours, our_rows = fast_rcnn_inference(boxes, scores, shapes, thresh, nms_thresh, topk)
    for a, b, i, j in zip(theirs, ours, their_rows, our_rows):
        assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor) and a.image_size == b.image_size
        assert torch.equal(a.scores, b.scores) and torch.equal(a.pred_classes, b.pred_classes)
        assert torch.equal(i, j)
        for x, y in ((a.pred_boxes.tensor, b.pred_boxes.tensor), (a.scores, b.scores), (i, j)):
            assert x.dtype == y.dtype
    return ours


def random_input(generator, rows, classes, *, spread=2.0, specific=False, one_object=False, levels=0):
    corner = torch.rand(rows, 2, generator=generator) * torch.tensor([100.0, 70.0])
    size = torch.rand(rows, 2, generator=generator) * 50 + 5
    if one_object:
        corner, size = 20 + corner / 50, 40 + size / 50
    boxes = torch.cat([corner, corner + size], dim=1)
    if specific:
        boxes = (boxes[:, None] + 2 * torch.randn(rows, classes, 4, generator=generator)).flatten(1)
    scores = (spread * torch.randn(rows, classes + 1, generator=generator)).softmax(dim=1)
    if levels:
        scores = (scores * levels).ceil() / levels  # ties
    return boxes, scores


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(0, 60),
    classes=st.sampled_from([1, 7, 16, 50, 130]),
    spread=st.sampled_from([0.0, 0.5, 3.0, 20.0]),
    specific=st.booleans(),
    one_object=st.booleans(),
    levels=st.sampled_from([0, 0, 4, 1000]),
    broken=st.sampled_from([None, "nan score", "inf box", "nan everywhere"]),
    thresh=st.sampled_from([-1.0, 0.0, 1e-4, 0.05, 2.0]),
    nms_thresh=st.sampled_from([0.0, 0.5, 1.0]),
    topk=st.sampled_from([-1, 0, 1, 10, 300]),
    always=st.booleans(),
)
def test_random(seed, rows, classes, spread, specific, one_object, levels, broken, thresh, nms_thresh, topk, always):
    generator = torch.Generator().manual_seed(seed)
    options = dict(spread=spread, specific=specific, one_object=one_object, levels=levels)
    boxes, scores = random_input(generator, rows, classes, **options)
    if broken and rows:
        row = torch.randint(rows, (1,), generator=generator)
        if broken == "nan score":
            scores[row, 0] = float("nan")
        elif broken == "inf box":
            boxes[row, -1] = float("inf")
        else:
            scores[:], boxes[0] = float("nan"), float("-inf")
    same([boxes], [scores], thresh, nms_thresh, topk)
    if always and rows:  # several images, one of them empty
        other = random_input(generator, 3, classes, **options)
        same([boxes, boxes[:0], other[0]], [scores, scores[:0], other[1]], thresh, nms_thresh, topk)


@pytest.fixture
def looks(monkeypatch):
    """How often all candidates were looked at, and how many candidates each suppression had."""
    sizes = []
    original = fast_inference._nms_of_classes

    def counted(boxes, *args):
        sizes.append(len(boxes))
        return original(boxes, *args)

    monkeypatch.setattr(fast_inference, "_nms_of_classes", counted)
    return sizes


@pytest.mark.parametrize("specific", [False, True])
def test_few_of_many_candidates_are_looked_at(specific, looks):
    boxes, scores = random_input(torch.Generator().manual_seed(0), 200, 300, specific=specific)
    same([boxes], [scores], topk=50)
    assert looks and sum(looks) < 60_000 / 20


def test_ties_among_the_detections(looks):
    """Detectron2 leaves the order of equal scores to a sort that is not stable, over everything that it kept."""
    boxes, scores = random_input(torch.Generator().manual_seed(1), 100, 100, levels=50)
    assert len(same([boxes], [scores], topk=50)[0]) == 50
    assert looks[-1] > 5_000  # all of them


def test_one_object_covered_by_all_proposals(looks):
    boxes, scores = random_input(torch.Generator().manual_seed(2), 150, 60, one_object=True, spread=1.0)
    assert len(same([boxes], [scores], topk=50)[0]) == 50
    assert max(looks) > 500


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_boxes_of_other_precisions(dtype):
    """Suppression is in float32, as Detectron2's, which takes scores of no other type."""
    boxes, scores = random_input(torch.Generator().manual_seed(3), 80, 60)
    same([boxes.to(dtype)], [scores], topk=20)


def test_input_stays_as_it_is():
    boxes, scores = random_input(torch.Generator().manual_seed(4), 100, 50)
    boxes[0, 2] = 1e4
    before = boxes.clone(), scores.clone()
    fast_rcnn_inference([boxes], [scores], [SHAPE], 1e-4, 0.5, 10)
    assert torch.equal(boxes, before[0]) and torch.equal(scores, before[1])


@pytest.mark.parametrize("kind", ["standard", "cascade", "c4"])
def test_every_kind_of_roi_heads_uses_it(kind, stock_cfg, swap, batch, monkeypatch):
    from lt_det.modeling import box_predictor

    called = []
    monkeypatch.setattr(
        box_predictor, "fast_rcnn_inference", lambda *args: called.append(1) or fast_rcnn_inference(*args)
    )
    model = build_model(swap(stock_cfg(kind), kind)).eval()
    with torch.no_grad():
        assert len(model(batch)) == 3
    assert called == [1]


def test_test_time_augmentation(stock_cfg, swap, batch):
    cfg = swap(stock_cfg("standard"), "standard")
    cfg.merge_from_list(["TEST.AUG.MIN_SIZES", (80, 96), "TEST.AUG.MAX_SIZE", 160, "TEST.DETECTIONS_PER_IMAGE", 20])
    model = build_model(cfg).eval()
    inputs = [{k: v for k, v in x.items() if k != "instances"} for x in batch]
    with torch.no_grad():
        theirs, ours = GeneralizedRCNNWithTTA(cfg, model)(inputs), LongTailRCNNWithTTA(cfg, model)(inputs)
    for a, b in zip(theirs, ours):
        a, b = a["instances"], b["instances"]
        assert len(a) > 0 and torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
        assert torch.equal(a.scores, b.scores) and torch.equal(a.pred_classes, b.pred_classes)
        assert torch.equal(a.pred_masks, b.pred_masks)
