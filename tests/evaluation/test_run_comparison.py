"""The paired bootstrap: against evaluation of really repeated images, and its verdicts on known cases."""

import copy

import numpy as np
import pytest
from test_metrics_oracle import random_problem

from lt_det.evaluation import GroundTruth, evaluate_results
from lt_det.evaluation.compare import bootstrap_ap, compare_runs, load_matches


@pytest.mark.parametrize("seed", range(6))
def test_weights_of_one_give_the_plain_ap(seed):
    content, results = random_problem(seed, 4, 4, 20, False, True, True, True, False)
    gt = GroundTruth.from_dict(content)
    evaluation = evaluate_results(gt, results, max_dets=7)
    ap = bootstrap_ap(gt, evaluation.matches["bbox"], np.ones((2, gt.num_images), int))
    expected = evaluation.curves["bbox"]["main"].precision[..., 0].mean(axis=1).T
    expected = np.where(expected < 0, np.nan, expected)
    np.testing.assert_allclose(ap[0], expected, atol=1e-6)
    np.testing.assert_array_equal(ap[0], ap[1])


@pytest.mark.parametrize("seed", range(6))
def test_weights_equal_copies_of_images(seed):
    """Scores differ here, so that a weighted detection and its copies are ranked alike; one annotation a
    category and
    image keeps copies from crossing a recall threshold between them."""
    rng = np.random.default_rng(seed)
    content, results = random_problem(seed, 4, 3, 12, False, True, True, True, False)
    for r in results:
        r["score"] = float(rng.random())
    weights = np.array([[2, 0, 1, 3]])
    gt = GroundTruth.from_dict(content)
    ours = bootstrap_ap(gt, evaluate_results(gt, results).matches["bbox"], weights)[0]
    images, annotations, copies = [], [], []
    for image, weight in zip(sorted(content["images"], key=lambda i: i["id"]), weights[0]):
        for k in range(weight):
            new_id = image["id"] + 10000 * k
            images.append(dict(image, id=new_id))
            annotations += [dict(a, image_id=new_id) for a in content["annotations"] if a["image_id"] == image["id"]]
            copies += [dict(r, image_id=new_id) for r in results if r["image_id"] == image["id"]]
    annotations = [dict(a, id=i + 1) for i, a in enumerate(annotations)]
    repeated = copy.deepcopy(dict(content, images=images, annotations=annotations))
    evaluation = evaluate_results(GroundTruth.from_dict(repeated), copies)
    expected = evaluation.curves["bbox"]["main"].precision[..., 0].mean(axis=1).T
    expected = np.where(expected < 0, np.nan, expected)
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(expected))
    # Between the copies of a true positive the recall passes thresholds at a slightly lower precision.
    np.testing.assert_allclose(ours, expected, atol=0.12)
    assert np.nanmean(np.abs(ours - expected)) < 0.02


def many_images(num_images=60):
    """One box an image, of a frequent and a rare category in turn."""
    images = [
        {"id": i + 1, "height": 50, "width": 50, "neg_category_ids": [], "not_exhaustive_category_ids": []}
        for i in range(num_images)
    ]
    annotations = [
        {
            "id": i + 1,
            "image_id": i + 1,
            "category_id": 1 + i % 2,
            "bbox": [5.0, 5.0, 20.0, 20.0],
            "area": 400.0,
        }
        for i in range(num_images)
    ]
    categories = [{"id": 1, "name": "a", "frequency": "f"}, {"id": 2, "name": "b", "frequency": "r"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def detections(content, rng, quality):
    """One detection an image, shifted by up to ``1 - quality`` of its size."""
    out = []
    for a in content["annotations"]:
        x, y, w, h = a["bbox"]
        shift = rng.random() * (1 - quality) * w
        out.append(
            dict(
                image_id=a["image_id"],
                category_id=a["category_id"],
                bbox=[x + shift, y, w, h],
                score=float(rng.random()),
            )
        )
    return out


def test_a_real_difference_is_told_from_noise(tmp_path):
    content = many_images()
    gt = GroundTruth.from_dict(content, with_masks=False)
    rng = np.random.default_rng(0)
    good, same, bad = (evaluate_results(gt, detections(content, rng, q)) for q in (0.6, 0.6, 0.3))
    clear = compare_runs(gt, bad.matches["bbox"], good.matches["bbox"], replicates=300)
    assert clear.groups["AP"]["low"] > 0 and clear.groups["AP"]["p"] < 0.05
    assert clear.groups["AP"]["a"] == pytest.approx(bad.metrics["bbox"]["AP"])
    assert clear.groups["APr"]["b"] == pytest.approx(good.metrics["bbox"]["APr"])
    assert clear.groups["AP50"]["difference"] == pytest.approx(
        good.metrics["bbox"]["AP50"] - bad.metrics["bbox"]["AP50"]
    )
    assert np.isnan(clear.groups["APc"]["p"]) and clear.groups["APr"]["images"] == 30
    noise = compare_runs(gt, good.matches["bbox"], same.matches["bbox"], replicates=300)
    assert noise.groups["AP"]["low"] < 0 < noise.groups["AP"]["high"]
    itself = compare_runs(gt, good.matches["bbox"], good.matches["bbox"], replicates=20)
    assert itself.groups["AP"]["error"] == 0 and itself.groups["AP"]["p"] == 1
    again = compare_runs(gt, bad.matches["bbox"], good.matches["bbox"], replicates=300)
    assert again.groups == clear.groups or np.isnan(again.groups["APc"]["p"])
    assert [c["name"] for c in clear.categories] and clear.categories[0]["difference"] <= clear.categories[-1][
        "difference"
    ]

    good.save(str(tmp_path), plots=False)
    loaded = load_matches(tmp_path / "matches_bbox.npz", gt)
    for name in ("scores", "flags", "image", "category", "count"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(good.matches["bbox"], name))
    other = GroundTruth.from_dict(many_images(10), with_masks=False)
    with pytest.raises(ValueError, match="annotations have not"):
        load_matches(tmp_path / "matches_bbox.npz", other)


def test_paired_interval_is_narrower_than_the_spread_of_one_run():
    content = many_images()
    gt = GroundTruth.from_dict(content, with_masks=False)
    base = detections(content, np.random.default_rng(1), 0.3)
    better = [dict(r, bbox=[r["bbox"][0] - 0.3] + r["bbox"][1:]) for r in base]
    a, b = (evaluate_results(gt, r).matches["bbox"] for r in (base, better))
    weights = np.random.default_rng(0).multinomial(60, np.full(60, 1 / 60), size=300)
    alone = 100 * np.nanmean(bootstrap_ap(gt, a, weights).mean(axis=2), axis=1).std()
    assert compare_runs(gt, a, b, replicates=300).groups["AP"]["error"] < 0.7 * alone


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"no zip at all"])
def test_damaged_matches_are_named(tmp_path, content):
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 4, 4], "area": 16}
    annotation["segmentation"] = [[0, 0, 4, 0, 4, 4, 0, 4]]
    image, category = {"id": 1, "width": 8, "height": 8}, {"id": 1, "name": "a"}
    gt = GroundTruth.from_dict({"images": [image], "annotations": [annotation], "categories": [category]})
    path = tmp_path / "matches_bbox.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="matches_bbox.npz is damaged or cut off"):
        load_matches(path, gt)
