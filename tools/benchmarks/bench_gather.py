#!/usr/bin/env python
"""Memory and time of an evaluation over ranks: 8 processes of gloo, 2,500 images each, 300 detections an image.

Every rank gives its images' detections to LongTailLVISEvaluator and all meet in ``evaluate()``. Told for rank 0, which
gathers, and for the largest of the others: memory of their own while images are processed and the most of it by the end
(both above what they began with), and CPU seconds.

    python tools/benchmarks/bench_gather.py --quick --json gather.json
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm

from lt_det.evaluation import LongTailLVISEvaluator
from lt_det.io import write_json_atomically

CATEGORIES, OBJECTS, DETECTIONS = 1203, 12, 300


def write_truth(path: Path, num_images: int) -> None:
    """Boxes of LVIS's number an image, categories by Zipf's law."""
    rng = np.random.default_rng(0)
    share = 1.0 / np.arange(1, CATEGORIES + 1)
    category = rng.choice(CATEGORIES, (num_images, OBJECTS), p=share / share.sum()) + 1
    box = (rng.random((num_images, OBJECTS, 4)) * 200 + 10).round(1)
    annotations = [
        {"id": i * OBJECTS + j + 1, "image_id": i + 1, "category_id": int(category[i, j]),
         "bbox": box[i, j].tolist(), "area": float(box[i, j, 2] * box[i, j, 3])}
        for i in range(num_images) for j in range(OBJECTS)
    ]  # fmt: skip
    images = [
        {"id": i + 1, "width": 640, "height": 480, "neg_category_ids": [], "not_exhaustive_category_ids": [],
         "coco_url": f"http://x/val2017/{i + 1}.jpg"} for i in range(num_images)
    ]  # fmt: skip
    categories = [{"id": c + 1, "name": str(c), "frequency": "fcr"[min(2, c // 400)]} for c in range(CATEGORIES)]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def anonymous_megabytes() -> float:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("Anonymous:"))


def run_rank(rank: int, world: int, port: int, truth: str, images: int, queue: mp.Queue) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, world, rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    comm.create_local_process_group(world)
    DatasetCatalog.register("bench_gather", list)
    ids = {c + 1: c for c in range(CATEGORIES)}
    MetadataCatalog.get("bench_gather").set(
        json_file=truth,
        evaluator_type="lvis",
        thing_dataset_id_to_contiguous_id=ids,
        thing_classes=[str(i) for i in ids],
    )
    evaluator = LongTailLVISEvaluator("bench_gather", tasks=("bbox",))
    evaluator.reset()
    start_memory, start = anonymous_megabytes(), time.process_time()
    generator = torch.Generator().manual_seed(rank)
    for image in range(rank * images, (rank + 1) * images):
        found = Instances((480, 640))
        corner = torch.rand(DETECTIONS, 2, generator=generator) * 300
        found.pred_boxes = Boxes(
            torch.cat([corner, corner + 10 + 200 * torch.rand(DETECTIONS, 2, generator=generator)], 1)
        )
        found.scores = torch.rand(DETECTIONS, generator=generator)
        found.pred_classes = (CATEGORIES ** torch.rand(DETECTIONS, generator=generator)).long() % CATEGORIES
        evaluator.process([{"image_id": image + 1}], [{"instances": found}])
    processed, middle = anonymous_megabytes() - start_memory, time.process_time()
    comm.synchronize()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    results = evaluator.evaluate()
    queue.put(
        {
            "rank": rank,
            "processing_megabytes": processed,
            "gathering_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before,
            "processing_seconds": middle - start,
            "gathering_seconds": time.process_time() - middle,
            "AP": results["bbox"]["AP"] if rank == 0 else None,
        }
    )
    comm.synchronize()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 ranks of 100 images")
    parser.add_argument("--ranks", type=int, help="processes (default 8)")
    parser.add_argument("--images", type=int, help="images of each (default 2,500)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers here")
    args = parser.parse_args()
    ranks = args.ranks or (4 if args.quick else 8)
    images = args.images or (100 if args.quick else 2500)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.get_context("fork")  # what is imported is shared, so that memory is the evaluation's
    with tempfile.TemporaryDirectory() as folder:
        truth = os.path.join(folder, "truth.json")
        write_truth(Path(truth), ranks * images)
        queue = context.Queue()
        processes = [
            context.Process(target=run_rank, args=(rank, ranks, port, truth, images, queue)) for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        told = sorted((queue.get(timeout=550) for _ in processes), key=lambda row: row["rank"])
        for process in processes:
            process.join()
    others = {key: max(row[key] for row in told[1:]) for key in told[0] if key not in ("rank", "AP")}
    print(f"{ranks} ranks of {images} images, {DETECTIONS} detections each; AP {told[0]['AP']:.2f}")
    print(f"{'':24}{'rank 0':>10}{'others':>10}")
    for key, value in others.items():
        print(f"{key.replace('_', ' '):24}{told[0][key]:10.1f}{value:10.1f}")
    if args.json:
        write_json_atomically(
            args.json, {"ranks": ranks, "images": images, "rank_0": told[0], "others": others}, indent=1
        )


if __name__ == "__main__":
    main()
