"""The plan of a LazyConfig, and the trainer by its name."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from detectron2.config import get_cfg, instantiate
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from fvcore.common.param_scheduler import ParamScheduler
from omegaconf import DictConfig
from torch import nn

from lt_det.data import (
    ClassStatistics,
    DatasetRecords,
    IdentifyingMapper,
    MetaSampler,
    TrainMapper,
    samplers_with_options,
)
from lt_det.declaration import declared_options
from lt_det.gml import FollowingTeacher, FrozenTeacher, MutualInformation, MutualInformationDetector, TrainedTeacher
from lt_det.losses import ClassificationLoss
from lt_det.meta import MetaStep, check_rows
from lt_det.modeling import LongTailRCNNWithTTA, box_predictors

from .checks_lazy import lazy_datasets, lazy_target
from .feature_cache import cached_records, open_feature_cache
from .plan import Change, Plan, Run, Stage, deferred_reweighting, stream_seed
from .run_record import RunRecord, flat_lazy
from .stages import build_stage, load_weights
from .trainer import Trainer

__all__ = [
    "LazyTrainer",
    "decouple_node",
    "plan_from_lazy",
    "set_decoupled_loss",
    "test_lazy",
    "test_lazy_with_augmentation",
    "train_lazy",
]


class LazyTrainer(Trainer):
    """The :class:`~lt_det.engine.trainer.Trainer` of a LazyConfig.

    The config has ``model``, ``optimizer``, ``lr_multiplier``, ``dataloader.{train, test, evaluator}`` and ``train``,
    as Detectron2's ``tools/lazyconfig_train_net.py`` has them, and in ``train``, all of them optional:

    * ``seed`` (0, the same on all ranks) seeds each iteration; the train loader should take it too.
    * ``decouple = dict(start_iter=..., loss=L(...)(...))``: from that iteration to ``max_iter`` the classifier alone is
      trained, with this loss. ``start_iter`` 0: at once, from the finished model in ``init_checkpoint``. Its other keys
      are ``optimizer`` and ``lr_multiplier`` (the run's own if not given; each stage goes through its multiplier
      whole), ``sampler`` and ``sampler_options`` (those of ``dataloader.train``, as far as the sampler has them),
      ``reinit_classifier`` (False), ``evaluate`` (True: when stage 1 ends), and of BALMS

      - ``meta = L(MetaStep)(learner=L(MetaReweighter)(num_classes=...), meta_loss=L(Softmax)(num_classes=...))``: class
        rates are learned; ``MetaStep``'s optimizer, batches and seed are the run's. With ``sampler="MetaSampler"``
        images are drawn by the rates.
      - ``meta_dataloader``: what meta batches change of ``dataloader.train`` (the sampler ``ClassBalancedSampler``).
      - ``feature_cache = dict(folder="", rois_per_image=0)``: RoI features are computed once.
    * ``teacher``: of a loss that learns from keys (GML): ``L(FollowingTeacher)(momentum=...)`` (the default),
      ``L(FrozenTeacher)(model=..., weights=...)``, or ``L(TrainedTeacher)(max_iter=...)``, whose iterations are the
      first of ``train.max_iter``.
    * ``drw = dict(start_iter=..., lr_factor=...)``: deferred re-weighting (80 % of ``max_iter``, 0.1).
    * ``test_aug = dict(min_sizes=..., max_size=..., flip=...)``: the finished model is evaluated with test-time
      augmentation too (:func:`test_lazy_with_augmentation`); what is left out is Detectron2's default of ``TEST.AUG``.
    """

    def __init__(self, cfg: DictConfig):
        """
        Raises:
            ValueError: for keys that contradict each other or the model.
        """
        self.cfg = cfg
        super().__init__(plan_from_lazy(cfg))
        _check_losses(cfg, self.plan, self.detector)
        _with_augmentation(cfg, self.detector)  # what is wrong fails now and not behind the training


def train_lazy(cfg: DictConfig, *, resume: bool = False) -> LazyTrainer:
    """Train what a config describes, see :class:`LazyTrainer`.

    Args:
        resume: from the last checkpoint in ``train.output_dir``. lt_det's loader goes on with the next images; another
            loader starts its own order again.

    Returns:
        The trainer.
    """
    trainer = LazyTrainer(cfg)
    trainer.resume_or_load(resume)
    trainer.train()
    return trainer


def test_lazy(cfg: DictConfig, model: nn.Module, folder: str = "") -> dict | None:
    """Evaluate on ``dataloader.test`` with ``dataloader.evaluator``, if there is one.

    Args:
        folder: below ``train.output_dir``, for the evaluator's files; by default its own ``output_dir``.
    """
    if "evaluator" not in cfg.dataloader:
        return None
    evaluator = copy.deepcopy(cfg.dataloader.evaluator)
    if folder and "output_dir" in evaluator:
        evaluator.output_dir = os.path.join(cfg.train.output_dir, folder)
    results = inference_on_dataset(model, instantiate(cfg.dataloader.test), instantiate(evaluator))
    if comm.is_main_process():
        print_csv_format(results)
    return results


def test_lazy_with_augmentation(cfg: DictConfig, model: nn.Module) -> dict | None:
    """:func:`test_lazy` by ``train.test_aug``, if there is such a node: results named ``bbox_TTA`` and so on, files in
    ``train.output_dir/inference_TTA``.

    Raises:
        ValueError: for keys or sizes that cannot be.
    """
    augmented = _with_augmentation(cfg, model)
    results = None if augmented is None else test_lazy(cfg, augmented, "inference_TTA")
    return None if results is None else {f"{task}_TTA": values for task, values in results.items()}


def _with_augmentation(cfg: DictConfig, model: nn.Module) -> LongTailRCNNWithTTA | None:
    node = _node(cfg, "test_aug", "min_sizes max_size flip")
    if node is None:
        return None
    defaults = get_cfg().TEST.AUG
    options = {name: node.get(name, defaults[name.upper()]) for name in ("min_sizes", "max_size", "flip")}
    return LongTailRCNNWithTTA.from_model(model, **options)


def images_from_lazy(cfg: DictConfig) -> tuple[DatasetRecords, Callable, dict]:
    """The training images of a config, for a pass over them: records and mapper of ``dataloader.train``, and how both
    are loaded.

    Raises:
        ValueError: if ``dataloader.train`` does not state them.
    """
    node = cfg.dataloader.train
    records, mapper = _open_images(node)
    return records, mapper, {**_loading(cfg), "seed": cfg.train.get("seed", 0)}


def _open_images(parts: Mapping[str, Any]) -> tuple[DatasetRecords, Callable]:
    missing = [key for key in ("dataset_dicts", "mapper", "total_batch_size") if key not in parts]
    if missing:
        raise ValueError(
            f"dataloader.train has no {missing[0]}; GML, the meta step, the feature cache and LogN need a "
            "dataloader.train = L(build_train_loader)(...) of lt_det.data"
        )
    records = instantiate(parts["dataset_dicts"])
    if not isinstance(records, DatasetRecords):
        records = DatasetRecords([records])
    return records, instantiate(parts["mapper"])


def _loading(cfg: DictConfig) -> dict:
    """How a pass over the training set loads and runs."""
    node, amp = cfg.dataloader.train, cfg.train.amp.enabled
    return {"batch_size": node.total_batch_size, "num_workers": node.get("num_workers", 0), "amp": amp}


def plan_from_lazy(cfg: DictConfig) -> Plan:
    """The run that a config describes, see :class:`LazyTrainer`.

    Raises:
        ValueError: for keys that contradict each other.
    """
    train = cfg.train
    decouple, teacher = decouple_node(cfg), _teacher(cfg)
    ends = [teacher.max_iter if isinstance(teacher, TrainedTeacher) else 0]
    ends.append(train.max_iter if decouple is None else decouple.start_iter)
    if decouple is not None:
        ends.append(train.max_iter)
    if ends[0] and not ends[0] < ends[1]:
        raise ValueError(
            f"train.teacher.max_iter is {ends[0]}, and the student's iterations end at {ends[1]}; the teacher's are "
            "the first of the run, so raise train.max_iter (train.decouple.start_iter)"
        )
    bounds = list(enumerate(zip([0, *ends], ends)))
    statistics = lazy_datasets(cfg, "train")
    return Plan(
        model=lambda: instantiate(cfg.model).to(train.device),
        stages=[_LazyStage(cfg, k, b, teacher).build() for k, b in bounds[0 if ends[0] else 1 :]],
        changes=_drw(cfg),
        seed=train.get("seed", 0),
        output_dir=train.output_dir,
        weights=train.init_checkpoint,
        weights_key="train.init_checkpoint",
        phase_keys="train.teacher, train.decouple, train.drw and train.max_iter",
        record=RunRecord.from_lazy(cfg),
        evaluate=partial(test_lazy, cfg),
        images=partial(images_from_lazy, cfg),
        amp=train.amp.enabled,
        ddp=train.ddp,
        checkpoints=train.checkpointer,
        eval_period=train.eval_period,
        log_period=train.log_period,
        statistics=partial(ClassStatistics.from_metadata, MetadataCatalog.get(statistics[0])) if statistics else None,
    )


# ---- nodes of train


def _node(cfg: DictConfig, name: str, known: str) -> DictConfig | None:
    """The optional node ``train.<name>``, with no other keys than ``known``."""
    node = cfg.train.get(name)
    unknown = sorted(set(node or ()) - set(known.split()))
    if unknown:
        raise ValueError(
            f"train.{name}: unknown keys {', '.join(unknown)}; those there are: {', '.join(known.split())}"
        )
    return node


def decouple_node(cfg: DictConfig) -> DictConfig | None:
    """``train.decouple``, or None: stage 2 of decoupled training, see :class:`LazyTrainer`."""
    node = _node(
        cfg,
        "decouple",
        "start_iter loss reinit_classifier optimizer lr_multiplier sampler sampler_options evaluate meta "
        "meta_dataloader feature_cache",
    )
    if node is None:
        return None
    if "loss" not in node or not 0 <= node.get("start_iter", -1) < cfg.train.max_iter:
        raise ValueError(
            f"train.decouple needs loss=L(...)(...) and start_iter, from 0 to train.max_iter ({cfg.train.max_iter}) - 1"
        )
    if node.start_iter == 0 and not cfg.train.init_checkpoint:
        raise ValueError(
            "train.decouple.start_iter is 0, so stage 2 starts from a finished model: set train.init_checkpoint to it"
        )
    if node.get("meta") is None and (_by_rates(node.get("sampler")) or "meta_dataloader" in node):
        raise ValueError(
            "train.decouple: the image sampler MetaSampler and meta_dataloader go with the meta step; set "
            "train.decouple.meta = L(MetaStep)(...)"
        )
    unknown = set(node.get("feature_cache") or ()) - {"folder", "rois_per_image"}
    if unknown:
        raise ValueError(f"train.decouple.feature_cache: unknown key {min(unknown)}; it takes folder, rois_per_image")
    if _by_rates((node.get("meta_dataloader") or {}).get("sampler")):
        raise ValueError(
            "train.decouple.meta_dataloader.sampler: meta batches do not follow the rates; choose another sampler, as "
            "ClassBalancedSampler"
        )
    instantiate(node.get("lr_multiplier"))  # a schedule that is wrong fails now and not hours into the run
    return node


def _by_rates(sampler: Any) -> bool:
    """Whether a sampler, by name or ``L(...)``, follows the rates of the meta step."""
    return sampler == "MetaSampler" or (isinstance(sampler, DictConfig) and lazy_target(sampler) is MetaSampler)


def _options_that_fit(sampler: Any, options: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Those of another sampler's options that a sampler has too; None for one that is not given by its name."""
    made = dict(samplers_with_options())
    if not isinstance(sampler, str) or sampler not in made:
        return None
    names = {option.name for option in declared_options(made[sampler])}
    return {name: value for name, value in (options or {}).items() if name in names}


def set_decoupled_loss(cfg: DictConfig, model: nn.Module) -> None:
    """Exchange every box predictor's loss for that of ``train.decouple``."""
    node = decouple_node(cfg)
    for predictor in box_predictors(model):
        predictor.set_loss(instantiate(node.loss), reinit=node.get("reinit_classifier", False))


def _teacher(cfg: DictConfig) -> FollowingTeacher | FrozenTeacher | TrainedTeacher:
    node = copy.deepcopy(cfg.train.get("teacher"))
    if node is None:
        return FollowingTeacher()
    if "model" in node:
        node.model = partial(instantiate, node.model)  # made when the student is
    teacher = instantiate(node)
    if not isinstance(teacher, (FollowingTeacher, FrozenTeacher, TrainedTeacher)):
        raise ValueError(
            "train.teacher must be L(FollowingTeacher)(...), L(FrozenTeacher)(...) or L(TrainedTeacher)(...), all of "
            "lt_det.gml"
        )
    return teacher


def _drw(cfg: DictConfig) -> list[Change]:
    node = _node(cfg, "drw", "start_iter lr_factor")
    if node is None:
        return []
    start, factor = node.get("start_iter", int(0.8 * cfg.train.max_iter)), node.get("lr_factor", 0.1)
    if not 0 <= start < cfg.train.max_iter or factor <= 0:
        raise ValueError(
            f"train.drw: start_iter must lie between 0 and train.max_iter ({cfg.train.max_iter}) - 1 and lr_factor be "
            f"positive, got {start} and {factor}"
        )
    return [deferred_reweighting(start, factor)]


def _check_losses(cfg: DictConfig, plan: Plan, model: nn.Module) -> None:
    """Raise ``ValueError`` if stages and changes do not fit the model's losses."""
    losses: list[ClassificationLoss] = [p.loss for p in box_predictors(model, required=False)]
    if cfg.train.get("teacher") is not None and not any(type(loss).wants_keys for loss in losses):
        raise ValueError(
            f"train.teacher is set, but the model's loss is {', '.join(sorted({type(x).__name__ for x in losses}))}, "
            "which learns from no teacher; take GML, or remove train.teacher"
        )
    node = cfg.train.get("decouple")
    later = None if node is None else instantiate(node.loss)
    if later is not None:
        later.prepare()  # a class that it has no count of ends the run now, not in stage 2
        if later.wants_keys:
            raise ValueError(
                f"train.decouple.loss is {type(later).__name__}, which trains features, and stage 2 freezes them; use "
                "it as the model's loss"
            )
        for predictor in [] if node.get("reinit_classifier", False) else box_predictors(model):
            predictor.check_fit(later)
        if node.get("meta") is not None:
            later.remember_features(1)  # as its box predictor will
            check_rows(later)
    for change in plan.changes:  # deferred re-weighting
        concerned = losses if later is None or change.start_iter < node.start_iter else [later]
        unable = sorted({type(loss).__name__ for loss in concerned if not hasattr(loss, "set_drw")})
        if unable or not concerned:
            raise ValueError(
                f"train.drw starts at iteration {change.start_iter}, where the loss is "
                f"{', '.join(unable) or 'none of lt_det'}, which cannot be re-weighted; take LDAM, or remove train.drw"
            )


# ---- stages


class _WithEnd(ParamScheduler):
    """A schedule of fvcore's with a value after the last step, for which Detectron2 asks too."""

    def __init__(self, scheduler: ParamScheduler):
        self._scheduler = scheduler

    def __call__(self, where: float) -> float:
        return self._scheduler(min(where, 1 - 1e-9))


class _LazyStage:
    """What a LazyConfig says of one stage, see :func:`~lt_det.engine.stages.build_stage`."""

    def __init__(self, cfg: DictConfig, number: int, bounds: tuple[int, int], teacher):
        self._cfg, self._number, self._bounds, self._teacher = cfg, number, bounds, teacher
        self._own = (cfg.train.get("decouple") or {}) if number == 2 else {}  # what stage 2 has of its own
        self._images: tuple | None = None
        self.set_loss = partial(set_decoupled_loss, cfg)

    def build(self) -> Stage:
        decouple = self._cfg.train.get("decouple") or {}
        return build_stage(
            self._number,
            self._bounds,
            self,
            teacher=self._teacher,
            output_dir=self._cfg.train.output_dir,
            evaluate=self._teacher.evaluate if self._number == 0 else decouple.get("evaluate", True),
            meta=decouple.get("meta") is not None,
        )

    def fresh(self) -> nn.Module:
        train = self._cfg.train
        model = instantiate(self._cfg.model).to(train.device)
        if train.init_checkpoint:
            load_weights(model, train.init_checkpoint, "train.init_checkpoint", strict=False)
        return model

    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        node = copy.deepcopy(self._own.get("optimizer") or self._cfg.optimizer)
        node.params.model = module
        if isinstance(module, MutualInformationDetector):
            overrides = dict(node.params.get("overrides") or {})
            node.params.overrides = {n: {"weight_decay": 0.0} for n in MutualInformation.no_weight_decay} | overrides
        return instantiate(node)

    def schedule(self, optimizer: torch.optim.Optimizer) -> LRMultiplier:
        multiplier = instantiate(self._own.get("lr_multiplier") or self._cfg.lr_multiplier)
        first, end = self._bounds
        return LRMultiplier(optimizer, _WithEnd(multiplier), max(1, end - first))

    def loader(self, run: Run) -> Iterable:
        parts = self._parts(run)
        if "sampler" in self._own:
            parts["sampler"] = self._own["sampler"]
            parts["sampler_options"] = _options_that_fit(parts["sampler"], parts.get("sampler_options"))
        if "sampler_options" in self._own:
            parts["sampler_options"] = self._own["sampler_options"]
        if parts.get("sampler") == "MetaSampler":
            number = box_predictors(run.detector)[0].num_classes
            parts["sampler_options"] = {"num_classes": number, **(parts.get("sampler_options") or {})}
        if "seed" in parts:
            parts["seed"] = stream_seed(parts["seed"], f"stage {self._number}")  # images in an order of its own
        return instantiate(parts)

    def _parts(self, run: Run) -> dict[str, Any]:
        """What ``dataloader.train`` calls and with what, as this stage has it: a plain dict, which holds any value."""
        parts = dict(self._cfg.dataloader.train.items())
        mapper = parts.get("mapper")
        keys = isinstance(run.module, MutualInformationDetector)
        if keys and isinstance(mapper, DictConfig) and lazy_target(mapper) in (DatasetMapper, TrainMapper):
            parts["mapper"] = {**mapper, "_target_": IdentifyingMapper}
        own = self._own
        if own.get("feature_cache") is not None or own.get("meta") is not None or keys or self._images is not None:
            parts["dataset_dicts"], parts["mapper"] = self._open(run, parts)
        return parts

    def _open(self, run: Run, parts: Mapping[str, Any]) -> tuple:
        """The training set and what maps its records; once for all that wants them."""
        if self._images is None:
            records, mapper = _open_images(parts)
            cache = self._own.get("feature_cache")
            if cache is not None:
                options = {"seed": run.seed, "settings": self._settings(), **_loading(self._cfg), **cache}
                mapper = open_feature_cache(run.module, records, mapper, **options)
                records = cached_records(records)
            self._images = records, mapper
        return self._images

    def _settings(self) -> str:
        """What RoI features follow from, beside weights and annotations."""
        nodes = [*flat_lazy(self._cfg.model), *flat_lazy(self._cfg.dataloader.train.mapper)]
        trained = re.compile(r"box_predictors?(\.\d+)?\.(loss|calibrator)\b")
        return "\n".join(f"{key} {text}" for key, text in nodes if " at 0x" not in text and not trained.search(key))

    def training_images(self, run: Run) -> tuple:
        records, mapper = self._open(run, self._parts(run))
        return records, mapper, _loading(self._cfg)

    def meta_batches(self, run: Run, start: int) -> Iterable:
        parts = self._parts(run) | {"sampler": "ClassBalancedSampler", "sampler_options": None}
        parts |= dict(self._own.get("meta_dataloader") or {})
        if "seed" in parts:
            parts["seed"] = stream_seed(parts["seed"], "meta batches")
        return instantiate({**parts, "start_iteration": start})

    def meta_step(self, run: Run, **given) -> MetaStep:
        sampler = self._own.get("sampler", self._cfg.dataloader.train.get("sampler"))
        return instantiate({**self._own.meta, **given, "applied": _by_rates(sampler)})
