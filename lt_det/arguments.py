"""The command line of a training or an evaluation: Detectron2's arguments, without its imports for ``--help``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

__all__ = ["argument_parser"]

_FLAGS = ("--resume", "--eval-only", "--overwrite")
_EXAMPLES = """
One machine:     {0} --config-file FILE --num-gpus 8
Other settings:  {0} --config-file FILE MODEL.WEIGHTS model.pth SOLVER.BASE_LR 0.01
Two machines:    {0} --config-file FILE --num-gpus 8 --num-machines 2 --machine-rank 0 --dist-url tcp://10.0.0.1:23456
                 and the same with --machine-rank 1 on the other one
"""


class _Parser(argparse.ArgumentParser):
    """Flags may also follow the KEY VALUE pairs."""

    def parse_args(self, args: Sequence[str] | None = None, namespace=None):
        args = list(sys.argv[1:] if args is None else args)
        # ``opts`` takes all that follows its first word, flags too; none of them can be a key or a value.
        flags = [a for a in args if a in _FLAGS]
        return super().parse_args([*flags, *(a for a in args if a not in flags)], namespace)


def argument_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The arguments of Detectron2's ``default_argument_parser``, with its defaults, and ``--overwrite``. The flags may
    also follow the KEY VALUE pairs.

    Args:
        prog: name of the command in its help; by default the script's.
    """
    parser = _Parser(prog=prog, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.epilog = "examples:" + _EXAMPLES.format(parser.prog)
    add = parser.add_argument
    add("--config-file", default="", metavar="FILE", help="yaml or LazyConfig (.py)")
    add("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    add("--eval-only", action="store_true", help="evaluate, do not train")
    add(
        "--overwrite",
        action="store_true",
        help="begin anew in an output folder that holds another run, which is deleted",
    )
    add("--num-gpus", type=int, default=1, help="on each machine")
    add("--num-machines", type=int, default=1, help="that the run is on")
    add("--machine-rank", type=int, default=0, help="number of this machine, from 0")
    # A port of each user's: processes that an earlier run left behind are noticed by its being taken.
    port = 2**15 + 2**14 + (1 if sys.platform == "win32" else os.getuid()) % 2**14
    add("--dist-url", default=f"tcp://127.0.0.1:{port}", metavar="URL", help="where the first machine listens")
    add(
        "opts",
        nargs=argparse.REMAINDER,
        metavar="KEY VALUE",
        help="other settings, last on the line; key=value for a LazyConfig",
    )
    return parser
