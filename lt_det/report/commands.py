"""The console command ``lt-det inspect``."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence

from lt_det.frequency import GROUP_LIMITS
from lt_det.io import write_json_atomically
from lt_det.tool import exit_code

__all__ = ["inspect_dataset"]


def inspect_dataset(argv: Sequence[str] | None = None) -> int:
    """``lt-det inspect`` and ``tools/inspect_dataset.py``; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="lt-det inspect", description="Look at a data set: one HTML page that opens without a network."
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--annotations", metavar="FILE.json", help="an LVIS- or COCO-style json")
    source.add_argument("--dataset", metavar="NAME", help="a data set that lt_det or Detectron2 knows by name")
    parser.add_argument("--output", required=True, metavar="PAGE.html", help="the page to write")
    parser.add_argument("--json", metavar="FILE", help="write the main numbers as json too")
    parser.add_argument(
        "--repeat-threshold", type=float, metavar="T", help="of the samplers that take one (default: as advised)"
    )
    parser.add_argument(
        "--frequency-thresholds", type=int, nargs=2, default=GROUP_LIMITS, metavar=("RARE", "COMMON"),
        help="most images of a rare and of a common class, where the json does not state the groups (default: 10 100)",
    )  # fmt: skip
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")
    args = parser.parse_args(argv)

    def work() -> None:
        from .dataset import inspect_annotations
        from .dataset_page import dataset_page, findings_text

        begin = time.perf_counter()
        path = args.annotations or _json_of(args.dataset)
        found = inspect_annotations(
            path, repeat_threshold=args.repeat_threshold, thresholds=tuple(args.frequency_thresholds),
            progress=not args.no_progress,
        )  # fmt: skip
        dataset_page(found, title=args.dataset).write(args.output)
        if args.json:
            write_json_atomically(args.json, summary(found))
        counts = {g: int((found.group == g).sum()) for g in "rcf"}
        print(
            f"{len(found.annotations.images):,} images, {found.statistics.num_classes:,} categories "
            f"({counts['r']} rare, {counts['c']} common, {counts['f']} frequent), "
            f"{int(found.statistics.instance_count.sum()):,} instances"
        )
        advised = found.advice.threshold
        print("advised: " + ("TrainingSampler" if advised is None else f"DATALOADER.REPEAT_THRESHOLD {advised:g}"))
        if found.findings:
            print("suspicious entries:\n" + findings_text(found.findings))
        size = os.path.getsize(args.output) / 1e6
        print(f"wrote {args.output} ({size:.1f} MB, {time.perf_counter() - begin:.1f} s)")

    return exit_code("lt-det inspect", work)


def summary(found) -> dict:
    """The main numbers of an :class:`~lt_det.report.dataset.Inspection`, for scripts."""
    statistics = found.statistics
    return {
        "images": len(found.annotations.images),
        "categories": statistics.num_classes,
        "groups": {g: int((found.group == g).sum()) for g in "rcf"},
        "instances": int(statistics.instance_count.sum()),
        "advised_repeat_threshold": found.advice.threshold,
        "samplers": {
            s.name: {"images_an_epoch": s.draws, "largest_factor": s.largest, "instances": s.instances.tolist()}
            for s in found.samplings
        },
        "findings": {f.kind: {"level": f.level, "count": f.count} for f in found.findings},
    }


def _json_of(name: str) -> str:
    """The annotation file of a data set that is known by name."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    from lt_det.data import prepare_dataset, register_builtin

    register_builtin()
    if name not in DatasetCatalog:
        raise ValueError(f"there is no data set {name!r}; name its json by --annotations.")
    prepare_dataset(name)
    path = MetadataCatalog.get(name).get("json_file")
    if not path:
        raise ValueError(f"the data set {name!r} has no json file; name one by --annotations.")
    return path
