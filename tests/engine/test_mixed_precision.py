"""SOLVER.AMP on the CPU: bfloat16 autocast in the forward pass of every stage. (float16 needs a GPU: not run here.)"""

import numpy as np
import pytest
import torch

from lt_det.engine import LongTailTrainer, finish_config, get_lt_det_cfg
from lt_det.engine.steps import BFloat16Trainer

AMP = ("MODEL.DEVICE", "cpu", "SOLVER.AMP.ENABLED", True)
META = ("META.NAME", "MetaReweighter", "META.LR", 0.1)
CACHE = ("DECOUPLE.FEATURE_CACHE.ENABLED", True)


def dtypes_of(module):
    """Output dtypes of a module in training and in evaluation, filled as it runs."""
    seen = {True: set(), False: set()}
    module.register_forward_hook(lambda module, inputs, output: seen[module.training].add(output.dtype))
    return seen


@pytest.mark.parametrize("options", [(), META, CACHE], ids=["plain", "meta", "cache"])
def test_every_stage_computes_in_bfloat16(tiny_cfg, interrupt_and_compare, options):
    """... and resumes to the same numbers, bit for bit."""
    *_, whole, record = interrupt_and_compare(tiny_cfg, *AMP, *options, stop_after=6)
    assert isinstance(whole._trainer, BFloat16Trainer)
    assert {p.dtype for p in whole.detector.parameters()} == {torch.float32}
    assert all(np.isfinite(list(losses.values())).all() for losses in record.losses.values())


def test_forward_in_bfloat16_evaluation_in_float32(tiny_cfg):
    trainer = LongTailTrainer(tiny_cfg(*AMP, "DATASETS.TEST", "('tiny_val',)"))
    seen = dtypes_of(trainer.detector.roi_heads.box_predictor.cls_score)
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert seen == {True: {torch.bfloat16}, False: {torch.float32}}


def test_gml(tiny_options, repo_dir, train):
    cfg = get_lt_det_cfg()
    cfg.merge_from_file(str(repo_dir / "configs/glyph_gml.yaml"))
    small = ["MODEL.LONG_TAIL.GML.QUEUE_SIZE", 64, "MODEL.LONG_TAIL.GML.PROJECTION_DIM", 8]
    cfg.merge_from_list(["TEACHER.MAX_ITER", 0, *tiny_options, *small, *AMP])
    trainer, record = train(finish_config(cfg))
    assert all(np.isfinite(list(losses.values())).all() for losses in record.losses.values())
    assert {"loss_cls", "loss_gml"} <= set(record.losses[0])
    assert trainer.mutual_information.branches[0].queues.keys.dtype == torch.float32
