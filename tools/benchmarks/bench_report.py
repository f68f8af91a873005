#!/usr/bin/env python
"""How large the page of an evaluated model is, and how long a headless Chromium takes to open it.

The problem is that of bench_evaluation: 1203 categories, federated annotations; by default 20,000 images of 40
detections (what is on a page does not grow with their number), with pictures, thresholds and classifier weights. A page
of boxes, one of masks, one of two runs side by side.

"readable": the page's text and all tables in view are there; "charts": the charts in view are, too; "all": it was
scrolled to its end, and every chart drawn. From the start of the navigation; "processor" is the time of the page's main
thread alone, which other work on the machine lengthens less. Medians over the repeats, each in a new browser.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from bench_evaluation import CATEGORIES, HEIGHT, WIDTH, make_problem
from PIL import Image
from tabulate import tabulate

from lt_det.evaluation import GroundTruth
from lt_det.io import write_json_atomically
from lt_det.report import write_report

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "dev"))

from browser import Browser, browser

COLUMNS = ("readable_ms", "readable_processor_ms", "charts_ms", "charts_processor_ms", "all_processor_ms")


def picture(path: Path) -> None:
    """A JPEG that is as long as a photograph of this size: smooth noise."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8))
    small.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(path, quality=90)


def write_pages(folder: Path, paths: dict[str, Path]) -> dict[str, tuple[Path, float]]:
    """The pages, and the seconds that each took."""
    images = folder / "images"
    if not images.is_dir():
        images.mkdir()
        picture(folder / "picture.jpg")
        for image in json.loads(paths["gt"].read_text())["images"]:
            (images / image["file_name"]).symlink_to(folder / "picture.jpg")
    generator = torch.Generator().manual_seed(0)
    weights = ({"box_predictor.cls_score.weight": torch.randn(CATEGORIES + 1, 64, generator=generator)}, None)
    gt = GroundTruth.from_json(paths["gt"])
    pages = {}
    for name, results, iou_type in (
        ("boxes", [paths["bbox"]], "bbox"),
        ("masks", [paths["segm"]], "segm"),
        ("masks, two runs", [paths["segm"], paths["segm"]], "segm"),
    ):
        page = folder / f"{name.replace(', ', '_').replace(' ', '_')}.html"
        begin = time.perf_counter()
        write_report(
            gt, [str(path) for path in results], str(page), annotations=str(paths["gt"]), image_root=str(images),
            weights=[weights] * len(results), iou_type=iou_type, replicates=20,
        )  # fmt: skip
        pages[name] = page, time.perf_counter() - begin
    return pages


def processor_ms(window: Browser) -> int:
    """Time that the page's main thread has computed."""
    metrics = window.devtools("Performance.getMetrics")["metrics"]
    return round(1000 * next(m["value"] for m in metrics if m["name"] == "TaskDuration"))


# Put before the page's own script: Plotly is never unpacked, so that no chart is drawn.
WITHOUT_CHARTS = "Response.prototype.text = () => new Promise(() => {})"


def open_page(path: Path, charts: bool) -> dict[str, int]:
    """Open a page in a browser that has not seen it before (Chromium keeps compiled scripts while it runs)."""
    name = "charts" if charts else "readable"
    with tempfile.TemporaryDirectory() as profile, browser(Path(profile)) as window:
        window.devtools("Performance.enable", timeDomain="threadTicks")
        if not charts:
            window.devtools("Page.enable")
            window.devtools("Page.addScriptToEvaluateOnNewDocument", source=WITHOUT_CHARTS)
        window.open(path, until="openedMs" if charts else "readableMs")
        row = {f"{name}_processor_ms": processor_ms(window)}
        if charts:
            times = "const t = document.documentElement.dataset; return [+t.readableMs, +t.openedMs]"
            row["readable_ms"], row["charts_ms"] = window.run(times)
            window.draw_all()
            row["all_processor_ms"] = processor_ms(window)
        return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--detections", type=int, default=40, help="an image")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="300 images, 1 repeat")
    parser.add_argument("--folder", type=Path, help="keep the files here (default: deleted at the end)")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    args = parser.parse_args()
    if args.quick:
        args.images, args.repeats = 300, 1
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        pages = write_pages(folder, make_problem(folder, args.images, per_image=args.detections))
        result: dict = {"images": args.images, "pages": {}}
        for name, (page, seconds) in pages.items():
            runs = [open_page(page, False) | open_page(page, True) for _ in range(args.repeats)]
            row = {key: statistics.median(run[key] for run in runs) for key in COLUMNS}
            size = round(page.stat().st_size / 1e6, 2)
            result["pages"][name] = {"megabytes": size, **row, "written_s": round(seconds, 1)}
    print(f"{args.images:,} images, {CATEGORIES:,} categories")
    rows = [[name, *row.values()] for name, row in result["pages"].items()]
    print(tabulate(rows, headers=["page", "MB", *(c.replace("_", " ") for c in COLUMNS), "written in s"]))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomically(args.json, result)


if __name__ == "__main__":
    main()
