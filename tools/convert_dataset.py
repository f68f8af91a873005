#!/usr/bin/env python
"""Annotation files: COCO to LVIS style, splits, class subsets, mixtures; also ``lt-det convert``. See --help."""

import sys

from lt_det.cli.convert import main
from lt_det.tool import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(main))
