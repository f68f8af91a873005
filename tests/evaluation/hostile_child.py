"""Run by test_hostile_input.py in a process of its own: any json value in any field, under a memory limit.

Every input ends as "evaluated" or as a ValueError that names the file; anything else ends this process with an error,
and FOLDER holds what it was.
"""

import copy
import json
import logging
import os
import resource
import warnings
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_utils
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lt_det.evaluation import GroundTruth, evaluate_results

MEMORY = 2 << 30  # bytes beside those of the process that it is forked from
NUMBERS = st.one_of(
    st.sampled_from([0, -1, 1, 3, 40, 2**31, 2**53 + 1, 2**63, 2**64, 10**30, 10**400, 1e9, 1e300, -1e300, 0.5, -0.0]),
    st.integers(),
    st.floats(allow_nan=True, allow_infinity=True),
)
ATOMS = (
    st.none() | st.booleans() | NUMBERS | st.text(max_size=6) | st.sampled_from(["5", "nan", "é", "\ud800", "P1000"])
)
LISTS_OF_NUMBERS = st.lists(NUMBERS, max_size=8)
COUNTS = LISTS_OF_NUMBERS | ATOMS | st.text("012PQa`o", max_size=9)
VALUES = st.one_of(
    ATOMS,
    st.recursive(ATOMS, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=4), v, max_size=3)),
    LISTS_OF_NUMBERS,
    st.lists(LISTS_OF_NUMBERS, max_size=3),
    st.lists(st.lists(NUMBERS, min_size=6, max_size=6), min_size=1, max_size=2),
    st.fixed_dictionaries({"size": LISTS_OF_NUMBERS | ATOMS, "counts": COUNTS}),
    st.fixed_dictionaries({"size": st.just([40, 50]), "counts": COUNTS}),
)
REMOVED = object()

POLYGON = [[5.0, 5.0, 30.0, 6.0, 20.0, 30.5]]
RLE = {"size": [40, 50], "counts": [1000, 100, 900]}
IMAGE = {"height": 40, "width": 50, "file_name": "a.jpg", "neg_category_ids": [2], "not_exhaustive_category_ids": []}
ANNOTATION = {"image_id": 1, "category_id": 1, "bbox": [5.0, 5.0, 25.0, 25.5], "area": 300.0, "iscrowd": 0, "ignore": 0}
ANNOTATIONS = {
    "images": [{**IMAGE, "id": 1}, {**IMAGE, "id": 2}],
    "categories": [{"id": k, "name": f"c{k}", "frequency": "r", "image_count": 3, "instance_count": 4} for k in (1, 2)],
    "annotations": [
        {**ANNOTATION, "id": 1, "segmentation": POLYGON},
        {**ANNOTATION, "id": 2, "image_id": 2, "segmentation": RLE},
    ],
}
TEXT = mask_utils.frPyObjects(RLE, 40, 50)["counts"].decode()
HEAD = {"image_id": 1, "category_id": 1, "score": 0.5, "bbox": [5.0, 5.0, 25.0, 20.0]}
RESULTS = [
    {**HEAD, "segmentation": {"size": [40, 50], "counts": TEXT}},
    {**HEAD, "image_id": 2, "segmentation": RLE},
    {**HEAD, "segmentation": POLYGON},
]


def places(value, at=()):
    """Paths to all values inside of a json value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*at, key)
        yield from places(inner, (*at, key))


def changed(content, at, value):
    content = copy.deepcopy(content)
    inside = content
    for key in at[:-1]:
        inside = inside[key]
    if value is not REMOVED:
        inside[at[-1]] = value
    elif isinstance(inside, (dict, list)):
        del inside[at[-1]]
    return content


def named(path, function):
    """``function()``, or None where it names what is wrong with the file."""
    try:
        return function()
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
        assert Path(path).name in message, f"does not name the file: {message}"
        assert len(message) < 3000
        return None


def train(path):
    """What a training does with the annotations before it has pixels."""
    from detectron2.data import detection_utils

    from lt_det.data import load_lvis_or_coco_json

    records = load_lvis_or_coco_json(str(path), str(path.parent), check_images=False)
    for record in records:
        height, width = int(record["height"]), int(record["width"])
        objects = [a for a in record["annotations"] if "segmentation" in a and not a.get("iscrowd")]
        for one in objects:  # one by one: of a file, either form of masks is used
            bitmask = isinstance(one["segmentation"], dict)
            instances = detection_utils.annotations_to_instances(
                [one], (height, width), mask_format="bitmask" if bitmask else "polygon"
            )
            if not bitmask:
                instances.gt_masks.crop_and_resize(instances.gt_boxes.tensor, 28)
    return True


def run(folder, examples):
    annotations, results = folder / "annotations.json", folder / "results.json"
    counts = {"evaluated": 0, "trained": 0, "all": 0}

    def one(content, found):
        counts["all"] += 1
        annotations.write_text(json.dumps(content))
        results.write_text(json.dumps(found))
        gt = named(annotations, lambda: GroundTruth.from_json(annotations))
        if gt is not None:
            done = [
                named(results, lambda s=skip: evaluate_results(gt, results, skip_invalid=s, num_threads=1))
                for skip in (False, True)
            ]
            counts["evaluated"] += done[0] is not None
            named(results, lambda: evaluate_results(gt, results, iou_types=("segm",), skip_invalid=True, num_threads=1))
        named(annotations, lambda: GroundTruth.from_json(annotations, with_masks=False))
        if content is not ANNOTATIONS:
            counts["trained"] += bool(named(annotations, lambda: train(annotations)))

    one(ANNOTATIONS, RESULTS)
    assert counts["evaluated"] == 1, "the unchanged files are fine"
    assert train(annotations)
    options = settings(
        max_examples=examples, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    new = st.just(REMOVED) | VALUES

    @options
    @given(st.sampled_from(list(places(ANNOTATIONS))), new)
    def in_annotations(at, value):
        one(changed(ANNOTATIONS, at, value), RESULTS)

    @options
    @given(st.sampled_from(list(places(RESULTS))), new)
    def in_results(at, value):
        one(ANNOTATIONS, changed(RESULTS, at, value))

    in_annotations()
    in_results()
    print(json.dumps(counts))


def main(folder, examples):
    """Writes what is said, and at the end the counts, into FOLDER/log.txt."""
    with open(Path(folder, "log.txt"), "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    np.seterr(all="ignore")
    run(Path(folder), examples)
