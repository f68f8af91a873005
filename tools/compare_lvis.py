#!/usr/bin/env python
"""Compares two runs by frequency group and category, with a paired bootstrap over images; also ``lt-det compare``.

tools/compare_lvis.py output/run_a/inference output/run_b/inference --annotations lvis_v1_val.json
"""

import sys

from lt_det.cli.compare import main
from lt_det.tool import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(main))
