import copy
import gc
import logging

import pycocotools.mask as mask_util
import pytest
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import load_coco_json, load_lvis_json
from detectron2.structures import BoxMode

from lt_det.data import load_lvis_or_coco_json


def test_lvis_v1_records_by_hand(lvis_content, write_json, lvis_images):
    records = load_lvis_or_coco_json(write_json(lvis_content), lvis_images)
    assert [r["image_id"] for r in records] == [4, 7, 9]
    first = records[0]
    assert first["file_name"] == str(lvis_images / "val2017" / "000000000004.jpg")
    assert (first["width"], first["height"]) == (40, 60)
    assert first["neg_category_ids"] == [5, 7] and first["not_exhaustive_category_ids"] == [3]
    assert [a["category_id"] for a in first["annotations"]] == [3, 0, 3]  # ids 9, 3, 9 of 3, 5, 7, 9
    assert first["annotations"][0] == {
        "bbox": [15.5, 4.0, 10.0, 10.0],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 3,
        "segmentation": [[15.5, 4.0, 25.5, 4.0, 25.5, 14.0, 15.5, 14.0]],
    }
    assert records[2]["annotations"] == []


def test_same_as_detectron2_on_lvis_v1(lvis_content, write_json, lvis_images):
    pytest.importorskip("lvis")
    for category, identifier in zip(sorted(lvis_content["categories"], key=lambda c: c["id"]), range(1, 5)):
        for annotation in lvis_content["annotations"]:
            if annotation["category_id"] == category["id"]:
                annotation["new"] = identifier
        category["id"] = identifier
    for annotation in lvis_content["annotations"]:
        annotation["category_id"] = annotation.pop("new")
    path = write_json(lvis_content)
    ours = load_lvis_or_coco_json(path, lvis_images, extra_annotation_keys=["area"])
    theirs = load_lvis_json(str(path), f"{lvis_images}/", extra_annotation_keys=["area"])
    assert ours == theirs
    assert load_lvis_or_coco_json(path, "nowhere/", check_images=False) == load_lvis_json(str(path), "nowhere/")


def test_same_as_detectron2_on_real_lvis(shared_dir):
    pytest.importorskip("lvis")
    path = shared_dir / "data" / "lvis_val_100.json"
    assert load_lvis_or_coco_json(path, "coco/", check_images=False) == load_lvis_json(str(path), "coco/")


def coco_content():
    (square,) = mask_util.frPyObjects([[2, 2, 9, 2, 9, 9, 2, 9]], 30, 20)
    return {
        "images": [
            {"id": 3, "file_name": "b.jpg", "width": 30, "height": 20, "coco_url": "http://x/val2017/b.jpg"},
            {"id": 1, "file_name": "a.jpg", "width": 20, "height": 30, "coco_url": None},
        ],
        "annotations": [
            {"id": 1, "image_id": 3, "category_id": 90, "bbox": [2, 2, 7, 7], "iscrowd": 0,
             "segmentation": [[2, 2, 9, 2, 9, 9], [1, 1, 2, 2]]},
            {"id": 2, "image_id": 3, "category_id": 1, "bbox": [2, 2, 7, 7], "iscrowd": 1,
             "segmentation": {"size": [20, 30], "counts": [10, 5, 585]}},
            {"id": 3, "image_id": 1, "category_id": 1, "bbox": [0, 0, 5, 5], "iscrowd": 0,
             "segmentation": {"size": square["size"], "counts": square["counts"].decode()}},
            {"id": 4, "image_id": 1, "category_id": 1, "bbox": [0, 0, 5, 5], "iscrowd": 0,
             "segmentation": [[1, 1, 2, 2]]},
            {"id": 5, "image_id": 1, "category_id": 90, "bbox": [0, 0, 5, 5], "iscrowd": 0,
             "keypoints": [4, 5, 2, 0, 0, 0]},
        ],
        "categories": [
            {"id": 90, "name": "brush"}, {"id": 1, "name": "person"}, {"id": 40, "name": "unused"},
        ],
    }  # fmt: skip


def test_same_as_detectron2_on_coco(write_json, make_images, clean_catalogs, caplog):
    path = write_json(coco_content())
    root = make_images("a.jpg", "b.jpg")
    with caplog.at_level(logging.WARNING):
        ours = load_lvis_or_coco_json(path, root, "format_coco_ours", extra_annotation_keys=["id"])
    assert "skipped 1 objects" in caplog.text
    theirs = load_coco_json(str(path), str(root), "format_coco_theirs", extra_annotation_keys=["id"])
    assert ours == theirs
    assert [[a["id"] for a in r["annotations"]] for r in ours] == [[3, 5], [1, 2]]
    metadata = MetadataCatalog.get("format_coco_ours")
    assert metadata.thing_classes == ["person", "unused", "brush"]
    assert metadata.thing_dataset_id_to_contiguous_id == {1: 0, 40: 1, 90: 2}


def test_loading_does_not_change_what_it_was_given(write_json, make_images):
    # Keypoints are shifted by half a pixel; twice loaded must not be twice shifted.
    path, root = write_json(coco_content()), make_images("a.jpg", "b.jpg")
    first = load_lvis_or_coco_json(path, root)
    kept = copy.deepcopy(first)
    assert load_lvis_or_coco_json(path, root) == first == kept


@pytest.mark.parametrize(
    "images, expected",
    [
        (["000000000004.jpg", "000000000007.jpg", "000000000009.jpg"], "000000000004.jpg"),
        ([f"COCO_val2014_{i:012d}.jpg" for i in (4, 7, 9)], "COCO_val2014_000000000004.jpg"),
        # neither rule holds for all, so each image is looked for on its own
        (
            ["COCO_val2014_000000000007.jpg", "000000000004.jpg", "val2017/000000000009.jpg"],
            "000000000004.jpg",
        ),
    ],
)
def test_lvis_v05_names(lvis_content, write_json, make_images, images, expected):
    for image in lvis_content["images"]:
        image["file_name"] = f"COCO_val2014_{image['id']:012d}.jpg"
    root = make_images(*images)
    records = load_lvis_or_coco_json(write_json(lvis_content), root)
    assert records[0]["file_name"] == str(root / expected)
    assert {r["file_name"] for r in records} == {str(root / name) for name in images}


def test_coco_url_name_alone(lvis_content, write_json, make_images):
    root = make_images(*(f"{i:012d}.jpg" for i in (4, 7, 9)))
    records = load_lvis_or_coco_json(write_json(lvis_content), root)
    assert records[1]["file_name"] == str(root / "000000000007.jpg")


def test_real_photographs_are_found(shared_dir):
    folder = shared_dir / "data" / "lvis_val_64"
    records = load_lvis_or_coco_json(folder / "lvis_val_64.json", folder / "images")
    assert len(records) == 64 and sum(len(r["annotations"]) for r in records) == 674
    assert all((folder / "images").samefile(r["file_name"].rsplit("/", 1)[0]) for r in records)


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda c: c["images"].clear(), "has no images"),
        (lambda c: c.pop("categories"), "has no categories"),
        (
            lambda c: c["annotations"][2].update(image_id=50),
            r"image_id of 1 annotations \(ids \[13\]\) is not among the file's images: .50.",
        ),
        (
            lambda c: c["annotations"][2].update(category_id=50),
            r"category_id of 1 annotations \(ids \[13\]\) is not among the file's categories: .50.",
        ),
        (lambda c: c["annotations"][2].update(bbox=[1, 2]), "annotation 13 has bbox .1, 2."),
        (lambda c: c["annotations"][2].pop("bbox"), "'annotations' lacks .'bbox'."),
        (lambda c: c["images"][0].pop("height"), "'images' lacks .'height'."),
        (lambda c: c["images"][0].pop("coco_url"), "image 7 has neither 'file_name' nor 'coco_url'"),
        (lambda c: c["images"].append(c["images"][0]), "ids occur more than once in 'images': .7."),
    ],
)
def test_damaged_files(lvis_content, write_json, lvis_images, change, complaint):
    change(lvis_content)
    with pytest.raises(ValueError, match=complaint):
        load_lvis_or_coco_json(write_json(lvis_content), lvis_images)
    assert gc.isenabled()


def test_other_json(write_json, tmp_path):
    with pytest.raises(ValueError, match="expected '{', found '.'"):
        load_lvis_or_coco_json(write_json([1]), tmp_path)
    with pytest.raises(FileNotFoundError, match="no annotation file"):
        load_lvis_or_coco_json(tmp_path / "absent.json", tmp_path)


def test_missing_images(lvis_content, write_json, make_images, tmp_path):
    path = write_json(lvis_content)
    with pytest.raises(FileNotFoundError, match="no image folder .*absent"):
        load_lvis_or_coco_json(path, tmp_path / "absent")
    root = make_images("val2017/000000000004.jpg")
    with pytest.raises(FileNotFoundError, match="2 of the 3 images .*tried: .*train2017/000000000007.jpg"):
        load_lvis_or_coco_json(path, root)


def test_repeated_annotation_ids_are_a_warning(lvis_content, write_json, lvis_images, caplog):
    lvis_content["annotations"][1]["id"] = 11
    with caplog.at_level(logging.WARNING):
        records = load_lvis_or_coco_json(write_json(lvis_content), lvis_images)
    assert sum(len(r["annotations"]) for r in records) == 6
    assert "more than once in 'annotations': [11]" in caplog.text


def test_metadata_of_another_file_is_not_overwritten(lvis_content, write_json, lvis_images, clean_catalogs):
    load_lvis_or_coco_json(write_json(lvis_content), lvis_images, "format_taken")
    lvis_content["categories"][0]["name"] = "wasp"
    with pytest.raises(ValueError, match="'format_taken' has other thing_classes already"):
        load_lvis_or_coco_json(write_json(lvis_content), lvis_images, "format_taken")
