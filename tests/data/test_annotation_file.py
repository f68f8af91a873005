"""Columns of annotation files: equal to Detectron2's loaders, kept, shared, checked."""

import copy
import json
import math
import multiprocessing
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data.datasets import load_coco_json
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lt_det.data import annotation_file, load_lvis_or_coco_json
from lt_det.data.annotation_file import open_annotation_file


@pytest.fixture(autouse=True, scope="module", params=["library", "scanner"])
def reader(request):
    """Files as small as the tests' are left to a library; here the scanner of large ones takes them too."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "scanner":
            patch.setattr("lt_det.io.annotations._SCANNED_FROM_BYTES", 0)
        yield


def same(a, b):
    """Equal to the last value and type."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b and (not isinstance(a, float) or math.copysign(1, a) == math.copysign(1, b))


# ------------------------------------------------------------------------------------------------ random COCO files

NUMBERS = (
    st.integers(0, 90)
    | st.floats(0, 90, allow_nan=False)
    | st.floats(0, 90).map(lambda v: round(v, 2))
    | st.just(-0.0)
    | st.sampled_from([1e-7, 1.5e1, 3e0])
)


def empty_mask(height, width):
    """Compressed run lengths."""
    return mask_util.frPyObjects({"size": [height, width], "counts": [height * width]}, height, width)[
        "counts"
    ].decode()


def polygons_of(numbers):
    return st.lists(st.lists(numbers, max_size=9), max_size=3)


NAMES = st.text(st.characters(exclude_characters="/\x00", exclude_categories=["Cs"]), min_size=1, max_size=6)
EXTRA = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4)


@st.composite
def coco_files(draw):
    ids = st.integers(-5, 10**12) if draw(st.booleans()) else st.text(max_size=4)
    images = [
        {"id": i, "width": draw(st.integers(50, 100)), "height": 80, "file_name": draw(NAMES), "license": 3}
        for i in draw(st.lists(ids, min_size=1, max_size=4, unique=True))
    ]
    categories = [
        {"id": i, "name": draw(NAMES), "supercategory": "ü"}
        for i in draw(st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True))
    ]
    annotations = []
    kinds = ("floats", "integers", "mixed", "rle", "counts", "none", "empty")
    for i in range(draw(st.integers(0, 6))):
        image = draw(st.sampled_from(images))
        width, height = image["width"], image["height"]
        annotation = {
            "id": i + 1,
            "image_id": image["id"],
            "category_id": draw(st.sampled_from(categories))["id"],
            "bbox": [draw(NUMBERS) for _ in range(4)],
        }
        kind = draw(st.sampled_from(kinds))
        if kind == "counts":
            first = draw(st.integers(0, width * height))
            annotation["segmentation"] = {"size": [height, width], "counts": [first, width * height - first]}
        elif kind == "rle":
            annotation["segmentation"] = {"counts": empty_mask(height, width), "size": [height, width]}
        elif kind == "empty":
            annotation["segmentation"] = draw(st.sampled_from([[], None, {}]))
        elif kind != "none":
            numbers = {"floats": st.floats(0, 99), "integers": st.integers(0, 99), "mixed": NUMBERS}[kind]
            annotation["segmentation"] = draw(polygons_of(numbers))
        if draw(st.booleans()):
            annotation["iscrowd"] = draw(st.sampled_from([0, 1, True, False]))
        if draw(st.integers(0, 5)) == 0:
            annotation["keypoints"] = draw(st.lists(NUMBERS, max_size=6))
        if draw(st.booleans()):
            annotation["extra"] = draw(EXTRA)
        annotations.append(annotation)
    return {"images": images, "annotations": annotations, "categories": categories}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=100)
@given(content=coco_files(), ascii_only=st.booleans(), indent=st.sampled_from([None, 1]), extra=st.booleans())
def test_any_file_equals_detectron2(tmp_path, content, ascii_only, indent, extra):
    path = tmp_path / "any.json"
    path.write_text(json.dumps(content, ensure_ascii=ascii_only, indent=indent), encoding="utf-8")
    keys = ["extra"] if extra else []
    theirs = load_coco_json(str(path), "images", extra_annotation_keys=keys)
    position = {c: i for i, c in enumerate(sorted(c["id"] for c in content["categories"]))}
    for record in theirs:  # without a data set name Detectron2 leaves the ids of the file
        for obj in record["annotations"]:
            obj["category_id"] = position[obj["category_id"]]
    ours = load_lvis_or_coco_json(path, "images", extra_annotation_keys=keys, check_images=False)
    for a, b in zip(ours, theirs, strict=True):
        assert same(a, b), (a, b)
    folder = tmp_path / "cache"
    kept = open_annotation_file(path, extra_keys=keys, cache=True, cache_folder=folder)
    mapped = pickle.loads(pickle.dumps(kept))
    for i in range(len(kept)):
        assert same(kept.objects(i), ours.file.objects(i)) and same(mapped.objects(i), kept.objects(i))
    shutil.rmtree(folder)


def test_real_coco_style_data_equals_detectron2(shared_dir, tmp_path):
    content = json.loads((shared_dir / "data" / "taco_annotations.json").read_text())
    for i, annotation in enumerate(content["annotations"]):  # some ids occur twice, which Detectron2 refuses
        annotation["id"] = i
    path = tmp_path / "taco.json"
    path.write_text(json.dumps(content))
    theirs = load_coco_json(str(path), "taco", "annotation_file_taco")
    ours = load_lvis_or_coco_json(path, "taco", check_images=False)
    assert all(same(a, b) for a, b in zip(ours, theirs, strict=True))


# ------------------------------------------------------------------------------------------------ kept columns


@pytest.fixture
def kept(lvis_content, write_json, tmp_path):
    """Path of a file, a folder with its columns, and a function that opens them afresh."""
    path = write_json(lvis_content)
    folder = tmp_path / "cache"

    def open_again():
        annotation_file._OPEN.clear()
        return open_annotation_file(path, cache=True, cache_folder=folder)

    open_again()
    return path, folder, open_again


def columns_in(folder):
    (made,) = [p for p in folder.iterdir() if p.is_dir()]
    return made


def must_not_read(*_, **__):
    raise AssertionError("the file was read again")


def test_columns_are_kept_and_follow_the_content(kept, lvis_content, write_json, monkeypatch):
    path, folder, open_again = kept
    with monkeypatch.context() as patch:
        patch.setattr(annotation_file, "read_columns", must_not_read)
        assert open_again().num_objects == 6
        os.utime(path, (1, 1))  # touched, and the same
        assert open_again().num_objects == 6
        copied = path.with_name("copy.json")
        shutil.copy(path, copied)
        assert open_annotation_file(copied, cache=True, cache_folder=folder).num_objects == 6
    del lvis_content["annotations"][0]
    write_json(lvis_content)
    assert open_again().num_objects == 5
    assert not [p for p in folder.iterdir() if p.name.startswith(".writing")]


def test_columns_of_another_version_are_not_used(kept, monkeypatch):
    _, folder, open_again = kept
    monkeypatch.setattr(annotation_file, "_VERSION", 0)
    open_again()
    assert len([p for p in folder.iterdir() if p.is_dir()]) == 2


def test_small_files_are_not_kept(lvis_content, write_json, tmp_path, monkeypatch):
    monkeypatch.setenv("LT_DET_CACHE", str(tmp_path / "home"))
    path = write_json(lvis_content)
    open_annotation_file(path)
    assert not (tmp_path / "home").exists()
    monkeypatch.setattr(annotation_file, "_LARGE", 100)
    open_annotation_file(path)
    assert columns_in(tmp_path / "home" / "annotations")


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["box.npy", "category.npy", "points.npy", "text.npy", "points.crc32.npy"])
@pytest.mark.parametrize("damage", [flip, lambda p: p.write_bytes(p.read_bytes()[:-8]), Path.unlink])
def test_damage_is_refused(kept, name, damage):
    path, folder, open_again = kept
    damage(columns_in(folder) / name)
    with pytest.raises(ValueError, match=rf"{name} is damaged.*Delete the folder {columns_in(folder)}") as error:
        file = open_again()
        for i in range(len(file)):
            file.image(i), file.objects(i)
    assert str(path) in str(error.value)


def test_damaged_manifest_is_refused_and_a_damaged_note_is_not_missed(kept):
    _, folder, open_again = kept
    (note,) = folder.glob("*.json")
    note.write_text('{"stamp"')
    assert open_again().num_objects == 6
    (columns_in(folder) / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json is damaged"):
        open_again()


def test_cache_that_cannot_be_written_names_the_folder(lvis_content, write_json, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match=r"cannot be kept in .*file.*LT_DET_CACHE"):
        open_annotation_file(write_json(lvis_content), cache=True, cache_folder=tmp_path / "file" / "cache")


def test_failed_reading_leaves_nothing(lvis_content, write_json, tmp_path):
    lvis_content["annotations"][3]["category_id"] = 77
    with pytest.raises(ValueError, match="77"):
        open_annotation_file(write_json(lvis_content), cache=True, cache_folder=tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir() or p.suffix == ".json"]


def test_processes_that_start_together_read_once(lvis_content, write_json, tmp_path):
    """With fork, so that the processes need not import anything."""
    path, folder = write_json(lvis_content), tmp_path / "cache"
    context = multiprocessing.get_context("fork")
    read = annotation_file.read_columns
    count = context.Value("i", 0)
    start = context.Barrier(8)

    def work():
        def counted(*args, **options):
            with count.get_lock():
                count.value += 1
            return read(*args, **options)

        annotation_file.read_columns = counted
        start.wait()
        file = open_annotation_file(path, cache=True, cache_folder=folder)
        assert file.num_objects == 6 and len(file.objects(0)) == 3

    processes = [context.Process(target=work) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    assert count.value == 1


def test_another_process_gets_the_path_and_not_the_data(kept):
    *_, open_again = kept
    file = open_again()
    assert len(pickle.dumps(file)) < 400
    annotation_file._OPEN.clear()
    again = pickle.loads(pickle.dumps(file))
    assert again.objects(1) == file.objects(1) and isinstance(again.box.base, np.memmap)


# ------------------------------------------------------------------------------------------------ what is refused

SQUARE = [[1.0, 1.0, 9.0, 1.0, 9.0, 9.0]]


@pytest.mark.parametrize(
    "change, complaint",
    [
        (
            dict(bbox=[1, 2, float("nan"), 4]),
            "1 annotations have a box with a number that is not finite; their ids: 13",
        ),
        (dict(bbox=[1, float("inf"), 3, 4]), "not finite; their ids: 13"),
        (dict(bbox=[1, 2, -3, 4]), "box of negative width or height; their ids: 13"),
        (dict(bbox=[1, 2, "3", 4]), "annotation 13 has bbox"),
        (dict(bbox=None), "annotation 13 has bbox None"),
        (dict(segmentation=[[1.0, 2.0, float("nan"), 4.0, 5.0, 6.0]]), "polygon with a number that is not finite.* 13"),
        (dict(segmentation=[[1.0, 2.0, float("-inf"), 4, 5.0, 6.0]]), "polygon with a number that is not finite.* 13"),
        (dict(segmentation=[[1.0, 2.0, 1e9, 4.0, 5.0, 6.0]]), "reaches beyond 10 times the size of its image.* 13"),
        (dict(segmentation=[[1, 2, 10**30, 4, 5, 6]]), "reaches beyond 10 times the size of its image.* 13"),
        (dict(segmentation=[[1, 2, 10**400, 4, 5, 6]]), "polygon with a number that is not finite.* 13"),
        (dict(segmentation=[[1, 2, "3", 4, 5, 6]]), "annotation 13 has a polygon with something that is not a number"),
        (dict(segmentation=[1, 2, 3, 4, 5, 6]), "annotation 13 has a segmentation that is neither"),
        (dict(segmentation="abc"), "annotation 13 has a segmentation that is neither"),
        (
            dict(segmentation={"size": [9, 9], "counts": empty_mask(9, 9)}),
            "RLE mask whose size is not that of its image.* 13",
        ),
        (
            dict(segmentation={"size": [40, 60], "counts": [5, 6]}),
            "annotation 13 has an RLE mask whose counts cover 11",
        ),
        (dict(segmentation={"size": [40, 60], "counts": [-5, 2405]}), "annotation 13 .* whole numbers"),
        (dict(segmentation={"size": [40], "counts": []}), "annotation 13 has an RLE mask whose size is"),
        (dict(ignore=1), "annotation 13 has 'ignore': 1"),
    ],
)
def test_what_training_cannot_take_is_named(lvis_content, write_json, change, complaint):
    lvis_content["annotations"][2].update(change)
    path = write_json(lvis_content)
    with pytest.raises(ValueError, match=complaint) as error:
        open_annotation_file(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_boxes_that_training_skips_are_counted(lvis_content, write_json, caplog):
    lvis_content["annotations"][0]["bbox"] = [5.0, 5.0, 0.0, 7.0]
    lvis_content["annotations"][2]["bbox"] = [100.0, 5.0, 7.0, 7.0]
    file = open_annotation_file(write_json(lvis_content))
    assert file.meta["num_empty_boxes"] == 2
    assert "2 boxes have no width, no height or lie outside their image" in caplog.text


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
@given(
    field=st.sampled_from(["id", "image_id", "category_id", "bbox", "segmentation", "iscrowd", "keypoints", "ignore"]),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=7) | st.dictionaries(st.sampled_from(["size", "counts"]), inner),
    ),
)
def test_any_value_is_taken_or_named(tmp_path, field, value):
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5], "segmentation": SQUARE}
    annotation[field] = value
    content = {
        "images": [{"id": 1, "width": 9, "height": 9, "file_name": "a.jpg"}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [copy.deepcopy(annotation), {**annotation, "id": 2}],
    }
    path = tmp_path / "any.json"
    path.write_text(json.dumps(content))
    try:
        file = open_annotation_file(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert file.num_objects == len(file.objects(0)) and np.isfinite(file.box).all()
