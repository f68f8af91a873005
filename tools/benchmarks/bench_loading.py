#!/usr/bin/env python
"""Time and memory of opening a training set of LVIS v1's size, beside Detectron2's loader in the same run.

The annotation file is that of tools/benchmarks/lvis_shaped.py (100,170 images, 1,270,141 objects); with --quick a tenth
of it. Every measurement is a process of its own. Seconds are CPU seconds of the process; memory is what loading adds to
what the imports take. The first load counts the loading of compiled code, not its compilation, which an installation
does once.

    python tools/benchmarks/bench_loading.py --quick --json loading.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lvis_shaped import lvis_shaped_file

from lt_det.io import write_json_atomically

GOALS = {
    "first_load_speedup": ("at least", 4.0),
    "first_load_memory_ratio": ("at most", 1 / 6),
    "cached_load_seconds": ("at most", 0.5),
    "private_megabytes_per_process": ("at most", 50.0),
    "statistics_seconds": ("at most", 1.0),
    "first_batch_seconds": ("at most", 12.0),
    "processes_gigabytes": ("at most", 3.0),
}
CLASSES = 1203
REPO = Path(__file__).resolve().parents[2]


def _peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _memory(field: str) -> float:
    """Megabytes of this process: ``Anonymous`` (its own) or ``Pss`` (with its share of what several have)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


# ------------------------------------------------------------------------------------- what the processes do and report


def load_detectron2(path: str) -> dict:
    from detectron2.data.datasets.lvis import load_lvis_json

    __import__("lvis")
    before, start, wall = _peak_megabytes(), time.process_time(), time.perf_counter()
    records = load_lvis_json(path, "coco/")
    return {
        "images": len(records),
        "seconds": time.process_time() - start,
        "wall_seconds": time.perf_counter() - wall,
        "megabytes": _peak_megabytes() - before,
        "peak_megabytes": _peak_megabytes(),
    }


def compile_code(path: str) -> dict:
    """What is compiled at the first use after an installation is loaded by all later processes."""
    from lt_det.io.annotations import scan_annotations

    start = time.process_time()
    scan_annotations(b"[]" + b" " * (1 << 20))
    return {"seconds": time.process_time() - start}


def load_ours(path: str) -> dict:
    from lt_det.data import load_lvis_or_coco_json

    before, start, wall = _peak_megabytes(), time.process_time(), time.perf_counter()
    records = load_lvis_or_coco_json(path, "coco/", check_images=False)
    return {
        "images": len(records),
        "seconds": time.process_time() - start,
        "wall_seconds": time.perf_counter() - wall,
        "megabytes": _peak_megabytes() - before,
        "peak_megabytes": _peak_megabytes(),
    }


def use_ours(path: str) -> dict:
    """What each further process of a node does: open, look at images."""
    from lt_det.data import DatasetRecords, load_lvis_or_coco_json

    anonymous = _memory("Anonymous")
    start = time.process_time()
    records = DatasetRecords([load_lvis_or_coco_json(path, "coco/", check_images=False)]).with_annotations()
    opened = time.process_time() - start
    start = time.process_time()
    looked_at = range(0, len(records), max(1, len(records) // 2000))
    for i in looked_at:
        records[i]
    access = (time.process_time() - start) / len(looked_at)
    return {
        "seconds": opened,
        "milliseconds_per_image": 1000 * access,
        "private_megabytes": _memory("Anonymous") - anonymous,
        "import_megabytes": anonymous,
    }


def statistics(path: str) -> dict:
    """Class statistics, every sampler's factors and the prior of one of them."""
    from lt_det.data import (
        ClassStatistics,
        DatasetRecords,
        class_balanced_repeat_factors,
        expected_counts,
        instance_aware_repeat_factors,
        load_lvis_or_coco_json,
        repeat_factors_from_category_frequency,
    )

    records = DatasetRecords([load_lvis_or_coco_json(path, "coco/", check_images=False)]).with_annotations()
    start = time.process_time()
    counts = ClassStatistics.from_json(path)
    factors = repeat_factors_from_category_frequency(records, 0.001)
    instance_aware_repeat_factors(records, 0.001)
    class_balanced_repeat_factors(records)
    prior = counts.with_sampled_counts(expected_counts(records, CLASSES, factors)).prior("sampled")
    return {"seconds": time.process_time() - start, "classes": len(prior)}


class _FirstBatch(Exception):
    pass


def first_batch(path: str) -> dict:
    """tools/train_net.py from its arguments to the first batch of 16 images, without imports: config, data, sampler,
    model, mapper. The images are links to one photograph of each size."""
    from PIL import Image

    from lt_det.data import TrainLoader, load_lvis_or_coco_json
    from lt_det.engine import argument_parser, main

    def stop(self, iterate=TrainLoader.__iter__):
        next(iterate(self))
        raise _FirstBatch

    TrainLoader.__iter__ = stop
    with tempfile.TemporaryDirectory() as folder:
        records = load_lvis_or_coco_json(path, folder, check_images=False)
        os.makedirs(f"{folder}/train2017")
        for i in range(len(records)):
            image = records.file.image(i)
            photograph = f"{folder}/{image['width']}.jpg"
            if not os.path.exists(photograph):
                Image.effect_noise((image["width"], image["height"]), 60).convert("RGB").save(photograph)
            os.symlink(photograph, f"{folder}/train2017/{image['coco_url'].rsplit('/', 1)[1]}")
        del records
        config = REPO / "configs/lvis_balanced_softmax.yaml"
        options = ["MODEL.WEIGHTS", "", "OUTPUT_DIR", f"{folder}/output", "DATALOADER.NUM_WORKERS", "0"]
        options += ["DATASETS.REGISTER", repr([["first_batch", path, folder]])]
        options += ["DATASETS.TRAIN", "('first_batch',)", "DATASETS.TEST", "()"]
        before, start = _peak_megabytes(), time.process_time()
        with contextlib.suppress(_FirstBatch):
            main(argument_parser().parse_args(["--config-file", str(config), *options]))
        return {"seconds": time.process_time() - start, "megabytes": _peak_megabytes() - before}


def hold(path: str) -> dict:
    """Open and use the data set, tell it, and wait for the word to measure."""
    used = use_ours(path)
    print("ready", flush=True)
    sys.stdin.readline()
    return {**used, "proportional_megabytes": _memory("Pss")}


PARTS = {f.__name__: f for f in (load_detectron2, compile_code, load_ours, use_ours, statistics, first_batch, hold)}


def _start(part: str, path: Path, cache: str) -> subprocess.Popen:
    environment = {**os.environ, "LT_DET_CACHE": cache}
    command = [sys.executable, __file__, "--part", part, "--annotations", str(path)]
    return subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _result(process: subprocess.Popen) -> dict:
    out, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{' '.join(process.args)} failed")
    return json.loads(out.splitlines()[-1])


def measure(path: Path, processes: int, cache: str) -> dict:
    theirs = _result(_start("load_detectron2", path, cache))
    compiled = _result(_start("compile_code", path, cache))
    first = _result(_start("load_ours", path, cache))
    further = _result(_start("use_ours", path, cache))
    counted = _result(_start("statistics", path, cache))
    started = _result(_start("first_batch", path, cache))
    # All at once: each opens and uses the data set, and all measure while all are there.
    running = [_start("hold", path, cache) for _ in range(processes)]
    for process in running:
        while (line := process.stdout.readline()) and line.strip() != "ready":
            pass
    for process in running:
        process.stdin.write("\n")
        process.stdin.flush()
        time.sleep(0.2)  # one after the other, while the others wait
    held = [_result(process) for process in running]
    return {
        "first_load_speedup": theirs["seconds"] / first["seconds"],
        "first_load_memory_ratio": first["megabytes"] / theirs["megabytes"],
        "cached_load_seconds": further["seconds"],
        "private_megabytes_per_process": max(h["private_megabytes"] for h in [further, *held]),
        "statistics_seconds": counted["seconds"],
        "first_batch_seconds": started["seconds"],
        "processes": processes,
        "processes_gigabytes": sum(h["private_megabytes"] for h in held) / 1024,
        "milliseconds_per_image": further["milliseconds_per_image"],
        "compile_or_load_seconds": compiled["seconds"],
        "first_batch": started,
        "detectron2": theirs,
        "lt_det": first,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of LVIS v1's size, 2 processes at once")
    parser.add_argument("--processes", type=int, help="processes at once (default 8)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers here")
    parser.add_argument("--annotations", type=Path, help="another annotation file in LVIS's format")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(PARTS[args.part](str(args.annotations))))
        return
    path = args.annotations or lvis_shaped_file(0.1 if args.quick else 1.0)
    with tempfile.TemporaryDirectory(dir=path.parent) as cache:
        result = measure(path, args.processes or (2 if args.quick else 8), cache)
    theirs, ours = result["detectron2"], result["lt_det"]
    print(f"{path}: {path.stat().st_size / 1e9:.2f} GB, {ours['images']} images")
    print(f"{'first load':14}{'CPU s':>8}{'wall s':>8}{'added MB':>10}{'peak MB':>10}")
    for name, row in (("Detectron2", theirs), ("lt_det", ours)):
        print(
            f"{name:14}{row['seconds']:8.2f}{row['wall_seconds']:8.2f}{row['megabytes']:10.0f}"
            f"{row['peak_megabytes']:10.0f}"
        )
    for key, (bound, goal) in GOALS.items():
        print(f"{key:32}{result[key]:8.3f}  (goal: {bound} {goal:.3g})")
    seconds = result["compile_or_load_seconds"]
    print(f"compiled code, before: {seconds:.2f} s (compiled only where it was not yet)")
    print(f"a record on access: {result['milliseconds_per_image']:.3f} ms")
    if args.json:
        write_json_atomically(args.json, result, indent=1)
        print(f"wrote {args.json}")


if __name__ == "__main__":
    main()
