#!/usr/bin/env python
"""Train BALMS on the embedded data set, on this machine, and show what it does for rare categories.

Stage 1 is Mask R-CNN with softmax and repeat-factor sampling. Stage 2 re-trains its classifier alone on class-balanced
images, once with balanced softmax and once with BALMS, which learns class weights besides. All three are evaluated;
the table, summary.json, three pictures (AP by group, AP by training images, predictions) and a report for the browser
go to the output folder, each training to a folder in it. An interrupted demo continues with --resume.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import shutil
import time
from pathlib import Path

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.utils import comm
from tabulate import tabulate

from lt_det.data import ClassStatistics
from lt_det.engine import argument_parser, launch_main, run, setup
from lt_det.engine.checkpoint import read_weights
from lt_det.engine.setup import keep_config
from lt_det.engine.trained import load_trained
from lt_det.evaluation import GroundTruth
from lt_det.evaluation.plots import plot_ap_against_count
from lt_det.io import write_json_atomically
from lt_det.processes import usable_cores
from lt_det.report import write_report
from lt_det.visualization import draw_predictions, plot_frequency_groups, short_names

METRICS = ("AP", "APr", "APc", "APf")
# Rows of the table: name, folder, what the config has other than that of BALMS. The first is stage 1 of the others.
# The first and the last keep their detections, for the report of the first against the last.
ROWS = (
    ("softmax + RFS", "softmax", ("DECOUPLE.ENABLED", False, "META.NAME", "", "TEST.WRITE_SUBMISSION", True)),
    ("balanced softmax", "balanced_softmax", ("META.NAME", "")),
    ("BALMS", "balms", ("TEST.WRITE_SUBMISSION", True)),
)
# What each row has that the one before it has not.
INGREDIENTS = (
    "rare images repeated, cross entropy",
    "the classifier trained again, alone, on class-balanced images, with the class prior in its loss",
    "class weights, learned while it is, take back what sampling and loss together over-balance",
)
NUM_PICTURES = 4
# A shorter stage 1 than the config's 1000 iterations, and RoI features that both stages 2 read from one cache, so that
# the demo takes five to six minutes on two cores.
SHORT = ("SOLVER.MAX_ITER", "620", "SOLVER.STEPS", "(496,)", "DECOUPLE.FEATURE_CACHE.ENABLED", "True")
# Iterations from one line of progress on the console to the next; log.txt has one every 20.
PROGRESS = 100
logger = logging.getLogger("lt_det.demo")


def quiet_console() -> None:
    """Of the trainings' and evaluations' log only progress and warnings, each once; log.txt has it whole."""
    said = set()

    def is_wanted(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            is_new = text not in said
            said.add(text)
            return is_new
        iteration = re.search(r"\biter: (\d+)", text) if record.name == "detectron2.utils.events" else None
        return record.name == logger.name or (iteration is not None and (int(iteration[1]) + 1) % PROGRESS == 0)

    for handler in logging.getLogger("lt_det").handlers:
        if not isinstance(handler, logging.FileHandler):
            handler.addFilter(is_wanted)


def row_configs(cfg, output_dir: Path) -> list:
    configs = []
    for _, folder, changes in ROWS:
        changes = (*changes, "OUTPUT_DIR", str(output_dir / folder))
        changes = (*changes, "DECOUPLE.FEATURE_CACHE.DIR", str(output_dir / "roi_features"))
        if not configs:
            changes = (*changes, "DECOUPLE.FEATURE_CACHE.ENABLED", False)
        else:
            finished = str(output_dir / ROWS[0][1] / "model_final.pth")
            changes = (*changes, "DECOUPLE.START_ITER", 0, "MODEL.WEIGHTS", finished)
        row = cfg.clone()
        row.defrost()
        row.merge_from_list(list(changes))
        row.freeze()
        configs.append(row)
    return configs


def train(cfg, args) -> None:
    output_dir = Path(cfg.OUTPUT_DIR)
    done = (output_dir / "inference/metrics.json").is_file() and (output_dir / "model_final.pth").is_file()
    output_dir.mkdir(parents=True, exist_ok=True)
    keep_config(cfg)  # of a finished row, too: older demos left none
    if not (args.resume and done):
        run(cfg, args)


def read_rows(output_dir: Path) -> list[dict]:
    rows = []
    for name, folder, _ in ROWS:
        metrics = json.loads((output_dir / folder / "inference/metrics.json").read_text())
        rows.append({"name": name, **{task: {m: metrics[task][m] for m in METRICS} for task in ("bbox", "segm")}})
    return rows


def draw(configs: list, output_dir: Path, rows: list[dict]) -> None:
    plot_frequency_groups(
        [(row["name"], row["segm"]) for row in rows],
        output_dir / "ap_by_frequency.png",
        title="glyph_lvis: mask AP by frequency group",
    )
    dataset = configs[0].DATASETS.TEST[0]
    dicts = DatasetCatalog.get(dataset)
    metadata = MetadataCatalog.get(dataset)
    statistics = ClassStatistics.from_metadata(metadata)
    rare = set(statistics.frequency_groups["r"].tolist())
    # The images with the most rare things in them.
    chosen = sorted(dicts, key=lambda d: -sum(a["category_id"] in rare for a in d["annotations"]))[:NUM_PICTURES]
    predictions = {}
    for (name, *_), cfg in zip(ROWS, configs):
        model = load_trained(Path(cfg.OUTPUT_DIR))[1].eval()
        loader = build_detection_test_loader(cfg, dataset)
        with torch.no_grad():
            outputs = model([loader.dataset[dicts.index(d)] for d in chosen])
        predictions[name] = [o["instances"].to("cpu") for o in outputs]
    draw_predictions(chosen, predictions, short_names(metadata.thing_classes), output_dir / "predictions.png")


def report(configs: list, output_dir: Path) -> None:
    """The page of the first row beside the last, and the last one's AP by number of training images."""
    metadata = MetadataCatalog.get(configs[0].DATASETS.TEST[0])
    gt = GroundTruth.from_json(metadata.json_file)
    folders = [configs[0].OUTPUT_DIR, configs[-1].OUTPUT_DIR]
    runs = write_report(
        gt, [f"{folder}/inference" for folder in folders], str(output_dir / "report.html"),
        annotations=metadata.json_file, image_root=metadata.image_root, replicates=200,
        weights=[read_weights(f"{folder}/model_final.pth") for folder in folders],
    )  # fmt: skip
    plot_ap_against_count(gt, runs[-1].curves["segm"], "segm").savefig(output_dir / "ap_by_images.png", dpi=130)


def gains(rows: list[dict]) -> list[str]:
    """What each ingredient gives, in points of mask AP, APr and APf."""
    lines = []
    for i, (row, text) in enumerate(zip(rows, INGREDIENTS)):
        given = ""
        if i:
            change = {m: difference(row["segm"][m], rows[i - 1]["segm"][m]) for m in ("AP", "APr", "APf")}
            points = f"{change['AP']} mask AP, {change['APr']} APr, {change['APf']} APf"
            given = f"; gives {points} over {rows[i - 1]['name']}"
        lines.append(f"{row['name']}: {text}{given}")
    return lines


def difference(a: float | None, b: float | None) -> str:
    return "-" if a is None or b is None else f"{a - b:+.1f}"


def arguments() -> argparse.Namespace:
    """The command line. On a CPU two processes take half a batch each, faster by a fifth than one with two threads."""
    parser = argument_parser()
    processes = 1 if torch.cuda.is_available() else min(2, usable_cores())
    recipe = str(Path(__file__).resolve().parent.parent / "configs/glyph_balms.yaml")
    parser.set_defaults(config_file=recipe, num_gpus=processes, dist_url="auto")
    args = parser.parse_args()
    args.opts = ["OUTPUT_DIR", "output/demo", *SHORT, *args.opts]
    args.begin = time.time()
    return args


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(max(1, min(torch.get_num_threads(), usable_cores() // comm.get_world_size())))
    output_dir = Path(dict(zip(args.opts[::2], args.opts[1::2]))["OUTPUT_DIR"])
    if comm.is_main_process() and not args.resume and output_dir.exists():
        shutil.rmtree(output_dir)
    comm.synchronize()
    cfg = setup(args)
    quiet_console()
    configs = row_configs(cfg, output_dir)
    for (name, *_), row in zip(ROWS, configs):
        begin = time.perf_counter()
        logger.info("%s: training and evaluation, in %s", name, row.OUTPUT_DIR)
        train(row, args)
        logger.info("%s: %.1f minutes", name, (time.perf_counter() - begin) / 60)
    if not comm.is_main_process():
        return
    rows = read_rows(output_dir)
    logger.info("Pictures and report")
    draw(configs, output_dir, rows)
    report(configs, output_dir)
    seconds = time.time() - args.begin
    write_json_atomically(output_dir / "summary.json", {"rows": rows, "seconds": round(seconds, 1)})

    table = [[row["name"], *(row[task][m] for task in ("bbox", "segm") for m in METRICS)] for row in rows]
    headers = ["", *(f"{task} {m}" for task in ("bbox", "mask") for m in METRICS)]
    logger.info("Results on %s:", cfg.DATASETS.TEST[0])
    print("\n" + tabulate(table, headers=headers, floatfmt=".1f", missingval="-", tablefmt="github"))
    print("\n" + "\n".join(gains(rows)))
    print(f"\n{seconds / 60:.1f} minutes. In {output_dir}:")
    print("  ap_by_frequency.png, ap_by_images.png, predictions.png, summary.json")
    print("  report.html: softmax beside BALMS, for a browser")


if __name__ == "__main__":
    launch_main(main, arguments())
