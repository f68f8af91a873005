"""Detectron2's own tests of its box predictor, ROI heads and detectors, with LongTailOutputLayers in the place of
FastRCNNOutputLayers: whatever passes with the one passes with the other.

They come with Detectron2's source and not with its wheel: DETECTRON2_TESTS names the folder ``tests`` of a checkout.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

RUN = """
import sys, unittest
import detectron2.modeling.roi_heads as heads
from detectron2.modeling.roi_heads import cascade_rcnn, fast_rcnn, roi_heads
if sys.argv[1] == "swap":
    from lt_det.modeling import LongTailOutputLayers
    for module in (heads, cascade_rcnn, fast_rcnn, roi_heads):
        module.FastRCNNOutputLayers = LongTailOutputLayers
import pytest
sys.exit(pytest.main(["-p", "no:cacheprovider", "-q", "-rA", *sys.argv[2:]]))
"""
FILES = ("test_fast_rcnn.py", "test_roi_heads.py", "test_model_e2e.py")


def passed(which: str, files: list[str]) -> set[str]:
    command = [sys.executable, "-c", RUN, which, *files]
    output = subprocess.run(command, capture_output=True, text=True, cwd=Path(files[0]).parent, timeout=900).stdout
    return set(re.findall(r"^PASSED (\S+)", output, re.M))


def test_no_more_of_them_fail():
    folder = os.environ.get("DETECTRON2_TESTS")
    if not folder:
        pytest.skip("Detectron2's tests are not here: DETECTRON2_TESTS does not name their folder")
    files = [str(Path(folder).resolve() / "modeling" / name) for name in FILES]
    stock, ours = passed("stock", files), passed("swap", files)
    assert len(stock) > 15
    assert stock - ours == set()
