"""COCO to LVIS style, splits, class subsets, mixtures."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lt_det.cli.convert import main
from lt_det.data import ClassStatistics
from lt_det.data.convert import class_subset, mix, read_annotations, split, to_lvis


def coco(classes_of_images, num_classes=None, first_id=0):
    """A COCO-style file from the classes of each image (ids 10 c + 3, so neither dense nor from 1)."""
    num_classes = num_classes or 1 + max((max(c, default=0) for c in classes_of_images), default=0)
    images, annotations = [], []
    for i, classes in enumerate(classes_of_images):
        images.append({"id": 100 + i, "file_name": f"{first_id + i:04d}.jpg", "height": 20, "width": 30})
        for c in classes:
            row = {"id": len(annotations) + 1, "image_id": 100 + i, "category_id": 10 * c + 3, "bbox": [1, 2, 3, 4]}
            annotations.append({**row, "area": 12, "iscrowd": 0, "segmentation": [[1, 2, 4, 2, 4, 6, 1, 6]]})
    categories = [{"id": 10 * c + 3, "name": f"class {c}"} for c in range(num_classes)]
    return {"images": images, "annotations": annotations, "categories": categories}


def names_of(content):
    return {c["id"]: c["name"] for c in content["categories"]}


def test_coco_to_lvis():
    content = coco([[0, 0, 1], [0], [2], []])
    content["annotations"][3]["iscrowd"] = 1  # class 0 in the second image
    before = json.dumps(content)
    out = to_lvis(content, thresholds=(1, 1))
    assert json.dumps(content) == before
    assert [c["id"] for c in out["categories"]] == [1, 2, 3]
    assert [(c["image_count"], c["instance_count"]) for c in out["categories"]] == [(1, 2), (1, 1), (1, 1)]
    federated = [(i["neg_category_ids"], i["not_exhaustive_category_ids"]) for i in out["images"]]
    assert federated == [([3], []), ([2, 3], [1]), ([1, 2], []), ([1, 2, 3], [])]
    assert [a["category_id"] for a in out["annotations"]] == [1, 1, 2, 3]
    assert to_lvis(content, thresholds=(0, 1))["categories"][0]["frequency"] == "c"
    assert to_lvis(content, thresholds=(0, 0))["categories"][0]["frequency"] == "f"
    assert to_lvis(out, thresholds=(1, 1)) == out  # nothing is left to do


def test_detectron2_reads_it(tmp_path):
    from detectron2.data.datasets.lvis import load_lvis_json

    out = to_lvis(coco([[0, 1], [1], [2, 0]]))
    for image in out["images"]:
        image["coco_url"] = "http://images/val2017/" + image["file_name"]
    (tmp_path / "a.json").write_text(json.dumps(out))
    records = load_lvis_json(str(tmp_path / "a.json"), str(tmp_path))
    assert [[a["category_id"] for a in r["annotations"]] for r in records] == [[0, 1], [1], [2, 0]]
    statistics = ClassStatistics.from_json(tmp_path / "a.json")
    assert statistics.image_count.tolist() == [2, 2, 1] and statistics.names == ("class 0", "class 1", "class 2")


def test_lvis_style_evaluates_as_coco_style(tmp_path):
    """All negatives are verified, so LVIS's rule drops no detection; with one annotation of each kind AP can be had by
    hand: the detection of class 1 in the first image is a false positive before a true one, so its AP is 1/2."""
    from lt_det.evaluation import GroundTruth, evaluate_results

    out = to_lvis(coco([[0], [1]]))
    box = {"bbox": [1, 2, 3, 4]}
    results = [
        {"image_id": 100, "category_id": 1, "score": 0.9, **box},
        {"image_id": 100, "category_id": 2, "score": 0.9, **box},
        {"image_id": 101, "category_id": 2, "score": 0.8, **box},
    ]
    metrics = evaluate_results(GroundTruth.from_dict(out), results, iou_types=["bbox"], progress=False).metrics
    assert metrics["bbox"]["AP50"] == pytest.approx(75)


def test_class_subset():
    content = to_lvis(coco([[0, 1], [1], [2], [3, 3]]))
    part = class_subset(content, names=["class 3", "class 1"])
    assert names_of(part) == {1: "class 1", 2: "class 3"}
    assert [a["category_id"] for a in part["annotations"]] == [1, 1, 2, 2]
    assert part["images"][2]["neg_category_ids"] == [1, 2]  # verified to have neither: it says something
    bare = coco([[0, 1], [1], [2], []])
    assert [i["id"] for i in class_subset(bare, names=["class 1"])["images"]] == [100, 101]
    assert len(class_subset(bare, names=["class 1"], keep_empty=True)["images"]) == 4
    with pytest.raises(ValueError, match="no categories 'cat'"):
        class_subset(content, names=["cat"])
    with pytest.raises(ValueError, match="no 'frequency'"):
        class_subset(bare, frequency=["r"])
    assert len(class_subset(content, frequency=["r"])["categories"]) == 4


def test_mix_by_class_names():
    a, b = coco([[0, 1], [1]]), coco([[0], [1], [0]], first_id=2)
    for category, name in zip(b["categories"], ("class 1", "bird")):
        category["name"] = name
    out = mix([a, b])
    assert names_of(out) == {1: "class 0", 2: "class 1", 3: "bird"}
    assert [c["image_count"] for c in out["categories"]] == [1, 4, 1]
    assert [i["id"] for i in out["images"]] == [1, 2, 3, 4, 5]
    # Nobody looked for birds in a, nor for class 0 in b.
    assert [i["neg_category_ids"] for i in out["images"]] == [[], [1], [3], [2], [3]]
    assert [a["id"] for a in out["annotations"]] == list(range(1, 7))
    with pytest.raises(ValueError, match="1 and 2 both have the image 0000.jpg; give prefixes"):
        mix([a, a])
    twice = mix([a, a], prefixes=["x", "y"])
    assert [i["file_name"] for i in twice["images"]][1:3] == ["x/0001.jpg", "y/0000.jpg"]
    with pytest.raises(ValueError, match="2 data sets and 1 prefixes"):
        mix([a, b], prefixes=["x"])


def sides(content, **options):
    parts = split(content, **options)
    return [{i["file_name"] for i in p["images"]} for p in parts], parts


def image_counts(content):
    """Images of each category, counted."""
    pairs = {(a["category_id"], a["image_id"]) for a in content["annotations"]}
    return [sum(c == category["id"] for c, _ in pairs) for category in content["categories"]]


@given(st.lists(st.sets(st.integers(0, 7), max_size=3), min_size=2, max_size=40), st.integers(0, 3))
def test_split_loses_and_doubles_nothing(classes_of_images, seed):
    content = coco([sorted(c) for c in classes_of_images], num_classes=8)
    (train, val), parts = sides(content, fraction=0.3, seed=seed)
    assert not train & val and len(train | val) == len(classes_of_images)
    assert sum(len(p["annotations"]) for p in parts) == len(content["annotations"])
    for part in parts:
        here = {i["id"] for i in part["images"]}
        assert all(a["image_id"] in here for a in part["annotations"])
    # What there is to learn is there to be learned from.
    assert all(trained for trained, held in zip(*map(image_counts, parts)) if held)
    assert all([c["image_count"] for c in part["categories"]] == image_counts(parts[0]) for part in parts)
    assert split(content, fraction=0.3, seed=seed) == parts  # deterministic


def test_split_keeps_every_class_on_both_sides():
    rng = np.random.default_rng(0)
    # A long tail: class c is in about 400 / (c + 1) images, at least two; images have several classes.
    classes_of_images = [[] for _ in range(1000)]
    for c in range(200):
        for i in rng.choice(1000, max(2, 400 // (c + 1)), replace=False):
            classes_of_images[i].append(c)
    content = coco(classes_of_images)
    _, (train, val) = sides(content, fraction=0.25)
    for a, b, trained, held in zip(train["categories"], val["categories"], *map(image_counts, (train, val))):
        total = trained + held
        assert trained >= 1 and held >= 1
        assert abs(held - 0.25 * total) <= max(2, 0.05 * total)
        assert a["frequency"] == b["frequency"] == ("r" if total <= 10 else "c" if total <= 100 else "f")
    assert 200 <= len(val["images"]) <= 300
    other = split(content, fraction=0.25, seed=1)
    assert {i["id"] for i in other[1]["images"]} != {i["id"] for i in val["images"]}


def test_split_of_a_class_with_one_image(caplog):
    _, (train, val) = sides(coco([[0, 1], [0], [0], [0]]), fraction=0.5)
    assert (image_counts(train)[1], image_counts(val)[1]) == (1, 0)
    assert "class 1" in caplog.text


def test_split_keeps_copies_of_an_image_together():
    content = coco([[0], [1], [0, 1], [0], [1], [0]])
    content["images"][5]["file_name"] = content["images"][0]["file_name"]
    (train, val), _ = sides(content, fraction=0.4)
    assert not train & val
    with pytest.raises(ValueError, match="between 0 and 1"):
        split(content, fraction=1.0)


def test_command_line(tmp_path, capsys):
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(coco([[0, 1], [0], [1], [0, 1]])))
    assert main(["lvis", str(path), str(tmp_path / "lvis.json")]) == 0
    assert "4 images, 6 objects, 2 classes (2 rare" in capsys.readouterr().out
    parts = ["--train", str(tmp_path / "t.json"), "--val", str(tmp_path / "v.json"), "--fraction", "0.5"]
    assert main(["split", str(tmp_path / "lvis.json"), *parts]) == 0
    assert len(read_annotations(tmp_path / "t.json")["images"]) == 2
    assert main(["subset", str(path), str(tmp_path / "s.json"), "--names", "class 1"]) == 0
    assert len(read_annotations(tmp_path / "s.json")["categories"]) == 1
    assert main(["mix", str(path), str(path), "--output", str(tmp_path / "m.json"), "--prefixes", "a", "b"]) == 0
    assert len(read_annotations(tmp_path / "m.json")["images"]) == 8


@pytest.mark.parametrize(
    "text, message",
    [
        ("[1", "is not json"),
        ("[]", "holds a list"),
        ('{"images": []}', "no list 'annotations'"),
        ('{"images": [{"id": 1}], "annotations": [], "categories": []}', r"images\[0\] has no height, width"),
        (
            '{"images": [], "annotations": [{"image_id": 7, "category_id": 1}], "categories": []}',
            "unknown image_id 7",
        ),
    ],
)
def test_bad_files_are_named(tmp_path, capsys, text, message):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_annotations(path)
    assert main(["lvis", str(path), str(tmp_path / "out.json")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"lt-det convert: {path}") and error.count("\n") == 1
    assert not (tmp_path / "out.json").exists()
