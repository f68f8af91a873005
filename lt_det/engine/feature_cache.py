"""RoI features of the training set on disk, for stage 2 of decoupled training.

The trunk is frozen in stage 2, so what the classifier sees of an image changes only with the augmentation and the
sampled RoIs. The cache fixes both: each image is augmented and its RoIs are sampled ONCE, their features are stored in
half precision, and the iterations of stage 2 read them instead of images. Images are drawn by the training sampler as
ever.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.utils import comm

from lt_det.data import DatasetRecords, RecordPositions, pass_over
from lt_det.io import cache_root, write_json_atomically
from lt_det.modeling import DecoupledClassifier, box_predictors

__all__ = ["FeatureCache", "cache_key", "cached_records", "open_feature_cache"]

logger = logging.getLogger(__name__)

_VERSION = 2  # of the files; a part of the folder's name
_DAY = 24 * 3600
_ARRAYS = ("offsets", "classes", "features", "checksums")


def _checksum(features: np.ndarray, classes: np.ndarray) -> int:
    """Checksum of an image's rows as they are stored; compared whenever they are read."""
    return zlib.crc32(np.ascontiguousarray(classes), zlib.crc32(np.ascontiguousarray(features)))


@dataclass(frozen=True)
class FeatureCache:
    """A finished cache. Called with a record of :func:`cached_records`, gives what ``DecoupledClassifier`` takes; so it
    stands in for the dataset mapper.

    Attributes:
        folder: holds ``cache.json`` and, for each process that wrote,
            ``shard<k>_<classifier>_{offsets,classes,features,checksums}.npy``.
        num_shards: image i stands in shard ``i % num_shards``.
        num_classifiers: 1, or the stages of a cascade.
    """

    folder: Path
    num_shards: int
    num_classifiers: int

    def __call__(self, record: Mapping[str, Any]) -> dict:
        index = record["cache_index"]
        features, classes = [], []
        for classifier in range(self.num_classifiers):
            arrays = self._arrays(index % self.num_shards, classifier)
            first, last = arrays["offsets"][index // self.num_shards : index // self.num_shards + 2]
            feature, label = np.array(arrays["features"][first:last]), np.array(arrays["classes"][first:last])
            if _checksum(feature, label) != arrays["checksums"][index // self.num_shards]:
                raise self._damaged(f"the checksum of the training set's image {index} is wrong")
            features.append(torch.from_numpy(feature))
            classes.append(torch.from_numpy(label.astype(np.int64)))
        return {"roi_features": features, "roi_classes": classes}

    def _arrays(self, shard: int, classifier: int) -> dict[str, np.ndarray]:
        opened = self.__dict__.setdefault("_opened", {})
        if (shard, classifier) not in opened:
            prefix = self.folder / f"shard{shard}_{classifier}"
            try:
                opened[shard, classifier] = {name: np.load(f"{prefix}_{name}.npy", mmap_mode="r") for name in _ARRAYS}
            except (OSError, ValueError, EOFError) as error:
                raise self._damaged(str(error)) from error
        return opened[shard, classifier]

    def _damaged(self, why: str) -> OSError:
        return OSError(
            f"the RoI features in {self.folder} cannot be used ({why}): delete that folder, and they are computed again"
        )

    def __getstate__(self) -> dict:
        # Workers map the files themselves.
        return {key: value for key, value in self.__dict__.items() if key != "_opened"}


def cached_records(records: DatasetRecords) -> RecordPositions:
    """What samplers and the cache read of the records."""
    return RecordPositions(records)


def open_feature_cache(
    module: DecoupledClassifier,
    records: DatasetRecords,
    mapper: Callable[[dict], dict | None],
    *,
    settings: str,
    batch_size: int,
    num_workers: int,
    seed: int = 0,
    amp: bool = False,
    folder: str = "",
    rois_per_image: int = 0,
) -> FeatureCache:
    """The cache of a training set under a frozen detector, computed if it is not there.

    All ranks call this together. They need to see the same folder.

    Args:
        module: the detector as stage 2 trains it.
        records: the training set in Detectron2's format.
        mapper: makes of a record what the detector takes.
        settings: the settings of model and mapper as text; caches under other settings are other caches.
        batch_size: images, over all ranks.
        num_workers: processes that load images.
        seed: of the augmentation and of the RoIs.
        amp: mixed precision.
        folder: that holds caches; empty: ``roi_features`` in lt_det's cache.
        rois_per_image: RoIs to store of an image; 0: as many as the detector samples.

    Raises:
        OSError: if there is too little space on disk (the message says how much is needed), or the folder cannot be
            written to. What is damaged later, or was, is an ``OSError`` when it is read.
    """
    key = cache_key(module, records, settings=settings, seed=seed, amp=amp, rois_per_image=rois_per_image)
    folder = Path(folder or cache_root() / "roi_features") / key
    # Asked by one process, since another might see the folder come into being.
    if comm.all_gather((folder / "cache.json").is_file())[0]:
        if comm.is_main_process():
            logger.info("RoI features of the training set: %s", folder)
    else:
        loading = {"batch_size": batch_size, "num_workers": num_workers, "seed": seed, "amp": amp}
        _build(module, records, folder, partial(_write_shard, module, records, mapper, loading), rois_per_image)
    return FeatureCache(folder, _num_shards(folder), len(box_predictors(module.detector)))


def _num_shards(folder: Path) -> int:
    return len(list(folder.glob("shard*_0_offsets.npy")))


def cache_key(
    module: DecoupledClassifier, records: DatasetRecords, *, settings: str, seed: int, amp: bool, rois_per_image: int
) -> str:
    """Hash of all that the features follow from, but for the image files: frozen weights, annotations, settings."""
    digest = hashlib.sha256(f"{_VERSION} {seed} {rois_per_image}{settings}{amp}".encode())
    modules = dict(module.detector.named_modules())
    trained = tuple(
        f"{name}.{part}."
        for name, m in modules.items()
        if any(m is p for p in box_predictors(module.detector))
        for part in ("cls_score", "loss", "calibrator")
    )
    for name, tensor in module.detector.state_dict().items():
        if not name.startswith(trained):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    digest.update(records.fingerprint().encode())
    return digest.hexdigest()[:24]


class _NpyWriter:
    """Appends rows to a .npy file whose number of rows is not known before."""

    def __init__(self, path: Path, dtype, width: tuple[int, ...] = ()):
        self._file, self._dtype, self._width, self._rows = open(path, "wb"), np.dtype(dtype), width, 0
        self._header()

    def _header(self) -> None:
        shape = (self._rows, *self._width)
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": shape}
        # numpy leaves room for the first dimension to grow.
        np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, rows: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(rows, dtype=self._dtype).tobytes())
        self._rows += len(rows)

    def close(self) -> None:
        self._file.seek(0)
        self._header()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def _build(
    module: DecoupledClassifier, records: DatasetRecords, folder: Path, write: Callable[[Path], None], rois: int
) -> None:
    heads = module.detector.roi_heads
    predictors = box_predictors(module.detector)
    rois = rois or heads.batch_size_per_image
    size = len(records) * rois * 2 * sum(p.cls_score.in_features for p in predictors)
    temporary = folder.parent / f".{folder.name}.{comm.shared_random_seed()}.tmp"
    problem = ""
    if comm.is_main_process():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(folder.parent)
            free = shutil.disk_usage(folder.parent).free
            logger.info(
                "Computing RoI features of %d images once, up to %.1f GB in %s (%.1f GB free). Augmentation and RoIs "
                "of an image then stay the same for all of stage 2", len(records), size / 1e9, folder, free / 1e9,
            )  # fmt: skip
            if free < size:
                problem = f"has too little space for up to {size / 1e9:.1f} GB of RoI features"
            else:
                temporary.mkdir()
        except OSError as error:
            problem = f"cannot be written to ({error.strerror})"
    # All processes end together, not one of them while the others wait for it.
    _raise_if_any(comm.all_gather(problem)[0], folder.parent)
    usual = heads.batch_size_per_image
    heads.batch_size_per_image = rois
    problem = ""
    try:
        write(temporary)
    except OSError as error:
        if error.errno not in _WRITING:
            raise
        problem = f"could not be written to ({error.strerror})"
    finally:
        heads.batch_size_per_image = usual
    problem = next(filter(None, comm.all_gather(problem)), "")
    if problem and comm.is_main_process():
        shutil.rmtree(temporary, ignore_errors=True)
    _raise_if_any(problem, folder.parent)
    if comm.is_main_process():
        write_json_atomically(
            temporary / "cache.json", {"version": _VERSION, "images": len(records), "rois_per_image": rois}
        )
        if folder.is_dir():
            shutil.rmtree(temporary)  # another run was faster
        else:
            os.rename(temporary, folder)
    comm.synchronize()


# What the system says when a disk is full or may not be written to.
_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)


def _raise_if_any(problem: str, folder: Path) -> None:
    if problem:
        raise OSError(
            f"{folder} {problem}; set DECOUPLE.FEATURE_CACHE.DIR (train.decouple.feature_cache.folder) to another "
            "disk, or DECOUPLE.FEATURE_CACHE.ROIS_PER_IMAGE (rois_per_image) to a smaller number"
        )


def _remove_leftovers(root: Path) -> None:
    """Killed runs leave what they had written; a run that still writes has touched its folder within a day."""
    for path in root.glob(".*.tmp"):
        if time.time() - max(p.stat().st_mtime for p in (path, *path.iterdir())) > _DAY:
            shutil.rmtree(path, ignore_errors=True)


class ShardWriter:
    """The files of one process and one classifier of a cache.

    Args:
        folder: of the cache.
        shard: number of the process.
        classifier: number of the cascade stage; 0 otherwise.
        width: length of a RoI's features.
    """

    def __init__(self, folder: Path, shard: int, classifier: int, width: int):
        self._prefix = folder / f"shard{shard}_{classifier}"
        self._features = _NpyWriter(Path(f"{self._prefix}_features.npy"), np.float16, (width,))
        self._classes = _NpyWriter(Path(f"{self._prefix}_classes.npy"), np.int32)
        self._offsets, self._checksums = [0], []

    def append(self, features: torch.Tensor, classes: torch.Tensor, per_image: Sequence[int]) -> None:
        """Add images: ``features`` (R, width), ``classes`` (R,), and how many of the R rows are each image's.

        Raises:
            FloatingPointError: if a feature has no finite value in half precision.
        """
        half = features.half()
        if not torch.isfinite(half).all():
            raise FloatingPointError(
                "RoI features exceed half precision, so they cannot be cached; set DECOUPLE.FEATURE_CACHE.ENABLED "
                "False (remove train.decouple.feature_cache)"
            )
        stored, labels = half.cpu().numpy(), classes.cpu().numpy().astype(np.int32)
        self._features.append(stored)
        self._classes.append(labels)
        row = 0
        for n in per_image:
            self._offsets.append(self._offsets[-1] + n)
            self._checksums.append(_checksum(stored[row : row + n], labels[row : row + n]))
            row += n

    def close(self) -> None:
        self._features.close()
        self._classes.close()
        np.save(f"{self._prefix}_offsets.npy", np.asarray(self._offsets, dtype=np.int64))
        np.save(f"{self._prefix}_checksums.npy", np.asarray(self._checksums, dtype=np.uint32))


def _write_shard(
    module: DecoupledClassifier, records: DatasetRecords, mapper: Callable, loading: Mapping[str, Any], folder: Path
) -> None:
    writers = [
        ShardWriter(folder, comm.get_rank(), k, predictor.cls_score.in_features)
        for k, predictor in enumerate(box_predictors(module.detector))
    ]

    def write(inputs: list[dict], count: int) -> None:
        for rois, writer in zip(module.roi_batches(inputs), writers):
            new = rois.of_first(count)
            writer.append(new.features, new.gt_classes, new.per_image)

    pass_over(records, mapper, write, **loading, device=module.detector.device, description="RoI features")
    for writer in writers:
        writer.close()
