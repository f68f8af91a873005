"""Every glyph_<method>.yaml trains and evaluates, and there is one for every loss, here and for LVIS."""

import json
import math
from pathlib import Path

import pytest
from detectron2.engine import HookBase

from lt_det.engine import LongTailTrainer, finish_config, get_lt_det_cfg
from lt_det.losses import LOSS_REGISTRY
from lt_det.modeling import CALIBRATOR_REGISTRY, box_predictors

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
METHODS = sorted(path.stem for path in CONFIGS.glob("glyph_*.yaml"))


def load(stem):
    cfg = get_lt_det_cfg()
    cfg.merge_from_file(str(CONFIGS / f"{stem}.yaml"))
    return cfg


@pytest.mark.parametrize("prefix", ["glyph", "lvis"])
def test_every_method_has_a_config(prefix):
    cfgs = [load(path.stem) for path in CONFIGS.glob(f"{prefix}_*.yaml")]
    used = {c.DECOUPLE.LOSS if c.DECOUPLE.ENABLED else c.MODEL.LONG_TAIL.LOSS for c in cfgs}
    assert used >= {name for name, _ in LOSS_REGISTRY}
    assert {c.MODEL.LONG_TAIL.CALIBRATOR.NAME for c in cfgs} == {"", *(name for name, _ in CALIBRATOR_REGISTRY)}


class Losses(HookBase):
    """The classification part of each iteration's loss, all parts of it together."""

    def __init__(self):
        self.values, self.total = [], []

    def after_step(self):
        latest = self.trainer.storage.latest()
        now = {k: v for k, (v, i) in latest.items() if i == self.trainer.iter}
        self.total.append(now["total_loss"])
        # Stage 2 has no other part, and Detectron2 then writes the total alone.
        parts = [v for k, v in now.items() if k.startswith("loss_cls")]
        self.values.append(sum(parts) if parts else now["total_loss"])


@pytest.mark.parametrize("stem", METHODS)
def test_trains_and_evaluates(stem, tiny_options, tmp_path):
    """20 iterations (12 + 8 in two stages) on the tiny data set, far from LVIS's statistics: no metric is asked for."""
    cfg = load(stem)
    two_stages, own_teacher = cfg.DECOUPLE.ENABLED, cfg.TEACHER.MAX_ITER > 0
    start = int(0.8 * 20) if cfg.DRW.ENABLED else -1
    cfg.merge_from_list(tiny_options)
    cfg.merge_from_list([
        "DATASETS.TEST", ("tiny_val",), "SOLVER.MAX_ITER", 12 if two_stages or own_teacher else 20,
        "TEACHER.MAX_ITER", 8 if own_teacher else 0, "TEACHER.EVAL", False,
        "MODEL.LONG_TAIL.GML.QUEUE_SIZE", 64, "SOLVER.STEPS", (),
        "SOLVER.WARMUP_ITERS", 5, "SOLVER.BASE_LR", 0.004, "DECOUPLE.BASE_LR", 0.004,
        "DECOUPLE.MAX_ITER", 8, "DECOUPLE.STEPS", (), "DECOUPLE.EVAL_STAGE1", False,
        "DRW.START_ITER", start, "MODEL.LONG_TAIL.FEDERATED.NUM_SAMPLED", 3, "TEST.EVAL_PERIOD", 0, "SEED", 1,
    ])  # fmt: skip
    trainer = LongTailTrainer(finish_config(cfg))
    trainer.resume_or_load(resume=False)
    record = Losses()
    trainer.register_hooks([record])
    trainer.train()

    assert len(record.values) == 20 and all(math.isfinite(v) and v >= 0 for v in record.total)
    assert any(v > 0 for v in record.values)
    border = 8 if own_teacher else 12 if two_stages else 20
    stages = [values for values in (record.values[:border], record.values[border:]) if values]
    for values in stages:
        assert len(set(values)) > 1
    # An untrained detector soon learns that most RoIs are background.
    first = stages[0]
    assert min(first[-5:]) < max(first[:5])
    for predictor in box_predictors(trainer.detector):
        assert type(predictor.loss).__name__ == (cfg.DECOUPLE.LOSS if two_stages else cfg.MODEL.LONG_TAIL.LOSS)
        assert getattr(predictor.loss, "drw_active", False) == cfg.DRW.ENABLED
    metrics = json.loads((tmp_path / "out/inference/metrics.json").read_text())
    for task in ("bbox", "segm"):
        assert {"AP", "AP50", "AP75", "APr", "APc", "APf"} <= set(metrics[task])
        assert metrics[task]["AP"] is not None and math.isfinite(metrics[task]["AP"])
