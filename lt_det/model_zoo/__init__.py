"""The recipes under ``configs/``, by name, from a checkout or from an installed package. After Detectron2's
``model_zoo``, without its weights: there are none of ours on LVIS."""

from __future__ import annotations

import difflib
import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # names of recipes need no Detectron2
    from detectron2.config import CfgNode
    from omegaconf import DictConfig

__all__ = ["config_folder", "get_config", "get_config_file", "list_configs", "resolve"]


def config_folder() -> Path:
    """The folder that the recipes are in: the checkout's ``configs/``, or the copy in an installed package."""
    installed = Path(__file__).parent / "configs"
    checkout = Path(__file__).parents[2] / "configs"
    for folder in (installed, checkout):
        if (folder / "Base-LVIS.yaml").is_file():
            return folder
    raise FileNotFoundError(f"lt_det's recipes are neither in {installed} nor in {checkout}; install lt_det again.")


def list_configs() -> list[str]:
    """Names of the recipes, e.g. ``lvis_balms`` and ``lazy/mask_rcnn_vitdet_b_lvis``, without the bases that they
    share."""
    root = config_folder()
    found = [*root.glob("*.yaml"), *root.glob("lazy/*.py")]
    names = (path.relative_to(root).with_suffix("").as_posix() for path in found)
    shared = ("Base-", "_", "lvis_data", "common")
    return sorted(name for name in names if not name.rpartition("/")[2].startswith(shared))


def get_config_file(name: str) -> str:
    """The path of a recipe, or of a config of Detectron2's model zoo.

    Args:
        name: e.g. ``"lvis_balms"``, ``"lvis_balms.yaml"``, ``"lazy/mask_rcnn_vitdet_b_lvis.py"``, ``"methods/gml"``;
            ``"COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"``.

    Raises:
        ValueError: if there is no such recipe; the message has similar names.
    """
    root = config_folder()
    # Detectron2's own function for its configs imports Detectron2, and pkg_resources, which warns.
    spec = importlib.util.find_spec("detectron2")
    stock = [Path(folder, "model_zoo/configs", name) for folder in spec.submodule_search_locations] if spec else []
    for path in (root / name, root / f"{name}.yaml", root / f"{name}.py", *stock):
        if path.suffix in (".yaml", ".py") and path.is_file():
            return str(path)
    known = list_configs()
    close = difflib.get_close_matches(name, known) or known
    raise ValueError(f"there is no recipe {name!r}; similar: {', '.join(close[:5])} (all: lt-det recipes).")


def get_config(name: str) -> CfgNode | DictConfig:
    """The config of a recipe: Detectron2's and lt_det's defaults with the recipe merged, or the LazyConfig.

    Args:
        name: as for :func:`get_config_file`.
    """
    from detectron2.config import LazyConfig

    import lt_det.modeling  # noqa: F401  # registers the heads that recipes name, for Detectron2's build_model

    path = get_config_file(name)
    if path.endswith(".py"):
        return LazyConfig.load(path)
    from lt_det.config import get_lt_det_cfg

    cfg = get_lt_det_cfg()
    cfg.merge_from_file(path)
    return cfg


def resolve(config: str) -> str:
    """A config file as given, or where there is none of that name, the recipe's.

    Raises:
        ValueError: if it is neither.
    """
    if not config or os.path.isfile(config):
        return config
    try:
        return get_config_file(config)
    except ValueError as error:
        raise ValueError(f"--config-file {config}: no such file, and {error}") from None
