#!/usr/bin/env python
"""Looks at a data set before it is trained on, and writes one HTML page that opens without a network.

    tools/inspect_dataset.py --annotations lvis_v1_train.json --output inspect.html
    tools/inspect_dataset.py --dataset glyph_lvis_train --output inspect.html

On the page: the class histogram with its frequency groups, what an epoch shows of each class under each sampler,
advice on the repeat threshold, instances an image, box sizes by group, the company that rare classes keep, and
suspicious entries (duplicates, boxes without size or out of their image, categories without images, ...).
"""

import sys

from lt_det.report.commands import inspect_dataset
from lt_det.tool import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(inspect_dataset))
