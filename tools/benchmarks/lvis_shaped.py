#!/usr/bin/env python
"""Write an annotation file of LVIS v1 train's shape: 1.1 GB, 100,170 images, 1,270,141 polygons of 1,203 categories.

The image and instance counts of each category are LVIS v1's (``../shared/data/lvis_v1_train_cat_info.json`` where that
is, else the image counts that Detectron2 has). What is in which image and every outline is drawn at random from a fixed
seed, so that the same call writes the same bytes. There are no photographs.

    python tools/benchmarks/lvis_shaped.py --scale 0.1 --output /tmp/tenth.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from lt_det.io import cache_root, write_atomically

IMAGES, INSTANCES = 100_170, 1_270_141
# Numbers in an outline: the mean that makes the whole file as long as LVIS's. (The 977 objects of lvis_val_100 have a
# mean of 68 and a median of 48.)
_MEAN_POINTS, _SIGMA = 45.0, 0.9
_REAL = Path(__file__).resolve().parents[3] / "shared/data/lvis_v1_train_cat_info.json"


def lvis_categories() -> list[dict]:
    """LVIS v1's categories with ``image_count`` and ``instance_count``."""
    if _REAL.is_file():
        return sorted(json.loads(_REAL.read_text()), key=lambda c: c["id"])
    from detectron2.data.datasets.lvis_v1_categories import LVIS_CATEGORIES
    from detectron2.data.datasets.lvis_v1_category_image_count import LVIS_CATEGORY_IMAGE_COUNT

    images = {c["id"]: c["image_count"] for c in LVIS_CATEGORY_IMAGE_COUNT}
    ratio = INSTANCES / sum(images.values())
    categories = []
    for c in sorted(LVIS_CATEGORIES, key=lambda c: c["id"]):
        n = images[c["id"]]
        categories.append({**c, "image_count": n, "instance_count": max(n, round(n * ratio))})
    return categories


def write_lvis_shaped(path: Path, scale: float = 1.0, seed: int = 0) -> Path:
    """Write the file to ``path``, with ``scale`` times as many images and objects (no category without)."""
    rng = np.random.default_rng(seed)
    categories = lvis_categories()
    num_images = max(1, round(IMAGES * scale))
    image_count = np.array([c["image_count"] for c in categories])
    instance_count = np.array([c["instance_count"] for c in categories])
    image_count = np.clip((image_count * scale).round().astype(np.int64), 1, num_images)
    instance_count = np.maximum((instance_count * scale).round().astype(np.int64), image_count)

    # Each category in its number of images, its further objects in the same ones.
    image, category = [], []
    for c, (n, m) in enumerate(zip(image_count, instance_count)):
        where = rng.choice(num_images, n, replace=False)
        image += [where, rng.choice(where, m - n)]
        category.append(np.full(m, c))
    image, category = np.concatenate(image), np.concatenate(category)
    # Objects of an image stand together, images in no order, as in LVIS's file.
    order = np.lexsort((rng.random(len(image)), rng.permutation(num_images)[image]))
    image, category = image[order], category[order]

    ids = np.sort(rng.choice(581_929, num_images, replace=False)) + 1
    landscape = rng.random(num_images) < 0.75
    width, height = np.where(landscape, 640, 480), np.where(landscape, 480, 640)
    ids_of = [c["id"] for c in categories]
    hundredths = [repr(i / 100) for i in range(64_100)]  # every coordinate that can come up

    def write(file) -> None:
        file.write('{"info": {"description": "of LVIS v1 train\'s shape; random"}, "annotations": [')
        for start in range(0, len(image), 50_000):
            rows = slice(start, min(start + 50_000, len(image)))
            _write_annotations(file, rng, rows, image, category, ids, ids_of, width, height, hundredths)
        file.write('], "images": [')
        for i in range(num_images):
            name = f"{ids[i]:012d}.jpg"
            negative = rng.choice(ids_of, rng.integers(0, 8)).tolist()
            record = {
                "date_captured": "2013-11-15 14:00:00",
                "neg_category_ids": negative,
                "license": 1,
                "height": int(height[i]),
                "width": int(width[i]),
                "flickr_url": f"http://farm8.staticflickr.com/7021/{ids[i]}_{ids[i]:x}_z.jpg",
                "coco_url": f"http://images.cocodataset.org/train2017/{name}",
                "id": int(ids[i]),
                "not_exhaustive_category_ids": rng.choice(ids_of, rng.integers(0, 3)).tolist(),
            }
            file.write((", " if i else "") + json.dumps(record))
        listed = [
            {**c, "image_count": int(n), "instance_count": int(m)}
            for c, n, m in zip(categories, image_count, instance_count)
        ]
        file.write('], "licenses": [], "categories": ' + json.dumps(listed) + "}")

    write_atomically(path, write)
    return path


def _write_annotations(file, rng, rows, image, category, ids, ids_of, width, height, hundredths) -> None:
    count = rows.stop - rows.start
    w, h = width[image[rows]], height[image[rows]]
    points = np.clip(rng.lognormal(np.log(_MEAN_POINTS) - _SIGMA**2 / 2, _SIGMA, count), 3, 600).astype(np.int64)
    # Star-shaped outlines about a centre; the distance from it goes up and down with the angle.
    radius = np.exp(rng.uniform(np.log(4), np.log(120), count))
    x0, y0 = rng.uniform(0.05, 0.95, count) * w, rng.uniform(0.05, 0.95, count) * h
    ends = np.cumsum(points)
    starts = ends - points
    angle = (np.arange(ends[-1]) - np.repeat(starts, points)) * np.repeat(2 * np.pi / points, points)
    wave = 0.75 + 0.25 * np.cos(3 * angle + np.repeat(rng.uniform(0, 6, count), points))
    reach = np.repeat(radius, points) * wave
    x = np.clip(np.repeat(x0, points) + reach * np.cos(angle), 0, np.repeat(w, points))
    y = np.clip(np.repeat(y0, points) + reach * np.sin(angle), 0, np.repeat(h, points))
    xy = np.stack([x, y], 1)
    low, high = np.minimum.reduceat(xy, starts), np.maximum.reduceat(xy, starts)
    box = (np.concatenate([low, high - low], 1) * 100).round().astype(np.int64)
    text = list(map(hundredths.__getitem__, (xy * 100).round().astype(np.int64).reshape(-1).tolist()))
    area = (np.pi * (0.75 * radius) ** 2).round(2).tolist()
    parts = []
    for j in range(count):
        i = rows.start + j
        numbers = text[2 * starts[j] : 2 * ends[j]]
        # Every tenth object is in two parts.
        cut = 2 * (points[j] // 2)
        if i % 10 == 0 and points[j] >= 6:
            outline = f"[{', '.join(numbers[:cut])}], [{', '.join(numbers[cut:])}]"
        else:
            outline = f"[{', '.join(numbers)}]"
        bbox = ", ".join(hundredths[v] for v in box[j].tolist())
        parts.append(
            f'{{"area": {area[j]}, "id": {i + 1}, "segmentation": [{outline}], "image_id": {ids[image[i]]}, '
            f'"bbox": [{bbox}], "category_id": {ids_of[category[i]]}}}'
        )
    file.write((", " if rows.start else "") + ", ".join(parts))


def lvis_shaped_file(scale: float = 1.0) -> Path:
    """The file at this scale in lt_det's cache (``$LT_DET_CACHE``, else ``~/.cache/lt_det``), written if need be."""
    path = cache_root() / "benchmarks" / f"lvis_shaped_{scale:g}.json"
    return path if path.is_file() else write_lvis_shaped(path, scale)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="share of LVIS v1 train's images and objects")
    parser.add_argument("--output", type=Path, help="default: in lt_det's cache")
    args = parser.parse_args()
    path = write_lvis_shaped(args.output, args.scale) if args.output else lvis_shaped_file(args.scale)
    print(f"{path}: {path.stat().st_size / 1e9:.3f} GB")


if __name__ == "__main__":
    main()
