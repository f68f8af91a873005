"""Data sets in LVIS and COCO format, registered with Detectron2's catalogs."""

from .lvis_format import load_lvis_or_coco_json
from .register import (
    GLYPH_LVIS_NAMES,
    open_dataset,
    prepare_dataset,
    register_builtin,
    register_dataset,
    register_from_config,
    require_dataset,
)

__all__ = [
    "GLYPH_LVIS_NAMES",
    "load_lvis_or_coco_json",
    "open_dataset",
    "prepare_dataset",
    "register_builtin",
    "register_dataset",
    "register_from_config",
    "require_dataset",
]
