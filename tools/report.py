#!/usr/bin/env python
"""Writes one HTML page of an evaluated model, or of two side by side; see ``tools/report.py --help``."""

import sys

from lt_det.cli.report import main
from lt_det.tool import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(main, name="report"))
