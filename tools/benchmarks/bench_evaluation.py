#!/usr/bin/env python
"""Time and peak memory of evaluation engines on the same files, side by side in one run.

Engines: lt_det, the official LVIS API (``lvis``), and ``hotcoco`` (Rust). Each evaluation runs in a process
of its own, from the two json files to the final numbers. The clock starts behind the imports and, for lt_det,
behind the loading of its compiled code, which stands in the column "load". The memory is the process's peak
(resident set); CPU seconds count all threads, imports and loading. The problem is synthetic and has the shape
of LVIS v1 val: 1203 categories, about 12 instances, 10 negative categories and 300 detections an image of
640 x 480, elliptic masks.

What is timed is the same for all: read the annotation json, read the results json, compute the 13 numbers.
Outside of the clock are the start of the interpreter, the imports (of a Rust or C library as of a Python one)
and the loading of lt_det's cached machine code, which takes the place of loading a compiled library. lt_det
and hotcoco take turns; medians over the repeats. For boxes lt_det skips over the annotations' polygons, as it
does for a user who asks for boxes; the others parse them with the file.

End to end: outputs of a Mask R-CNN (300 boxes and masks of 28 x 28 an image) to final numbers, by
Detectron2's post-processing and LVISEvaluator, and by lt_det's.

--overlap: how fast a model's loop goes on while LongTailLVISEvaluator encodes in the calling thread or in
a thread.

Compiled code of lt_det is cached on disk; the first call after an installation compiles for some seconds,
which is printed apart.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

HEIGHT, WIDTH, CATEGORIES, PER_IMAGE = 480, 640, 1203, 300
ENGINES = ("lt_det", "lvis", "hotcoco")


# ---------------------------------------------------------------------- the problem


def category_weights() -> np.ndarray:
    weight = np.arange(1, CATEGORIES + 1, dtype=float) ** -1.1
    return weight / weight.sum()


def ellipse_strings(centre: np.ndarray, radius: np.ndarray) -> list:
    """COCO run-length strings of ellipses, (n, 2) centres and radii in pixels, clipped to the image."""
    from lt_det.evaluation.rle import RleTable

    counts, start = [], [0]
    for (cx, cy), (rx, ry) in zip(centre, radius):
        x = np.arange(max(0, int(cx - rx)), min(WIDTH, int(cx + rx) + 1))
        inside = 1 - ((x + 0.5 - cx) / rx) ** 2
        x, inside = x[inside > 0], inside[inside > 0]
        half = ry * np.sqrt(inside)
        top = np.clip(np.ceil(cy - half), 0, HEIGHT - 1).astype(np.int64)
        bottom = np.clip(np.floor(cy + half), 0, HEIGHT - 1).astype(np.int64)
        x, top, bottom = x[bottom > top], top[bottom > top], bottom[bottom > top]
        edges = np.stack([x * HEIGHT + top, x * HEIGHT + bottom], 1).ravel()
        runs = np.diff(np.concatenate([[0], edges, [HEIGHT * WIDTH]]))
        counts.append(runs.astype(np.uint32))
        start.append(start[-1] + len(runs))
    table = RleTable.from_counts(np.concatenate(counts), np.array(start), np.zeros((len(centre), 2)))
    return [json.dumps(s.decode("ascii")) for s in table.strings()]


def make_problem(folder: Path, num_images: int, seed: int = 0, per_image: int = PER_IMAGE) -> dict:
    """Writes gt.json, bbox.json and segm.json, with ``per_image`` detections an image; returns their paths."""
    paths = {name: folder / f"{name}_{num_images}.json" for name in ("gt", "bbox", "segm")}
    if all(p.exists() for p in paths.values()):
        return paths
    rng = np.random.default_rng(seed)
    weights = category_weights()
    image_count = np.maximum((weights * 3e5).astype(int), 1)
    categories = [
        dict(
            id=k + 1,
            name=f"c{k + 1}",
            image_count=int(n),
            instance_count=int(2 * n),
            frequency="r" if n <= 10 else "c" if n <= 100 else "f",
        )
        for k, n in enumerate(image_count)
    ]
    # Masks that lie somewhere; a detection near an annotation takes one of three shifted copies of its own.
    stock_centre = rng.random((3000, 2)) * [WIDTH, HEIGHT]
    stock_radius = np.exp(rng.normal(3.4, 0.8, (3000, 2))).clip(3, 220)
    stock = ellipse_strings(stock_centre, stock_radius)
    temporary = {name: p.with_suffix(".tmp") for name, p in paths.items()}
    bbox, segm = (open(temporary[n], "w") for n in ("bbox", "segm"))
    bbox.write("[")
    segm.write("[")
    images, annotations = [], []
    comma = ""
    for i in range(num_images):
        image_id = 7 * i + 3
        present = np.unique(rng.choice(CATEGORIES, 5, p=weights))
        category = np.repeat(present, np.maximum(rng.geometric(0.4, len(present)), 1))
        n = len(category)
        centre = rng.random((n, 2)) * [WIDTH - 40, HEIGHT - 40] + 20
        radius = np.exp(rng.normal(3.4, 0.8, (n, 2))).clip(3, 200)
        low, high = np.maximum(centre - radius, 0), np.minimum(centre + radius, [WIDTH, HEIGHT])
        angle = np.linspace(0, 2 * np.pi, 25)[:-1]
        ring = np.stack([np.cos(angle), np.sin(angle)], 1)
        for k in range(n):
            polygon = np.clip(centre[k] + ring * radius[k], 0, [WIDTH, HEIGHT]).round(2)
            box = np.concatenate([low[k], high[k] - low[k]]).round(2).tolist()
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=image_id,
                    category_id=int(category[k]) + 1,
                    bbox=box,
                    area=round(float(np.prod(radius[k]) * np.pi), 2),
                    segmentation=[polygon.ravel().tolist()],
                )
            )
        negative = rng.choice(CATEGORIES, 10, p=weights) + 1
        images.append(
            dict(
                id=image_id,
                height=HEIGHT,
                width=WIDTH,
                file_name=f"{image_id}.jpg",
                neg_category_ids=sorted(set(negative.tolist()) - set((present + 1).tolist())),
                not_exhaustive_category_ids=(present[rng.random(len(present)) < 0.1] + 1).tolist(),
            )
        )
        near = rng.integers(0, n, per_image)
        is_near = rng.random(per_image) < 0.3
        shift = rng.normal(0, 0.25, (n, 3, 2)) * radius[:, None]
        shifted = (centre[:, None] + shift).reshape(-1, 2)
        own = ellipse_strings(shifted, np.repeat(radius, 3, 0))
        copy = near * 3 + rng.integers(0, 3, per_image)
        other = rng.integers(0, len(stock), per_image)
        c = np.where(is_near[:, None], shifted[copy], stock_centre[other])
        r = np.where(is_near[:, None], radius[near], stock_radius[other])
        right = is_near & (rng.random(per_image) < 0.8)
        detected = np.where(right, category[near], rng.choice(CATEGORIES, per_image, p=weights))
        score = np.float32(rng.random(per_image) ** 3 * np.where(is_near, 1, 0.6)).tolist()
        boxes = np.concatenate([c - r, 2 * r], 1).astype(np.float32).tolist()
        lines_b, lines_s = [], []
        for j in range(per_image):
            head = f'{comma}{{"image_id": {image_id}, "category_id": {detected[j] + 1}, '
            text = own[copy[j]] if is_near[j] else stock[other[j]]
            lines_b.append(f'{head}"bbox": {boxes[j]}, "score": {score[j]}}}')
            mask = f'{{"size": [{HEIGHT}, {WIDTH}], "counts": {text}}}'
            lines_s.append(f'{head}"score": {score[j]}, "segmentation": {mask}}}')
            comma = ", "
        bbox.write("".join(lines_b))
        segm.write("".join(lines_s))
    for f in (bbox, segm):
        f.write("]")
        f.close()
    with open(temporary["gt"], "w") as f:
        json.dump({"info": {}, "images": images, "annotations": annotations, "categories": categories}, f)
    for name, p in paths.items():
        os.replace(temporary[name], p)
    return paths


# ---------------------------------------------------------------------- engines, each in its own process


def peak_megabytes() -> float:
    try:
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) / 1024 for line in f if line.startswith("VmHWM"))
    except FileNotFoundError:  # not Linux; kilobytes there are bytes on macOS
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def load_compiled_code(iou_type: str) -> float:
    """Seconds for a problem of one image: what numba needs to load (the first time: compile) the kernels."""
    from lt_det.evaluation import GroundTruth, evaluate_results

    begin = time.perf_counter()
    square = {"size": [9, 9], "counts": [10, 5, 66]}
    one = dict(image_id=1, category_id=1, bbox=[1.0, 1.0, 5.0, 1.0], segmentation=square)
    image = dict(id=1, height=9, width=9, neg_category_ids=[], not_exhaustive_category_ids=[])
    gt = dict(images=[image], categories=[dict(id=1, frequency="r")], annotations=[dict(one, id=1, area=5.0)])
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, "gt.json"), Path(folder, "results.json")]
        for path, content in zip(paths, (gt, [dict(one, score=0.5)])):
            path.write_text(json.dumps(content))
        evaluate_results(GroundTruth.from_json(paths[0]), paths[1], iou_types=(iou_type,))
    return time.perf_counter() - begin


def run_lt_det(gt_path: str, results: str, iou_type: str):
    from lt_det.evaluation import GroundTruth, evaluate_results

    loading = load_compiled_code(iou_type)
    begin = time.perf_counter()
    gt = GroundTruth.from_json(gt_path, with_masks=iou_type != "bbox")
    out = evaluate_results(gt, results, iou_types=(iou_type,))
    return time.perf_counter() - begin, out.metrics[iou_type]["AP"], loading


def run_lvis(gt_path: str, results: str, iou_type: str):
    if "float" not in np.__dict__:
        np.float = float  # lvis 0.5.3 was written for numpy before 1.24
    from lvis import LVIS, LVISEval, LVISResults

    begin = time.perf_counter()
    gt = LVIS(gt_path)
    evaluation = LVISEval(gt, LVISResults(gt, results), iou_type)
    evaluation.run()
    return time.perf_counter() - begin, 100 * evaluation.results["AP"], 0.0


def run_hotcoco(gt_path: str, results: str, iou_type: str):
    from hotcoco import COCO, LVISEval, LVISResults

    begin = time.perf_counter()
    gt = COCO(gt_path)
    evaluation = LVISEval(gt, LVISResults(gt, results), iou_type)
    evaluation.run()
    return time.perf_counter() - begin, 100 * evaluation.get_results()["AP"], 0.0


def measure(engine: str, paths: dict, iou_type: str) -> dict:
    command = [
        sys.executable,
        __file__,
        "--engine",
        engine,
        "--files",
        str(paths["gt"]),
        str(paths[iou_type]),
        iou_type,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{engine} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


# ---------------------------------------------------------------------- end to end


def end_to_end(paths: dict, num_images: int) -> dict:
    """Seconds of both ways from the outputs of the ROI heads to the numbers, on ``num_images`` images."""
    import contextlib
    import io

    import torch
    from detectron2.data import MetadataCatalog
    from detectron2.evaluation import LVISEvaluator
    from detectron2.modeling.postprocessing import detector_postprocess
    from detectron2.structures import Boxes, Instances

    from lt_det.evaluation import LongTailLVISEvaluator, postprocess_without_pasting

    if "float" not in np.__dict__:
        np.float = float
    content = json.loads(Path(paths["gt"]).read_text())
    ids = [i["id"] for i in content["images"][:num_images]]
    content["images"] = content["images"][:num_images]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in set(ids)]
    small = Path(paths["gt"]).with_name(f"gt_end_to_end_{num_images}.json")
    small.write_text(json.dumps(content))
    by_image = {}
    for a in content["annotations"]:
        by_image.setdefault(a["image_id"], []).append(a)
    rng = np.random.default_rng(0)
    yy, xx = np.mgrid[:28, :28] / 13.5 - 1
    blob = torch.tensor(1 / (1 + np.exp(8 * (xx**2 + yy**2 - 0.9))), dtype=torch.float32)

    def outputs(image_id):
        near = by_image[image_id]
        boxes = np.array([near[k]["bbox"] for k in rng.integers(0, len(near), PER_IMAGE)]) + rng.normal(
            0, 4, (PER_IMAGE, 4)
        )
        boxes[:, 2:] = boxes[:, :2] + np.maximum(boxes[:, 2:], 4)
        classes = np.array([near[k]["category_id"] - 1 for k in rng.integers(0, len(near), PER_IMAGE)])
        away = rng.random(PER_IMAGE) < 0.6
        classes[away] = rng.choice(CATEGORIES, away.sum(), p=category_weights())
        instances = Instances((HEIGHT, WIDTH))
        instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32))
        instances.scores = torch.tensor(rng.random(PER_IMAGE), dtype=torch.float32)
        instances.pred_classes = torch.tensor(classes)
        instances.pred_masks = (blob + 0.05 * torch.rand(PER_IMAGE, 28, 28)).clamp(0, 1)[:, None]
        return instances

    predictions = [outputs(i) for i in ids]
    copies = [Instances(p.image_size, **{k: (v.clone()) for k, v in p.get_fields().items()}) for p in predictions]
    name = "bench_evaluation_end_to_end"
    MetadataCatalog.get(name).set(json_file=str(small), evaluator_type="lvis")
    out = {}
    # One image beforehand: compiled code of lt_det is loaded (or, the first time, compiled).
    warm = LongTailLVISEvaluator(name)
    warm.process([{"image_id": ids[0]}], [{"instances": postprocess_without_pasting(outputs(ids[0]), HEIGHT, WIDTH)}])
    warm.evaluate()
    for label, make, post, items in (
        ("lt_det", lambda: LongTailLVISEvaluator(name), postprocess_without_pasting, copies),
        ("detectron2", lambda: LVISEvaluator(name), detector_postprocess, predictions),
    ):
        with contextlib.redirect_stdout(io.StringIO()):
            begin = time.perf_counter()
            evaluator = make()
            evaluator.reset()
            for image_id, p in zip(ids, items):
                evaluator.process([{"image_id": image_id}], [{"instances": post(p, HEIGHT, WIDTH)}])
            result = evaluator.evaluate()
            out[label] = {
                "seconds": time.perf_counter() - begin,
                "segm AP": result["segm"]["AP"],
                "bbox AP": result["bbox"]["AP"],
            }
    return out


# ---------------------------------------------------------------------- encoding beside the model


WAYS = {
    "calling thread": {"num_workers": 0},
    "1 thread": {"num_workers": 1},
}
OVERLAP_IMAGES, UNTIMED_IMAGES = 200, 20


def overlap(paths: dict, rates: tuple = (10, 40)) -> list:
    """How fast a model's loop goes on beside LongTailLVISEvaluator, by where that encodes.

    The model's thread launches small tensor operations, as a thread that feeds a GPU does: as many for each
    image as make ``rates`` images a second when it is alone. Then it hands the evaluator 300 masks of
    28 x 28, all of them in cells, so that all are encoded and matched. The first images of a run are not
    timed: the start of a worker and the loading of its code stand apart, in the time of a single image.

    Returns:
        A row for each rate and way: images a second, as a share of what the loop does without an evaluation,
        and the seconds that the evaluation of a single image takes.
    """
    import logging

    import torch
    from detectron2.data import MetadataCatalog
    from detectron2.structures import Boxes, Instances, ROIMasks

    from lt_det.evaluation import GroundTruth, LongTailLVISEvaluator

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    gt = GroundTruth.from_json(paths["gt"], with_masks=False)
    rng = np.random.default_rng(0)
    yy, xx = np.mgrid[:28, :28] / 13.5 - 1
    blob = (1 / (1 + np.exp(8 * (xx**2 + yy**2 - 0.9)))).astype(np.float32)
    stock = []
    for _ in range(20):
        corner = rng.uniform(0, [WIDTH * 0.7, HEIGHT * 0.7], (PER_IMAGE, 2))
        size = np.exp(rng.normal(3.9, 0.8, (PER_IMAGE, 2))).clip(6, 300)
        box = np.concatenate([corner, np.minimum(corner + size, [WIDTH, HEIGHT])], 1).astype(np.float32)
        masks = (blob + 0.05 * rng.random((PER_IMAGE, 28, 28), np.float32)).clip(0, 1)
        stock.append((Boxes(torch.from_numpy(box)), ROIMasks(torch.from_numpy(masks))))
    images = []
    for rank in range(gt.num_images):
        cells = gt.cell_category[gt.cell_start[rank] : gt.cell_start[rank + 1]]
        boxes, masks = stock[rank % len(stock)]
        instances = Instances((HEIGHT, WIDTH), pred_boxes=boxes, pred_masks=masks)
        instances.scores = torch.from_numpy(rng.random(PER_IMAGE))
        instances.pred_classes = torch.from_numpy(rng.choice(cells, PER_IMAGE).astype(np.int64))
        images.append(([{"image_id": int(gt.image_ids[rank])}], [{"instances": instances}]))

    a, b = torch.rand(64), torch.rand(64)

    def model(operations: int) -> None:
        for _ in range(operations):
            torch.add(a, b).mul_(0.5)

    def loop(operations: int, number: int, untimed: int = 0, evaluator=None) -> float:
        """Images a second."""
        for k in range(untimed + number):
            if k == untimed:
                begin = time.perf_counter()
            model(operations)
            if evaluator is not None:
                evaluator.process(*images[k])
        return number / (time.perf_counter() - begin)

    name = "bench_evaluation_overlap"
    MetadataCatalog.get(name).set(json_file=str(paths["gt"]), evaluator_type="lvis")
    evaluators = {way: LongTailLVISEvaluator(name, **arguments) for way, arguments in WAYS.items()}
    start = {}
    for _ in range(2):  # once for what this process loads
        for way, evaluator in evaluators.items():
            begin = time.perf_counter()
            evaluator.process(*images[0])
            evaluator.evaluate()
            start[way] = time.perf_counter() - begin
            evaluator.reset()
    rows = []
    for rate in rates:
        number = min(6 * rate, OVERLAP_IMAGES - UNTIMED_IMAGES)
        operations = 1000
        operations = round(operations * loop(operations, 200) / rate)
        alone = [loop(operations, number)]
        speeds = {}
        for way, evaluator in evaluators.items():
            speeds[way] = loop(operations, number, UNTIMED_IMAGES, evaluator)
            evaluator.reset()
            alone.append(loop(operations, number))
        for way, speed in speeds.items():
            rows.append(
                {
                    "images_per_second_alone": statistics.mean(alone),
                    "encoding": way,
                    "images_per_second": speed,
                    "model_thread_speed": speed / statistics.mean(alone),
                    "one_image_seconds": start[way],
                }
            )
    return rows


# ---------------------------------------------------------------------- the run


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="200 images and one repeat: under a minute on two cores")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    parser.add_argument("--sizes", type=int, nargs="+", default=[500, 2000, 5000], help="numbers of images")
    parser.add_argument("--lvis-up-to", type=int, default=5000, help="run the official API up to this many images")
    parser.add_argument("--repeats", type=int, default=3, help="of lt_det and hotcoco; the official API runs once")
    parser.add_argument("--iou-types", nargs="+", default=["bbox", "segm"], choices=["bbox", "segm"])
    parser.add_argument("--end-to-end-images", type=int, default=20)
    parser.add_argument("--data-dir", help="keep the synthetic files here (default: a temporary folder)")
    parser.add_argument("--overlap", action="store_true", help="only measure how encoding slows the model's loop down")
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--files", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.quick:
        args.sizes, args.repeats, args.end_to_end_images = [200], 1, 3
    return args


def main(argv=None) -> None:
    args = parse_args(argv)
    if args.engine:
        import logging

        logging.disable(logging.WARNING)
        seconds, ap, loading = {"lt_det": run_lt_det, "lvis": run_lvis, "hotcoco": run_hotcoco}[args.engine](
            *args.files
        )
        cpu = time.process_time()
        values = {"seconds": seconds, "load_seconds": loading, "cpu_seconds": cpu}
        print(json.dumps({**values, "megabytes": peak_megabytes(), "AP": ap}))
        return
    from tabulate import tabulate

    with tempfile.TemporaryDirectory(prefix="lt_det_bench_") as temporary:
        folder = Path(args.data_dir or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if args.overlap:
            rows = overlap(make_problem(folder, OVERLAP_IMAGES))
            print(tabulate(rows, headers="keys", floatfmt=".3g"))
            if args.json:
                write_json(args.json, {"overlap": rows})
            return
        rows, table = [], []
        for size in args.sizes:
            begin = time.perf_counter()
            paths = make_problem(folder, size)
            print(f"{size} images: files made in {time.perf_counter() - begin:.0f} s", flush=True)
            for iou_type in args.iou_types:
                first = measure("lt_det", paths, iou_type)["load_seconds"] if not rows else None
                runs = {engine: [] for engine in ENGINES}
                for _ in range(args.repeats):
                    for engine in ("lt_det", "hotcoco"):
                        runs[engine].append(measure(engine, paths, iou_type))
                if size <= args.lvis_up_to:
                    runs["lvis"].append(measure("lvis", paths, iou_type))
                summary = {
                    e: {
                        k: statistics.median(r[k] for r in done)
                        for k in ("seconds", "load_seconds", "cpu_seconds", "megabytes", "AP")
                    }
                    for e, done in runs.items()
                    if done
                }
                ours, official = summary["lt_det"], summary.get("lvis")
                if official and abs(ours["AP"] - official["AP"]) > 1e-7:
                    raise RuntimeError(f"AP differs: lt_det {ours['AP']}, official {official['AP']}")
                row = {
                    "images": size,
                    "iou_type": iou_type,
                    "engines": summary,
                    "speedup_vs_lvis_api": official["seconds"] / ours["seconds"] if official else None,
                    "memory_ratio_vs_lvis_api": (ours["megabytes"] / official["megabytes"] if official else None),
                    "time_ratio_vs_hotcoco": ours["seconds"] / summary["hotcoco"]["seconds"],
                    "first_call_seconds": first,
                }
                rows.append(row)
                for engine, values in summary.items():
                    table.append([size, iou_type, engine] + list(values.values()))
        print(
            tabulate(
                table,
                headers=["images", "IoU", "engine", "seconds", "load", "CPU", "peak MB", "AP"],
                floatfmt=("", "", "", ".2f", ".2f", ".2f", ".0f", ".4f"),
            )
        )
        compared = [r for r in rows if r["speedup_vs_lvis_api"]] or rows
        largest = max(r["images"] for r in compared)
        keys = ("speedup_vs_lvis_api", "memory_ratio_vs_lvis_api", "time_ratio_vs_hotcoco")
        out = {"images": largest}
        for r in compared:
            if r["images"] == largest:
                out[r["iou_type"]] = {k: r[k] for k in keys}
        ways = end_to_end(paths, args.end_to_end_images)
        out["end_to_end_speedup_vs_detectron2"] = ways["detectron2"]["seconds"] / ways["lt_det"]["seconds"]
        out["end_to_end"] = {"images": args.end_to_end_images, **ways}
        out["rows"] = rows
    for iou_type in args.iou_types:
        values = out[iou_type]
        text = ", ".join(f"{k} {v:.3g}" for k, v in values.items() if v is not None)
        print(f"{largest} images, {iou_type}: {text}")
    print(
        f"end to end, {args.end_to_end_images} images: "
        f"{out['end_to_end_speedup_vs_detectron2']:.1f} x Detectron2's speed ({ways})"
    )
    print(f"first call: {rows[0]['first_call_seconds']:.1f} s (compiles if nothing is cached)")
    if args.json:
        write_json(args.json, out)


def write_json(path: str, content: dict) -> None:
    from lt_det.io import write_atomically

    write_atomically(path, lambda f: f.write(json.dumps(content, indent=2) + "\n"))


if __name__ == "__main__":
    main()
