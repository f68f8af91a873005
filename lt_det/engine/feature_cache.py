"""RoI features of the training set on disk, for stage 2 of decoupled training.

The trunk is frozen in stage 2, so what the classifier sees of an image changes only with the augmentation and
the sampled RoIs. The cache fixes both: each image is augmented and its RoIs are sampled ONCE, their features
are stored in half precision, and the iterations of stage 2 read them instead of images. Images are drawn by
the training sampler as ever.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils import comm

from lt_det.data import DatasetRecords, RecordPositions, build_train_mapper
from lt_det.io import cache_root, write_json_atomically
from lt_det.modeling import DecoupledClassifier, box_predictors

from .dataset_pass import pass_over

__all__ = ["FeatureCache", "cache_key", "cached_records", "open_feature_cache"]

logger = logging.getLogger(__name__)

_VERSION = 1
_DAY = 24 * 3600


@dataclass(frozen=True)
class FeatureCache:
    """A finished cache. Called with a record of :func:`cached_records`, gives what ``DecoupledClassifier``
    takes; so it stands in for the dataset mapper.

    Attributes:
        folder: holds ``cache.json`` and, for each process that wrote,
            ``shard<k>_<classifier>_{offsets,classes,features}.npy``.
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
            features.append(torch.from_numpy(np.array(arrays["features"][first:last])))
            classes.append(torch.from_numpy(np.array(arrays["classes"][first:last], dtype=np.int64)))
        return {"roi_features": features, "roi_classes": classes}

    def _arrays(self, shard: int, classifier: int) -> dict[str, np.ndarray]:
        opened = self.__dict__.setdefault("_opened", {})
        if (shard, classifier) not in opened:
            prefix = self.folder / f"shard{shard}_{classifier}"
            opened[shard, classifier] = {
                name: np.load(f"{prefix}_{name}.npy", mmap_mode="r") for name in ("offsets", "classes", "features")
            }
        return opened[shard, classifier]

    def __getstate__(self) -> dict:
        # Workers map the files themselves.
        return {key: value for key, value in self.__dict__.items() if key != "_opened"}


def cached_records(records: DatasetRecords) -> RecordPositions:
    """What samplers and the cache read of the records."""
    return RecordPositions(records)


def open_feature_cache(cfg: CfgNode, module: DecoupledClassifier, records: DatasetRecords) -> FeatureCache:
    """The cache of a training set under a frozen detector, computed if it is not there.

    All ranks call this together. They need to see the same ``DECOUPLE.FEATURE_CACHE.DIR``.

    Args:
        cfg: its ``MODEL``, ``INPUT``, ``SEED`` and ``DECOUPLE.FEATURE_CACHE`` are read.
        module: the detector as stage 2 trains it.
        records: the training set in Detectron2's format.

    Raises:
        OSError: if there is too little space on disk; the message says how much is needed.
    """
    root = Path(cfg.DECOUPLE.FEATURE_CACHE.DIR or cache_root() / "roi_features")
    folder = root / cache_key(cfg, module, records)
    # Asked by one process, since another might see the folder come into being.
    if comm.all_gather((folder / "cache.json").is_file())[0]:
        if comm.is_main_process():
            logger.info("RoI features of the training set: %s", folder)
    else:
        _build(cfg, module, records, folder)
    return FeatureCache(folder, _num_shards(folder), len(box_predictors(module.detector)))


def _num_shards(folder: Path) -> int:
    return len(list(folder.glob("shard*_0_offsets.npy")))


def cache_key(cfg: CfgNode, module: DecoupledClassifier, records: DatasetRecords) -> str:
    """Hash of all that the features follow from, but for the image files: frozen weights, annotations, config."""
    digest = hashlib.sha256(f"{_VERSION} {max(cfg.SEED, 0)} {cfg.DECOUPLE.FEATURE_CACHE.ROIS_PER_IMAGE}".encode())
    options = cfg.MODEL.clone()
    options.defrost()
    for key in ("WEIGHTS", "DEVICE", "LONG_TAIL"):
        options.pop(key, None)
    digest.update(f"{options.dump()}{cfg.INPUT.dump()}{cfg.SOLVER.AMP.ENABLED}".encode())
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


def _build(cfg: CfgNode, module: DecoupledClassifier, records: DatasetRecords, folder: Path) -> None:
    heads = module.detector.roi_heads
    predictors = box_predictors(module.detector)
    rois = cfg.DECOUPLE.FEATURE_CACHE.ROIS_PER_IMAGE or heads.batch_size_per_image
    size = len(records) * rois * 2 * sum(p.cls_score.in_features for p in predictors)
    temporary = folder.parent / f".{folder.name}.{comm.shared_random_seed()}.tmp"
    if comm.is_main_process():
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder.parent)
        free = shutil.disk_usage(folder.parent).free
        logger.info(
            "Computing RoI features of %d images once, up to %.1f GB in %s (%.1f GB free). Augmentation and RoIs "
            "of an image then stay the same for all of stage 2", len(records), size / 1e9, folder, free / 1e9,
        )  # fmt: skip
        temporary.mkdir()
    comm.synchronize()
    if shutil.disk_usage(folder.parent).free < size:
        raise OSError(
            f"{folder.parent} has too little space for up to {size / 1e9:.1f} GB of RoI features; "
            "set DECOUPLE.FEATURE_CACHE.DIR to another disk, or DECOUPLE.FEATURE_CACHE.ROIS_PER_IMAGE to a smaller "
            "number"
        )
    usual = heads.batch_size_per_image
    heads.batch_size_per_image = rois
    try:
        _write_shard(cfg, module, records, temporary)
    finally:
        heads.batch_size_per_image = usual
    comm.synchronize()
    if comm.is_main_process():
        write_json_atomically(
            temporary / "cache.json", {"version": _VERSION, "images": len(records), "rois_per_image": rois}
        )
        if folder.is_dir():
            shutil.rmtree(temporary)  # another run was faster
        else:
            os.rename(temporary, folder)
    comm.synchronize()


def _remove_leftovers(root: Path) -> None:
    """Killed runs leave what they had written; a run that still writes has touched its folder within a day."""
    for path in root.glob(".*.tmp"):
        if time.time() - max(p.stat().st_mtime for p in (path, *path.iterdir())) > _DAY:
            shutil.rmtree(path, ignore_errors=True)


def _write_shard(cfg: CfgNode, module: DecoupledClassifier, records: DatasetRecords, folder: Path) -> None:
    writers = []
    for k, predictor in enumerate(box_predictors(module.detector)):
        prefix = folder / f"shard{comm.get_rank()}_{k}"
        writers.append((
            _NpyWriter(Path(f"{prefix}_features.npy"), np.float16, (predictor.cls_score.in_features,)),
            _NpyWriter(Path(f"{prefix}_classes.npy"), np.int32),
            [0],
        ))  # fmt: skip

    def write(inputs: list[dict], count: int) -> None:
        for rois, (features, classes, offsets) in zip(module.roi_batches(inputs), writers):
            rows = sum(rois.per_image[:count])
            half = rois.features[:rows].half()
            if not torch.isfinite(half).all():
                raise FloatingPointError(
                    "RoI features exceed half precision, so they cannot be cached; set "
                    "DECOUPLE.FEATURE_CACHE.ENABLED False"
                )
            features.append(half.cpu().numpy())
            classes.append(rois.gt_classes[:rows].cpu().numpy())
            for n in rois.per_image[:count]:
                offsets.append(offsets[-1] + n)

    mapper = build_train_mapper(cfg, records)
    pass_over(
        cfg, records, mapper, write, seed=max(cfg.SEED, 0), device=module.detector.device, description="RoI features"
    )
    for k, (features, classes, offsets) in enumerate(writers):
        features.close()
        classes.close()
        np.save(folder / f"shard{comm.get_rank()}_{k}_offsets.npy", np.asarray(offsets, dtype=np.int64))
