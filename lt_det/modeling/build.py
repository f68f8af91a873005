"""From a config to class statistics and losses: the one place where both are read."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, get_detection_dataset_dicts
from detectron2.utils.logger import log_first_n

from lt_det.data import (
    ClassStatistics,
    build_sampler,
    expected_counts,
    load_train_dicts,
    prepare_dataset,
    sampler_by_name,
)
from lt_det.declaration import checked_options, lookup
from lt_det.losses import LOSS_REGISTRY, ClassificationLoss

from .calibrators import CALIBRATOR_REGISTRY, Calibrator


def dataset_statistics(
    name: str, *, sampler: str = "", sampler_options: Mapping[str, Any] | None = None
) -> Callable[[], ClassStatistics]:
    """What gives the class statistics of a registered data set when called: for LazyConfig, where a loss's or a
    calibrator's ``statistics`` is ``L(dataset_statistics)(name="lvis_v1_train")``.

    Args:
        sampler, sampler_options: those of the train loader, for the prior ``sampled``; without them it has no counts.
    """

    def read() -> ClassStatistics:
        prepare_dataset(name)
        statistics = ClassStatistics.from_metadata(MetadataCatalog.get(name))
        if not sampler:
            return statistics
        records = get_detection_dataset_dicts(name)
        chosen = sampler_by_name(sampler, records, seed=0, **(sampler_options or {}))
        return _with_sampled_counts(statistics, records, chosen)

    return read


def statistics_from_config(cfg: CfgNode, *, sampler_name: str = "", prior: str = "image_count") -> ClassStatistics:
    """Class statistics of the training set that a config names.

    From ``MODEL.LONG_TAIL.STATISTICS`` when set, else from the metadata of the one training set, else from the
    annotations of all of ``DATASETS.TRAIN``.

    Args:
        cfg: a config with lt_det's keys.
        sampler_name: the training sampler in use; only the prior ``sampled`` asks for it. Default:
            ``DATALOADER.SAMPLER_TRAIN``.
        prior: with ``"sampled"``, the expected instance counts under that sampler are added.

    Raises:
        ValueError: if the number of classes is not ``MODEL.ROI_HEADS.NUM_CLASSES``, or there is no source.
    """
    num_classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    path = cfg.MODEL.LONG_TAIL.STATISTICS
    names = list(cfg.DATASETS.TRAIN)
    if path:
        source, statistics = f"MODEL.LONG_TAIL.STATISTICS ({path})", ClassStatistics.read(path)
    elif len(names) == 1:
        source, statistics = f"data set {names[0]}", ClassStatistics.from_metadata(MetadataCatalog.get(names[0]))
    elif names:
        source = "data sets " + ", ".join(names)
        dicts, _ = load_train_dicts(cfg)
        thing_classes = MetadataCatalog.get(names[0]).get("thing_classes")
        statistics = ClassStatistics.from_dataset_dicts(dicts, num_classes, names=thing_classes)
    else:
        raise ValueError(
            "this loss needs class counts: set DATASETS.TRAIN, or MODEL.LONG_TAIL.STATISTICS to a json file with them"
        )
    if statistics.num_classes != num_classes:
        raise ValueError(
            f"{source}: {statistics.num_classes} classes, but MODEL.ROI_HEADS.NUM_CLASSES is {num_classes}; "
            f"set MODEL.ROI_HEADS.NUM_CLASSES {statistics.num_classes}"
        )
    if prior == "sampled":
        # As the loader has them: images that it filters out get no repeat factor.
        dicts, sizes = load_train_dicts(cfg)
        sampler = build_sampler(cfg, dicts, seed=0, name=sampler_name or None, dataset_sizes=sizes)
        statistics = _with_sampled_counts(statistics, dicts, sampler)
    return statistics


def _with_sampled_counts(statistics: ClassStatistics, records: list[dict], sampler) -> ClassStatistics:
    factors = getattr(sampler, "repeat_factors", None)  # None: every image equally often
    return statistics.with_sampled_counts(expected_counts(records, statistics.num_classes, factors))


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
    key = "MODEL.LONG_TAIL.LOSS"
    if stage == 2:
        key = "DECOUPLE.LOSS"
        name = cfg.DECOUPLE.LOSS
        prior = cfg.DECOUPLE.PRIOR or prior
        background = cfg.DECOUPLE.BACKGROUND or background
        sampler = cfg.DECOUPLE.SAMPLER_TRAIN or sampler
    loss_class = lookup(LOSS_REGISTRY, name, key, "losses")
    where = f"MODEL.LONG_TAIL.{loss_class.config_node}"
    options = checked_options(loss_class, node.get(loss_class.config_node, {}), where)
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
