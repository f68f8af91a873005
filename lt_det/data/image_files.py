"""Where the image of a row of a json's ``images`` is, below an image folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

__all__ = ["COCO_RULES", "LVIS_RULES", "image_path"]


def _by_url_split(root: str, image: Mapping[str, Any]) -> str | None:
    parts = (image.get("coco_url") or "").split("/")
    # Detectron2 names LVIS's image folder with a slash at its end and puts the two together as they are.
    return os.path.join(root, *parts[-2:]) if len(parts) > 1 else None


def _by_file_name(root: str, image: Mapping[str, Any]) -> str | None:
    return os.path.join(root, image["file_name"]) if image.get("file_name") else None


def _by_digits(root: str, image: Mapping[str, Any]) -> str | None:
    stem, extension = os.path.splitext(os.path.basename(image.get("file_name") or ""))
    return os.path.join(root, stem[-12:] + extension) if stem[-12:].isdigit() else None


def _by_url_name(root: str, image: Mapping[str, Any]) -> str | None:
    name = (image.get("coco_url") or "").split("/")[-1]
    return os.path.join(root, name) if name else None


# LVIS's images are found by the split in their address; COCO's own files have both fields, and their image folder is
# that of the split.
LVIS_RULES = (_by_url_split, _by_file_name, _by_digits, _by_url_name)
COCO_RULES = (_by_file_name, _by_url_split, _by_digits, _by_url_name)


def image_path(root: str, image: Mapping[str, Any]) -> str | None:
    """The file below ``root`` of a row of a json's ``images``, or None where no rule finds one."""
    rules = LVIS_RULES if "neg_category_ids" in image else COCO_RULES
    return next((path for rule in rules if (path := rule(root, image)) and os.path.isfile(path)), None)
