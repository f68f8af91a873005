#!/usr/bin/env python
"""Annotation files: COCO to LVIS style, splits, class subsets, mixtures; also ``lt-det convert``. See --help."""

import sys

from lt_det.cli.convert import main

if __name__ == "__main__":
    sys.exit(main())
