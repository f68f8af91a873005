#!/usr/bin/env python
"""Predicts images: pictures and a results json; see ``tools/predict.py --help``."""

import sys

from lt_det.cli.predict import main
from lt_det.tool import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(main, name="predict"))
