"""A config checked as a whole, before any data are read: names that do not exist, values that cannot be, keys without
effect.

Each check names the key and the remedy. :func:`check_config` takes a yaml config; LazyConfigs are checked in
``checks_lazy.py``. What they have in common is decided by the same functions, which get the key as the user wrote it.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    RPN_HEAD_REGISTRY,
)

from lt_det.config import get_lt_det_cfg
from lt_det.data import SAMPLER_REGISTRY, prepare_dataset, samplers_with_options
from lt_det.declaration import check_name, default_node, shared_node
from lt_det.losses import LOSS_REGISTRY, ClassificationLoss
from lt_det.modeling import CALIBRATOR_REGISTRY, calibrator_options
from lt_det.modeling.classifiers import CLASSIFIERS

__all__ = [
    "check_classes",
    "check_config",
    "check_keys",
    "check_output_folder",
    "flat",
    "given_keys",
    "model_classes",
]

logger = logging.getLogger(__name__)


# ---- what yaml and LazyConfig share


def registered_names(registry) -> list[str]:
    """What a config can call the entries of one of Detectron2's registries, or of lt_det's."""
    return [name for name, _ in registry]


def check_at_least(key: str, value: float, minimum: float) -> None:
    """Refuse a value that is too small.

    Raises:
        ValueError: if ``value`` is below ``minimum``.
    """
    if not value >= minimum:
        raise ValueError(f"{key} must be at least {minimum:g}, got {value!r}")


def check_classifier(key: str, classifier: Any, loss_key: str, loss: type[ClassificationLoss]) -> None:
    """Refuse a classifier that does not exist or does not go with the loss.

    Raises:
        ValueError: for an unknown name, or a linear classifier under a loss of cosines.
    """
    if not isinstance(classifier, str) or not classifier:
        return  # one of the user's own, or the one that the loss asks for
    check_name(key, classifier, CLASSIFIERS)
    if classifier == "linear" and loss.wants_cosine:
        raise ValueError(
            f'{key} is "linear", but {loss_key} {loss.__name__} scores by cosines; set it to "cosine" or leave it empty'
        )


def check_classes(
    model: Sequence[str], model_source: str, dataset: str, *, key: str = "DATASETS.TEST", remedy: str = ""
) -> None:
    """Compare the class names of a model with those of a data set, whose metadata must be complete.

    Raises:
        ValueError: if there are more or fewer, or others, or in another order: results would be of the wrong classes.
    """
    found = MetadataCatalog.get(dataset).get("thing_classes")
    if found is None or list(found) == list(model):
        return
    i = next((i for i, (a, b) in enumerate(zip(model, found)) if a != b), min(len(model), len(found)))
    names = [repr(c[i]) if i < len(c) else "missing" for c in (model, found)]
    raise ValueError(
        f"{key} {dataset!r} has other classes than {model_source}: {len(found)} and not {len(model)}, class {i} is "
        f"{names[1]} and not {names[0]}. "
        + (remedy or "Use an annotation file with the model's categories (all of them, in the same order of ids)")
    )


def check_class_count(key: str, number: int, dataset: str) -> None:
    """Compare the number of a model's classes with that of a data set, whose metadata must be complete.

    Raises:
        ValueError: if they differ.
    """
    classes = MetadataCatalog.get(dataset).get("thing_classes")
    if classes is not None and len(classes) != number:
        raise ValueError(
            f"{key} is {number}, but data set {dataset!r} has {len(classes)} classes; set {key} to {len(classes)}"
        )


def model_classes(datasets: Iterable[str]) -> list[str] | None:
    """Class names of the first of these data sets that knows them; None if none does, or its files are not here."""
    for name in datasets:
        try:
            prepare_dataset(name)
        except FileNotFoundError:
            continue
        classes = MetadataCatalog.get(name).get("thing_classes")
        if classes is not None:
            return list(classes)
    return None


def check_output_folder(folder: str) -> None:
    """Refuse an output folder that cannot be one.

    Raises:
        NotADirectoryError: if it is a file.
    """
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise NotADirectoryError(
            f"the output folder {folder} is a file; set OUTPUT_DIR (train.output_dir) to another name"
        )


# ---- yaml


def flat(node: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of all leaves of nested mappings, keys joined by dots."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _holds(cfg: CfgNode, key: str) -> bool:
    node = cfg
    for part in key.split("."):
        if not isinstance(node, CfgNode):
            return False
        if part not in node:
            return node.is_new_allowed()
        node = node[part]
    return True


def check_keys(cfg: CfgNode, keys: Iterable[str], source: str) -> None:
    """Refuse keys that do not exist.

    Raises:
        KeyError: for the first key that ``cfg`` has not, with similar ones.
    """
    for key in keys:
        if _holds(cfg, key) or cfg.key_is_deprecated(key) or cfg.key_is_renamed(key):
            continue
        known = [k for k, _ in flat(cfg)]
        # By the whole key, or by its last part where the user forgot or misplaced the nodes before.
        last = key.rpartition(".")[2].upper()
        same = [k for k in known if k.rpartition(".")[2] == last]
        similar = same[:3] or difflib.get_close_matches(key.upper(), known, n=2, cutoff=0.6)
        hint = f"; did you mean {' or '.join(similar)}?" if similar else ""
        raise KeyError(f"{source}: there is no config key {key}{hint}")


def given_keys(config_file: str, opts: Sequence[str]) -> list[str]:
    """The keys that a config file itself (not its _BASE_) and a command line set."""
    keys = list(opts[::2])
    if config_file:
        import yaml

        with open(config_file, encoding="utf-8") as f:
            content = yaml.safe_load(f) or {}
        keys += [key for key, _ in flat(content) if key != "_BASE_"]
    return keys


def _value(cfg: CfgNode, key: str) -> Any:
    node = cfg
    for part in key.split("."):
        node = node[part]
    return node


_NO_ROI_HEADS = ("RetinaNet", "FCOS", "ProposalNetwork", "SemanticSegmentor")
_OURS = {
    "StandardROIHeads": "LongTailROIHeads",
    "CascadeROIHeads": "LongTailCascadeROIHeads",
    "Res5ROIHeads": "LongTailRes5ROIHeads",
}


def check_config(cfg: CfgNode, given: Collection[str] = ()) -> None:
    """Check a yaml config as a whole. Reads no data and builds no model.

    Args:
        given: keys that the user set (:func:`given_keys`): those of them that have no effect are logged as warnings.

    Raises:
        ValueError: for unknown names, impossible values and keys that would silently be ignored.
    """
    _check_names(cfg)
    _check_ranges(cfg)
    _check_roi_heads(cfg)
    _check_methods(cfg)
    for message in keys_without_effect(cfg, given):
        logger.warning(message)


def _check_names(cfg: CfgNode) -> None:
    model = cfg.MODEL
    check_name("MODEL.META_ARCHITECTURE", model.META_ARCHITECTURE, registered_names(META_ARCH_REGISTRY))
    check_name("MODEL.BACKBONE.NAME", model.BACKBONE.NAME, registered_names(BACKBONE_REGISTRY))
    if model.META_ARCHITECTURE == "GeneralizedRCNN":
        check_name(
            "MODEL.PROPOSAL_GENERATOR.NAME",
            model.PROPOSAL_GENERATOR.NAME,
            [*registered_names(PROPOSAL_GENERATOR_REGISTRY), "PrecomputedProposals"],
        )
        check_name("MODEL.RPN.HEAD_NAME", model.RPN.HEAD_NAME, registered_names(RPN_HEAD_REGISTRY))
        check_name(
            "MODEL.ANCHOR_GENERATOR.NAME", model.ANCHOR_GENERATOR.NAME, registered_names(ANCHOR_GENERATOR_REGISTRY)
        )
        check_name("MODEL.ROI_HEADS.NAME", model.ROI_HEADS.NAME, registered_names(ROI_HEADS_REGISTRY))
        if model.ROI_BOX_HEAD.NAME:  # empty with C4
            check_name("MODEL.ROI_BOX_HEAD.NAME", model.ROI_BOX_HEAD.NAME, registered_names(ROI_BOX_HEAD_REGISTRY))
        if model.MASK_ON:
            check_name("MODEL.ROI_MASK_HEAD.NAME", model.ROI_MASK_HEAD.NAME, registered_names(ROI_MASK_HEAD_REGISTRY))
    node = model.LONG_TAIL
    losses, samplers = registered_names(LOSS_REGISTRY), registered_names(SAMPLER_REGISTRY)
    check_name("MODEL.LONG_TAIL.LOSS", node.LOSS, losses)
    check_name("DECOUPLE.LOSS", cfg.DECOUPLE.LOSS, losses)
    check_name("META.LOSS", cfg.META.LOSS, [*losses, ""])
    check_name("DATALOADER.SAMPLER_TRAIN", cfg.DATALOADER.SAMPLER_TRAIN, samplers)
    check_name("DECOUPLE.SAMPLER_TRAIN", cfg.DECOUPLE.SAMPLER_TRAIN, [*samplers, ""])
    check_name("META.SAMPLER", cfg.META.SAMPLER, samplers)
    check_name("MODEL.LONG_TAIL.CALIBRATOR.NAME", node.CALIBRATOR.NAME, [*registered_names(CALIBRATOR_REGISTRY), ""])
    if node.CALIBRATOR.NAME:
        calibrator_options(cfg)  # names an option that it does not have
    for stage, (key, loss) in _losses(cfg).items():
        if stage != "meta":
            check_classifier("MODEL.LONG_TAIL.CLASSIFIER.NAME", node.CLASSIFIER.NAME, key, loss)


def _losses(cfg: CfgNode) -> dict[str, tuple[str, type[ClassificationLoss]]]:
    """The losses that a run trains with: {"1", "2", "meta": (key, class)}."""
    found = {"1": ("MODEL.LONG_TAIL.LOSS", LOSS_REGISTRY.get(cfg.MODEL.LONG_TAIL.LOSS))}
    if cfg.DECOUPLE.ENABLED:
        found["2"] = ("DECOUPLE.LOSS", LOSS_REGISTRY.get(cfg.DECOUPLE.LOSS))
        if cfg.META.NAME and cfg.META.LOSS:
            found["meta"] = ("META.LOSS", LOSS_REGISTRY.get(cfg.META.LOSS))
    return found


_MINIMA = {
    "MODEL.LONG_TAIL.MIN_COUNT": 0,
    "MODEL.ROI_HEADS.NUM_CLASSES": 1,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 1,
    "SOLVER.MAX_ITER": 1,
    "SOLVER.IMS_PER_BATCH": 1,
    "SOLVER.BASE_LR": 0,
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "SOLVER.WARMUP_ITERS": 0,
    "DATALOADER.NUM_WORKERS": 0,
    "DATALOADER.REPEAT_THRESHOLD": 0,
    "DECOUPLE.START_ITER": -1,
    "DECOUPLE.MAX_ITER": 1,
    "DECOUPLE.BASE_LR": 0,
    "DECOUPLE.FEATURE_CACHE.ROIS_PER_IMAGE": 0,
    "DRW.START_ITER": -1,
    "META.PERIOD": 1,
    "META.IMS_PER_BATCH": 0,
    "TEACHER.MAX_ITER": 0,
    "TEST.DETECTIONS_PER_IMAGE": 1,
    "TEST.EVAL_PERIOD": 0,
    "TEST.PATIENCE": 0,
    "TEST.VALIDATION_LOSS.PERIOD": 0,
    "TEST.VALIDATION_LOSS.IMAGES": 0,
    "TEST.GROUP_SCALARS_PERIOD": 0,
}


def _check_ranges(cfg: CfgNode) -> None:
    for key, minimum in _MINIMA.items():
        check_at_least(key, _value(cfg, key), minimum)


def _asks_for_long_tail(cfg: CfgNode) -> list[str]:
    """Keys that only lt_det's box predictor can honour, as ``KEY value``."""
    node = cfg.MODEL.LONG_TAIL
    asked = [f"MODEL.LONG_TAIL.LOSS {node.LOSS}"] if node.LOSS != "Softmax" else []
    if node.CALIBRATOR.NAME:
        asked.append(f"MODEL.LONG_TAIL.CALIBRATOR.NAME {node.CALIBRATOR.NAME}")
    if node.CLASSIFIER.NAME == "cosine":
        asked.append("MODEL.LONG_TAIL.CLASSIFIER.NAME cosine")
    asked += [f"{name}.ENABLED True" for name in ("DECOUPLE", "DRW") if cfg[name].ENABLED]
    return asked + ([f"META.NAME {cfg.META.NAME}"] if cfg.META.NAME else [])


def _check_roi_heads(cfg: CfgNode) -> None:
    asked = _asks_for_long_tail(cfg)
    if not asked:
        return
    architecture, name = cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.ROI_HEADS.NAME
    if architecture in _NO_ROI_HEADS:
        raise ValueError(
            f"{asked[0]} has no effect with MODEL.META_ARCHITECTURE {architecture}, which has no box head to train by "
            "it; use GeneralizedRCNN"
        )
    # Heads of other people may hold our predictor; Detectron2's do not.
    if ROI_HEADS_REGISTRY.get(name).__module__.startswith("detectron2."):
        remedy = _OURS.get(name, ", ".join(_OURS.values()))
        raise ValueError(
            f"{asked[0]} has no effect with MODEL.ROI_HEADS.NAME {name}, which trains plain softmax; set "
            f"MODEL.ROI_HEADS.NAME to {remedy}"
        )


def _check_methods(cfg: CfgNode) -> None:
    if cfg.DECOUPLE.FEATURE_CACHE.ENABLED and not cfg.DECOUPLE.ENABLED:
        raise ValueError(
            "DECOUPLE.FEATURE_CACHE.ENABLED is True, but the cache serves stage 2 of decoupled training; set "
            "DECOUPLE.ENABLED True (with DECOUPLE.START_ITER 0 if MODEL.WEIGHTS is a finished model), or the cache "
            "False"
        )
    if cfg.DECOUPLE.ENABLED and cfg.DECOUPLE.START_ITER > cfg.TEACHER.MAX_ITER + cfg.SOLVER.MAX_ITER:
        logger.warning(
            "DECOUPLE.START_ITER %d is beyond SOLVER.MAX_ITER %d: stage 1 takes %d iterations",
            cfg.DECOUPLE.START_ITER, cfg.SOLVER.MAX_ITER, cfg.DECOUPLE.START_ITER,
        )  # fmt: skip
    _check_best_metric(cfg)
    if cfg.TEST.BOUNDARY_AP and not cfg.MODEL.MASK_ON:
        raise ValueError("TEST.BOUNDARY_AP is measured on masks, and MODEL.MASK_ON is False; set one of them otherwise")
    if cfg.TEST.MAX_DETS < 0:
        raise ValueError(
            f"TEST.MAX_DETS is {cfg.TEST.MAX_DETS}; it must be a number of detections, or 0 for the rules'"
        )


def _check_best_metric(cfg: CfgNode) -> None:
    metric = cfg.TEST.BEST_METRIC
    if not metric:
        if cfg.TEST.PATIENCE:
            raise ValueError('TEST.PATIENCE waits for TEST.BEST_METRIC to improve; set one, say "segm/AP"')
        return
    is_loss = metric.startswith("validation/")
    if not is_loss and not re.search(r"(^|/)(bbox|segm|boundary)/A[PR][^/]*$", metric):
        raise ValueError(
            f'TEST.BEST_METRIC is {metric!r}; it takes what evaluation reports, say "segm/AP" or "segm/APr" (with '
            'several test sets "<name>/segm/AP"), or "validation/total_loss"'
        )
    period = "TEST.VALIDATION_LOSS.PERIOD" if is_loss else "TEST.EVAL_PERIOD"
    if _value(cfg, period) == 0 or not cfg.DATASETS.TEST:
        raise ValueError(f"TEST.BEST_METRIC {metric!r} needs {period} above 0 and a data set in DATASETS.TEST")


def keys_without_effect(cfg: CfgNode, given: Collection[str]) -> list[str]:
    """One message for each key in ``given`` that differs from the default and that nothing in this run reads."""
    default = get_lt_det_cfg()
    messages = []
    for key in dict.fromkeys(given):
        if (
            not _holds(default, key)
            or isinstance(_value(cfg, key), CfgNode)
            or _value(cfg, key) == _value(default, key)
        ):
            continue
        wanted = next((w for prefix, w in _readers(cfg) if key == prefix or key.startswith(prefix + ".")), None)
        if wanted:
            messages.append(f"{key} has no effect: {wanted}")
    return messages


def _readers(cfg: CfgNode) -> Iterator[tuple[str, str | None]]:
    """(key or node, None if something reads it in this run, else what is missing), the special before the general."""
    node = cfg.MODEL.LONG_TAIL
    losses = dict(_losses(cfg).values())
    in_use = " and ".join(f"{key} is {loss.__name__}" for key, loss in losses.items())
    for _, loss in LOSS_REGISTRY:
        if loss.config_node in node:
            used = any(other.config_node == loss.config_node for other in losses.values())
            yield f"MODEL.LONG_TAIL.{loss.config_node}", None if used else in_use
    cosine = node.CLASSIFIER.NAME == "cosine" and not all(loss.wants_cosine for loss in losses.values())
    for key in ("SCALE", "LEARN_SCALE", "BIAS"):
        reason = "the loss scales its cosines itself" if node.CLASSIFIER.NAME == "cosine" else None
        yield (
            f"MODEL.LONG_TAIL.CLASSIFIER.{key}",
            None if cosine else reason or "MODEL.LONG_TAIL.CLASSIFIER.NAME is not cosine",
        )
    head = cfg.MODEL.ROI_MASK_HEAD.NAME
    normalised = cfg.MODEL.MASK_ON and "Normalized" in head
    yield "MODEL.LONG_TAIL.MASK_SCALE", None if normalised else f"MODEL.ROI_MASK_HEAD.NAME is {head}"
    calibrated = bool(node.CALIBRATOR.NAME)  # an option that it does not have is an error
    yield "MODEL.LONG_TAIL.CALIBRATOR", None if calibrated else "MODEL.LONG_TAIL.CALIBRATOR.NAME is empty"
    enabled = cfg.DECOUPLE.ENABLED
    if enabled:
        cached = cfg.DECOUPLE.FEATURE_CACHE.ENABLED
        yield "DECOUPLE.FEATURE_CACHE", None if cached else "DECOUPLE.FEATURE_CACHE.ENABLED is False"
    else:
        yield "DECOUPLE", "DECOUPLE.ENABLED is False"
    yield "META", None if cfg.META.NAME else "META.NAME is empty"
    yield "DRW", None if cfg.DRW.ENABLED else "DRW.ENABLED is False"
    keys = any(loss.wants_keys for loss in losses.values())
    yield "TEACHER", None if keys else f"{in_use}, which learns from no teacher"
    samplers = [cfg.DATALOADER.SAMPLER_TRAIN]
    samplers += [cfg.DECOUPLE.SAMPLER_TRAIN] if enabled else []
    samplers += [cfg.META.SAMPLER] if cfg.META.NAME else []
    # Where a prior or a calibrator goes by it, it speaks of the sampler in use all the same.
    sampler = f"DATALOADER.SAMPLER_TRAIN is {cfg.DATALOADER.SAMPLER_TRAIN}"
    made = dict(samplers_with_options())
    made["WeightedCategoryTrainingSampler"] = made["RepeatFactorTrainingSampler"]  # the same, within each data set
    used = {key for s in samplers if s in made for key in default_node(made[s])}
    for key in shared_node(made.items()):
        yield f"DATALOADER.{key}", None if key in used else sampler
    weighted = any(s.startswith("Weighted") for s in samplers)
    yield "DATASETS.TRAIN_REPEAT_FACTOR", None if weighted else sampler
