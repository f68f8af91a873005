"""Records that are mapped equal lists of dicts, whole and in part, and so do their columns."""

import pickle

import numpy as np
import pytest
from detectron2.data import get_detection_dataset_dicts

from lt_det.config import get_lt_det_cfg
from lt_det.data import (
    DatasetRecords,
    RecordPositions,
    annotation_columns,
    build_train_mapper,
    images_that_fill,
    load_lvis_or_coco_json,
    load_train_dicts,
    open_datasets,
    register_dataset,
    training_frequency_groups,
)


@pytest.fixture
def two_sources(lvis_content, write_json, lvis_images):
    """A mapped data set, a list, and both as one list of dicts."""
    lvis_content["annotations"][1]["iscrowd"] = 1
    mapped = load_lvis_or_coco_json(write_json(lvis_content), lvis_images)
    listed = [
        {"file_name": "a", "width": 3, "height": 4, "annotations": [{"category_id": 1, "bbox": [0, 0, 1, 1]}]},
        {"file_name": "b", "width": 5, "height": 4, "annotations": []},
    ]
    return mapped, listed, [*mapped, *listed]


def same_columns(records, dicts):
    for ours, theirs in zip(annotation_columns(records), annotation_columns(dicts), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    sizes = [(d["width"], d["height"]) for d in dicts]
    np.testing.assert_array_equal(records.image_sizes(), np.array(sizes, float).reshape(-1, 2))


def test_records_equal_the_dicts(two_sources):
    mapped, listed, dicts = two_sources
    records = DatasetRecords([mapped, listed])
    assert records == dicts and records[-1] == dicts[-1] and len(records) == 5
    same_columns(records, dicts)
    for part in (slice(1, 4), slice(None, None, -2), slice(2, 2)):
        assert records[part] == dicts[part]
        same_columns(records[part], dicts[part])
    chosen = records.select([4, 0, 0]).select(np.array([True, False, True]))
    assert chosen == [dicts[4], dicts[0]]
    same_columns(chosen, [dicts[4], dicts[0]])
    with pytest.raises(IndexError):
        records[5]
    assert pickle.loads(pickle.dumps(records)) == dicts
    # An item belongs to the caller.
    records[0]["annotations"].clear()
    assert records == dicts


def test_join_and_fingerprint(two_sources):
    mapped, listed, dicts = two_sources
    a, b = DatasetRecords([mapped]), DatasetRecords([listed])
    joined = DatasetRecords.join([a[1:], b, a])
    assert joined == [*dicts[1:3], *listed, *dicts[:3]]
    same_columns(joined, [*dicts[1:3], *listed, *dicts[:3]])
    prints = {r.fingerprint() for r in (a, b, joined, a[1:], DatasetRecords([mapped, listed]))}
    assert len(prints) == 5
    assert DatasetRecords([mapped]).fingerprint() in prints


def test_filters(two_sources):
    mapped, listed, dicts = two_sources
    records = DatasetRecords([mapped, listed])
    expected = [d for d in dicts if any(a.get("iscrowd", 0) == 0 for a in d["annotations"])]
    assert len(expected) == 3 and records.with_annotations() == expected


def test_filter_by_keypoints(lvis_content, write_json, lvis_images):
    for image in lvis_content["images"]:  # else it is LVIS, which has no keypoints
        del image["neg_category_ids"], image["not_exhaustive_category_ids"]
    lvis_content["annotations"][0]["keypoints"] = [1, 2, 0, 3, 4, 1]
    lvis_content["annotations"][2]["keypoints"] = [1, 2, 2, 3, 4, 1]
    mapped = load_lvis_or_coco_json(write_json(lvis_content), lvis_images, check_images=False)
    for records in (DatasetRecords([mapped]), DatasetRecords([list(mapped)])):
        assert [r["image_id"] for r in records.with_keypoints(3)] == [7]
        assert len(records.with_keypoints(4)) == 0 and len(records.with_keypoints(1)) == 1


def test_positions_have_the_columns(two_sources):
    mapped, *_ = two_sources
    records = DatasetRecords([mapped])
    positions = RecordPositions(records)
    assert list(positions) == [{"cache_index": 0}, {"cache_index": 1}, {"cache_index": 2}]
    same_columns(positions, list(mapped))


def test_loading_equals_detectron2(lvis_content, write_json, lvis_images, clean_catalogs):
    path = write_json(lvis_content)
    register_dataset("records_train", path, lvis_images)
    theirs = get_detection_dataset_dicts(["records_train"])
    cfg = get_lt_det_cfg()
    cfg.DATASETS.TRAIN = ("records_train", "records_train")
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 4
    records, sizes = load_train_dicts(cfg)
    assert records == theirs * 2 and sizes == [2, 2]
    assert open_datasets("records_train") == theirs
    assert len(open_datasets(["records_train"], filter_empty=False)) == 3


def test_images_that_fill():
    """Rare classes choose first; what they bring along counts."""

    def image(*classes, crowd=()):
        return {"annotations": [{"category_id": c, "iscrowd": int(c in crowd)} for c in classes]}

    records = [image(0, 0), image(0, 1), image(0, 0, 0), image(1), image(2, 0), image(), image(2, crowd=(2,)), image(0)]
    # Class 2 has image 4 (6 is a crowd); class 1 has 1 and 3; class 0 wants five, of which 4 and 1 brought two.
    assert images_that_fill(records, [5, 2, 3]) == [0, 1, 2, 3, 4]
    assert images_that_fill(records, [1, 1, 1]) == [1, 4]


def test_mask_format_follows_the_annotations(lvis_content, write_json, lvis_images):
    cfg = get_lt_det_cfg()
    cfg.MODEL.MASK_ON = True
    mapped = load_lvis_or_coco_json(write_json(lvis_content), lvis_images)
    assert build_train_mapper(cfg, DatasetRecords([mapped])).instance_mask_format == "polygon"
    lvis_content["annotations"][2]["segmentation"] = {"size": [40, 60], "counts": [0, 2400]}
    mapped = load_lvis_or_coco_json(write_json(lvis_content), lvis_images)
    for records in (DatasetRecords([mapped]), list(mapped)):
        mapper = build_train_mapper(cfg, records)
        assert mapper.instance_mask_format == "bitmask"
    sample = mapper(mapped[1])
    assert sample["image_id"] == 7 and sample["instances"].gt_masks.tensor[1].all()
    assert cfg.INPUT.MASK_FORMAT == "polygon"


def test_groups_of_a_test_set_without_them(lvis_content, write_json, lvis_images, clean_catalogs, caplog):
    for category in lvis_content["categories"]:
        del category["frequency"]
    path = write_json(lvis_content)
    for name in ("records_groups_train", "records_groups_val"):
        register_dataset(name, path, lvis_images)
    cfg = get_lt_det_cfg()
    cfg.DATASETS.TRAIN = ("records_groups_train",)
    assert training_frequency_groups(cfg, "records_groups_val") == {"r": [3, 5, 7, 9], "c": [], "f": []}
    cfg.DATASETS.FREQUENCY_THRESHOLDS = (0, 1)  # images: ant (3) 2, bee (5) 1, cat (7) 0, dog (9) 1
    with caplog.at_level("INFO"):
        groups = training_frequency_groups(cfg, "records_groups_val")
    assert groups == {"r": [7], "c": [5, 9], "f": [3]}
    assert "records_groups_val states no 'frequency'" in caplog.text and "1 rare, 2 common, 1 frequent" in caplog.text
    cfg.DATASETS.TRAIN = ()
    assert training_frequency_groups(cfg, "records_groups_val") is None


def test_groups_of_the_test_set_itself_are_left_alone(lvis_content, write_json, lvis_images, clean_catalogs):
    register_dataset("records_lvis", write_json(lvis_content), lvis_images)
    cfg = get_lt_det_cfg()
    cfg.DATASETS.TRAIN = ("records_lvis",)
    assert training_frequency_groups(cfg, "records_lvis") is None
