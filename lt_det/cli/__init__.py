"""``lt-det``: one console command over what ``tools/*.py`` do. Each command is imported when it is called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from lt_det import __version__
from lt_det.tool import run_tool

__all__ = ["COMMANDS", "main"]

# Name: (module, function, help). A function takes the arguments after the name and returns the exit code.
COMMANDS = {
    "train": ("lt_det.cli.train", "train", "train by a recipe, a yaml or a LazyConfig; Detectron2's arguments"),
    "eval": ("lt_det.cli.train", "evaluate", "evaluate a model (--config-file), or results of any model (--results)"),
    "compare": ("lt_det.cli.compare", "main", "two evaluations by group and category, with a paired bootstrap"),
    "report": ("lt_det.cli.report", "main", "one HTML page of an evaluation, or of two side by side"),
    "predict": ("lt_det.cli.predict", "main", "pictures and results of images, by any Detectron2 checkpoint"),
    "inspect": ("lt_det.report.commands", "inspect_dataset", "one HTML page of a data set before it is trained on"),
    "convert": ("lt_det.cli.convert", "main", "COCO json to LVIS style, splits, class subsets, mixtures"),
    "doctor": ("lt_det.doctor", "main", "check versions, GPU, Detectron2, data sets, a config"),
    "recipes": ("lt_det.cli.train", "recipes", "list the recipes that --config-file takes by name"),
}


def usage() -> str:
    """What ``lt-det --help`` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, _, text) in COMMANDS.items()]
    return "\n".join(
        ["usage: lt-det COMMAND ...", "", *lines, "", "lt-det COMMAND --help has the arguments of a command."]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The console command ``lt-det``.

    Args:
        argv: the words after ``lt-det``; by default those of this process.

    Returns:
        The exit code: 0, or 2 for arguments or input that cannot be used.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(f"lt_det {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        print(f"lt-det: there is no command {argv[0]!r}; there are {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    module, function, _ = COMMANDS[argv[0]]
    return run_tool(lambda: getattr(importlib.import_module(module), function)(argv[1:]) or 0, name=f"lt-det {argv[0]}")
