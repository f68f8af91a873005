"""The generated file has LVIS's shape, and every part of the benchmark runs on it."""

import json
import sys

import numpy as np
import pytest


@pytest.fixture(scope="module")
def benchmarks(repo_dir):
    folder = str(repo_dir / "tools" / "benchmarks")
    sys.path.insert(0, folder)
    import bench_loading
    import lvis_shaped

    yield bench_loading, lvis_shaped
    sys.path.remove(folder)


@pytest.fixture(scope="module")
def small_file(benchmarks, tmp_path_factory):
    return benchmarks[1].write_lvis_shaped(tmp_path_factory.mktemp("shaped") / "a.json", 0.001)


def test_file_of_lvis_shape(benchmarks, small_file, tmp_path):
    _, lvis_shaped = benchmarks
    assert lvis_shaped.write_lvis_shaped(tmp_path / "b.json", 0.001).read_bytes() == small_file.read_bytes()
    content = json.loads(small_file.read_text())
    assert len(content["images"]) == 100 and len(content["categories"]) == 1203
    instances = dict.fromkeys((c["id"] for c in content["categories"]), 0)
    images = {c: set() for c in instances}
    sizes = {i["id"]: (i["width"], i["height"]) for i in content["images"]}
    for annotation in content["annotations"]:
        instances[annotation["category_id"]] += 1
        images[annotation["category_id"]].add(annotation["image_id"])
        points = np.concatenate([np.reshape(p, (-1, 2)) for p in annotation["segmentation"]])
        assert (points >= 0).all() and (points <= sizes[annotation["image_id"]]).all() and len(points) >= 3
        x, y, w, h = annotation["bbox"]
        np.testing.assert_allclose([*points.min(0), *points.max(0)], [x, y, x + w, y + h], atol=0.011)
    for category in content["categories"]:
        assert category["instance_count"] == instances[category["id"]]
        assert category["image_count"] == len(images[category["id"]])


def test_parts_of_the_benchmark(benchmarks, small_file, tmp_path, monkeypatch):
    bench_loading, _ = benchmarks
    monkeypatch.setenv("LT_DET_CACHE", str(tmp_path))
    path = str(small_file)
    theirs, ours = bench_loading.load_detectron2(path), bench_loading.load_ours(path)
    assert theirs["images"] == ours["images"] == 100
    assert bench_loading.use_ours(path)["milliseconds_per_image"] > 0
    assert bench_loading.statistics(path)["classes"] == 1203
