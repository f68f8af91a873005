"""The three ROI heads, by changing a few keys of Detectron2's own configs."""

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.modeling.proposal_generator import proposal_utils
from detectron2.utils.events import EventStorage

from lt_det.engine import LongTailCheckpointer
from lt_det.modeling import DecoupledClassifier, LongTailOutputLayers, box_predictors

KINDS = ["standard", "cascade", "c4"]


@pytest.mark.parametrize("kind", KINDS)
def test_stock_checkpoint_gives_the_same_model(kind, stock_cfg, swap, batch, tmp_path):
    """A checkpoint of stock Detectron2 loads without a key too few or too many, and nothing changes."""
    cfg = stock_cfg(kind)
    torch.manual_seed(0)
    stock = build_model(cfg)
    DetectionCheckpointer(stock, str(tmp_path)).save("stock")
    ours = build_model(swap(cfg, kind))
    checkpointer = LongTailCheckpointer(ours, strict=True)
    checkpointer.load(str(tmp_path / "stock.pth"), checkpointables=[])
    assert set(ours.state_dict()) == set(stock.state_dict())

    for model in (stock, ours):
        model.eval()
    with torch.no_grad():
        for a, b in zip(stock(batch), ours(batch)):
            a, b = a["instances"], b["instances"]
            assert len(a) > 0
            assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor) and torch.equal(a.scores, b.scores)
            assert torch.equal(a.pred_classes, b.pred_classes)
            # Another product, so another rounding, which may move a probability over 0.5.
            assert (a.pred_masks ^ b.pred_masks).float().mean() < 1e-3
    losses = []
    for model in (stock, ours):
        model.train()
        torch.manual_seed(3)
        with EventStorage():
            losses.append({name: value.item() for name, value in model(batch).items()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", ["BalancedSoftmax", "BalancedSigmoid"])
def test_swapped_loss_trains_and_detects(kind, loss, stock_cfg, swap, batch, statistics_file):
    cfg = swap(stock_cfg(kind), kind, loss)
    cfg.MODEL.LONG_TAIL.STATISTICS = statistics_file
    model = build_model(cfg)
    assert all(isinstance(p, LongTailOutputLayers) for p in box_predictors(model))
    with EventStorage():
        losses = model(batch)
    assert all(torch.isfinite(v) for v in losses.values())
    sum(losses.values()).backward()
    assert all(p.cls_score.weight.grad.abs().sum() > 0 for p in box_predictors(model))
    model.eval()
    with torch.no_grad():
        results = model(batch)
    scores = torch.cat([r["instances"].scores for r in results])
    assert ((scores >= 0) & (scores <= 1)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_decoupled_step_is_the_full_step(kind, stock_cfg, swap, batch, statistics_file, monkeypatch):
    """Losses and classifier gradients of the short way are those of the whole model on the same RoIs."""
    cfg = swap(stock_cfg(kind), kind, "BalancedSoftmax")
    cfg.MODEL.LONG_TAIL.STATISTICS = statistics_file
    # Enough room for all proposals, so that no random choice differs between the two ways.
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 4096
    cfg.MODEL.ROI_HEADS.POSITIVE_FRACTION = 1.0
    torch.manual_seed(0)
    # In float64, trunk included: with gradients and without them it may be summed in another order. Detectron2
    # suppresses in float32.
    nms = proposal_utils.batched_nms
    monkeypatch.setattr(proposal_utils, "batched_nms", lambda boxes, scores, *args: nms(boxes, scores.float(), *args))
    model = build_model(cfg).double()
    model.train()
    with EventStorage():
        full = {k: v for k, v in model(batch).items() if k.startswith("loss_cls")}
        sum(full.values()).backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if "cls_score" in n}
    model.zero_grad(set_to_none=True)

    decoupled = DecoupledClassifier(model)
    with EventStorage():
        short = decoupled(batch)
        sum(short.values()).backward()
    assert short.keys() == full.keys()
    for name in full:
        torch.testing.assert_close(short[name], full[name], rtol=1e-9, atol=0)
    for name, parameter in model.named_parameters():
        if "cls_score" in name:
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-9, atol=1e-12)
        else:
            assert parameter.grad is None and not parameter.requires_grad


def test_decoupled_keeps_batch_norm_statistics(stock_cfg, swap, batch):
    cfg = swap(stock_cfg("standard"), "standard")
    cfg.MODEL.RESNETS.NORM = "BN"
    model = build_model(cfg)
    decoupled = DecoupledClassifier(model).train()
    before = {k: v.clone() for k, v in model.named_buffers() if "running" in k}
    assert before
    model.train()  # as Detectron2's evaluation leaves it
    with EventStorage():
        decoupled(batch)
    assert all(torch.equal(v, before[k]) for k, v in model.named_buffers() if "running" in k)


def test_checkpoint_that_does_not_fit(stock_cfg, swap, tmp_path):
    cfg = swap(stock_cfg("standard"), "standard")
    LongTailCheckpointer(build_model(cfg), str(tmp_path)).save("twenty")
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 30
    model = build_model(cfg)
    with pytest.raises(ValueError, match="(?s)cls_score.*MODEL.ROI_HEADS.NUM_CLASSES"):
        LongTailCheckpointer(model, strict=True).load(str(tmp_path / "twenty.pth"), checkpointables=[])
    # Fine-tuning on other classes is Detectron2's custom: heads that differ start afresh.
    LongTailCheckpointer(model).load(str(tmp_path / "twenty.pth"), checkpointables=[])
    torch.save({"model": {"other.weight": torch.zeros(3)}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.weight"):
        LongTailCheckpointer(model).load(str(tmp_path / "other.pth"), checkpointables=[])
    with pytest.raises(FileNotFoundError, match="MODEL.WEIGHTS"):
        LongTailCheckpointer(model).load(str(tmp_path / "absent.pth"))


def test_wrong_head_for_decoupling(stock_cfg):
    with pytest.raises(ValueError, match="MODEL.ROI_HEADS.NAME"):
        DecoupledClassifier(build_model(stock_cfg("standard")))


def test_number_of_classes_must_agree(stock_cfg, swap, statistics_file):
    cfg = swap(stock_cfg("standard"), "standard", "BalancedSoftmax")
    cfg.MODEL.LONG_TAIL.STATISTICS = statistics_file
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 30
    model = build_model(cfg)
    with pytest.raises(ValueError, match="set MODEL.ROI_HEADS.NUM_CLASSES 20"):
        box_predictors(model)[0].loss.prepare()


def test_unknown_loss(stock_cfg, swap):
    with pytest.raises(
        ValueError, match=r"MODEL.LONG_TAIL.LOSS is 'Sotfmax'.*did you mean Softmax or .*\? Known: ACSL,.*Softmax"
    ):
        build_model(swap(stock_cfg("standard"), "standard", "Sotfmax"))
