import json
import os

import numpy as np
import pytest
from detectron2.data import MetadataCatalog

from lt_det.data import ClassStatistics, load_lvis_or_coco_json, register_dataset


def make(image_count=(4, 40, 400), instance_count=(5, 50, 500), num_images=1000, names="abc", **fields):
    return ClassStatistics(image_count, instance_count, num_images, tuple(names), **fields)


# ---------------------------------------------------------------- fields


def test_fields_are_int64_copies_that_cannot_be_written():
    counts = np.array([4, 40, 400], dtype=np.int32)
    statistics = make(image_count=counts)
    counts[0] = 7
    assert statistics.image_count.dtype == np.int64 and statistics.image_count.tolist() == [4, 40, 400]
    with pytest.raises(ValueError, match="read-only"):
        statistics.image_count[0] = 1
    with pytest.raises(AttributeError):
        statistics.num_images = 3
    assert statistics.num_classes == 3


@pytest.mark.parametrize(
    "fields, complaint",
    [
        (dict(names=""), "names is empty"),
        (dict(image_count=(1, 2)), r"image_count has shape \(2,\), but there are 3 class names"),
        (dict(image_count=(1, -2, 3)), r"image_count is negative for 1 class: b \(1\)"),
        (dict(image_count=(1.0, 2.5, 3.0)), r"image_count is not a whole number for 1 class: b \(1\)"),
        (dict(image_count=(1.0, float("nan"), 3.0)), r"image_count is not finite for 1 class: b \(1\)"),
        (dict(image_count=("1", "2", "3")), "image_count must hold numbers"),
        (dict(instance_count=(5, 39, 500)), r"image_count exceeds instance_count for 1 class: b \(1\)"),
        (dict(num_images=399), r"num_images is 399, but image_count is larger for 1 class: c \(2\)"),
        (dict(frequency=("r", "c")), "frequency has 2 entries for 3 classes"),
        (dict(frequency=("r", "c", "x")), "frequency must be 'r', 'c' or 'f'.*'x'"),
    ],
)
def test_bad_fields_are_named(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        make(**fields)


def test_long_lists_of_bad_classes_are_cut_at_ten():
    with pytest.raises(ValueError, match=r"12 classes: 0 \(0\), .*9 \(9\) and 2 more"):
        ClassStatistics([-1] * 12, None, None, tuple(map(str, range(12))))


# ---------------------------------------------------------------- groups


def test_groups_follow_lvis_thresholds_at_their_edges():
    counts = [0, 1, 10, 11, 100, 101]
    statistics = ClassStatistics(counts, counts, 1000, tuple("abcdef"))
    groups = statistics.frequency_groups
    assert {k: v.tolist() for k, v in groups.items()} == {"r": [0, 1, 2], "c": [3, 4], "f": [5]}
    assert groups["r"].dtype == np.int64
    assert {k: v.tolist() for k, v in statistics.groups((1, 10)).items()} == {
        "r": [0, 1],
        "c": [2],
        "f": [3, 4, 5],
    }
    with pytest.raises(ValueError, match="thresholds"):
        statistics.groups((10, 10))


def test_frequency_field_decides_over_counts():
    statistics = make(frequency=("f", "r", "r"))
    assert {k: v.tolist() for k, v in statistics.frequency_groups.items()} == {"r": [1, 2], "c": [], "f": [0]}


def test_groups_of_the_real_lvis_v1(shared_dir):
    statistics = ClassStatistics.from_json(shared_dir / "data" / "lvis_v1_train_cat_info.json")
    for groups in (statistics.frequency_groups, statistics.groups()):
        assert {k: len(v) for k, v in groups.items()} == {"r": 337, "c": 461, "f": 405}
    assert statistics.instance_count.sum() == 1_270_141
    assert statistics.num_images == 100_170


# ---------------------------------------------------------------- priors


def test_prior_by_hand():
    statistics = make(image_count=(1, 3, 4), instance_count=(2, 3, 5)).with_sampled_counts((3.0, 1.0, 12.0))
    np.testing.assert_array_equal(statistics.prior(), [1 / 8, 3 / 8, 4 / 8])
    np.testing.assert_array_equal(statistics.prior("instance_count"), [0.2, 0.3, 0.5])
    np.testing.assert_array_equal(statistics.prior("sampled"), [3 / 16, 1 / 16, 12 / 16])
    assert statistics.prior().dtype == np.float64
    np.testing.assert_allclose(
        statistics.log_adjustment("image_count", 0.5),
        [0.5 * np.log(3 * p) for p in (1 / 8, 3 / 8, 4 / 8)],
        rtol=1e-15,
    )


def test_uniform_counts_give_no_adjustment():
    uniform = ClassStatistics([7] * 5, [7] * 5, 100, tuple("abcde"))
    np.testing.assert_allclose(uniform.log_adjustment(tau=2.0), 0.0, atol=1e-15)


def test_zero_counts_are_an_error_or_clamped():
    counts = [0] * 12 + [4]
    statistics = ClassStatistics(counts, counts, 10, tuple(f"class{i}" for i in range(13)))
    with pytest.raises(
        ValueError,
        match=r"\(image_count is 0\) have no prior: 0 \(class0\), .*9 \(class9\) and 2 more\. Remove.*min_count",
    ):
        statistics.prior()
    np.testing.assert_array_equal(statistics.prior(min_count=1), np.array([1] * 12 + [4]) / 16)
    with pytest.raises(ValueError, match="min_count"):
        statistics.prior(min_count=-1)


def test_priors_that_are_not_there():
    statistics = make(instance_count=None)
    with pytest.raises(ValueError, match="no 'instance_count' counts.*from_json"):
        statistics.prior("instance_count")
    with pytest.raises(ValueError, match="with_sampled_counts"):
        statistics.prior("sampled")
    with pytest.raises(ValueError, match="unknown prior source 'images'; choose one of image_count"):
        statistics.prior("images")


# ---------------------------------------------------------------- sources


def test_from_json_counts_annotations_and_orders_by_id(lvis_content, write_json):
    statistics = ClassStatistics.from_json(write_json(lvis_content))
    assert statistics.names == ("ant", "bee", "cat", "dog")
    assert statistics.image_count.tolist() == [2, 1, 0, 1]
    assert statistics.instance_count.tolist() == [3, 1, 0, 2]
    assert statistics.num_images == 3
    assert statistics.frequency == ("f", "r", "c", "c")


def test_crowds_and_objects_without_a_mask_do_not_count(lvis_content, write_json):
    lvis_content["annotations"][0]["iscrowd"] = 1
    lvis_content["annotations"][5]["segmentation"] = [[1.0, 2.0, 3.0, 4.0]]
    path = write_json(lvis_content)
    statistics = ClassStatistics.from_json(path)
    assert statistics.instance_count.tolist() == [2, 0, 0, 2]
    dicts = load_lvis_or_coco_json(path, "", check_images=False)
    counted = ClassStatistics.from_dataset_dicts(dicts, 4)
    np.testing.assert_array_equal(counted.instance_count, statistics.instance_count)
    np.testing.assert_array_equal(counted.image_count, statistics.image_count)


def four_sources(json_file, image_root, name, tmp_path):
    register_dataset(name, json_file, image_root)
    from_json = ClassStatistics.from_json(json_file)
    dicts = load_lvis_or_coco_json(json_file, image_root, check_images=False)
    from_dicts = ClassStatistics.from_dataset_dicts(dicts, from_json.num_classes, from_json.names)
    from_metadata = ClassStatistics.from_metadata(MetadataCatalog.get(name))
    from_json.to_json(tmp_path / "statistics.json")
    from_file = ClassStatistics.from_file(tmp_path / "statistics.json")
    assert ClassStatistics.read(tmp_path / "statistics.json") == from_file
    return from_json, from_dicts, from_metadata, from_file


def assert_four_agree(sources):
    from_json, from_dicts, from_metadata, from_file = sources
    assert from_json == from_metadata == from_file
    for field in ("image_count", "instance_count"):
        np.testing.assert_array_equal(getattr(from_json, field), getattr(from_dicts, field))
    assert (from_json.num_images, from_json.names) == (from_dicts.num_images, from_dicts.names)


def test_four_sources_agree(lvis_content, write_json, tmp_path, clean_catalogs):
    sources = four_sources(write_json(lvis_content), tmp_path, "statistics_lvis", tmp_path)
    assert_four_agree(sources)
    assert sources[0].image_count.tolist() == [2, 1, 0, 1]


@pytest.mark.parametrize(
    "name, images, instances",
    [
        ("lvis_val_100.json", 100, 977),
        ("taco_annotations.json", 1500, 4784),
        ("lvis_val_64/lvis_val_64.json", 64, 674),
    ],
)
def test_four_sources_agree_on_real_data(shared_dir, tmp_path, clean_catalogs, name, images, instances):
    sources = four_sources(shared_dir / "data" / name, tmp_path, "statistics_real", tmp_path)
    assert_four_agree(sources)
    assert (sources[0].num_images, sources[0].instance_count.sum()) == (images, instances)


def test_category_info_and_metadata_of_detectron2_agree(shared_dir):
    info = shared_dir / "data" / "lvis_v1_train_cat_info.json"
    from_list = ClassStatistics.from_category_info(json.loads(info.read_text()))
    assert from_list == ClassStatistics.from_json(info)
    metadata = MetadataCatalog.get("lvis_v1_train")
    if os.path.isfile(metadata.json_file):
        pytest.skip("the real LVIS v1 is here, which is read in place of the built-in counts")
    builtin = ClassStatistics.from_metadata("lvis_v1_train")
    np.testing.assert_array_equal(builtin.image_count, from_list.image_count)
    assert builtin.instance_count is None and builtin.num_images == 100_170
    assert builtin.names == tuple(metadata.thing_classes)


def test_metadata_may_map_some_categories_in_another_order(lvis_content, write_json, clean_catalogs):
    path = write_json(lvis_content)
    MetadataCatalog.get("statistics_subset").set(
        json_file=str(path), thing_classes=["dog", "ant"], thing_dataset_id_to_contiguous_id={9: 0, 3: 1}
    )
    statistics = ClassStatistics.from_metadata("statistics_subset")
    assert statistics.names == ("dog", "ant") and statistics.instance_count.tolist() == [2, 3]
    assert statistics.frequency == ("c", "f")


def test_metadata_without_counts_says_what_to_do(clean_catalogs):
    with pytest.raises(ValueError, match="No class counts are known for data set 'statistics_none'.*json_file"):
        ClassStatistics.from_metadata("statistics_none")


def test_files_that_are_not_statistics(tmp_path, lvis_content, write_json):
    with pytest.raises(FileNotFoundError, match="no class statistics file"):
        ClassStatistics.from_file(tmp_path / "absent.json")
    with pytest.raises(ValueError, match="from_json"):
        ClassStatistics.from_file(write_json(lvis_content))
    with pytest.raises(ValueError, match="lacks the field 'names'"):
        ClassStatistics.from_file(
            write_json(
                {
                    "format": "lt_det.ClassStatistics",
                    "image_count": [1],
                    "instance_count": [1],
                    "num_images": 1,
                }
            )
        )


def test_to_json_keeps_everything_and_leaves_no_other_file(tmp_path):
    statistics = make(frequency=tuple("rcf")).with_sampled_counts([1.5, 2.25, 1e9])
    path = tmp_path / "sub" / "statistics.json"
    statistics.to_json(path)
    assert ClassStatistics.from_file(path) == statistics
    assert os.listdir(path.parent) == ["statistics.json"]
    assert make(instance_count=None, num_images=None) != statistics


def test_dataset_dicts_with_too_many_classes():
    dicts = [{"image_id": 5, "annotations": [{"category_id": 3}]}]
    with pytest.raises(ValueError, match="Image 5 has category_id 3, but there are 3 classes"):
        ClassStatistics.from_dataset_dicts(dicts, 3)


@pytest.mark.parametrize(
    "change, complaint",
    [
        (
            lambda c: c["annotations"][0].update(category_id=77),
            "not among the file's categories: .77.",
        ),
        (lambda c: c["annotations"][0].update(image_id=77), "not among the file's images: .77."),
        (
            lambda c: c["annotations"][0].pop("category_id"),
            "'annotations' lacks .'category_id'",
        ),
        (
            lambda c: c["categories"].append(dict(id=3, name="again")),
            "ids occur more than once in 'categories': .3.",
        ),
        (lambda c: c["categories"].clear(), "has no categories"),
        (lambda c: c["categories"][0].pop("name"), "every category needs 'id' and 'name'"),
    ],
)
def test_damaged_annotation_files(lvis_content, write_json, change, complaint):
    change(lvis_content)
    with pytest.raises(ValueError, match=complaint):
        ClassStatistics.from_json(write_json(lvis_content))


def test_file_without_annotations(lvis_content, write_json):
    del lvis_content["annotations"]
    statistics = ClassStatistics.from_json(write_json(lvis_content), num_images=1000)
    assert statistics.image_count.tolist() == [400, 4, 11, 40]  # as the categories state
    for category in lvis_content["categories"]:
        del category["image_count"]
    with pytest.raises(ValueError, match="no annotations to count"):
        ClassStatistics.from_json(write_json(lvis_content))
