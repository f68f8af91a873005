"""Two stages in one run: what changes at the border, and that a run resumes anywhere to the same losses."""

import json
from pathlib import Path

import pytest
import torch
from detectron2.engine import DefaultTrainer, HookBase

from lt_det.data import ClassStatistics
from lt_det.engine import LongTailTrainer
from lt_det.losses import LOSS_REGISTRY
from lt_det.modeling import box_predictors


def weights(trainer):
    return {k: v.clone() for k, v in trainer.detector.state_dict().items()}


def test_stage_two_trains_the_classifier_alone(tiny_cfg, train):
    cfg = tiny_cfg()
    trainer, record = train(cfg)
    stage1 = torch.load(f"{cfg.OUTPUT_DIR}/model_stage1.pth")["model"]
    changed = {k for k, v in trainer.detector.state_dict().items() if not torch.equal(v, stage1[k])}
    assert changed == {"roi_heads.box_predictor.cls_score.weight", "roi_heads.box_predictor.cls_score.bias"}
    assert isinstance(box_predictors(trainer.detector)[0].loss, LOSS_REGISTRY.get("BalancedSoftmax"))
    assert sorted(record.losses) == list(range(9))
    assert {"loss_mask", "loss_rpn_cls", "loss_cls"} <= set(record.losses[4])
    # Detectron2 writes a single loss as the total alone; what stage 1 logged no longer stands in the log.
    assert set(record.losses[5]) == {"total_loss"}
    assert not {"loss_mask", "loss_cls"} & set(trainer.storage.histories())


def test_each_stage_has_its_schedule(tiny_cfg, train):
    _, record = train(tiny_cfg("SOLVER.BASE_LR", 0.01, "DECOUPLE.BASE_LR", 0.5))
    factor = 0.001  # SOLVER.WARMUP_FACTOR
    warm = [factor + (1 - factor) * i / 2 for i in range(2)]
    expected = [0.01 * f for f in (*warm, 1, 1, 0.1)] + [0.5 * f for f in (factor, 1, 1, 0.1)]
    assert [record.lr[i] for i in range(9)] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("stop_after", [0, 2, 4, 5, 7])
@pytest.mark.parametrize("seed", [3, -1])
def test_resume_equals_uninterrupted(tiny_cfg, train, tmp_path, stop_after, seed):
    """Killed after an iteration of either stage (4 is the last of stage 1), it goes on to the same numbers."""
    if seed == -1 and stop_after not in (2, 5):
        pytest.skip("a random seed is tried once a stage")
    options = ("SOLVER.CHECKPOINT_PERIOD", 1, "SEED", seed)
    cfg = tiny_cfg(*options)
    train(cfg, stop_after=stop_after)
    resumed, tail = train(cfg, resume=True)
    assert min(tail.losses) == stop_after + 1

    if seed == -1:
        # The seed that was drawn is in the checkpoint.
        options = ("SOLVER.CHECKPOINT_PERIOD", 1, "SEED", resumed.seed)
    whole, record = train(tiny_cfg(*options, "OUTPUT_DIR", str(tmp_path / "whole")))
    for iteration in tail.losses:
        assert tail.losses[iteration] == record.losses[iteration], iteration
        assert tail.lr[iteration] == record.lr[iteration]
    a, b = weights(resumed), weights(whole)
    assert all(torch.equal(a[k], b[k]) for k in b)


def test_finished_model_goes_straight_to_stage_two(tiny_cfg, train, tmp_path):
    first, _ = train(tiny_cfg("DECOUPLE.ENABLED", False))
    finished = weights(first)
    cfg = tiny_cfg(
        "DECOUPLE.START_ITER",
        0,
        "MODEL.WEIGHTS",
        f"{first.cfg.OUTPUT_DIR}/model_final.pth",
        "OUTPUT_DIR",
        str(tmp_path / "b"),
    )
    second, record = train(cfg)
    assert sorted(record.losses) == list(range(4))
    after = weights(second)
    assert [k for k in after if not torch.equal(after[k], finished[k])] == [k for k in after if "cls_score" in k]


def test_loce_resumes_with_its_memory(tiny_cfg, train, tmp_path):
    """Killed in stage 2, LOCE goes on drawing from the features that its memory held."""
    options = ("DECOUPLE.LOSS", "LOCE", "MODEL.LONG_TAIL.LOCE.MEMORY_SIZE", 2, "SOLVER.CHECKPOINT_PERIOD", 1, "SEED", 3)
    train(tiny_cfg(*options), stop_after=6)
    resumed, tail = train(tiny_cfg(*options), resume=True)
    whole, record = train(tiny_cfg(*options, "OUTPUT_DIR", str(tmp_path / "whole")))
    assert tail.losses == {i: record.losses[i] for i in (7, 8)}
    memories = [box_predictors(trainer.detector)[0].loss.memory for trainer in (resumed, whole)]
    assert memories[0].filled.sum() > 0 and torch.equal(memories[0].keys, memories[1].keys)


@pytest.mark.parametrize("cached", [False, True], ids=["images", "cache"])
def test_loce_looks_at_the_training_set_first(tiny_cfg, train, cached):
    """Before stage 2's first step its memory has RoIs of every class with images, and each of them a score."""
    options = ["DECOUPLE.LOSS", "LOCE", "MODEL.LONG_TAIL.LOCE.MEMORY_SIZE", 2, "DECOUPLE.FEATURE_CACHE.ENABLED", cached]
    options += ["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 256]  # room for every ground-truth box
    trainer = LongTailTrainer(tiny_cfg(*options))
    seen = {}

    class BeforeStageTwo(HookBase):
        def before_step(self):
            if self.trainer.iter == 5:
                loss = box_predictors(self.trainer.detector)[0].loss
                seen.update(filled=loss.memory.filled.clone(), scores=loss.mean_score.clone())

    trainer.resume_or_load(resume=False)
    trainer.register_hooks([BeforeStageTwo()])
    trainer.train()
    counts = trainer.plan.statistics().instance_count
    has_images = torch.as_tensor(counts > 0)
    assert torch.equal(seen["filled"] > 0, has_images)
    assert torch.equal(seen["scores"] != 0.01, has_images)


def test_reinit_and_another_family(tiny_cfg, train):
    """Classifier re-training can exchange softmax for sigmoids, and resumes."""
    cfg = tiny_cfg(
        "DECOUPLE.LOSS", "BalancedSigmoid", "DECOUPLE.REINIT_CLASSIFIER", True, "SOLVER.CHECKPOINT_PERIOD", 1
    )
    trainer, _ = train(cfg, stop_after=6)
    assert trainer.detector.roi_heads.box_predictor.cls_score.out_features == 4
    resumed, tail = train(cfg, resume=True)
    assert sorted(tail.losses) == [7, 8]
    model = LongTailTrainer.build_trained_model(cfg)
    model.load_state_dict(resumed.detector.state_dict())


@pytest.mark.parametrize("clip_type", ["value", "norm"])
def test_gradient_clipping_in_both_stages(tiny_cfg, train, clip_type):
    """Detectron2's clipping fails on frozen parameters; stage 2's optimizer has none."""
    clip = ("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", clip_type)
    trainer, record = train(tiny_cfg(*clip, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.001))
    assert len(record.losses) == 9
    bound = 0.001 * (1 + 1e-5)
    for parameter in (p for group in trainer.optimizer.param_groups for p in group["params"]):
        assert (parameter.grad.abs().max() if clip_type == "value" else parameter.grad.norm()) <= bound
    assert sum(len(g["params"]) for g in trainer.optimizer.param_groups) == 2


def test_samplers_and_prior_of_stage_two(tiny_cfg, train):
    trainer, _ = train(tiny_cfg("DECOUPLE.SAMPLER_TRAIN", "ClassBalancedSampler", "DECOUPLE.PRIOR", "sampled"))
    assert type(trainer.train_loader.sampler).__name__ == "ClassBalancedSampler"
    loss = box_predictors(trainer.detector)[0].loss
    assert loss.prior == "sampled"
    # Class-balanced sampling leaves less of a tail than the image counts have.
    image_loss = LOSS_REGISTRY.get("BalancedSoftmax")(4, statistics=loss.class_statistics())
    image_loss.prepare()
    assert loss.log_prior.max() - loss.log_prior.min() < image_loss.log_prior.max() - image_loss.log_prior.min()


def test_evaluates_after_each_stage(tiny_cfg, train, monkeypatch):
    """Once, also where the period falls on the end of a stage."""
    calls = []
    test = LongTailTrainer.test.__func__
    monkeypatch.setattr(LongTailTrainer, "test", classmethod(lambda *args: calls.append(args) or test(*args)))
    cfg = tiny_cfg("DATASETS.TEST", ("tiny_val",), "TEST.EVAL_PERIOD", 5)
    trainer, _ = train(cfg)
    assert len(calls) == 2
    for folder in ("inference_stage1", "inference"):
        metrics = json.load(open(f"{cfg.OUTPUT_DIR}/{folder}/metrics.json"))
        assert {"AP", "AP50", "AP75", "APr", "APc", "APf"} <= set(metrics["bbox"]) & set(metrics["segm"])
    assert trainer._last_eval_results["bbox"].keys() >= {"AP", "APr"}


def test_evaluation_keys(tiny_cfg):
    """Each TEST key of lt_det changes what an evaluation gives; masks pasted by the evaluator are Detectron2's."""
    plain = tiny_cfg("DATASETS.TEST", ("tiny_val",))
    cfg = tiny_cfg(
        "DATASETS.TEST", ("tiny_val",), "TEST.AP_FIXED", True, "TEST.BOUNDARY_AP", True, "TEST.WRITE_SUBMISSION", True,
        "TEST.PLOTS", True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LongTailTrainer.build_trained_model(cfg)
    results = LongTailTrainer.test(cfg, model)
    assert {"APr-fixed", "AP-pool"} <= set(results["segm"]) and "boundary" in results
    files = {path.name for path in Path(cfg.OUTPUT_DIR, "inference").rglob("*")}
    assert any(name.endswith(".png") for name in files)
    assert any("results" in name and name.endswith(".json") for name in files)

    pasted = DefaultTrainer.test(plain, model, [LongTailTrainer.build_evaluator(plain, "tiny_val", "pasted")])
    assert set(pasted) == {"bbox", "segm"} and "AP-pool" not in pasted["segm"]
    for task in pasted:
        for name, value in pasted[task].items():
            assert value == pytest.approx(results[task][name], nan_ok=True)
    assert not list(Path(plain.OUTPUT_DIR, "pasted").rglob("*.png"))


def test_detections_that_count(tiny_cfg, caplog):
    """AP of the best 3 of an image's 10 detections is AP of a model that gives 3; AP-fixed and AP-pool see all 10."""
    test_set = "DATASETS.TEST", ("tiny_val",), "TEST.AP_FIXED", True, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0
    seen, told = [], []
    for given, counted in ((10, 3), (3, 0), (10, 0)):
        cfg = tiny_cfg(*test_set, "TEST.DETECTIONS_PER_IMAGE", given, "TEST.MAX_DETS", counted)
        torch.manual_seed(0)
        caplog.clear()
        seen.append(LongTailTrainer.test(cfg, LongTailTrainer.build_trained_model(cfg))["bbox"])
        told.append("AP-fixed equals AP" in caplog.text)
    both, few, many = seen
    assert both["AP"] == few["AP"] != many["AP"] and "AR@3" in both
    assert both["AP-fixed"] == many["AP-fixed"] != few["AP-fixed"] == few["AP"]
    assert both["AP-pool"] == many["AP-pool"] != few["AP-pool"]
    assert told == [False, True, True]
    with pytest.raises(ValueError, match="TEST.MAX_DETS is -1"):
        tiny_cfg("TEST.MAX_DETS", -1)


# ---- errors


def test_contradictions_are_named(tiny_cfg):
    with pytest.raises(ValueError, match="set MODEL.WEIGHTS"):
        LongTailTrainer(tiny_cfg("DECOUPLE.START_ITER", 0))
    with pytest.raises(ValueError, match="DECOUPLE.REINIT_CLASSIFIER"):
        LongTailTrainer(tiny_cfg("DECOUPLE.LOSS", "BalancedSigmoid"))
    with pytest.raises(ValueError, match="MODEL.ROI_HEADS.NAME to LongTailROIHeads"):
        LongTailTrainer(tiny_cfg("MODEL.ROI_HEADS.NAME", "StandardROIHeads"))
    with pytest.raises(ValueError, match="DECOUPLE.LOSS is 'Balanced'"):
        LongTailTrainer(tiny_cfg("DECOUPLE.LOSS", "Balanced"))


def test_class_without_images_is_named_before_stage_one(tiny_cfg, tmp_path):
    path = tmp_path / "counts.json"
    counts = [3, 0, 2, 5]
    ClassStatistics(image_count=counts, instance_count=counts, num_images=9, names=list("abcd")).to_json(path)
    with pytest.raises(ValueError, match=r"BalancedSoftmax: classes without training data .*: 1 .b.*MIN_COUNT"):
        LongTailTrainer(tiny_cfg("MODEL.LONG_TAIL.STATISTICS", str(path)))


def test_wrong_class_count_is_named(tiny_cfg, train):
    with pytest.raises(ValueError, match="MODEL.ROI_HEADS.NUM_CLASSES"):
        train(tiny_cfg("MODEL.ROI_HEADS.NUM_CLASSES", 7))


def test_resume_with_another_schedule_is_refused(tiny_cfg, train):
    train(tiny_cfg("SOLVER.CHECKPOINT_PERIOD", 1), stop_after=6)
    with pytest.raises(ValueError, match="(?s)stage 2.*stage 1.*config.yaml"):
        train(tiny_cfg("SOLVER.MAX_ITER", 50), resume=True)
