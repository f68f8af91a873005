"""From a config to losses and calibrators."""

from __future__ import annotations

import inspect
import logging
from functools import partial

from detectron2.config import CfgNode
from detectron2.utils.logger import log_first_n

from lt_det.declaration import checked_options, lookup
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
    loss_class = lookup(LOSS_REGISTRY, name, key, "losses")
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


def build_calibrator(cfg: CfgNode, *, name: str | None = None, value: float | None = None) -> Calibrator | None:
    """The calibrator of ``MODEL.LONG_TAIL.CALIBRATOR``; None if it names none.

    Args:
        cfg: a config with lt_det's keys.
        name: another calibrator than the config's.
        value: another strength (TAU or GAMMA) than the config's.

    Raises:
        ValueError: for an unknown name or an option that is out of its range.
    """
    node = cfg.MODEL.LONG_TAIL.CALIBRATOR
    name = node.NAME if name is None else name
    if not name:
        return None
    calibrator_class = lookup(CALIBRATOR_REGISTRY, name, "MODEL.LONG_TAIL.CALIBRATOR.NAME", "calibrators")
    known = inspect.signature(calibrator_class.__init__).parameters
    options = {key.lower(): v for key, v in node.items() if key.lower() in known}
    if value is not None:
        options[calibrator_class.parameter] = value
    if calibrator_class.uses_statistics:
        # What the classifier was trained on last.
        sampler = cfg.DECOUPLE.SAMPLER_TRAIN if cfg.DECOUPLE.ENABLED else ""
        options["statistics"] = partial(statistics_from_config, cfg, sampler_name=sampler, prior=node.PRIOR)
        options["min_count"] = cfg.MODEL.LONG_TAIL.MIN_COUNT
    calibrator = calibrator_class(**options)
    log_first_n(logging.INFO, f"Calibrated at inference: {calibrator.describe()}", name=__name__, key="message")
    return calibrator
