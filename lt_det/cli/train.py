"""``lt-det train``, ``lt-det eval`` and ``lt-det recipes``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lt_det import model_zoo
from lt_det.arguments import argument_parser

__all__ = ["evaluate", "recipes", "train"]


def train(argv: Sequence[str], prog: str = "train") -> int:
    """What ``tools/train_net.py`` does, and for a LazyConfig (``.py``) ``tools/lazyconfig_train_net.py``.

    ``--config-file`` also takes the name of a recipe, as ``lt-det recipes`` lists them.
    """
    args = argument_parser(f"lt-det {prog}").parse_args(list(argv))
    try:
        args.config_file = model_zoo.resolve(args.config_file)
    except ValueError as error:
        print(f"lt-det {prog}: {error}", file=sys.stderr)
        return 2
    from lt_det.engine import launch_main, main
    from lt_det.engine.lazy import main_lazy

    launch_main(main_lazy if args.config_file.endswith(".py") else main, args)
    return 0


def evaluate(argv: Sequence[str]) -> int:
    """A model by its config and weights, or (without ``--config-file``) results files of any model."""
    if any(word.split("=")[0] == "--config-file" for word in argv):
        return train(["--eval-only", *argv], prog="eval")
    from .evaluate import main

    return main(argv)


def recipes(argv: Sequence[str]) -> int:
    """One name a line."""
    if argv:
        print("usage: lt-det recipes", file=sys.stderr)
        return 0 if argv[0] in ("-h", "--help") else 2
    print("\n".join(model_zoo.list_configs()))
    return 0
