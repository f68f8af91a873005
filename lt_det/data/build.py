"""Training sets, their mapper and their loader, from Detectron2's config keys."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.data.build import load_proposals_into_dataset
from detectron2.utils import comm

from lt_det.frequency import GROUP_NAMES

from .class_statistics import ClassStatistics
from .columns import annotation_columns
from .copy_paste import CopyPasteMapper
from .datasets.register import open_dataset, prepare_dataset, register_from_config, require_dataset
from .mapper import IdentifyingMapper, TrainMapper
from .records import DatasetRecords
from .samplers import build_sampler
from .train_loader import TrainLoader, build_train_loader

__all__ = [
    "build_train_loader_from_config",
    "build_train_mapper",
    "check_num_classes",
    "load_train_dicts",
    "open_datasets",
    "training_frequency_groups",
]

logger = logging.getLogger(__name__)


def load_train_dicts(cfg) -> tuple[DatasetRecords, list[int]]:
    """Open the data sets in ``DATASETS.TRAIN``, after registering those in ``DATASETS.REGISTER``.

    Images are filtered as Detectron2's ``get_detection_dataset_dicts`` does. Data sets in LVIS's and COCO's format are
    mapped (:func:`~lt_det.data.open_dataset`), others are kept as they are.

    Returns:
        Their records in a row, and the number of records of each.

    Raises:
        KeyError, FileNotFoundError, ValueError: an unknown name, missing files, or files that do not fit; the message
            says what to do.
    """
    register_from_config(cfg.DATASETS.get("REGISTER", ()))
    names = list(cfg.DATASETS.TRAIN)
    if not names:
        raise ValueError("DATASETS.TRAIN is empty. Name at least one data set to train on.")
    for name in names:
        require_dataset(name)
        prepare_dataset(name)
    classes = {name: MetadataCatalog.get(name).get("thing_classes") for name in names}
    different = [name for name in names if classes[name] != classes[names[0]]]
    if different:
        raise ValueError(
            "The data sets of DATASETS.TRAIN must have the same classes in the same order, but"
            f" {different[0]!r} has others than {names[0]!r}."
        )
    check_num_classes(cfg, ())  # before minutes of loading
    if cfg.MODEL.LOAD_PROPOSALS:
        files = cfg.DATASETS.PROPOSAL_FILES_TRAIN
        sources = [load_proposals_into_dataset(list(open_dataset(n)), f) for n, f in zip(names, files, strict=True)]
    else:
        sources = [open_dataset(name) for name in names]
    least = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
    parts = [
        _filtered(name, source, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS, least) for name, source in zip(names, sources)
    ]
    records = DatasetRecords.join(parts)
    _log_classes(records, classes[names[0]])
    return records, [len(part) for part in parts]


def open_datasets(names: str | Sequence[str], *, filter_empty: bool = True, min_keypoints: int = 0) -> DatasetRecords:
    """What Detectron2's ``get_detection_dataset_dicts`` does, with data sets that are mapped: for LazyConfig.

    Args:
        names: data sets, registered with Detectron2.
        filter_empty: leave out images without annotations that are not crowds.
        min_keypoints: leave out images with fewer visible keypoints.

    Raises:
        KeyError, FileNotFoundError, ValueError: see :func:`~lt_det.data.open_dataset`; no image is left.
    """
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        prepare_dataset(name)
    records = DatasetRecords.join([_filtered(name, open_dataset(name), filter_empty, min_keypoints) for name in names])
    _log_classes(records, MetadataCatalog.get(names[0]).get("thing_classes"))
    return records


def _filtered(name: str, source: Sequence[dict], filter_empty: bool, min_keypoints: int) -> DatasetRecords:
    part = DatasetRecords([source])
    before = len(part)
    if filter_empty and before and "annotations" in part[0]:
        part = part.with_annotations()
    if min_keypoints > 0:
        part = part.with_keypoints(min_keypoints)
    if len(part) == 0:
        raise ValueError(f"No image of data set {name!r} can be trained on: {before} images, none with annotations.")
    left_out = f", {before - len(part)} left out for having no usable annotation" if before > len(part) else ""
    logger.info(f"{name}: {len(part)} images{left_out}")
    return part


def training_frequency_groups(cfg, dataset_name: str) -> dict[str, list[int]] | None:
    """The groups rare, common and frequent of a test set whose categories have no ``frequency``: those of the training
    set in ``DATASETS.TRAIN``, by its own ``frequency`` or by how many of its images hold a class.

    Args:
        cfg: Detectron2's config; ``DATASETS.{TRAIN, FREQUENCY_THRESHOLDS}``.
        dataset_name: a test set in LVIS's or COCO's format with the classes of the training set.

    Returns:
        Category ids of the test set for each of ``r``, ``c``, ``f``, as ``LongTailLVISEvaluator`` takes them; None
        where the test set states the groups itself, there is no training set, or its classes are others.
    """
    prepare_dataset(dataset_name)
    metadata = MetadataCatalog.get(dataset_name)
    json_file, id_map = metadata.get("json_file"), metadata.get("thing_dataset_id_to_contiguous_id")
    if not cfg.DATASETS.TRAIN or not json_file or not id_map:
        return None
    if ClassStatistics.from_metadata(metadata).frequency is not None:
        return None
    if any(
        MetadataCatalog.get(n).get("thing_classes") not in (None, metadata.thing_classes) for n in cfg.DATASETS.TRAIN
    ):
        return None
    low, high = cfg.DATASETS.FREQUENCY_THRESHOLDS
    statistics = [ClassStatistics.from_metadata(name) for name in cfg.DATASETS.TRAIN]
    if len(statistics) == 1 and statistics[0].frequency is not None:
        groups, source = statistics[0].frequency_groups, "the 'frequency' of"
    else:
        total = sum(s.image_count for s in statistics)
        groups = dataclasses.replace(
            statistics[0], image_count=total, instance_count=None, num_images=None, frequency=None
        ).groups((low, high))
        source = f"the image counts (rare up to {low}, common up to {high}) of"
    category_of = {i: c for c, i in id_map.items()}
    logger.info(
        f"{dataset_name} states no 'frequency': the groups of its classes follow {source} "
        f"{', '.join(cfg.DATASETS.TRAIN)}: " + ", ".join(f"{len(groups[g])} {word}" for g, word in GROUP_NAMES.items())
    )
    return {group: [category_of[i] for i in indices.tolist()] for group, indices in groups.items()}


def _log_classes(records: DatasetRecords, names: Sequence[str] | None) -> None:
    """How many instances the classes have; the list of all is for the log file."""
    _, category, crowd, _ = records.columns()
    counts = np.bincount(category[~crowd], minlength=len(names or ()))
    logger.info(f"{counts.sum()} instances of {np.count_nonzero(counts)} classes in {len(records)} training images")
    if names is not None and len(names) >= len(counts):
        logger.debug("Instances: " + ", ".join(f"{name} {n}" for name, n in zip(names, counts.tolist())))


def check_num_classes(cfg, dataset_dicts: Sequence[Mapping[str, Any]]) -> None:
    """Check that the model has as many classes as the training set.

    Raises:
        ValueError: names the config key and the number it should have.
    """
    key = "MODEL.RETINANET.NUM_CLASSES" if cfg.MODEL.META_ARCHITECTURE == "RetinaNet" else "MODEL.ROI_HEADS.NUM_CLASSES"
    _, section, field = key.split(".")
    configured = cfg.MODEL[section][field]
    name = cfg.DATASETS.TRAIN[0] if len(cfg.DATASETS.TRAIN) else None
    classes = MetadataCatalog.get(name).get("thing_classes") if name else None
    if classes is not None and len(classes) != configured:
        raise ValueError(
            f"{key} is {configured}, but data set {name!r} has {len(classes)} classes. Set {key} to {len(classes)}."
        )
    category = annotation_columns(dataset_dicts).category
    largest = category.max() if category.size else -1
    if largest >= configured:
        raise ValueError(
            f"{key} is {configured}, but the training annotations have class indices up to {largest}. Set {key} to "
            f"{largest + 1 if classes is None else len(classes)}."
        )


def build_train_mapper(cfg, dataset_dicts: Sequence[Mapping[str, Any]], *, identify: bool = False) -> DatasetMapper:
    """The mapper of training images that a config asks for: Detectron2's in less time (:class:`TrainMapper`).

    Detectron2's polygon format cannot take masks that are given as RLE. Where the training set has such masks,
    ``INPUT.MASK_FORMAT`` "polygon" becomes "bitmask", which takes both and gives the same training targets up to the
    rasterisation of polygons. With ``INPUT.COPY_PASTE.ENABLED`` objects are pasted
    (:class:`~lt_det.data.CopyPasteMapper`).

    Args:
        cfg: the config; ``INPUT.COPY_PASTE`` and what ``DatasetMapper`` reads.
        dataset_dicts: the training set.
        identify: give instances their ``gt_ids``, see :class:`IdentifyingMapper`.
    """
    if cfg.MODEL.MASK_ON and cfg.INPUT.MASK_FORMAT == "polygon":
        records = dataset_dicts if hasattr(dataset_dicts, "has_bitmasks") else DatasetRecords([dataset_dicts])
        if records.has_bitmasks:
            logger.info("The training set has masks in RLE form: INPUT.MASK_FORMAT polygon becomes bitmask.")
            cfg = cfg.clone()
            cfg.defrost()
            cfg.INPUT.MASK_FORMAT = "bitmask"
    if cfg.INPUT.COPY_PASTE.ENABLED:
        return CopyPasteMapper(cfg, True, dataset_dicts)
    return (IdentifyingMapper if identify else TrainMapper)(cfg, is_train=True)


def build_train_loader_from_config(
    cfg,
    *,
    seed: int | None = None,
    start_iteration: int = 0,
    sampler_name: str | None = None,
    dataset_dicts: Sequence[Mapping[str, Any]] | None = None,
    dataset_sizes: Sequence[int] | None = None,
    mapper: Callable[[dict], dict | None] | None = None,
) -> TrainLoader:
    """:func:`build_train_loader` from Detectron2's config keys.

    Reads ``DATASETS.{TRAIN, REGISTER}``, ``DATALOADER.{SAMPLER_TRAIN, REPEAT_THRESHOLD, REPEAT_SQRT,
    RANDOM_SUBSET_RATIO, FILTER_EMPTY_ANNOTATIONS, ASPECT_RATIO_GROUPING, NUM_WORKERS}``, ``SOLVER.IMS_PER_BATCH`` and
    what Detectron2's ``DatasetMapper`` reads.

    Args:
        cfg: Detectron2's config.
        seed: not negative and the same on all ranks; by default one is drawn and shared.
        start_iteration: batches to pass over.
        sampler_name: another sampler than ``DATALOADER.SAMPLER_TRAIN``.
        dataset_dicts, dataset_sizes: what :func:`load_train_dicts` gave, where it has been called already.
        mapper: default :func:`~lt_det.data.build_train_mapper`.

    Raises:
        KeyError, FileNotFoundError, ValueError: see :func:`load_train_dicts`, :func:`check_num_classes`,
            :func:`~lt_det.data.build_sampler`.
    """
    if dataset_dicts is None:
        dataset_dicts, dataset_sizes = load_train_dicts(cfg)
    check_num_classes(cfg, dataset_dicts)
    if seed is None:
        seed = comm.shared_random_seed()
    sampler = build_sampler(cfg, dataset_dicts, seed=seed, name=sampler_name, dataset_sizes=dataset_sizes)
    return build_train_loader(
        dataset_dicts,
        mapper if mapper is not None else build_train_mapper(cfg, dataset_dicts),
        sampler,
        total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
        aspect_ratio_grouping=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        seed=seed,
        start_iteration=start_iteration,
    )
