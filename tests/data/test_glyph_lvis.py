"""The embedded data set: drawn as planned, annotated as drawn, and its caches whole or absent."""

import dataclasses
import filecmp
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lt_det.data.datasets.glyph_lvis import (
    PREDEFINED_SPECS,
    GlyphSpec,
    build,
    build_glyph_dataset,
    ensure_glyph_dataset,
    ensure_glyph_lvis,
    long_tailed_image_counts,
    lvis_v1_image_counts,
    pictures,
    vocabulary,
)
from lt_det.data.datasets.glyph_lvis.masks import mask_to_polygons, polygons_to_mask
from lt_det.data.datasets.glyph_lvis.plan import plan_split
from lt_det.data.datasets.glyph_lvis.scene import SceneRenderer


def tiny_spec(**changes) -> GlyphSpec:
    """Nine categories, three of each group; enough images for two workers."""
    values = dict(
        name="tiny",
        characters="ABC27#@Ж→",
        image_counts=(1, 60, 110, 10, 11, 101, 100, 140, 3),
        num_train_images=150,
        num_val_images=24,
        val_images_per_category=10,
        image_size=80,
        object_size=(16.0, 28.0),
        seed=5,
        not_exhaustive_rate=0.1,
        unlisted_rate=0.2,
        train_negatives=(1, 3),
        val_negatives=(2, 5),
    )
    return GlyphSpec(**{**values, **changes})


def one_image_spec(**changes) -> GlyphSpec:
    """Just enough to draw single images from."""
    values = dict(
        name="few",
        characters="ABCDEF",
        image_counts=(30,) * 6,
        num_train_images=40,
        num_val_images=40,
        val_images_per_category=30,
        image_size=96,
        object_size=(18.0, 30.0),
    )
    return GlyphSpec(**{**values, **changes})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Both splits of the tiny spec, rendered in this process: (spec, {split: (json content, paths)})."""
    spec, folder = tiny_spec(), tmp_path_factory.mktemp("glyph")
    splits = {}
    for split in ("train", "val"):
        paths = build_glyph_dataset(spec, split, folder / split, num_workers=1, progress=False)
        splits[split] = (json.loads(Path(paths.json_file).read_text()), paths)
    return spec, splits


def leftovers(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if ".rendering" in entry.name]


# ----- the recipe -------------------------------------------------------------------------------


def test_long_tailed_image_counts_have_the_groups_asked_for():
    counts = np.array(long_tailed_image_counts(24, 22, 14, max_count=620))
    assert np.histogram(counts, [1, 11, 101, 10**6])[0].tolist() == [24, 22, 14]
    assert counts.min() == 1 and counts.max() == 620 and (np.diff(counts) >= 0).all()
    with pytest.raises(ValueError, match="max_count"):
        long_tailed_image_counts(1, 1, 1, max_count=100)


def test_lvis_v1_counts_keep_rare_and_common_and_the_order_of_frequent(shared_dir):
    real = json.loads((shared_dir / "data" / "lvis_v1_train_cat_info.json").read_text())
    real = sorted(real, key=lambda row: row["id"])
    counts = lvis_v1_image_counts(max_count=300)
    assert len(counts) == len(real) == 1203
    groups = Counter("r" if n <= 10 else "c" if n <= 100 else "f" for n in counts)
    assert groups == {"r": 337, "c": 461, "f": 405}
    for row, count in zip(real, counts):
        if row["frequency"] == "f":
            assert 101 <= count <= min(300, row["image_count"])
        else:
            assert count == row["image_count"]
    frequent = sorted((row["image_count"], n) for row, n in zip(real, counts) if row["frequency"] == "f")
    assert (np.diff([n for _, n in frequent]) >= 0).all() and frequent[-1][1] == 300


@pytest.mark.parametrize("base, groups", [("glyph_lvis", (24, 22, 14)), ("glyph_lvis_1203", (337, 461, 405))])
def test_predefined_plans_have_the_profile_they_promise(base, groups):
    spec = PREDEFINED_SPECS[base]()
    assert spec.num_categories == sum(groups) == len(set(spec.characters))
    images = {"train": np.zeros(spec.num_categories, int), "val": np.zeros(spec.num_categories, int)}
    ids = set()
    for split, counts in images.items():
        plans = plan_split(spec, split)
        assert len(plans) == spec.num_images(split)
        ids.update(plan.image_id for plan in plans)
        for plan in plans:
            counts[sorted(set(plan.annotated))] += 1
    assert tuple(images["train"]) == spec.image_counts
    assert [int(((images["train"] > low) & (images["train"] <= high)).sum()) for low, high in
            ((0, 10), (10, 100), (100, 10**9))] == list(groups)  # fmt: skip
    assert (images["val"] >= 10).all() and len(set(images["val"])) == 1
    assert len(ids) == spec.num_train_images + spec.num_val_images, "an image id stands for two images"


@pytest.mark.parametrize("base, limit, step", [("glyph_lvis", 0.94, 10.0), ("glyph_lvis_1203", 0.911, 20.0)])
def test_no_two_characters_look_alike(base, limit, step):
    spec = PREDEFINED_SPECS[base]()
    faces = spec.train_faces + (spec.val_only_faces if base == "glyph_lvis" else ())
    similarity = vocabulary.glyph_similarity(spec.characters, faces, step=step)
    worst = np.unravel_index(similarity.argmax(), similarity.shape)
    assert similarity.max() < limit, [spec.characters[i] for i in worst]


def test_look_alikes_are_found():
    """Latin and Cyrillic A, a capital O and a small one, strokes that differ by a turn, E and F."""
    similarity = vocabulary.glyph_similarity
    assert similarity("A\u0410", ["DejaVuSans-Bold"])[0, 1] > 0.99
    assert similarity("Oo", ["DejaVuSans-Bold"])[0, 1] > 0.95
    assert similarity("/|", ["DejaVuSans-Bold"])[0, 1] > 0.95
    assert similarity("/|", ["DejaVuSans-Bold"], max_rotation=0)[0, 1] < 0.7
    assert similarity("B\u2192", ["DejaVuSans-Bold"])[0, 1] < 0.75
    assert similarity("EF", ["DejaVuSans-Bold", "DejaVuSerif-Bold"])[0, 1] > 0.93


def test_every_character_has_its_faces():
    laptop = vocabulary.GlyphAtlas(PREDEFINED_SPECS["glyph_lvis"]())
    assert all(len(faces) == 4 for faces in laptop.train_faces)
    assert all(len(faces) == 2 for faces in laptop.val_only_faces)
    large = vocabulary.GlyphAtlas(PREDEFINED_SPECS["glyph_lvis_1203"]())  # raises where a character has none
    assert sum(len(faces) >= 1 for faces in large.val_only_faces) > 1100
    assert min(map(len, large.train_faces)) >= 2


def test_glyph_bitmaps_fill_their_frame():
    for character in "A→.Ж":
        bitmap = vocabulary.glyph_bitmap("DejaVuSans-Bold", character, 64)
        rows, columns = np.flatnonzero(bitmap.max(1) > 64), np.flatnonzero(bitmap.max(0) > 64)
        longer = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
        assert bitmap.shape == (64, 64) and bitmap.dtype == np.uint8 and 61 <= longer <= 64
        assert abs(rows[0] + rows[-1] - 63) <= 2 and abs(columns[0] + columns[-1] - 63) <= 2


def test_missing_faces_and_characters_are_named():
    with pytest.raises(FileNotFoundError, match="NoSuchFace.ttf.*DejaVuSans-Bold.*matplotlib"):
        vocabulary.face_path("NoSuchFace")
    with pytest.raises(ValueError, match="U\\+4E2D"):
        vocabulary.GlyphAtlas(one_image_spec(characters="ABCDE中"))
    with pytest.raises(ValueError, match="U\\+4E2D"):
        vocabulary.glyph_bitmap("DejaVuSans-Bold", "中", 32)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(characters="AACDEF"), "characters"),
        (dict(image_counts=(1, 2)), "2 image_counts for 6 characters"),
        (dict(image_counts=(41,) * 6), "between 1 and the number of images"),
        (dict(image_counts=(0,) * 6), "between 1"),
        (dict(val_images_per_category=50), "val_images_per_category"),
        (dict(object_size=(60, 90)), "object_size"),
        (dict(object_size=(30, 20)), "object_size"),
        (dict(min_visible=1.5), "min_visible"),
        (dict(glyph_contrast=0.9), "glyph_contrast"),
        (dict(glyph_scale=(0.5, 0.95)), "glyph_scale"),
        (dict(train_faces=()), "train_faces"),
        (dict(val_only_faces=("DejaVuSans-Bold",)), "both"),
        (dict(name="a/b"), "folder"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        one_image_spec(**changes)


def test_too_many_objects_for_the_images_is_an_error_with_a_remedy():
    with pytest.raises(ValueError, match="do not fit on 40 train images.*objects_per_image"):
        plan_split(one_image_spec(objects_per_image=(2, 3)), "train")
    crowded = one_image_spec(objects_per_image=(40, 40), min_visible=0.9)
    with pytest.raises(RuntimeError, match="no room for 4\\d objects.*lower objects_per_image"):
        SceneRenderer(crowded).render(plan_split(crowded, "train")[0], "train")
    with pytest.raises(ValueError, match="split"):
        plan_split(one_image_spec(), "test")


def test_the_fingerprint_depends_on_every_field(monkeypatch):
    spec = tiny_spec()
    changed = {}
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if field.name == "characters":
            value = value[::-1]
        elif field.name in ("image_counts", "train_faces", "val_only_faces"):
            value = value[::-1]
        elif isinstance(value, tuple):
            value = (value[0], value[1] * 1.01)
        elif isinstance(value, str):
            value += "x"
        else:
            value = value + 1 if isinstance(value, int) else value * 0.9
        changed[field.name] = dataclasses.replace(spec, **{field.name: value}).fingerprint()
    assert len({spec.fingerprint(), *changed.values()}) == len(changed) + 1
    assert GlyphSpec(**json.loads(json.dumps(spec.to_dict()))) == spec  # what workers are sent
    before = spec.fingerprint()
    monkeypatch.setattr("lt_det.data.datasets.glyph_lvis.spec.RECIPE_VERSION", 10**6)
    assert spec.fingerprint() != before


# ----- the json ---------------------------------------------------------------------------------


def test_measured_counts_are_the_planned_ones(tiny):
    spec, splits = tiny
    train = splits["train"][0]
    pairs = {(row["image_id"], row["category_id"]) for row in train["annotations"]}
    images = Counter(category for _, category in pairs)
    instances = Counter(row["category_id"] for row in train["annotations"])
    for split in ("train", "val"):  # both splits carry the counts of training
        for category in splits[split][0]["categories"]:
            assert category["image_count"] == images[category["id"]] == spec.image_counts[category["id"] - 1]
            assert category["instance_count"] == instances[category["id"]] >= category["image_count"]
            assert category["frequency"] == "rcf"[np.searchsorted([10, 100], category["image_count"])]
    assert Counter(c["frequency"] for c in train["categories"]) == {"r": 3, "c": 3, "f": 3}
    names = [c["name"] for c in train["categories"]]
    assert len(set(names)) == 9 and names[:2] == ["latin_capital_letter_a", "latin_capital_letter_b"]


def test_validation_has_ten_instances_of_every_category(tiny):
    spec, splits = tiny
    instances = Counter(row["category_id"] for row in splits["val"][0]["annotations"])
    assert len(instances) == spec.num_categories and min(instances.values()) >= 10


def test_federated_fields_are_consistent_with_what_was_drawn(tiny):
    spec, splits = tiny
    seen = Counter()
    for split, (content, _) in splits.items():
        plans = {plan.image_id: plan for plan in plan_split(spec, split)}
        annotated = {image["id"]: [] for image in content["images"]}
        for row in content["annotations"]:
            annotated[row["image_id"]].append(row["category_id"])
        for image in content["images"]:
            plan, positives = plans[image["id"]], set(annotated[image["id"]])
            negatives = set(image["neg_category_ids"])
            not_exhaustive = set(image["not_exhaustive_category_ids"])
            hidden = {category + 1 for category in plan.unannotated}
            drawn = positives | hidden
            assert not negatives & drawn, "a category that is verified absent is there"
            assert not_exhaustive <= positives
            assert not_exhaustive <= hidden, "not exhaustive, but every instance is annotated"
            assert sorted(annotated[image["id"]]) == sorted(c + 1 for c in plan.annotated)
            low, high = spec.train_negatives if split == "train" else spec.val_negatives
            assert min(low, 9 - len(drawn)) <= len(negatives) <= high
            seen["not exhaustive"] += len(not_exhaustive)
            seen["unlisted"] += len(hidden - positives)
            seen["objects"] += len(plan.annotated) + len(plan.unannotated)
    assert seen["not exhaustive"] > 10 and seen["unlisted"] > 10
    # Six objects an image, one pair in ten and one image in five: 5 + 3 in a hundred objects and a bit.
    assert (seen["not exhaustive"] + seen["unlisted"]) / seen["objects"] < 0.15


def test_annotations_agree_with_pycocotools(tiny):
    _, splits = tiny
    for content, _ in splits.values():
        ids = [row["id"] for row in content["annotations"]]
        assert ids == list(range(1, len(ids) + 1))
        for row in content["annotations"]:
            rle = mask_util.merge(mask_util.frPyObjects(row["segmentation"], 80, 80))
            assert row["area"] == mask_util.area(rle) > 0
            assert row["bbox"] == mask_util.toBbox(rle).tolist()
            points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in row["segmentation"]])
            x, y, w, h = row["bbox"]
            assert [x, y] == points.min(0).tolist() and [x + w, y + h] == points.max(0).tolist()
            assert all(isinstance(v, float) for polygon in row["segmentation"] for v in polygon)


def test_the_lvis_api_and_detectron2_load_it(tiny):
    lvis = pytest.importorskip("lvis")
    from detectron2.data.datasets.lvis import load_lvis_json

    _, splits = tiny
    for content, paths in splits.values():
        api = lvis.LVIS(paths.json_file)
        assert len(api.get_img_ids()) == len(content["images"])
        assert len(api.get_ann_ids()) == len(content["annotations"])
        records = load_lvis_json(paths.json_file, paths.image_root + "/")  # it puts no slash between
        assert sum(len(record["annotations"]) for record in records) == len(content["annotations"])
        for record in records:
            picture = cv2.imread(record["file_name"])
            assert picture is not None and picture.shape == (record["height"], record["width"], 3)
        for image in content["images"]:
            assert os.path.isfile(os.path.join(paths.image_root, image["file_name"]))


# ----- the pictures -----------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.floats(0.1, 0.95), st.integers(1, 3))
def test_polygons_rasterise_to_the_very_mask(seed, density, zoom):
    """Random masks have holes, islands, and pixels that touch at corners only."""
    mask = (np.random.default_rng(seed).random((9, 11)) < density).astype(np.uint8)
    mask = np.kron(mask, np.ones((zoom, zoom), np.uint8))
    if mask.any():
        assert np.array_equal(polygons_to_mask(mask_to_polygons(mask), *mask.shape), mask)
    else:
        assert mask_to_polygons(mask) == []


def test_polygons_of_a_ring_and_of_a_square():
    ring = np.ones((6, 6), np.uint8)
    ring[2:4, 2:4] = 0
    polygons = mask_to_polygons(ring)
    assert len(polygons) == 2 and np.array_equal(polygons_to_mask(polygons, 6, 6), ring)
    square = np.zeros((6, 8), np.uint8)
    square[1:3, 2:7] = 1
    (polygon,) = mask_to_polygons(square)
    assert sorted(zip(polygon[::2], polygon[1::2])) == [(2.0, 1.0), (2.0, 3.0), (7.0, 1.0), (7.0, 3.0)]


def test_masks_are_exact_disjoint_and_mostly_visible():
    spec = one_image_spec(objects_per_image=(6, 9))
    renderer = SceneRenderer(spec)
    occluded = 0
    for plan in plan_split(spec, "train")[:12]:
        image = renderer.render(plan, "train")
        assert image.pixels.shape == (96, 96, 3) and image.pixels.dtype == np.uint8
        assert Counter(o.category for o in image.objects) == Counter(plan.annotated + plan.unannotated)
        assert sum(o.mask.astype(int) for o in image.objects).max() == 1, "two objects claim a pixel"
        for item in image.objects:
            assert item.visible >= spec.min_visible and item.glyph_visible >= spec.min_glyph_visible
            occluded += item.visible < 0.95
        annotated = [o for o in image.objects if o.is_annotated]
        rows = image.annotations()
        assert [row[0] for row in rows] == [o.category for o in annotated]
        for item, (_, polygons, _, area) in zip(annotated, rows):
            assert np.array_equal(polygons_to_mask(polygons, 96, 96), item.mask)
            assert area == item.mask.sum()
    assert occluded > 5, "nothing ever occludes anything"


def test_the_silhouette_says_nothing_of_the_category():
    """Other characters in the same places leave every mask as it is; the pictures differ."""
    masks, pixels = [], []
    for characters in ("ABCDEF", "@#Ж→∫%"):
        spec = one_image_spec(characters=characters, min_glyph_visible=0.0, blank_bodies=(0, 0))
        renderer = SceneRenderer(spec)
        images = [renderer.render(plan, "train") for plan in plan_split(spec, "train")[:6]]
        masks.append(np.stack([item.mask for image in images for item in image.objects]))
        pixels.append(np.stack([image.pixels for image in images]))
    assert np.array_equal(*masks)
    assert not np.array_equal(*pixels)


def test_some_faces_appear_in_validation_only():
    spec = one_image_spec(unseen_face_rate=0.3)
    renderer, faces = SceneRenderer(spec), {}
    for split in ("train", "val"):
        images = [renderer.render(plan, split) for plan in plan_split(spec, split)]
        faces[split] = Counter(item.face for image in images for item in image.objects)
    assert set(faces["train"]) == set(spec.train_faces)
    assert set(faces["val"]) == set(spec.train_faces) | set(spec.val_only_faces)
    total = sum(faces["val"].values())
    unseen = sum(faces["val"][face] for face in spec.val_only_faces)
    assert abs(unseen / total - 0.3) < 4 * (0.3 * 0.7 / total) ** 0.5  # four standard deviations


def test_characters_stand_out_from_their_bodies():
    """Between the brightest and the darkest tenth of a body there is the contrast asked for."""
    plain = dict(noise=0.0, lighting=0.0, shadow=0.0, min_visible=1.0, min_glyph_visible=1.0)
    for contrast in (0.3, 0.55):
        spec = one_image_spec(characters="ABMWS#", image_counts=(20,) * 6, val_images_per_category=20,
                              glyph_contrast=contrast, **plain)  # fmt: skip
        renderer = SceneRenderer(spec)
        for plan in plan_split(spec, "train")[:8]:
            image = renderer.render(plan, "train")
            luminance = image.pixels @ np.array([0.299, 0.587, 0.114]) / 255
            for item in image.objects:
                core = cv2.erode(item.mask.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
                low, high = np.quantile(luminance[core], [0.08, 0.92])
                assert high - low > contrast - 0.12  # anti-aliased strokes of a few pixels lose some


def test_images_do_not_depend_on_each_other():
    spec = one_image_spec()
    plans = plan_split(spec, "val")
    after_others = SceneRenderer(spec)
    for plan in plans[:5]:
        after_others.render(plan, "val")
    first, second = after_others.render(plans[20], "val"), SceneRenderer(spec).render(plans[20], "val")
    assert np.array_equal(first.pixels, second.pixels) and first.annotations() == second.annotations()
    other_seed = dataclasses.replace(spec, seed=spec.seed + 1)
    assert not np.array_equal(first.pixels, SceneRenderer(other_seed).render(plans[20], "val").pixels)


# ----- caches -----------------------------------------------------------------------------------


def assert_same_files(first: Path, second: Path) -> None:
    names = sorted(str(path.relative_to(first)) for path in first.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(second)) for path in second.rglob("*") if path.is_file())
    _, different, errors = filecmp.cmpfiles(first, second, names, shallow=False)
    assert not different and not errors


def test_two_workers_give_the_same_bytes_as_none(tiny, tmp_path, monkeypatch):
    spec, splits = tiny
    started = []
    popen = subprocess.Popen

    def start(*arguments, **options):
        started.append(popen(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(pictures.subprocess, "Popen", start)
    build_glyph_dataset(spec, "train", tmp_path / "two", num_workers=2, progress=False)
    assert len(started) == 2 and all(worker.poll() is not None for worker in started)
    assert_same_files(Path(splits["train"][1].image_root), tmp_path / "two")


def test_ensure_renders_once_and_finds_it_again(tmp_path, monkeypatch):
    spec = tiny_spec(num_val_images=20)
    monkeypatch.setenv("LT_DET_CACHE", str(tmp_path / "cache"))
    first = ensure_glyph_dataset(spec, "val", progress=False)
    assert str(first.image_root).startswith(str(tmp_path / "cache")) and os.path.isfile(first.json_file)
    assert spec.fingerprint() in first.image_root
    monkeypatch.setattr(build, "render_pictures", lambda *a, **k: pytest.fail("rendered again"))
    assert ensure_glyph_dataset(spec, "val", progress=False) == first
    with pytest.raises(pytest.fail.Exception, match="rendered again"):
        ensure_glyph_dataset(dataclasses.replace(spec, noise=1.0), "val", progress=False)
    with pytest.raises(FileExistsError, match="exists"):
        build_glyph_dataset(spec, "val", first.image_root)


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file.*LT_DET_CACHE"):
        ensure_glyph_dataset(tiny_spec(), "val", tmp_path / "file", progress=False)


def test_unknown_names_are_refused():
    for name in ("glyph_lvis", "glyph_lvis_test", "glyph_lvis_99_train", "coco_train"):
        with pytest.raises(ValueError, match="glyph_lvis_1203_val"):
            ensure_glyph_lvis(name)


def test_a_rendering_that_fails_leaves_nothing(tmp_path, monkeypatch):
    spec, render = tiny_spec(), SceneRenderer.render

    def fails_halfway(self, plan, split):
        if plan.image_id == 160:
            raise RuntimeError("halfway")
        return render(self, plan, split)

    monkeypatch.setattr(SceneRenderer, "render", fails_halfway)
    with pytest.raises(RuntimeError, match="halfway"):
        ensure_glyph_dataset(spec, "val", tmp_path, num_workers=1, progress=False)
    assert [entry.name for entry in tmp_path.iterdir() if not entry.name.endswith(".lock")] == []
    monkeypatch.undo()
    paths = ensure_glyph_dataset(spec, "val", tmp_path, num_workers=1, progress=False)
    assert os.path.isfile(paths.json_file)


def test_an_error_in_a_worker_reaches_the_caller(tmp_path):
    crowded = tiny_spec(objects_per_image=(30, 30), min_visible=0.95, object_size=(24.0, 28.0))
    with pytest.raises(RuntimeError, match="no room for 3"):
        build_glyph_dataset(crowded, "train", tmp_path / "out", num_workers=2, progress=False)
    assert list(tmp_path.iterdir()) == []


# Loads the sub-package alone, as workers do: importing torch would take most of these tests' time.
_RENDER = pictures._WORKER.replace(
    "from glyph_lvis.pictures import serve\nserve()",
    """
import json, logging
logging.basicConfig(level=logging.INFO, format="%(message)s")
from glyph_lvis import GlyphSpec, ensure_glyph_dataset
spec = GlyphSpec(**json.loads(sys.argv[2]))
print(ensure_glyph_dataset(spec, "train", sys.argv[3], num_workers=1, progress=False).json_file)
""",
)


def start_rendering(spec: GlyphSpec, root: Path) -> subprocess.Popen:
    package = str(Path(pictures.__file__).parent)
    command = [sys.executable, "-c", _RENDER, package, json.dumps(spec.to_dict()), str(root)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_killed_rendering_is_not_taken_for_complete_and_is_cleared_away(tmp_path):
    root = tmp_path / "cache"
    root.mkdir()
    spec = tiny_spec(num_train_images=700)
    process = start_rendering(spec, root)
    deadline = time.monotonic() + 60
    while len(list(root.glob("*/train/*.jpg"))) < 5:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert len(leftovers(root)) == 1 and not list(root.glob(f"*{spec.fingerprint()}"))
    paths = ensure_glyph_dataset(spec, "train", root, num_workers=1, progress=False)
    assert len(list(Path(paths.image_root).glob("train/*.jpg"))) == 700
    assert leftovers(root) == []


def test_only_abandoned_folders_are_cleared_away(tmp_path):
    """Those of this host's dead processes, and old ones of other hosts; not of other data sets."""
    finished = subprocess.Popen([sys.executable, "-c", ""])
    finished.wait()
    host = build.socket.gethostname()
    names = {
        f"a.rendering-{host}-{finished.pid}": False,
        f"a.rendering-{host}-{os.getpid()}": True,
        "a.rendering-elsewhere-1": True,
        "a.rendering-long-ago-elsewhere-1": False,
        f"ab.rendering-{host}-{finished.pid}": True,
    }
    for name in names:
        (tmp_path / name / "train").mkdir(parents=True)
        if "long-ago" in name:
            for folder in (tmp_path / name / "train", tmp_path / name):
                os.utime(folder, (1e9, 1e9))
    build._remove_abandoned(tmp_path / "a")
    assert {name: (tmp_path / name).exists() for name in names} == names


def test_two_processes_at_once_render_once(tiny, tmp_path):
    spec, splits = tiny
    root = tmp_path / "cache"
    root.mkdir()
    processes = [start_rendering(spec, root) for _ in range(2)]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    json_files = {out.strip() for out, _ in results}
    assert len(json_files) == 1
    assert sum(err.count("Rendered 150 images") for _, err in results) == 1
    assert leftovers(root) == []
    assert_same_files(Path(splits["train"][1].image_root), Path(json_files.pop()).parent)


def test_without_file_locks_the_first_to_finish_wins(tmp_path, monkeypatch, caplog):
    """A second process completes the same folder while this one renders."""
    spec = tiny_spec(num_val_images=20)
    monkeypatch.setattr(build, "fcntl", None)
    render, calls = build.render_pictures, []

    def overtaken(spec_, split, plans, folder, **options):
        if not calls:
            calls.append(folder)
            target = Path(str(folder.parent).split(".rendering")[0])
            other = build_glyph_dataset(spec, "val", tmp_path / "other", num_workers=1, progress=False)
            os.rename(other.image_root, target)
        return render(spec_, split, plans, folder, **options)

    monkeypatch.setattr(build, "render_pictures", overtaken)
    with caplog.at_level(logging.INFO):
        paths = ensure_glyph_dataset(spec, "val", tmp_path / "cache", num_workers=1, progress=False)
    assert calls and os.path.isfile(paths.json_file) and leftovers(tmp_path / "cache") == []


def test_workers_do_not_import_torch():
    """They would take seconds to start, each, for a rendering of seconds."""
    show = "\nprint({'torch', 'detectron2', 'lt_det'} & set(sys.modules))"
    probe = pictures._WORKER.replace("\nserve()", show)
    assert probe != pictures._WORKER
    command = [sys.executable, "-c", probe, str(Path(pictures.__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
