"""A LazyConfig checked as a whole, before any data are read; see ``checks.py``."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from detectron2.data import DatasetCatalog
from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf

from lt_det.data import SAMPLER_REGISTRY, prepare_dataset
from lt_det.declaration import check_name, checked_options, suggestion
from lt_det.losses import LOSS_REGISTRY, ClassificationLoss
from lt_det.modeling import LongTailOutputLayers

from .checks import check_at_least, check_class_count, check_classifier, registered_names

__all__ = ["check_lazy_config", "check_lazy_overrides", "lazy_datasets", "lazy_target"]


def _visit(node: Any, path: str = "") -> Iterator[tuple[str, DictConfig]]:
    """(path, node) of every call, ``L(target)(...)``, below a node."""
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield path, node
        for key in node:
            if OmegaConf.is_missing(node, key):
                continue
            # Interpolations lead to what is visited where it stands.
            if not OmegaConf.is_interpolation(node, key):
                yield from _visit(node[key], f"{path}.{key}" if path else str(key))
    elif isinstance(node, ListConfig):
        for i in range(len(node)):
            if not OmegaConf.is_interpolation(node, i) and not OmegaConf.is_missing(node, i):
                yield from _visit(node[i], f"{path}.{i}")


def lazy_target(node: DictConfig) -> Any:
    """What a call, ``L(target)(...)``, calls; None if that cannot be imported."""
    target = node["_target_"]
    return locate(target) if isinstance(target, str) else target


def _parameters(target: Any) -> list[str] | None:
    """Names of the arguments that a target takes; None: any, or nobody knows."""
    # A class that hands **kwargs on to its base takes what the base takes.
    functions = [c.__init__ for c in target.__mro__ if "__init__" in vars(c)] if isinstance(target, type) else [target]
    names: dict[str, None] = {}
    for function in functions:
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):
            return None
        names.update(dict.fromkeys(p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)))
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return [name for name in names if name != "self"]
    return None


# What Detectron2's and lt_det's trainers read of ``train``, beside what is in the config already.
_TRAIN_KEYS = (
    "output_dir init_checkpoint max_iter amp ddp checkpointer eval_period log_period device seed cudnn_benchmark "
    "float32_precision"
    " decouple drw teacher test_aug"
).split()


def check_lazy_overrides(cfg: DictConfig, overrides: Sequence[str], source: str = "command line") -> None:
    """Check ``path.key=value`` pairs against the config that they are about to change.

    Raises:
        KeyError: for a key that neither the config has nor the called function takes; with similar ones.
    """
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        if "=" not in override:
            raise ValueError(f"{source}: {override!r} is not of the form path.key=value, which LazyConfigs take")
        parts, node = key.split("."), cfg
        for depth, part in enumerate(parts):
            if isinstance(node, ListConfig):
                if not part.isdigit() or int(part) >= len(node):
                    raise KeyError(f"{source}: {key}: {'.'.join(parts[:depth])} is a list of {len(node)}")
                node = node[int(part)]
                continue
            if not isinstance(node, DictConfig):
                break  # a value of the user's own making
            if part in node:
                node = node[part]
                continue
            known = [str(k) for k in node]
            if "_target_" in node:
                more = _parameters(lazy_target(node))
                if more is None or part in more:
                    break
                known += more
            elif parts[:depth] == ["train"]:
                known += _TRAIN_KEYS
                if part in _TRAIN_KEYS:
                    break
            elif parts[0] == "train" and depth > 1:
                break  # train.decouple and the like check their own keys
            known = sorted({k for k in known if not k.startswith("_")})
            where = ".".join(parts[:depth]) or "the config"
            raise KeyError(f"{source}: {where} has no {part!r}{suggestion(part, known)} Known: {', '.join(known)}")


def check_lazy_config(cfg: DictConfig) -> None:
    """Check a LazyConfig as a whole, as :func:`check_config` does a yaml config. Builds nothing and reads no
    annotations but what is known of the data sets' classes.

    Raises:
        ValueError: for arguments that a called function does not take, unknown names, impossible values, and numbers of
            classes that disagree with each other or with the data.
    """
    known = sorted({*_TRAIN_KEYS, *cfg.train})
    for key in cfg.train:
        if key not in _TRAIN_KEYS and suggestion(key, _TRAIN_KEYS):
            raise ValueError(
                f"train.{key}: there is no such key{suggestion(key, _TRAIN_KEYS)} Known: {', '.join(known)}"
            )
    check_at_least("train.max_iter", cfg.train.max_iter, 1)
    number = None
    if "roi_heads" in cfg.model and "num_classes" in cfg.model.roi_heads:
        number = int(cfg.model.roi_heads.num_classes)
        check_at_least("model.roi_heads.num_classes", number, 1)
    for path, node in _visit(cfg):
        target = lazy_target(node)
        if target is None:
            raise ValueError(f"{path}._target_ is {node['_target_']!r}, which cannot be imported")
        takes = _parameters(target)
        for key in node:
            if takes is not None and key != "_target_" and key not in takes:
                name = getattr(target, "__name__", target)
                raise ValueError(
                    f"{path}.{key}: {name} takes no {key!r}{suggestion(key, takes)} It takes: {', '.join(takes)}"
                )
        if isinstance(target, type) and issubclass(target, ClassificationLoss):
            check_at_least(f"{path}.min_count", node.get("min_count", 0), 0)
        if isinstance(target, type) and issubclass(target, LongTailOutputLayers):
            _check_lazy_predictor(path, node)
        of_model = path.startswith("model.") and "num_classes" in node
        if number is not None and of_model and path.startswith("model.roi_heads") and node.num_classes != number:
            raise ValueError(
                f"{path}.num_classes is {node.num_classes}, but model.roi_heads.num_classes is {number}; make them "
                "agree (as "
                '"${...num_classes}")'
            )
    sampler = cfg.get("dataloader", {}).get("train", {}).get("sampler")
    if isinstance(sampler, str):
        check_name("dataloader.train.sampler", sampler, registered_names(SAMPLER_REGISTRY))
        entry, options = SAMPLER_REGISTRY.get(sampler), cfg.dataloader.train.get("sampler_options")
        if hasattr(entry, "from_records"):
            checked_options(entry, options or {}, "dataloader.train.sampler_options", show=str)
    if number is not None:
        for part in ("train", "test"):
            for name in lazy_datasets(cfg, part):
                prepare_dataset(name)
                check_class_count("model.roi_heads.num_classes", number, name)


def _check_lazy_predictor(path: str, node: DictConfig) -> None:
    loss = node.get("loss", "Softmax")
    if isinstance(loss, str):
        check_name(f"{path}.loss", loss, registered_names(LOSS_REGISTRY))
        loss = LOSS_REGISTRY.get(loss)
    else:
        loss = lazy_target(loss) if isinstance(loss, DictConfig) else type(loss)
    check_classifier(f"{path}.classifier", node.get("classifier", ""), f"{path}.loss", loss)


def lazy_datasets(cfg: DictConfig, part: str) -> list[str]:
    """Names of registered data sets in ``dataloader.<part>`` (``"train"`` or ``"test"``) of a LazyConfig."""
    found: dict[str, None] = {}
    for _, node in _visit(cfg.get("dataloader", {}).get(part)):
        for key in ("names", "name", "dataset_name", "dataset"):
            value = node.get(key)
            values = [value] if isinstance(value, str) else value if isinstance(value, ListConfig) else ()
            found.update(dict.fromkeys(v for v in values if isinstance(v, str) and v in DatasetCatalog))
    return list(found)
