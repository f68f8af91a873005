"""Deferred re-weighting: what changes when it starts, resumption, and company with stage 2."""

import pytest
import torch

from lt_det.engine import LongTailTrainer
from lt_det.modeling import box_predictors

LDAM = ("MODEL.LONG_TAIL.LOSS", "LDAM", "DRW.ENABLED", True)
ALONE = (*LDAM, "DECOUPLE.ENABLED", False)


def active(trainer):
    return [p.loss.drw_active for p in box_predictors(trainer.detector)]


def test_starts_at_four_fifths_with_a_cut(tiny_cfg, train):
    trainer, record = train(tiny_cfg(*ALONE, "SOLVER.MAX_ITER", 10, "SOLVER.STEPS", (9,), "SOLVER.BASE_LR", 0.01))
    factor = 0.001
    expected = [0.01 * f for f in (factor, (1 + factor) / 2, 1, 1, 1, 1, 1, 1, 0.1, 0.01)]
    assert [record.lr[i] for i in range(10)] == pytest.approx(expected, rel=1e-6)
    assert active(trainer) == [True]


def test_the_loss_changes_at_the_start_and_not_before(tiny_cfg, train, tmp_path):
    runs = {}
    for start in (2, 4):
        cfg = tiny_cfg(*ALONE, "DRW.START_ITER", start, "DRW.LR_FACTOR", 1.0, "OUTPUT_DIR", str(tmp_path / str(start)))
        runs[start] = train(cfg)[1]
    for iteration in range(2):
        assert runs[2].losses[iteration] == runs[4].losses[iteration]
    # The same images and the same weights: only the rows' weights differ.
    assert runs[2].losses[2]["loss_cls"] != runs[4].losses[2]["loss_cls"]
    assert runs[2].losses[2]["loss_mask"] == runs[4].losses[2]["loss_mask"]
    assert runs[2].lr == runs[4].lr


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_resume_equals_uninterrupted(tiny_cfg, interrupt_and_compare, stop_after):
    """2 is the last iteration before the phase; its state is not in the model's checkpoint."""
    resumed, tail, whole, _ = interrupt_and_compare(tiny_cfg, *ALONE, "DRW.START_ITER", 3, stop_after=stop_after)
    assert sorted(tail.losses) == list(range(stop_after + 1, 5))
    a, b = resumed.detector.state_dict(), whole.detector.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in b)
    assert active(resumed) == [True]


def test_with_stage_two(tiny_cfg, train):
    """Begun in stage 1 it goes on in stage 2, whose learning rate is its own."""
    cfg = tiny_cfg(*LDAM, "DECOUPLE.LOSS", "LDAM", "DECOUPLE.BASE_LR", 0.5, "SOLVER.CHECKPOINT_PERIOD", 1)
    first, record = train(cfg, stop_after=6)
    assert active(first) == [True] and first.stage == 2
    assert record.lr[6] == pytest.approx(0.5)
    resumed, tail = train(cfg, resume=True)
    assert active(resumed) == [True] and sorted(tail.losses) == [7, 8]


def test_starting_in_stage_two(tiny_cfg, train):
    cfg = tiny_cfg(
        *LDAM, "DECOUPLE.LOSS", "LDAM", "DECOUPLE.BASE_LR", 0.5, "DRW.START_ITER", 7, "SOLVER.CHECKPOINT_PERIOD", 1
    )
    first, record = train(cfg, stop_after=7)
    assert [record.lr[i] for i in (6, 7)] == pytest.approx([0.5, 0.05])
    resumed, tail = train(cfg, resume=True)
    assert tail.lr[8] == pytest.approx(0.005) and active(resumed) == [True]


def test_a_pretrained_backbone_need_not_fit_whole(tiny_cfg):
    assert not LongTailTrainer(tiny_cfg(*ALONE, "DRW.START_ITER", 0)).checkpointer.strict


def test_contradictions_are_named(tiny_cfg, train):
    with pytest.raises(ValueError, match="MODEL.LONG_TAIL.LOSS is 'Softmax'.*losses that can: LDAM"):
        LongTailTrainer(tiny_cfg("DRW.ENABLED", True, "DECOUPLE.ENABLED", False))
    with pytest.raises(ValueError, match="DECOUPLE.LOSS is 'BalancedSoftmax'"):
        LongTailTrainer(tiny_cfg("DRW.ENABLED", True, "DRW.START_ITER", 6))
    with pytest.raises(ValueError, match="DRW.START_ITER is 9, but the run has 5"):
        LongTailTrainer(tiny_cfg(*ALONE, "DRW.START_ITER", 9))
    with pytest.raises(ValueError, match="LR_FACTOR"):
        LongTailTrainer(tiny_cfg(*ALONE, "DRW.LR_FACTOR", 0.0))
    train(tiny_cfg(*ALONE, "SOLVER.CHECKPOINT_PERIOD", 1, "DRW.START_ITER", 2), stop_after=3)
    with pytest.raises(ValueError, match=r"(?s)phases \['DRWPhase'\].*puts it in \[\].*config.yaml"):
        train(tiny_cfg(*ALONE, "DRW.START_ITER", 4), resume=True)


@pytest.mark.parametrize(
    "start, factor, steps, scheduler, told",
    [
        (2, 1.0, (3,), "WarmupMultiStepLR", True),
        (2, 1.0, (), "WarmupMultiStepLR", True),
        (3, 1.0, (3,), "WarmupMultiStepLR", False),
        (2, 0.1, (3,), "WarmupMultiStepLR", False),
        (2, 1.0, (3,), "WarmupCosineLR", False),
    ],
)
def test_a_start_at_the_full_rate_is_named(tiny_cfg, caplog, start, factor, steps, scheduler, told):
    """glyph_ldam_drw diverged when the schedule was made longer and its phase still began at 800."""
    LongTailTrainer(
        tiny_cfg(*ALONE, "DRW.START_ITER", start, "DRW.LR_FACTOR", factor, "SOLVER.STEPS", steps,
                 "SOLVER.LR_SCHEDULER_NAME", scheduler)
    )  # fmt: skip
    assert (f"DRW starts at iteration {start}, at the full learning rate" in caplog.text) == told
