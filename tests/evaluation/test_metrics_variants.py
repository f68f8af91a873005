"""AP-fixed, AP-pool and boundary AP, against the official API driven as the 2021 challenge and Dave et al.
do."""

import copy
import os
from collections import defaultdict

import numpy as np
import pycocotools.mask as mask_utils
import pytest
from evaluation_oracles import assert_same_numbers, numpy_float, official_lvis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_metrics_oracle import problems, random_mask, random_problem

from lt_det.evaluation import GroundTruth, evaluate_results
from lt_det.evaluation.matching import boundary_distance

EXAMPLES = int(os.environ.get("LT_DET_ORACLE_EXAMPLES", "60"))
oracle_settings = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))


def best_of_each_category(results, limit):
    by_category = defaultdict(list)
    for r in results:
        by_category[r["category_id"]].append(r)
    return [r for rs in by_category.values() for r in sorted(rs, key=lambda r: -r["score"])[:limit]]


@oracle_settings
@given(problems(masks=False, boxes=True, federated=True), st.sampled_from([1, 3, 10, 10000]))
def test_ap_fixed(problem, limit):
    content, results = problem
    if not results:
        return
    reference = official_lvis(content, best_of_each_category(results, limit), "bbox", max_dets=-1)
    ours = evaluate_results(
        GroundTruth.from_dict(content), results, ap_fixed=True, detections_per_category=limit, max_dets=2
    ).metrics["bbox"]
    for key, value in reference.results.items():
        expected = np.nan if value == -1 else 100 * value
        np.testing.assert_allclose(ours[key.replace("@-1", "") + "-fixed"], expected, rtol=0, atol=1e-7, err_msg=key)


def test_ap_fixed_without_room_is_named(caplog):
    content, results = random_problem(4, 6, 3, 20, False, True, True, False, False)
    gt = GroundTruth.from_dict(content)
    narrow = evaluate_results(gt, results, ap_fixed=True, max_dets=2).metrics["bbox"]
    assert narrow["AP-fixed"] != narrow["AP"] and "AP-fixed" not in caplog.text
    wide = evaluate_results(gt, results, ap_fixed=True).metrics["bbox"]
    assert wide["AP-fixed"] == wide["AP"] and "no detection that could count lies beyond the 300" in caplog.text


def pooled_ap(evaluation, members):
    """AP over one ranked list of all categories of ``members``, from the official per-image results."""
    params = evaluation.params
    num_images, num_areas = len(params.img_ids), len(params.area_rng)
    parts = [
        evaluation.eval_imgs[c * num_areas * num_images + i] for i in range(num_images) for c in members
    ]  # area range 0 is "all"
    parts = [p for p in parts if p is not None]
    if not parts:
        return np.nan
    num_gt = sum(int((p["gt_ignore"] == 0).sum()) for p in parts)
    if num_gt == 0:
        return np.nan
    order = np.argsort(-np.concatenate([p["dt_scores"] for p in parts]), kind="mergesort")
    matched = np.concatenate([p["dt_matches"] for p in parts], axis=1)[:, order] != 0
    ignored = np.concatenate([p["dt_ignore"] for p in parts], axis=1)[:, order].astype(bool)
    values = []
    for m, i in zip(matched, ignored):
        tp, fp = np.cumsum(m & ~i), np.cumsum(~m & ~i)
        recall, precision = tp / num_gt, tp / np.maximum(tp + fp, 1)
        for r in params.rec_thrs:
            values.append(precision[recall >= r].max(initial=0))
    return float(np.mean(values))


@oracle_settings
@given(problems(masks=False, boxes=True, federated=True), st.sampled_from([2, 10000]))
def test_ap_pool(problem, limit):
    content, results = problem
    if not results:
        return
    reference = official_lvis(content, best_of_each_category(results, limit), "bbox", max_dets=-1)
    ours = evaluate_results(
        GroundTruth.from_dict(content), results, ap_fixed=True, detections_per_category=limit
    ).metrics["bbox"]
    for i, name in enumerate(("", "r", "c", "f")):
        members = range(len(reference.params.cat_ids)) if not name else reference.freq_groups[i - 1]
        np.testing.assert_allclose(ours[f"AP{name}-pool"] / 100, pooled_ap(reference, members), rtol=0, atol=1e-9)


def boundary_by_opencv(mask, ratio):
    """The region as the paper's code defines it: erosions by a 3 x 3 square, the mask framed by zeros."""
    cv2 = pytest.importorskip("cv2")
    h, w = mask.shape
    steps = max(1, int(round(ratio * np.sqrt(h**2 + w**2))))
    framed = np.pad(mask, 1)
    return mask - cv2.erode(framed, np.ones((3, 3), np.uint8), iterations=steps)[1:-1, 1:-1]


@settings(oracle_settings, max_examples=max(EXAMPLES, 200))
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.02, 0.1, 0.3]))
def test_boundary_region(seed, ratio):
    from lt_det.evaluation import _rle_kernels as kernels
    from lt_det.evaluation.rle import encode_segmentations

    rng = np.random.default_rng(seed)
    h, w = int(rng.integers(1, 40)), int(rng.integers(1, 40))
    masks = [random_mask(rng, h, w) for _ in range(3)]
    if rng.random() < 0.5:
        masks = [np.maximum(a, b) for a, b in zip(masks, masks[::-1])]
    size = np.array([[h, w]] * 3)
    table, _ = encode_segmentations([mask_utils.encode(np.asfortranarray(m)) for m in masks], size)
    counts, start = table.counts()
    box = kernels.bounding_boxes(counts, start, size[:, 0].copy())
    distance = boundary_distance(size, ratio)
    counts, start = kernels.boundaries(counts, start, box, size[:, 0].copy(), size[:, 1].copy(), distance)
    for i, mask in enumerate(masks):
        runs = counts[start[i] : start[i + 1]]
        pixels = np.repeat(np.arange(len(runs)) % 2, runs).reshape(w, h).T
        np.testing.assert_array_equal(pixels, boundary_by_opencv(mask, ratio))


def boundary_evaluation(content, results, ratio, max_dets):
    """The official API with IoU = min(mask IoU, boundary IoU), as its 2021 challenge branch has it."""
    with numpy_float():
        import logging

        from lvis import LVIS, LVISEval, LVISResults

        class BoundaryEval(LVISEval):
            def compute_iou(self, image_id, category_id):
                ious = super().compute_iou(image_id, category_id)
                if len(ious) == 0:
                    return ious
                gt, dt = self._get_gt_dt(image_id, category_id)
                order = np.argsort([-d["score"] for d in dt], kind="mergesort")

                def edges(annotations):
                    masks = [boundary_by_opencv(mask_utils.decode(a["segmentation"]), ratio) for a in annotations]
                    return [mask_utils.encode(np.asfortranarray(m)) for m in masks]

                return np.minimum(ious, mask_utils.iou(edges([dt[i] for i in order]), edges(gt), [0] * len(gt)))

        api = LVIS.__new__(LVIS)
        api.logger = logging.getLogger("lvis")
        api.dataset = copy.deepcopy(content)
        api._create_index()
        evaluation = BoundaryEval(api, LVISResults(api, copy.deepcopy(results), max_dets=max_dets), "segm")
        evaluation.run()
    return evaluation


@oracle_settings
@given(problems(masks=True, boxes=False, federated=True), st.sampled_from([0.02, 0.15]))
def test_boundary_ap(problem, ratio):
    content, results = problem
    if not results:
        return
    reference = boundary_evaluation(content, results, ratio, 300)
    ours = evaluate_results(
        GroundTruth.from_dict(content), results, iou_types=("boundary",), boundary_dilation_ratio=ratio
    )
    assert_same_numbers(ours.metrics["boundary"], reference.results)
    np.testing.assert_allclose(
        ours.curves["boundary"]["main"].precision, reference.eval["precision"], rtol=0, atol=1e-9
    )


def test_boundary_width_rounds_half_to_even():
    # diagonals 125 and 75: 2 % of them are 2.5 and 1.5 pixels; never less than 1
    np.testing.assert_array_equal(boundary_distance(np.array([[75, 100], [45, 60], [3, 4], [480, 640]])), [2, 2, 1, 16])


def test_metrics_do_not_depend_on_the_order_of_images_and_categories_in_the_json():
    content, results = random_problem(11, 4, 4, 20, False, True, True, True, False)
    first = evaluate_results(GroundTruth.from_dict(content), results).metrics
    # Annotations keep their order: inside an image and category it decides between equal IoUs.
    for key in ("images", "categories"):
        content[key] = content[key][::-1]
    second = evaluate_results(GroundTruth.from_dict(content), results).metrics
    np.testing.assert_equal(dict(second["bbox"]), dict(first["bbox"]))  # NaN equals NaN here
