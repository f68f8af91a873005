"""Class statistics of a run: the one owner of what losses, calibrators, meta step and hooks are told of the classes.

What a run asks for is read once, however many box predictors (three of a cascade), stages and calibrators ask.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts

from lt_det.data import (
    ClassStatistics,
    build_sampler,
    expected_counts,
    load_train_dicts,
    prepare_dataset,
    register_from_config,
    sampler_by_name,
)


@dataclass(frozen=True)
class _Request:
    """Statistics that were asked for. Equal requests have the same answer, which is kept.

    Attributes:
        key: everything that the answer depends on. read: makes the answer.
    """

    key: Hashable
    read: Callable[[], ClassStatistics] = field(compare=False)


@lru_cache(maxsize=16)
def _answer(request: _Request) -> ClassStatistics:
    return request.read()


def _file(path: str | None) -> Hashable:
    """What changes when a file does."""
    if not path or not os.path.isfile(path):
        return path
    stat = os.stat(path)
    return path, stat.st_size, stat.st_mtime_ns


def _dataset(name: str) -> Hashable:
    """What changes when another data set is registered under the name, or its file is written anew."""
    prepare_dataset(name)
    return name, DatasetCatalog.data.get(name), _file(MetadataCatalog.get(name).get("json_file"))


def dataset_statistics(
    name: str, *, sampler: str = "", sampler_options: Mapping[str, Any] | None = None
) -> Callable[[], ClassStatistics]:
    """What gives the class statistics of a registered data set when called: for LazyConfig, where a loss's or a
    calibrator's ``statistics`` is ``L(dataset_statistics)(name="lvis_v1_train")``.

    Args:
        sampler, sampler_options: those of the train loader, for the prior ``sampled``; without them it has no counts.
    """
    # A partial function rather than one defined here: it is part of the model, which is pickled and copied.
    return partial(_of_dataset, name, sampler, dict(sampler_options or {}))


def _of_dataset(name: str, sampler: str, options: dict[str, Any]) -> ClassStatistics:
    key = (_dataset(name), sampler, tuple(sorted(options.items())))
    return _answer(_Request(key, partial(_read_dataset, name, sampler, options)))


def _read_dataset(name: str, sampler: str, options: dict[str, Any]) -> ClassStatistics:
    statistics = ClassStatistics.from_metadata(MetadataCatalog.get(name))
    if not sampler:
        return statistics
    records = get_detection_dataset_dicts(name)
    return _with_sampled_counts(statistics, records, sampler_by_name(sampler, records, seed=0, **options))


def statistics_from_config(cfg: CfgNode, *, sampler_name: str = "", prior: str = "image_count") -> ClassStatistics:
    """Class statistics of the training set that a config names, read at the first call.

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
    path, names, sampled = cfg.MODEL.LONG_TAIL.STATISTICS, cfg.DATASETS.TRAIN, prior == "sampled"
    sampler = sampler_name or cfg.DATALOADER.SAMPLER_TRAIN
    # Without the sampler the keys of the data loader do not matter, and neither does the data set where a file counts.
    key = [path, _file(path), cfg.MODEL.ROI_HEADS.NUM_CLASSES]
    if sampled or not path:
        register_from_config(cfg.DATASETS.get("REGISTER", ()))
        key += [_dataset(name) for name in names]
    if sampled or len(names) > 1:
        key += [cfg.dump(), sampler]
    return _answer(_Request(tuple(key), lambda: _read(cfg, sampler, sampled)))


def _read(cfg: CfgNode, sampler: str, sampled: bool) -> ClassStatistics:
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
    if sampled:
        # As the loader has them: images that it filters out get no repeat factor.
        dicts, sizes = load_train_dicts(cfg)
        chosen = build_sampler(cfg, dicts, seed=0, name=sampler, dataset_sizes=sizes)
        statistics = _with_sampled_counts(statistics, dicts, chosen)
    return statistics


def _with_sampled_counts(statistics: ClassStatistics, records: list[dict], sampler) -> ClassStatistics:
    factors = getattr(sampler, "repeat_factors", None)  # None: every image equally often
    return statistics.with_sampled_counts(expected_counts(records, statistics.num_classes, factors))
