"""From a config to losses and calibrators."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.logger import log_first_n

from lt_det.declaration import checked_options, default_node, lookup, options_in_shared_node
from lt_det.losses import LOSS_REGISTRY, ClassificationLoss

from .calibrators import CALIBRATOR_REGISTRY, Calibrator
from .statistics import statistics_from_config


def build_loss(cfg: CfgNode, *, stage: int = 1) -> ClassificationLoss:
    """The classification loss of training stage 1 (``MODEL.LONG_TAIL``) or 2 (``DECOUPLE``).

    Class statistics are read when the loss first needs them, so that evaluating a model does not need its
    training annotations.

    Raises:
        ValueError: for an unknown loss name.
    """
    node = cfg.MODEL.LONG_TAIL
    name, prior, background = node.LOSS, node.PRIOR, node.BACKGROUND
    sampler = cfg.DATALOADER.SAMPLER_TRAIN
    key, iterations = "MODEL.LONG_TAIL.LOSS", cfg.SOLVER.MAX_ITER
    if stage == 2:
        key, iterations = "DECOUPLE.LOSS", cfg.DECOUPLE.MAX_ITER
        name = cfg.DECOUPLE.LOSS
        prior = cfg.DECOUPLE.PRIOR or prior
        background = cfg.DECOUPLE.BACKGROUND or background
        sampler = cfg.DECOUPLE.SAMPLER_TRAIN or sampler
    loss_class = lookup(LOSS_REGISTRY, name, key)
    where = f"MODEL.LONG_TAIL.{loss_class.config_node}"
    options = checked_options(loss_class, node.get(loss_class.config_node, {}), where)
    if loss_class.needs_iterations:
        options["iterations"] = iterations
    return loss_class(
        cfg.MODEL.ROI_HEADS.NUM_CLASSES,
        statistics=partial(
            statistics_from_config,
            cfg,
            sampler_name=sampler,
            prior="sampled" if loss_class.needs_roi_shares else prior,
        ),
        prior=prior,
        background=background,
        min_count=node.MIN_COUNT,
        **options,
    )


def calibrator_options(cfg: CfgNode, name: str | None = None) -> tuple[type[Calibrator], dict[str, Any]]:
    """The class of a calibrator, and its options in ``MODEL.LONG_TAIL.CALIBRATOR`` as keyword arguments.

    Args:
        cfg: a config with lt_det's keys.
        name: another calibrator than the config's; options of the config's own are then passed over.

    Raises:
        ValueError: for an unknown name, or a key that was changed and that the calibrator does not have.
    """
    where = "MODEL.LONG_TAIL.CALIBRATOR"
    node = {key: value for key, value in cfg.MODEL.LONG_TAIL.CALIBRATOR.items() if key != "NAME"}
    configured = cfg.MODEL.LONG_TAIL.CALIBRATOR.NAME
    cls = lookup(CALIBRATOR_REGISTRY, name or configured, f"{where}.NAME")
    if name and configured in CALIBRATOR_REGISTRY:
        theirs = default_node(CALIBRATOR_REGISTRY.get(configured)).keys() - default_node(cls).keys()
        node = {key: value for key, value in node.items() if key not in theirs}
    return cls, options_in_shared_node(cls, node, CALIBRATOR_REGISTRY, where)


def build_calibrator(cfg: CfgNode, *, name: str | None = None, value: float | None = None) -> Calibrator | None:
    """The calibrator of ``MODEL.LONG_TAIL.CALIBRATOR``; None if it names none.

    Args:
        cfg: a config with lt_det's keys.
        name: another calibrator than the config's.
        value: another strength (``Calibrator.parameter``) than the config's.

    Raises:
        ValueError: for an unknown name, or an option that it does not have or that is out of its range.
    """
    if not (cfg.MODEL.LONG_TAIL.CALIBRATOR.NAME if name is None else name):
        return None
    cls, options = calibrator_options(cfg, name)
    if value is not None:
        options[cls.parameter] = value
    if cls.uses_statistics:
        # What the classifier was trained on last.
        sampler = cfg.DECOUPLE.SAMPLER_TRAIN if cfg.DECOUPLE.ENABLED else ""
        prior = options.get("prior", "image_count")
        options["statistics"] = partial(statistics_from_config, cfg, sampler_name=sampler, prior=prior)
        options["min_count"] = cfg.MODEL.LONG_TAIL.MIN_COUNT
    if cls.uses_weights:
        options["weights"] = cfg.MODEL.WEIGHTS
    calibrator = cls(**options)
    log_first_n(logging.INFO, f"Calibrated at inference: {calibrator.describe()}", name=__name__, key="message")
    return calibrator
