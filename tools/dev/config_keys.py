"""The keys that lt_det adds to Detectron2's config, each with its default and what code says of it.

Of a key that lt_det/config.py assigns, the comment above; of a method's option, what ``Args:`` of its class say.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode, get_cfg
from tabulate import tabulate

import lt_det.config
from lt_det.data import samplers_with_options
from lt_det.declaration import declared_options, documented_arguments
from lt_det.losses import LOSS_REGISTRY
from lt_det.modeling import CALIBRATOR_REGISTRY

ALIASES = {"cfg": "", "lt": "MODEL.LONG_TAIL."}


def comments(source: str) -> dict[str, str]:
    """Key or node to comment, from assignments in config.py. Lines without a blank between them share a comment."""
    found: dict[str, str] = {}
    block: list[str] = []
    inside = ""  # "comment" or "assigned": what the line above is
    for line in map(str.strip, source.splitlines()):
        assignment = re.match(r"(?:\w+ = )?(cfg|lt)\.([A-Z][\w.]*) = ", line)
        if line.startswith("#"):
            block = [*block, line] if inside != "assigned" else [line]
            inside = "comment"
        elif assignment:
            found[ALIASES[assignment[1]] + assignment[2]] = " ".join(part.lstrip("# ") for part in block)
            inside = "assigned"
        else:
            block, inside = [], ""
    return found


def added_keys() -> dict[str, Any]:
    """Every key of ``add_lt_det_config`` with its default, in order."""

    def leaves(node: CfgNode, prefix: str = ""):
        for key, value in node.items():
            yield from leaves(value, f"{prefix}{key}.") if isinstance(value, CfgNode) else [(f"{prefix}{key}", value)]

    stock = dict(leaves(get_cfg()))
    added = {k: v for k, v in leaves(lt_det.config.get_lt_det_cfg()) if k not in stock}
    # Newer Detectron2 has this key itself, elsewhere; the page is the same with either.
    added.pop("FLOAT32_PRECISION", None)
    return {**added, "FLOAT32_PRECISION": ""}


def meanings() -> dict[str, str]:
    """Key to its meaning; empty where nothing is said."""
    said = comments(Path(lt_det.config.__file__).read_text())
    by_node = {f"MODEL.LONG_TAIL.{cls.config_node}": [cls] for _, cls in LOSS_REGISTRY}
    by_node["MODEL.LONG_TAIL.CALIBRATOR"] = [cls for _, cls in CALIBRATOR_REGISTRY]
    by_node["DATALOADER"] = [cls for _, cls in samplers_with_options()]
    found = {}
    for key in added_keys():
        node, _, name = key.rpartition(".")
        declared = (documented_arguments(cls).get(name.lower(), "") for cls in by_node.get(node, ()))
        # An option of a class is explained there; the name of the class by the comment of its node.
        found[key] = said.get(key) or next(filter(None, declared), "") or (said.get(node, "") if name == "NAME" else "")
    return found


def config_page() -> str:
    """docs/config.md."""
    meaning, losses = meanings(), {f"MODEL.LONG_TAIL.{cls.config_node}" for _, cls in LOSS_REGISTRY}
    rows = [
        [f"`{key}`", f"`{default!r}`", meaning[key].replace("|", "\\|")]
        for key, default in added_keys().items()
        if key.rpartition(".")[0] not in losses
    ]
    samplers = [
        [f"`{name}`", f"`DATALOADER.{o.key}`", f"`{o.default!r}`", o.comment.replace("|", "\\|")]
        for name, cls in sorted(samplers_with_options())
        for o in declared_options(cls)
    ]
    return (
        "# Config keys\n\nWhat lt_det adds to [Detectron2's keys](https://detectron2.readthedocs.io/en/latest/modules/"
        "config.html#yaml-config-references).\nThe options of each loss, `MODEL.LONG_TAIL.<LOSS>.*`, are on the page "
        "[Methods](methods.md).\nThis page is generated from `lt_det/config.py` and the classes by "
        "`python tools/dev/generate_docs.py`.\n\n"
        + tabulate(rows, headers=["key", "default", "meaning"], tablefmt="github", disable_numparse=True)
        + "\n\n## Options of samplers\n\nThey are keys of `DATALOADER`, most of them Detectron2's, which all stages "
        "share; in a LazyConfig\n`dataloader.train.sampler_options` takes them in lower case. Samplers that are not "
        "here have none.\n\n"
        + tabulate(samplers, headers=["sampler", "key", "default", "meaning"], tablefmt="github", disable_numparse=True)
        + "\n"
    )
