"""One channel of a mask beside all of them, the normalised mask predictor and the bias of the cosine classifier."""

import pytest
import torch
from detectron2.config import LazyCall, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads import ROI_MASK_HEAD_REGISTRY
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead, mask_rcnn_inference, mask_rcnn_loss
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from lt_det.modeling import CosineClassifier, LongTailMaskHead, NormalizedMaskRCNNConvUpsampleHead

SHAPE = ShapeSpec(channels=6, height=4, width=4)
HEADS = [LongTailMaskHead, NormalizedMaskRCNNConvUpsampleHead]


def detections(numbers, num_classes):
    """Images with so many objects each, as a mask head gets them in training and at inference."""
    generator = torch.Generator().manual_seed(5)
    images = []
    for number in numbers:
        image = Instances((16, 16))
        corner = torch.rand(number, 2, generator=generator) * 8
        image.proposal_boxes = image.pred_boxes = Boxes(torch.cat([corner, corner + 4], dim=1))
        image.gt_masks = BitMasks(torch.rand(number, 16, 16, generator=generator) > 0.5)
        image.gt_classes = image.pred_classes = torch.randint(num_classes, (number,), generator=generator)
        images.append(image)
    return images


def all_channels(head, x, images):
    """What Detectron2 does with the logits of all classes: its loss or its masks."""
    logits = head.layers(x)
    if head.training:
        return mask_rcnn_loss(logits, images) * head.loss_weight
    mask_rcnn_inference(logits, images)
    return torch.cat([image.pred_masks for image in images])


@pytest.mark.parametrize("head_class", HEADS)
@pytest.mark.parametrize("numbers", [(3, 0, 2), (0, 0), ()])
@pytest.mark.parametrize("num_classes", [4, 1])
def test_training_with_one_channel(head_class, numbers, num_classes):
    """Loss, logged numbers and gradients, of the features too, are those of all channels, in float64."""
    torch.manual_seed(0)
    head = head_class(SHAPE, num_classes=num_classes, conv_dims=[5, 5], loss_weight=0.7).double()
    torch.nn.init.normal_(head.predictor.weight)
    torch.nn.init.normal_(head.predictor.bias)
    images = detections(numbers, num_classes)
    features = torch.randn(sum(numbers), 6, 4, 4, dtype=torch.float64)
    found = []
    for compute in (lambda x: head(x, images)["loss_mask"], lambda x: all_channels(head, x, images)):
        x = features.clone().requires_grad_()
        head.zero_grad()
        with EventStorage() as storage:
            loss = compute(x)
            logged = {name: value for name, (value, _) in storage.latest().items()}
        loss.backward()
        found.append((loss.detach(), x.grad, {n: p.grad for n, p in head.named_parameters()}, logged))
    assert found[0][2].keys() == found[1][2].keys()
    assert all(g is not None for g in found[0][2].values())
    assert found[0][0] > 0 or not sum(numbers)
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("head_class", HEADS)
@pytest.mark.parametrize("numbers", [(40, 0, 9), (0, 0)])
@pytest.mark.parametrize("num_classes", [300, 1])
def test_masks_of_one_channel(head_class, numbers, num_classes):
    torch.manual_seed(0)
    shape = ShapeSpec(channels=64, height=14, width=14)
    head = head_class(shape, num_classes=num_classes, conv_dims=[64, 64]).eval()
    torch.nn.init.normal_(head.predictor.weight, std=0.1)
    torch.nn.init.normal_(head.predictor.bias)
    images = detections(numbers, num_classes)
    with torch.no_grad():
        x = torch.rand(sum(numbers), 64, 14, 14)
        result = head(x, images)
        assert [r.pred_masks.shape for r in result] == [(n, 1, 28, 28) for n in numbers]
        found = torch.cat([r.pred_masks for r in result])
        torch.testing.assert_close(found, all_channels(head, x, images), rtol=0, atol=1e-6)


def test_one_channel_of_a_predictor_without_bias():
    torch.manual_seed(0)
    head = LongTailMaskHead(SHAPE, num_classes=5, conv_dims=[5]).double().eval()
    head.predictor.bias = None
    images = detections((4,), 5)
    with torch.no_grad():
        x = torch.rand(4, 6, 4, 4, dtype=torch.float64)
        found = head(x, images)[0].pred_masks
        torch.testing.assert_close(found, all_channels(head, x, images), rtol=1e-12, atol=0)


def test_other_channels_are_not_computed():
    """300 classes more cost no product: the features meet the weights of one class each."""
    head = LongTailMaskHead(SHAPE, num_classes=300, conv_dims=[5]).eval()
    with torch.no_grad():
        head.predictor.weight[1:] = float("nan")
        images = detections((3,), 1)
        assert torch.isfinite(head(torch.rand(3, 6, 4, 4), images)[0].pred_masks).all()


def test_few_rois_at_a_time():
    """At inference on a CPU no layer sees all RoIs at once, and all of them once."""
    head = LongTailMaskHead(SHAPE, num_classes=3, conv_dims=[5, 5]).eval()
    seen = []
    next(iter(head)).register_forward_hook(lambda module, args, out: seen.append(len(out)))
    head(torch.randn(49, 6, 4, 4), detections((40, 9), 3))
    assert sum(seen) == 49 and max(seen) == 16


@pytest.mark.parametrize("head_class", HEADS)
@pytest.mark.parametrize("num_classes", [300, 1])
def test_a_box_with_several_classes_is_one_roi(head_class, num_classes):
    """Boxes that no class refines come back once for each class above the threshold; equal boxes of two images are
    two. With one mask for all classes the predictor, too, sees each box once."""
    head = head_class(SHAPE, num_classes=num_classes, conv_dims=[5, 5]).eval()
    images = detections((90, 40), num_classes)
    distinct = torch.cat([torch.randint(20, (90,)), 20 + torch.randint(7, (40,))])
    x = torch.randn(27, 6, 4, 4)[distinct]
    boxes = images[0].pred_boxes.tensor[:20]
    images[0].pred_boxes = Boxes(boxes[distinct[:90]])
    images[1].pred_boxes = Boxes(boxes[distinct[90:] - 20])
    expected = all_channels(head, x, detections((90, 40), num_classes))
    seen = []
    next(iter(head)).register_forward_hook(lambda module, args, out: seen.append(len(out)))
    predicted = []
    head.predictor.register_forward_hook(lambda module, args, out: predicted.append(len(out)))
    found = torch.cat([image.pred_masks for image in head(x, images)])
    torch.testing.assert_close(found, expected)
    assert sum(seen) == len(distinct.unique())
    assert sum(predicted) == (len(distinct.unique()) if num_classes == 1 else 0)


@pytest.mark.parametrize("kind", ["standard", "cascade", "c4"])
def test_stock_name_gives_one_channel(kind, stock_cfg, swap):
    """The long-tail ROI heads replace the stock head and no other, and draw the same random numbers."""
    cfg = swap(stock_cfg(kind), kind)
    cfg.freeze()
    torch.manual_seed(0)
    ours = build_model(cfg).roi_heads.mask_head
    assert type(ours) is LongTailMaskHead and cfg.MODEL.ROI_MASK_HEAD.NAME == "MaskRCNNConvUpsampleHead"

    @ROI_MASK_HEAD_REGISTRY.register()
    class HeadOfSomeoneElse(MaskRCNNConvUpsampleHead):
        pass

    try:
        cfg.defrost()
        cfg.MODEL.ROI_MASK_HEAD.NAME = "HeadOfSomeoneElse"
        torch.manual_seed(0)
        theirs = build_model(cfg).roi_heads.mask_head
    finally:
        ROI_MASK_HEAD_REGISTRY._obj_map.pop("HeadOfSomeoneElse")
    assert type(theirs) is HeadOfSomeoneElse
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))


def test_bfloat16_on_a_cpu():
    """Where the bias is added apart, features and gradients are those of the layers, up to bfloat16's 8 bits."""
    torch.manual_seed(0)
    head = LongTailMaskHead(SHAPE, num_classes=3, conv_dims=[5, 5])
    with torch.no_grad():
        head.deconv.bias.normal_()
    x = torch.randn(64, SHAPE.channels, 4, 4)

    def gradients(features):
        features.double().square().mean().backward()
        out = [p.grad for p in (head.mask_fcn1.weight, head.deconv.weight, head.deconv.bias)]
        head.zero_grad()
        return [features.detach(), *out]

    wanted = gradients(head.deconv_relu(head.deconv(head.mask_fcn1(x))))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = head._features(x)
        assert features.dtype == torch.bfloat16
        found = gradients(features)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours.double() - theirs.double()).norm() < 0.02 * theirs.double().norm()


def test_lazy_mask_head():
    head = instantiate(LazyCall(LongTailMaskHead)(input_shape=SHAPE, num_classes=3, conv_dims=[5, 5]))
    assert head.predictor.weight.shape == (3, 5, 1, 1)


def test_logits_are_scaled_cosines():
    torch.manual_seed(0)
    head = NormalizedMaskRCNNConvUpsampleHead(SHAPE, num_classes=3, conv_dims=[5, 5], predictor_scale=7.0)
    stock = MaskRCNNConvUpsampleHead(SHAPE, num_classes=3, conv_dims=[5, 5])
    assert {k: v.shape for k, v in head.state_dict().items()} == {k: v.shape for k, v in stock.state_dict().items()}
    with torch.no_grad():
        head.predictor.bias.copy_(torch.tensor([0.1, -0.2, 0.3]))
    x = torch.randn(2, 6, 4, 4)
    features = head.deconv_relu(head.deconv(head.mask_fcn1(x)))
    logits = head.layers(x)
    assert logits.shape == (2, 3, 8, 8)
    w = head.predictor.weight[:, :, 0, 0]
    for n, c, i, j in [(0, 0, 0, 0), (1, 2, 5, 3), (0, 1, 7, 7)]:
        f = features[n, :, i, j]
        wanted = 7 * torch.dot(f, w[c]) / (f.norm() * w[c].norm()) + head.predictor.bias[c]
        torch.testing.assert_close(logits[n, c, i, j], wanted, rtol=1e-4, atol=1e-5)


def test_dead_pixels():
    """Where the features are zero the logit is the bias, and gradients are finite."""
    head = NormalizedMaskRCNNConvUpsampleHead(SHAPE, num_classes=2, conv_dims=[5])
    x = torch.zeros(1, 5, 3, 3, requires_grad=True)
    logits = head.predictor(torch.relu(x))
    assert torch.equal(logits, torch.zeros_like(logits))
    logits.sum().backward()
    assert torch.isfinite(x.grad).all() and torch.isfinite(head.predictor.weight.grad).all()


def test_by_config(stock_cfg, swap, batch):
    cfg = swap(stock_cfg("standard"), "standard")
    cfg.MODEL.ROI_MASK_HEAD.NAME = "NormalizedMaskRCNNConvUpsampleHead"
    cfg.MODEL.LONG_TAIL.MASK_SCALE = 11.0
    model = build_model(cfg)
    assert model.roi_heads.mask_head.predictor.scale == 11.0
    with EventStorage():
        losses = model(batch)
    losses["loss_mask"].backward()
    assert model.roi_heads.mask_head.predictor.weight.grad.abs().sum() > 0
    model.eval()
    with torch.no_grad():
        masks = torch.cat([r["instances"].pred_masks for r in model(batch)])
    assert masks.dtype == torch.bool and len(masks)
    cfg.MODEL.LONG_TAIL.MASK_SCALE = 0.0
    with pytest.raises(ValueError, match="MASK_SCALE"):
        build_model(cfg)


def test_bias_of_the_cosine_classifier(stock_cfg, swap):
    torch.manual_seed(0)
    plain, biased = CosineClassifier(4, 3, scale=5.0), CosineClassifier(4, 3, scale=5.0, bias=True)
    assert plain.bias is None
    biased.load_state_dict({**plain.state_dict(), "bias": torch.tensor([1.0, 2.0, 3.0])})
    x = torch.randn(2, 4)
    torch.testing.assert_close(biased(x), plain(x) + torch.tensor([1.0, 2.0, 3.0]))
    cfg = swap(stock_cfg("standard"), "standard", "Sigmoid")
    cfg.MODEL.LONG_TAIL.CLASSIFIER.NAME = "cosine"
    cfg.MODEL.LONG_TAIL.CLASSIFIER.BIAS = True
    layers = build_model(cfg).roi_heads.box_predictor
    assert layers.cls_score.bias[0].sigmoid().item() == pytest.approx(0.001)
