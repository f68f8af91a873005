"""The meta step that the keys ``META`` of a yaml config ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from detectron2.config import CfgNode
from detectron2.modeling import GeneralizedRCNN

from lt_det.losses import LOSS_REGISTRY, ClassificationLoss
from lt_det.modeling import box_predictors, build_loss

from .learners import build_learner
from .step import MetaStep, check_rows

__all__ = ["build_meta_loss", "build_meta_step", "check_meta_config", "meta_loader_config"]


def check_meta_config(cfg: CfgNode) -> None:
    """Raise ``ValueError`` for keys that contradict each other."""
    if cfg.META.NAME and cfg.DECOUPLE.ENABLED:
        loss = build_loss(cfg, stage=2)
        loss.remember_features(1)  # as its box predictor will
        check_rows(loss)
    if cfg.META.NAME and not cfg.DECOUPLE.ENABLED:
        raise ValueError(
            f"META.NAME is {cfg.META.NAME!r}, but rates are learned in stage 2 of decoupled training; set "
            "DECOUPLE.ENABLED True, with DECOUPLE.START_ITER 0 if MODEL.WEIGHTS is a finished model"
        )
    if "MetaSampler" in (cfg.DATALOADER.SAMPLER_TRAIN, cfg.DECOUPLE.SAMPLER_TRAIN) and not cfg.META.NAME:
        raise ValueError(
            "the image sampler MetaSampler follows the rates of the meta step, and META.NAME is empty; set META.NAME "
            "MetaSampler"
        )
    if cfg.META.NAME and cfg.META.SAMPLER == "MetaSampler":
        raise ValueError(
            "META.SAMPLER: meta batches do not follow the rates; choose another sampler, as ClassBalancedSampler"
        )


def build_meta_loss(cfg: CfgNode, loss: ClassificationLoss) -> ClassificationLoss:
    """The loss of meta batches: ``META.LOSS``, or the plain loss of the family of ``loss``.

    Its prior and its background rule are those of stage 2 (``DECOUPLE.PRIOR``, ``DECOUPLE.BACKGROUND``), as far as it
    has any. With the name of ``DECOUPLE.LOSS`` it is the shifted meta loss of the published LVIS code.

    Args:
        loss: of stage 2.

    Raises:
        ValueError: for an unknown name.
    """
    name = cfg.META.LOSS
    if not name:
        plain = LOSS_REGISTRY.get("Softmax")(cfg.MODEL.ROI_HEADS.NUM_CLASSES)
        name = "Softmax" if loss.num_outputs(loss.num_classes) == plain.num_outputs(plain.num_classes) else "Sigmoid"
    if name not in LOSS_REGISTRY:
        known = ", ".join(sorted(key for key, _ in LOSS_REGISTRY))
        raise ValueError(f"META.LOSS is {name!r}; known losses: {known}")
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DECOUPLE.LOSS = name
    rules = LOSS_REGISTRY.get(name).background_rules
    if len(rules) == 1:
        # A rule that DECOUPLE.LOSS alone has a choice of.
        cfg.DECOUPLE.BACKGROUND = rules[0]
    return build_loss(cfg, stage=2)


def build_meta_step(
    cfg: CfgNode,
    detector: GeneralizedRCNN,
    *,
    optimizer: torch.optim.Optimizer,
    open_batches: Callable[[int], Iterator[list[dict]]],
    seed: int,
) -> MetaStep:
    """The meta step that ``META`` describes, for a detector with its loss of stage 2.

    Args:
        optimizer, open_batches: see :class:`MetaStep`.
        seed: the same on all ranks.
    """
    return MetaStep(
        build_learner(cfg.META.NAME, cfg.MODEL.ROI_HEADS.NUM_CLASSES),
        build_meta_loss(cfg, box_predictors(detector)[0].loss),
        optimizer=optimizer,
        open_batches=open_batches,
        lr=cfg.META.LR,
        period=cfg.META.PERIOD,
        balance_rois=cfg.META.BALANCE_ROIS,
        applied=(cfg.DECOUPLE.SAMPLER_TRAIN or cfg.DATALOADER.SAMPLER_TRAIN) == "MetaSampler",
        seed=seed,
    )


def meta_loader_config(cfg: CfgNode) -> CfgNode:
    """A config whose loader gives meta batches: ``META.SAMPLER`` and ``META.IMS_PER_BATCH``."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATALOADER.SAMPLER_TRAIN = cfg.META.SAMPLER
    if cfg.META.IMS_PER_BATCH:
        cfg.SOLVER.IMS_PER_BATCH = cfg.META.IMS_PER_BATCH
    cfg.freeze()
    return cfg
