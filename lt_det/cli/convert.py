"""Converts, splits and joins annotation files.

    tools/convert_dataset.py lvis coco.json lvis_style.json          frequency groups, counts, federated fields
    tools/convert_dataset.py split all.json --train train.json --val val.json --fraction 0.2
    tools/convert_dataset.py subset all.json part.json --names cat dog, or --frequency r c
    tools/convert_dataset.py mix a.json b.json --output both.json --prefixes a/images b/images

Every file it writes has its categories' image and instance counts (of a split, those to train on) and ids 1 to K, and
opens in Detectron2's loaders.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from lt_det.frequency import GROUP_LIMITS, GROUP_NAMES
from lt_det.tool import exit_code

__all__ = ["main"]


def build_parser() -> argparse.ArgumentParser:
    """The arguments of ``lt-det convert``."""
    parser = argparse.ArgumentParser(
        prog="lt-det convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text)

    def thresholds(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--frequency-thresholds", type=int, nargs=2, default=GROUP_LIMITS, metavar=("RARE", "COMMON"),
            help="most images of a rare and of a common class (default: 10 100)",
        )  # fmt: skip

    lvis = command("lvis", "a COCO json in LVIS style")
    lvis.add_argument("input", metavar="IN.json")
    lvis.add_argument("output", metavar="OUT.json")
    thresholds(lvis)

    split = command("split", "two parts with every class in both, no image in both")
    split.add_argument("input", metavar="IN.json")
    split.add_argument("--train", required=True, metavar="OUT.json")
    split.add_argument("--val", required=True, metavar="OUT.json")
    split.add_argument("--fraction", type=float, default=0.2, help="of the images, for --val (default: 0.2)")
    split.add_argument("--seed", type=int, default=0)
    thresholds(split)

    subset = command("subset", "the images and annotations of some classes")
    subset.add_argument("input", metavar="IN.json")
    subset.add_argument("output", metavar="OUT.json")
    subset.add_argument("--names", nargs="+", default=[], metavar="NAME")
    subset.add_argument("--frequency", nargs="+", default=[], choices=["r", "c", "f"])
    subset.add_argument("--keep-empty", action="store_true", help="keep images that have none of the classes")

    mix = command("mix", "several data sets as one, classes of the same name as one")
    mix.add_argument("inputs", nargs="+", metavar="IN.json")
    mix.add_argument("--output", required=True, metavar="OUT.json")
    mix.add_argument("--prefixes", nargs="+", default=[], help="put before the file names, one for each data set")
    thresholds(mix)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """``lt-det convert`` and ``tools/convert_dataset.py``; returns the exit code."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    return exit_code("lt-det convert", lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Writes the files and prints what they hold."""
    from lt_det.data import convert

    if args.command == "mix":
        contents = [convert.read_annotations(path) for path in args.inputs]
        made = {args.output: convert.mix(contents, prefixes=args.prefixes, thresholds=tuple(args.frequency_thresholds))}
    else:
        content = convert.read_annotations(args.input)
        if args.command == "lvis":
            made = {args.output: convert.to_lvis(content, thresholds=tuple(args.frequency_thresholds))}
        elif args.command == "subset":
            part = convert.class_subset(content, names=args.names, frequency=args.frequency, keep_empty=args.keep_empty)
            made = {args.output: part}
        else:
            parts = convert.split(
                content, fraction=args.fraction, seed=args.seed, thresholds=tuple(args.frequency_thresholds)
            )
            made = {args.train: parts[0], args.val: parts[1]}
    for path, content in made.items():
        convert.write_annotations(path, content)
    for path, content in made.items():
        groups = [c.get("frequency") for c in content["categories"]]
        text = ", ".join(f"{groups.count(g)} {name}" for g, name in GROUP_NAMES.items())
        print(
            f"{path}: {len(content['images']):,} images, {len(content['annotations']):,} objects, "
            f"{len(groups):,} classes ({text})"
        )
