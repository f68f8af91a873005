#!/usr/bin/env python
"""How often a trained classifier names ground-truth boxes right, by frequency group: classification without detection.

    tools/experiments/box_accuracy.py output/glyph_balms [more folders]

A folder has config.yaml and model_final.pth, as training leaves them. The boxes are those of its DATASETS.TEST; the
class is the best one after the calibrator, background left out. Writes box_accuracy.json, in percent, into each folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from tabulate import tabulate
from torch import nn

from lt_det.data import ClassStatistics, prepare_dataset
from lt_det.engine.trained import annotated_test_mapper, load_trained
from lt_det.gml import Teacher
from lt_det.io import write_json_atomically
from lt_det.progress import progress_bar
from lt_det.tool import run_tool


@torch.no_grad()
def box_accuracy(cfg: CfgNode, detector: nn.Module) -> dict[str, float | None]:
    """Percent of right boxes: ``{"all", "r", "c", "f"}``, the mean over boxes; None for a group without any."""
    teacher = Teacher(detector)
    predictor = teacher.predictors[-1]
    (dataset,) = cfg.DATASETS.TEST
    prepare_dataset(dataset)
    groups = ClassStatistics.from_metadata(MetadataCatalog.get(dataset)).frequency_groups
    mapper, labels, found = annotated_test_mapper(cfg), [], []
    for record in progress_bar(DatasetCatalog.get(dataset), unit="image", desc="Boxes"):
        inputs = mapper(record)
        instances = inputs["instances"].to(teacher.detector.device)
        if len(instances):
            features = teacher([inputs], [instances.gt_boxes])[-1][0]
            (scores,) = predictor.predict_probs((predictor.classify(features), features), [instances])
            found.append(scores[:, : predictor.num_classes].argmax(dim=1).cpu().numpy())
            labels.append(instances.gt_classes.cpu().numpy())
    truth = np.concatenate(labels)
    right = np.concatenate(found) == truth
    mine = {"all": np.ones(len(truth), bool)} | {g: np.isin(truth, groups[g]) for g in "rcf"}
    return {g: round(100 * float(right[rows].mean()), 2) if rows.any() else None for g, rows in mine.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    rows = []
    for folder in args.folders:
        accuracy = box_accuracy(*load_trained(folder))
        write_json_atomically(folder / "box_accuracy.json", accuracy)
        rows.append([folder, *accuracy.values()])
    print(tabulate(rows, headers=["folder", *accuracy], floatfmt=".1f", missingval="-", tablefmt="github"))


if __name__ == "__main__":
    run_tool(main)
