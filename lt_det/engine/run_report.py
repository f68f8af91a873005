"""The page of a run, after its evaluation (``TEST.REPORT``)."""

from __future__ import annotations

import logging
import os

from detectron2.data import MetadataCatalog
from torch import nn

from lt_det.evaluation import LongTailLVISEvaluator

logger = logging.getLogger(__name__)


def write_page(evaluator: LongTailLVISEvaluator, model: nn.Module) -> None:
    """Write ``report.html`` and ``report_thresholds.csv`` where an evaluation with ``write_submission`` wrote.

    Args:
        evaluator: has evaluated.
        model: for the lengths of its classifier's weights.
    """
    from lt_det.report import write_report

    folder, gt = evaluator.output_dir, evaluator.ground_truth
    if folder is None or not gt.num_annotations:
        return
    metadata = MetadataCatalog.get(evaluator.dataset_name)
    state = {k: v.detach().cpu() for k, v in model.state_dict().items() if "box_predictor" in k}
    output = os.path.join(folder, "report.html")
    write_report(
        gt, [folder], output, annotations=metadata.json_file, image_root=metadata.get("image_root") or "",
        weights=[(state, metadata.get("thing_classes")) if state else None],
    )  # fmt: skip
    logger.info("Wrote %s, which opens in a browser", output)
