"""The data set page: its numbers by hand, and the page in a browser."""

import dataclasses
import json
import runpy
import sys

import numpy as np
import pytest

from lt_det.data import ClassStatistics, sampler_by_name
from lt_det.data.samplers import expected_counts, instance_aware_repeat_factors, repeat_factors_from_category_frequency
from lt_det.report import commands
from lt_det.report.dataset import inspect_annotations, read_annotations
from lt_det.report.dataset_page import dataset_page


def square(x, y, side):
    return {"bbox": [x, y, side, side], "area": side * side,
            "segmentation": [[x, y, x + side, y, x + side, y + side, x, y + side]]}  # fmt: skip


def write(path, images, annotations, categories):
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


@pytest.fixture(scope="module")
def messy(tmp_path_factory):
    """A small json with one or two of everything that is suspicious. Image 4 and category 40 are empty."""
    images = [
        {
            "id": 1,
            "width": 100,
            "height": 80,
            "file_name": "1.jpg",
            "neg_category_ids": [20, 30, 99],
            "not_exhaustive_category_ids": [10],
        },
        {
            "id": 2,
            "width": 100,
            "height": 80,
            "file_name": "2.jpg",
            "neg_category_ids": [],
            "not_exhaustive_category_ids": [],
        },
        {
            "id": 3,
            "width": 100,
            "height": 80,
            "file_name": "2.jpg",
            "neg_category_ids": [],
            "not_exhaustive_category_ids": [],
        },
        {
            "id": 4,
            "width": 100,
            "height": 80,
            "file_name": "4.jpg",
            "neg_category_ids": [],
            "not_exhaustive_category_ids": [],
        },
    ]
    categories = [
        {"id": 10, "name": "cup", "frequency": "f", "image_count": 3},
        {"id": 20, "name": "<b>ladle</b>", "frequency": "r", "image_count": 9},
        {"id": 30, "name": "plate", "frequency": "c", "image_count": 1},
        {"id": 40, "name": "cup", "frequency": "r", "image_count": 0},
    ]
    rows = [
        (1, 1, 10, square(0, 0, 10)),
        (2, 1, 10, square(0, 0, 10)),  # annotated twice
        (3, 1, 20, square(0, 0, 10)),  # the same box under another category, which the image lists as absent
        (4, 2, 10, square(20, 20, 10)),
        (5, 2, 10, square(95, 20, 10)),  # reaches out of the frame
        (6, 3, 10, {**square(20, 20, 10), "bbox": [20, 20, 0, 10]}),  # no width
        (7, 3, 30, {**square(20, 20, 10), "segmentation": [[20, 20, 30, 30]]}),  # a polygon of two points
        (8, 3, 10, {**square(30, 30, 10), "area": 5000}),  # larger than its box
        (9, 3, 10, square(300, 20, 10)),  # outside
        (10, 9, 10, square(0, 0, 10)),  # no such image
        (11, 3, 77, square(0, 0, 10)),  # no such category
        (12, 3, 10, {**square(1, 1, 10), "bbox": [1, float("nan"), 10, 10]}),
        (13, 3, 10, {**square(50, 50, 0.5)}),
        (8, 2, 30, square(40, 40, 20)),  # an id for the second time
    ]
    annotations = [{"id": i, "image_id": image, "category_id": c, "iscrowd": 0, **o} for i, image, c, o in rows]
    annotations.append({"id": 99, "image_id": 1, "category_id": 10, "bbox": [1, 2, 3]})  # malformed
    return write(tmp_path_factory.mktemp("messy") / "messy.json", images, annotations, categories)


EXPECTED = {
    "malformed": 1, "unknown_image": 1, "unknown_category": 1, "unknown_listed": 1, "duplicate_annotation_id": 1,
    "duplicate_category_name": 1, "duplicate_file": 1, "not_finite": 1, "degenerate": 1, "thin": 1, "out_of_frame": 1,
    "outside": 1, "area": 1, "polygon": 1, "duplicate": 1, "two_categories": 1, "negative_present": 1,
    "empty_category": 1, "empty_image": 1, "stated_count": 1, "stated_group": 2,
}  # fmt: skip


def test_every_kind_of_suspicious_entry_is_found_once(messy):
    found = {f.kind: f for f in inspect_annotations(messy).findings}
    assert {kind: f.count for kind, f in found.items()} == EXPECTED
    assert found["duplicate"].examples == [
        {"image": 1, "annotation": 2, "category": "cup", "detail": "as annotation 1 (cup)"}
    ]
    assert found["two_categories"].examples[0]["category"] == "<b>ladle</b>"
    assert found["out_of_frame"].examples[0]["annotation"] == 5
    assert found["outside"].examples[0]["annotation"] == 9
    assert found["negative_present"].examples[0] == {"image": 1, "category": "<b>ladle</b>", "detail": ""}
    assert found["stated_count"].examples == [{"category": "<b>ladle</b>", "detail": "stated 9, counted 1"}]


def test_a_clean_file_has_no_findings(tmp_path):
    images = [{"id": 1, "width": 50, "height": 50, "file_name": "a.jpg"}]
    annotations = [{"id": 1, "image_id": 1, "category_id": 1, **square(5, 5, 20)}]
    path = write(tmp_path / "clean.json", images, annotations, [{"id": 1, "name": "a"}])
    assert inspect_annotations(path).findings == []


def test_counts_agree_with_class_statistics(tiny_paths):
    json_file = tiny_paths["train"][0]
    found, statistics = inspect_annotations(json_file), ClassStatistics.from_json(json_file)
    # The page shows no fractal dimensions.
    assert found.statistics == dataclasses.replace(statistics, fractal_dimension=None)
    for letter, members in statistics.frequency_groups.items():
        assert np.flatnonzero(found.group == letter).tolist() == members.tolist()


def test_exposures_are_those_of_the_samplers(tiny_paths):
    """Against the samplers' own factors on Detectron2's records."""
    from detectron2.data.datasets import load_coco_json

    json_file, image_root = tiny_paths["train"]
    found = inspect_annotations(json_file, repeat_threshold=0.5)
    records = [r for r in load_coco_json(str(json_file), str(image_root)) if r["annotations"]]
    for annotation in (a for r in records for a in r["annotations"]):
        annotation["category_id"] -= 1  # without a name in the catalog the loader leaves the json's ids, 1 to 4
    factors = {
        "TrainingSampler": None,
        "RepeatFactorTrainingSampler": repeat_factors_from_category_frequency(records, 0.5),
        "InstanceAwareRepeatFactorSampler": instance_aware_repeat_factors(records, 0.5),
        "ClassBalancedSampler": sampler_by_name("ClassBalancedSampler", records, seed=0).repeat_factors,
    }
    by_name = {s.name: s for s in found.samplings}
    assert set(factors) <= set(by_name)
    for name, factor in factors.items():
        np.testing.assert_allclose(by_name[name].instances, expected_counts(records, 4, factor), rtol=1e-12)
        weight = np.ones(len(records)) if factor is None else factor.double().numpy()
        images = [sum(w for r, w in zip(records, weight) if k in {a["category_id"] for a in r["annotations"]})
                  for k in range(4)]  # fmt: skip
        np.testing.assert_allclose(by_name[name].images, images, rtol=1e-12)
        assert by_name[name].draws == pytest.approx(weight.sum(), rel=1e-12)


def long_tail(path, counts):
    """A category in each number of images, one category an image."""
    images, annotations = [], []
    for k, n in enumerate(counts):
        for _ in range(n):
            images.append({"id": len(images) + 1, "width": 64, "height": 64, "file_name": f"{len(images)}.jpg"})
            annotations.append({"id": len(images), "image_id": len(images), "category_id": k + 1, **square(5, 5, 20)})
    return write(path, images, annotations, [{"id": k + 1, "name": f"c{k}"} for k in range(len(counts))])


def test_the_advised_threshold_is_lviss_rule(tmp_path):
    # 1,000 images; common up to 100 of them: t = 100 / 1,000.
    advice = inspect_annotations(long_tail(tmp_path / "a.json", [700, 200, 90, 10])).advice
    assert advice.threshold == 0.1
    chosen = next(c for c in advice.candidates if c.threshold == 0.1)
    # sqrt(0.1 / 0.09) for 90 images, sqrt(0.1 / 0.01) for 10.
    assert chosen.draws == pytest.approx(900 + 90 * np.sqrt(0.1 / 0.09) + 10 * np.sqrt(10), rel=1e-6)
    assert chosen.largest == pytest.approx(np.sqrt(10), rel=1e-6)
    balanced = inspect_annotations(long_tail(tmp_path / "b.json", [150, 140, 160])).advice
    assert balanced.threshold is None and "1.1 times" in balanced.reasons[0]


def test_company_by_hand(tmp_path):
    """Two rare classes: one always with two frequent things, one alone."""
    images = [{"id": i, "width": 64, "height": 64, "file_name": f"{i}.jpg"} for i in range(1, 5)]
    rows = [(1, 1), (1, 2), (1, 2), (2, 1), (2, 1), (2, 2), (2, 2), (3, 3), (4, 2)]
    annotations = [
        {"id": i, "image_id": image, "category_id": c, **square(3 * i, 3 * i, 10)}
        for i, (image, c) in enumerate(rows, 1)
    ]
    categories = [{"id": 1, "name": "ladle", "frequency": "r"}, {"id": 2, "name": "cup", "frequency": "f"},
                  {"id": 3, "name": "sieve", "frequency": "r"}]  # fmt: skip
    found = inspect_annotations(write(tmp_path / "c.json", images, annotations, categories))
    ladle, sieve = found.companions
    assert (ladle["images"], ladle["instances"], ladle["with"]) == (2, 3, 100.0)
    assert ladle["per_instance"] == pytest.approx(4 / 3) and ladle["companions"] == "cup 100%"
    assert (sieve["with"], sieve["per_instance"], sieve["companions"]) == (0.0, 0.0, "")
    # Images with a rare class: 1, 2, 3 with 1, 2, 1 rare and 2, 2, 0 frequent instances; with a frequent one: 1, 2, 4.
    np.testing.assert_allclose(found.company, [[4 / 3, 0, 4 / 3], [np.nan] * 3, [1, 0, 5 / 3]], rtol=1e-12)

    # On the page: 0 % and 100 % stand in the first and the last of ten bars, and the groups are bands of the counts.
    def blocks(found, section):
        return next(s.blocks for s in dataset_page(found).sections if s.id == section)

    (bars,) = blocks(found, "company")[1].figure["data"]
    assert bars["y"].tolist() == [1] + 8 * [0] + [1] and bars["x"].tolist() == list(range(5, 100, 10))
    assert len(blocks(found, "classes")[0].figure["layout"]["shapes"]) == 2
    categories[2]["frequency"] = "f"  # below the rare one: the file's groups are not in the order of its counts
    found = inspect_annotations(write(tmp_path / "d.json", images, annotations, categories))
    assert not blocks(found, "classes")[0].figure["layout"]["shapes"]


@pytest.mark.parametrize("content, message", [
    ("[1, 2]", "not a complete LVIS or COCO json"),
    ('{"images": [], "annotations": []}', "has no images and no categories"),
    ('{"images": [{"id": 1, "width": 5, "height": 5}], "categories": [{"id": 1, "name": "a"}], "annotations": []}',
     "no annotation of its images"),
])  # fmt: skip
def test_bad_files_end_in_one_line(tmp_path, capsys, content, message):
    path = tmp_path / "bad.json"
    path.write_text(content)
    assert commands.inspect_dataset(["--annotations", str(path), "--output", str(tmp_path / "x.html")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lt-det inspect: ") and error.count("\n") == 1
    assert message in error and str(path) in error
    assert not (tmp_path / "x.html").exists()


def test_columns_keep_what_can_be_used(messy):
    data = read_annotations(messy)
    assert len(data.image) == 12 and data.federated
    assert data.names == ["cup", "<b>ladle</b>", "plate", "cup"]
    assert data.negative.tolist() == [[0, 1], [0, 2]] and data.not_exhaustive.tolist() == [[0, 0]]


def test_the_page_in_a_browser(messy, tmp_path, chromium):
    path = tmp_path / "page.html"
    dataset_page(inspect_annotations(messy)).write(path)
    chromium.open(path)
    chromium.draw_all()
    assert chromium.errors() == []
    assert chromium.run("return document.querySelectorAll('.chart svg.main-svg').length > 0")
    undrawn = (
        "return [...document.querySelectorAll('.chart')].filter(c => !c.querySelector('.plot, .cartesianlayer')).length"
    )
    assert chromium.run(undrawn) == 0
    # Names are text, not markup.
    assert chromium.run("return document.querySelectorAll('main b').length") == 0
    text = chromium.run("return document.querySelector('#suspicious').innerText")
    assert "Boxes wholly outside of their image" in text and "<b>ladle</b>" in text
    # The first table: sort by a click, search, filter by group.
    first = "return [...document.querySelectorAll('#classes tbody tr')].map(r => r.cells[0].textContent)"
    assert sorted(chromium.run(first)) == ["<b>ladle</b>", "cup", "cup", "plate"]
    click = "[...document.querySelectorAll('#classes th')].find(h => h.textContent.startsWith('images')).click();"
    chromium.run(click)  # ascending at first; a click turns it round
    images = "return [...document.querySelectorAll('#classes tbody tr')].map(r => +r.cells[2].textContent)"
    assert chromium.run(images) == sorted(chromium.run(images), reverse=True)
    chromium.run(
        "const s = document.querySelector('#classes input'); s.value = 'LAD'; s.dispatchEvent(new Event('input'));"
    )
    assert chromium.run(first) == ["<b>ladle</b>"]
    chromium.run(
        "const s = document.querySelector('#classes input'); s.value = ''; s.dispatchEvent(new Event('input'));"
    )
    chromium.run("[...document.querySelectorAll('#classes button')].find(b => b.textContent === 'common').click();")
    assert chromium.run(first) == ["plate"]


def test_the_command(tiny_paths, tmp_path, repo_dir, monkeypatch, capsys):
    page, numbers = tmp_path / "out/page.html", tmp_path / "out/numbers.json"
    arguments = ["--annotations", tiny_paths["train"][0], "--output", page, "--json", numbers, "--no-progress"]
    monkeypatch.setattr(sys, "argv", ["inspect_dataset.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(repo_dir / "tools/inspect_dataset.py"), run_name="__main__")
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert f"wrote {page}" in printed and "14 images, 4 categories" in printed
    content = json.loads(numbers.read_text())
    assert content["images"] == 14 and len(content["samplers"]) >= 4
    text = page.read_text(encoding="utf-8")
    assert 'http-equiv="Content-Security-Policy" content="default-src \'none\'' in text and len(text) < 6e6
