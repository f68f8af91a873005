import sys

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_lvis_json, register_coco_instances, register_lvis_instances

from lt_det.data import (
    ClassStatistics,
    MappedDataset,
    open_dataset,
    prepare_dataset,
    register_builtin,
    register_dataset,
    register_from_config,
    require_dataset,
)
from lt_det.data.datasets import register

pytestmark = pytest.mark.usefixtures("clean_catalogs", "builtin")


@pytest.fixture
def builtin(clean_catalogs, monkeypatch):
    """Detectron2's LVIS entries loaded by lt_det, for the test alone."""
    monkeypatch.setattr(DatasetCatalog, "data", dict(DatasetCatalog.data))
    register_builtin()


def test_registering_reads_nothing_and_loading_completes_the_metadata(lvis_content, write_json, lvis_images, tmp_path):
    register_dataset("register_a", tmp_path / "later.json", lvis_images)  # the file does not exist yet
    metadata = MetadataCatalog.get("register_a")
    assert metadata.json_file == str(tmp_path / "later.json") and metadata.image_root == str(lvis_images)
    assert metadata.get("thing_classes") is None
    write_json(lvis_content, "later.json")
    dicts = DatasetCatalog.get("register_a")
    assert len(dicts) == 3
    assert metadata.thing_classes == ["ant", "bee", "cat", "dog"]
    assert metadata.thing_dataset_id_to_contiguous_id == {3: 0, 5: 1, 7: 2, 9: 3}
    assert metadata.evaluator_type == "lvis"
    assert [c["image_count"] for c in metadata.class_image_count] == [2, 1, 0, 1]
    assert [c["id"] for c in metadata.class_image_count] == [3, 5, 7, 9]
    assert DatasetCatalog.get("register_a") == dicts


def test_file_without_federated_fields_is_coco(lvis_content, write_json, lvis_images):
    for image in lvis_content["images"]:
        del image["neg_category_ids"], image["not_exhaustive_category_ids"]
    register_dataset("register_coco", write_json(lvis_content), lvis_images)
    prepare_dataset("register_coco")
    assert MetadataCatalog.get("register_coco").evaluator_type == "coco"


def test_registering_again(write_json, lvis_content, lvis_images, tmp_path):
    path = write_json(lvis_content)
    entries = [["register_b", str(path), str(lvis_images)]]
    register_from_config(entries)
    register_from_config(entries)
    with pytest.raises(ValueError, match="'register_b' is taken already by .*annotations.json"):
        register_dataset("register_b", path, tmp_path)
    with pytest.raises(ValueError, match="'coco_2017_train' is taken already"):
        register_dataset("coco_2017_train", path, lvis_images)


@pytest.mark.parametrize("entry", ["name", ["name", "json"], ["name", "json", 3], ["name", "", "images"]])
def test_config_entries_that_are_not_triples(entry):
    with pytest.raises(ValueError, match="DATASETS.REGISTER is a list of .*triples"):
        register_from_config([entry])


def test_missing_files(write_json, lvis_content, lvis_images, tmp_path):
    register_dataset("register_c", tmp_path / "absent.json", tmp_path / "nowhere")
    for call in (require_dataset, DatasetCatalog.get):
        with pytest.raises(FileNotFoundError, match="no annotation file .*absent.json and no image folder .*REGISTER"):
            call("register_c")
    with pytest.raises(FileNotFoundError, match="absent.json"):
        prepare_dataset("register_c")
    register_dataset("register_d", write_json(lvis_content), lvis_images)
    require_dataset("register_d")


def test_unknown_name_shows_similar_ones():
    with pytest.raises(KeyError, match="no data set 'glyph_lvis_trian'.*glyph_lvis_train.*DATASETS.REGISTER"):
        require_dataset("glyph_lvis_trian")


def test_missing_lvis_says_what_to_download(monkeypatch, tmp_path):
    metadata = MetadataCatalog.get("lvis_v1_train")
    monkeypatch.setitem(metadata.__dict__, "json_file", str(tmp_path / "lvis" / "lvis_v1_train.json"))
    for call in (require_dataset, DatasetCatalog.get):
        with pytest.raises(FileNotFoundError, match="LVIS v1 annotations from https.*train2017.*DETECTRON2_DATASETS"):
            call("lvis_v1_train")


def test_detectron2_lvis_entries_load_the_same_without_lvis(monkeypatch, lvis_content, write_json, lvis_images):
    pytest.importorskip("lvis")
    # Detectron2 takes category id - 1 and the classes of its own metadata, so the file needs LVIS's 1203.
    lvis_content["categories"] = [{"id": i, "name": f"class {i}"} for i in range(1, 1204)]
    path = write_json(lvis_content)
    expected = load_lvis_json(str(path), f"{lvis_images}/", "lvis_v1_train")
    metadata = MetadataCatalog.get("lvis_v1_train")
    monkeypatch.setitem(metadata.__dict__, "json_file", str(path))
    monkeypatch.setitem(metadata.__dict__, "image_root", f"{lvis_images}/")
    monkeypatch.setitem(sys.modules, "lvis", None)  # importing it now fails
    assert DatasetCatalog.get("lvis_v1_train") == expected
    assert len(metadata.thing_classes) == 1203


def test_cocofied_entries_keep_their_own_class_map(monkeypatch, lvis_content, write_json, lvis_images):
    pytest.importorskip("lvis")
    id_map = MetadataCatalog.get("lvis_v0.5_train_cocofied").thing_dataset_id_to_contiguous_id
    lvis_content["categories"] = [{"id": i, "name": f"class {i}"} for i in id_map]
    path = write_json(lvis_content)
    expected = load_lvis_json(str(path), f"{lvis_images}/", "lvis_v0.5_train_cocofied")
    metadata = MetadataCatalog.get("lvis_v0.5_train_cocofied")
    monkeypatch.setitem(metadata.__dict__, "json_file", str(path))
    monkeypatch.setitem(metadata.__dict__, "image_root", f"{lvis_images}/")
    assert DatasetCatalog.get("lvis_v0.5_train_cocofied") == expected


def test_entries_replaced_by_others_are_left_alone(monkeypatch):
    monkeypatch.setitem(DatasetCatalog.data, "lvis_v1_val", lambda: ["mine"])
    register_builtin()
    assert DatasetCatalog.get("lvis_v1_val") == ["mine"]


def test_made_data_sets_are_made_on_first_use(lvis_content, write_json, lvis_images):
    made = []

    def locate():
        made.append(1)
        return str(write_json(lvis_content)), str(lvis_images)

    register._register("register_made", register._Entry(locate=locate, files=None))
    require_dataset("register_made")
    assert not made and MetadataCatalog.get("register_made").get("json_file") is None
    prepare_dataset("register_made")
    metadata = MetadataCatalog.get("register_made")
    assert made and metadata.image_root == str(lvis_images) and metadata.evaluator_type == "lvis"
    assert len(DatasetCatalog.get("register_made")) == 3


def test_statistics_of_a_made_data_set_make_it(lvis_content, write_json, lvis_images):
    def locate():
        return str(write_json(lvis_content)), str(lvis_images)

    register._register("register_counted", register._Entry(locate=locate, files=None))
    statistics = ClassStatistics.from_metadata("register_counted")
    assert statistics.instance_count.tolist() == [3, 1, 0, 2]


def test_other_peoples_registrations_are_mapped(lvis_content, write_json, lvis_images):
    path = str(write_json(lvis_content))
    register_lvis_instances("register_theirs_lvis_v1", {}, path, f"{lvis_images}/")
    register_coco_instances("register_theirs_coco", {}, str(coco_file(lvis_content, write_json)), f"{lvis_images}")
    for name in ("register_theirs_lvis_v1", "register_theirs_coco"):
        ours = open_dataset(name)
        assert isinstance(ours, MappedDataset)
        assert list(ours) == DatasetCatalog.get(name)


def coco_file(content, write_json):
    images = [
        {
            "id": i["id"],
            "width": i["width"],
            "height": i["height"],
            "file_name": "/".join(i["coco_url"].split("/")[-2:]),
        }
        for i in content["images"]
    ]
    return write_json({**content, "images": images}, "coco.json")


def test_data_sets_in_another_form_stay_as_they_are():
    DatasetCatalog.register("register_own_form", lambda: ["mine"])
    assert open_dataset("register_own_form") == ["mine"]


def _import_anew():
    for name in [name for name in sys.modules if name.partition(".")[0] == "lt_det"]:
        del sys.modules[name]
    before = dict(DatasetCatalog.data), sorted(MetadataCatalog.keys())
    assert not [name for name in before[0] if "glyph" in name]
    sys.modules["lvis"] = None
    import lt_det.data

    assert lt_det.data.register_builtin is not register_builtin
    assert (dict(DatasetCatalog.data), sorted(MetadataCatalog.keys())) == before
    assert "lt_det.data.datasets.glyph_lvis" not in sys.modules
    lt_det.data.register_builtin()
    added = set(DatasetCatalog.keys()) - set(before[0])
    assert added == set(lt_det.data.datasets.GLYPH_LVIS_NAMES), added
    assert DatasetCatalog.data["lvis_v1_train"] is not before[0]["lvis_v1_train"]


def test_import_changes_nothing_and_needs_neither_lvis_nor_the_glyph_renderer(server):
    process = server.Process(target=_import_anew)
    process.start()
    process.join(120)
    assert process.exitcode == 0
