#!/usr/bin/env python
"""Images per second of one data worker: Detectron2's mapper, lt_det's, which gives the same, and copy-paste; and the
parts of the time, with what other libraries would give.

Reads real photographs of LVIS (../shared/data/lvis_val_64) or any data set in LVIS's or COCO's format, at the sizes of
Base-LVIS.yaml (short side 640 to 800, long side up to 1333). CPU seconds of one thread.

    python tools/benchmarks/bench_mapper.py --quick --json mapper.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, detection_utils
from PIL import Image
from tabulate import tabulate

from lt_det.config import get_lt_det_cfg
from lt_det.data import CopyPasteMapper, DatasetRecords, build_train_mapper, open_datasets, register_dataset
from lt_det.data.pixels import enlarge, read_image
from lt_det.io import write_json_atomically

REPO = Path(__file__).resolve().parents[2]


def config(name: str, *options) -> CfgNode:
    cfg = get_lt_det_cfg()
    cfg.merge_from_file(str(REPO / "configs/Base-LVIS.yaml"))
    cfg.DATASETS.TRAIN = (name,)
    cfg.merge_from_list(list(options))
    return cfg


def mappers(name: str, records: DatasetRecords) -> dict[str, Callable]:
    """What is measured, by name; after each of Detectron2's mappers the one of lt_det that gives the same."""
    result = {}
    bitmask = ("INPUT.MASK_FORMAT", "bitmask")
    for masks, options in (("polygons", ()), ("bitmasks", bitmask), ("no masks", ("MODEL.MASK_ON", False))):
        result[f"Detectron2, {masks}"] = DatasetMapper(config(name, *options), True)
        result[f"lt_det, {masks}"] = build_train_mapper(config(name, *options), records)
    result["copy-paste into every second image"] = CopyPasteMapper(config(name), True, records)
    result["copy-paste into every image"] = CopyPasteMapper(config(name, "INPUT.COPY_PASTE.PROB", 1.0), True, records)
    return result


def resize_by_pillow(image: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def resize_by_torch(image: np.ndarray, height: int, width: int) -> np.ndarray:
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    resized = F.interpolate(pixels, (height, width), mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def resize_by_cv2(image: np.ndarray, height: int, width: int) -> np.ndarray:
    return cv2.resize(np.ascontiguousarray(image), (width, height), interpolation=cv2.INTER_LINEAR)


def read_half(file_name: str) -> np.ndarray:
    """Decoded at half of its size, which JPEG allows, for images that are wanted no larger."""
    with Image.open(file_name) as image:
        image.draft("RGB", (image.width // 2, image.height // 2))
        return np.asarray(image.convert("RGB"))


def parts(records: list[dict], repeats: int) -> list[dict]:
    """Reading and resizing by several libraries: milliseconds an image, and how their pixels differ."""
    files = [record["file_name"] for record in records]
    images = [detection_utils.read_image(file, format="BGR") for file in files]
    sizes = []
    for image in images:
        scale = min(800 / min(image.shape[:2]), 1333 / max(image.shape[:2]))
        sizes.append([int(side * scale + 0.5) for side in image.shape[:2]])
    reading = {
        "reading: Detectron2 (Pillow)": lambda i: detection_utils.read_image(files[i], format="BGR"),
        "reading: lt_det (torchvision)": lambda i: read_image(files[i], "BGR"),
        "reading: OpenCV": lambda i: cv2.imread(files[i], cv2.IMREAD_COLOR),
        "reading at half the size: Pillow": lambda i: read_half(files[i]),
    }
    resizing = {
        f"resizing to 800: {name}": lambda i, f=f: f(images[i], *sizes[i])
        for name, f in (
            ("Detectron2 (Pillow)", resize_by_pillow),
            ("lt_det", enlarge),
            ("torch", resize_by_torch),
            ("OpenCV", resize_by_cv2),
        )
    }
    rows = []
    for group in (reading, resizing):
        seconds = taking_turns(group, len(files), repeats)
        reference = next(iter(group.values()))
        for name, function in group.items():
            row = {"name": name, "milliseconds": 1e3 * seconds[name]}
            if "half" not in name:
                different = [np.abs(function(i).astype(int) - reference(i)) for i in range(len(files))]
                row["largest_difference"] = int(max(d.max() for d in different))
                row["share_different"] = float(np.mean([np.mean(d > 0) for d in different]))
            rows.append(row)
    return rows


def taking_turns(functions: dict[str, Callable], count: int, repeats: int) -> dict[str, float]:
    """Median CPU seconds of one call; turns are taken so that a busy moment of the machine meets all."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            np.random.seed(0)
            start = time.process_time()
            for i in range(count):
                function(i)
            if repeat:  # the first warms up
                seconds[name].append((time.process_time() - start) / count)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer images and repeats")
    parser.add_argument("--annotations", default=str(REPO.parent / "shared/data/lvis_val_64/lvis_val_64.json"))
    parser.add_argument("--images", default=str(REPO.parent / "shared/data/lvis_val_64/images"))
    parser.add_argument("--json", metavar="FILE", help="write the numbers here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    register_dataset("bench_mapper", args.annotations, args.images)
    records = open_datasets("bench_mapper")
    chosen = [records[i] for i in range(len(records))[: 16 if args.quick else 64]]
    repeats = 2 if args.quick else 5
    measured = mappers("bench_mapper", records)
    seconds = taking_turns({n: lambda i, m=m: m(chosen[i]) for n, m in measured.items()}, len(chosen), repeats)
    rows = [{"name": name, "images_per_second": 1 / taken} for name, taken in seconds.items()]
    for row in rows:
        row["ratio_to_detectron2"] = row["images_per_second"] / rows[0]["images_per_second"]
    table = [[r["name"], r["images_per_second"], r["ratio_to_detectron2"]] for r in rows]
    print(tabulate(table, headers=["mapper", "images/s", "ratio"], floatfmt=".2f"))
    of_parts = parts(chosen, repeats)
    columns = ("name", "milliseconds", "largest_difference", "share_different")
    print(tabulate([[r.get(c) for c in columns] for r in of_parts], headers=columns, floatfmt=".4g"))
    if args.json:
        write_json_atomically(args.json, {"rows": rows, "parts": of_parts}, indent=1)


if __name__ == "__main__":
    main()
