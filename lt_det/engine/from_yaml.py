"""The plan of a yaml config, and the trainer by its name."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, hooks
from detectron2.evaluation import verify_results
from detectron2.modeling import GeneralizedRCNN
from detectron2.solver.build import get_default_optimizer_params
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn

from lt_det.data import (
    DatasetRecords,
    TrainLoader,
    build_train_loader_from_config,
    build_train_mapper,
    load_train_dicts,
    training_frequency_groups,
)
from lt_det.evaluation import DeferredMaskPasting, LongTailLVISEvaluator
from lt_det.gml import (
    MutualInformation,
    MutualInformationDetector,
    check_teacher_config,
    teacher_from_config,
)
from lt_det.losses import LOSS_REGISTRY
from lt_det.meta import MetaStep, build_meta_step, check_meta_config, meta_loader_config
from lt_det.modeling import (
    LongTailRCNNWithTTA,
    box_predictors,
    build_loss,
    set_stage2_loss,
    statistics_from_config,
)
from lt_det.processes import end_with_parent

from .clipping import clip_gradients
from .feature_cache import cached_records, open_feature_cache
from .hooks_groups import GroupScalars
from .hooks_selection import BestCheckpoint, EarlyStopping, ValidationLoss, build_validation_loader
from .plan import Change, Hooks, Plan, Run, Stage, deferred_reweighting, stream_seed
from .run_record import RunRecord
from .run_report import write_page
from .stages import build_stage, load_weights
from .trainer import Trainer

__all__ = ["LongTailTrainer", "feature_cache_options", "images_from_config", "plan_from_yaml"]

logger = logging.getLogger(__name__)


class LongTailTrainer(Trainer, DefaultTrainer):
    """``DefaultTrainer`` for long-tailed training: the :class:`~lt_det.engine.trainer.Trainer` of a yaml config.

    One run goes through its stages: with ``DECOUPLE.ENABLED``, stage 1 trains the detector and stage 2 its classifier
    alone. It resumes from any checkpoint, in any stage, to the losses of an uninterrupted run.
    """

    def __init__(self, cfg: CfgNode):
        """
        Args:
            cfg: a Detectron2 config with lt_det's keys.

        Raises:
            ValueError: for keys that contradict each other or the data.
        """
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        self.cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        Trainer.__init__(self, plan_from_yaml(self.cfg, type(self)))
        if cfg.DECOUPLE.ENABLED:
            build_loss(self.cfg, stage=2).prepare()  # a class that it has no count of ends the run now, not in stage 2

    def train(self, start_iter: int | None = None, max_iter: int | None = None) -> OrderedDict | None:
        """Run all stages. Returns the results of the last evaluation on the main process."""
        results = super().train(start_iter, max_iter)
        if len(self.cfg.TEST.EXPECTED_RESULTS) and comm.is_main_process():
            verify_results(self.cfg, results)
        return results

    # ---- Detectron2's interface, which a class of yours may override

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """The detector as stage 1 trains it, after a check that stage 2, if any, can take it over."""
        model = super().build_model(cfg)
        if cfg.DECOUPLE.ENABLED and not cfg.DECOUPLE.REINIT_CLASSIFIER:
            for predictor in box_predictors(model):
                predictor.check_fit(build_loss(cfg, stage=2))
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Detectron2's SGD over what trains. Its gradient clipping passes over parameters without gradient, and learned
        temperatures do not decay."""
        params = get_default_optimizer_params(
            model,
            base_lr=cfg.SOLVER.BASE_LR,
            weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
            bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
            weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
            overrides={name: {"weight_decay": 0.0} for name in MutualInformation.no_weight_decay},
        )
        optimizer = torch.optim.SGD(
            params,
            lr=cfg.SOLVER.BASE_LR,
            momentum=cfg.SOLVER.MOMENTUM,
            nesterov=cfg.SOLVER.NESTEROV,
            weight_decay=cfg.SOLVER.WEIGHT_DECAY,
            foreach=True,
        )
        if cfg.SOLVER.CLIP_GRADIENTS.ENABLED:
            clip_gradients(optimizer, cfg.SOLVER.CLIP_GRADIENTS)
        return optimizer

    @classmethod
    def build_trained_model(cls, cfg: CfgNode) -> nn.Module:
        """The detector as the last stage leaves it: what an evaluation loads its weights into."""
        model = cls.build_model(cfg)
        if cfg.DECOUPLE.ENABLED:
            set_stage2_loss(cfg, model)
        return model

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        """Detectron2's, whose workers end with this process."""
        loader = super().build_test_loader(cfg, dataset_name)
        loader.worker_init_fn = end_with_parent
        return loader

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, folder: str = "inference") -> LongTailLVISEvaluator:
        """Writes to ``OUTPUT_DIR/<folder>``, with a folder for each data set where there are several."""
        output_dir = os.path.join(cfg.OUTPUT_DIR, folder)
        if len(cfg.DATASETS.TEST) > 1:
            output_dir = os.path.join(output_dir, dataset_name)
        # Named, so that a model that finds nothing yet gets zeros for masks too.
        tasks = ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",)
        return LongTailLVISEvaluator(
            dataset_name,
            tasks=tasks,
            output_dir=output_dir,
            max_dets=cfg.TEST.MAX_DETS or None,
            ap_fixed=cfg.TEST.AP_FIXED,
            boundary=cfg.TEST.BOUNDARY_AP and cfg.MODEL.MASK_ON,
            write_submission=cfg.TEST.WRITE_SUBMISSION or cfg.TEST.REPORT,
            plots=cfg.TEST.PLOTS,
            frequency_groups=training_frequency_groups(cfg, dataset_name),
        )

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators=None) -> OrderedDict:
        """As ``DefaultTrainer.test``. Where lt_det evaluates, masks are pasted by the evaluator, and only those that
        count; with ``TEST.REPORT`` a page is written of each data set."""
        trained = getattr(model, "module", model)
        if cfg.TEST.REPORT and evaluators is None:
            evaluators = [cls.build_evaluator(cfg, name) for name in cfg.DATASETS.TEST]
        ours = evaluators is None or all(isinstance(e, LongTailLVISEvaluator) for e in evaluators)
        if ours and isinstance(trained, GeneralizedRCNN):
            model = DeferredMaskPasting(model)
        results = super().test(cfg, model, evaluators)
        if cfg.TEST.REPORT and comm.is_main_process():
            for evaluator in evaluators or ():
                if isinstance(evaluator, LongTailLVISEvaluator):
                    write_page(evaluator, trained)
        return results

    @classmethod
    def test_with_augmentation(cls, cfg: CfgNode, model: nn.Module) -> OrderedDict:
        """Evaluate a detector with test-time augmentation (``TEST.AUG``): results named ``bbox_TTA`` and so on, as
        Detectron2's ``tools/train_net.py`` has them, files in ``OUTPUT_DIR/inference_TTA``."""
        evaluators = [cls.build_evaluator(cfg, name, "inference_TTA") for name in cfg.DATASETS.TEST]
        results = cls.test(cfg, LongTailRCNNWithTTA(cfg, model), evaluators)
        return OrderedDict((f"{task}_TTA", values) for task, values in results.items())


def plan_from_yaml(cfg: CfgNode, builders: type[LongTailTrainer] = LongTailTrainer) -> Plan:
    """The run that a config describes.

    Args:
        builders: its class methods build model, optimizer, schedule and evaluation.

    Raises:
        ValueError: for keys that contradict each other or the data.
    """
    check_meta_config(cfg)
    check_teacher_config(cfg)
    first_stage = 0 if cfg.TEACHER.MAX_ITER else 1
    last_stage = 2 if cfg.DECOUPLE.ENABLED else 1
    stages = [_YamlStage(cfg, number, builders).build() for number in range(first_stage, last_stage + 1)]
    changes = [_drw(cfg, stages[-1])] if cfg.DRW.ENABLED else []

    def evaluate(model: nn.Module, folder: str) -> Mapping | None:
        evaluators = [builders.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST] if folder else None
        return builders.test(cfg, model, evaluators)

    return Plan(
        model=lambda: builders.build_model(cfg),
        stages=stages,
        changes=changes,
        seed=cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed(),
        output_dir=cfg.OUTPUT_DIR,
        weights=cfg.MODEL.WEIGHTS,
        weights_key="MODEL.WEIGHTS",
        phase_keys="TEACHER, DECOUPLE, DRW and SOLVER.MAX_ITER",
        record=RunRecord.from_config(cfg, stages[-1].end_iter),
        evaluate=evaluate,
        images=partial(images_from_config, cfg),
        amp=cfg.SOLVER.AMP.ENABLED,
        ddp={"broadcast_buffers": False},
        checkpoints={"period": cfg.SOLVER.CHECKPOINT_PERIOD},
        eval_period=cfg.TEST.EVAL_PERIOD,
        statistics=partial(statistics_from_config, cfg),
        hooks=partial(_hooks, cfg),
    )


# ---- stages


def _bounds(cfg: CfgNode, stage: int) -> tuple[int, int]:
    """First iteration of a stage, and the first after it."""
    teacher, detector = cfg.TEACHER.MAX_ITER, cfg.TEACHER.MAX_ITER + cfg.SOLVER.MAX_ITER
    if cfg.DECOUPLE.ENABLED and cfg.DECOUPLE.START_ITER >= 0:
        detector = cfg.DECOUPLE.START_ITER
    if cfg.DECOUPLE.ENABLED and teacher and detector <= teacher:
        raise ValueError(
            f"DECOUPLE.START_ITER is {detector}, but the student begins at TEACHER.MAX_ITER = {teacher}; "
            "set it to -1 or to a later iteration"
        )
    if cfg.DECOUPLE.ENABLED and detector == 0 and not cfg.MODEL.WEIGHTS:
        raise ValueError(
            "DECOUPLE.START_ITER is 0, so stage 2 starts from a finished model: set MODEL.WEIGHTS to its checkpoint"
        )
    return [(0, teacher), (teacher, detector), (detector, detector + cfg.DECOUPLE.MAX_ITER)][stage]


def _stage_config(cfg: CfgNode, stage: int) -> CfgNode:
    """A config whose ``SOLVER`` describes one stage, so that Detectron2's builders make its schedule."""
    cfg = cfg.clone()
    cfg.defrost()
    if stage == 0:
        scale = cfg.TEACHER.MAX_ITER / cfg.SOLVER.MAX_ITER
        cfg.SOLVER.STEPS = tuple(int(step * scale) for step in cfg.SOLVER.STEPS)
        cfg.SOLVER.MAX_ITER = cfg.TEACHER.MAX_ITER
    elif stage == 1:
        if cfg.DECOUPLE.ENABLED and cfg.DECOUPLE.START_ITER > 0:
            cfg.SOLVER.MAX_ITER = cfg.DECOUPLE.START_ITER - cfg.TEACHER.MAX_ITER
    else:
        cfg.SOLVER.MAX_ITER = cfg.DECOUPLE.MAX_ITER
        cfg.SOLVER.BASE_LR = cfg.DECOUPLE.BASE_LR
        cfg.SOLVER.STEPS = cfg.DECOUPLE.STEPS
        cfg.SOLVER.WARMUP_ITERS = cfg.DECOUPLE.WARMUP_ITERS
        cfg.SOLVER.BASE_LR_END = min(cfg.SOLVER.BASE_LR_END, cfg.DECOUPLE.BASE_LR)
        cfg.DATALOADER.SAMPLER_TRAIN = cfg.DECOUPLE.SAMPLER_TRAIN or cfg.DATALOADER.SAMPLER_TRAIN
    late = [step for step in cfg.SOLVER.STEPS if step >= cfg.SOLVER.MAX_ITER]
    if late:
        # Detectron2 stops at a step that falls on the end; found only when the stage begins, hours into the run.
        logger.warning("Stage %d has %d iterations; its steps at %s have no effect", stage, cfg.SOLVER.MAX_ITER, late)
        cfg.SOLVER.STEPS = tuple(step for step in cfg.SOLVER.STEPS if step < cfg.SOLVER.MAX_ITER)
    cfg.freeze()
    return cfg


class _YamlStage:
    """What a yaml config says of one stage, see :func:`~lt_det.engine.stages.build_stage`."""

    def __init__(self, cfg: CfgNode, number: int, builders: type[LongTailTrainer]):
        self._run_cfg, self._number, self._builders = cfg, number, builders
        self._cfg = _stage_config(cfg, number)
        self._images: tuple | None = None
        self.optimizer = partial(builders.build_optimizer, self._cfg)
        self.schedule = partial(builders.build_lr_scheduler, self._cfg)
        self.set_loss = partial(set_stage2_loss, cfg)

    def build(self) -> Stage:
        cfg = self._run_cfg
        return build_stage(
            self._number,
            _bounds(cfg, self._number),
            self,
            teacher=teacher_from_config(cfg),
            output_dir=cfg.OUTPUT_DIR,
            evaluate=(cfg.TEACHER.EVAL, cfg.DECOUPLE.EVAL_STAGE1, True)[self._number],
            meta=bool(cfg.META.NAME),
        )

    def fresh(self) -> nn.Module:
        model = self._builders.build_model(self._run_cfg)
        if self._run_cfg.MODEL.WEIGHTS:
            load_weights(model, self._run_cfg.MODEL.WEIGHTS, "MODEL.WEIGHTS", strict=False)
        return model

    def _open(self, run: Run) -> tuple:
        """The training set, the sizes of its parts, and what maps its records; once for all that wants them."""
        if self._images is None:
            cfg = self._cfg
            records, sizes = load_train_dicts(cfg)
            mapper = build_train_mapper(cfg, records, identify=isinstance(run.module, MutualInformationDetector))
            if self._number == 2 and cfg.DECOUPLE.FEATURE_CACHE.ENABLED:
                mapper = open_feature_cache(run.module, records, mapper, **feature_cache_options(cfg))
                records = cached_records(records)
            self._images = records, sizes, mapper
        return self._images

    def loader(self, run: Run, cfg: CfgNode | None = None, stream: str = "", start: int = 0) -> TrainLoader:
        records, sizes, mapper = self._open(run)
        if self._number < 2:
            self._images = None  # nobody else wants them
        return build_train_loader_from_config(
            cfg or self._cfg, dataset_dicts=records, dataset_sizes=sizes, mapper=mapper,
            seed=stream_seed(run.seed, stream or f"stage {self._number}"), start_iteration=start,
        )  # fmt: skip

    def training_images(self, run: Run) -> tuple:
        records, _, mapper = self._open(run)
        return records, mapper, _loading(self._cfg)

    def meta_batches(self, run: Run, start: int) -> TrainLoader:
        return self.loader(run, meta_loader_config(self._cfg), "meta batches", start)

    def meta_step(self, run: Run, **given) -> MetaStep:
        return build_meta_step(self._cfg, run.detector, **given)


def images_from_config(cfg: CfgNode) -> tuple[DatasetRecords, Callable, dict]:
    """The training images of a config, for a pass over them: ``DATASETS.TRAIN``, ``INPUT``, ``SEED`` and what a train
    loader reads."""
    records, _ = load_train_dicts(cfg)
    return records, build_train_mapper(cfg, records), {**_loading(cfg), "seed": max(cfg.SEED, 0)}


def _loading(cfg: CfgNode) -> dict:
    """How a pass over the training set loads and runs."""
    return {
        "batch_size": cfg.SOLVER.IMS_PER_BATCH,
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
        "amp": cfg.SOLVER.AMP.ENABLED,
    }


def feature_cache_options(cfg: CfgNode) -> dict:
    """Keyword arguments of :func:`~lt_det.engine.feature_cache.open_feature_cache`."""
    model = cfg.MODEL.clone()
    model.defrost()
    for key in ("WEIGHTS", "DEVICE", "LONG_TAIL"):
        model.pop(key, None)
    node = cfg.DECOUPLE.FEATURE_CACHE
    return {
        **_loading(cfg),
        "settings": model.dump() + cfg.INPUT.dump(),
        "seed": max(cfg.SEED, 0),
        "folder": node.DIR,
        "rois_per_image": node.ROIS_PER_IMAGE,
    }


def _drw(cfg: CfgNode, last: Stage) -> Change:
    """The deferred re-weighting that ``DRW`` asks for, in a run whose last stage is ``last``."""
    # A run that is stage 2 alone has no SOLVER.MAX_ITER iterations.
    stage2 = last.start_iter if last.number == 2 else None
    first_stage = cfg.SOLVER.MAX_ITER if stage2 is None else stage2 or cfg.DECOUPLE.MAX_ITER
    start = cfg.DRW.START_ITER
    start_iter = int(0.8 * first_stage) if start < 0 else start
    if cfg.DRW.LR_FACTOR <= 0:
        raise ValueError(f"DRW.LR_FACTOR must be positive (1: no cut), got {cfg.DRW.LR_FACTOR}")
    if start_iter >= last.end_iter:
        raise ValueError(
            f"DRW.START_ITER is {start_iter}, but the run has {last.end_iter} iterations (SOLVER.MAX_ITER, and "
            "DECOUPLE.MAX_ITER of stage 2)"
        )
    in_stage2 = stage2 is not None and start_iter >= stage2
    key = "DECOUPLE.LOSS" if in_stage2 else "MODEL.LONG_TAIL.LOSS"
    name = cfg.DECOUPLE.LOSS if in_stage2 else cfg.MODEL.LONG_TAIL.LOSS
    if not hasattr(LOSS_REGISTRY.get(name), "set_drw"):
        able = ", ".join(sorted(n for n, loss in LOSS_REGISTRY if hasattr(loss, "set_drw")))
        raise ValueError(
            f"DRW starts at iteration {start_iter}, where {key} is {name!r}, which cannot be re-weighted; "
            f"losses that can: {able}. Set {key}, DRW.START_ITER, or DRW.ENABLED False"
        )
    steps = cfg.DECOUPLE.STEPS if in_stage2 else cfg.SOLVER.STEPS
    first = min(steps, default=last.end_iter) + (stage2 if in_stage2 else 0)
    if cfg.DRW.LR_FACTOR == 1 and start_iter < first and cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        logger.warning(
            "DRW starts at iteration %d, at the full learning rate: its first cut is at %d and DRW.LR_FACTOR is 1. "
            "Weights of rare classes can make such a run diverge; set DRW.START_ITER to a step of the schedule, or "
            "DRW.LR_FACTOR below 1", start_iter, first,
        )  # fmt: skip
    return deferred_reweighting(start_iter, cfg.DRW.LR_FACTOR)


# ---- hooks


def _hooks(cfg: CfgNode, trainer: LongTailTrainer) -> Hooks:
    """The hooks of ``TEST``."""
    test, detector = cfg.TEST, trainer.detector
    before: list[HookBase] = []
    after: list[HookBase] = []
    if test.PRECISE_BN.ENABLED and get_bn_modules(detector):
        images = _Later(lambda: build_train_loader_from_config(cfg, seed=stream_seed(trainer.seed, "batch norm")))
        before.append(hooks.PreciseBN(test.EVAL_PERIOD, detector, images, test.PRECISE_BN.NUM_ITER))
    if test.VALIDATION_LOSS.PERIOD:
        images = test.VALIDATION_LOSS.IMAGES
        after.append(
            ValidationLoss(
                test.VALIDATION_LOSS.PERIOD,
                detector,
                lambda: [build_validation_loader(cfg, name, images) for name in cfg.DATASETS.TEST],
            )
        )
    if test.BEST_METRIC:
        options = {
            "mode": "min" if test.BEST_METRIC.startswith("validation/") else "max",
            "start_iter": trainer.plan.stages[-1].start_iter,
        }
        if comm.is_main_process():
            after.append(BestCheckpoint(trainer.checkpointer, test.BEST_METRIC, **options))
        if test.PATIENCE:
            after.append(EarlyStopping(test.BEST_METRIC, test.PATIENCE, **options))
    if test.GROUP_SCALARS_PERIOD:
        groups = lambda: statistics_from_config(cfg).frequency_groups
        after.append(GroupScalars(lambda: detector, groups, test.GROUP_SCALARS_PERIOD))
    return Hooks(before, after)


@dataclass
class _Later:
    """A loader that is built when it is first iterated over."""

    build: Callable

    @cached_property
    def _loader(self):
        return self.build()

    def __iter__(self) -> Iterator:
        return iter(self._loader)
