#!/usr/bin/env python
"""Images per second of one data worker: Detectron2's mapper, its parts, and choices that change it.

Reads real photographs of LVIS (../shared/data/lvis_val_64) or any data set in LVIS's or COCO's format, at the sizes of
Base-LVIS.yaml (short side 640 to 800, long side up to 1333).

    python tools/benchmarks/bench_mapper.py --quick --json mapper.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper

from lt_det.config import get_lt_det_cfg
from lt_det.data import CopyPasteMapper, DatasetRecords, build_train_mapper, open_datasets, register_dataset
from lt_det.io import write_json_atomically

REPO = Path(__file__).resolve().parents[2]


def config(name: str, *options) -> CfgNode:
    cfg = get_lt_det_cfg()
    cfg.merge_from_file(str(REPO / "configs/Base-LVIS.yaml"))
    cfg.DATASETS.TRAIN = (name,)
    cfg.merge_from_list(list(options))
    return cfg


def mappers(name: str, records: DatasetRecords) -> dict:
    """What is measured, by name."""
    bitmask = ("INPUT.MASK_FORMAT", "bitmask")
    return {
        "Detectron2, polygon masks": DatasetMapper(config(name), True),
        "Detectron2, bitmasks": DatasetMapper(config(name, *bitmask), True),
        "resized by torch": build_train_mapper(config(name, "INPUT.RESIZE_WITH", "torch"), records),
        "resized by cv2": build_train_mapper(config(name, "INPUT.RESIZE_WITH", "cv2"), records),
        "boxes alone": DatasetMapper(config(name, "MODEL.MASK_ON", False), True),
        "copy-paste into every second image": CopyPasteMapper(config(name), True, records),
        "copy-paste into every image": CopyPasteMapper(config(name, "INPUT.COPY_PASTE.PROB", 1.0), True, records),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--annotations", default=str(REPO.parent / "shared/data/lvis_val_64/lvis_val_64.json"))
    parser.add_argument("--images", default=str(REPO.parent / "shared/data/lvis_val_64/images"))
    parser.add_argument("--json", metavar="FILE", help="write the numbers here")
    args = parser.parse_args()
    register_dataset("bench_mapper", args.annotations, args.images)
    records = open_datasets("bench_mapper")
    chosen = list(range(len(records)))[:64]
    measured = mappers("bench_mapper", records)
    seconds: dict[str, list[float]] = {name: [] for name in measured}
    for _ in range(2 if args.quick else 5):
        for name, mapper in measured.items():  # taking turns, so that a busy moment of the machine meets all
            np.random.seed(0)
            start = time.process_time()
            for i in chosen:
                mapper(records[i])
            seconds[name].append((time.process_time() - start) / len(chosen))
    rows = [{"name": name, "images_per_second": 1 / statistics.median(taken)} for name, taken in seconds.items()]
    for row in rows:
        row["ratio_to_detectron2"] = row["images_per_second"] / rows[0]["images_per_second"]
        print(f"{row['name']:38}{row['images_per_second']:8.1f} images/s{row['ratio_to_detectron2']:8.2f}")
    if args.json:
        write_json_atomically(args.json, {"rows": rows})


if __name__ == "__main__":
    main()
