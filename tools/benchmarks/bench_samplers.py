#!/usr/bin/env python
"""Time repeat factors and the layout of an epoch at the size of LVIS v1 train, beside Detectron2's loops.

LVIS v1 train has 100,170 images and 1,270,141 instances of 1203 categories. The records here have these
sizes and LVIS v1's real image counts per category (they ship with Detectron2); which images a category is
in is drawn at random. With --quick all sizes are a tenth.
"""

import argparse
import gc
import logging
import statistics
import time

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.data.samplers import RepeatFactorTrainingSampler as Detectron2Sampler

from lt_det.data import (
    ClassStatistics,
    RepeatFactorTrainingSampler,
    class_balanced_repeat_factors,
    expected_counts,
    instance_aware_repeat_factors,
    repeat_factors_from_category_frequency,
)
from lt_det.io import write_json_atomically

IMAGES, INSTANCES, THRESHOLD = 100_170, 1_270_141, 0.001


def make_records(scale: float, seed: int = 0) -> tuple[list[dict], int]:
    """Records with LVIS v1's image counts per category, scaled; further instances go to random pairs."""
    rng = np.random.default_rng(seed)
    counts = ClassStatistics.from_category_info(MetadataCatalog.get("lvis_v1_train").class_image_count).image_count
    images = int(IMAGES * scale)
    counts = np.maximum(1, (counts * scale).astype(np.int64))
    image = np.concatenate([rng.choice(images, count, replace=False) for count in counts])
    category = np.repeat(np.arange(len(counts)), counts)
    more = rng.integers(0, len(image), int(INSTANCES * scale) - len(image))
    image, category = np.concatenate([image, image[more]]), np.concatenate([category, category[more]])
    records = [{"annotations": []} for _ in range(images)]
    for i, c in zip(image.tolist(), category.tolist()):
        records[i]["annotations"].append({"category_id": c})
    return records, len(counts)


def medians(functions: list, repeats: int) -> list[float]:
    """Median seconds of each function, taking turns so that a busy moment of the machine meets all."""
    times = [[] for _ in functions]
    for _ in range(repeats):
        for function, taken in zip(functions, times):
            gc.collect()
            start = time.perf_counter()
            function()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of LVIS v1")
    parser.add_argument("--repeats", type=int, default=5, help="repeats of each measurement; the median counts")
    parser.add_argument("--json", metavar="FILE", help="write the numbers here")
    args = parser.parse_args()
    logging.getLogger("detectron2").setLevel(logging.WARNING)  # its loop logs a line per category

    records, num_classes = make_records(0.1 if args.quick else 1.0)
    factors = repeat_factors_from_category_frequency(records, THRESHOLD)
    reference = Detectron2Sampler.repeat_factors_from_category_frequency(records, THRESHOLD)
    if not torch.equal(factors, reference):
        raise RuntimeError("The repeat factors differ from Detectron2's.")
    ours, theirs = RepeatFactorTrainingSampler(factors, seed=0), Detectron2Sampler(factors, seed=0)
    measurements = [
        (
            "repeat factors",
            lambda: repeat_factors_from_category_frequency(records, THRESHOLD),
            lambda: Detectron2Sampler.repeat_factors_from_category_frequency(records, THRESHOLD),
        ),
        (
            "layout of an epoch",
            lambda: ours._epoch(torch.Generator()),
            lambda: theirs._get_epoch_indices(torch.Generator()),
        ),
        ("instance-aware repeat factors", lambda: instance_aware_repeat_factors(records, THRESHOLD), None),
        ("class-balanced repeat factors", lambda: class_balanced_repeat_factors(records), None),
        ("expected counts", lambda: expected_counts(records, num_classes, factors), None),
        (
            "class statistics from records",
            lambda: ClassStatistics.from_dataset_dicts(records, num_classes),
            None,
        ),
    ]
    rows = []
    for name, fast, slow in measurements:
        if slow is None:
            rows.append({"name": name, "seconds": medians([fast], args.repeats)[0]})
            continue
        own, other = medians([fast, slow], args.repeats)
        rows.append({"name": name, "seconds": own, "detectron2_seconds": other, "speedup_vs_detectron2": other / own})

    instances = sum(len(record["annotations"]) for record in records)
    print(f"{len(records)} images, {instances} instances, {num_classes} categories; median of {args.repeats}")
    print(f"{'':32}{'lt_det':>10}{'Detectron2':>12}{'ratio':>8}")
    for row in rows:
        line = f"{row['name']:32}{row['seconds']:9.3f}s"
        if "detectron2_seconds" in row:
            line += f"{row['detectron2_seconds']:11.3f}s{row['speedup_vs_detectron2']:8.1f}"
        print(line)
    if args.json:
        content = {"images": len(records), "instances": instances, "categories": num_classes, "rows": rows}
        write_json_atomically(args.json, content)
        print(f"wrote {args.json}")


if __name__ == "__main__":
    main()
