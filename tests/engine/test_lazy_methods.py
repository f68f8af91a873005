"""BALMS and GML from LazyConfig: the losses of the same run from yaml, bit for bit, and resumption."""

from functools import partial

import detectron2.data.transforms as T
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import MultiStepParamScheduler
from omegaconf import OmegaConf
from recorded_run import run_trainer

from lt_det.data import TrainMapper, build_train_loader, open_datasets
from lt_det.engine import LongTailTrainer, finish_config, get_lt_det_cfg
from lt_det.engine.lazy import LazyTrainer
from lt_det.gml import FollowingTeacher, FrozenTeacher, TrainedTeacher
from lt_det.losses import BalancedSoftmax, Softmax
from lt_det.meta import MetaReweighter, MetaStep, RoISampler
from lt_det.modeling import box_predictors, dataset_statistics

# Two iterations of the detector, four of its classifier.
SHORT = ("INPUT.MASK_FORMAT", "bitmask", "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", ())
META = (*SHORT, "META.LR", 0.1, "META.PERIOD", 2)
SAMPLER = ("META.NAME", "MetaSampler", "DECOUPLE.SAMPLER_TRAIN", "MetaSampler", *META)
KEYS = "MODEL.LONG_TAIL.GML."
GML = (*SHORT, KEYS + "QUEUE_SIZE", 32, KEYS + "QUEUE_BASE", 2, KEYS + "PROJECTION_DIM", 8, "TEACHER.MAX_ITER", 0,
       "SOLVER.MAX_ITER", 3, "SOLVER.STEPS", (2,), "DECOUPLE.ENABLED", False)  # fmt: skip


def schedule(steps, length, warmup):
    return L(WarmupParamScheduler)(
        scheduler=L(MultiStepParamScheduler)(values=[0.1**k for k in range(len(steps) + 1)], milestones=list(steps),
                                             num_updates=length),
        warmup_factor=0.001, warmup_length=min(warmup / length, 1.0), warmup_method="linear",
    )  # fmt: skip


def lazy(cfg, output_dir, **train):
    """A LazyConfig of the same run as a yaml config's: its model is built by the same call, all else is stated anew."""
    solver = cfg.SOLVER
    out = OmegaConf.create(flags={"allow_objects": True})
    out.model = L(partial(LongTailTrainer.build_model, cfg))()
    out.optimizer = L(torch.optim.SGD)(
        params=L(get_default_optimizer_params)(
            base_lr=solver.BASE_LR, weight_decay_norm=solver.WEIGHT_DECAY_NORM, bias_lr_factor=solver.BIAS_LR_FACTOR,
        ),
        lr=solver.BASE_LR, momentum=solver.MOMENTUM, weight_decay=solver.WEIGHT_DECAY, foreach=True,
    )  # fmt: skip
    out.lr_multiplier = schedule(solver.STEPS, solver.MAX_ITER, solver.WARMUP_ITERS)
    loader = L(build_train_loader)(
        dataset_dicts=L(open_datasets)(names="tiny_train"),
        mapper=L(TrainMapper)(
            is_train=True,
            augmentations=[
                L(T.ResizeShortestEdge)(short_edge_length=(56, 64, 72), max_size=80, sample_style="choice")
            ],
            image_format=cfg.INPUT.FORMAT, use_instance_mask=True, instance_mask_format=cfg.INPUT.MASK_FORMAT,
        ),
        sampler=cfg.DATALOADER.SAMPLER_TRAIN,
        sampler_options=dict(repeat_threshold=cfg.DATALOADER.REPEAT_THRESHOLD),
        total_batch_size=solver.IMS_PER_BATCH, num_workers=cfg.DATALOADER.NUM_WORKERS, seed="${train.seed}",
    )  # fmt: skip
    out.dataloader = dict(train=loader)
    out.train = dict(
        seed=cfg.SEED, output_dir=str(output_dir), init_checkpoint="", device=cfg.MODEL.DEVICE,
        amp=dict(enabled=False), ddp=dict(broadcast_buffers=False), checkpointer=dict(period=1),
        eval_period=0, log_period=20, **train,
    )  # fmt: skip
    return out


def state(trainer):
    module = trainer.module
    more = module.branches.state_dict() if trainer.mutual_information else {"rates": trainer.meta.learner.logits}
    return {**trainer.detector.state_dict(), **more}


def compare(cfg, build_lazy, stop_after):
    """The lazy run dies after an iteration and is resumed; both have the losses of the yaml run, and its weights."""
    whole, expected = run_trainer(lambda: LongTailTrainer(cfg))
    _, head = run_trainer(lambda: LazyTrainer(build_lazy()), stop_after=stop_after)
    resumed, tail = run_trainer(lambda: LazyTrainer(build_lazy()), resume=True)
    assert {**head.losses, **tail.losses} == expected.losses
    assert {**head.lr, **tail.lr} == expected.lr and min(tail.lr) == stop_after + 1
    mine, theirs = state(resumed), state(whole)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in theirs)
    return resumed


@pytest.mark.parametrize(
    "options, learner, cached, stop_after",
    [
        (("META.NAME", "MetaReweighter", *META), MetaReweighter, False, 3),
        (("META.NAME", "MetaSampler", *META), RoISampler, False, 1),
        (SAMPLER, RoISampler, False, 2),
        (SAMPLER, RoISampler, True, 3),
    ],
    ids=["reweighter", "roi_sampler", "image_sampler", "cached"],
)
def test_balms(tiny_cfg, tmp_path, options, learner, cached, stop_after):
    cache = {"ENABLED": cached, "DIR": str(tmp_path / "yaml"), "ROIS_PER_IMAGE": 8}
    cfg = tiny_cfg(*options, *(x for key, v in cache.items() for x in (f"DECOUPLE.FEATURE_CACHE.{key}", v)))
    node, images = cfg.DECOUPLE, "MetaSampler" in cfg.DECOUPLE.SAMPLER_TRAIN

    def build():
        decouple = dict(
            start_iter=2,
            loss=L(BalancedSoftmax)(num_classes=4, statistics=L(dataset_statistics)(name="tiny_train")),
            lr_multiplier=schedule(node.STEPS, node.MAX_ITER, node.WARMUP_ITERS),
            meta=L(MetaStep)(learner=L(learner)(num_classes=4), meta_loss=L(Softmax)(num_classes=4), lr=0.1, period=2),
            meta_dataloader=dict(sampler="ClassBalancedSampler"),
            evaluate=False,
        )
        if images:
            decouple["sampler"] = "MetaSampler"
        if cached:
            decouple["feature_cache"] = dict(folder=str(tmp_path / "lazy"), rois_per_image=8)
        out = lazy(cfg, tmp_path / "lazy_run", max_iter=6, decouple=decouple)
        decouple = out.train.decouple
        decouple.optimizer = OmegaConf.create(out.optimizer, flags={"allow_objects": True})
        decouple.optimizer.lr = decouple.optimizer.params.base_lr = node.BASE_LR
        return out

    trainer = compare(cfg, build, stop_after)
    # The few images of these runs, and the cache's few RoIs, may teach no rate; tests/engine/test_meta_training.py has
    # longer ones.
    assert images or (trainer.meta.learner.rates != 0.5).any()
    assert (tmp_path / "lazy_run/meta_rates.csv").is_file()
    assert (type(trainer.train_loader.sampler).__name__ == "MetaSampler") == images


@pytest.fixture
def gml_cfg(tiny_options, repo_dir):
    def build(*changes):
        cfg = get_lt_det_cfg()
        cfg.merge_from_file(str(repo_dir / "configs/glyph_gml.yaml"))
        cfg.merge_from_list([*tiny_options, *GML, *changes])
        return finish_config(cfg)

    return build


@pytest.mark.parametrize("kind", ["following", "frozen", "trained"])
def test_gml(gml_cfg, tmp_path, kind):
    weights, length = str(tmp_path / "teacher.pth"), 3
    if kind == "following":
        changes, teacher = ("TEACHER.MOMENTUM", 0.5), lambda cfg: L(FollowingTeacher)(momentum=0.5)
    elif kind == "frozen":
        torch.manual_seed(7)
        torch.save({"model": LongTailTrainer.build_model(gml_cfg()).state_dict()}, weights)
        changes = ("TEACHER.WEIGHTS", weights, KEYS + "ALPHA", 0.5)
        teacher = lambda cfg: L(FrozenTeacher)(model=L(partial(LongTailTrainer.build_model, cfg))(), weights=weights)
    else:
        changes, length = ("TEACHER.MAX_ITER", 3), 6
        teacher = lambda cfg: L(TrainedTeacher)(max_iter=3)
    cfg = gml_cfg(*changes)
    trainer = compare(cfg, lambda: lazy(cfg, tmp_path / "lazy", max_iter=length, teacher=teacher(cfg)), length - 2)
    assert (trainer.mutual_information.branches[0].queues.filled > 0).all()
    assert (tmp_path / "lazy/model_teacher.pth").is_file() == (kind == "trained")


def test_nodes_that_do_not_fit(tiny_cfg, gml_cfg, tmp_path):
    loss = L(Softmax)(num_classes=4)
    plain, gml = tiny_cfg(), gml_cfg()
    for cfg, train, message in (
        (plain, dict(teacher=L(FollowingTeacher)()), "loss is Softmax, which learns from no teacher"),
        (gml, dict(teacher=L(TrainedTeacher)(max_iter=5)), "train.teacher.max_iter is 5"),
        (gml, dict(teacher=L(FollowingTeacher)(momentum=2)), r"\[0, 1\], got 2"),
        (gml, dict(teacher=L(Softmax)(num_classes=4)), "must be L.FollowingTeacher"),
        (plain, dict(decouple=dict(start_iter=2, loss=loss, sampler="MetaSampler")), "set train.decouple.meta"),
        (plain, dict(decouple=dict(start_iter=2, loss=loss, feature_cache=dict(dir="x"))), "unknown key dir"),
    ):
        with pytest.raises(ValueError, match=message):
            LazyTrainer(lazy(cfg, tmp_path / "out", max_iter=5, **train))
    assert box_predictors(LazyTrainer(lazy(plain, tmp_path / "out", max_iter=5)).detector)
