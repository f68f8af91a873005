#!/usr/bin/env python
"""
Draws a sheet of annotated images, and the long tail that they come from, to look at a data set at one glance.

    python tools/contact_sheet.py --dataset glyph_lvis_train --histogram --output sheet.png
    python tools/contact_sheet.py --annotations lvis_v1_val.json --image-root coco/ --output sheet.png

Masks are outlined in the colour of their category's frequency group: rare red, common orange, frequent blue;
grey where the json has no groups.
"""

import argparse
import json
import os
import sys
from collections import defaultdict

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lt_det.frequency import GROUP_NAMES
from lt_det.io import write_atomically

GROUP_COLOURS = {"r": (214, 39, 40), "c": (255, 150, 20), "f": (31, 119, 220), None: (150, 150, 150)}


def parse_arguments(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--dataset", help="a glyph_lvis data set (rendered if need be), or one that Detectron2 knows")
    source.add_argument("--annotations", help="an LVIS- or COCO-format json; with --image-root")
    parser.add_argument("--image-root", help="the folder that the json's file names are relative to")
    parser.add_argument("--output", required=True, help="the PNG file to write")
    parser.add_argument("--num-images", type=int, default=24)
    parser.add_argument("--columns", type=int, default=8)
    parser.add_argument("--tile", type=int, default=192, help="pixels of an image's longer side on the sheet")
    parser.add_argument("--seed", type=int, default=0, help="chooses the images")
    parser.add_argument("--image-ids", type=int, nargs="+", help="shows these images rather than chosen ones")
    parser.add_argument("--no-labels", action="store_true", help="outlines without category names")
    parser.add_argument("--histogram", action="store_true", help="adds the categories' image counts below")
    palette_help = "reduces the picture to N <= 256 colours, for a small file"
    parser.add_argument("--palette", type=int, default=0, metavar="N", help=palette_help)
    options = parser.parse_args(arguments)
    if options.annotations and not options.image_root:
        parser.error("--annotations needs --image-root")
    if options.image_root and not options.annotations:
        parser.error("--image-root goes with --annotations")
    if not 0 <= options.palette <= 256:
        parser.error("--palette must lie between 0 (off) and 256")
    for name in ("num_images", "columns", "tile"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return options


def locate(options: argparse.Namespace) -> tuple[str, str]:
    """Json file and image folder."""
    if options.annotations:
        return options.annotations, options.image_root
    if options.dataset.startswith("glyph_lvis"):
        from lt_det.data.datasets.glyph_lvis import ensure_glyph_lvis

        return ensure_glyph_lvis(options.dataset)
    from detectron2.data import DatasetCatalog, MetadataCatalog

    if options.dataset not in DatasetCatalog.list():
        raise SystemExit(f"Detectron2 knows no data set {options.dataset!r}; name its files with --annotations")
    metadata = MetadataCatalog.get(options.dataset)
    return metadata.json_file, metadata.image_root


def image_path(image: dict, root: str) -> str:
    """LVIS v1 names its files by the last two parts of coco_url, older and other formats by file_name."""
    candidates = [image["file_name"]] if image.get("file_name") else []
    if image.get("coco_url"):
        candidates += ["/".join(image["coco_url"].split("/")[-2:]), image["coco_url"].split("/")[-1]]
    for candidate in candidates:
        path = os.path.join(root, candidate)
        if os.path.isfile(path):
            return path
    raise SystemExit(f"{root} has no picture of image {image['id']}: looked for {', '.join(candidates)}")


def choose_images(content: dict, annotations: dict, options: argparse.Namespace) -> list[dict]:
    """
    The images asked for; else one of a random category of each frequency group in turn, so that all appear.
    """
    by_id = {image["id"]: image for image in content["images"]}
    if options.image_ids:
        unknown = [image_id for image_id in options.image_ids if image_id not in by_id]
        if unknown:
            raise SystemExit(f"the json has no images with ids {unknown}")
        return [by_id[image_id] for image_id in options.image_ids]
    rng = np.random.default_rng(options.seed)
    images_of = defaultdict(lambda: defaultdict(list))  # by frequency group, then by category
    groups = {category["id"]: category.get("frequency") for category in content["categories"]}
    for image_id, rows in annotations.items():
        for category in sorted({row["category_id"] for row in rows}):
            images_of[groups[category]][category].append(image_id)
    chosen: dict[int, None] = {}
    queues = []
    for group in sorted(images_of, key=str):
        queues.append([images_of[group][category] for category in rng.permutation(sorted(images_of[group]))])
    while len(chosen) < options.num_images and any(queues):
        for queue in queues:
            if queue and len(chosen) < options.num_images:
                chosen[int(rng.choice(queue.pop()))] = None
    return [by_id[image_id] for image_id in sorted(chosen)]


def outlines(segmentation, height: int, width: int) -> list[np.ndarray]:
    """Closed lines `(N, 2)` in the image's pixels."""
    if isinstance(segmentation, list):
        return [np.asarray(polygon, float).reshape(-1, 2) for polygon in segmentation]
    import pycocotools.mask as mask_util

    if isinstance(segmentation["counts"], list):
        segmentation = mask_util.frPyObjects(segmentation, height, width)
    contours, _ = cv2.findContours(mask_util.decode(segmentation), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    return [contour[:, 0] + 0.5 for contour in contours]


def label_of(category: dict) -> str:
    """The character itself where a category is one."""
    characters = [synonym for synonym in category.get("synonyms", ()) if len(synonym) == 1]
    return characters[0] if characters else category["name"].replace("_", " ")


def draw_tile(image: dict, rows: list, categories: dict, root: str, options: argparse.Namespace, fonts) -> Image.Image:
    tile = options.tile
    with Image.open(image_path(image, root)) as file:
        picture = file.convert("RGB")
    scale = tile / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    canvas = Image.new("RGB", (tile, tile), (255, 255, 255))
    canvas.paste(picture.resize(size, Image.Resampling.LANCZOS))
    draw = ImageDraw.Draw(canvas)
    for row in sorted(rows, key=lambda row: -row["area"]):
        colour = GROUP_COLOURS[categories[row["category_id"]].get("frequency")]
        for line in outlines(row["segmentation"], image["height"], image["width"]):
            points = [tuple(point) for point in line * scale]
            draw.line([*points, points[0]], fill=colour, width=2, joint="curve")
    if options.no_labels:
        return canvas
    largest = {}  # one label a category: photographs have dozens of instances
    for row in rows:
        if row["category_id"] not in largest or row["area"] > largest[row["category_id"]]["area"]:
            largest[row["category_id"]] = row
    for row in largest.values():
        category = categories[row["category_id"]]
        text = label_of(category)
        font = fonts[len(text) > 1]
        box = draw.textbbox((0, 0), text, font=font)
        width, height = box[2] - box[0] + 4, box[3] - box[1] + 4
        x = min(max(row["bbox"][0] * scale, 0), max(size[0] - width, 0))
        y = min(max(row["bbox"][1] * scale, 0), max(size[1] - height, 0))
        draw.rectangle((x, y, x + width, y + height), fill=GROUP_COLOURS[category.get("frequency")])
        draw.text((x + 2 - box[0], y + 2 - box[1]), text, font=font, fill=(255, 255, 255))
    return canvas


def draw_histogram(categories: list[dict], annotations: dict, width: int) -> Image.Image:
    """Image counts in descending order, as the json states them, or else counted in it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counted = defaultdict(int)
    for rows in annotations.values():
        for category in {row["category_id"] for row in rows}:
            counted[category] += 1
    bars = [(c.get("image_count", counted[c["id"]]), c.get("frequency"), label_of(c)) for c in categories]
    bars.sort(key=lambda bar: -bar[0])
    figure = Figure(figsize=(width / 100, 2.4), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    bar_width = 0.85 if len(bars) < 200 else 1
    for group in ("f", "c", "r", None):
        members = [i for i, bar in enumerate(bars) if bar[1] == group]
        if members:
            colour = tuple(channel / 255 for channel in GROUP_COLOURS[group])
            name = f"{GROUP_NAMES[group]} ({len(members)})" if group else None
            axes.bar(members, [bars[i][0] for i in members], bar_width, color=colour, label=name)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7)
    axes.set_xlim(-0.7, len(bars) - 0.3)
    axes.set_ylabel("training images" if "image_count" in categories[0] else "images")
    if len(bars) <= width / 14:
        axes.set_xticks(range(len(bars)), [bar[2] for bar in bars], fontsize=9)
    else:
        axes.set_xlabel(f"{len(bars)} categories")
    if any(bar[1] for bar in bars):
        axes.legend(frameon=False, ncols=3)
    axes.spines[["top", "right"]].set_visible(False)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[:, :, :3])


def main(arguments=None) -> None:
    options = parse_arguments(arguments)
    json_file, root = locate(options)
    with open(json_file, encoding="utf-8") as file:
        content = json.load(file)
    annotations = defaultdict(list)
    for row in content["annotations"]:
        annotations[row["image_id"]].append(row)
    categories = {category["id"]: category for category in content["categories"]}
    chosen = choose_images(content, annotations, options)
    if not chosen:
        raise SystemExit(f"{json_file} has no annotated image")

    import matplotlib

    font_file = os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans-Bold.ttf")
    # Of labels that are one character, and of longer ones.
    fonts = [ImageFont.truetype(font_file, max(9, options.tile // share)) for share in (14, 26)]
    columns = min(options.columns, len(chosen))
    step = options.tile + 3
    sheet = Image.new("RGB", (columns * step - 3, -(-len(chosen) // columns) * step - 3), (255, 255, 255))
    for index, image in enumerate(chosen):
        tile = draw_tile(image, annotations[image["id"]], categories, root, options, fonts)
        sheet.paste(tile, (index % columns * step, index // columns * step))
    if options.histogram:
        histogram = draw_histogram(content["categories"], annotations, sheet.width)
        both = Image.new("RGB", (sheet.width, sheet.height + 8 + histogram.height), (255, 255, 255))
        both.paste(sheet)
        both.paste(histogram, (0, sheet.height + 8))
        sheet = both
    if options.palette:
        sheet = sheet.quantize(options.palette, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    write_atomically(options.output, lambda file: sheet.save(file, format="PNG", optimize=True), mode="wb")
    print(f"Wrote {options.output}: {len(chosen)} images, {os.path.getsize(options.output) / 1000:.0f} kB")


if __name__ == "__main__":
    sys.exit(main())
