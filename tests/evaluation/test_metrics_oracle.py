"""The metrics against the official LVIS API and pycocotools, on random problems.

Problems are small and nasty on purpose: equal scores, equal IoUs, zero areas, areas on the limits of the
ranges, empty
images, categories without annotations, every federated field. LT_DET_ORACLE_EXAMPLES sets their number.
"""

import os

import numpy as np
import pycocotools.mask as mask_utils
import pytest
from evaluation_oracles import assert_same_numbers, official_coco, official_lvis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lt_det.evaluation import GroundTruth, evaluate_results
from lt_det.evaluation.ground_truth import FREQUENCY_GROUPS

EXAMPLES = int(os.environ.get("LT_DET_ORACLE_EXAMPLES", "120"))
oracle_settings = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))

AREAS = np.array([0.5, 1, 30, 1023.9, 1024, 1024.1, 5000, 9216, 9217, 1e6, 1e10, 2e10, 0])


def random_mask(rng, h, w):
    """A binary mask: empty, full, a box, or noise."""
    kind = rng.integers(6)
    mask = np.zeros((h, w), np.uint8)
    if kind == 0:
        return mask
    if kind == 1:
        return mask + 1
    if kind == 2:
        return (rng.random((h, w)) < rng.random()).astype(np.uint8)
    y, x = int(rng.integers(h)), int(rng.integers(w))
    mask[y : y + int(rng.integers(1, h + 1)), x : x + int(rng.integers(1, w + 1))] = 1
    return mask


def encode(mask, as_list=False):
    rle = mask_utils.encode(np.asfortranarray(mask))
    if as_list:
        runs = np.diff(np.flatnonzero(np.concatenate([[True], np.diff(mask.T.ravel().astype(int)) != 0, [True]])))
        counts = runs.tolist() if mask.T.ravel()[0] == 0 else [0] + runs.tolist()
        return {"size": list(mask.shape), "counts": counts}
    return {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")}


def random_problem(seed, num_images, num_categories, dets, masks, boxes, federated, grid, gt_from_zero):
    """Ground truth dict and list of results."""
    rng = np.random.default_rng(seed)
    category_ids = np.sort(rng.choice(np.arange(1, 50), num_categories, replace=False))
    images, annotations, results = [], [], []
    next_id = 0 if gt_from_zero else 1
    levels = rng.random(int(rng.integers(1, 8)))
    for image_id in rng.choice(1000, num_images, replace=False).tolist():
        h, w = int(rng.integers(1, 14)), int(rng.integers(1, 14))

        def box(scale=rng.choice([1, 20, 100])):
            values = rng.integers(0, 6, 4) * scale if grid else rng.random(4) * 6 * scale
            values[:2] = values[:2] // 2
            return values.astype(float).tolist()

        def mask_box(mask):
            return mask_utils.toBbox(mask_utils.encode(np.asfortranarray(mask))).tolist()

        for c in category_ids:
            count = int(rng.choice([0, 0, 1, 2, 5]))
            for _ in range(count):
                mask = random_mask(rng, h, w)
                as_polygon = rng.random() < 0.3
                y, x = rng.random(2) * [h, w]
                polygon = [[x, y, x + 3, y, x + 3, y + 4.5, x, y + 4]]
                annotations.append(
                    {
                        "id": next_id,
                        "image_id": image_id,
                        "category_id": int(c),
                        "bbox": box(),
                        "area": float(rng.choice(AREAS)) if rng.random() < 0.7 else float(mask.sum()),
                        "segmentation": polygon if as_polygon else encode(mask, as_list=rng.random() < 0.5),
                        "iscrowd": int(not federated and rng.random() < 0.25),
                    }
                )
                if federated and rng.random() < 0.1:
                    annotations[-1]["ignore"] = 1
                next_id += 1
        image = {"id": image_id, "height": h, "width": w}
        if federated:
            image["neg_category_ids"] = [int(c) for c in category_ids if rng.random() < 0.5]
            image["not_exhaustive_category_ids"] = [int(c) for c in category_ids if rng.random() < 0.3]
        images.append(image)
        here = [a for a in annotations if a["image_id"] == image_id]
        for _ in range(int(rng.integers(0, dets + 1))):
            result = {"image_id": image_id, "category_id": int(rng.choice(category_ids))}
            copied = here[int(rng.integers(len(here)))] if here and rng.random() < 0.5 else None
            if copied is not None and rng.random() < 0.8:
                result["category_id"] = copied["category_id"]
            if boxes:
                result["bbox"] = box()
                if copied is not None:
                    result["bbox"] = list(copied["bbox"])
                    if rng.random() < 0.5:
                        result["bbox"][int(rng.integers(4))] += 1
                if rng.random() < 0.05:
                    result["bbox"][2] = 0.0
            if masks:
                if copied is not None and isinstance(copied["segmentation"], dict) and rng.random() < 0.5:
                    rle = (
                        mask_utils.frPyObjects(copied["segmentation"], h, w)
                        if isinstance(copied["segmentation"]["counts"], list)
                        else copied["segmentation"]
                    )
                    mask = mask_utils.decode(rle)
                    mask[int(rng.integers(h)), int(rng.integers(w))] ^= 1
                else:
                    mask = random_mask(rng, h, w)
                result["segmentation"] = encode(mask)
            result["score"] = float(rng.choice(levels))
            results.append(result)
    rng.shuffle(results)
    categories = [
        {"id": int(c), "name": f"c{c}", "frequency": str(rng.choice(FREQUENCY_GROUPS)), "image_count": 5}
        for c in category_ids
    ]
    rng.shuffle(categories)
    return {"images": images, "annotations": annotations, "categories": categories}, results


def problems(masks, boxes, federated):
    return st.builds(
        random_problem,
        seed=st.integers(0, 2**32 - 1),
        num_images=st.integers(1, 4),
        num_categories=st.integers(1, 4),
        dets=st.sampled_from([2, 6, 20]),
        masks=st.just(masks),
        boxes=st.just(boxes),
        federated=st.just(federated),
        grid=st.booleans(),
        gt_from_zero=st.booleans(),
    )


def check_lvis(problem, iou_type, max_dets):
    content, results = problem
    if not results:
        return
    reference = official_lvis(content, results, iou_type, max_dets)
    ours = evaluate_results(GroundTruth.from_dict(content), results, iou_types=(iou_type,), max_dets=max_dets)
    assert_same_numbers(ours.metrics[iou_type], reference.results, iou_type)
    np.testing.assert_allclose(ours.curves[iou_type]["main"].precision, reference.eval["precision"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(ours.curves[iou_type]["main"].recall, reference.eval["recall"], rtol=0, atol=1e-9)


@oracle_settings
@given(problems(masks=False, boxes=True, federated=True), st.sampled_from([1, 4, 300]))
def test_lvis_boxes(problem, max_dets):
    check_lvis(problem, "bbox", max_dets)


@oracle_settings
@given(problems(masks=True, boxes=False, federated=True), st.sampled_from([1, 4, 300]))
def test_lvis_masks(problem, max_dets):
    check_lvis(problem, "segm", max_dets)


@oracle_settings
@given(
    problems(masks=True, boxes=True, federated=True),
    st.sampled_from([1, 4, 300]),
    st.sampled_from(["bbox", "segm"]),
)
def test_lvis_boxes_and_masks_together(problem, max_dets, iou_type):
    check_lvis(problem, iou_type, max_dets)


@settings(oracle_settings, max_examples=max(EXAMPLES // 4, 10))
@given(problems(masks=True, boxes=False, federated=True))
def test_lvis_boxes_of_masks_and_masks_of_boxes(problem):
    check_lvis(problem, "bbox", 300)
    content, results = problem
    for r in results:
        del r["segmentation"]
        r["bbox"] = [0.3, 0.8, 3.0, 2.5]
    check_lvis((content, results), "segm", 300)


def check_coco(problem, iou_type, max_dets=100):
    content, results = problem
    if not results:
        return
    reference = official_coco(content, results, iou_type, (1, 10, max_dets))
    ours = evaluate_results(GroundTruth.from_dict(content), results, iou_types=(iou_type,), max_dets=max_dets)
    names = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR@1", "AR@10", f"AR@{max_dets}"]
    names += [f"AR{a}@{max_dets}" for a in "sml"]
    if max_dets == 100:  # pycocotools' summary wants 100
        assert_same_numbers(ours.metrics[iou_type], dict(zip(names, reference.stats)), iou_type)
    np.testing.assert_allclose(
        ours.curves[iou_type]["main"].precision, reference.eval["precision"][..., -1], rtol=0, atol=1e-9
    )
    np.testing.assert_allclose(
        ours.curves[iou_type]["main"].recall, reference.eval["recall"][..., -1], rtol=0, atol=1e-9
    )


@oracle_settings
@given(problems(masks=False, boxes=True, federated=False))
def test_coco_boxes(problem):
    check_coco(problem, "bbox")


@oracle_settings
@given(problems(masks=True, boxes=False, federated=False))
def test_coco_masks(problem):
    check_coco(problem, "segm")


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_more_than_300_detections_in_an_image(iou_type):
    problem = random_problem(3, 3, 4, 900, iou_type == "segm", iou_type == "bbox", True, True, False)
    per_image = np.bincount([r["image_id"] for r in problem[1]])
    assert per_image.max() > 300
    check_lvis(problem, iou_type, 300)


@pytest.mark.parametrize("with_masks", [False, True])
def test_real_annotations(shared_dir, with_masks):
    """100 images of LVIS v0.5 val with perturbed copies of their annotations as detections."""
    import json

    path = shared_dir / "data" / "lvis_val_100.json"
    content = json.loads(path.read_text())
    sizes = {i["id"]: (i["height"], i["width"]) for i in content["images"]}
    rng = np.random.default_rng(0)
    results = []
    for a in content["annotations"]:
        for _ in range(3):
            box = np.array(a["bbox"]) + rng.normal(0, 6, 4)
            box[2:] = np.maximum(box[2:], 0.5)
            category = a["category_id"] if rng.random() < 0.8 else int(rng.integers(1, 1231))
            r = {
                "image_id": a["image_id"],
                "category_id": category,
                "score": float(np.round(rng.random(), 2)),
            }
            if with_masks:
                shift = rng.normal(0, 4)
                polygons = [(np.array(p) + shift).tolist() for p in a["segmentation"]]
                rle = mask_utils.merge(mask_utils.frPyObjects(polygons, *sizes[a["image_id"]]))
                r["segmentation"] = {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}
            else:
                r["bbox"] = box.tolist()
            results.append(r)
    iou_type = "segm" if with_masks else "bbox"
    reference = official_lvis(content, results, iou_type)
    gt = GroundTruth.from_json(path)
    ours = evaluate_results(gt, results)
    assert set(ours.metrics) == {iou_type}
    assert_same_numbers(ours.metrics[iou_type], reference.results)
    per_category = reference.eval["precision"][:, :, :, 0]
    expected = np.where(per_category[0, 0] < 0, np.nan, per_category.mean(axis=(0, 1)))
    np.testing.assert_allclose(ours.curves[iou_type]["main"].per_category_ap(), expected, atol=1e-9)
