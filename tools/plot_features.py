#!/usr/bin/env python
"""Draw what trained models make of rare and of frequent categories: box features of a validation set in the plane.

    tools/plot_features.py --model "softmax=output/glyph_softmax" --model "GML=output/glyph_gml" --output features.png

A model is a folder with config.yaml and model_final.pth, as training leaves it. The features are those that the
classifier sees, of the ground-truth boxes of the first model's DATASETS.TEST. Needs scikit-learn (pip install
"lt_det[features]").
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes
from tabulate import tabulate

from lt_det.data import ClassStatistics, prepare_dataset
from lt_det.engine.trained import annotated_test_mapper, load_trained
from lt_det.gml import Teacher
from lt_det.progress import progress_bar
from lt_det.tool import run_tool
from lt_det.visualization import plot_features, short_names


def choose(statistics: ClassStatistics, records: list[dict], per_group: int) -> dict[int, str]:
    """The rare and frequent categories with the most boxes to show, with their group."""
    boxes = np.bincount([a["category_id"] for r in records for a in r["annotations"]], minlength=statistics.num_classes)
    chosen = {}
    for group in "rf":
        mine = sorted(statistics.frequency_groups[group].tolist(), key=lambda c: (-boxes[c], c))
        chosen.update({c: group for c in mine[:per_group] if boxes[c] > 1})
    return chosen


@torch.no_grad()
def features_of(cfg: CfgNode, teacher: Teacher, records: list[dict], wanted: set[int]) -> tuple[np.ndarray, np.ndarray]:
    mapper = annotated_test_mapper(cfg)
    features, labels = [], []
    for record in progress_bar(records, unit="image", desc="Features"):
        instances = (inputs := mapper(record))["instances"].to(teacher.detector.device)
        rows = torch.tensor([c in wanted for c in instances.gt_classes.tolist()], dtype=torch.bool)
        if rows.any():
            boxes = Boxes(instances.gt_boxes.tensor[rows])
            features.append(teacher([inputs], [boxes])[-1][0].cpu().numpy())
            labels.append(instances.gt_classes[rows].cpu().numpy())
    return np.concatenate(features), np.concatenate(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", action="append", required=True, metavar="NAME=FOLDER", help="repeat for models side by side"
    )
    parser.add_argument("--output", required=True, help="of the picture")
    parser.add_argument("--categories", type=int, default=8, help="of each group")
    parser.add_argument("--seed", type=int, default=0, help="of t-SNE")
    args = parser.parse_args()
    models = {}
    for text in args.model:
        name, found, folder = text.partition("=")
        if not found:
            raise SystemExit(f"--model {text!r}: write NAME=FOLDER")
        try:
            cfg, model = load_trained(Path(folder))
        except FileNotFoundError as error:
            raise SystemExit(f"--model: {error}") from None
        models[name] = cfg, Teacher(model)
    dataset = next(iter(models.values()))[0].DATASETS.TEST[0]
    prepare_dataset(dataset)
    records, metadata = DatasetCatalog.get(dataset), MetadataCatalog.get(dataset)
    groups = choose(ClassStatistics.from_metadata(metadata), records, args.categories)
    found = {name: features_of(cfg, teacher, records, set(groups)) for name, (cfg, teacher) in models.items()}
    names = short_names(metadata.thing_classes)
    names = {c: names[c] for c in groups}
    title = f"{dataset}: box features, rare (triangles, warm) and frequent (discs, cold) categories"
    scores = plot_features(found, names, groups, args.output, title=title, seed=args.seed)
    rows = [[name, of_group.get("r"), of_group.get("f")] for name, of_group in scores.items()]
    print(
        tabulate(rows, headers=["silhouette", "rare", "frequent"], floatfmt="+.3f", missingval="-", tablefmt="github")
    )
    print(f"In {args.output}")


if __name__ == "__main__":
    run_tool(main)
