"""Predicts images: pictures, and a results json, by any model that Detectron2 can load.

    tools/predict.py photo.jpg folder/ --config-file lvis_balms --output predictions MODEL.WEIGHTS model_final.pth

Classes are coloured by their frequency group: rare red, common orange, frequent blue; violet where their training
counts are not known. For the eye, of detections that overlap, whatever their classes, the best alone is kept (--nms),
and those below a threshold are left out: one for all (--threshold), or one for each class (--thresholds, the csv that
lt-det report writes). OUT/predictions.json has what is drawn; with --annotations OUT/results.json has all detections
with that file's image and category ids, as COCO's and LVIS's evaluation take them. Files that cannot be read as images
are left out and named at the end; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lt_det.tool import exit_code

__all__ = ["main"]

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def build_parser() -> argparse.ArgumentParser:
    """The arguments of ``lt-det predict``."""
    parser = argparse.ArgumentParser(
        prog="lt-det predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE-OR-FOLDER", help="a folder is searched with those in it")
    parser.add_argument("--config-file", required=True, metavar="FILE", help="of the model; or a recipe's name")
    parser.add_argument("--output", required=True, metavar="OUT", help="folder for what is written")
    parser.add_argument("--threshold", type=float, default=0.3, help="smallest score to show (default: 0.3)")
    parser.add_argument("--thresholds", metavar="CSV", help="of each class: columns name and threshold")
    parser.add_argument(
        "--nms", type=float, default=0.6, metavar="IOU",
        help="of boxes that overlap by more, of whatever classes, the best is shown (default: 0.6; 1: show all)",
    )  # fmt: skip
    parser.add_argument(
        "--statistics", metavar="JSON", help="annotations of the training set, or its counts, for groups"
    )
    parser.add_argument("--annotations", metavar="GT.json", help="write results.json with its image and category ids")
    parser.add_argument("--no-pictures", action="store_true", help="write json alone")
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")
    return parser


def find_images(paths: Sequence[str]) -> list[tuple[Path, Path]]:
    """Image files, and where each stands below its folder.

    Raises:
        FileNotFoundError: a path is not there. ValueError: there is no image.
    """
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in _SUFFIXES)
            found += [(p, p.relative_to(path)) for p in inside]
        elif path.is_file():
            found.append((path, Path(path.name)))
        else:
            raise FileNotFoundError(f"there is no image or folder {path}.")
    if not found:
        raise ValueError(f"{', '.join(paths)}: no images ({', '.join(_SUFFIXES)}).")
    names = [inside.with_suffix("") for _, inside in found]
    twice = {str(n) for n in names if names.count(n) > 1} if len(set(names)) < len(names) else ()
    if twice:
        raise ValueError(f"several images would be written as {min(twice)}; predict them into folders of their own.")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """``lt-det predict`` and ``tools/predict.py``; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    args, rest = parser.parse_known_args(words)
    # KEY VALUE pairs follow the arguments; argparse takes them for images where those are not yet ended by a flag.
    first = next((i for i, w in enumerate(args.images) if _is_key(w)), len(args.images))
    args.images, opts = args.images[:first], [*args.images[first:], *rest]
    if unknown := [w for w in opts if w.startswith("--")]:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    if not args.images:
        parser.error("name an image or a folder")
    if not (0 <= args.threshold <= 1 and 0 < args.nms <= 1):
        parser.error("--threshold and --nms must lie in 0..1")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    return exit_code("lt-det predict", lambda: _predict(args, opts))


def _is_key(word: str) -> bool:
    """MODEL.WEIGHTS and the like, unless there is such a file."""
    from lt_det.config import get_lt_det_cfg

    return word.split(".")[0] in get_lt_det_cfg() and not os.path.exists(word)


def _predict(args: argparse.Namespace, opts: list[str]) -> int:
    import numpy as np
    from PIL import Image, ImageOps

    from lt_det import model_zoo
    from lt_det.data import ClassStatistics, register_from_config
    from lt_det.engine.logs import mend_warnings
    from lt_det.engine.predict import Predictor, keep_instances
    from lt_det.engine.setup import merged_config
    from lt_det.evaluation.calibration import read_thresholds
    from lt_det.io import write_json_atomically
    from lt_det.processes import keep_freed_memory
    from lt_det.progress import progress_bar
    from lt_det.visualization.objects import jpeg

    images = find_images(args.images)
    by_name = read_thresholds(args.thresholds) if args.thresholds else {}
    dataset = _Dataset(args.annotations) if args.annotations else None
    cfg = merged_config(model_zoo.resolve(args.config_file), opts)
    register_from_config([entry for entry in cfg.DATASETS.REGISTER if os.path.isfile(entry[1])])
    statistics = ClassStatistics.read(args.statistics) if args.statistics else None
    mend_warnings()
    predictor = Predictor.from_config(cfg, statistics=statistics)
    if next(predictor.model.parameters()).is_cpu:
        keep_freed_memory()
    thresholds = predictor.thresholds(args.threshold, by_name)
    os.makedirs(args.output, exist_ok=True)
    shown_rows, results, unknown, unreadable = [], [], 0, []
    for file, inside in progress_bar(images, unit="img", show=not args.no_progress):
        try:
            with Image.open(file) as opened:
                # As Detectron2 reads images: turned as EXIF says.
                pixels = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # all that Pillow raises
            unreadable.append(f"{file}: {error}")
            continue
        found = predictor(pixels)
        shown = keep_instances(found, thresholds, args.nms)
        rows = _rows(shown, predictor)
        shown_rows.append(
            {"file": str(file), "height": pixels.shape[0], "width": pixels.shape[1], "detections": rows}
        )  # fmt: skip
        if dataset is not None:
            image_id = dataset.image_id(inside)
            unknown += image_id is None
            if image_id is not None:
                results += dataset.results(image_id, _rows(found, predictor))
        if not args.no_pictures:
            target = Path(args.output, inside).with_suffix(".jpg")
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.resolve() == file.resolve():
                raise ValueError(f"--output {args.output} would overwrite {file}; name another folder.")
            target.write_bytes(jpeg(_picture(pixels, shown, predictor), quality=90))
    if not shown_rows:
        raise ValueError(f"none of {len(images)} files can be read as an image; the first is {unreadable[0]}")
    write_json_atomically(os.path.join(args.output, "predictions.json"), shown_rows)
    total = sum(len(row["detections"]) for row in shown_rows)
    print(f"{len(shown_rows)} images, {total} detections shown; in {args.output}: predictions.json", end="")
    print("" if args.no_pictures else ", a picture of each image", end="")
    if dataset is not None:
        write_json_atomically(os.path.join(args.output, "results.json"), results)
        print(f", results.json ({len(results)} detections)", end="")
    print()
    if unknown:
        print(f"{unknown} images are not in {args.annotations} and not in results.json", file=sys.stderr)
    if unreadable:
        print(
            f"{len(unreadable)} files cannot be read as images and are left out:",
            *unreadable,
            sep="\n  ",
            file=sys.stderr,
        )
    return 1 if unreadable else 0


class _Dataset:
    """Ids of an annotation file, by file name and by category name."""

    def __init__(self, path: str):
        import msgspec

        from lt_det.io.json_blocks import iter_json_blocks

        if not os.path.isfile(path):
            raise FileNotFoundError(f"there is no annotation file {path}.")
        self.path = path
        self.categories: dict[str, int] = {}
        self._by_name: dict[str, int] = {}
        skip = msgspec.json.Decoder(list[msgspec.Raw]).decode
        for member, part in iter_json_blocks(path, {"images": json.loads, "annotations": skip}):
            for image in part if member == "images" else ():
                name = image.get("file_name") or "/".join((image.get("coco_url") or "").split("/")[-2:])
                self._by_name[name] = image["id"]
                self._by_name.setdefault(os.path.basename(name), image["id"])
            for category in part if member == "categories" else ():
                self.categories[category["name"]] = category["id"]

    def image_id(self, inside: Path) -> int | None:
        return self._by_name.get(inside.as_posix(), self._by_name.get(inside.name))

    def results(self, image_id: int, rows: list[dict]) -> list[dict]:
        out = []
        for row in rows:
            if row["name"] not in self.categories:
                raise ValueError(f"{self.path} has no category {row['name']!r}, which the model knows.")
            one = {"image_id": image_id, "category_id": self.categories[row["name"]], "bbox": row["bbox"]}
            one["score"] = row["score"]
            if "segmentation" in row:
                one["segmentation"] = row["segmentation"]
            out.append(one)
        return out


def _rows(found, predictor) -> list[dict]:
    """Detections as dicts: category_id, name, group, score, bbox (x, y, width, height), segmentation (RLE)."""
    import numpy as np
    import pycocotools.mask as mask_utils

    boxes = found.pred_boxes.tensor.numpy().astype(float)
    boxes[:, 2:] -= boxes[:, :2]
    rows = []
    for i, (k, score) in enumerate(zip(found.pred_classes.tolist(), found.scores.tolist())):
        row = {
            "category_id": predictor.category_ids[k], "name": predictor.names[k], "group": predictor.groups[k],
            "score": score, "bbox": boxes[i].tolist(),
        }  # fmt: skip
        if found.has("pred_masks"):
            rle = mask_utils.encode(np.asfortranarray(found.pred_masks[i].numpy().astype(np.uint8)))
            row["segmentation"] = {"size": list(rle["size"]), "counts": rle["counts"].decode()}
        rows.append(row)
    return rows


def _picture(pixels, shown, predictor):
    from lt_det.visualization import short_names
    from lt_det.visualization.objects import GROUP_COLOURS, DrawnObject, draw_objects

    masks = shown.pred_masks.numpy() if shown.has("pred_masks") else [None] * len(shown)
    objects, names = [], short_names(predictor.names)
    for (x1, y1, x2, y2), k, score, mask in zip(
        shown.pred_boxes.tensor.tolist(), shown.pred_classes.tolist(), shown.scores.tolist(), masks
    ):
        label = f"{names[k]} {score:.2f}"
        objects.append(DrawnObject((x1, y1, x2 - x1, y2 - y1), label, GROUP_COLOURS[predictor.groups[k]], mask))
    return draw_objects(pixels, objects)
