"""Calibration against a float64 computation by loops, thresholds against trying every cut."""

import math

import numpy as np
import pytest
from test_errors import box, detections, lvis, random_problem

from lt_det.evaluation import GroundTruth, evaluate_results
from lt_det.evaluation.calibration import best_thresholds, calibrate, read_thresholds, write_thresholds


def by_hand(rows, bins):
    """Rows of (score, right); the D-ECE and its parts by their definition, one detection at a time."""
    sums = [[0, 0.0, 0] for _ in range(bins)]
    for score, right in rows:
        part = sums[min(int(score * bins), bins - 1)]
        part[0] += 1
        part[1] += score
        part[2] += right
    total = sum(n for n, _, _ in sums)
    error = sum(n / total * abs(found / n - score / n) for n, score, found in sums if n)
    return [n for n, _, _ in sums], error


def judged(gt, results):
    """(category, score, right) by loops: greedy matching at IoU 0.5, detections that say nothing left out."""
    out = []
    for cell in range(len(gt.cell_category)):
        image = int(np.searchsorted(gt.cell_start, cell, side="right")) - 1
        k = int(gt.cell_category[cell])
        mine = [r for r in results if r["image_id"] == gt.image_ids[image] and r["category_id"] == gt.category_ids[k]]
        objects = [gt.boxes[gt.cell_gt[cell] + j] for j in range(gt.cell_num_gt[cell])]
        free = [True] * len(objects)
        for r in sorted(mine, key=lambda r: -r["score"]):
            best, at = 0.5, None
            for j, b in enumerate(objects):
                x, y, w, h = r["bbox"]
                inter = max(0, min(x + w, b[0] + b[2]) - max(x, b[0])) * max(0, min(y + h, b[1] + b[3]) - max(y, b[1]))
                iou = inter / (w * h + b[2] * b[3] - inter)
                if free[j] and iou >= best:
                    best, at = iou, j
            if at is not None:
                free[at] = False
                out.append((k, r["score"], 1))
            elif not gt.cell_lenient[cell]:
                out.append((k, r["score"], 0))
    return out


@pytest.fixture(scope="module")
def problem():
    gt, results = random_problem(np.random.default_rng(11), True)
    matches = evaluate_results(gt, results, iou_types=["bbox"]).matches["bbox"]
    return gt, matches, judged(gt, results)


@pytest.mark.parametrize("bins", [7, 20])
def test_calibration_by_hand(problem, bins):
    gt, matches, rows = problem
    found = calibrate(gt, matches, bins=bins)
    assert set(found) == {"", "r", "c", "f"}
    for name, one in found.items():
        mine = [(s, right) for k, s, right in rows if not name or "rcf"[gt.group[k]] == name]
        count, error = by_hand(mine, bins)
        assert one.count.tolist() == count
        assert one.error == pytest.approx(error, abs=1e-12)
    some = calibrate(gt, matches, bins=bins, min_score=0.5)[""]
    assert some.count.sum() == sum(s >= 0.5 for _, s, _ in rows)


def test_a_calibrated_and_an_overconfident_model():
    gt = GroundTruth.from_dict(lvis([([1], [])] * 4, [(i, 3, box(0)) for i in range(1, 5)]))
    rows = [(1, 3, box(0), 0.75), (2, 3, box(0), 0.75), (3, 3, box(0), 0.75), (4, 3, box(100), 0.75)]
    rows += [(i, 1, box(50), 0.9) for i in (1, 2)]
    matches = evaluate_results(gt, detections(*rows), iou_types=["bbox"]).matches["bbox"]
    found = calibrate(gt, matches)
    assert found["f"].error == pytest.approx(0, abs=1e-15)  # three of four are right, and it says 0.75
    assert found["r"].error == pytest.approx(0.9) and found["r"].largest == pytest.approx(0.9)
    assert found[""].error == pytest.approx(2 / 6 * 0.9)
    assert math.isnan(found["c"].error)
    with pytest.raises(ValueError, match="matches are kept for"):
        calibrate(gt, matches, iou_threshold=0.52)


def test_thresholds_are_the_best_of_all_cuts(problem):
    gt, matches, rows = problem
    number = np.bincount(gt.annotation_category[~gt.ignore], minlength=gt.num_categories)
    for k, row in enumerate(best_thresholds(gt, matches)):
        mine = [(s, right) for c, s, right in rows if c == k]
        best = (-1.0, 0.0)
        for cut in {s for s, _ in mine}:
            kept = [right for s, right in mine if s >= cut]
            best = max(best, (2 * sum(kept) / (len(kept) + number[k]), cut))
        assert (row["f1"], row["threshold"]) == (pytest.approx(best[0], abs=1e-12), best[1])
        assert row["f1"] == pytest.approx(2 / (1 / row["precision"] + 1 / row["recall"]), abs=1e-12)
        assert row["source"] == "category" and row["annotations"] == number[k]


def test_a_category_without_a_right_detection_takes_its_groups_threshold(tmp_path):
    gt = GroundTruth.from_dict(lvis([([4], [])], [(1, 3, box(0)), (1, 1, box(50))]))
    results = detections((1, 3, box(0), 0.6), (1, 4, box(0), 0.3), (1, 1, box(150), 0.9))
    matches = evaluate_results(gt, results, iou_types=["bbox"]).matches["bbox"]
    rows = best_thresholds(gt, matches)
    assert [(r["threshold"], r["source"]) for r in rows] == [
        (1.0, "group"),
        (1.0, "group"),
        (0.6, "category"),
        (0.6, "group"),
    ]
    path = tmp_path / "thresholds.csv"
    write_thresholds(path, rows)
    assert read_thresholds(path) == {"c1": 1.0, "c2": 1.0, "c3": 0.6, "c4": 0.6}


@pytest.mark.parametrize("text, message", [
    ("a,b\n1,2\n", "columns 'name' and 'threshold'"), ("name,threshold\ncat,1.5\n", "line 2: threshold '1.5' of 'cat'"),
    ("name,threshold\ncat,\n", "line 2"), ("", "columns"),
])  # fmt: skip
def test_a_wrong_csv_is_named(tmp_path, text, message):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_thresholds(path)
    assert str(path) in str(error.value)
    with pytest.raises(FileNotFoundError, match="no thresholds file"):
        read_thresholds(tmp_path / "none.csv")
