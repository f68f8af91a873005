"""Compares two runs on the same annotations, by frequency group and by category, with a paired bootstrap over images.

    tools/compare_lvis.py output/run_a/inference output/run_b/inference --annotations lvis_v1_val.json

A and B are folders that an evaluation wrote (they hold matches_<type>.npz), folders of runs with one of these as
inference, or results files. The interval says what another draw of images would do to the difference; it knows nothing
of the spread between training runs.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping

from lt_det.tool import exit_code


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="lt-det compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", metavar="A", help="folder of an evaluation, or results file")
    parser.add_argument("b", metavar="B", help="folder of an evaluation, or results file")
    parser.add_argument("--annotations", required=True, metavar="GT.json", help="ground truth json of both")
    parser.add_argument("--iou-types", nargs="+", choices=["bbox", "segm", "boundary"], help="default: what both have")
    parser.add_argument("--replicates", type=int, default=1000, help="draws of the bootstrap")
    parser.add_argument("--level", type=float, default=0.95, help="of the intervals")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--top", type=int, default=10, help="categories to print of those that lost and gained most")
    parser.add_argument("--output-dir", metavar="OUT", help="write comparison.json and comparison_<type>.csv there")
    parser.add_argument("--no-progress", action="store_true", help="show no progress bars")
    return parser.parse_args(argv)


def load_run(path: str, gt, iou_types, progress: bool) -> dict:
    """Matches by IoU type."""
    from lt_det.evaluation import evaluate_results
    from lt_det.evaluation.compare import load_run_matches
    from lt_det.evaluation.matching import IOU_TYPES

    if not os.path.isdir(path):
        return evaluate_results(gt, path, iou_types=iou_types, progress=progress).matches
    return load_run_matches(path, gt, iou_types or IOU_TYPES)[1]


def main(argv=None) -> int:
    args = parse_args(argv)
    return exit_code("lt-det compare", lambda: compare(args))


def compare(args: argparse.Namespace) -> None:
    """Prints the tables and writes what ``--output-dir`` asks for."""
    from lt_det.evaluation import GroundTruth
    from lt_det.evaluation.compare import compare_runs
    from lt_det.evaluation.matching import IOU_TYPES
    from lt_det.io import write_csv_atomically, write_json_atomically

    if not 0 < args.level < 1 or args.replicates < 1:
        raise ValueError("--level must lie between 0 and 1, and --replicates be at least 1.")
    need_masks = not all(os.path.isdir(p) for p in (args.a, args.b)) and args.iou_types != ["bbox"]
    gt = GroundTruth.from_json(args.annotations, with_masks=need_masks)
    runs = [load_run(p, gt, args.iou_types, not args.no_progress) for p in (args.a, args.b)]
    tasks = [t for t in IOU_TYPES if all(t in r for r in runs)]
    if not tasks:
        raise ValueError(f"the runs have no IoU type in common: {sorted(runs[0])} and {sorted(runs[1])}.")
    results = {
        t: compare_runs(
            gt, runs[0][t], runs[1][t], replicates=args.replicates, level=args.level, seed=args.seed,
            progress=not args.no_progress,
        )
        for t in tasks
    }  # fmt: skip
    percent = f"{100 * args.level:g} %"
    print(f"A: {args.a}\nB: {args.b}")
    for task, result in results.items():
        print("\n" + _group_table(task, result.groups, percent))
        changed = [r for r in result.categories if r["difference"]]
        lost, gained = ([r for r in changed if (r["difference"] > 0) == up] for up in (False, True))
        for title, part in (("lost most", lost[: args.top]), ("gained most", gained[::-1][: args.top])):
            if part:
                print("\n" + _category_table(title, part, percent))
    print(
        f"\n{args.replicates} paired draws of {gt.num_images} images; 'noise': the {percent} interval of B - A holds 0."
    )

    if args.output_dir:
        content = {"a": args.a, "b": args.b, "replicates": args.replicates, "level": args.level}
        content.update({task: result.groups for task, result in results.items()})
        write_json_atomically(os.path.join(args.output_dir, "comparison.json"), content, indent=2)
        fields = ["category_id", "name", "group", "annotations", "a", "b", "difference", "low", "high"]
        for task, result in results.items():
            path = os.path.join(args.output_dir, f"comparison_{task}.csv")
            write_csv_atomically(path, result.categories, fields)


def _cell(value: float, sign: str = "") -> str:
    return "-" if math.isnan(value) else format(value, f"{sign}.2f")


def _numbers(row: Mapping[str, float]) -> list[str]:
    """A, B, B - A and its interval."""
    interval = f"[{_cell(row['low'], '+')}, {_cell(row['high'], '+')}]"
    return [_cell(row["a"]), _cell(row["b"]), _cell(row["difference"], "+"), interval]


def _group_table(task: str, groups: Mapping[str, Mapping[str, float]], percent: str) -> str:
    from tabulate import tabulate

    rows = []
    for name, r in groups.items():
        verdict = "differs" if r["low"] > 0 or r["high"] < 0 else "noise"
        if math.isnan(r["p"]) or r["images"] < 20:
            verdict = f"{r['images']} images: too few"
        rows.append([name, *_numbers(r), "-" if math.isnan(r["p"]) else format(r["p"], ".3f"), verdict])
    headers = [task, "A", "B", "B - A", percent, "p", ""]
    return tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True, stralign="right")


def _category_table(title: str, part: list[dict], percent: str) -> str:
    from tabulate import tabulate

    rows = [[r["name"], r["group"], r["annotations"], *_numbers(r)] for r in part]
    headers = [title, "group", "annotations", "A", "B", "B - A", percent]
    return tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True)
