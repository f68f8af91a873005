"""TIDE's errors against tidecv's own numbers, and under LVIS's federated rule by hand; confusions by hand."""

import json
from pathlib import Path

import numpy as np
import pytest

from lt_det.evaluation import GroundTruth, evaluate_results
from lt_det.evaluation.errors import ERROR_TYPES, analyse_errors

# Written by tidecv 1.0.1 in an environment of its own, on 30 images; their boxes, masks (rectangles and triangles) and
# 400 detections stand in the file beside its numbers.
TIDECV = json.loads((Path(__file__).parent / "data/tide_tidecv.json").read_text())


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_the_numbers_are_tidecvs(task):
    gt = GroundTruth.from_dict(TIDECV["annotations"])
    found = analyse_errors(gt, TIDECV["results"], iou_type=task, max_dets=100)
    expected = TIDECV["tidecv"][task]
    assert found.count[""] == expected["count"]
    assert found.ap50[""] == pytest.approx(expected["ap50"], abs=1e-9)
    assert found.cost[""] == pytest.approx(expected["cost"], abs=1e-9)


def box(x, y=0, w=10, h=10):
    return [float(x), float(y), float(w), float(h)]


def lvis(images, objects, num_categories=4):
    """``images``: (negatives, not exhaustive) of each; ``objects``: (image, category, box). Groups: r, c, f, f, ..."""
    letters = "rcff"
    return {
        "images": [
            {"id": i, "width": 200, "height": 100, "neg_category_ids": list(n), "not_exhaustive_category_ids": list(e)}
            for i, (n, e) in enumerate(images, 1)
        ],
        "annotations": [
            {"id": i, "image_id": image, "category_id": c, "bbox": b, "area": b[2] * b[3],
             "segmentation": [[b[0], b[1], b[0] + b[2], b[1], b[0] + b[2], b[1] + b[3], b[0], b[1] + b[3]]]}
            for i, (image, c, b) in enumerate(objects, 1)
        ],
        "categories": [{"id": k, "name": f"c{k}", "frequency": letters[k - 1]} for k in range(1, num_categories + 1)],
    }  # fmt: skip


def detections(*rows):
    return [{"image_id": i, "category_id": c, "bbox": b, "score": s} for i, c, b, s in rows]


def errors_of(found, group=""):
    return {k: v for k, v in found.count[group].items() if v}


def test_what_lvis_does_not_annotate_is_no_error():
    """Image 1 holds category 1 and is annotated for 3 (absent); image 2 holds 3, not all of them marked."""
    gt = GroundTruth.from_dict(lvis([([3], []), ([], [3])], [(1, 1, box(0)), (2, 3, box(0))]))
    found = analyse_errors(gt, detections(
        (1, 3, box(0), 0.9),  # on the object of 1, and 3 is known to be absent: takes it
        (1, 4, box(0), 0.95),  # nothing is known about 4 in this image
        (1, 3, box(100), 0.8),  # background
        (2, 3, box(100), 0.9),  # perhaps one that was not marked
        (2, 3, box(0), 0.8),  # right
    ), iou_type="bbox")  # fmt: skip
    assert errors_of(found) == {"classification": 1, "background": 1}
    # Counted under the category that was named, so that the rare group has no error of its own ...
    assert errors_of(found, "r") == {} and errors_of(found, "f") == errors_of(found)
    # ... but it is the rare class whose AP the mended classification raises: its only object is found then.
    assert found.cost["r"]["classification"] == pytest.approx(100) and found.cost["r"]["missed"] == 0
    assert found.confusions == [{"category": 0, "taken_by": 2, "count": 1, "objects": 1, "checked": 1}]
    assert (found.taken.tolist(), found.found.tolist()) == ([1, 0, 0, 0], [0, 0, 1, 0])


def test_the_same_by_coco_rules():
    """The same boxes with every image exhaustively annotated: two detections more are wrong."""
    content = lvis([([3], []), ([], [3])], [(1, 1, box(0)), (2, 3, box(0))])
    gt = GroundTruth.from_dict(content, federated=False)
    found = analyse_errors(gt, detections(
        (1, 3, box(0), 0.9), (1, 4, box(0), 0.95), (1, 3, box(100), 0.8), (2, 3, box(100), 0.9), (2, 3, box(0), 0.8)
    ), iou_type="bbox")  # fmt: skip
    assert errors_of(found) == {"classification": 2, "background": 2}
    assert found.confusions == [{"category": 0, "taken_by": 3, "count": 1, "objects": 1, "checked": 1}]


def test_one_detection_of_each_type():
    # 10 x 10 boxes shifted by s overlap with IoU (10 - s) / (10 + s): 2 -> 0.667, 5 -> 0.333, 9 -> 0.053.
    content = lvis([([4], [])], [(1, 1, box(0)), (1, 2, box(50)), (1, 3, box(100)), (1, 3, box(150))])
    gt = GroundTruth.from_dict(content)
    found = analyse_errors(gt, detections(
        (1, 1, box(0), 0.9),  # right
        (1, 1, box(2), 0.8),  # duplicate
        (1, 2, box(55), 0.7),  # localisation
        (1, 4, box(102), 0.6),  # classification: an object of 3
        (1, 4, box(105), 0.5),  # both
        (1, 4, box(30), 0.4),  # background
        (1, 4, box(159), 0.3),  # background: IoU 0.053
    ), iou_type="bbox")  # fmt: skip
    assert errors_of(found) == {"duplicate": 1, "localisation": 1, "classification": 1, "both": 1, "background": 2,
                                "missed": 1}  # fmt: skip
    assert errors_of(found, "f") == {"classification": 1, "both": 1, "background": 2, "missed": 1}
    assert found.ap50[""] == pytest.approx(100 / 3)
    # Category 2's object is found by the mended box; one of the two of category 3 by the mended class.
    assert found.cost["c"]["localisation"] == pytest.approx(100)
    assert found.cost["f"]["classification"] == pytest.approx(100 * 51 / 101)
    assert found.cost["r"]["duplicate"] == pytest.approx(0)  # the duplicate stands behind full recall
    assert found.objects.tolist() == [1, 1, 2, 0]


def random_problem(rng, federated):
    images, objects, rows = [], [], []
    for i in range(1, 25):
        present = rng.choice(6, rng.integers(0, 4), replace=False) + 1
        rest = np.setdiff1d(np.arange(1, 7), present)
        negative = rng.choice(rest, 2, replace=False)
        images.append((negative.tolist(), present[rng.random(len(present)) < 0.3].tolist()))
        mine = [(i, int(c), box(*rng.integers(0, 60, 2), *rng.integers(12, 50, 2)))
                for c in present for _ in range(rng.integers(1, 4))]  # fmt: skip
        objects += mine
        for _ in range(20 if federated else 70):
            if mine and rng.random() < 0.7:
                _, c, b = mine[rng.integers(len(mine))]
                b = (np.array(b) + rng.integers(-8, 9, 4)).tolist()
                b[2], b[3] = max(b[2], 1.0), max(b[3], 1.0)
                c = c if rng.random() < 0.7 else int(rng.integers(1, 7))
            else:
                b, c = box(*rng.integers(0, 60, 2), *rng.integers(12, 50, 2)), int(rng.integers(1, 7))
            rows.append((i, c, b, float(rng.integers(1, 40)) / 40))  # many equal scores
    content = lvis(images, objects, 4)
    content["categories"] = [{"id": k, "name": f"c{k}", "frequency": "rrccff"[k - 1]} for k in range(1, 7)]
    return GroundTruth.from_dict(content, federated=federated), detections(*rows)


@pytest.mark.parametrize("federated", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_ap50_is_the_evaluators(federated, seed):
    """Equal scores, caps that bite, ignored detections: the matching is the evaluator's."""
    gt, results = random_problem(np.random.default_rng(seed), federated)
    max_dets = 12 if federated else 10
    metrics = evaluate_results(gt, results, iou_types=["bbox"], max_dets=max_dets).metrics["bbox"]
    found = analyse_errors(gt, results, iou_type="bbox", max_dets=max_dets)
    assert found.ap50[""] == pytest.approx(metrics["AP50"], abs=1e-9)
    assert set(found.cost) == {"", "r", "c", "f"}
    assert all(set(c) == set(ERROR_TYPES) and min(c.values()) >= 0 for c in found.cost.values())
    for error in ERROR_TYPES:
        assert sum(found.count[g][error] for g in "rcf") == found.count[""][error]
    assert (found.taken + found.found <= found.objects).all()


def test_no_results_miss_everything():
    gt = GroundTruth.from_dict(lvis([([], [])], [(1, 1, box(0)), (1, 3, box(50))]))
    found = analyse_errors(gt, [], iou_type="bbox")
    assert errors_of(found) == {"missed": 2} and found.ap50[""] == 0.0
    with pytest.raises(ValueError, match="iou_type is 'boundary'"):
        analyse_errors(gt, [], iou_type="boundary")
