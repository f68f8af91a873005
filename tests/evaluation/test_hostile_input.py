"""Wrong annotations and results: named by file, id and remedy, before pycocotools gets them."""

import copy
import json

import hostile_child
import numpy as np
import pycocotools.mask as mask_utils
import pytest
from hostile_child import ANNOTATIONS, RESULTS, changed

from lt_det.data import DatasetRecords, load_lvis_or_coco_json
from lt_det.evaluation import GroundTruth, InvalidResultsError, evaluate_results
from lt_det.evaluation.rle import RleTable
from lt_det.io.segmentations import polygon_problems, rle_totals


def test_any_value_in_any_field_is_evaluated_or_named(server, tmp_path):
    """In a process of its own, under a memory limit: a crash or a run for memory fails as an unnamed error does."""
    process = server.Process(target=hostile_child.main, args=(str(tmp_path), 120))
    process.start()
    process.join(500)
    inputs = {path.name: path.read_text()[:3000] for path in tmp_path.glob("*.json")}
    said = (tmp_path / "log.txt").read_text()
    assert process.exitcode == 0, f"ended with {process.exitcode} at {inputs}:\n{said[-4000:]}"
    counts = json.loads(said.strip().splitlines()[-1])
    # Neither all nor nothing is refused.
    assert 10 < counts["evaluated"] < counts["all"] - 10 and counts["trained"] > 5


POLYGON = ("annotations", 0, "segmentation")
HUGE = [[5.0, 5.0, 1e9, 6.0, 20.0, 30.5]]
ZIGZAG = [[5.0, 5.0] + [490.0, 5.0, -490.0, 6.0] * 3000]
WRONG = {  # in both: what has to be in the message beside the file and the annotation's id
    "nan": (POLYGON, [[5.0, float("nan"), 30.0, 6.0, 20.0, 30.5]], "not finite"),
    "infinite": (POLYGON, [[5.0, float("inf"), 30.0, 6.0, 20.0, 30.5]], "not finite"),
    "huge": (POLYGON, HUGE, "reaches beyond 10 times the size of its image"),
    "long": (POLYGON, ZIGZAG, "an outline longer than"),
    "text": (POLYGON, [[5.0, "x", 30.0, 6.0, 20.0, 30.5]], "not a number"),
    "other size": (("annotations", 1, "segmentation", "size"), [50, 40], "not that of its image"),
    "short counts": (("annotations", 1, "segmentation", "counts"), [1000, 100], ""),
    "short text": (("annotations", 1, "segmentation", "counts"), "P1000", "do not cover its image"),
    "unknown image": (("annotations", 0, "image_id"), 77, r"77"),
    "unknown category": (("annotations", 0, "category_id"), 77, r"77"),
    "box of nan": (("annotations", 0, "bbox"), [5.0, 5.0, float("nan"), 4.0], "not finite"),
    "negative box": (("annotations", 0, "bbox"), [5.0, 5.0, -3.0, 4.0], "negative width or height"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_annotations_are_refused_alike_by_evaluation_and_training(tmp_path, kind):
    at, value, what = WRONG[kind]
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(changed(ANNOTATIONS, at, value)))
    number = ANNOTATIONS["annotations"][at[1]]["id"]
    for read in (
        GroundTruth.from_json,
        lambda p: GroundTruth.from_dict(json.loads(p.read_text()), source=str(p)),
        lambda p: load_lvis_or_coco_json(p, tmp_path, check_images=False),
    ):
        with pytest.raises(ValueError, match=f"(?s)annotations.json.*({what})") as error:
            read(path)
        assert f"{number}" in str(error.value).replace("annotations.json", "")
        assert "orrect" in str(error.value) or "emove" in str(error.value)


@pytest.mark.parametrize("polygon", [[[5.0, 5.0, 30.0, 6.0]], [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]], [[], [1.0, 2.0]]])
def test_what_training_skips_evaluation_skips_and_counts(tmp_path, polygon, caplog):
    """Polygons of two points, or of an odd number of numbers."""
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(changed(ANNOTATIONS, POLYGON, polygon)))
    for with_masks in (True, False):
        caplog.clear()
        gt = GroundTruth.from_json(path, with_masks=with_masks)
        assert gt.num_annotations == 1 and "skipped 1 objects without a polygon of three points" in caplog.text
        assert gt.image_ids[gt.annotation_image].tolist() == [2]
    records = load_lvis_or_coco_json(path, tmp_path, check_images=False)
    assert [len(r["annotations"]) for r in records] == [0, 1]
    mixed = [*polygon, [5.0, 5.0, 30.0, 6.0, 20.0, 30.5]]  # the others of an object stay out
    path.write_text(json.dumps(changed(ANNOTATIONS, POLYGON, mixed)))
    whole = mask_utils.frPyObjects([mixed[-1]], 40, 50)[0]["counts"]
    assert GroundTruth.from_json(path).masks.strings()[0] == whole


@pytest.mark.parametrize(
    "segmentation, kind",
    [
        ([[5.0, float("nan"), 30.0, 6.0, 20.0, 30.5]], "a polygon with a number that is not finite"),
        (HUGE, "a polygon that reaches beyond 10 times the size of its image"),
        ([[5.0, 5.0, 30.0, 6.0]], "no polygon of three points or more"),
        ({"size": [50, 40], "counts": [2000]}, "an RLE mask whose size is not that of its image"),
        ({"size": [40, 50], "counts": [2001]}, "an RLE mask whose counts do not cover its image"),
        ({"size": [40, 50], "counts": [-1, 2001]}, "an RLE mask whose counts are neither a text nor whole numbers"),
        ({"size": [40, 50], "counts": "é"}, "an RLE mask whose counts have characters that are not ASCII"),
        ({"size": [40, 50], "counts": "P1000"}, "run lengths do not cover the image"),
        (7, "a segmentation that is neither polygons"),
    ],
)
def test_wrong_masks_of_results_are_named_counted_and_skipped(tmp_path, segmentation, kind):
    gt = GroundTruth.from_dict(ANNOTATIONS)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(changed(RESULTS, (2, "segmentation"), segmentation)))
    with pytest.raises(
        InvalidResultsError, match=f"(?s)results.json cannot be evaluated.*1 x {kind}.*result 2"
    ) as error:
        evaluate_results(gt, path)
    assert list(error.value.problems.values()) == [1]
    ours = evaluate_results(gt, path, skip_invalid=True).metrics["segm"]
    np.testing.assert_equal(dict(ours), dict(evaluate_results(gt, RESULTS[:2]).metrics["segm"]))


def test_a_box_that_serves_as_mask_is_checked_too():
    result = {"image_id": 1, "category_id": 1, "score": 0.5, "bbox": [0.0, 0.0, 1e12, 5.0]}
    with pytest.raises(InvalidResultsError, match="reaches beyond 10 times"):
        evaluate_results(GroundTruth.from_dict(ANNOTATIONS), [result], iou_types=("segm",))


def test_no_results_get_a_remark(tmp_path, caplog):
    (tmp_path / "results.json").write_text("[]")
    assert evaluate_results(GroundTruth.from_dict(ANNOTATIONS), tmp_path / "results.json").metrics["bbox"]["AP"] == 0
    assert "results.json holds no results: every annotation counts as missed" in caplog.text


PIECE, RUNS = [[5.0, 5.0, 30.0, 6.0, 20.0, 30.5]], {"size": [40, 50], "counts": [2000]}
RECORD = {
    "file_name": "a.jpg", "image_id": 4, "height": 40, "width": 50,
    "annotations": [
        {"bbox": [5.0, 5.0, 30.0, 30.5], "bbox_mode": 0, "category_id": 0, "segmentation": PIECE},
        {"bbox": [5.0, 5.0, 25.0, 25.5], "bbox_mode": 1, "category_id": 0, "segmentation": RUNS},
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    "place, field, value, what",
    [
        (0, "bbox", [5.0, 5.0, float("nan"), 30.5], "a box with a number that is not finite"),
        (0, "bbox", [5.0, 5.0, 4.0, 30.5], "a box of negative width or height"),  # corners
        (1, "bbox", [5.0, 5.0, -1.0, 30.5], "a box of negative width or height"),  # width and height
        (0, "segmentation", [[5.0, float("inf"), 30.0, 6.0, 20.0, 30.5]], "not finite"),
        (0, "segmentation", HUGE, "reaches beyond 10 times"),
        (0, "segmentation", [[5.0, 5.0, 30.0, 6.0]], "no polygon of three points"),
        (1, "segmentation", {"size": [50, 40], "counts": [2000]}, "size is not that of its image"),
        (1, "segmentation", {"size": [40, 50], "counts": b"P1000"}, "do not cover its image"),
    ],
)
def test_dataset_dicts_of_other_code_are_checked(place, field, value, what):
    DatasetRecords([[RECORD]])
    record = copy.deepcopy(RECORD)
    record["annotations"][place][field] = value
    with pytest.raises(
        ValueError, match=f"1 annotations .*annotation {place} of image 4 has .*{what}.*Correct or remove"
    ):
        DatasetRecords([[RECORD, record]])


def test_outlines_by_hand():
    """A square of 3 by 4: 3 + 4 + 3 + 4 pixels; two objects and a limit between them."""
    square = [0.0, 0.0, 3.0, 0.0, 3.0, 4.0, 0.0, 4.0]
    from lt_det.io.segmentations import outline_steps

    points = np.array(square + square[:6]).reshape(-1, 2)
    np.testing.assert_array_equal(outline_steps(points, np.array([4, 7])), [3, 4, 3, 4, 3, 4, 4])
    long = [v * 1e6 for v in square]
    sizes = np.array([[10**7, 10**7]] * 3)
    assert polygon_problems([[square], [square, long], [square, square]], sizes) == {
        1: "an outline longer than 4,000,000 pixels"
    }


def test_totals_of_compressed_texts_equal_the_kernel_and_pycocotools():
    rng = np.random.default_rng(0)
    masks = []
    for _ in range(200):
        mask = np.zeros(rng.integers(1, 90, 2), np.uint8, order="F")
        for _ in range(rng.integers(0, 6)):
            y, x = rng.integers(0, mask.shape)
            mask[y : y + rng.integers(1, 30), x : x + rng.integers(1, 30)] ^= 1
        masks.append(mask)
    texts = [mask_utils.encode(mask)["counts"] for mask in masks]
    np.testing.assert_array_equal(rle_totals(texts), [mask.size for mask in masks])
    noise = [bytes(rng.integers(48, 112, rng.integers(0, 12)).astype(np.uint8)) for _ in range(3000)]
    _, totals = RleTable.from_strings(noise, np.zeros((len(noise), 2))).areas_and_totals()
    np.testing.assert_array_equal(rle_totals(noise), totals)
    assert 100 < (totals < 0).sum() < 2900
