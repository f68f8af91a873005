"""LongTailOutputLayers where Detectron2 has FastRCNNOutputLayers: what works on the one works on the other."""

import copy
import pickle

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.export.torchscript_patch import freeze_training_mode, patch_builtin_len, patch_instances
from detectron2.layers import ShapeSpec
from detectron2.modeling import GeneralizedRCNNWithTTA, build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, roi_heads
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from lt_det.data import ClassStatistics
from lt_det.losses import LOSS_REGISTRY
from lt_det.modeling import CALIBRATOR_REGISTRY, LogitMoments, LongTailOutputLayers, LongTailRCNNWithTTA

K, D = 6, 12
STATISTICS = ClassStatistics(
    [1, 3, 9, 20, 70, 400], [1, 4, 20, 30, 300, 900], 500, tuple("abcdef"), fractal_dimension=[1, 1, 1.2, 1.5, 1.7, 1.9]
)
LOSSES = [name for name, _ in LOSS_REGISTRY]
CALIBRATORS = [name for name, _ in CALIBRATOR_REGISTRY]


def predictor(cls=LongTailOutputLayers, seed=0, **options):
    torch.manual_seed(seed)
    found = cls(
        ShapeSpec(channels=D),
        box2box_transform=Box2BoxTransform(weights=(10, 10, 5, 5)),
        num_classes=K,
        test_score_thresh=0.001,
        **options,
    )
    return found


def proposals(*counts):
    generator = torch.Generator().manual_seed(1)
    found = []
    for n in counts:
        corner = torch.rand(n, 2, generator=generator) * 30
        instances = Instances((64, 80))
        instances.proposal_boxes = Boxes(torch.cat([corner, corner + 12], dim=1))
        instances.gt_boxes = Boxes(torch.cat([corner + 1, corner + 14], dim=1))
        instances.gt_classes = torch.randint(0, K + 1, (n,), generator=generator)
        found.append(instances)
    return found


def features(n, dtype=torch.float32):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(2)).to(dtype)


def trained(name):
    """A predictor whose loss has no statistics, as in a process that only evaluates, and has loaded a checkpoint."""
    source = predictor(loss=name, class_statistics=STATISTICS)
    source.loss.prepare()
    with torch.no_grad():
        source.cls_score.weight.mul_(50)  # scores that differ
    found = predictor(loss=name, seed=1)
    found.load_state_dict(source.state_dict())
    return found.eval()


def calibrated(name):
    cls = CALIBRATOR_REGISTRY.get(name)
    options = {"statistics": STATISTICS} if cls.uses_statistics else {}
    if name == "LogN":
        options["moments"] = [LogitMoments(mean=tuple(range(K)), std=tuple(0.5 + c / K for c in range(K)))]
    found = trained("Softmax")
    found.set_calibrator(cls(**options))
    return found


# ---- default options


@pytest.mark.parametrize("agnostic", [False, True])
def test_weights_losses_and_detections_are_stock_bit_for_bit(agnostic):
    stock = predictor(FastRCNNOutputLayers, cls_agnostic_bbox_reg=agnostic)
    after_stock = torch.rand(())
    ours = predictor(cls_agnostic_bbox_reg=agnostic)
    assert torch.rand(()) == after_stock  # what is built next gets the same random numbers
    assert ours.state_dict().keys() == stock.state_dict().keys()
    assert all(torch.equal(value, stock.state_dict()[key]) for key, value in ours.state_dict().items())
    props = proposals(5, 7)
    with EventStorage():
        a, b = (p.losses(p(features(12)), props) for p in (ours, stock))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in b)
    for loss in (sum(a.values()), sum(b.values())):
        loss.backward()
    for mine, theirs in zip(ours.parameters(), stock.parameters()):
        assert torch.equal(mine.grad, theirs.grad)
    for mine, theirs in zip(*(p.eval().inference(p(features(12)), props)[0] for p in (ours, stock))):
        assert len(theirs) and torch.equal(mine.pred_boxes.tensor, theirs.pred_boxes.tensor)
        assert torch.equal(mine.scores, theirs.scores) and torch.equal(mine.pred_classes, theirs.pred_classes)


@pytest.mark.parametrize("kind", ["standard", "cascade", "c4"])
def test_models_are_stock_bit_for_bit(kind, stock_cfg, swap, batch):
    cfg = stock_cfg(kind)
    cfg.MODEL.ROI_BOX_HEAD.USE_FED_LOSS = cfg.MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE = False
    found = []
    for each in (cfg, swap(cfg, kind)):
        torch.manual_seed(3)
        model = build_model(each)
        with EventStorage():
            losses = model(copy.deepcopy(batch))
        with torch.no_grad():
            detections = model.eval().inference(batch, do_postprocess=False)
        found.append((model.state_dict(), losses, detections))
    (weights, losses, detections), (ours, our_losses, our_detections) = found
    assert weights.keys() == ours.keys() and all(torch.equal(ours[key], value) for key, value in weights.items())
    assert losses.keys() == our_losses.keys() and all(torch.equal(our_losses[k], v) for k, v in losses.items())
    for theirs, mine in zip(detections, our_detections):
        assert torch.equal(theirs.scores, mine.scores) and torch.equal(theirs.pred_classes, mine.pred_classes)
        assert torch.equal(theirs.pred_boxes.tensor, mine.pred_boxes.tensor)
        # Detectron2 computes the channels of all classes, lt_det the predicted one: sums in another order.
        torch.testing.assert_close(mine.pred_masks, theirs.pred_masks, rtol=0, atol=1e-5)


def test_config_without_our_keys(monkeypatch):
    """Detectron2's own heads with the class exchanged under their name."""
    cfg = get_cfg()
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = K
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2"]
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = D
    shape = {"p2": ShapeSpec(channels=4, stride=4)}
    found = []
    for cls in (FastRCNNOutputLayers, LongTailOutputLayers):
        monkeypatch.setattr(roi_heads, "FastRCNNOutputLayers", cls)
        torch.manual_seed(0)
        heads = roi_heads.StandardROIHeads(cfg, shape)
        maps = {"p2": torch.randn(2, 4, 16, 20)}
        targets = [Instances((64, 80)), Instances((64, 80))]
        for target in targets:
            target.gt_boxes = Boxes(torch.tensor([[4.0, 5.0, 30.0, 40.0], [20.0, 8.0, 70.0, 60.0]]))
            target.gt_classes = torch.tensor([1, 4])
        given = []
        for target in targets:
            proposal = Instances((64, 80))
            proposal.proposal_boxes = Boxes(torch.cat([target.gt_boxes.tensor + 2, target.gt_boxes.tensor - 9]))
            proposal.objectness_logits = torch.zeros(4)
            given.append(proposal)
        with EventStorage():
            _, losses = heads(None, maps, given, targets)
        found.append((type(heads.box_predictor), losses))
    (stock, expected), (ours, losses) = found
    assert stock is FastRCNNOutputLayers and ours is LongTailOutputLayers
    assert losses.keys() == expected.keys() and all(torch.equal(losses[k], expected[k]) for k in losses)


# ---- every loss, every calibrator


@pytest.mark.parametrize("name", LOSSES)
def test_no_scores_of_any_width(name):
    """No proposals at all: Detectron2 takes scores of whatever width, and both inputs get a gradient."""
    layers = predictor(loss=name, class_statistics=STATISTICS)
    scores, deltas = torch.randn(0, 100, requires_grad=True), torch.randn(0, 4, requires_grad=True)
    with EventStorage():
        losses = layers.losses((scores, deltas), [])
    assert all(value.item() == 0 for value in losses.values())
    sum(losses.values()).backward()
    assert scores.grad is not None and deltas.grad is not None
    assert layers.inference((scores, deltas), []) == ([], [])


class Probabilities(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        given = Instances((64, 80))
        given.proposal_boxes = Boxes(torch.cat([x[:, :2], x[:, :2] + 12], dim=1))
        return self.layers.predict_probs(self.layers(x), [given])[0]


def check_trace(layers):
    model = Probabilities(layers)
    with torch.no_grad():
        traced = torch.jit.trace(model, features(5), check_trace=False)
        for n in (5, 9):
            assert torch.equal(traced(features(n)), model(features(n)))


def check_script(layers):
    """Detectron2's way: instances become a scripted class, the training branches are left out."""
    props = proposals(9, 4)
    for p in props:
        p.remove("gt_boxes"), p.remove("gt_classes")
    fields = {"proposal_boxes": Boxes, "pred_boxes": Boxes, "scores": torch.Tensor, "pred_classes": torch.Tensor}

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers

        def forward(self, x: torch.Tensor, given: list[Instances]) -> list[Instances]:
            return self.layers.inference(self.layers(x), given)[0]

    expected = layers.inference(layers(features(13)), props)[0]
    with patch_instances(fields) as scripted_instances, freeze_training_mode(layers), patch_builtin_len():
        scripted = torch.jit.script(Head().eval())
        found = scripted(features(13), [scripted_instances.from_instances(p) for p in props])
        for mine, theirs in zip(found, expected):
            assert len(theirs) and torch.equal(mine.scores, theirs.scores)
            assert torch.equal(mine.pred_boxes.tensor, theirs.pred_boxes.tensor)
            assert torch.equal(mine.pred_classes, theirs.pred_classes)


def check_copies(layers):
    expected = layers.predict_probs(layers(features(5)), proposals(5))[0]
    for twin in (pickle.loads(pickle.dumps(layers)), copy.deepcopy(layers)):
        assert torch.equal(twin.predict_probs(twin(features(5)), proposals(5))[0], expected)


def check_bfloat16(layers):
    expected = layers.predict_probs(layers(features(5)), proposals(5))[0]
    half = copy.deepcopy(layers).to(torch.bfloat16)
    found = half.predict_probs(half(features(5, torch.bfloat16)), proposals(5))[0]
    assert found.isfinite().all()
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.1)  # bfloat16 has 8 bits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layers.predict_probs(layers(features(5)), proposals(5))[0]
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.1)


CHECKS = {"trace": check_trace, "script": check_script, "copies": check_copies, "bfloat16": check_bfloat16}


@pytest.mark.parametrize("what", CHECKS)
@pytest.mark.parametrize("name", LOSSES)
@torch.no_grad()
def test_every_loss_without_a_data_set(name, what):
    CHECKS[what](trained(name))


@pytest.mark.parametrize("what", CHECKS)
@pytest.mark.parametrize("name", CALIBRATORS)
@torch.no_grad()
def test_every_calibrator(name, what):
    CHECKS[what](calibrated(name))


@pytest.mark.parametrize("name", LOSSES + CALIBRATORS)
def test_test_time_augmentation(name, stock_cfg, batch):
    """Detectron2's TTA averages the views' probabilities and finds its detections in them."""
    cfg = stock_cfg("standard")
    cfg.merge_from_list(["MODEL.ROI_HEADS.NUM_CLASSES", K, "MODEL.ROI_BOX_HEAD.FC_DIM", D, "MODEL.MASK_ON", False])
    cfg.merge_from_list(["TEST.AUG.MIN_SIZES", (80, 96), "TEST.AUG.MAX_SIZE", 160, "TEST.DETECTIONS_PER_IMAGE", 20])
    model = build_model(cfg).eval()
    model.roi_heads.box_predictor = trained(name) if name in LOSSES else calibrated(name)
    inputs = [{k: v for k, v in x.items() if k != "instances"} for x in batch]
    with torch.no_grad():
        theirs, ours = GeneralizedRCNNWithTTA(cfg, model)(inputs), LongTailRCNNWithTTA(cfg, model)(inputs)
        once = model(inputs)
    for a, b, plain in zip(theirs, ours, once):
        a, b, plain = a["instances"], b["instances"], plain["instances"]
        assert len(a) and torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
        assert torch.equal(a.scores, b.scores) and torch.equal(a.pred_classes, b.pred_classes)
        assert not torch.equal(a.scores, plain.scores)  # another view was looked at


@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_training(name):
    layers = predictor(loss=name, class_statistics=STATISTICS)
    props = proposals(5, 7)
    with EventStorage(), torch.autocast("cpu", dtype=torch.bfloat16):
        total = sum(layers.losses(layers(features(12)), props).values())
    total.backward()
    assert total.isfinite() and layers.cls_score.weight.grad.isfinite().all()
