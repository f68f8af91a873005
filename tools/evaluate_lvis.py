#!/usr/bin/env python
"""Evaluates the results of any model on an LVIS- or COCO-style data set; also ``lt-det eval --results``.

tools/evaluate_lvis.py --annotations lvis_v1_val.json --results results.json --output-dir output/eval
"""

import sys

from lt_det.cli.evaluate import main
from lt_det.tool import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(main))
