#!/usr/bin/env python
"""CPU seconds, seconds and peak memory of json readers on results of boxes, results of masks, and annotations.

Each reader turns the file into the same columns, in a process of its own; the clock starts behind the imports and the
loading of lt_det's compiled code (bench_evaluation.py tells it). The readers take turns, medians over the repeats. The
files are those of bench_evaluation.py (results, of LVIS v1 val's shape) and of lvis_shaped.py (annotations, of LVIS v1
train's). "evaluation" is the whole of it from the two files to the numbers, the results read by lt_det or by msgspec.

    python tools/benchmarks/bench_json.py --quick

duckdb (with pyarrow, for masks), orjson and pysimdjson are measured where they are installed; lt_det does not need
them.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import itertools
import json
import operator
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from bench_evaluation import load_compiled_code, make_problem, peak_megabytes
from lvis_shaped import write_lvis_shaped

READERS = ("lt_det", "msgspec", "orjson", "pysimdjson", "json", "duckdb")
MODULES = {"pysimdjson": "simdjson"}  # where a reader is not called as its module


def columns_of(get: Callable[[str], Callable], block: list, kind: str) -> list[np.ndarray]:
    """``get``: what fetches a field of an object."""
    n = len(block)
    every = itertools.chain.from_iterable
    out = [
        np.fromiter(map(get("image_id"), block), np.int64, n),
        np.fromiter(map(get("category_id"), block), np.int64, n),
    ]
    if kind != "annotations":
        out.append(np.fromiter(map(get("score"), block), np.float64, n))
    if kind == "segm":
        masks = list(map(get("segmentation"), block))
        texts = list(map(get("counts"), masks))
        out.append(np.fromiter(every(map(get("size"), masks)), np.int64, 2 * n))
        out += [np.fromiter(map(len, texts), np.int64, n), np.frombuffer("".join(texts).encode(), np.uint8)]
    else:
        out.append(np.fromiter(every(map(get("bbox"), block)), np.float64, 4 * n))
    if kind == "annotations":
        polygons = list(every(map(get("segmentation"), block)))
        out.append(np.fromiter(map(len, polygons), np.int64, len(polygons)))
        out.append(np.fromiter(every(polygons), np.float64, int(out[-1].sum())))
    return out


def in_blocks(path: str, kind: str, decode: Callable[[bytes], list], get: Callable) -> Iterator[list[np.ndarray]]:
    from lt_det.io.json_blocks import iter_json_blocks, iter_json_list

    gc.disable()
    if kind == "annotations":
        blocks = (
            b for name, b in iter_json_blocks(path, {"annotations": decode, "images": decode}) if name == "annotations"
        )
    else:
        blocks = iter_json_list(path, decode)
    return (columns_of(get, block, kind) for block in blocks)


def read(reader: str, path: str, kind: str) -> int:
    """Number of objects read."""
    if reader == "lt_det" and kind == "annotations":
        from lt_det.data.annotation_file import open_annotation_file

        return open_annotation_file(path, cache=False).num_objects
    if reader == "lt_det":
        from lt_det.evaluation import read_results

        kept = [(p.image_id, p.category_id, p.score, p.boxes, p.masks) for p in read_results(path, progress=False)]
        return sum(len(p[0]) for p in kept)
    if reader == "duckdb":
        return sum(len(part[0]) for part in list(by_duckdb(path, kind)))
    if reader == "msgspec":
        decode, get = msgspec_decoder(kind), operator.attrgetter
    elif reader == "orjson":
        import orjson

        decode, get = orjson.loads, operator.itemgetter
    elif reader == "pysimdjson":
        import simdjson

        parser = simdjson.Parser()
        decode, get = (lambda block: parser.parse(block).as_list()), operator.itemgetter
    else:
        decode, get = json.loads, operator.itemgetter
    return sum(len(part[0]) for part in list(in_blocks(path, kind, decode, get)))


def msgspec_decoder(kind: str) -> Callable[[bytes], list]:
    import msgspec

    fields = {"annotations": [("segmentation", list[list[float]] | None, None)]}
    mask = msgspec.defstruct("Mask", [("size", tuple[int, int]), ("counts", str)], gc=False)
    fields["segm"] = [("score", float), ("segmentation", mask)]
    fields["bbox"] = [("score", float)]
    box = [] if kind == "segm" else [("bbox", tuple[float, float, float, float] | None, None)]
    ids = [("image_id", int, 0), ("category_id", int, 0)]  # images have none
    rest = [(*f[:2], *(f[2:] or (None,))) for f in fields[kind]]
    return msgspec.json.Decoder(list[msgspec.defstruct("Object", [*ids, *rest, *box], gc=False)]).decode


def by_duckdb(path: str, kind: str) -> Iterator[list[np.ndarray]]:
    import duckdb

    connection = duckdb.connect()
    connection.execute("SET threads = 2")
    head = "image_id: 'BIGINT', category_id: 'BIGINT'"
    if kind == "bbox":
        columns = f"{head}, score: 'DOUBLE', bbox: 'DOUBLE[]'"
        query = "image_id, category_id, score, bbox[1] x, bbox[2] y, bbox[3] w, bbox[4] h"
    else:
        columns = f"{head}, score: 'DOUBLE', segmentation: 'STRUCT(size BIGINT[], counts VARCHAR)'"
        query = "image_id, category_id, score, segmentation.size[1] h, segmentation.size[2] w, segmentation.counts c"
    found = connection.sql(f"SELECT {query} FROM read_json('{path}', format = 'array', columns = {{{columns}}})")
    if kind == "bbox":
        yield list(found.fetchnumpy().values())
        return
    warnings.simplefilter("ignore")
    reader = getattr(found, "to_arrow_reader", None) or found.fetch_arrow_reader
    for batch in reader(200_000):
        numbers = [c.to_numpy(zero_copy_only=False) for c in batch.columns[:5]]
        yield [*numbers, np.frombuffer(batch.columns[5].buffers()[2], np.uint8)]


def evaluate(reader: str, paths: list[str], kind: str) -> int:
    """The whole evaluation; by msgspec: with the results read by it."""
    from lt_det.evaluation import GroundTruth, evaluate_results, results_io

    if reader == "msgspec":
        decode = msgspec_decoder(kind)
        results_io._read_block = lambda block: [result_part(decode(block), kind)]
    gt = GroundTruth.from_json(paths[0], with_masks=kind == "segm")
    return evaluate_results(gt, paths[1], iou_types=(kind,)).num_results


def result_part(block: list, kind: str):
    """Decoded results as the evaluation takes them."""
    from lt_det.evaluation.results_io import ResultPart
    from lt_det.evaluation.rle import RleTable
    from lt_det.io.results import BOX, CATEGORY, IMAGE, MASK, SCORE

    image, category, score, *rest = columns_of(operator.attrgetter, block, kind)
    fields = np.full(len(score), IMAGE | CATEGORY | SCORE | (BOX if kind == "bbox" else MASK), np.uint8)
    if kind == "bbox":
        return ResultPart(
            image, category, score, rest[0].reshape(-1, 4), fields, RleTable.without_masks(len(score)), {}
        )
    size, length, text = rest
    end = np.cumsum(length)
    masks = RleTable(text, end - length, end, size.reshape(-1, 2))
    return ResultPart(image, category, score, np.zeros((len(score), 4)), fields, masks, {})


def measure(task: str, reader: str, kind: str, paths: list[str]) -> dict:
    command = [sys.executable, __file__, "--one", task, reader, kind, *paths]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{reader} failed on {paths}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000, help="images of the results (300 each)")
    parser.add_argument("--scale", type=float, default=0.2, help="of the annotation file: share of LVIS v1 train")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--data-dir", help="keep the files there, and take them from there")
    parser.add_argument("--quick", action="store_true", help="500 images, a hundredth, once")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        import logging

        logging.disable(logging.WARNING)
        task, reader, kind, *paths = args.one
        own = "lt_det.data" if kind == "annotations" else "lt_det.evaluation"
        importlib.import_module({"lt_det": own, **MODULES}.get(reader, reader))
        if kind != "annotations" and (task == "evaluation" or reader == "lt_det"):
            load_compiled_code(kind)
        before, began = time.process_time(), time.perf_counter()
        count = read(reader, paths[0], kind) if task == "read" else evaluate(reader, paths, kind)
        seconds, wall = time.process_time() - before, time.perf_counter() - began
        print(json.dumps({"cpu_seconds": seconds, "seconds": wall, "megabytes": peak_megabytes(), "objects": count}))
        return
    from tabulate import tabulate

    if args.quick:
        args.images, args.scale, args.repeats = 500, 0.01, 1
    with tempfile.TemporaryDirectory(prefix="lt_det_bench_") as temporary:
        folder = Path(args.data_dir or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        paths = make_problem(folder, args.images)
        shaped = folder / f"lvis_shaped_{args.scale:g}.json"
        paths["annotations"] = shaped if shaped.is_file() else write_lvis_shaped(shaped, args.scale)
        installed = [r for r in READERS if importlib.util.find_spec(MODULES.get(r, r))]
        jobs = [("read", r, kind) for kind in ("bbox", "segm", "annotations") for r in installed]
        jobs = [j for j in jobs if j[1:] != ("duckdb", "annotations")]
        jobs += [("evaluation", r, kind) for kind in ("bbox", "segm") for r in ("lt_det", "msgspec")]
        runs: dict[tuple, list[dict]] = {job: [] for job in jobs}
        for _ in range(args.repeats):
            for job in jobs:
                files = [str(paths[job[2]])] if job[0] == "read" else [str(paths["gt"]), str(paths[job[2]])]
                runs[job].append(measure(*job, files))
    rows = []
    for (task, reader, kind), done in runs.items():
        middle = {k: statistics.median(r[k] for r in done) for k in ("cpu_seconds", "seconds", "megabytes")}
        ours = statistics.median(r["seconds"] for r in runs[task, "lt_det", kind])
        rows.append(
            {"task": task, "file": kind, "reader": reader, **middle, "ratio_to_lt_det": middle["seconds"] / ours}
        )
    print(tabulate(rows, headers="keys", floatfmt=("", "", "", ".2f", ".2f", ".0f", ".2f")))
    if args.json:
        from lt_det.io import write_json_atomically

        write_json_atomically(args.json, {"images": args.images, "scale": args.scale, "rows": rows}, indent=1)


if __name__ == "__main__":
    main()
