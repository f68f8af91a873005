"""Training samplers for long tails, and the repeat factors behind them.

Every sampler here produces an infinite stream of image indices that is the same on all ranks, and rank r of W takes the
draws r, r + W, r + 2W, ... of it, as Detectron2's samplers do. Repeat factors are computed with a few numpy operations
over all annotations at once: LVIS v1 takes a fraction of a second (``tools/benchmarks/bench_samplers.py``).

A sampler that :class:`~lt_det.data.TrainLoader` resumes is of one of two kinds. Those here are replayed: the same seed
gives the same stream, so that its first draws are passed over. A sampler whose stream depends on more than the seed
sets ``resumable_by_replay = False`` and has ``state_dict()`` and ``load_state_dict(state)``, and ``iter(sampler)`` goes
on from there.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.utils import comm
from fvcore.common.registry import Registry
from torch.utils.data import Sampler

from lt_det.declaration import checked_options, declared_options, lookup

from .columns import annotation_columns

__all__ = [
    "SAMPLER_REGISTRY",
    "ClassBalancedSampler",
    "InOrderSampler",
    "InstanceAwareRepeatFactorSampler",
    "RandomSubsetTrainingSampler",
    "RepeatFactorTrainingSampler",
    "TrainingSampler",
    "build_sampler",
    "class_balanced_repeat_factors",
    "expected_counts",
    "instance_aware_repeat_factors",
    "repeat_factors_from_category_frequency",
    "sampler_by_name",
    "samplers_with_options",
]

logger = logging.getLogger(__name__)

SAMPLER_REGISTRY = Registry("SAMPLER")
SAMPLER_REGISTRY.__doc__ = """
Samplers by ``DATALOADER.SAMPLER_TRAIN``. An entry is a class with a classmethod
``from_records(dataset_dicts, *, seed, **options)``. The arguments with a default are its options: they become keys of
``DATALOADER``, which samplers share, and ``sampler_options`` of ``build_train_loader``. One that needs more of a yaml
config has a classmethod ``from_config(cfg, dataset_dicts, *, seed, dataset_sizes)``, or is a function of that form.
``dataset_dicts`` is the concatenation of the data sets in ``DATASETS.TRAIN``, whose lengths are ``dataset_sizes``;
``seed`` is the same on all ranks.
"""


# ------------------------------------------------------------------------------------------ repeat factors


class _Presence(NamedTuple):
    """Which category occurs in which image, each pair once, ordered by image."""

    image: np.ndarray  # int64 (P,)
    category: np.ndarray  # int64 (P,)
    image_count: np.ndarray  # int64 (C,): images per category
    instance_count: np.ndarray  # int64 (C,)
    num_images: int


def _presence(dataset_dicts: Sequence[Mapping[str, Any]]) -> _Presence:
    image, category, _, num_images = annotation_columns(dataset_dicts)
    if num_images == 0:
        raise ValueError("The data set is empty: repeat factors need at least one image.")
    size = int(category.max()) + 1 if category.size else 1
    pairs = np.sort(image.astype(np.int64) * size + category, kind="stable")  # the images are in order already
    image, present = np.divmod(pairs[np.diff(pairs, prepend=-1) > 0], size)
    return _Presence(
        image,
        present,
        np.bincount(present, minlength=size),
        np.bincount(category, minlength=size),
        num_images,
    )


def _max_over_image(presence: _Presence, category_factor: np.ndarray, empty: float) -> np.ndarray:
    """``(num_images,)``: largest factor of the categories in an image; ``empty`` where there is none."""
    factors = np.full(presence.num_images, empty, dtype=np.float64)
    if presence.image.size:
        starts = np.flatnonzero(np.diff(presence.image, prepend=-1))
        factors[presence.image[starts]] = np.maximum.reduceat(category_factor[presence.category], starts)
    return factors


def _threshold_factors(frequency: np.ndarray, repeat_thresh: float, sqrt: bool) -> np.ndarray:
    """max(1, sqrt(t / f)) per category. Categories that do not occur get 1; no image asks for them."""
    if not (np.isfinite(repeat_thresh) and repeat_thresh >= 0):
        raise ValueError(
            f"The repeat threshold (DATALOADER.REPEAT_THRESHOLD) must be finite and not negative, got {repeat_thresh}."
        )
    ratio = np.divide(repeat_thresh, frequency, out=np.ones_like(frequency), where=frequency > 0)
    return np.maximum(1.0, np.sqrt(ratio) if sqrt else ratio)


def repeat_factors_from_category_frequency(
    dataset_dicts: Sequence[Mapping[str, Any]], repeat_thresh: float, sqrt: bool = True
) -> torch.Tensor:
    """Repeat factor sampling: r(I) = max over c in I of max(1, sqrt(t / f(c))).

    ``f(c)`` is the fraction of images that contain category c. Same result as Detectron2's
    ``RepeatFactorTrainingSampler.repeat_factors_from_category_frequency``, without its loops. Source: Gupta et al.,
    LVIS, CVPR 2019, appendix B.2.

    Args:
        dataset_dicts: N records in Detectron2's format; ``annotations`` may be empty or absent.
        repeat_thresh: t, 0.001 for LVIS. Images are repeated for categories below this frequency.
        sqrt: take the square root, as the paper does.

    Returns:
        float32 ``(N,)``, at least 1; exactly 1 for images without annotations.
    """
    presence = _presence(dataset_dicts)
    factors = _threshold_factors(presence.image_count / presence.num_images, repeat_thresh, sqrt)
    return torch.from_numpy(_max_over_image(presence, factors, empty=1.0)).float()


def instance_aware_repeat_factors(
    dataset_dicts: Sequence[Mapping[str, Any]], repeat_thresh: float, sqrt: bool = True
) -> torch.Tensor:
    """Instance-aware repeat factors (IRFS): repeat factors with f(c) = sqrt(f_image(c) * f_instance(c)).

    ``f_image(c)`` is the fraction of images that contain c, ``f_instance(c)`` the fraction of instances that are of c.
    Source: Yaman et al., Instance-Aware Repeat Factor Sampling for Long-Tailed Object Detection, 2023 (arXiv
    2305.08069), geometric mean, t = 0.001 on LVIS.

    Args and returns as :func:`repeat_factors_from_category_frequency`.
    """
    presence = _presence(dataset_dicts)
    image_frequency = presence.image_count / presence.num_images
    instance_frequency = presence.instance_count / max(1, presence.instance_count.sum())
    factors = _threshold_factors(np.sqrt(image_frequency * instance_frequency), repeat_thresh, sqrt)
    return torch.from_numpy(_max_over_image(presence, factors, empty=1.0)).float()


def class_balanced_repeat_factors(
    dataset_dicts: Sequence[Mapping[str, Any]], *, normalize: bool = True
) -> torch.Tensor:
    """Class-balanced sampling as in BALMS: r(I) proportional to max over c in I of 1 / f(c).

    Source: Ren et al., NeurIPS 2020, and its official code for LVIS. There the factors are used as they are, which
    makes an epoch of LVIS tens of millions of draws long. Here they are scaled so that an epoch has as many draws as
    there are images, in expectation. Factors below 1 are rounded to 0 or 1 at random like every fractional part, so
    that images are drawn in the same proportions.

    Args:
        dataset_dicts: N records in Detectron2's format. Images without annotations, which the official code does not
            allow, count like images that hold but a class that is in every image.
        normalize: scale to a mean of 1; False gives the official code's factors.

    Returns:
        float32 ``(N,)``, positive.
    """
    presence = _presence(dataset_dicts)
    frequency = presence.image_count / presence.num_images
    inverse = np.divide(1.0, frequency, out=np.ones_like(frequency), where=frequency > 0)
    factors = _max_over_image(presence, inverse, empty=1.0)
    if normalize:
        factors /= factors.mean()
    return torch.from_numpy(factors).float()


def expected_counts(
    dataset_dicts: Sequence[Mapping[str, Any]],
    num_classes: int,
    repeat_factors: Any | None = None,
) -> np.ndarray:
    """Expected number of instances of each class in an epoch under given repeat factors.

    What the classifier sees of each class, and so the prior ``sampled``:
    ``statistics.with_sampled_counts(expected_counts(dicts, K, sampler.repeat_factors))``. Crowd regions do not
    count, since they never become training instances.

    Args:
        dataset_dicts: N records in Detectron2's format.
        num_classes: K.
        repeat_factors: ``(N,)``, or None for one draw of each image.

    Returns:
        float64 ``(K,)``.

    Raises:
        ValueError: a category id is not below K, or the lengths disagree.
    """
    image, category, crowd, num_images = annotation_columns(dataset_dicts)
    image, category = image[~crowd], category[~crowd]
    if category.size and category.max() >= num_classes:
        raise ValueError(f"The annotations have category_id {category.max()}, but there are {num_classes} classes.")
    if repeat_factors is None:
        weights = None
    else:
        weights = np.asarray(repeat_factors, dtype=np.float64)
        if weights.shape != (num_images,):
            raise ValueError(f"{num_images} images need as many repeat factors, got shape {weights.shape}.")
        weights = weights[image]
    return np.bincount(category, weights=weights, minlength=num_classes).astype(np.float64)


# ------------------------------------------------------------------------------------------ samplers


class _EpochSampler(Sampler):
    """Infinite stream made of epochs, sharded over ranks by taking every W-th draw."""

    made_by = "from_records"
    shared_arguments = ("seed",)
    resumable_by_replay = True
    repeat_factors: torch.Tensor | None = None  # None: every image once an epoch

    def __init__(self, shuffle: bool, seed: int | None):
        self._shuffle = shuffle
        self._seed = int(comm.shared_random_seed() if seed is None else seed)
        self._rank = comm.get_rank()
        self._world_size = comm.get_world_size()

    def __iter__(self) -> Iterator[int]:
        yield from itertools.islice(self._infinite_indices(), self._rank, None, self._world_size)

    def _epoch(self, generator: torch.Generator) -> torch.Tensor:
        """Indices of one epoch, before shuffling."""
        raise NotImplementedError

    def _infinite_indices(self) -> Iterator[int]:
        """The stream of all ranks together."""
        generator = torch.Generator()
        generator.manual_seed(self._seed)
        while True:
            indices = self._epoch(generator)
            if self._shuffle:
                indices = indices[torch.randperm(len(indices), generator=generator)]
            yield from indices.tolist()


def _check_size(name: str, size: int) -> int:
    if not isinstance(size, int) or isinstance(size, bool) or size <= 0:
        raise ValueError(f"{name}(size=) expects a positive int, the number of images; got {size!r}.")
    return size


@SAMPLER_REGISTRY.register()
class TrainingSampler(_EpochSampler):
    """Every image once an epoch; the same stream as Detectron2's sampler of this name for the same seed.

    Args:
        size: number of images.
        shuffle: a new order in every epoch.
        seed: must agree on all ranks; by default one is drawn and shared.
    """

    def __init__(self, size: int, shuffle: bool = True, seed: int | None = None):
        super().__init__(shuffle, seed)
        self._size = _check_size("TrainingSampler", size)

    def _epoch(self, generator: torch.Generator) -> torch.Tensor:
        return torch.arange(self._size)

    @classmethod
    def from_records(cls, dataset_dicts, *, seed=None):
        """The sampler of a data set."""
        return cls(len(dataset_dicts), seed=seed)


@SAMPLER_REGISTRY.register()
class RandomSubsetTrainingSampler(_EpochSampler):
    """A random subset of the images, fixed for the run (``DATALOADER.RANDOM_SUBSET_RATIO``).

    The same stream as Detectron2's sampler of this name for the same seeds. ``repeat_factors`` is 1 for the images of
    the subset and 0 for the others.

    Args:
        size: number of images.
        subset_ratio: in (0, 1].
        shuffle: a new order in every epoch.
        seed_shuffle, seed_subset: must agree on all ranks; by default they are drawn and shared.
    """

    def __init__(
        self,
        size: int,
        subset_ratio: float,
        shuffle: bool = True,
        seed_shuffle: int | None = None,
        seed_subset: int | None = None,
    ):
        super().__init__(shuffle, seed_shuffle)
        _check_size("RandomSubsetTrainingSampler", size)
        count = int(size * subset_ratio)
        if not (0.0 < subset_ratio <= 1.0 and count > 0):
            raise ValueError(
                f"DATALOADER.RANDOM_SUBSET_RATIO must be in (0, 1] and leave at least one of the {size}"
                f" images, got {subset_ratio}."
            )
        generator = torch.Generator()
        generator.manual_seed(int(comm.shared_random_seed() if seed_subset is None else seed_subset))
        self._subset = torch.randperm(size, generator=generator)[:count]
        self.repeat_factors = torch.zeros(size)
        self.repeat_factors[self._subset] = 1.0

    def _epoch(self, generator: torch.Generator) -> torch.Tensor:
        return self._subset

    @classmethod
    def from_records(cls, dataset_dicts, *, random_subset_ratio: float = 1.0, seed=None):
        """The sampler of a data set.

        Args:
            random_subset_ratio: share of the images, in (0, 1].
        """
        seed = int(comm.shared_random_seed() if seed is None else seed)
        # The subset belongs to the run as the order does, and another stream of numbers than the order's.
        return cls(len(dataset_dicts), random_subset_ratio, seed_shuffle=seed, seed_subset=seed + 1)


@SAMPLER_REGISTRY.register()
class RepeatFactorTrainingSampler(_EpochSampler):
    """Image i is drawn ``repeat_factors[i]`` times an epoch in expectation.

    Fractional parts are rounded up or down at random in every epoch. The same stream as Detectron2's sampler of this
    name for the same seed; an epoch of LVIS v1 is laid out in milliseconds.

    Args:
        repeat_factors: ``(N,)`` floats, not negative, for instance from :func:`repeat_factors_from_category_frequency`.
        shuffle: a new order in every epoch.
        seed: must agree on all ranks; by default one is drawn and shared.
    """

    factors_of = staticmethod(repeat_factors_from_category_frequency)

    def __init__(self, repeat_factors: Any, *, shuffle: bool = True, seed: int | None = None):
        super().__init__(shuffle, seed)
        factors = torch.as_tensor(repeat_factors, dtype=torch.float32)
        if factors.ndim != 1 or len(factors) == 0:
            raise ValueError(f"repeat_factors has shape {tuple(factors.shape)}; one factor per image is needed.")
        if not bool(torch.isfinite(factors).all()) or bool((factors < 0).any()) or not bool(factors.sum() > 0):
            raise ValueError("repeat_factors must be finite, not negative, and not all zero.")
        self.repeat_factors = factors
        self._whole = torch.trunc(factors)
        self._fraction = factors - self._whole

    def _epoch(self, generator: torch.Generator) -> torch.Tensor:
        # Stochastic rounding: an image of factor 1.3 comes twice in three epochs of ten.
        up = torch.rand(len(self._fraction), generator=generator) < self._fraction
        repeats = (self._whole + up.float()).long()
        return torch.repeat_interleave(torch.arange(len(repeats)), repeats)

    @classmethod
    def from_records(cls, dataset_dicts, *, repeat_threshold: float = 0.0, repeat_sqrt: bool = True, seed=None):
        """The sampler of a data set, by its repeat factors.

        Args:
            repeat_threshold: images are repeated for classes in a smaller share of the images than this; LVIS: 0.001.
            repeat_sqrt: repeat by the square root of threshold over share, as LVIS does.
        """
        return cls(_repeat_factors(cls.factors_of, dataset_dicts, repeat_threshold, repeat_sqrt), seed=seed)


class InOrderSampler(Sampler):
    """Each image once, in order: for a pass over a data set, not registered for training.

    Image i goes to rank i modulo the number of ranks. All ranks have the same number of whole batches, so that they can
    gather after each: what is missing at the end is filled up with a repeated image.

    Attributes:
        count: images of this rank without those that fill up; they come first.
    """

    def __init__(self, size: int, batch_size: int):
        """
        Args:
            size: number of images.
            batch_size: images in a batch of this rank.
        """
        ranks = comm.get_world_size()
        mine = list(range(comm.get_rank(), size, ranks))
        self.count = len(mine)
        batches = -(-size // (ranks * batch_size))
        self._indices = mine + [mine[-1] if mine else 0] * (batches * batch_size - len(mine))

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)


def _repeat_factors(compute, dataset_dicts, threshold: float, sqrt: bool) -> torch.Tensor:
    if threshold <= 0:
        logger.warning(
            f"The sampler repeats images, but the repeat threshold (DATALOADER.REPEAT_THRESHOLD) is {threshold}, so no "
            "image is repeated. LVIS uses 0.001."
        )
    factors = compute(dataset_dicts, threshold, sqrt=sqrt)
    repeated = int((factors > 1).sum())
    text = f"mean {factors.mean():.3f}, largest {factors.max():.2f}"
    if threshold > 0 and not repeated:
        text = (
            f"DATALOADER.REPEAT_THRESHOLD {threshold:g} is below the share of every class; lt-det inspect advises one"
        )
    logger.info(f"Repeat factors: {repeated} of {len(factors)} images are repeated, {text}")
    return factors


@SAMPLER_REGISTRY.register()
class InstanceAwareRepeatFactorSampler(RepeatFactorTrainingSampler):
    """Repeat factors from image and instance frequencies: :func:`instance_aware_repeat_factors`."""

    factors_of = staticmethod(instance_aware_repeat_factors)


@SAMPLER_REGISTRY.register()
class ClassBalancedSampler(RepeatFactorTrainingSampler):
    """BALMS's class-balanced sampling: :func:`class_balanced_repeat_factors`."""

    @classmethod
    def from_records(cls, dataset_dicts, *, seed=None):
        """The sampler of a data set, by its repeat factors."""
        return cls(class_balanced_repeat_factors(dataset_dicts), seed=seed)


def _dataset_weights(cfg, dataset_sizes: Sequence[int]) -> torch.Tensor:
    """``DATASETS.TRAIN_REPEAT_FACTOR``, a list of (name, factor), spread over the images. Others have 1."""
    names = list(cfg.DATASETS.TRAIN)
    factors = dict(cfg.DATASETS.TRAIN_REPEAT_FACTOR)
    unknown = sorted(set(factors) - set(names))
    if unknown:
        raise ValueError(f"DATASETS.TRAIN_REPEAT_FACTOR names data sets that DATASETS.TRAIN has not: {unknown}.")
    if dataset_sizes is None or len(dataset_sizes) != len(names):
        raise ValueError(
            f"{cfg.DATALOADER.SAMPLER_TRAIN} needs the size of each data set of DATASETS.TRAIN; leave it to "
            "build_train_loader_from_config to load them."
        )
    return torch.cat([torch.full((n,), float(factors.get(k, 1))) for k, n in zip(names, dataset_sizes)])


@SAMPLER_REGISTRY.register()
def WeightedTrainingSampler(cfg, dataset_dicts, *, seed, dataset_sizes=None):
    """Detectron2's sampler of this name: whole data sets repeated by ``DATASETS.TRAIN_REPEAT_FACTOR``."""
    return RepeatFactorTrainingSampler(_dataset_weights(cfg, dataset_sizes), seed=seed)


@SAMPLER_REGISTRY.register()
def WeightedCategoryTrainingSampler(cfg, dataset_dicts, *, seed, dataset_sizes=None):
    """Detectron2's sampler of this name: repeat factors within each data set, times the data set's own."""
    weights = _dataset_weights(cfg, dataset_sizes)
    ends = list(itertools.accumulate(dataset_sizes))
    parts = [dataset_dicts[end - n : end] for end, n in zip(ends, dataset_sizes)]
    options = options_in_config(RepeatFactorTrainingSampler, cfg)
    threshold, sqrt = options["repeat_threshold"], options.get("repeat_sqrt", True)
    compute = repeat_factors_from_category_frequency
    factors = torch.cat([_repeat_factors(compute, part, threshold, sqrt) for part in parts]) * weights
    return RepeatFactorTrainingSampler(factors / factors.min(), seed=seed)


def samplers_with_options() -> list[tuple[str, type]]:
    """The samplers of ``SAMPLER_REGISTRY`` that are made of a data set and options, by name."""
    return [(name, entry) for name, entry in SAMPLER_REGISTRY if hasattr(entry, "from_records")]


def options_in_config(sampler: type, cfg) -> dict[str, Any]:
    """The options of a sampler in ``DATALOADER``. An older Detectron2 lacks some keys: their defaults hold then."""
    keys = {option.name: option.key for option in declared_options(sampler)}
    return {name: cfg.DATALOADER[key] for name, key in keys.items() if key in cfg.DATALOADER}


def build_sampler(
    cfg,
    dataset_dicts: Sequence[Mapping[str, Any]],
    *,
    seed: int | None = None,
    name: str | None = None,
    dataset_sizes: Sequence[int] | None = None,
) -> Sampler:
    """Build the sampler ``name``, by default ``DATALOADER.SAMPLER_TRAIN``.

    Args:
        cfg: Detectron2's config.
        dataset_dicts: the training set.
        seed: must agree on all ranks; by default one is drawn and shared.
        dataset_sizes: lengths of the data sets that make up ``dataset_dicts``, in the order of ``DATASETS.TRAIN``; only
            the ``Weighted...`` samplers need it.

    Raises:
        ValueError: no sampler of this name; the message has the closest one and lists those there are.
    """
    name = name or cfg.DATALOADER.SAMPLER_TRAIN
    entry = lookup(SAMPLER_REGISTRY, name, "DATALOADER.SAMPLER_TRAIN")
    seed = int(comm.shared_random_seed() if seed is None else seed)
    logger.info(f"Training sampler: {name}")
    if hasattr(entry, "from_records") and not hasattr(entry, "from_config"):
        return entry.from_records(dataset_dicts, seed=seed, **options_in_config(entry, cfg))
    return getattr(entry, "from_config", entry)(cfg, dataset_dicts, seed=seed, dataset_sizes=dataset_sizes)


def sampler_by_name(
    name: str, dataset_dicts: Sequence[Mapping[str, Any]], *, seed: int | None = None, **options: Any
) -> Sampler:
    """A sampler of ``SAMPLER_REGISTRY``, as :func:`~lt_det.data.build_train_loader` makes it of a name.

    Args:
        name: as ``DATALOADER.SAMPLER_TRAIN`` takes it.
        dataset_dicts: the training set.
        seed: must agree on all ranks; by default one is drawn and shared.
        options: of the sampler, named as the keys of ``DATALOADER`` are, in lower case.

    Raises:
        ValueError: no sampler of this name, one that follows the run, which its loader must make, or one that reads a
            yaml config; an option that it does not have.
    """
    entry = lookup(SAMPLER_REGISTRY, name, "the sampler")
    if not getattr(entry, "resumable_by_replay", True):
        raise ValueError(
            f"The sampler {name} follows what the meta step of a run learns, and has no stream of its own."
        )
    if not hasattr(entry, "from_records"):
        raise ValueError(f"The sampler {name} reads a yaml config: make it by build_sampler(cfg, ...)")
    return entry.from_records(
        dataset_dicts, seed=seed, **checked_options(entry, options, "options of the sampler", show=str)
    )
