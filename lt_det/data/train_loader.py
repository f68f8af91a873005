"""A train loader that goes on exactly where it stopped.

Detectron2's train loader starts over on resume: another order, other augmentation, and the images waiting in its
aspect-ratio buckets are gone. Here everything follows from a seed and the number of the draw:

- The sampler's stream is replayed, and grouping by aspect ratio works on the sizes in the annotations, so that passing
  over the first iterations reads no image.
- A draw is a position in the stream of all ranks. The mapper runs under random numbers seeded from (seed, draw), so
  that an image is augmented alike for any number of workers, before and after a resume, and, without grouping, for any
  number of ranks.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.utils import comm
from detectron2.utils.serialize import PicklableWrapper
from torch.utils.data import DataLoader, Dataset, Sampler

from lt_det.declaration import checked_options
from lt_det.processes import end_with_parent

from .meta_sampler import MetaSampler
from .records import DatasetRecords
from .samplers import TrainingSampler, sampler_by_name

__all__ = ["TrainLoader", "build_train_loader"]

# A mapper returns None for an image that it cannot use; another one takes its place, chosen this often.
_MAX_REPLACEMENTS = 10


@contextlib.contextmanager
def _seeded(seed: int, draw: int) -> Iterator[None]:
    """Python, numpy and torch CPU random numbers that depend on (seed, draw) alone; restored at the end.

    CUDA's generators are left alone: ``torch.manual_seed`` would reseed them under a model that trains in this process.
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

    The rule is that of Detectron2's ``AspectRatioGroupedDataset``: a batch is handed out as soon as one of two groups,
    wider than high or not, is full.
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

    Holds the list and not the loader that owns it: in a reference cycle, workers would end only when the garbage
    collector comes by, and wait for each other's timeouts then.
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

    ``iteration`` is the number of batches handed out, counting those that were passed over at the start. Iterating
    again goes on from there. A run is resumed by ``start_iteration``, or by :meth:`state_dict` and
    :meth:`load_state_dict`, which a sampler that cannot be replayed needs.
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
        mapper: turns a record into what the model takes, for instance Detectron2's ``DatasetMapper``. It may draw from
            ``random``, ``numpy.random`` and ``torch`` on the CPU, and return None for an image that it cannot use,
            which another image then replaces.
        sampler: a name in ``SAMPLER_REGISTRY``, or what yields indices for this rank, interleaved over ranks as
            Detectron2's and lt_det's samplers do; by default :class:`~lt_det.data.TrainingSampler`.
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
