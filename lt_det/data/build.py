"""A train loader that goes on exactly where it stopped.

Detectron2's train loader starts over on resume: another order, other augmentation, and the images waiting
in its aspect-ratio buckets are gone. Here everything follows from a seed and the number of the draw:

- The sampler's stream is replayed, and grouping by aspect ratio works on the sizes in the annotations, so
  that passing over the first iterations reads no image.
- A draw is a position in the stream of all ranks. The mapper runs under random numbers seeded from
  (seed, draw), so that an image is augmented alike for any number of workers, before and after a resume,
  and, without grouping, for any number of ranks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.data.build import load_proposals_into_dataset
from detectron2.utils import comm
from detectron2.utils.serialize import PicklableWrapper
from torch.utils.data import DataLoader, Dataset, Sampler

from lt_det.declaration import checked_options
from lt_det.frequency import GROUP_NAMES
from lt_det.processes import end_with_parent

from .class_statistics import ClassStatistics
from .columns import annotation_columns
from .copy_paste import CopyPasteMapper
from .datasets.register import open_dataset, prepare_dataset, register_from_config, require_dataset
from .mapper import IdentifyingMapper, TrainMapper
from .meta_sampler import MetaSampler
from .records import DatasetRecords
from .samplers import TrainingSampler, build_sampler, sampler_by_name

__all__ = [
    "TrainLoader",
    "build_train_loader",
    "build_train_loader_from_config",
    "build_train_mapper",
    "check_num_classes",
    "load_train_dicts",
    "open_datasets",
    "training_frequency_groups",
]

logger = logging.getLogger(__name__)

# A mapper returns None for an image that it cannot use; another one takes its place, chosen this often.
_MAX_REPLACEMENTS = 10


@contextlib.contextmanager
def _seeded(seed: int, draw: int) -> Iterator[None]:
    """Python, numpy and torch CPU random numbers that depend on (seed, draw) alone; restored at the end.

    CUDA's generators are left alone: ``torch.manual_seed`` would reseed them under a model that trains in
    this process.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    torch_generator = torch.random.default_generator
    torch_state = torch_generator.get_state()
    words = np.random.SeedSequence(entropy=seed, spawn_key=(draw,)).generate_state(4, np.uint32)
    random.seed(words.tobytes())
    np.random.seed(words)
    torch_generator.manual_seed((int(words[2]) << 31) ^ int(words[3]))
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch_generator.set_state(torch_state)


class _MappedDraws(Dataset):
    """Maps ``(draw, index)`` to what the mapper makes of the record at that index."""

    def __init__(self, records: Dataset, mapper: Callable[[dict], dict | None], seed: int):
        self.records = records
        self._mapper = PicklableWrapper(mapper)  # lets lambdas reach workers that are spawned
        self._seed = seed

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, item: tuple[int, int]) -> dict:
        draw, index = item
        with _seeded(self._seed, draw):
            tried = []
            for _ in range(1 + _MAX_REPLACEMENTS):
                sample = self._mapper(self.records[index])
                if sample is not None:
                    return sample
                tried.append(index)
                index = random.randrange(len(self.records))
        raise RuntimeError(
            f"The mapper returned None for {len(tried)} images in a row (indices {tried}). Check the mapper,"
            " and that the images can be read."
        )


class _BatchDraws(Sampler):
    """Batches of ``(draw, index)`` for one rank, grouped by aspect ratio if ``wide`` is given.

    The rule is that of Detectron2's ``AspectRatioGroupedDataset``: a batch is handed out as soon as one of
    two groups, wider than high or not, is full.
    """

    def __init__(
        self,
        sampler: Sampler,
        batch_size: int,
        wide: np.ndarray | None,
        rank: int,
        world_size: int,
    ):
        self.sampler = sampler
        self.batch_size = batch_size
        self.wide = wide
        self.rank = rank
        self.world_size = world_size
        self.skip = 0  # batches to pass over at the next start
        self.position = 0  # draws taken on this rank
        self.buckets: tuple[list, list] = ([], [])
        self.pending: list[list] = []  # batches drawn but not yet trained on, of an earlier run

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        if getattr(self.sampler, "resumable_by_replay", True):
            self.position, self.buckets = 0, ([], [])
            batches = self._batches()
            for _ in range(self.skip):
                next(batches, None)
            yield from batches
        else:
            pending, self.pending = self.pending, []
            yield from pending
            yield from self._batches()

    def _batches(self) -> Iterator[list[tuple[int, int]]]:
        for index in self.sampler:
            bucket = self.buckets[0 if self.wide is not None and self.wide[index] else 1]
            bucket.append((self.rank + self.position * self.world_size, int(index)))
            self.position += 1
            if len(bucket) == self.batch_size:
                batch = bucket[:]
                bucket.clear()
                yield batch


class _Recorded(Sampler):
    """Notes each batch that the loader draws, until the train loop receives it.

    Holds the list and not the loader that owns it: in a reference cycle, workers would end only when the
    garbage collector comes by, and wait for each other's timeouts then.
    """

    def __init__(self, batches: _BatchDraws, outstanding: list[list]):
        self._batches = batches
        self._outstanding = outstanding

    def __iter__(self) -> Iterator[list]:
        for batch in self._batches:
            self._outstanding.append(batch)
            yield batch


def _identity(batch: list) -> list:
    return batch


class _SeedWorker:
    """Gives code outside of a draw distinct random numbers in each worker."""

    def __init__(self, seed: int, rank: int):
        self._key = (seed, rank)

    def __call__(self, worker: int) -> None:
        seed, rank = self._key
        words = np.random.SeedSequence(entropy=seed, spawn_key=(rank, worker, 0)).generate_state(4, np.uint32)
        random.seed(words.tobytes())
        np.random.seed(words)
        torch.random.default_generator.manual_seed(int(words[0]))
        end_with_parent()


class TrainLoader:
    """Infinite iterable of batches, each a list of what the mapper returns; see :func:`build_train_loader`.

    ``iteration`` is the number of batches handed out, counting those that were passed over at the start.
    Iterating again goes on from there. A run is resumed by ``start_iteration``, or by :meth:`state_dict`
    and :meth:`load_state_dict`, which a sampler that cannot be replayed needs.
    """

    def __init__(
        self,
        dataset: Dataset,
        batches: _BatchDraws,
        *,
        seed: int,
        start_iteration: int,
        num_workers: int,
        prefetch_factor: int,
        pin_memory: bool,
    ):
        self._batches = batches
        self.iteration = start_iteration
        # The loader draws a seed for its workers at every start. With a generator of its own, that leaves
        # the random numbers of the training process as they are.
        generator = torch.Generator()
        generator.manual_seed(seed)
        workers = {}
        if num_workers > 0:
            workers = {"prefetch_factor": prefetch_factor, "persistent_workers": True}
        self._outstanding: list[list] = []  # batches drawn by the loader and not yet handed out
        self._loader = DataLoader(
            dataset,
            batch_sampler=_Recorded(batches, self._outstanding),
            num_workers=num_workers,
            collate_fn=_identity,
            worker_init_fn=_SeedWorker(seed, batches.rank),
            generator=generator,
            pin_memory=pin_memory,
            **workers,
        )

    @property
    def sampler(self) -> Sampler:
        """The sampler whose stream is loaded."""
        return self._batches.sampler

    @property
    def records(self) -> Sequence[Mapping[str, Any]]:
        """The training set in Detectron2's format; each access makes a record anew from its serialised form."""
        return self._loader.dataset.records

    @property
    def batch_size(self) -> int:
        """Images per batch on this rank."""
        return self._batches.batch_size

    def __iter__(self) -> Iterator[list[dict]]:
        if not self._by_replay:
            self._batches.pending = self._outstanding[:]
        self._outstanding.clear()
        self._batches.skip = self.iteration
        for batch in self._loader:
            # Counted before it is handed out: what the caller has received is done with.
            self.iteration += 1
            del self._outstanding[0]
            yield batch

    @property
    def _by_replay(self) -> bool:
        return getattr(self.sampler, "resumable_by_replay", True)

    def state_dict(self) -> dict:
        """What :meth:`load_state_dict` needs. Sizes and samplers must be the same then; workers need not."""
        state: dict[str, Any] = {"iteration": self.iteration}
        if not self._by_replay:
            state["sampler"] = self.sampler.state_dict()
            state["position"] = self._batches.position
            state["buckets"] = [list(bucket) for bucket in self._batches.buckets]
            state["pending"] = [list(batch) for batch in self._outstanding]
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the batches that the state's loader had handed out; call it before iterating."""
        self.iteration = int(state["iteration"])
        if not self._by_replay:
            self.sampler.load_state_dict(state["sampler"])
            self._batches.position = int(state["position"])
            self._batches.buckets = tuple([tuple(d) for d in bucket] for bucket in state["buckets"])
            self._outstanding[:] = [[tuple(d) for d in batch] for batch in state["pending"]]


def build_train_loader(
    dataset_dicts: Sequence[Mapping[str, Any]],
    mapper: Callable[[dict], dict | None],
    sampler: Sampler | str | None = None,
    *,
    sampler_options: Mapping[str, Any] | None = None,
    total_batch_size: int,
    aspect_ratio_grouping: bool = True,
    num_workers: int = 0,
    seed: int | None = None,
    start_iteration: int = 0,
    prefetch_factor: int = 2,
    pin_memory: bool = False,
) -> TrainLoader:
    """Build a train loader that gives the same batches whether or not it was interrupted.

    Usable from yaml (through :func:`build_train_loader_from_config`) and from LazyConfig.

    Args:
        dataset_dicts: the training set in Detectron2's format, as :func:`load_train_dicts` gives it (mapped), or a list
            (kept serialised); workers share it.
        mapper: turns a record into what the model takes, for instance Detectron2's ``DatasetMapper``. It may
            draw from ``random``, ``numpy.random`` and ``torch`` on the CPU, and return None for an image
            that it cannot use, which another image then replaces.
        sampler: a name in ``SAMPLER_REGISTRY``, or what yields indices for this rank, interleaved over ranks
            as Detectron2's and lt_det's samplers do; by default :class:`~lt_det.data.TrainingSampler`.
        sampler_options: with a name, the sampler's options, see :func:`~lt_det.data.sampler_by_name`; of "MetaSampler"
            ``num_classes`` too.
        total_batch_size: images per batch over all ranks; a multiple of their number.
        aspect_ratio_grouping: batches of images that are all wider than high, or all not.
        num_workers: processes that load images; 0 loads in this process.
        seed: not negative and the same on all ranks; by default one is drawn and shared.
        start_iteration: batches to pass over; no image of theirs is read.
        prefetch_factor: batches that each worker loads ahead.
        pin_memory: put image tensors into page-locked memory.

    Returns:
        A :class:`TrainLoader`: an iterable of ``list[dict]``, infinite if the sampler is.

    Raises:
        ValueError: sizes that do not fit, or records without the width and height that grouping needs.
    """
    if len(dataset_dicts) == 0:
        raise ValueError("The training set is empty. Check DATASETS.TRAIN and DATALOADER.FILTER_EMPTY_ANNOTATIONS.")
    world_size = comm.get_world_size()
    if total_batch_size <= 0 or total_batch_size % world_size:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH ({total_batch_size}) must be a positive multiple of the number of "
            f"processes ({world_size})."
        )
    if start_iteration < 0:
        raise ValueError(f"start_iteration must not be negative, got {start_iteration}.")
    seed = int(comm.shared_random_seed() if seed is None else seed)
    if seed < 0:
        raise ValueError(f"The loader's seed must not be negative, got {seed}.")
    if sampler == "MetaSampler":
        options = dict(sampler_options or {})
        run = {"batch_size": total_batch_size, "loaded_ahead": num_workers * prefetch_factor, "seed": seed}
        run["num_classes"] = options.pop("num_classes", None)
        options = checked_options(MetaSampler, options, "options of the sampler", show=str)
        sampler = MetaSampler.from_records(dataset_dicts, **run, **options)
    elif isinstance(sampler, str):
        sampler = sampler_by_name(sampler, dataset_dicts, seed=seed, **(sampler_options or {}))
    elif sampler_options:
        raise ValueError(
            "sampler_options are for a sampler that is given by its name; for one of your own set them to None"
            " (in a LazyConfig: dataloader.train.sampler_options = None)."
        )
    if sampler is None:
        sampler = TrainingSampler(len(dataset_dicts), seed=seed)
    if start_iteration and not getattr(sampler, "resumable_by_replay", True):
        raise ValueError(
            f"{type(sampler).__name__} cannot be replayed, so start_iteration must be 0; resume it with "
            "TrainLoader.load_state_dict."
        )
    wide = None
    if not hasattr(dataset_dicts, "image_sizes"):
        dataset_dicts = DatasetRecords([dataset_dicts])
    if aspect_ratio_grouping:
        try:
            width, height = dataset_dicts.image_sizes().T
        except ValueError as error:
            raise ValueError(
                f"{error} Batches are grouped by them: add them to the data set, or set "
                "DATALOADER.ASPECT_RATIO_GROUPING to False."
            ) from error
        wide = width > height
    batches = _BatchDraws(sampler, total_batch_size // world_size, wide, comm.get_rank(), world_size)
    dataset = _MappedDraws(dataset_dicts, mapper, seed)
    return TrainLoader(
        dataset,
        batches,
        seed=seed,
        start_iteration=start_iteration,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor,
        pin_memory=pin_memory,
    )


def load_train_dicts(cfg) -> tuple[DatasetRecords, list[int]]:
    """Open the data sets in ``DATASETS.TRAIN``, after registering those in ``DATASETS.REGISTER``.

    Images are filtered as Detectron2's ``get_detection_dataset_dicts`` does. Data sets in LVIS's and COCO's format are
    mapped (:func:`~lt_det.data.open_dataset`), others are kept as they are.

    Returns:
        Their records in a row, and the number of records of each.

    Raises:
        KeyError, FileNotFoundError, ValueError: an unknown name, missing files, or files that do not fit;
            the message says what to do.
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
    RANDOM_SUBSET_RATIO, FILTER_EMPTY_ANNOTATIONS, ASPECT_RATIO_GROUPING, NUM_WORKERS}``,
    ``SOLVER.IMS_PER_BATCH`` and what Detectron2's ``DatasetMapper`` reads.

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
