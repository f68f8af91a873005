"""The trainer: Detectron2's, with phases and exact resumption."""

from __future__ import annotations

import copy
import logging
import os
import weakref
from collections import OrderedDict
from functools import cached_property, partial

import torch
from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, DefaultTrainer, HookBase, SimpleTrainer, TrainerBase, create_ddp_model, hooks
from detectron2.evaluation import verify_results
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.modeling import GeneralizedRCNN
from detectron2.solver.build import get_default_optimizer_params
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn

from lt_det.data import (
    SAMPLER_REGISTRY,
    TrainLoader,
    build_train_loader_from_config,
    build_train_mapper,
    load_train_dicts,
    training_frequency_groups,
)
from lt_det.evaluation import DeferredMaskPasting, LongTailLVISEvaluator
from lt_det.gml import MutualInformation, MutualInformationDetector, Teacher
from lt_det.meta import MetaDecoupledClassifier, MetaStep, build_meta_step, check_meta_config, meta_loader_config
from lt_det.modeling import (
    DecoupledClassifier,
    box_predictors,
    build_loss,
    set_stage2_loss,
    statistics_from_config,
)
from lt_det.modeling.calibrators import moments_path
from lt_det.processes import end_with_parent

from .checkpoint import LongTailCheckpointer
from .clipping import clip_gradients
from .feature_cache import cached_records, open_feature_cache
from .hooks import (
    IterationSeed,
    LoaderStateHook,
    MetaHook,
    PhaseHook,
    StageCheckpointer,
    StageLRScheduler,
    TeacherHook,
)
from .hooks_groups import GroupScalars
from .hooks_selection import BestCheckpoint, EarlyStop, EarlyStopping, ValidationLoss, build_validation_loader
from .logit_moments import refit_calibrators
from .logs import build_writers
from .mutual_information import build_mutual_information, check_teacher_config, fill_queues, wants_keys
from .phases import PhasedRun, StudentPhase, build_phases, stage_config, stage_start, total_iterations
from .run_record import RunRecord
from .run_report import write_page

logger = logging.getLogger(__name__)


class LongTailTrainer(PhasedRun, DefaultTrainer):
    """``DefaultTrainer`` for long-tailed training.

    One run goes through its phases (``lt_det.engine.phases``): with ``DECOUPLE.ENABLED``, stage 1 trains the
    detector and stage 2 its classifier alone. It resumes from any checkpoint, in any stage, to the losses of an
    uninterrupted
    run: the order and the augmentation of the images follow from the seed and the iteration, and so does everything
    else that is drawn at random.

    Attributes:
        detector: the model itself, whatever wraps it for training in the present stage.
        stage: 1 or 2; 0 while the run trains the teacher of its own student.
        mutual_information: what trains the detector by GML in stage 1, or None.
        meta: the meta step of stage 2 (``META.NAME``), or None.
        seed: of the whole run, the same on all ranks; ``cfg.SEED``, or drawn at random and kept in the checkpoint.
    """

    phase_keys = "TEACHER, DECOUPLE, DRW and SOLVER.MAX_ITER"

    def __init__(self, cfg: CfgNode):
        """
        Args:
            cfg: a Detectron2 config with lt_det's keys.

        Raises:
            ValueError: for keys that contradict each other or the data.
        """
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        check_meta_config(cfg)
        check_teacher_config(cfg)
        self.cfg = cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        self.max_iter = total_iterations(cfg)
        self._phases = build_phases(cfg)
        # Where the loader of a sampler that cannot be replayed stands; set by LoaderStateHook.
        self.loader_state: dict | None = None

        self.detector = self.build_model(cfg)
        self.build_stage(0 if cfg.TEACHER.MAX_ITER else 1)
        self.checkpointer = LongTailCheckpointer(
            self.detector,
            cfg.OUTPUT_DIR,
            # Training on top of a finished model: all of it must fit.
            strict=cfg.DECOUPLE.ENABLED and stage_start(cfg, 2) == 0,
            trainer=weakref.proxy(self),
            run=RunRecord.from_config(cfg, lambda: total_iterations(cfg)),
        )
        self.register_hooks(self.build_hooks())

    # ---- stages and phases

    def build_stage(self, stage: int, *, teacher: Teacher | None = None) -> None:
        """Build what a training stage needs around the detector, whose weights stay: the module that gives the losses,
        the optimizer, the schedule and the loader.

        Args:
            teacher: of stage 1, if not the one that the config names.
        """
        self.stage = stage
        cfg = stage_config(self.cfg, stage)
        module = self.detector
        for predictor in box_predictors(self.detector, required=False):
            predictor.roi_observer = None  # of an earlier stage
        self.mutual_information: MutualInformationDetector | None = None
        self.meta: MetaStep | None = None
        if stage == 1 and wants_keys(self.detector):
            module = self.mutual_information = build_mutual_information(cfg, self.detector, teacher)
        elif stage == 2:
            set_stage2_loss(self.cfg, self.detector)
            if cfg.META.NAME:
                applied = cfg.DATALOADER.SAMPLER_TRAIN == "MetaSampler"
                self.meta = build_meta_step(cfg, self.detector, applied=applied, seed=self.seed)
                module = MetaDecoupledClassifier(self.detector, self.meta)
            else:
                module = DecoupledClassifier(self.detector)
        optimizer = self.build_optimizer(cfg, module)
        if self.meta is not None:
            self.meta.optimizer = optimizer
        on_gpu = next(self.detector.parameters()).is_cuda
        module = create_ddp_model(module, broadcast_buffers=False, **({} if on_gpu else {"device_ids": None}))
        trainer = AMPTrainer if cfg.SOLVER.AMP.ENABLED and on_gpu else SimpleTrainer
        self._trainer = trainer(module, None, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self._reset_loader(stage_start(self.cfg, stage))
        if stage == 2:
            self._describe_losses()

    def begin_student(self, *, resumed: bool) -> None:
        """GML: what was trained so far becomes the frozen teacher, and the detector starts afresh as its student.

        Args:
            resumed: the detector's weights are about to be loaded; the teacher's are in ``model_teacher.pth``.
        """
        cfg = self.cfg
        teacher = Teacher(copy.deepcopy(self.detector))
        if resumed:
            path = os.path.join(cfg.OUTPUT_DIR, f"{StudentPhase.checkpoint}.pth")
            LongTailCheckpointer(teacher.detector, strict=True).load(path, checkpointables=[])
        else:
            fresh = self.build_model(cfg)
            if cfg.MODEL.WEIGHTS:
                LongTailCheckpointer(fresh).load(cfg.MODEL.WEIGHTS, checkpointables=[])
            self.detector.load_state_dict(fresh.state_dict())
        self.build_stage(1, teacher=teacher)

    def begin_keys(self) -> None:
        """GML: before the student's first step, a following teacher takes its weights, and the queues are filled."""
        module = self.mutual_information
        if module.momentum is not None:
            module.teacher.follow(self.detector, 0.0)
        if self.cfg.TEACHER.FILL_QUEUES:
            fill_queues(self.cfg, module, self.train_loader.records, seed=self.seed)

    def _reset_loader(self, iteration: int) -> None:
        """Make the loaders go on with what iteration ``iteration`` of the run sees."""
        offset = iteration - stage_start(self.cfg, self.stage)
        self._trainer.reset_data_loader(lambda: _DeferredLoader(lambda: self._build_loader(offset)))

    def _build_loader(self, offset: int) -> TrainLoader:
        """The loader of the present stage, from its iteration ``offset`` on; that of meta batches goes to
        ``self.meta``."""
        cfg = stage_config(self.cfg, self.stage)
        records, sizes = load_train_dicts(cfg)
        mapper = None
        if self.stage == 2 and cfg.DECOUPLE.FEATURE_CACHE.ENABLED:
            module = self._trainer.model
            mapper = open_feature_cache(cfg, getattr(module, "module", module), records)
            records = cached_records(records)
        elif self.mutual_information is not None:
            mapper = build_train_mapper(cfg, records, identify=True)
        build = partial(build_train_loader_from_config, dataset_dicts=records, dataset_sizes=sizes, mapper=mapper)
        # Each stage draws its images in an order of its own.
        seed = self.seed + (self.stage - 1) % 3
        if getattr(SAMPLER_REGISTRY.get(cfg.DATALOADER.SAMPLER_TRAIN), "resumable_by_replay", True):
            loader = build(cfg, seed=seed, start_iteration=offset)
        else:
            loader = build(cfg, seed=seed)
            if offset > 0:
                loader.load_state_dict(self.loader_state)
        if self.meta is not None:
            start = self.meta.batches_before(offset)
            # An order of its own again, far from the seeds of other loaders.
            self.meta.batches = iter(build(meta_loader_config(cfg), seed=self.seed + 10**6, start_iteration=start))
        return loader

    @property
    def train_loader(self) -> TrainLoader:
        """The loader of the present stage."""
        return self._trainer.data_loader.loader

    def evaluate_stage(self, stage: int) -> None:
        """Evaluate at the end of a stage: results in ``OUTPUT_DIR/inference_stage<n>`` and in the training's
        metrics."""
        evaluators = [
            self.build_evaluator(self.cfg, name, f"inference_stage{stage}") for name in self.cfg.DATASETS.TEST
        ]
        refit_calibrators(self.cfg, self.detector)
        results = self.test(self.cfg, self.detector, evaluators)
        for name, value in flatten_results_dict(results).items():
            self.storage.put_scalar(f"stage{stage}/{name}", value, smoothing_hint=False)

    # ---- Detectron2's interface

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
        """Detectron2's SGD over what trains. Its gradient clipping passes over parameters without gradient, and
        learned temperatures do not decay."""
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
        if ours and isinstance(getattr(model, "module", model), GeneralizedRCNN):
            model = DeferredMaskPasting(model)
        results = super().test(cfg, model, evaluators)
        if cfg.TEST.REPORT and comm.is_main_process():
            for evaluator in evaluators or ():
                if isinstance(evaluator, LongTailLVISEvaluator):
                    write_page(evaluator, trained)
        return results

    def build_hooks(self) -> list:
        cfg = self.cfg
        ret = [IterationSeed(), PhaseHook(), TeacherHook(), hooks.IterationTimer(), StageLRScheduler()]
        if cfg.META.NAME:
            ret.append(MetaHook())
        ret.append(LoaderStateHook(cfg.SOLVER.CHECKPOINT_PERIOD))
        if cfg.TEST.PRECISE_BN.ENABLED and get_bn_modules(self.detector):
            loader = _DeferredLoader(
                lambda: build_train_loader_from_config(cfg, seed=self.seed + len(self._phases) + 1)
            )
            ret.append(hooks.PreciseBN(cfg.TEST.EVAL_PERIOD, self.detector, loader, cfg.TEST.PRECISE_BN.NUM_ITER))
        if comm.is_main_process():
            ret.append(hooks.PeriodicCheckpointer(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD))
            ret.append(StageCheckpointer(self._phases))

        def test_and_save_results():
            last = self.iter + 1 >= self.max_iter
            path = moments_path(os.path.join(cfg.OUTPUT_DIR, "model_final.pth")) if last else ""
            refit_calibrators(cfg, self.detector, path)
            self._last_eval_results = self.test(self.cfg, self.detector)
            return self._last_eval_results

        if cfg.TEST.VALIDATION_LOSS.PERIOD:
            ret.append(self._build_validation())
        # After the checkpointer, so that a failing evaluation loses nothing.
        ret.append(hooks.EvalHook(cfg.TEST.EVAL_PERIOD, test_and_save_results))
        ret += self._build_selection()
        if cfg.TEST.GROUP_SCALARS_PERIOD:
            groups = partial(_frequency_groups, cfg)
            ret.append(GroupScalars(lambda: self.detector, groups, cfg.TEST.GROUP_SCALARS_PERIOD))
        if comm.is_main_process():
            ret.append(hooks.PeriodicWriter(self.build_writers(), period=20))
        return ret

    def build_writers(self) -> list:
        return build_writers(self.cfg.OUTPUT_DIR, self.max_iter)

    def _build_validation(self) -> ValidationLoss:
        cfg, node = self.cfg, self.cfg.TEST.VALIDATION_LOSS

        def loaders() -> list:
            return [build_validation_loader(cfg, name, node.IMAGES) for name in cfg.DATASETS.TEST]

        return ValidationLoss(node.PERIOD, lambda: self.detector, loaders)

    def _build_selection(self) -> list[HookBase]:
        """The hooks of TEST.BEST_METRIC and TEST.PATIENCE."""
        test = self.cfg.TEST
        if not test.BEST_METRIC:
            return []
        options = {
            "mode": "min" if test.BEST_METRIC.startswith("validation/") else "max",
            "start_iter": stage_start(self.cfg, 2 if self.cfg.DECOUPLE.ENABLED else 1),
        }
        ret: list[HookBase] = []
        if comm.is_main_process():
            ret.append(BestCheckpoint(self.checkpointer, test.BEST_METRIC, **options))
        if test.PATIENCE:
            ret.append(EarlyStopping(test.BEST_METRIC, test.PATIENCE, **options))
        return ret

    def resume_or_load(self, resume: bool = True) -> None:
        super().resume_or_load(resume=resume)
        self._reset_loader(self.start_iter)

    def train(self) -> OrderedDict | None:
        """Run all stages. Returns the results of the last evaluation on the main process."""
        self._describe_losses()
        try:
            TrainerBase.train(self, self.start_iter, self.max_iter)
        except EarlyStop:
            pass  # it has said so, and kept the model
        results = getattr(self, "_last_eval_results", None)
        if len(self.cfg.TEST.EXPECTED_RESULTS) and comm.is_main_process():
            verify_results(self.cfg, results)
        return results

    def state_dict(self) -> dict:
        state = {**super().state_dict(), **self.phase_state()}
        if self.meta is not None:
            state["meta"] = self.meta.state_dict()
        if self.mutual_information is not None:
            state["mutual_information"] = self.mutual_information.training_state()
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        if self.meta is not None:
            self.meta.load_state_dict(state_dict["meta"])
        if self.mutual_information is not None:
            self.mutual_information.load_training_state(state_dict["mutual_information"])


def _frequency_groups(cfg: CfgNode) -> dict:
    return statistics_from_config(cfg).frequency_groups


class _DeferredLoader:
    """A loader that is built when it is first iterated over: a resumed run skips straight to its own."""

    def __init__(self, build):
        self._build = build

    @cached_property
    def loader(self):
        return self._build()

    def __iter__(self):
        return iter(self.loader)
