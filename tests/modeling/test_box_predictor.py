"""LongTailOutputLayers against Detectron2's FastRCNNOutputLayers and against numbers worked by hand."""

import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from lt_det.data import ClassStatistics
from lt_det.losses import LOSS_REGISTRY
from lt_det.modeling import CosineClassifier, LongTailOutputLayers

K, D = 5, 16
STATISTICS = ClassStatistics([1, 2, 5, 40, 400], [1, 3, 9, 80, 900], 500, ("a", "b", "c", "d", "e"))


def layers(cls=LongTailOutputLayers, **kwargs):
    torch.manual_seed(0)
    return cls(
        ShapeSpec(channels=D),
        box2box_transform=Box2BoxTransform(weights=(10, 10, 5, 5)),
        num_classes=K,
        test_score_thresh=0.01,
        **kwargs,
    )


def proposals(labels, generator=None):
    generator = generator or torch.Generator().manual_seed(1)
    found = []
    for part in labels:
        boxes = torch.rand(len(part), 4, generator=generator) * 20
        boxes[:, 2:] += boxes[:, :2] + 10
        instances = Instances((64, 64))
        instances.proposal_boxes = Boxes(boxes)
        instances.gt_boxes = Boxes(boxes + 1)
        instances.gt_classes = torch.tensor(part, dtype=torch.int64)
        found.append(instances)
    return found


@pytest.mark.parametrize("agnostic", [False, True])
def test_softmax_is_detectron2(agnostic):
    ours, stock = layers(cls_agnostic_bbox_reg=agnostic), layers(FastRCNNOutputLayers, cls_agnostic_bbox_reg=agnostic)
    assert set(ours.state_dict()) == set(stock.state_dict())
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(7, D, generator=torch.Generator().manual_seed(2))
    props = proposals([[0, 4, K], [K, 2, 2, K]])
    for a, b in zip(ours.inference(ours(x), props)[0], stock.inference(stock(x), props)[0]):
        assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
        assert torch.equal(a.scores, b.scores) and torch.equal(a.pred_classes, b.pred_classes)
    ours, stock, x = ours.double(), stock.double(), x.double()
    with EventStorage():
        torch.testing.assert_close(ours.losses(ours(x), props), stock.losses(stock(x), props), rtol=1e-9, atol=0)


def test_balanced_softmax_value():
    """CE(z + log(K pi)) with the background's score unshifted, in plain Python."""
    predictor = layers(loss="BalancedSoftmax", class_statistics=STATISTICS)
    z = [0.3, -1.0, 2.0, 0.1, 0.5, 1.5]
    total = sum(STATISTICS.image_count.tolist())
    shifted = [s + math.log(K * n / total) for s, n in zip(z, STATISTICS.image_count.tolist())] + [z[K]]
    expected = [math.log(sum(map(math.exp, shifted))) - shifted[y] for y in (1, K)]
    with EventStorage():
        losses = predictor.classification_losses(torch.tensor([z, z]), torch.tensor([1, K]))
    assert losses["loss_cls"].item() == pytest.approx(sum(expected) / 2, rel=1e-6)


def test_balanced_sigmoid_value_and_inference():
    """BALMS's detection form: K sigmoids, z - log((1-f)/f) on foreground rows only; plain sigmoids at inference."""
    predictor = layers(loss="BalancedSigmoid", class_statistics=STATISTICS)
    assert predictor.cls_score.weight.shape == (K, D)
    assert torch.allclose(predictor.cls_score.bias, torch.full((K,), math.log(0.001 / 0.999)))
    z = [0.3, -1.0, 2.0, 0.1, 0.5]
    f = [n / 500 for n in STATISTICS.image_count.tolist()]

    def bce(score, target):
        return math.log(1 + math.exp(-score if target else score))

    foreground = sum(bce(s - math.log((1 - fc) / fc), c == 1) for c, (s, fc) in enumerate(zip(z, f)))
    background = sum(bce(s, False) for s in z)
    with EventStorage():
        losses = predictor.classification_losses(torch.tensor([z, z]), torch.tensor([1, K]))
    assert losses["loss_cls"].item() == pytest.approx((foreground + background) / 2, rel=1e-6)
    probs = predictor.predict_probs((torch.tensor([z]), None), proposals([[K]]))[0]
    assert probs.shape == (1, K + 1)
    assert torch.allclose(probs[0, :K], torch.tensor(z).sigmoid())


@pytest.mark.parametrize("name", ["Softmax", "BalancedSoftmax", "BalancedSigmoid"])
def test_no_rois(name):
    predictor = layers(loss=name, class_statistics=STATISTICS)
    with EventStorage():
        for props in (proposals([[], []]), []):
            losses = predictor.losses(predictor(torch.zeros(0, D)), props)
            total = sum(losses.values())
            assert total.item() == 0
            total.backward()
    assert predictor.cls_score.weight.grad is not None


def test_images_without_ground_truth():
    predictor = layers(loss="BalancedSoftmax", class_statistics=STATISTICS)
    props = proposals([[K, K]])
    props[0].remove("gt_boxes")
    with EventStorage():
        losses = predictor.losses(predictor(torch.randn(2, D)), props)
    assert losses["loss_box_reg"].item() == 0 and losses["loss_cls"].item() > 0


def test_set_loss_checks_the_family():
    predictor = layers()
    before = predictor.cls_score.weight
    predictor.set_loss(LOSS_REGISTRY.get("BalancedSoftmax")(K, statistics=STATISTICS))
    assert predictor.cls_score.weight is before
    sigmoid = LOSS_REGISTRY.get("BalancedSigmoid")(K, statistics=STATISTICS)
    with pytest.raises(ValueError, match="DECOUPLE.REINIT_CLASSIFIER"):
        predictor.set_loss(sigmoid)
    predictor.set_loss(sigmoid, reinit=True)
    assert predictor.cls_score.weight.shape == (K, D)


def test_cosine_classifier():
    predictor = layers(classifier="cosine", classifier_options={"scale": 7.0})
    assert isinstance(predictor.cls_score, CosineClassifier)
    x = torch.randn(3, D)
    w = predictor.cls_score.weight
    expected = [[7 * torch.dot(a, b) / (a.norm() * b.norm()) for b in w] for a in x]
    assert torch.allclose(predictor(x)[0], torch.tensor(expected), atol=1e-5)
    learned = layers(classifier="cosine", classifier_options={"scale": 7.0, "learn_scale": True})
    assert learned.cls_score.scale.requires_grad


@pytest.mark.parametrize("name", ["Sigmoid", "EQL", "GumbelSigmoid"])
def test_cosine_classifier_keeps_the_bias_that_a_loss_starts_with(name):
    """Asked for or not; without it every class would start at 1/2 (or 1/e), and BIAS_PRIOR do nothing."""
    loss = LOSS_REGISTRY.get(name)(K, statistics=STATISTICS, bias_prior=0.02)
    predictor = layers(loss=loss, classifier="cosine", classifier_options={"bias": False})
    scores = predictor(torch.zeros(2, D))[0]  # a cosine of 0: the bias alone
    assert torch.allclose(loss.activation(scores)[:, :K], torch.tensor(0.02))
    none = LOSS_REGISTRY.get(name)(K, statistics=STATISTICS, bias_prior=0.0)
    assert layers(loss=none, classifier="cosine").cls_score.bias is None
    assert layers(loss=none, classifier="cosine", classifier_options={"bias": True}).cls_score.bias is not None


def test_checkpoint_of_a_cosine_classifier_without_bias():
    """One that was trained without a bias scores as it did; one of another width leaves the start alone."""
    predictor = layers(loss="Sigmoid", classifier="cosine")
    start = predictor.cls_score.bias.detach().clone()
    assert (start < -6).all()
    trained = {key: value for key, value in predictor.cls_score.state_dict().items() if key != "bias"}
    predictor.cls_score.load_state_dict({}, strict=False)
    assert (predictor.cls_score.bias == start).all()
    predictor.cls_score.load_state_dict(trained)
    assert (predictor.cls_score.bias == 0).all()


def test_own_classifier():
    predictor = layers(classifier=lambda d, k: torch.nn.Linear(d, k))
    assert predictor.cls_score.out_features == K + 1


def test_bad_settings():
    with pytest.raises(ValueError, match="MODEL.LONG_TAIL.CLASSIFIER.NAME"):
        layers(classifier="quadratic")
    with pytest.raises(ValueError, match='MODEL.LONG_TAIL.LOSS: "Sigmoid"'):
        layers(use_sigmoid_ce=True)
    with pytest.raises(ValueError, match="positive"):
        CosineClassifier(3, 2, scale=0)
